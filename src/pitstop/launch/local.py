"""Starts the ranks of this machine and watches over them, as torchrun does.

The ranks are processes in sessions of their own: a Ctrl-C in a terminal reaches the launcher only.
It passes the first signal on, gives the ranks SHUTDOWN_SECONDS to save, and then kills them; a
second Ctrl-C kills them at once.

A rank that ends by decision (finished, interrupted, ...) exits with 0, so that nobody restarts it,
after the first rank of the machine wrote pitstop's exit code to the file that OUTCOME names. Any
other end is a failure: all ranks are started again, up to `max_restarts` times. The launcher exits
with the code in the file. Where there is none:

0    all ranks ended well
2    the meeting point is wrong
70   a rank failed, or had to be killed; the machines did not find each other, or lost each other
75   a signal came before there was anything to save
130  Ctrl-C came twice
"""

import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from pitstop.core.errors import InputError
from pitstop.core.exit_codes import FINISHED, INTERNAL, INTERRUPTED, KILLED, LAUNCHER, OUTCOME
from pitstop.core.machine import cores_a_rank

if TYPE_CHECKING:
    from pitstop.launch.agent import LocalRanks

SHUTDOWN_SECONDS = 100
"""From a signal to the ranks' death: a spot machine ends 120 s after its notice."""

KILL_SECONDS = 1
"""How long the agent may take to collect killed ranks."""

DEFAULT_PORT = 29400
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Nodes:
    """How many machines train together, and how they find each other.

    `endpoint` is HOST or HOST:PORT of one of them, at which all meet. Without a `rank`, they are
    numbered by their addresses, compared as text; a machine that comes back at its old address has
    its old number. With it, this one is machine `rank`, and 0 is the one at `endpoint`.
    """

    count: int = 1
    rank: int | None = None
    endpoint: str | None = None

    def __post_init__(self) -> None:
        if self.count == 1:
            if self.rank is not None or self.endpoint is not None:
                raise InputError("--node-rank and --rdzv-endpoint want --nodes, more than 1")
            return
        if self.endpoint is None:
            raise InputError(
                f"--nodes {self.count}: give --rdzv-endpoint HOST:PORT, the address of one of them"
            )
        if self.rank is not None and not 0 <= self.rank < self.count:
            raise InputError(f"--node-rank {self.rank}: must be from 0 to {self.count - 1}")
        self.meeting_point()

    def meeting_point(self) -> tuple[str, int]:
        """Returns the host and the port at which the machines meet."""
        if self.endpoint is None:
            return "127.0.0.1", 0
        match = re.fullmatch(r"(\[[\da-fA-F:.]+\]|[\w.-]+)(?::(\d{1,5}))?", self.endpoint)
        port = int(match[2] or DEFAULT_PORT) if match else 0
        if match is None or not 0 < port < 2**16:
            raise InputError(f"--rdzv-endpoint {self.endpoint}: write it as HOST:PORT")
        return match[1].strip("[]"), port


def launch(
    command: Sequence[str], *, nproc: int, nodes: Nodes | None = None, max_restarts: int = 0
) -> int:
    """Runs `command` once a rank, in the main thread; returns pitstop's exit code.

    A signal that finds it waiting for other machines ends the process.

    Args:
        command: the program and its arguments.
        nproc: ranks on this machine.
        nodes: the machines; this one alone by default.
        max_restarts: how often all ranks are started again after one failed.

    Raises:
        InputError: the meeting point has no address, or its port is taken.
    """
    nodes = nodes or Nodes()
    with (
        _noted_signals() as signals,
        tempfile.TemporaryDirectory(prefix="pitstop-") as scratch,
        _environment(nproc, nodes, Path(scratch) / "outcome") as outcome,
    ):
        from pitstop.launch.agent import LocalRanks

        ranks = LocalRanks(command, nproc, nodes, max_restarts, outcome)
        ranks.start()
        _wait(ranks, signals)
        code = _exit_code(ranks, signals, outcome)
    if ranks.is_alive():
        _end_process(code)
    return code


@dataclass
class _Signals:
    """The signals that came."""

    numbers: list[int] = field(default_factory=list)

    @property
    def insisted(self) -> bool:
        return self.numbers.count(signal.SIGINT) > 1


@contextmanager
def _noted_signals() -> Generator[_Signals]:
    """Notes what would end this process, save what it was started to ignore (nohup)."""
    signals = _Signals()

    def note(number: int, frame: FrameType | None) -> None:
        signals.numbers.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _environment(nproc: int, nodes: Nodes, outcome: Path) -> Generator[Path]:
    """Sets what the ranks inherit; yields `outcome`."""
    before = dict(os.environ)
    os.environ[OUTCOME] = str(outcome)
    os.environ[LAUNCHER] = str(os.getpid())
    # else the ranks of an attempt share a store with those before: 3 restarts of 5 failed in gloo
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(cores_a_rank(nproc)))
    if nodes.count == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    try:
        yield outcome
    finally:
        os.environ.clear()
        os.environ.update(before)


def _wait(ranks: "LocalRanks", signals: _Signals) -> None:
    """Returns when the ranks have ended, be it that a signal had them end."""
    deadline = float("inf")
    while ranks.is_alive():
        ranks.join(POLL_SECONDS)
        if signals.numbers and deadline == float("inf"):
            deadline = time.monotonic() + SHUTDOWN_SECONDS
            ranks.stop(signals.numbers[0])
        if signals.insisted or time.monotonic() > deadline:
            ranks.kill()
            ranks.join(KILL_SECONDS)
            return
        if ranks.waits_in_vain:
            return


def _exit_code(ranks: "LocalRanks", signals: _Signals, outcome: Path) -> int:
    if outcome.exists():
        return int(outcome.read_text())
    if signals.insisted:
        return KILLED
    if ranks.error is not None:
        raise ranks.error
    if ranks.killed:
        say(f"the ranks did not end within {SHUTDOWN_SECONDS} s of the signal and were killed")
        return INTERNAL
    if ranks.failed and not ranks.waits_in_vain:  # else a machine is awaited after a failure
        return INTERNAL
    if signals.numbers:
        say("stopped before there was anything to save")
        return INTERRUPTED
    return FINISHED


def _end_process(code: int) -> NoReturn:
    """Ends at once: a thread that wakes up in torch while Python ends aborts (1 time in 36)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def say(line: str) -> None:
    """Prints a line for the user."""
    print(f"pitstop: {line}", file=sys.stderr, flush=True)
