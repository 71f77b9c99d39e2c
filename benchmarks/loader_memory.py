"""What packed data costs in memory, and what a cold page cache costs in speed.

    python benchmarks/loader_memory.py index     # 14 million images: time and memory to open them
    python benchmarks/loader_memory.py flat      # memory over 2,000 small batches
    python benchmarks/loader_memory.py cold      # images a second with and without the page cache

index: the index of 14 million images is written by `write_index` from made-up rows; the shards are
files without content of the sizes that short side 400 gives. It is opened in a process of its own,
with the index in the page cache and without. Memory is RssAnon, which the kernel cannot take back;
the mapped index is in RssFile, which it can. The order is that of a training run: two permutations,
of this epoch and the next.

flat: batches of 16 at 64 px; RssAnon after each 100 batches.

cold: the packed photos 20 times over, each copy's shards files of their own, so that a pass at 224
px takes seconds. A cold pass comes after the shards are written out and dropped from the page cache
(posix_fadvise); what then comes from the disk is read off /proc/self/io. Cold and warm take turns.
A disk that a hypervisor caches is faster than one that it does not.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np

from loader import SAMPLE, unpack
from peers import with_pitstop
from peers.task import Task
from pitstop.core.order import Order
from pitstop.core.recipe import parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.data import packed
from pitstop.data.load import Loader
from pitstop.data.manifest import FORMAT, MANIFEST, VERSION, read_manifest
from pitstop.data.packed import PackedDataset

IMAGES = 14_000_000
CLASSES = 21_841
"""Those of ImageNet-21k, which has 14.2 million images."""

IMAGE_BYTES, SHARD_BYTES = 54_000, 128 * 2**20
"""ImageNet at short side 400 (BENCHMARKS.md), and a shard as the packer writes it."""

COPIES = 20


def megabytes(key: str) -> float:
    """Returns a line of /proc/self/status, such as RssAnon, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = next(line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return int(kibibytes) * 1024 / 1e6


def drop(folder: Path) -> None:
    """Writes the files of a dataset out and drops them from the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# 14 million images


def made_up_columns(rows: int) -> tuple[np.ndarray, ...]:
    """Returns labels, sizes, starts and lengths of a shard, as `write_index` reads them."""
    rng = np.random.default_rng(rows)
    lengths = rng.integers(IMAGE_BYTES // 2, IMAGE_BYTES * 3 // 2, rows, dtype=np.uint32)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    sizes = rng.integers(400, 600, (rows, 2), dtype=np.uint16)
    return rng.integers(CLASSES, size=rows, dtype=np.int32), sizes, starts, lengths


NOTHING = sha256().hexdigest()
"""Where a manifest wants a checksum that nobody compares here."""


def make_index(folder: Path, images: int) -> None:
    """Makes a packed dataset of which everything is there but the images."""
    a_shard = SHARD_BYTES // IMAGE_BYTES
    splits = {}
    for name, rows in (("train", images), ("val", 1000)):
        counts = [min(a_shard, rows - first) for first in range(0, rows, a_shard)]
        shards = []
        for i, count in enumerate(counts):
            file = folder / f"{name}-{i:05}.arrow"
            file.touch()
            os.truncate(file, SHARD_BYTES)
            entry = {"file": file.name, "rows": count, "bytes": SHARD_BYTES}
            shards.append({**entry, "sha256": NOTHING})
        columns = [made_up_columns(count) for count in counts]
        with mock.patch.object(packed, "_columns", side_effect=columns):
            index = packed.write_index(folder, name, shards)
        splits[name] = {"rows": rows, "index": index, "shards": shards}
    write_manifest(folder, [str(i) for i in range(CLASSES)], splits)


def write_manifest(folder: Path, classes: list[str], splits: dict[str, Any]) -> None:
    made = {"pitstop": "", "source": "", "key": "", "short_side": 400, "quality": 90, "levels": []}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "digest": NOTHING,
        "classes": classes,
        "made": made,
        "skipped": 0,
        "converted": {},
        "splits": {name: {"content": NOTHING, **split} for name, split in splits.items()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))


def open_index(folder: Path) -> dict[str, float]:
    """Opens the dataset, as the first thing in this process, and draws the first batch's ids."""
    recipe = parse_recipe({"epochs": 90, "batch_size": 1024, "resolution": 224}, "benchmark")
    before, started = megabytes("RssAnon"), time.perf_counter()
    data = PackedDataset.open(folder)
    opened = time.perf_counter() - started
    after_opening, mapped = megabytes("RssAnon") - before, megabytes("RssFile")
    order = Order(Timeline(recipe, num_samples=len(data.train)))
    ids = order.ids(0)
    assert len(data.train.sizes[ids]) == len(data.train.labels[ids]) == 1024
    first = time.perf_counter() - started
    time.sleep(3)  # the next epoch's permutation is computed meanwhile
    both = megabytes("RssAnon") - before
    order.close()
    return {
        "open_seconds": opened,
        "open_anonymous_mb": after_opening,
        "mapped_and_code_mb": mapped,
        "first_ids_seconds": first,
        "order_anonymous_mb": both,
    }


def measure_index(options: argparse.Namespace) -> dict[str, Any]:
    with TemporaryDirectory(dir=options.cache) as directory:
        folder = Path(directory)
        make_index(folder, IMAGES)
        command = [sys.executable, __file__, "open", "--folder", directory]
        results: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
        for _ in range(options.rounds):
            for state, runs in results.items():
                if state == "cold":
                    drop(folder)
                runs.append(json.loads(subprocess.check_output(command)))
    medians = {
        state: {key: round(median(run[key] for run in runs), 3) for key in runs[0]}
        for state, runs in results.items()
    }
    for state, figures in medians.items():
        print(
            f"{IMAGES:,} images, index {state}: open in {figures['open_seconds']:.2f} s for "
            f"{figures['open_anonymous_mb']:.0f} MB; with the order of two epochs "
            f"{figures['order_anonymous_mb']:.0f} MB, first ids after "
            f"{figures['first_ids_seconds']:.2f} s (medians of {options.rounds})"
        )
    return medians


# Batches


def packed_photos(options: argparse.Namespace, resolution: int, batch_size: int) -> Task:
    """Packs the photos and returns a task on them."""
    unpack(options.data, options.cache)
    task = Task(options.cache, str(options.short_side), options.cores, resolution, batch_size)
    with_pitstop.prepare(task)
    return task


def measure_flat(options: argparse.Namespace) -> dict[str, Any]:
    task = packed_photos(options, 64, 16)
    data = PackedDataset.open(with_pitstop.packed(task))
    timeline = with_pitstop.timeline_for(task, len(data.train))
    anonymous: list[float] = []
    with Loader(data.train, timeline, range(2001), workers=task.cores) as batches:
        for batch in batches:
            if batch.step % 100 == 0:
                anonymous.append(round(megabytes("RssAnon"), 2))
    first, second, *_, last = anonymous
    print(
        f"2,000 batches of {task.batch_size} at {task.resolution} px: RssAnon {first:.1f} MB after "
        f"the first batch, {second:.1f} MB after 100, {last:.1f} MB after 2,000 "
        f"(highest {max(anonymous):.1f} MB)"
    )
    return {"anonymous_mb_each_100_batches": anonymous}


def multiplied(original: Path, out: Path) -> None:
    """Makes a packed dataset of the training shards of another, many times over."""
    manifest = read_manifest(original)
    shards = [
        entry | {"file": f"train-{copy:03}{i:02}.arrow", "from": entry["file"]}
        for copy in range(COPIES)
        for i, entry in enumerate(manifest["splits"]["train"]["shards"])
    ]
    for shard in shards:
        shutil.copyfile(original / shard.pop("from"), out / shard["file"])
    index = packed.write_index(out, "train", shards)
    rows = sum(shard["rows"] for shard in shards)
    val = manifest["splits"]["val"]
    for file in (val["index"], *val["shards"]):
        shutil.copyfile(original / file["file"], out / file["file"])
    splits = {"train": {"rows": rows, "index": index, "shards": shards}, "val": val}
    write_manifest(out, manifest["classes"], splits)


def one_pass(data: PackedDataset, task: Task) -> tuple[float, float]:
    """Returns images a second, and the MB that came from the disk, of a pass over the images."""
    timeline = with_pitstop.timeline_for(task, len(data.train))
    steps = len(data.train) // task.batch_size
    read, started = from_disk(), time.perf_counter()
    with Loader(data.train, timeline, range(steps), workers=task.cores) as batches:
        for _ in batches:
            pass
    return steps * task.batch_size / (time.perf_counter() - started), from_disk() - read


def from_disk() -> float:
    """Returns the MB that this process has had read from a disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes"))) / 1e6


def measure_cold(options: argparse.Namespace) -> dict[str, Any]:
    task = packed_photos(options, 224, 256)
    rates: dict[str, list[float]] = {"cold": [], "warm": []}
    read: dict[str, list[float]] = {"cold": [], "warm": []}
    with TemporaryDirectory(dir=options.cache) as directory:
        multiplied(with_pitstop.packed(task), Path(directory))
        data = PackedDataset.open(directory)
        one_pass(data, task)
        for _ in range(options.rounds):
            for state in rates:
                if state == "cold":
                    drop(Path(directory))
                rate, megabytes_read = one_pass(data, task)
                rates[state].append(round(rate, 1))
                read[state].append(round(megabytes_read, 1))
        images = len(data.train)
    ratio = median(c / w for c, w in zip(rates["cold"], rates["warm"], strict=True))
    print(
        f"{images:,} images of short side {task.variant}, {task.resolution} px, {task.cores} "
        f"threads: {median(rates['cold']):,.0f} images/s cold ({median(read['cold']):,.0f} MB read "
        f"from the disk), {median(rates['warm']):,.0f} warm ({median(read['warm']):,.0f} MB): "
        f"{ratio:.3f} (medians of {options.rounds})"
    )
    return {
        "images": images,
        "short_side": int(task.variant),
        "cores": task.cores,
        "images_per_second": rates,
        "megabytes_read": read,
        "ratio": round(ratio, 4),
    }


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "index": measure_index,
    "flat": measure_flat,
    "cold": measure_cold,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=[*MEASUREMENTS, "open"], help="`open` is for `index`")
    parser.add_argument("--cores", type=int, default=2, help="(2)")
    parser.add_argument("--short-side", type=int, default=256, help="of the packed images (256)")
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--data", type=Path, default=SAMPLE, help="a tar of class folders")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/pitstop-bench"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "open":
        print(json.dumps(open_index(options.folder)))
        return
    options.cache.mkdir(parents=True, exist_ok=True)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    figures = MEASUREMENTS[options.what](options)
    environment = {"python": platform.python_version(), "cores": options.cores}
    print(json.dumps({"benchmark": f"loader_memory {options.what}", **environment, **figures}))


if __name__ == "__main__":
    main()
