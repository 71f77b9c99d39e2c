"""Engine overhead: pitstop's training loop against a bare PyTorch loop, block by block.

Method. Both train a model of the same initial weights on the same batches in memory, in one
process: blocks of 20 steps, a block of each is a pair, and the order within a pair alternates
(ABBA), so that a drift of the machine cancels. A pair's ratio is pitstop's seconds over the bare
loop's. The result is the median ratio and its 95% interval (percentile bootstrap over the pairs).
The first pair warms up and does not count; after it the losses of both must agree, which shows that
they do the same arithmetic.

pitstop's side is `Training.loop` itself: the settings of the step, `train_step` with its metrics,
the meter, and all that may be due between steps, with records and progress in a temporary
directory. Only its loader is replaced, by one that hands out the batches in memory and runs the
bare loop between blocks. Nothing is evaluated or saved. Its sums are read at the end of each block
and whenever 2 s have passed, the bare loop's blocks included: more often than in a real run.

The bare loop is what one would write by hand, without waste: the same uint8 images flipped and
normalised (by constants made beforehand), bf16 autocast, channels_last, cross entropy with label
smoothing, SGD with nesterov momentum and no weight decay on norms and biases, gradients set to
None. Learning rate and momentum are read from a list made beforehand. It sums up the loss and reads
the sum at the end of the block. It does not count correct images, seed dropout, look for a signal,
a non-finite loss or a due evaluation, and records and displays nothing.

    python benchmarks/engine_overhead.py      # about 4 minutes on 2 cores with bf16 instructions
"""

import argparse
import copy
import io
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from pitstop.core.recipe import Recipe, parse_recipe
from pitstop.core.safeguards import Safeguards
from pitstop.core.timeline import Timeline
from pitstop.core.tracking import Tracking
from pitstop.data.load import Batch
from pitstop.data.packed import PackedDataset, PackedSplit
from pitstop.engine import train as engine
from pitstop.engine.guard import Guard
from pitstop.engine.journal import Journal
from pitstop.engine.resume import Course, Wish
from pitstop.engine.state import TrainState
from pitstop.io.records import read_events
from pitstop.io.run_directory import RunDirectory
from pitstop.runtime.checkpoint import Checkpointer
from pitstop.runtime.devices import Device
from pitstop.runtime.preemption import Preemption
from pitstop.runtime.ranks import Ranks

BLOCK = 20
"""Steps a block."""

WARM_UP = 1
"""Pairs that do not count."""

IMAGES, CLASSES = 1_281_167, 1000
"""Of ImageNet-1k: an epoch is longer than the benchmark."""

IN_MEMORY = 8
"""Different batches, used in turn."""

AGREE = 1e-3
"""The relative difference of the losses after the first block that rounding may cause."""


@dataclass(frozen=True)
class Options:
    pairs: int
    model: str
    resolution: int
    batch_size: int
    threads: int | None


@dataclass(frozen=True)
class Pair:
    """Seconds of a block."""

    pitstop: float
    bare: float


def recipe_for(options: Options) -> Recipe:
    """Returns a usual recipe: everything that the bare loop has, and nothing else."""
    stated = {
        "name": "overhead",
        "epochs": 10,
        "resolution": options.resolution,
        "batch_size": options.batch_size,
        "lr": 0.1,
        "lr_schedule": {"name": "onecycle", "base_momentum": 0.85, "max_momentum": 0.95},
        "optimizer": {"name": "sgd", "weight_decay": 5e-5, "nesterov": True},
        "label_smoothing": 0.1,
        "flip": "random",
        "model": options.model,
        "precision": "bf16",
        "threads": options.threads,
    }
    return parse_recipe(stated, "benchmark")


