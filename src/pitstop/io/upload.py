"""Uploads snapshots of a run behind the training's back.

A snapshot that is offered is uploaded by a thread, file after file, and only what the remote does
not have. Each object is read back and compared. Before the manifest, which makes the snapshot
count, the thread looks for a higher attempt: then another process has taken the run over, and this
one uploads nothing more. After it, old snapshots are removed.

What fails is tried again, from the file on at which it failed, until there is a newer snapshot.
"""

import hashlib
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Condition, Thread
from typing import IO

from pitstop.core.errors import InputError
from pitstop.io.objects import ObjectExistsError
from pitstop.io.remote import Listing, Remote, Snapshot, StoredFile, is_inside, timestamp

KEEP = 2
"""Snapshots of the run, besides which nothing is kept."""

TRIES = 5
"""`wait` waits for so many."""

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0
"""Seconds from one try to the next; they double."""

_ONE_PUT_BYTES = 8 * 2**20
"""A larger file is sent in parts. Parts can not be created conditionally, but no other process
writes under the attempt's number."""

_PIECE_BYTES = 2**20

_CLOSE_SECONDS = 2.0
"""A thread that hangs in a request ends with the process."""


@dataclass(frozen=True)
class Durable:
    """The newest snapshot that is whole in the remote."""

    step: int
    sequence: int
    monotonic: float
    """When it was offered, by `time.monotonic()`: what came after it can be lost."""
    wall: float
    """The same by `time.time()`."""


class _ClosedError(Exception):
    """The uploader was closed in the middle of something."""


@dataclass(frozen=True)
class _File:
    """A file as it was when it was offered: replaced or removed, it stays readable."""

    path: Path
    file: IO[bytes]
    stat: os.stat_result

    @property
    def size(self) -> int:
        return self.stat.st_size

    @property
    def signature(self) -> tuple[int, int, int, int]:
        """Tells contents apart without reading them."""
        return self.stat.st_dev, self.stat.st_ino, self.stat.st_size, self.stat.st_mtime_ns


@dataclass
class _Offer:
    number: int
    sequence: int
    step: int
    epoch: float
    top1: float | None
    monotonic: float
    wall: float
    files: dict[str, _File]
    needed: tuple[str, ...]
    opened: ExitStack
    tries: int = 0


