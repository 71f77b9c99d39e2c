"""The ledger of a run: what its starts have cost, and what they have lost.

`ledger.jsonl` is appended to over all restarts, and put on disk line by line. It is not cut back on
resume: what was lost was paid for.

start  a process has begun: where, at what price, from which step, and what was lost before it
alive  how long it has run, how far it has come, and up to which step it has saved
end    the same, and how it ended; a start without one was killed
"""

import os
import signal
import socket
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    TypeAdapter,
    ValidationError,
)

from pitstop.core.exit_codes import BUDGET_SPENT, FINISHED, KILLED
from pitstop.io.storage import sync, write_text

ALIVE_SECONDS = 60
"""How often a run says that it is alive: so much of a killed start is not counted."""


class _Line(BaseModel, frozen=True, allow_inf_nan=False):
    id: str


class Start(_Line, frozen=True):
    """A process has begun: `time` in UTC, `price` in dollars an hour, at the step `step`.

    `lost_steps` are those done before that it does again, `lost_seconds` the time they had taken.
    """

    kind: Literal["start"] = "start"
    time: str
    host: str
    machine: str | None
    price: NonNegativeFloat | None
    world: int
    step: NonNegativeInt
    attempt: NonNegativeInt
    lost_steps: NonNegativeInt
    lost_seconds: NonNegativeFloat


class Alive(_Line, frozen=True):
    """So long after its start, a process has done `step` steps and saved `saved_step` of them."""

    kind: Literal["alive"] = "alive"
    seconds: NonNegativeFloat
    step: NonNegativeInt
    saved_step: NonNegativeInt


class End(_Line, frozen=True):
    """The last that is known of a process, by its own word."""

    kind: Literal["end"] = "end"
    seconds: NonNegativeFloat
    step: NonNegativeInt
    saved_step: NonNegativeInt
    status: str
    exit_code: int


Line = Start | Alive | End
_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


@dataclass
class _Account:
    """A start and what came of it."""

    start: Start
    marks: list[Alive | End] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return max((mark.seconds for mark in self.marks), default=0.0)

    @property
    def got_on(self) -> bool:
        """Whether it saved more than it began with, or there was no more to do."""
        saved = any(mark.saved_step > self.start.step for mark in self.marks)
        return saved or any(end.exit_code == FINISHED for end in self._ends())

    @property
    def ended_as_wished(self) -> bool:
        """Whether the user's Ctrl-C, or limit of cost, has ended it."""
        wished = (KILLED, BUDGET_SPENT)
        sigint = signal.SIGINT.name
        return any(end.status == sigint or end.exit_code in wished for end in self._ends())

    def _ends(self) -> list[End]:
        return [mark for mark in self.marks if isinstance(mark, End)]

    @property
    def lines(self) -> list[Line]:
        return [self.start, *self.marks]


