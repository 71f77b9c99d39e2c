"""Runs, read as they grow: a run directory, or the copy of a run in a bucket."""

import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from pitstop.core.errors import InputError
from pitstop.io.fetch import TAR, fetch
from pitstop.io.ledger import Ledger
from pitstop.io.objects import Patience, open_store
from pitstop.io.records import Event
from pitstop.io.remote import Remote
from pitstop.io.run_directory import RunDirectory
from pitstop.io.storage import PARTIAL, read_json

BUCKET_SECONDS = 15.0
"""From one look into a bucket to the next: there is a new copy after each checkpoint only."""

PATIENCE = Patience(retries=2, retry_seconds=15.0, read_seconds=15.0)
"""What is on the screen is old as long as a bucket is waited for."""

_RECORD = re.compile(r"(run\.json|(events|ledger)\.jsonl|checkpoints/[^/]+\.json)")
"""What is read of a run in a bucket: a few hundred kB, and none of its weights."""


@dataclass(frozen=True)
class Mark:
    """A checkpoint that is whole: after how many steps, and when (seconds since 1970, if known)."""

    step: int
    time: float | None


@dataclass(frozen=True)
class Look:
    """What a run had recorded when it was looked at."""

    name: str
    """What the user calls it: its place."""
    state: dict[str, Any]
    """run.json; empty where there is none yet."""
    events: list[Event]
    starts: list[Event]
    """Of the ledger, the latest last."""
    seconds: float
    """That its processes have run, by the ledger."""
    spent: float | None
    """Dollars, None where no start had a price."""
    lost: tuple[int, float]
    """Steps that were done in vain, and the seconds they took."""
    saved: Mark | None
    """The newest checkpoint."""
    durable: Mark | None
    """The newest copy in a bucket."""
    problem: str | None = None
    """Why this is older than it should be."""


class Followed(Protocol):
    """A run that is looked at time and again."""

    def look(self) -> Look:
        """Returns what there is now.

        Raises:
            InputError: it cannot be read.
        """
        ...


def follow(place: str, scratch: Path) -> Followed:
    """Returns the run at a place, to be looked at.

    Args:
        place: a run directory; the `--remote` of a run or a folder that holds one, in a bucket or a
            directory; or a `.tar.gz` file of one.
        scratch: a directory for what comes from a bucket; it is made.

    Raises:
        InputError: there is nothing of the kind.
    """
    if place.endswith(TAR):
        return LocalRun(place, fetch(place, scratch, say=_ignore))
    path = Path(place).expanduser()
    if "://" not in place:
        if not path.is_dir():
            raise InputError(f"{place}: is no directory: name that of a run, or a bucket's URL")
        run = RunDirectory(path)
        if run.events.exists() or run.run_json.exists():
            return LocalRun(place, run)
    return BucketRun(place, scratch)


class LocalRun:
    """A run directory. Only what was added since the look before is read."""

    def __init__(self, name: str, run: RunDirectory) -> None:
        self._name, self._run = name, run
        self._events = _GrowingEvents(run.events)

    def look(self) -> Look:
        """Returns what there is now."""
        state = self._run.read() or {}
        ledger = Ledger(self._run.ledger)
        lines = self._run.ledger.read_bytes().splitlines() if self._run.ledger.exists() else []
        starts = [line for line in _parsed(lines) if line["kind"] == "start"]
        durable = state.get("durable")
        return Look(
            name=self._name,
            state=state,
            events=self._events.read(),
            starts=starts,
            seconds=ledger.seconds(),
            spent=ledger.spent() if any(start["price"] is not None for start in starts) else None,
            lost=ledger.lost(),
            saved=_newest_checkpoint(self._run),
            durable=Mark(durable["step"], durable["time"]) if durable else None,
        )