def batches_in_memory(options: Options) -> list[Batch]:
    """Returns batches of noise as the loader makes them."""
    draw = torch.Generator().manual_seed(0)
    size, side = options.batch_size, options.resolution

    def batch(step: int) -> Batch:
        shape = (size, side, side, 3)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=draw).permute(0, 3, 1, 2)
        labels = torch.randint(CLASSES, (size,), generator=draw)
        return Batch(step, slice(0, size), np.arange(size), images, labels)

    return [batch(step) for step in range(IN_MEMORY)]


class BareLoop:
    """A training loop as one would write it by hand.

    Args:
        model: float32, channels_last; it is trained.
        recipe: whose constants to take.
        rates: learning rate and momentum of each step.
        batches: used in turn.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        rates: list[tuple[float, float]],
        batches: list[Batch],
    ) -> None:
        self.model, self.rates, self.batches = model, rates, batches
        self.label_smoothing = recipe.label_smoothing
        self.mean = torch.tensor(recipe.mean)[:, None, None] * 255
        self.std = torch.tensor(recipe.std)[:, None, None] * 255
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": recipe.optimizer.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)

    def run(self, first: int, steps: int) -> float:
        """Trains for some steps and returns their mean loss."""
        total = torch.zeros(())
        for step in range(first, first + steps):
            batch = self.batches[step % len(self.batches)]
            for group in self.optimizer.param_groups:
                group["lr"], group["momentum"] = self.rates[step]
            images = batch.images.float().sub_(self.mean).div_(self.std)
            with torch.autocast("cpu", torch.bfloat16):
                logits = self.model(images)
            loss = F.cross_entropy(
                logits.float(), batch.labels, label_smoothing=self.label_smoothing
            )
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
        return total.item() / steps


def training_in(directory: Path, recipe: Recipe) -> engine.Training:
    """Returns a new run as the engine makes it; its images are never read."""
    run = RunDirectory(directory)
    split = cast(PackedSplit, range(IMAGES))  # of which only the length is asked
    data = PackedDataset(directory, tuple(map(str, range(CLASSES))), "none", split, split)
    course = Course(recipe, (), IMAGES)
    checkpointer = Checkpointer(run, recipe.checkpoint)
    device, ranks = Device.choose(recipe.precision, recipe.compile, recipe.threads), Ranks()
    state = TrainState.initial(recipe, CLASSES, device)
    console = Console(file=io.StringIO())
    journal = Journal(
        recipe,
        course,
        data,
        run,
        checkpointer,
        device,
        ranks,
        console,
        Guard(run, Safeguards(), starts_over=False, say=console.print),
        Tracking(),
        step=0,
        resumes=False,
        evaluated=False,
    )
    return engine.Training(
        Wish(recipe), course, data, state, device, ranks, journal, 1, Preemption()
    )


@dataclass
class Alternation:
    """Stands in for the loader of pitstop's loop, and runs the bare loop between its blocks."""

    training: engine.Training
    bare: BareLoop
    batches: list[Batch]
    pairs: int
    timed: list[Pair] = field(default_factory=list)
    loss: float = math.nan
    """Mean loss of the bare loop's last block."""
    losses: tuple[float, float] | None = None
    """Mean losses of the first block: pitstop's and the bare loop's."""

    def loader(self, *_: object, **__: object) -> AbstractContextManager[Iterator[Batch]]:
        """Takes the place of `Loader`."""
        return nullcontext(self.blocks())

    def blocks(self) -> Iterator[Batch]:
        """Yields the batches of all blocks. pitstop trains on one while it asks for the next."""
        for pair in range(WARM_UP + self.pairs):
            first = pair * BLOCK
            before = self.bare_block(first) if pair % 2 else None
            started = time.perf_counter()
            for step in range(first, first + BLOCK):
                yield self.batches[step % len(self.batches)]
            self.training.flush()  # waits for the last step, as the bare loop's block does
            seconds = time.perf_counter() - started
            self.timed.append(Pair(seconds, before or self.bare_block(first)))
            if self.losses is None:
                self.losses = self.first_losses()
        self.training.preemption.reason = "the benchmark is over"
        yield self.batches[0]  # the loop sees the reason after it

    def bare_block(self, first: int) -> float:
        """Runs a block of the bare loop and returns its seconds."""
        started = time.perf_counter()
        self.loss = self.bare.run(first, BLOCK)
        return time.perf_counter() - started

    def first_losses(self) -> tuple[float, float]:
        """Returns the mean losses of the first block, having checked that they agree."""
        assert isinstance(self.training.journal, Journal)
        events = [e for e in read_events(self.training.journal.run.events) if e["kind"] == "train"]
        assert events[-1]["step"] == BLOCK
        pitstop = sum(e["loss"] for e in events) / sum(e["images"] for e in events)
        assert abs(pitstop - self.loss) <= AGREE * self.loss, (
            f"not the same training: loss {pitstop} in pitstop, {self.loss} in the bare loop"
        )
        return pitstop, self.loss