class Ledger:
    """Reads the ledger of a run, and appends to it; one process at a time, which holds the run.

    A line that a kill left unfinished is none, and is cut off at the next append. What cannot be
    written now (`problem`) is counted all the same and written with the next line.

    Args:
        path: the file; it comes about with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.problem: str | None = None
        """What kept the last line from getting to disk."""
        self._path = path
        self._own: _Account | None = None
        self._since = 0.0
        self._unwritten = b""
        self._read()

    def _read(self) -> None:
        data = self._path.read_bytes() if self._path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        self._size = len(whole)
        self._accounts: dict[str, _Account] = {}
        for text in whole.splitlines():
            try:
                self._enter(_LINE.validate_json(text))
            except ValidationError:  # damaged: the others stand
                continue

    def _enter(self, line: Line) -> None:
        if isinstance(line, Start):
            self._accounts.setdefault(line.id, _Account(line))
        elif line.id in self._accounts:
            self._accounts[line.id].marks.append(line)

    # Appending

    def begin(
        self,
        *,
        step: int,
        world: int,
        machine: str | None = None,
        price: float | None = None,
        attempt: int = 0,
        lost_steps: int = 0,
        lost_seconds: float = 0.0,
    ) -> None:
        """Notes that this process has begun; its time is counted from here.

        Args:
            step: of the checkpoint that it goes on from.
            world: how many ranks.
            machine: of which type, None if unknown.
            price: of all of them, in dollars an hour; None if unknown.
            attempt: as numbered by the bucket.
            lost_steps: done after that checkpoint, which this process does again.
            lost_seconds: that they took.
        """
        self._since = time.monotonic()
        start = Start(
            id=uuid.uuid4().hex,
            time=datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds"),
            host=socket.gethostname(),
            machine=machine,
            price=price,
            world=world,
            step=step,
            attempt=attempt,
            lost_steps=lost_steps,
            lost_seconds=round(lost_seconds, 3),
        )
        self._append(start)
        self._own = self._accounts[start.id]

    def alive(self, step: int, saved_step: int) -> None:
        """Notes how far this process has come; may be told as often as one likes.

        Appends when ALIVE_SECONDS have passed, or another step was saved, since the line before.
        """
        assert self._own is not None
        marks = self._own.marks
        before = marks[-1].saved_step if marks else self._own.start.step
        seconds = self._own_seconds()
        if saved_step != before or seconds - self._own.seconds >= ALIVE_SECONDS:
            own = self._own.start.id
            self._append(Alive(id=own, seconds=seconds, step=step, saved_step=saved_step))

    def end(self, step: int, saved_step: int, status: str, exit_code: int) -> None:
        """Notes how this process ends.

        Args:
            step: that it has come to.
            saved_step: up to which it has saved.
            status: the run's, or what stopped it; SIGINT is the user's own hand.
            exit_code: the process's.
        """
        assert self._own is not None
        self._append(
            End(
                id=self._own.start.id,
                seconds=self._own_seconds(),
                step=step,
                saved_step=saved_step,
                status=status,
                exit_code=exit_code,
            )
        )
        self._own = None

    def merge(self, other: Path) -> None:
        """Takes in what another copy of this ledger has and this one lacks; before `begin`.

        The file is written anew, atomically, its starts in the order of attempt and time.
        """
        assert self._own is None
        theirs = [*Ledger(other)._accounts.values()]
        if not theirs:
            return
        for account in theirs:
            own = self._accounts.setdefault(account.start.id, _Account(account.start))
            own.marks += account.marks
        for account in self._accounts.values():
            account.marks = sorted({*account.marks}, key=_order)
        accounts = sorted(self._accounts.values(), key=lambda account: _age(account.start))
        lines = [line for account in accounts for line in account.lines]
        write_text(self._path, "".join(line.model_dump_json() + "\n" for line in lines))
        self._read()

    def _append(self, line: Line) -> None:
        self._enter(line)
        self._unwritten += line.model_dump_json().encode() + b"\n"
        try:
            self._write(self._unwritten)
        except OSError as error:
            self.problem = f"{self._path}: cannot be written: {error.strerror}"
            return
        self._size += len(self._unwritten)
        self._unwritten, self.problem = b"", None

    def _write(self, lines: bytes) -> None:
        with self._path.open("ab") as file:
            if file.tell() > self._size:
                file.truncate(self._size)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        if self._size == 0:
            sync(self._path.parent)

    # Sums

    def seconds(self) -> float:
        """Returns how long the run's processes have run; this one up to now."""
        return sum(map(self._seconds, self._accounts.values()))

    def spent(self) -> float:
        """Returns the dollars that this took, where the price is known."""
        accounts = self._accounts.values()
        return sum(self._seconds(each) * (each.start.price or 0.0) / 3600 for each in accounts)

    def lost(self) -> tuple[int, float]:
        """Returns how many steps were done in vain, and the seconds that they took."""
        starts = [account.start for account in self._accounts.values()]
        return sum(s.lost_steps for s in starts), sum(s.lost_seconds for s in starts)

    def fruitless(self) -> int:
        """Returns how many starts in a row, up to this one, have saved no step of their own.

        Those that ended by the user's Ctrl-C, or limit of cost, do not count.
        """
        count = 0
        for account in reversed(self._accounts.values()):
            if account is self._own:
                continue
            if account.got_on:
                break
            count += not account.ended_as_wished
        return count

    def _seconds(self, account: _Account) -> float:
        return self._own_seconds() if account is self._own else account.seconds

    def _own_seconds(self) -> float:
        return round(time.monotonic() - self._since, 3)


def _order(mark: Alive | End) -> tuple[float, bool, int, int]:
    return mark.seconds, isinstance(mark, End), mark.step, mark.saved_step


def _age(start: Start) -> tuple[int, str, str]:
    return start.attempt, start.time, start.id