class _GrowingEvents:
    """The events in a file that grows, and that is replaced when the run goes back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode: int | None = None
        self._size = 0
        self._events: list[Event] = []

    def read(self) -> list[Event]:
        """Returns the events up to the last whole line."""
        if not self._path.exists():
            return self._events
        with self._path.open("rb") as file:
            stat = os.fstat(file.fileno())
            if stat.st_ino != self._inode or stat.st_size < self._size:
                self._inode, self._size, self._events = stat.st_ino, 0, []
            file.seek(self._size)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._size += len(whole)
        self._events += _parsed(whole.splitlines())
        return self._events


def _parsed(lines: Iterable[bytes]) -> Iterator[Event]:
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # damaged: the others stand
            continue
        if isinstance(event, dict) and "kind" in event:
            yield event


def _newest_checkpoint(run: RunDirectory) -> Mark | None:
    """Returns the newest checkpoint that has a manifest."""
    found: list[tuple[tuple[int, int], Mark]] = []
    for path in run.checkpoints.glob("*.json"):
        try:
            manifest, seconds = read_json(path), path.stat().st_mtime
        except (InputError, OSError):  # damaged, or removed meanwhile
            continue
        age = (manifest.get("attempt", 0), manifest.get("sequence", 0))
        found.append((age, Mark(manifest["step"], seconds)))
    return max(found, key=lambda each: each[0])[1] if found else None


class BucketRun:
    """A run in a bucket: the newest whole snapshot of it, or a folder that holds it as it is.

    Its records are copied into a directory, at most every BUCKET_SECONDS. When that fails later
    on, what was there before stays, with the problem.
    """

    def __init__(self, url: str, scratch: Path) -> None:
        self._store = open_store(url, patience=PATIENCE)
        self._remote = Remote(url, PATIENCE)
        self._run = RunDirectory(scratch)
        self._local = LocalRun(url, self._run)
        self._copied: dict[str, tuple[str, str | None]] = {}
        self._looked: Look | None = None
        self._due = -math.inf

    def look(self) -> Look:
        """Returns what there was at the last look into the bucket."""
        if self._looked is not None and time.monotonic() < self._due:
            return self._looked
        try:
            self._looked = self._read()
        except InputError as error:
            if self._looked is None:
                raise
            self._looked = replace(self._looked, problem=str(error))
        self._due = time.monotonic() + BUCKET_SECONDS
        return self._looked

    def _read(self) -> Look:
        found = {each.key: each.etag for each in self._store.list()}
        if not any(key.startswith("attempts/") for key in found):
            self._copy({key: (key, etag) for key, etag in found.items()})
            look = self._local.look()
            saved = look.saved and Mark(look.saved.step, None)  # when it was copied says nothing
            return replace(look, saved=saved)
        snapshot = self._remote.newest(_ignore)
        if snapshot is None:
            raise InputError(f"{self._store.url}: no copy of the run is whole yet: try again later")
        self._copy({name: (file.key, file.sha256) for name, file in snapshot.files.items()})
        mark = Mark(snapshot.step, seconds_since_1970(snapshot.time))
        return replace(self._local.look(), saved=mark, durable=mark)

    def _copy(self, files: dict[str, tuple[str, str | None]]) -> None:
        """Copies the records among the files that are not here yet.

        Args:
            files: the key of each, by its name in the run directory, and what changes with it.
        """
        records = {name: version for name, version in files.items() if _RECORD.fullmatch(name)}
        if not {"run.json", "events.jsonl"} & records.keys():
            raise InputError(f"{self._store.url}: holds no run: name the folder of a run")
        for name, version in records.items():
            if self._copied.get(name) == version:
                continue
            place = self._run.path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            fresh = place.with_name(place.name + PARTIAL)  # a file of its own: it is read anew
            fresh.write_bytes(self._store.get(version[0]))
            fresh.replace(place)
            self._copied[name] = version


def seconds_since_1970(text: str) -> float:
    """Returns the time that a record tells, UTC."""
    return datetime.fromisoformat(text).timestamp()


def _ignore(line: str) -> None:
    """Is told what is damaged: `pitstop fetch` says it."""