class Uploader:
    """Uploads what is offered, in a thread.

    Args:
        remote: where.
        attempt: the number that this process has claimed there.
    """

    def __init__(self, remote: Remote, attempt: int) -> None:
        self._remote = remote
        self._store = remote.store
        self._attempt = attempt
        self._changed = Condition()
        # Under the condition
        self._next: _Offer | None = None
        self._current: _Offer | None = None
        self._offered = 0
        self._arrived = 0
        self._durable: Durable | None = None
        self._problem: str | None = None
        self._superseded: int | None = None
        self._closing = False
        # The thread's own
        self._digests: dict[tuple[int, int, int, int], str] = {}
        self._arrived_files: dict[str, StoredFile] = {}
        self._written: set[str] = set()
        self._thread = Thread(target=self._run, name="upload", daemon=True)
        self._thread.start()

    def offer(
        self,
        files: Mapping[str, Path],
        needed: Collection[str] | None = None,
        *,
        sequence: int,
        step: int,
        epoch: float,
        top1: float | None,
    ) -> None:
        """Has a snapshot uploaded; returns at once, and never raises.

        The files are opened here: what is appended to them later, and whether they are replaced
        or removed, does not matter. A snapshot that was offered before and has not begun is
        dropped. A file that cannot be opened is the `problem`.

        Args:
            files: by their paths in the run directory, in the order in which they are to be put in
                place when the snapshot is restored.
            needed: the names of those without which the run cannot go on; None is all.
            sequence: counts the saves of the run's life.
            step: steps done.
            epoch: epochs done.
            top1: of the evaluation at this step in percent, None without one.
        """
        assert all(is_inside(name) for name in files)
        assert needed is None or files.keys() >= {*needed}
        with self._changed:
            self._offered += 1
            number = self._offered
        opened = ExitStack()
        try:
            there = {name: _opened(path, opened) for name, path in files.items()}
        except OSError as error:
            opened.close()
            with self._changed:
                self._problem = f"{error.filename}: cannot be read: {error.strerror}"
            return
        offer = _Offer(
            number,
            sequence,
            step,
            epoch,
            top1,
            time.monotonic(),
            time.time(),
            there,
            tuple(files if needed is None else needed),
            opened,
        )
        with self._changed:
            if self._closing or self._superseded is not None:
                dropped: _Offer | None = offer
            else:
                dropped, self._next = self._next, offer
            self._changed.notify_all()
        if dropped is not None:
            dropped.opened.close()

    def wait(self, timeout: float) -> bool:
        """Waits until the last offer is durable, or was tried in vain 5 times.

        Args:
            timeout: seconds after which it is not waited for any more.

        Returns:
            Whether it is durable; True if nothing was offered.
        """
        with self._changed:
            self._changed.wait_for(self._is_settled, timeout)
            return self._arrived == self._offered

    @property
    def durable(self) -> Durable | None:
        """The newest snapshot of this process that is durable; None as long as there is none."""
        with self._changed:
            return self._durable

    @property
    def problem(self) -> str | None:
        """One line that says why the last try failed; None if it did not."""
        with self._changed:
            return self._problem

    @property
    def superseded(self) -> int | None:
        """The higher attempt that was seen: this process should stop. None if there was none."""
        with self._changed:
            return self._superseded

    def close(self) -> None:
        """Ends the thread; what is not durable yet will not be. Returns within two seconds."""
        with self._changed:
            self._closing = True
            dropped, self._next = self._next, None
            self._changed.notify_all()
        if dropped is not None:
            dropped.opened.close()
        self._thread.join(_CLOSE_SECONDS)

    # Below, all is done in the thread.

    def _run(self) -> None:
        while (offer := self._take()) is not None:
            with offer.opened:
                pause = _FIRST_PAUSE
                while not self._try(offer) and not self._outdated(pause):
                    pause = min(2 * pause, _LONGEST_PAUSE)
            with self._changed:
                self._current = None
                self._changed.notify_all()

    def _take(self) -> _Offer | None:
        with self._changed:
            self._changed.wait_for(lambda: self._next is not None or self._closing)
            self._current, self._next = self._next, None
            return self._current

    def _outdated(self, seconds: float) -> bool:
        """Waits; says whether an offer that failed is not to be tried again."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._closing or self._next is not None or self._superseded is not None,
                seconds,
            )

    def _is_settled(self) -> bool:
        if self._closing or self._superseded is not None:
            return True
        return self._next is None and (self._current is None or self._current.tries >= TRIES)

    def _try(self, offer: _Offer) -> bool:
        """Uploads a snapshot; says whether it is durable now."""
        problem = None
        try:
            self._upload(offer)
        except _ClosedError:
            return False
        except Exception as error:  # an upload that fails never stops training
            what = str(error) if isinstance(error, InputError) else repr(error)
            problem = " ".join(what.split())
        with self._changed:
            self._problem = problem
            offer.tries += 1
            self._changed.notify_all()
            return self._arrived == offer.number

    def _upload(self, offer: _Offer) -> None:
        listing = self._list()
        snapshots = list(self._remote.snapshots(listing, lambda line: None))
        known = {f.sha256: f for s in snapshots for f in s.files.values()} | self._arrived_files
        known = {digest: file for digest, file in known.items() if listing.has(file)}
        self._digests = {f.signature: self._digest_of(f) for f in offer.files.values()}
        folder = self._new_folder(offer, listing)
        stored: dict[str, StoredFile] = {}
        for name, file in offer.files.items():
            digest = self._digests[file.signature]
            if digest not in known:
                key = f"{folder}/{name}"
                self._put_file(key, file, digest)
                known[digest] = self._arrived_files[digest] = StoredFile(key, file.size, digest)
            stored[name] = known[digest]
        snapshot = Snapshot(
            self._attempt,
            offer.sequence,
            offer.step,
            offer.epoch,
            offer.top1,
            timestamp(offer.wall),
            stored,
            offer.needed,
            f"{folder}/manifest.json",
        )
        listing = self._list()
        manifest = snapshot.to_json()
        self._put(snapshot.key, manifest, hashlib.sha256(manifest).hexdigest())
        self._arrive(offer)
        self._remove_old([snapshot, *snapshots], listing)

    def _arrive(self, offer: _Offer) -> None:
        with self._changed:
            self._arrived = offer.number
            self._durable = Durable(offer.step, offer.sequence, offer.monotonic, offer.wall)
            self._changed.notify_all()

    def _list(self) -> Listing:
        """Lists the remote.

        Raises:
            InputError: there is a higher attempt.
        """
        listing = self._remote.list()
        highest = max(listing.attempts(), default=0)
        if highest > self._attempt:
            with self._changed:
                self._superseded = highest
            what = f"attempt {highest} has taken this run over: attempt {self._attempt} stops"
            raise InputError(f"{self._store.url}: {what}")
        return listing

    def _new_folder(self, offer: _Offer, listing: Listing) -> str:
        """Returns the name of a folder in which there is nothing: what failed stays unused."""
        name = f"attempts/{self._attempt:04d}/{offer.sequence:04d}-step-{offer.step:08d}"
        names = (name if again == 1 else f"{name}-{again}" for again in count(1))
        return next(n for n in names if not any(k.startswith(f"{n}/") for k in listing.sizes))

    def _digest_of(self, file: _File) -> str:
        """Returns a file's SHA-256; one that has not changed is not read again."""
        if (before := self._digests.get(file.signature)) is not None:
            return before
        digest = hashlib.sha256()
        for piece in self._pieces(file):
            digest.update(piece)
        return digest.hexdigest()

    def _pieces(self, file: _File) -> Iterator[bytes]:
        """Yields the content of a file, as long as it was when it was offered."""
        done = 0
        while done < file.size:
            self._stop_if_closed()
            piece = os.pread(file.file.fileno(), min(_PIECE_BYTES, file.size - done), done)
            if not piece:
                raise InputError(f"{file.path}: was cut short while it was uploaded")
            done += len(piece)
            yield piece

    def _put_file(self, key: str, file: _File, digest: str) -> None:
        if file.size <= _ONE_PUT_BYTES:
            self._put(key, b"".join(self._pieces(file)), digest)
            return
        self._written.add(key)
        self._store.put(key, self._pieces(file))
        self._verify(key, file.size, digest)

    def _put(self, key: str, content: bytes, digest: str) -> None:
        self._written.add(key)
        with suppress(ObjectExistsError):  # the folder was empty: our own, whose answer was lost
            self._store.create(key, content)
        self._verify(key, len(content), digest)

    def _verify(self, key: str, size: int, digest: str) -> None:
        """Raises InputError unless the remote gives back what was sent."""
        there, bytes_there = hashlib.sha256(), 0
        for piece in self._store.stream(key):
            self._stop_if_closed()
            there.update(piece)
            bytes_there += len(piece)
        if bytes_there != size:
            arrived = f"{bytes_there:,} of {size:,} bytes arrived"
            raise InputError(f"{self._store.url_of(key)}: {arrived}")
        if there.hexdigest() != digest:
            raise InputError(f"{self._store.url_of(key)}: did not arrive as it was sent")

    def _remove_old(self, snapshots: list[Snapshot], listing: Listing) -> None:
        """Removes the snapshots beyond the newest ones, and the files that only they name.

        Manifests go first: none may name what is gone. Files of uploads that failed go too.
        """
        kept, old = snapshots[:KEEP], snapshots[KEEP:]
        needed = {s.key for s in kept} | {f.key for s in kept for f in s.files.values()}
        unneeded = {f.key for s in old for f in s.files.values()} | self._written
        self._store.delete([s.key for s in old])
        self._store.delete(sorted((unneeded - needed) & listing.sizes.keys()))
        self._written.clear()
        self._arrived_files.clear()

    def _stop_if_closed(self) -> None:
        if self._closing:
            raise _ClosedError


def _opened(path: Path, opened: ExitStack) -> _File:
    file = opened.enter_context(path.open("rb"))
    return _File(path, file, os.fstat(file.fileno()))
