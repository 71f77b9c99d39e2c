"""The hub's part is played by a server on loopback, as far as huggingface_hub asks it."""

import json
import re
from collections.abc import Generator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub.constants
import pytest

from pitstop.core.errors import InputError
from pitstop.data.resolve import resolve
from pitstop.data.sources.base import Source

from .conftest import packed_rows, read_all, tar_bytes
from .test_parquet import write


@dataclass
class Hub:
    """Datasets by name and revision ("main" is the default one): files by name."""

    datasets: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    tokens: set[str | None] = field(default_factory=set)
    sent: list[str] = field(default_factory=list)
    """The files that were downloaded."""
    break_off: bool = False
    """Connections break in the middle of a file."""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        path = path.partition("?")[0]
        if match := re.fullmatch(r"/api/datasets/(\w+/[\w-]+)(?:/(revision|tree)/(.+))?", path):
            name, what, revision = match.groups()
            return self._about(name, what, (revision or "main").replace("%2F", "/"))
        if match := re.fullmatch(r"/datasets/(\w+/[\w-]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = match.groups()
            return self._file(self._revision(name, revision)[file], revision)
        return 404, {}, b""

    def _revision(self, name: str, revision: str) -> dict[str, bytes]:
        """The commit of a revision begins with it."""
        known = self.datasets[name]
        return known.get(revision) or next(known[r] for r in known if commit(r) == revision)

    def _about(self, name: str, what: str | None, revision: str):
        if name in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if name not in self.datasets:
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        known = self.datasets[name]
        if revision not in known and revision not in map(commit, known):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = self._revision(name, revision)
        if what == "tree":
            entries = [
                {"type": "file", "path": n, "size": len(d), "oid": sha256(d).hexdigest()[:40]}
                for n, d in files.items()
            ]
            return 200, {}, json.dumps(entries).encode()
        sha = commit(revision) if revision in known else revision
        about = {"id": name, "sha": sha, "siblings": [{"rfilename": n} for n in files]}
        return 200, {}, json.dumps(about).encode()

    def _file(self, data: bytes, sha: str):
        headers = {"ETag": f'"{sha256(data).hexdigest()}"', "X-Repo-Commit": sha}
        return 200, headers, data


def commit(revision: str) -> str:
    return sha256(revision.encode()).hexdigest()[:40]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Generator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            hub.tokens.add(self.headers["Authorization"])
            status, headers, body = hub.answer(self.path)
            start = int((self.headers["Range"] or "bytes=0-")[6:].partition("-")[0])
            is_file = "/resolve/" in self.path and self.command == "GET"
            self.send_response(206 if start else status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.end_headers()
            if is_file:
                hub.sent.append(self.path.rpartition("/")[2])
            if self.command == "GET":
                self.wfile.write(
                    body[start : len(body) // 2 if hub.break_off and is_file else None]
                )

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def parquet(tmp_path, images):
    """Makes a Parquet file of images of two classes."""

    def parquet(*numbers: int) -> bytes:
        path = tmp_path / "made.parquet"
        labels = [n % 2 for n in numbers]
        return write(path, map(images, numbers), labels, names=["cat", "dog"]).read_bytes()

    return parquet


def test_parquet_of_the_hub(hub, tmp_path, images, parquet):
    hub.datasets["owner/pets"] = {
        "main": {
            "README.md": b"---",
            "data/train-00000-of-00001.parquet": parquet(*range(6)),
            "data/validation-00000-of-00001.parquet": parquet(6, 7),
            "data/test-00000-of-00001.parquet": parquet(8, 9),
        }
    }
    source = resolve("hf://owner/pets")
    assert isinstance(source, Source)
    assert (source.origin, source.classes) == ("hf://owner/pets", ("cat", "dog"))
    rows = packed_rows(source, tmp_path / "packed")
    assert len(rows) == 8
    assert rows["data/validation-00000-of-00001.parquet/0000001"] == ("dog", images(7))
    assert sorted(hub.sent) == [
        "train-00000-of-00001.parquet",
        "validation-00000-of-00001.parquet",
    ]
    assert resolve("hf://datasets/owner/pets@main/").train == source.train
    assert len(hub.sent) == 2  # what is in the cache is not downloaded again
    assert hub.tokens == {None}


def test_configurations_and_revisions(hub, parquet):
    hub.datasets["owner/many"] = {
        "main": {f"{c}/train-0.parquet": parquet(*range(n)) for c, n in (("big", 8), ("tiny", 4))},
        "v1": {"train.parquet": parquet(*range(20))},
    }
    with pytest.raises(InputError, match=r"several configurations: add one of big, tiny, as in hf"):
        resolve("hf://owner/many")
    with pytest.raises(InputError, match="has no configuration 'huge': take one of big, tiny"):
        resolve("hf://owner/many/huge")
    counts = {}
    for spec in ("hf://owner/many/big", "hf://owner/many@main/tiny", "hf://owner/many@v1"):
        source = resolve(spec)
        assert isinstance(source, Source)
        counts[spec] = len(source.train) + len(source.val)
    assert list(counts.values()) == [8, 4, 20]


def test_what_the_hub_has_converted(hub, parquet):
    hub.datasets["owner/folders"] = {
        "main": {"cat/1.jpg": b"x"},
        "refs/convert/parquet": {
            "default/train/0000.parquet": parquet(*range(4)),
            "default/test/0000.parquet": parquet(4, 5),
        },
    }
    source = resolve("hf://owner/folders")
    assert isinstance(source, Source)
    assert [item.name for item in source.val] == [
        f"default/test/0000.parquet/000000{row}" for row in range(2)
    ]


def test_webdataset_of_the_hub(hub, tmp_path, images):
    def shard(*numbers: int) -> bytes:
        return tar_bytes(
            {
                f"{n}.{e}": images(n) if e == "jpg" else b"%d" % (n % 2)
                for n in numbers
                for e in ("jpg", "cls")
            }
        )

    files = {"x-train-0.tar": shard(*range(4)), "x-validation-0.tar": shard(4, 5)}
    hub.datasets["timm/wds"] = {"main": files}
    source = resolve("hf://timm/wds")
    assert isinstance(source, Source)
    assert read_all(source, tmp_path)["x-validation-0.tar/5.jpg"] == images(5)


def test_a_download_that_breaks_off_goes_on(hub, parquet, monkeypatch):
    data = parquet(*range(40))
    hub.datasets["owner/pets"] = {"main": {"train.parquet": data}}
    hub.break_off = True
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    with pytest.raises(InputError, match=r"hf://owner/pets was not downloaded \(.*try again") as e:
        resolve("hf://owner/pets")
    assert "\n" not in str(e.value)
    hub.break_off = False
    source = resolve("hf://owner/pets")
    assert isinstance(source, Source)
    assert len(source.train) == 36


def test_the_token_comes_from_the_environment_and_is_never_shown(hub, parquet, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.datasets["owner/pets"] = {"main": {"train.parquet": parquet(*range(20))}}
    source = resolve("hf://owner/pets")
    assert hub.tokens == {"Bearer hf_secret"}
    hub.gated.add("owner/pets")
    with pytest.raises(InputError) as error:
        resolve("hf://owner/pets")
    assert "hf_secret" not in f"{error.value}{source}{capfd.readouterr()}"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf://owner/gone", "is not on the hub: check the name, or set HF_TOKEN if it is private"),
        ("hf://owner/gated", "is gated: accept its terms on its page, and set HF_TOKEN"),
        ("hf://owner/empty", "has no Parquet files: download it, and name a class folder"),
        ("hf://owner/empty@v9", "there is no such revision: check it"),
        ("hf://owner", r"write it as hf://OWNER/NAME\[@REVISION\]\[/CONFIG\]"),
        ("hf://own er/x", "write it as hf://OWNER/NAME"),
        ("hf://owner--x/a..b", "write it as hf://OWNER/NAME"),
    ],
)
def test_refuses_in_one_line(hub, spec, message):
    hub.gated.add("owner/gated")
    hub.datasets["owner/empty"] = {"main": {"README.md": b""}}
    with pytest.raises(InputError, match=message) as error:
        resolve(spec)
    assert str(error.value).startswith(spec)
    assert "\n" not in str(error.value)


def test_no_network(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set: unset it"):
        resolve("hf://owner/pets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(InputError, match=r"was not downloaded .*check the network") as error:
        resolve("hf://owner/pets")
    assert "\n" not in str(error.value)
