"""Runs one contender in a process of its own, on as many cores as it is given.

    python -m peers.worker MODULE --prepare ...    makes its files and says its versions
    python -m peers.worker MODULE ...              then, for each line on stdin, one timed pass

It answers in lines of JSON. A pass starts the pipeline, takes some batches, times those that
follow, and ends the pipeline, so that nothing goes on when another contender has its turn.
"""

import argparse
import importlib
import json
import os
import sys
import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peers.task import Pipeline, Task

WARM_UP = 4
"""Batches that are not timed: after them, nothing is left that was made before anyone asked."""


def timed_pass(pipeline: Pipeline, task: Task, images: int, seconds: float) -> dict[str, float]:
    """Times at least so many images and so many seconds.

    Where processes make a batch each, batches come in groups of `cores`: so they are counted.
    """
    with closing(pipeline()) as batches:
        for _ in range(WARM_UP):
            check(next(batches), task)
        taken, elapsed = 0, 0.0
        started = time.perf_counter()
        while taken < images or elapsed < seconds:
            for _ in range(task.cores):
                next(batches)
            taken += task.cores * task.batch_size
            elapsed = time.perf_counter() - started
    return {"images": taken, "seconds": elapsed, "images_per_second": taken / elapsed}


def check(batch: Any, task: Task) -> None:
    """Fails if a batch is not what was asked for."""
    size, side = task.batch_size, task.resolution
    shapes = {(size, 3, side, side), (size, side, side, 3)}
    assert tuple(batch.shape) in shapes, f"a batch of {tuple(batch.shape)}"
    assert str(batch.dtype).endswith("uint8"), f"a batch of {batch.dtype}"
    few = batch[:8]
    assert 0 <= int(few.min()) < 50 < 200 < int(few.max()) <= 255, "these are no photos"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("--variant", required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--cores", type=int, required=True)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--prepare", action="store_true")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the contender prints is not an answer
    if not options.prepare:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    sides = (options.resolution, options.batch_size)
    task = Task(options.cache, options.variant, options.cores, *sides)
    try:
        contender = importlib.import_module(f"peers.{options.module}")
    except ImportError as error:
        if not options.prepare:
            raise
        print(json.dumps({"missing": str(error)}), file=answers)
        return
    if options.prepare:
        contender.prepare(task)
        print(json.dumps({name: version(name) for name in contender.PACKAGES}), file=answers)
        return
    pipeline = contender.opened(task)
    timed_pass(pipeline, task, images=1, seconds=0)
    print(json.dumps("ready"), file=answers)
    for _ in sys.stdin:
        result = timed_pass(pipeline, task, options.images, options.seconds)
        print(json.dumps(result), file=answers)


if __name__ == "__main__":
    main()