def measure(options: Options) -> Alternation:
    """Runs all pairs."""
    recipe = recipe_for(options)
    timeline = Timeline(recipe, num_samples=IMAGES)
    steps = (WARM_UP + options.pairs) * BLOCK
    settings = [timeline.settings_at(step) for step in range(steps)]
    batches = batches_in_memory(options)
    with TemporaryDirectory() as directory:
        training = training_in(Path(directory) / "run", recipe)
        journal = training.journal
        assert isinstance(journal, Journal)
        model = copy.deepcopy(training.state.model)
        bare = BareLoop(model, recipe, [(s.lr, s.momentum) for s in settings], batches)
        alternation = Alternation(training, bare, batches, options.pairs)
        with mock.patch.object(engine, "Loader", alternation.loader):
            outcome = training.loop()
        assert outcome == engine.INTERRUPTED
        journal.records.close()
        journal.checkpointer.close()
    return alternation


def bootstrap_interval(values: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """Returns the 95% percentile interval of the median of `values` [n]."""
    draws = np.random.default_rng(0).choice(values, (resamples, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(high)


def report(options: Options, alternation: Alternation) -> None:
    """Prints the result, and again as JSON."""
    pairs = alternation.timed[WARM_UP:]
    ratios = np.array([pair.pitstop / pair.bare for pair in pairs])
    median, (low, high) = float(np.median(ratios)), bootstrap_interval(ratios)
    pitstop_ms, bare_ms = (
        1000 * float(np.median([getattr(pair, side) for pair in pairs])) / BLOCK
        for side in ("pitstop", "bare")
    )
    assert alternation.losses is not None
    mine, bares = alternation.losses
    print(
        f"engine overhead: {options.model}, {options.resolution} px, batch {options.batch_size}, "
        f"bf16, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
        f"  pitstop / bare  {median:.4f}, 95% interval {low:.4f} to {high:.4f} "
        f"({len(pairs)} pairs of {BLOCK}-step blocks)\n"
        f"  a step          {pitstop_ms:.2f} ms and {bare_ms:.2f} ms (medians)\n"
        f"  the same work   mean loss of the first block {mine:.5f} and {bares:.5f}"
    )
    result = {
        "benchmark": "engine_overhead",
        **vars(options),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "median_ratio": round(median, 5),
        "interval_95": [round(low, 5), round(high, 5)],
        "pitstop_step_ms": round(pitstop_ms, 3),
        "bare_step_ms": round(bare_ms, 3),
        "first_block_losses": [round(mine, 6), round(bares, 6)],
        "ratios": [round(float(ratio), 5) for ratio in ratios],
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=30, help="pairs of blocks (default 30)")
    parser.add_argument("--model", default="resnet18", help="a timm model (default resnet18)")
    parser.add_argument("--resolution", type=int, default=64, help="pixels (default 64)")
    parser.add_argument("--batch-size", type=int, default=32, help="images a step (default 32)")
    parser.add_argument("--threads", type=int, help="of torch (default: all cores)")
    options = Options(**vars(parser.parse_args()))
    report(options, measure(options))


if __name__ == "__main__":
    main()
