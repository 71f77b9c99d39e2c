"""The remote copy of a run, in a bucket or a directory: attempts and snapshots.

attempts/0003/claim.json                              of each start: who, when, with which pitstop
attempts/0003/0007-step-00012345/best.safetensors     what was new in a snapshot
attempts/0003/0007-step-00012345/manifest.json        written last

Each start of a run claims an attempt by a create-only put, so that two processes never write under
one number. A **snapshot** is the run directory as an empty machine needs it. Without its manifest
it does not count. The manifest names the key of each file: under an older snapshot or attempt,
where the content has not changed since. Keys are never written twice.
"""

import hashlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from pydantic import TypeAdapter

from pitstop import __version__
from pitstop.core.errors import InputError
from pitstop.io.objects import MissingObjectError, ObjectExistsError, Patience, open_store
from pitstop.io.storage import PARTIAL, sync

Say = Callable[[str], None]

PATIENCE = Patience(read_seconds=60.0)
"""A line of 4.5 Mbit/s brings the parts under way to the other side in this time."""

_ROOT = "attempts"
_CLAIM = re.compile(r"attempts/(?P<attempt>\d{4,})/claim\.json")
_FOLDER = r"attempts/(?P<attempt>\d{4,})/(?P<sequence>\d{4,})-step-\d{8,}(-(?P<again>\d+))?"
_MANIFEST = re.compile(rf"{_FOLDER}/manifest\.json")
_KEY = re.compile(rf"{_FOLDER}/.+")

_CLAIMS = 100
"""So many are tried: others may be faster, but not always."""

_FILES_AT_ONCE = 8
"""When a snapshot is restored."""


@dataclass(frozen=True)
class StoredFile:
    """A file in the remote."""

    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Snapshot:
    """A manifest: a run as it was at a save. `sequence` counts the saves of the run's life."""

    attempt: int
    sequence: int
    step: int
    epoch: float
    top1: float | None
    """Of the evaluation at this step in percent, None without one."""
    time: str
    """UTC, when it was offered."""
    files: dict[str, StoredFile]
    """By their paths in the run directory, in the order in which they are put in place there."""
    needed: tuple[str, ...]
    """The names of those without which the run cannot go on."""
    key: str
    """Of the manifest; not in it."""

    @property
    def age(self) -> tuple[int, int]:
        """Orders the states of a run in time: attempt, sequence."""
        return self.attempt, self.sequence

    @property
    def rank(self) -> tuple[int, int, int]:
        """Orders the snapshots of a run: attempt, sequence, and which try it was to upload it."""
        return _rank(self.key)

    def to_json(self) -> bytes:
        """Returns the manifest."""
        fields = asdict(self)
        del fields["key"]
        return json.dumps(fields, indent=1).encode()

    @classmethod
    def parse(cls, key: str, content: bytes) -> "Snapshot":
        """Returns the snapshot of a manifest.

        Raises:
            ValueError: it is damaged, or it names a file outside the run directory or a key
                outside the snapshots.
        """
        snapshot = TypeAdapter(cls).validate_python({**json.loads(content), "key": key})
        if (snapshot.attempt, snapshot.sequence) != snapshot.rank[:2]:
            raise ValueError("is of another snapshot")
        for name, file in snapshot.files.items():
            if not is_inside(name):
                raise ValueError(f"names {name!r}, which is not inside the run directory")
            if not (_KEY.fullmatch(file.key) and is_inside(file.key)):
                raise ValueError(f"names {file.key!r}, which is no key of a snapshot")
        if not snapshot.files.keys() >= set(snapshot.needed):
            raise ValueError("needs a file that it does not name")
        return snapshot


def is_inside(name: str) -> bool:
    """Says whether a name is a plain relative path: no `..`, not absolute, not empty."""
    parts = PurePosixPath(name).parts
    return bool(parts) and "/".join(parts) == name and ".." not in parts and name.isprintable()


@dataclass(frozen=True)
class Listing:
    """What there was in the remote when it was listed."""

    sizes: dict[str, int]
    """Bytes of the objects, by key."""

    def attempts(self) -> list[int]:
        """Returns the attempts that were claimed or have a manifest, the latest first."""
        matches = (_CLAIM.fullmatch(key) or _MANIFEST.fullmatch(key) for key in self.sizes)
        return sorted({int(match["attempt"]) for match in matches if match}, reverse=True)

    def manifests(self, attempt: int) -> list[str]:
        """Returns the keys of an attempt's manifests, the newest first."""
        keys = [key for key in self.sizes if _MANIFEST.fullmatch(key) and _rank(key)[0] == attempt]
        return sorted(keys, key=_rank, reverse=True)

    def has(self, file: StoredFile) -> bool:
        """Says whether a file is there and as long as it should be."""
        return self.sizes.get(file.key) == file.bytes


