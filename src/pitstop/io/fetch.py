"""Brings a run home: from the remote copy that it kept, from a folder of a bucket, from a tar file.

Nothing is put in place before everything is there. What is there already has to be the same run,
as it was before: the starts in its ledger have names of their own, which tell.
"""

import gzip
import json
import shutil
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from io import BufferedReader, RawIOBase
from pathlib import Path, PurePosixPath
from typing import Any

from pitstop.core.errors import InputError
from pitstop.io.cache import cache_directory
from pitstop.io.objects import ObjectStore, open_store
from pitstop.io.remote import Remote, is_inside
from pitstop.io.run_directory import RunDirectory
from pitstop.io.storage import PARTIAL, sync

TAR = ".tar.gz"

SCRATCH = ".fetch"
"""The folder, in the run's, of what is not complete yet."""

_CHUNK_BYTES = 2**18

Say = Callable[[str], None]


def fetch(url: str, directory: Path, say: Say) -> RunDirectory:
    """Downloads a run, with its records and models, into a directory.

    Args:
        url: the `--remote` of a run, of which the newest whole snapshot is taken; a folder that
            holds a run directory as it is; or a `.tar.gz` file of one. In a bucket (s3, gs, az) or
            in a directory.
        directory: is made; or is empty, or holds the same run, which has not gone on there.
        say: is told what is damaged and left out.

    Returns:
        The run, in `directory`.

    Raises:
        InputError: there is no run at the URL, it is damaged, or something else is in the way.
    """
    run = RunDirectory(directory)
    _refuse_foreign(directory)
    with run.lock(), _scratch(directory) as scratch:
        _download(url, scratch, say)
        _refuse_other(run, RunDirectory(scratch), url)
        _put_in_place(scratch, directory)
    return run


def place_of(name: str, say: Say) -> Path:
    """Returns where a run or a weights file lies: a run in a bucket is brought into the cache.

    Args:
        name: a path, or the URL of a run.
        say: as of `fetch`.

    Raises:
        InputError: as `fetch`.
    """
    if "://" not in name:
        return Path(name).expanduser()
    folder = f"{PurePosixPath(name).name}-{sha256(name.encode()).hexdigest()[:16]}"
    return fetch(name, cache_directory() / "runs" / folder, say).path


def _refuse_foreign(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: is a file: name a directory")
    names = {path.name for path in directory.iterdir()} if directory.exists() else set[str]()
    if not names <= {".lock", SCRATCH} and not _holds_run(names):
        raise InputError(f"{directory}: is not empty and holds no run: name another directory")


def _holds_run(names: Iterable[str]) -> bool:
    """Tells whether files, by their paths in a folder, are those of a run directory."""
    marks = {"run.json", "events.jsonl", "checkpoints"}
    return any(name.partition("/")[0] in marks for name in names)


@contextmanager
def _scratch(directory: Path) -> Generator[Path]:
    """Yields an empty folder, which is removed; so is what a kill has left there."""
    scratch = directory / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)


def _download(url: str, to: Path, say: Say) -> None:
    if url.endswith(TAR):
        folder, _, name = url.rpartition("/")
        _extract(open_store(folder or "."), name, to)
        return
    store = open_store(url)
    keys = [found.key for found in store.list()]
    if any(key.startswith("attempts/") for key in keys):
        remote = Remote(url)
        snapshot = remote.newest(say)
        if snapshot is None:
            raise InputError(f"{url}: no snapshot of the run is complete yet: try again later")
        remote.restore(snapshot, to, say)
        return
    _copy(store, keys, to)


def _copy(store: ObjectStore, keys: list[str], to: Path) -> None:
    """Downloads the objects of a folder, but only if they are a run directory."""
    if not _holds_run(keys):
        folders = sorted({key.partition("/")[0] for key in keys})
        found = f"only {', '.join(folders[:5])}" if keys else "nothing"
        raise InputError(f"{store.url}: holds no run, {found}: name the folder of a run")
    for key in keys:
        if not is_inside(key):
            raise InputError(f"{store.url_of(key)}: is not the name of a file: remove it")
        if key.endswith((".lock", PARTIAL)):
            continue
        place = to / key
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("wb") as file:
            file.writelines(store.stream(key))


def _extract(store: ObjectStore, name: str, to: Path) -> None:
    """Unpacks a tar file as it comes."""
    url = store.url_of(name)
    packed = BufferedReader(_Pieces(store.stream(name)))
    try:
        with gzip.open(packed) as content:  # tarfile's own way does not compare the checksum
            with tarfile.open(fileobj=content, mode="r|") as archive:
                archive.extractall(to, filter=_safe)
            while content.read(_CHUNK_BYTES):
                pass
    except tarfile.FilterError as error:
        raise InputError(f"{url}: is not safe to unpack: {error}") from None
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{url}: is damaged: {error}") from None
    if not _holds_run(path.name for path in to.iterdir()):
        raise InputError(f"{url}: holds no run: name another file")


def _safe(member: tarfile.TarInfo, to: str) -> tarfile.TarInfo:
    """Refuses what is neither file nor folder, or leads out of `to`."""
    if not (member.isfile() or member.isdir()):
        raise tarfile.SpecialFileError(member)
    return tarfile.data_filter(member, to)


class _Pieces(RawIOBase):
    """Pieces of bytes, as a file to read."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or next(self._pieces, b"")
        count = min(len(self._rest), len(buffer))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _refuse_other(run: RunDirectory, fetched: RunDirectory, url: str) -> None:
    """Raises InputError when there is another run in the directory, or this one went on there."""
    if not _holds_run(path.name for path in run.path.iterdir()):
        return
    here, there = _starts(run.ledger), _starts(fetched.ledger)
    if not here & there:
        raise InputError(f"{run.path}: holds another run than {url}: name another directory")
    if not here <= there:
        raise InputError(f"{run.path}: the run has gone on here since: name another directory")


def _starts(ledger: Path) -> set[str]:
    """Returns the names of a run's starts."""
    lines = ledger.read_bytes().splitlines() if ledger.exists() else []
    names: set[str] = set()
    for line in lines:
        try:
            event = json.loads(line)
            names.add(event["id"])
        except (ValueError, KeyError, TypeError):  # a kill left it unfinished
            continue
    return names


def _put_in_place(scratch: Path, directory: Path) -> None:
    files = sorted(path for path in scratch.rglob("*") if path.is_file())
    for path in files:
        sync(path)
        place = directory / path.relative_to(scratch)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    for folder in {(directory / path.relative_to(scratch)).parent for path in files}:
        sync(folder)
