"""Runs pitstop and sends a process a signal at an exact moment of its work.

Usage: python kill.py MOMENT NTH SIGNAL RANK ARGUMENTS...

The signal comes at the NTH time that this RANK is at the MOMENT, and goes to itself; with a RANK
such as `2-all`, to all ranks and the launcher; with `2-launcher`, to that alone. In place of a
signal, RAISE raises an exception there, and HANG waits for ever. A process without ranks beside it
ends its ARGUMENTS in `--nproc 1`; else it is their launcher, at which nothing strikes.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from pitstop.cli import launching, main
from pitstop.runtime.place import Place

moment, nth, number, who, *arguments = sys.argv[1:]
launching.RANK = (sys.executable, *sys.argv[:5])
rank, _, others = who.partition("-")
left = int(nth) if int(rank) == (Place.find() or Place()).rank else 0
alone = arguments[-2:] == ["--nproc", "1"]


def strike() -> bool:
    """Counts one more time at the moment; sends the signal at the nth."""
    global left
    left -= 1
    if left == 0 and number == "RAISE":
        raise RuntimeError("a planted failure")
    if left == 0 and number == "HANG":
        threading.Event().wait()
    if left == 0:
        for pid in victims():
            os.kill(pid, signal.Signals[number])
    return left == 0


def victims() -> list[int]:
    """Whom the signal is for, this process last."""
    launcher = os.getppid()
    if others != "all":
        return [launcher if others else os.getpid()]
    children = Path(f"/proc/{launcher}/task").glob("*/children")
    ranks = [int(pid) for path in children for pid in path.read_text().split()]
    return [launcher, *(pid for pid in ranks if pid != os.getpid()), os.getpid()]


def struck(function: Callable[..., Any]) -> Callable[..., Any]:
    def at_the_moment(*args: Any, **kwargs: Any) -> Any:
        strike()
        return function(*args, **kwargs)

    return at_the_moment


class NoPlotter:
    """Spares the seconds of the child process that draws."""

    def __init__(self, run: object) -> None: ...

    def update(self) -> None: ...

    def finish(self) -> None: ...


def plant() -> None:
    """Has this process struck at the moment."""
    from pitstop.data import load
    from pitstop.engine import evaluate, journal, train
    from pitstop.io import records
    from pitstop.runtime import checkpoint

    journal.Plotter = NoPlotter
    whole_save = checkpoint.torch.save

    def torn_save(state: Any, file: IO[bytes]) -> None:
        """Strikes when half of the checkpoint is written."""
        whole_save(state, file)
        if left == 1:
            file.truncate(file.tell() // 2)
            file.flush()
        strike()

    match moment:
        case "images":
            load.resize = struck(load.resize)
        case "step":
            train.train_step = struck(train.train_step)
        case "evaluation":
            evaluate.predict = struck(evaluate.predict)
        case "save":
            checkpoint.torch.save = torn_save
        case "manifest":
            checkpoint.write_json = struck(checkpoint.write_json)
        case "weights":
            checkpoint.safetensors_bytes = struck(checkpoint.safetensors_bytes)
        case "records":
            records.Records.add = struck(records.Records.add)
        case _:
            assert moment == "never"


if alone or Place.find() is not None:
    plant()
sys.argv[1:] = arguments
main()
