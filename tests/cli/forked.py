"""One pitstop command, in the fork of a process that has imported pitstop: half a second each.

`Pitstop` in test_never_lost.py runs this file there. What one would wait for comes soon: the next
look for a notice, the next try to upload, the next reading of the sums.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from pitstop import cli
from pitstop.engine import journal, meter, train
from pitstop.io import upload
from pitstop.runtime.preemption import Preemption

request: dict[str, Any] = globals()["request"]  # of runpy.run_path

os.environ.clear()
os.environ.update(request["environment"])
with Path(request["log"]).open("ab") as log:
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)


class NoPlotter:
    """Spares the seconds of the child process that draws."""

    def __init__(self, run: object) -> None: ...

    def update(self) -> None: ...

    def finish(self) -> None: ...


journal.Plotter = NoPlotter
meter.FLUSH_SECONDS = 0.0
upload._FIRST_PAUSE = 0.01
Preemption.__init__.__kwdefaults__ = {"poll_seconds": 0.02}

PAUSE = 0.02
"""Seconds: a run that is waited for need not be busy all the time."""

train_step = train.train_step
left = request["strike_at"]


def strike(*arguments: Any) -> Any:
    """Takes some time before a step, and sends this process a signal before the n-th."""
    global left
    left -= 1
    time.sleep(PAUSE)
    if left == 0:
        os.kill(os.getpid(), signal.Signals[request["strike_by"]])
    return train_step(*arguments)


train.train_step = strike
sys.exit(cli.run(request["arguments"]))
