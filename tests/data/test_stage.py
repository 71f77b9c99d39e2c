"""Staging from a loopback server that counts, holds back and falsifies what it is asked for."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pitstop.core.errors import InputError
from pitstop.data.manifest import STAGING, STAGING_LOCK
from pitstop.data.pack import pack
from pitstop.data.packed import PackedDataset
from pitstop.data.sources.digits import digits_source
from pitstop.data.stage import StagingStoppedError, stage
from pitstop.io.storage import locked

PART_BYTES = 8192
URL = "s3://bucket/digits"


class Server(ThreadingHTTPServer):
    """Answers ranged reads of a directory's files as an S3 server does."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.asked: list[tuple[str, int]] = []
        """Names and first bytes, in the order in which they came."""
        self.falsify: Callable[[str, bytes], bytes] = lambda name, content: content
        self.before: Callable[[str, int], object] = lambda name, start: None
        """Called before each answer; may block."""
        self.halfway: Callable[[str], object] = lambda name: None
        """Called when half of an answer is sent; may block."""

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/bucket/digits/")
        first, last = re.findall(r"\d+", self.headers.get("Range", "bytes=0-999999999"))
        self.server.asked.append((name, int(first)))
        self.server.before(name, int(first))
        path = self.server.root / name
        if not path.is_file():
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        content = self.server.falsify(name, path.read_bytes())
        part = content[int(first) : int(last) + 1]
        if not part:
            self._answer(416, b"<Error><Code>InvalidRange</Code></Error>")
            return
        self._answer(206, part, f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")

    def _answer(self, status: int, body: bytes, content_range: str | None = None) -> None:
        ranged = content_range and "Range" in self.headers
        self.send_response(200 if status == 206 and not ranged else status)
        if ranged:
            self.send_header("Content-Range", str(content_range))
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.end_headers()
        half = len(body) // 2
        self.wfile.write(body[:half])
        self.server.halfway(self.path.rpartition("/")[2])
        self.wfile.write(body[half:])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed dataset: 11 shards of 143 training images and 3 of validation."""
    out = tmp_path_factory.mktemp("stage") / "digits"
    pack(digits_source(), out, shard_bytes=20_000, workers=1)
    return out


@pytest.fixture
def server(digits: Path, aws: pytest.MonkeyPatch, tmp_path: Path) -> Generator[Server]:
    """A server of a copy of it, at `URL`; parts are small."""
    shutil.copytree(digits, tmp_path / "source")
    server = Server(tmp_path / "source")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    aws.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    aws.setattr("pitstop.data.stage.PART_BYTES", PART_BYTES)
    aws.setattr("pitstop.data.stage._BEHIND_BYTES", PART_BYTES)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def gate(server: Server) -> Generator[threading.Event]:
    """Opens at the end at the latest, so that no answer is held for ever."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def content(folder: Path) -> dict[str, bytes]:
    """What is in a dataset's directory, but for the lock."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != STAGING_LOCK}


def wait_until(so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not so():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.005)


def finished_parts(out: Path) -> set[tuple[str, int]]:
    """The parts that need not be fetched again."""
    found: set[tuple[str, int]] = set()
    for path in out.glob("*.arrow"):
        found |= {(path.name, start) for start in range(0, path.stat().st_size, PART_BYTES)}
    for path in out.glob("*.arrow.partial"):
        with contextlib.suppress(FileNotFoundError):  # the file has just got its name
            whole = path.stat().st_size // PART_BYTES
            found |= {(path.stem, number * PART_BYTES) for number in range(whole)}
    return found


def parts_of(server: Server) -> set[tuple[str, int]]:
    """The parts of shards and indices that were asked for."""
    return {(name, start) for name, start in server.asked if name.endswith(".arrow")}


@pytest.mark.parametrize("kind", ["bucket", "directory"])
def test_a_staged_dataset_is_the_dataset(kind: str, server: Server, out: Path) -> None:
    report = stage(URL if kind == "bucket" else str(server.root), out)
    assert content(out) == content(server.root)
    size = sum(p.stat().st_size for p in out.glob("*.arrow"))
    assert (report.files, report.bytes) == (16, size)
    assert (report.copied_files, report.copied_bytes) == (16, size)
    there, staged = PackedDataset.open(server.root), PackedDataset.open(out)
    assert staged.digest == there.digest
    assert staged.train.read(1437) == there.train.read(1437)


def test_a_dataset_is_staged_from_a_bucket_with_many_of_them(
    bucket: str, digits: Path, out: Path
) -> None:
    from pitstop.io.objects import open_store

    store = open_store(f"{bucket}/sets")
    for path in digits.iterdir():
        store.put(f"digits/{path.name}", path)
        store.put(f"digits-2/{path.name}", b"")
    stage(f"{bucket}/sets/digits/", out)
    assert content(out) == content(digits)


def test_a_second_staging_copies_nothing(server: Server, out: Path) -> None:
    stage(URL, out)
    server.asked.clear()
    report = stage(URL, out)
    assert server.asked == [("manifest.json", 0)]
    assert (report.copied_files, report.copied_bytes) == (0, 0)


def test_what_was_lost_is_fetched_again_and_nothing_else(server: Server, out: Path) -> None:
    stage(URL, out)
    server.asked.clear()
    (out / "train-00003.arrow").unlink()
    os.truncate(out / "val-00001.arrow", 100)
    assert stage(URL, out).copied_files == 2
    assert {name for name, _ in parts_of(server)} == {"train-00003.arrow", "val-00001.arrow"}
    assert content(out) == content(server.root)


STAGE = f"""
import sys
import pitstop.data.stage
from pitstop.cli import main
pitstop.data.stage.PART_BYTES = {PART_BYTES}
main()
"""


@contextlib.contextmanager
def held_staging(server: Server, out: Path, gate: threading.Event, parts: int):
    """A process that stages, and has this many parts; the others are held back."""

    def before(name: str, start: int) -> None:
        if name.endswith(".arrow") and len(parts_of(server)) > parts:
            gate.wait()

    server.before = before
    command = [sys.executable, "-c", STAGE, "data", "stage", URL, str(out), "--concurrency", "3"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: len(finished_parts(out)) == parts)
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("parts", [2, 9, 21])
def test_a_killed_staging_goes_on_where_it_was(
    parts: int, server: Server, gate: threading.Event, out: Path
) -> None:
    with held_staging(server, out, gate, parts) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = finished_parts(out)
    assert len(finished) == parts
    assert not (out / "manifest.json").exists()
    gate.set()
    server.asked.clear()
    stage(URL, out)
    assert not finished & parts_of(server)
    assert content(out) == content(server.root)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_at_once_and_keeps_what_is_there(
    number: signal.Signals, server: Server, gate: threading.Event, out: Path
) -> None:
    with held_staging(server, out, gate, 9) as process:
        process.send_signal(number)
        assert process.wait(timeout=30) == 75
        assert process.stderr is not None
        assert process.stderr.read() == f"stopped by {number.name}: the same command goes on\n"
    assert len(finished_parts(out)) == 9


def test_it_stops_when_it_is_told_to(server: Server, gate: threading.Event, out: Path) -> None:
    server.before = lambda name, start: name.startswith("train-00002") and gate.wait()
    with pytest.raises(StagingStoppedError):
        stage(URL, out, should_stop=lambda: ("train-00002.arrow", 0) in server.asked)
    gate.set()
    stage(URL, out)
    assert content(out) == content(server.root)


def test_a_part_that_was_cut_off_goes_on_at_its_last_piece(
    server: Server, gate: threading.Event, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pitstop.data.stage.PART_BYTES", 2**20)
    monkeypatch.setattr("pitstop.io.objects._CHUNK_BYTES", 100)
    server.halfway = lambda name: name == "train-00002.arrow" and gate.wait()
    partial, half = out / "train-00002.arrow.partial", 26570 // 2

    def half_is_there() -> bool:
        return partial.exists() and partial.stat().st_size == half

    with pytest.raises(StagingStoppedError):
        stage(URL, out, should_stop=half_is_there)
    gate.set()
    server.asked.clear()
    stage(URL, out)
    assert [start for name, start in server.asked if name == "train-00002.arrow"] == [half]
    assert content(out) == content(server.root)


def test_what_the_machine_lost_when_it_stopped_is_fetched_again(
    server: Server, gate: threading.Event, out: Path
) -> None:
    partial = out / "train-00002.arrow.partial"
    server.before = lambda name, start: name == "train-00002.arrow" and start > 0 and gate.wait()
    with pytest.raises(StagingStoppedError):
        stage(
            URL,
            out,
            should_stop=lambda: partial.exists() and partial.stat().st_size == PART_BYTES,
        )
    partial.write_bytes(bytes(PART_BYTES))
    gate.set()
    server.asked.clear()
    stage(URL, out)
    asked = [start for name, start in server.asked if name == "train-00002.arrow"]
    assert asked == [PART_BYTES, 2 * PART_BYTES, 3 * PART_BYTES, 0, *asked[4:]]
    assert content(out) == content(server.root)


def test_a_falsified_file_is_fetched_twice_and_named(server: Server, out: Path) -> None:
    wrong = bytes([(server.root / "train-00004.arrow").read_bytes()[0] ^ 1])
    server.falsify = lambda name, content: (
        wrong + content[1:] if name == "train-00004.arrow" else content
    )
    with pytest.raises(InputError, match=r"^s3://bucket/digits/train-00004\.arrow: its checksum"):
        stage(URL, out)
    assert server.asked.count(("train-00004.arrow", 0)) == 2
    assert not (out / "train-00004.arrow").exists()
    assert not (out / "manifest.json").exists()
    server.falsify = lambda name, content: content
    stage(URL, out)
    assert content(out) == content(server.root)


def test_a_file_that_is_falsified_once_does_not_matter(server: Server, out: Path) -> None:
    def falsify(name: str, content: bytes) -> bytes:
        once = name == "train-00004.arrow" and server.asked.count((name, 0)) == 1
        return bytes(len(content)) if once else content

    server.falsify = falsify
    stage(URL, out)
    assert content(out) == content(server.root)


@pytest.mark.parametrize("left", [10_000, 8192, 0])
def test_a_file_that_was_cut_short_is_named(left: int, server: Server, out: Path) -> None:
    server.falsify = lambda name, content: (
        content[:left] if name == "train-00004.arrow" else content
    )
    with pytest.raises(InputError, match=r"^s3://bucket/digits/train-00004\.arrow: .*short"):
        stage(URL, out)


def test_a_file_that_is_missing_is_named(server: Server, out: Path) -> None:
    (server.root / "train-00004.arrow").unlink()
    with pytest.raises(InputError, match=r"^s3://bucket/digits/train-00004\.arrow: is not there"):
        stage(URL, out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    """A disk with room for one dataset and little more."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.root
def test_a_disk_without_room_is_refused_before_anything_is_fetched(
    server: Server, small_disk: Path
) -> None:
    (small_disk / "filler").write_bytes(bytes(700_000))
    with pytest.raises(InputError, match=r"kB are missing and .* kB are free: free some space"):
        stage(URL, small_disk / "out")
    assert server.asked == [("manifest.json", 0)]


@pytest.mark.root
def test_a_disk_that_fills_up_says_so_and_the_same_command_goes_on(
    server: Server, small_disk: Path
) -> None:
    filler, out = small_disk / "filler", small_disk / "out"

    def fill(name: str, start: int) -> None:
        if name == "train-00005.arrow":
            with contextlib.suppress(OSError), filler.open("wb") as file:
                file.write(bytes(1_000_000))

    server.before = fill
    with pytest.raises(InputError, match=r"out: cannot be written \(No space left .*free some"):
        stage(URL, out, concurrency=2)
    finished = finished_parts(out)
    assert finished
    filler.unlink()
    server.before = lambda name, start: None
    server.asked.clear()
    stage(URL, out)
    assert not finished & parts_of(server)
    assert content(out) == content(server.root)


def test_what_the_first_fraction_needs_comes_first_and_can_be_read(
    server: Server, gate: threading.Event, out: Path
) -> None:
    """Fractions 0.2 and 0.5 of 1438 rows lie in the first 3 and 6 of 11 shards."""
    server.before = lambda name, start: (
        name > "train-00002.arrow" and name < "train." and gate.wait()
    )
    with ThreadPoolExecutor() as pool:
        staging = pool.submit(stage, URL, out, fractions=(0.2, 0.5), concurrency=1)
        wait_until((out / "manifest.json").exists)
        early = {name for name in content(out) if name.endswith(".arrow")}
        assert early == {
            *(f"train-0000{n}.arrow" for n in range(3)),
            *(f"val-0000{n}.arrow" for n in range(3)),
            "train.index.arrow",
            "val.index.arrow",
        }
        assert json.loads((out / STAGING).read_text())["pid"] == os.getpid()
        whole, staged = PackedDataset.open(server.root), PackedDataset.open(out)
        assert staged.train.read(287) == whole.train.read(287)
        waiting = pool.submit(staged.train.read, 1437)
        gate.set()
        assert waiting.result() == whole.train.read(1437)
        staging.result()
    assert content(out) == content(server.root)
    shards = [name for name, start in server.asked if name.startswith("train-") and start == 0]
    assert shards == sorted(shards)


def test_the_second_fraction_comes_before_the_rest(server: Server, out: Path) -> None:
    stage(URL, out, fractions=(0.05, 1.0, 0.5), concurrency=1)
    names = list(dict.fromkeys(name for name, _ in server.asked if name.startswith("train-")))
    assert names == [f"train-{n:05d}.arrow" for n in range(11)]


def test_the_smaller_copies_of_the_first_fraction_come_first_too(
    server: Server, gate: threading.Event, out: Path
) -> None:
    manifest = json.loads((server.root / "manifest.json").read_text())
    train = manifest["splits"]["train"]
    shards = []
    for entry in train["shards"]:
        file = entry["file"].replace("train-", "train-160-")
        shutil.copy(server.root / entry["file"], server.root / file)
        shards.append({**entry, "file": file})
    index = {**train["index"], "file": "train-160.index.arrow"}
    shutil.copy(server.root / train["index"]["file"], server.root / index["file"])
    train["levels"] = {"160": {"content": train["content"], "shards": shards, "index": index}}
    (server.root / "manifest.json").write_text(json.dumps(manifest))
    server.before = lambda name, start: "00010" in name and gate.wait()
    with ThreadPoolExecutor() as pool:
        staging = pool.submit(stage, URL, out, fractions=(0.2,))
        wait_until((out / "manifest.json").exists)
        for name in ("train-160-00002.arrow", "train-160.index.arrow", "train-00002.arrow"):
            assert (out / name).exists()
        gate.set()
        staging.result()
    assert content(out) == content(server.root)


def test_a_bucket_without_a_dataset_is_refused_and_nothing_is_made(
    server: Server, out: Path
) -> None:
    (server.root / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"^s3://bucket/digits: has no manifest\.json: name a"):
        stage(URL, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("manifest", "what"),
    [
        ("nonsense", r"is damaged \(not JSON\)"),
        ("[]", "is not of a packed dataset"),
        ('{"format": "pitstop packed images"}', "has version None"),
    ],
)
def test_a_manifest_that_is_none_is_refused(
    manifest: str, what: str, server: Server, out: Path
) -> None:
    (server.root / "manifest.json").write_text(manifest)
    with pytest.raises(InputError, match=rf"^s3://bucket/digits/manifest\.json {what}"):
        stage(URL, out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["../train-00000.arrow", "/tmp/train-00000.arrow"])
def test_a_manifest_cannot_write_outside(name: str, server: Server, out: Path) -> None:
    path = server.root / "manifest.json"
    path.write_text(path.read_text().replace("train-00000.arrow", name))
    with pytest.raises(InputError, match=r"shards\[0\]\.file is missing or wrong"):
        stage(URL, out)


def test_a_directory_of_something_else_is_left_alone(server: Server, out: Path) -> None:
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(InputError, match=r"out: holds something other than what is at s3://"):
        stage(URL, out)
    assert content(out) == {"mine": b"mine"}


def test_another_version_of_the_dataset_is_not_mixed_with_the_first(
    server: Server, out: Path
) -> None:
    stage(URL, out)
    manifest = server.root / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(InputError, match=r"out: holds something other than what is at s3://"):
        stage(URL, out)


def test_a_directory_is_staged_by_one_process_at_a_time(server: Server, out: Path) -> None:
    with (
        locked(out / STAGING_LOCK, "busy"),
        pytest.raises(InputError, match=r"out: another process stages it: wait for it"),
    ):
        stage(URL, out)


def test_progress_goes_from_nothing_to_all(server: Server, out: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = stage(URL, out, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (report.bytes, report.bytes)