class Remote:
    """A run's attempts and snapshots under a URL.

    Args:
        url: `s3://bucket/folder`, `gs://...`, `az://...` or a directory, which is made if the one
            that it lies in exists.

    Raises:
        InputError: see `open_store`; all methods raise it when the store cannot be used.
    """

    def __init__(self, url: str, patience: Patience = PATIENCE) -> None:
        self.store = open_store(url, make_directory=True, patience=patience)

    def claim(self, *, starts_over: bool = False, above: int = 0) -> int:
        """Returns the number of a new attempt: higher than all before, and nobody else's.

        Args:
            starts_over: what was before this attempt does not belong to the run: it is neither
                restored nor removed.
            above: an attempt that the number has to exceed: of another bucket, perhaps.
        """
        claim = {
            "id": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": timestamp(time.time()),
            "version": __version__,
            "starts_over": starts_over,
        }
        content = json.dumps(claim, indent=1).encode()
        for _ in range(_CLAIMS):
            attempt = max([above, *self.list().attempts()]) + 1
            key = f"{_ROOT}/{attempt:04d}/claim.json"
            try:
                self.store.create(key, content)
            except ObjectExistsError:
                continue
            if self.store.get(key) == content:  # not so where creation is not conditional
                return attempt
        fix = "does the server honour conditional writes (If-None-Match)?"
        raise InputError(f"{self.store.url}: no attempt could be claimed: {fix}")

    def newest(self, say: Say) -> Snapshot | None:
        """Returns the newest complete snapshot of the run, None where there is none.

        A manifest that is damaged, or names a file that is missing or of another size, does not
        count; `say` is told so.
        """
        return next(self.snapshots(self.list(), say), None)

    def restore(
        self, snapshot: Snapshot, path: Path, say: Say, *, newer_than: tuple[int, int] | None = None
    ) -> Snapshot | None:
        """Downloads a snapshot into the run directory, over what is there.

        Nothing is put in place before everything is there and its checksums are right. If they
        are not, the snapshot before is taken, and `say` is told. Where no state at all is whole,
        files that are not needed are left out.

        Args:
            newer_than: the `age` of a whole state that is there: none as old as it is restored.

        Returns:
            The snapshot that was restored; None where none is newer.

        Raises:
            InputError: this snapshot and all before are damaged, or `path` cannot be written.
        """
        for leave_out in (False, True) if newer_than is None else (False,):
            for candidate in self._from(snapshot, say):
                if newer_than is not None and candidate.age <= newer_than:
                    break
                try:
                    damaged = self._restore(candidate, path, say, leave_out=leave_out)
                except OSError as error:
                    raise InputError(f"{path}: cannot be written: {error.strerror}") from None
                if damaged is None:
                    return candidate
                say(f"{self.store.url_of(damaged)}: is damaged; going back to the snapshot before")
        if newer_than is not None:
            return None
        raise InputError(f"{self.store.url}: no snapshot is whole: give another --remote")

    def list(self) -> Listing:
        """Lists the remote."""
        return Listing({found.key: found.size for found in self.store.list(_ROOT)})

    def snapshots(self, listing: Listing, say: Say) -> Iterator[Snapshot]:
        """Yields the complete snapshots of the run, the newest first."""
        for attempt in listing.attempts():
            for key in listing.manifests(attempt):
                snapshot = self._read(key, say)
                if snapshot is None:
                    continue
                needed = (snapshot.files[name] for name in snapshot.needed)
                lost = next((file for file in needed if not listing.has(file)), None)
                if lost is None:
                    yield snapshot
                else:
                    what = "is missing or damaged; going back to the snapshot before"
                    say(f"{self.store.url_of(lost.key)}: {what}")
            if self._starts_over(attempt):
                return

    def _from(self, snapshot: Snapshot, say: Say) -> Iterator[Snapshot]:
        """Yields a snapshot and the complete ones before it."""
        yield snapshot
        yield from (s for s in self.snapshots(self.list(), say) if s.rank < snapshot.rank)

    def _read(self, key: str, say: Say) -> Snapshot | None:
        content = self._get(key)
        if content is None:
            return None
        try:
            return Snapshot.parse(key, content)
        except (ValueError, TypeError) as error:
            what = f"is damaged ({str(error).splitlines()[0]})"
            say(f"{self.store.url_of(key)}: {what}; going back to the snapshot before")
            return None

    def _starts_over(self, attempt: int) -> bool:
        try:
            claim = json.loads(self._get(f"{_ROOT}/{attempt:04d}/claim.json") or b"")
        except ValueError:
            return False
        return isinstance(claim, dict) and claim.get("starts_over") is True

    def _get(self, key: str) -> bytes | None:
        try:
            return self.store.get(key)
        except MissingObjectError:
            return None

    def _restore(self, snapshot: Snapshot, path: Path, say: Say, *, leave_out: bool) -> str | None:
        """Puts the files of a snapshot in place; returns the key of a damaged one it needs."""
        places = {path / name: file for name, file in snapshot.files.items()}
        folders = {place.parent for place in places}
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with ThreadPoolExecutor(_FILES_AT_ONCE, "restore") as pool:
                whole = dict(
                    zip(places, pool.map(self._download, places, places.values()), strict=True)
                )
            for name in snapshot.needed if leave_out else snapshot.files:
                if not whole[path / name]:
                    return snapshot.files[name].key
            for place, file in places.items():
                if whole[place]:
                    _partial(place).replace(place)
                else:
                    say(f"{self.store.url_of(file.key)}: is damaged; going on without it")
            for folder in folders:
                sync(folder)
            return None
        finally:
            for place in places:
                _partial(place).unlink(missing_ok=True)

    def _download(self, place: Path, file: StoredFile) -> bool:
        """Writes a file's temporary one; says whether it is what it should be."""
        digest = hashlib.sha256()
        try:
            with _partial(place).open("wb") as out:
                for piece in self.store.stream(file.key):
                    digest.update(piece)
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
        except MissingObjectError:
            return False
        return digest.hexdigest() == file.sha256


def _rank(manifest: str) -> tuple[int, int, int]:
    match = _MANIFEST.fullmatch(manifest)
    assert match is not None
    return int(match["attempt"]), int(match["sequence"]), int(match["again"] or 1)


def timestamp(seconds: float) -> str:
    """Returns a time since the epoch as in the records: UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _partial(place: Path) -> Path:
    return place.with_name(place.name + PARTIAL)
