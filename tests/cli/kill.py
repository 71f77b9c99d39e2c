"""Runs pitstop and sends a process a signal at an exact moment of its work.

Usage: python kill.py MOMENT NTH SIGNAL RANK ARGUMENTS...

The signal comes at the NTH time that this RANK is at the MOMENT, and goes to itself; or, with a
RANK such as `2-all`, to all ranks and the launcher. In place of a signal, RAISE raises an exception
there, and HANG waits for ever.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from pitstop.cli import launching, main
from pitstop.data import load
from pitstop.engine import evaluate, train
from pitstop.io import records
from pitstop.runtime import checkpoint
from pitstop.runtime.place import Place

moment, nth, number, who, *arguments = sys.argv[1:]
launching.RANK = (sys.executable, *sys.argv[:5])
rank, _, everyone = who.partition("-")
left = int(nth) if int(rank) == (Place.find() or Place()).rank else 0


def strike() -> bool:
    """Counts one more time at the moment; sends the signal at the nth."""
    global left
    left -= 1
    if left == 0 and number == "RAISE":
        raise RuntimeError("a planted failure")
    if left == 0 and number == "HANG":
        threading.Event().wait()
    if left == 0:
        for pid in struck_too() if everyone else [os.getpid()]:
            os.kill(pid, signal.Signals[number])
    return left == 0


def struck_too() -> list[int]:
    """This process last: the launcher and its other children before it."""
    launcher = os.getppid()
    children = Path(f"/proc/{launcher}/task").glob("*/children")
    ranks = [int(pid) for path in children for pid in path.read_text().split()]
    return [launcher, *(pid for pid in ranks if pid != os.getpid()), os.getpid()]


def struck(function: Callable[..., Any]) -> Callable[..., Any]:
    def at_the_moment(*args: Any, **kwargs: Any) -> Any:
        strike()
        return function(*args, **kwargs)

    return at_the_moment


def torn_save(state: Any, file: IO[bytes]) -> None:
    """Strikes when half of the checkpoint is written."""
    real_save(state, file)
    if left == 1:
        file.truncate(file.tell() // 2)
        file.flush()
    strike()


real_save = checkpoint.torch.save
if moment == "images":
    load.crop_resize = struck(load.crop_resize)
elif moment == "step":
    train.train_step = struck(train.train_step)
elif moment == "evaluation":
    evaluate.predict = struck(evaluate.predict)
elif moment == "save":
    checkpoint.torch.save = torn_save
elif moment == "manifest":
    checkpoint.write_json = struck(checkpoint.write_json)
elif moment == "weights":
    checkpoint.safetensors_bytes = struck(checkpoint.safetensors_bytes)
elif moment == "records":
    records.Records.add = struck(records.Records.add)
else:
    assert moment == "never"
sys.argv[1:] = arguments
main()
