"""Runs pitstop and sends the process a signal at an exact moment of its work.

Usage: python kill.py MOMENT NTH SIGNAL ARGUMENTS...
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import IO, Any

from pitstop.cli import run
from pitstop.engine import evaluate, train
from pitstop.io import records
from pitstop.runtime import checkpoint

moment, nth, number, *arguments = sys.argv[1:]
left = int(nth)


def strike() -> bool:
    """Counts one more time at the moment; sends the signal at the nth."""
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.Signals[number])
    return left == 0


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
if moment == "step":
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
sys.exit(run(arguments))
