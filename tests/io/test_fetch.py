"""Runs that are brought home from a bucket or a directory, and what is in the way of it."""

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pitstop.core.errors import InputError
from pitstop.io import fetch as fetching
from pitstop.io.fetch import fetch
from pitstop.io.objects import open_store
from pitstop.io.remote import Remote
from pitstop.io.upload import Uploader

SECONDS = 60.0
"""Longer than anything takes here."""

Contents = dict[str, bytes]


def ledger(*starts: str) -> bytes:
    """A ledger; a kill has left its last line unfinished."""
    lines = [json.dumps({"id": name, "kind": kind}) for name in starts for kind in ("start", "end")]
    return "\n".join([*lines, '{"id": "unfin']).encode()


RUN: Contents = {
    "run.json": b'{"status": "interrupted", "step": 7}',
    "events.jsonl": b"1\n2\n",
    "ledger.jsonl": ledger("first"),
    "best.safetensors": b"weights" * 10_000,
    "checkpoints/7.pt": b"state",
    "plots/loss.png": b"png",
}
LATER: Contents = {**RUN, "run.json": b'{"step": 9}', "ledger.jsonl": ledger("first", "second")}
OTHER: Contents = {**RUN, "ledger.jsonl": ledger("another")}


def write(folder: Path, files: Contents) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(folder: Path) -> Contents:
    """The files of a directory but for its lock, by name."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def tar(files: Contents) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, content in files.items():
            add(archive, name, content)
    return data.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


def upload(remote: Remote, run: Path, sequence: int) -> None:
    """Keeps a copy of a run, as training does."""
    uploader = Uploader(remote, remote.claim())
    files = {name: run / name for name in sorted(contents(run))}
    uploader.offer(files, sequence=sequence, step=sequence, epoch=0.5, top1=None)
    assert uploader.wait(SECONDS), uploader.problem
    uploader.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home" / "run"


Bring = Callable[[str | Path, Path], list[str]]


@pytest.fixture
def bring() -> Bring:
    """Fetches, and returns what was said."""

    def bring(url: str | Path, directory: Path) -> list[str]:
        said: list[str] = []
        assert fetch(str(url), directory, said.append).path == directory
        return said

    return bring


@pytest.fixture(params=["bucket", "directory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place of each kind."""
    if request.param == "bucket":
        return request.getfixturevalue("bucket")
    (tmp_path / "there").mkdir()
    return str(tmp_path / "there")


def test_the_newest_copy_of_a_remote_comes_home(
    place: str, home: Path, tmp_path: Path, bring: Bring
) -> None:
    remote = Remote(f"{place}/mine")
    upload(remote, write(tmp_path / "run", RUN), 1)
    upload(remote, write(tmp_path / "run", LATER), 2)
    assert bring(f"{place}/mine", home) == []
    assert contents(home) == LATER


def test_a_folder_and_a_tar_file_come_home(place: str, home: Path, bring: Bring) -> None:
    store = open_store(place)
    for name, content in {**RUN, ".lock": b"", "checkpoints/8.pt.partial": b"half"}.items():
        store.put(f"job/checkpoints/{name}", content)
    store.put("job/output/model.tar.gz", tar(RUN))
    for url in ("job/checkpoints", "job/checkpoints/", "job/output/model.tar.gz"):
        bring(f"{place}/{url}", home)
        assert contents(home) == RUN
        shutil.rmtree(home)


def test_a_damaged_copy_is_told_and_the_one_before_it_comes(
    home: Path, tmp_path: Path, bring: Bring
) -> None:
    remote = Remote(str(tmp_path / "remote"))
    upload(remote, write(tmp_path / "run", RUN), 1)
    upload(remote, write(tmp_path / "run", LATER), 2)
    [newer] = (tmp_path / "remote").rglob("0002-*/ledger.jsonl")
    newer.write_bytes(b"x" * newer.stat().st_size)
    [said] = bring(tmp_path / "remote", home)
    assert "is damaged" in said
    assert contents(home) == RUN


def test_the_same_run_comes_again_as_it_went_on(home: Path, tmp_path: Path, bring: Bring) -> None:
    there = write(tmp_path / "there", RUN)
    bring(there, home)
    bring(there, home)
    write(there, LATER)
    bring(there, home)
    assert contents(home) == LATER


