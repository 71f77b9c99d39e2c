"""The loader inside training against the loader alone: what pitstop's loop leaves of its speed.

Method. Both read the same packed photos at 224 px in batches of 256 with as many decoding threads
as cores, in one process that is pinned to those cores, in turn; the order alternates. Images a
second are those of the loader's batches from the ninth on, as they arrive. Alone, nothing is done
with them. In training they go through `Training.loop` itself: agreement, meter, records, progress,
`train_step` with loss, backward pass and optimizer, for a model that is nothing but a mean and a
linear layer. Ratios are medians of the rounds' ratios.

What stands for the device is left out where it would run on the cores that decode: on a CPU,
`prepare` (normalisation, augmentation) hands on one pixel an image. On a GPU (`--device
cuda`) nothing is left out. For information, a CPU's third line has that work on the same cores.

    python benchmarks/loader_in_training.py --cores 2
"""

import argparse
import io
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Self
from unittest import mock

import torch
from rich.console import Console
from torch import nn

from loader import SAMPLE, processor, unpack
from peers import with_pitstop
from peers.task import Task
from pitstop.core.recipe import Recipe, parse_recipe
from pitstop.core.safeguards import Safeguards
from pitstop.core.timeline import Timeline
from pitstop.core.tracking import Tracking
from pitstop.data.load import Batch, Loader
from pitstop.data.packed import PackedDataset
from pitstop.engine import step, train
from pitstop.engine.guard import Guard
from pitstop.engine.journal import Journal
from pitstop.engine.outcome import INTERRUPTED
from pitstop.engine.resume import Course, Wish
from pitstop.engine.state import TrainState
from pitstop.io.run_directory import RunDirectory
from pitstop.nn import models
from pitstop.runtime.checkpoint import Checkpointer
from pitstop.runtime.devices import Device
from pitstop.runtime.preemption import Preemption
from pitstop.runtime.ranks import Ranks

WARM_UP = 8
"""Batches that do not count: more than are decoded ahead."""


class Timed:
    """A loader that notes when each batch has come, and calls `enough` at the last."""

    def __init__(self, loader: Loader, batches: int, enough: Callable[[], None]) -> None:
        self.loader, self.left, self.enough = loader, batches, enough
        self.times: list[float] = []

    def __enter__(self) -> Self:
        self.loader.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.loader.__exit__(*error)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch = next(self.loader)
        self.times.append(time.perf_counter())
        self.left -= 1
        if self.left == 0:
            self.enough()
        return batch

    def images_per_second(self, batch_size: int) -> float:
        times = self.times[WARM_UP:]
        return (len(times) - 1) * batch_size / (times[-1] - times[0])


def trivial_model(*_: Any) -> nn.Module:
    """Takes the place of `models.build`."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000))


def one_pixel(stage: Any, batch: Batch, settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the place of `prepare`."""
    return batch.images[:, :, :1, :1].float(), batch.labels


