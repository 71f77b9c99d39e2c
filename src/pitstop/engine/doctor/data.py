"""The checks of the data: reach, classes, integrity, and the disks that they lie on."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pitstop.data.bench import forget
from pitstop.data.check import check
from pitstop.data.inspect import describe_packed
from pitstop.data.open import open_dataset
from pitstop.data.resolve import BUCKETS
from pitstop.engine.calibrate import disk_mb_per_second
from pitstop.engine.doctor.patient import GIB, Patient, SkippedError, size_text
from pitstop.io.cache import cache_directory
from pitstop.io.host import available_memory, mount_of
from pitstop.io.objects import open_store
from pitstop.report.diagnosis import Finding

CHECKED_BYTES = 2 * GIB
"""Of a dataset that is checked image by image, at most."""

READ_BYTES = 128 * 2**20
"""Read to measure the data's disk, as `disk_mb_per_second` does of another."""


def bucket(patient: Patient) -> Finding:
    """Finds whether the bucket that the data lie in can be listed and read."""
    url = patient.recipe.data or ""
    if url.partition("://")[0] not in BUCKETS:
        raise SkippedError("the data are in no bucket")
    store = open_store(url)
    first = next(iter(store.list()), None)
    if first is None:
        fix = "check the name of the bucket and the folder"
        return Finding("bucket", "fail", f"{url}: can be listed, and is empty", fix)
    started = time.perf_counter()
    store.get_range(first.key, 0, min(first.size, 2**20) or 1)
    took = time.perf_counter() - started
    said = f"{url}: can be listed and read; the first object's first MB took {took:.2f} s"
    return Finding("bucket", "ok", said, numbers={"seconds": took})


def data(patient: Patient) -> Finding:
    """Opens the data; what is not packed is packed."""
    if patient.recipe.data is None:
        raise SkippedError("no data: give --data")
    opened = open_dataset(str(patient.recipe.data), workers=patient.workers, say=patient.say)
    patient.data = opened
    bytes_there = describe_packed(opened.path)["bytes"]
    said = (
        f"{opened.path}: {len(opened.train):,} training and {len(opened.val):,} validation "
        f"images, {size_text(bytes_there)}"
    )
    numbers = {"train": len(opened.train), "val": len(opened.val), "bytes": bytes_there}
    return Finding("data", "ok", said, numbers=numbers)


def classes(patient: Patient) -> Finding:
    """Finds classes that are in one split only."""
    opened = patient.need_data()
    names = opened.classes
    return class_sets(
        names,
        np.bincount(opened.train.labels, minlength=len(names)).tolist(),
        np.bincount(opened.val.labels, minlength=len(names)).tolist(),
    )


def class_sets(names: Sequence[str], train: Sequence[int], val: Sequence[int]) -> Finding:
    """Judges the images a class of both splits."""
    unseen = [name for name, n, m in zip(names, train, val, strict=True) if m and not n]
    untested = [name for name, n, m in zip(names, train, val, strict=True) if n and not m]
    numbers = {"classes": len(names), "only_val": unseen, "only_train": untested}
    if unseen:
        said = f"{_some(unseen)} are in val and not in train: they cannot be learned"
        fix = "the folders of both splits need the same names; `pitstop data split` makes splits"
        return Finding("classes", "fail", said, fix, numbers)
    if untested:
        said = f"{_some(untested)} are in train and not in val: nothing tells how they do"
        return Finding("classes", "warn", said, "add images of them to val", numbers)
    said = f"{len(names):,}, all in both splits, {min(train):,} to {max(train):,} images in train"
    return Finding("classes", "ok", said, numbers=numbers)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{len(names)} classes ({shown}{', ...' if len(names) > 5 else ''})"