def test_an_empty_directory_is_good_enough(home: Path, tmp_path: Path, bring: Bring) -> None:
    home.mkdir(parents=True)
    bring(write(tmp_path / "there", RUN), home)
    assert contents(home) == RUN


# What is in the way


@pytest.mark.parametrize(
    ("here", "problem"),
    [
        (OTHER, "another run"),
        (LATER, "has gone on here"),
        ({"run.json": b"{}"}, "another run"),
        ({"thesis.txt": b"years"}, "holds no run"),
    ],
)
def test_what_is_there_is_not_overwritten(
    here: Contents, problem: str, home: Path, tmp_path: Path, bring: Bring
) -> None:
    write(home, here)
    with pytest.raises(InputError, match=problem):
        bring(write(tmp_path / "there", RUN), home)
    assert contents(home) == here


def test_a_file_is_no_directory(tmp_path: Path, bring: Bring) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="is a file"):
        bring(write(tmp_path / "there", RUN), tmp_path / "file")


def test_a_run_that_is_being_written_is_left_alone(
    home: Path, tmp_path: Path, bring: Bring
) -> None:
    from pitstop.io.run_directory import RunDirectory

    write(home, RUN)
    with RunDirectory(home).lock(), pytest.raises(InputError, match="another process"):
        bring(write(tmp_path / "there", LATER), home)
    assert contents(home) == RUN


def test_what_a_kill_has_left_is_in_nobodys_way(home: Path, tmp_path: Path, bring: Bring) -> None:
    write(home / fetching.SCRATCH, OTHER)
    bring(write(tmp_path / "there", RUN), home)
    assert contents(home) == RUN


# What is not there


def test_where_no_run_is_the_line_says_what_is(home: Path, tmp_path: Path, bring: Bring) -> None:
    write(tmp_path / "there", {"job/run.json": b"{}", "notes.txt": b""})
    with pytest.raises(InputError, match=r"no run, only job, notes\.txt"):
        bring(tmp_path / "there", home)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no run, nothing"):
        bring(tmp_path / "empty", home)
    with pytest.raises(InputError, match="is not a directory"):
        bring(tmp_path / "missing", home)
    with pytest.raises(InputError, match="is not there"):
        bring(tmp_path / "empty" / "model.tar.gz", home)
    Remote(str(tmp_path / "remote")).claim()
    with pytest.raises(InputError, match="complete yet"):
        bring(tmp_path / "remote", home)
    assert not home.exists()
    assert not (tmp_path / "missing").exists()


# Tar files that cannot be trusted


def unsafe(kind: str) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        add(archive, "run.json", b"{}")
        if kind == "parent":
            add(archive, "../escaped", b"!")
        elif kind == "through a link":
            add(archive, "link", type=tarfile.SYMTYPE, linkname="..")
            add(archive, "link/escaped", b"!")
        elif kind == "link inside":
            add(archive, "link", type=tarfile.SYMTYPE, linkname="run.json")
        elif kind == "hard link":
            add(archive, "link", type=tarfile.LNKTYPE, linkname="run.json")
        else:
            add(archive, "pipe", type=tarfile.FIFOTYPE)
    return data.getvalue()


@pytest.mark.parametrize("kind", ["parent", "through a link", "link inside", "hard link", "pipe"])
def test_a_tar_file_cannot_write_elsewhere(
    kind: str, home: Path, tmp_path: Path, bring: Bring
) -> None:
    (tmp_path / "model.tar.gz").write_bytes(unsafe(kind))
    with pytest.raises(InputError, match="not safe to unpack"):
        bring(tmp_path / "model.tar.gz", home)
    assert not home.exists()
    assert not [*tmp_path.rglob("escaped")]


def test_a_damaged_tar_file_brings_nothing(home: Path, tmp_path: Path, bring: Bring) -> None:
    whole = tar(RUN)
    plain = gzip.decompress(whole)
    broken = [
        b"",
        b"not gzip",
        whole[: len(whole) // 2],
        whole[:-4],
        whole[:200] + bytes(8) + whole[208:],
        gzip.compress(plain[: len(plain) // 2]),
        gzip.compress(b"x" * 2000),
        tar({"model/weights": b""}),
    ]
    for content in broken:
        (tmp_path / "model.tar.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"model\.tar\.gz: (is damaged|holds no run)"):
            bring(tmp_path / "model.tar.gz", home)
        assert not home.exists()
