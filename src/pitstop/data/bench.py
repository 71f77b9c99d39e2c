"""How many images a second the loader of training delivers, and what its time goes into.

Only a sample is read, again and again, so that it is warm: in the page cache of the system. It is
cold when it is read for the first time.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import ceil, inf
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pitstop.core.recipe import Crop, parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.data.augment import crop_boxes
from pitstop.data.decode import decode_crop
from pitstop.data.load import Loader
from pitstop.data.packed import LEVEL_MARGIN, PackedDataset, PackedSplit
from pitstop.data.resize import resize

SAMPLE = 4096
"""Images that the loader is measured on: some 300 MB at short side 400."""

TIMED = 512
"""Images whose reading, decoding and resizing is timed one by one."""

BATCH = 256


@dataclass(frozen=True)
class Bench:
    """What was measured."""

    resolution: int
    sample: int
    """Images."""
    stored: tuple[int, int]
    """The median (height, width) in pixels of the copies that were read."""
    images_per_second: dict[int, float]
    """By number of threads, warm."""
    cold_images_per_second: float | None
    """Of the most threads; None where the system cannot be told to forget what it has read."""
    microseconds: dict[str, float]
    """An image, of one core, warm: read, decode (and cut), resize; transfer if there is a GPU."""


def bench(
    dataset: PackedDataset,
    *,
    resolution: int,
    threads: Sequence[int],
    seconds: float,
    say: Callable[[str], None] | None = None,
) -> Bench:
    """Measures the loader, RandomResizedCrop and flip included. Nothing else should be running.

    Args:
        resolution: of the batches, in pixels.
        threads: numbers of threads to measure.
        seconds: to measure each for; it lasts two batches at least.
        say: told what is being measured.
    """
    stated = {"epochs": 1, "batch_size": min(BATCH, len(dataset.train)), "resolution": resolution}
    timeline = Timeline(parse_recipe(stated, "bench"), num_samples=len(dataset.train))
    batch_size = timeline.segments[0].batch_size
    steps = range(min(timeline.last, ceil(SAMPLE / batch_size)))

    def tell(what: str) -> None:
        if say is not None:
            say(what)

    tell(f"first read, threads: {max(threads)}")
    forgotten = forget(dataset.path)
    started = time.perf_counter()
    images = _load(dataset.train, timeline, steps, max(threads))
    cold = images / (time.perf_counter() - started)
    rates: dict[int, float] = {}
    for count in threads:
        tell(f"threads: {count}")
        rates[count] = _warm_rate(dataset.train, timeline, steps, count, seconds)
    tell("each part")
    split = dataset.train.at(resolution)
    height, width = np.median(split.sizes, axis=0).astype(int).tolist()
    return Bench(
        resolution=resolution,
        sample=images,
        stored=(height, width),
        images_per_second=rates,
        cold_images_per_second=cold if forgotten else None,
        microseconds=_parts(split, resolution) | _transfer(batch_size, resolution),
    )


def forget(path: Path) -> bool:
    """Drops a dataset's shards from the system's page cache; says whether that can be done here."""
    if sys.platform != "linux":
        return False
    for file in path.glob("*.arrow"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True


def _load(split: PackedSplit, timeline: Timeline, steps: Iterable[int], workers: int) -> int:
    """Loads some steps and returns their images."""
    with Loader(split, timeline, steps, workers=workers) as loader:
        return sum(len(batch.ids) for batch in loader)


def _warm_rate(
    split: PackedSplit, timeline: Timeline, steps: Iterable[int], workers: int, seconds: float
) -> float:
    """Returns images a second, from the first batch on: the threads have begun then."""
    images = 0
    with Loader(split, timeline, cycle(steps), workers=workers) as loader:
        next(loader)
        started = time.perf_counter()
        while True:
            images += len(next(loader).ids)
            passed = time.perf_counter() - started
            if passed >= seconds and images > timeline.segments[0].batch_size:
                return images / passed


def _parts(split: PackedSplit, resolution: int) -> dict[str, float]:
    """Returns what the parts of the loader's work take of a core, in microseconds an image."""
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(split))[:TIMED]
    boxes = crop_boxes(split.sizes[rows], Crop(), rng).tolist()
    slot = torch.empty((1, resolution, resolution, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    for row in rows.tolist():
        split.read(row)
    spent = dict.fromkeys(("read", "decode", "resize"), 0)
    for row, box in zip(rows.tolist(), boxes, strict=True):
        begin = time.thread_time_ns()
        data = split.read(row)
        read = time.thread_time_ns()
        pixels = decode_crop(data, box)
        decoded = time.thread_time_ns()
        resize(pixels, slot)
        spent["read"] += read - begin
        spent["decode"] += decoded - read
        spent["resize"] += time.thread_time_ns() - decoded
    return {part: nanoseconds / 1e3 / len(rows) for part, nanoseconds in spent.items()}


def _transfer(batch_size: int, resolution: int) -> dict[str, float]:
    """Returns what it takes to send batches to the GPU, if there is one, as `_parts` does."""
    if not torch.accelerator.is_available():
        return {}
    device = torch.accelerator.current_accelerator()
    shape = (batch_size, resolution, resolution, 3)
    batch = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    batch.to(device)
    torch.accelerator.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        batch.to(device, non_blocking=True)
    torch.accelerator.synchronize()
    return {"transfer": (time.perf_counter() - started) * 1e6 / (10 * batch_size)}


def cheaper_packing(resolution: int, made: Mapping[str, Any]) -> list[str]:
    """Returns the options of `pitstop data pack` that would make loading a resolution cheaper.

    Args:
        made: of the dataset's manifest; what is in use already is not returned.
    """
    level = ceil(LEVEL_MARGIN * resolution / 16) * 16
    if max(made["levels"], default=0) >= level:
        return []
    side = made["short_side"] or inf
    options = ["--short-side 256"] if side > 256 else []
    return [*options, f"--levels {level}"] if level < min(side, 256) else options