def integrity(patient: Patient) -> Finding:
    """Checks each file and image of data that are not too large."""
    opened = patient.need_data()
    patient.need_time()
    if (size := describe_packed(opened.path)["bytes"]) > CHECKED_BYTES:
        raise SkippedError(
            f"{size_text(size)} take long: `pitstop data check {opened.path}` does it"
        )
    report = check(opened.path, workers=patient.workers)
    numbers = {"problems": len(report.problems), "duplicates": len(report.duplicates)}
    if report.problems:
        first = report.problems[0]
        said = f"{len(report.problems)} problems, the first: {first.file}: {first.why}"
        fix = f"`pitstop data check {opened.path}` lists them; then pack or copy again"
        return Finding("integrity", "fail", said, fix, numbers)
    if report.duplicates:
        said = f"{len(report.duplicates)} training images are in val too"
        fix = f"`pitstop data check {opened.path}` lists them; remove them and pack again"
        return Finding("integrity", "warn", said, fix, numbers)
    said = f"{report.files:,} files and {report.images:,} images are as they should be"
    return Finding("integrity", "ok", said, numbers=numbers)


def mount(patient: Patient) -> Finding:
    """Finds what kind of file system the data are on."""
    path = patient.need_data().path
    found = mount_of(path)
    if found is None:
        raise SkippedError("this system does not list its mounts")
    said = f"{path} is on {found.system} ({found.kind}), mounted at {found.point}"
    numbers = {"system": found.system, "kind": found.kind, "point": str(found.point)}
    if found.kind != "local":
        fix = f"`pitstop data stage {path} DIR` copies them to a local disk"
        return Finding("mount", "warn", said, fix, numbers)
    return Finding("mount", "ok", said, numbers=numbers)


def disk(patient: Patient) -> Finding:
    """Finds how fast the data are read, beside the local disk and beside what training needs."""
    opened = patient.need_data()
    cold = forget(opened.path)
    theirs = read_mb_per_second(sorted(opened.path.glob("*.arrow")))
    local = disk_mb_per_second(cache_directory())
    about = describe_packed(opened.path)
    train = about["splits"]["train"]
    mean = train["bytes"] / train["images"]
    said = f"{theirs:,.0f} MB/s{'' if cold else ' (cached)'}, the cache's disk {local:,.0f} MB/s"
    numbers = {"data_mb_per_second": theirs, "local_mb_per_second": local}
    if patient.speeds is not None:
        needed = max(patient.speeds.values()) * max(1, patient.gpus) * mean / 1e6
        said += f"; training takes {needed:,.1f} MB/s"
        numbers["needed_mb_per_second"] = needed
        cached = about["bytes"] < (available_memory() or 0)
        if theirs < needed and not cached:
            fix = f"`pitstop data stage {opened.path} DIR` to a faster disk"
            return Finding("disk", "warn", said, fix, numbers)
    return Finding("disk", "ok", said, numbers=numbers)


def read_mb_per_second(files: Sequence[Path]) -> float:
    """Returns how fast files are read, one after the other: `READ_BYTES` of them at most."""
    left, started = READ_BYTES, time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while left > 0 and (block := file.read(min(2**20, left))):
                left -= len(block)
    return (READ_BYTES - left) / 1e6 / (time.perf_counter() - started)


def space(patient: Patient) -> Finding:
    """Finds whether the checkpoints, and a copy of the data, fit on the disks."""
    here, cache = Path.cwd(), cache_directory()
    free = shutil.disk_usage(here).free
    policy = patient.recipe.checkpoint
    copies = 2 + (patient.recipe.ema is not None)  # the model, one moment or more, the average
    saves = policy.keep_last + policy.keep_best + 2  # one is being written, and the weights
    needed = saves * copies * 4 * patient.largest_step().params
    said = f"{size_text(free)} free in {here}, of which checkpoints take about {size_text(needed)}"
    numbers: dict[str, Any] = {"free_bytes": free, "checkpoint_bytes": needed}
    if free < needed:
        fix = "make room, train elsewhere with --out, or lower checkpoint.keep_last"
        return Finding("space", "fail", said, fix, numbers)
    if patient.data is not None:
        cache.mkdir(parents=True, exist_ok=True)
        data_bytes = describe_packed(patient.data.path)["bytes"]
        free_there = shutil.disk_usage(cache).free
        said += f"; {size_text(free_there)} in {cache} for data of {size_text(data_bytes)}"
        numbers |= {"cache_free_bytes": free_there, "data_bytes": data_bytes}
        if free_there < data_bytes and not patient.data.path.is_relative_to(cache.resolve()):
            fix = "a copy of the data does not fit there: set PITSTOP_CACHE to a larger disk"
            return Finding("space", "warn", said, fix, numbers)
    return Finding("space", "ok", said, numbers=numbers)