class Bench:
    """What all rounds share."""

    def __init__(self, data: PackedDataset, task: Task, device: str, batches: int) -> None:
        self.data, self.task, self.batches = data, task, WARM_UP + batches
        stated = {
            "epochs": 1000,
            "batch_size": task.batch_size,
            "resolution": task.resolution,
            "flip": "random",
            "lr": 0.01,
            "threads": 1,
            "device": device,
            "eval": {"every": 1000},
            "checkpoint": {"every": "1000ep"},
        }
        self.recipe: Recipe = parse_recipe(stated, "benchmark")
        threads = self.recipe.threads
        self.device = Device.choose("auto", "auto", threads, device=self.recipe.device)

    @property
    def on_cpu(self) -> bool:
        return self.device.torch_device.type == "cpu"

    def alone(self) -> float:
        """Returns the images a second of the loader, whose batches nobody uses."""
        timeline = Timeline(self.recipe, num_samples=len(self.data.train))
        loader = Loader(
            self.data.train,
            timeline,
            range(self.batches),
            workers=self.task.cores,
            pin_memory=self.device.pin_memory,
        )
        with Timed(loader, self.batches, lambda: None) as batches:
            for _ in batches:
                pass
        return batches.images_per_second(self.task.batch_size)

    def in_training(self, *, device_work: bool) -> float:
        """Returns the images a second of the loader in `Training.loop`."""
        loaders: list[Timed] = []
        with ExitStack() as stack:
            directory = Path(stack.enter_context(TemporaryDirectory()))
            stack.enter_context(mock.patch.object(models, "build", trivial_model))
            if not device_work:
                stack.enter_context(mock.patch.object(step, "prepare", one_pixel))
            training = self.training_in(directory / "run")

            def enough() -> None:
                training.preemption.reason = "the benchmark is over"

            def timed(*args: Any, **kwargs: Any) -> Timed:
                loaders.append(Timed(Loader(*args, **kwargs), self.batches, enough))
                return loaders[0]

            stack.enter_context(mock.patch.object(train, "Loader", timed))
            journal = training.journal
            assert isinstance(journal, Journal)
            with journal:
                assert training.loop() == INTERRUPTED
            journal.checkpointer.close()
        return loaders[0].images_per_second(self.task.batch_size)

    def training_in(self, directory: Path) -> train.Training:
        """Returns a new run as the engine makes it."""
        run, recipe, ranks = RunDirectory(directory), self.recipe, Ranks()
        course = Course(recipe, (), len(self.data.train))
        checkpointer = Checkpointer(run, recipe.checkpoint)
        state = TrainState.initial(recipe, len(self.data.classes), self.device)
        console = Console(file=io.StringIO())
        journal = Journal(
            recipe,
            course,
            self.data,
            run,
            checkpointer,
            self.device,
            ranks,
            console,
            Guard(run, Safeguards(), starts_over=False, say=console.print),
            Tracking(),
            step=0,
            resumes=False,
            evaluated=False,
        )
        return train.Training(
            Wish(recipe),
            course,
            self.data,
            state,
            self.device,
            ranks,
            journal,
            self.task.cores,
            Preemption(),
        )


def measure(bench: Bench, rounds: int) -> dict[str, list[float]]:
    """Returns the images a second of each way in each round."""
    ways: dict[str, Callable[[], float]] = {
        "alone": bench.alone,
        "in training": lambda: bench.in_training(device_work=not bench.on_cpu),
    }
    if bench.on_cpu:
        ways["in training, all on these cores"] = lambda: bench.in_training(device_work=True)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            rates[name].append(ways[name]())
    return rates


def report(bench: Bench, rates: dict[str, list[float]]) -> None:
    """Prints the result, and again as JSON."""
    task, alone = bench.task, rates["alone"]
    ratios = {
        name: median(one / other for one, other in zip(mine, alone, strict=True))
        for name, mine in rates.items()
    }
    print(
        f"the loader in training: {bench.device.torch_device}, {task.resolution} px, short side "
        f"{task.variant}, {task.cores} decoding threads, torch {torch.__version__}, {processor()}"
    )
    for name, mine in rates.items():
        print(
            f"  {name:<34}{median(mine):>7,.0f} images/s ({min(mine):,.0f} to {max(mine):,.0f})"
            f"   {ratios[name]:.3f} of alone"
        )
    result = {
        "benchmark": "loader_in_training",
        "device": bench.device.torch_device.type,
        "resolution": task.resolution,
        "short_side": int(task.variant),
        "cores": task.cores,
        "torch": torch.__version__,
        "images_per_second": {name: round(median(mine), 1) for name, mine in rates.items()},
        "ratios": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "rounds": {name: [round(rate, 1) for rate in mine] for name, mine in rates.items()},
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cores", type=int, default=2, help="(2)")
    parser.add_argument("--resolution", type=int, default=224, help="pixels (224)")
    parser.add_argument("--short-side", type=int, default=256, help="of the packed images (256)")
    parser.add_argument("--rounds", type=int, default=7, help="(7)")
    parser.add_argument("--batches", type=int, default=60, help="that count, a round (60)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    parser.add_argument("--data", type=Path, default=SAMPLE, help="a tar of class folders")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/pitstop-bench"))
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    unpack(options.data, options.cache)
    task = Task(options.cache, str(options.short_side), options.cores, options.resolution, 256)
    with_pitstop.prepare(task)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    data = PackedDataset.open(with_pitstop.packed(task))
    bench = Bench(data, task, options.device, options.batches)
    report(bench, measure(bench, options.rounds))


if __name__ == "__main__":
    main()
