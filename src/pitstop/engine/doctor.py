"""`pitstop doctor`: is this machine fit for a recipe and its data? Measured, check by check.

Each check takes the patient and returns a finding, and leaves there what later checks need. What
goes wrong in one is its finding; the others go on. Run alone: a busy machine looks like a slow one.
"""

import math
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch.multiprocessing.spawn import spawn

from pitstop import __version__
from pitstop.core.errors import InputError
from pitstop.core.machine import cores
from pitstop.core.recipe import LrFinder, Recipe, parse_recipe
from pitstop.core.timeline import Segment, Timeline
from pitstop.data.bench import bench, cheaper_packing, forget
from pitstop.data.check import check
from pitstop.data.inspect import describe_packed
from pitstop.data.manifest import read_manifest
from pitstop.data.open import open_dataset
from pitstop.data.pack import pack
from pitstop.data.packed import PackedDataset
from pitstop.data.resolve import BUCKETS
from pitstop.data.sources.packed import packed_source
from pitstop.data.sources.select import subset_source
from pitstop.engine.calibrate import calibrate, disk_mb_per_second, kinds, quick
from pitstop.engine.drops import plain
from pitstop.engine.footprint import USABLE, Footprint, footprint, largest_micro_batch
from pitstop.engine.lr_finder import Search, Suggestion
from pitstop.engine.minutes import measured as paces_of
from pitstop.engine.state import TrainState
from pitstop.engine.train import search_lr
from pitstop.engine.verify import Verdict, verify_resume
from pitstop.io.cache import cache_directory
from pitstop.io.host import available_memory, mount_of, total_memory
from pitstop.io.objects import open_store
from pitstop.io.records import read_events, rows
from pitstop.io.run_directory import RunDirectory
from pitstop.plan.cost import IMAGENET
from pitstop.plan.rates import model_key
from pitstop.report.diagnosis import Finding
from pitstop.runtime.devices import Device, auto_precision, machine, training
from pitstop.runtime.ranks import Ranks

T = TypeVar("T")

GIB = 2**30

SECONDS = 120.0
"""That the search for the lr, or the training on a subset, may take."""

CHECKED_BYTES = 2 * GIB
"""Of a dataset that is checked image by image, at most."""

LOADED = 2.0
"""Seconds for which the loader is measured, at least."""

READ_BYTES = 128 * 2**20
"""Read to measure the data's disk, as `disk_mb_per_second` does of another."""

LEAST_MEMORY = 2 * GIB
"""Below this, a training of any size is short of memory (assumed)."""

ROUNDING = 0.05
"""A product in bf16 of the same 256 x 256 numbers is 0.003 off; this is a broken unit."""

LINK_GB_PER_SECOND = 5.0
"""An all-reduce below this goes through the hosts' memory or a narrow slot (assumed): ResNet-50's
100 MB of gradients take 20 ms and more."""

BUSY = 80.0
"""Percent of the time in which a GPU that is fed well works (assumed)."""

FAR = 10.0
"""A recipe's lr and a suggestion that differ by more are told."""

EPOCHS, CLASSES, TRAIN, VAL, LEAST_TRAIN = 10, 10, 100, 50, 20
"""Of the training on a subset: epochs, and at most so many classes, with so many images each."""

BATCH = 32
"""Of the training on a subset: 310 steps with all images."""


class SkippedError(Exception):
    """A check cannot be done here; the message says why."""


@dataclass
class Patient:
    """What is examined, and what the checks have found so far: None where they could not."""

    recipe: Recipe
    """Names the data, or none."""
    thorough: bool
    """Whether the checks that take minutes are done."""
    scratch: Path
    """A directory for what is made in passing."""
    say: Callable[[str], None]
    device: Device | None = None
    data: PackedDataset | None = None
    speeds: dict[int, float] | None = None
    """Images a second of one device in training, data apart, by resolution."""
    resumed: Verdict | None = None

    @property
    def workers(self) -> int:
        """Threads that decode."""
        return cores() if self.recipe.workers == "auto" else self.recipe.workers

    @property
    def num_classes(self) -> int:
        """Those of the data; without, ImageNet's."""
        return 1000 if self.data is None else len(self.data.classes)

    @property
    def gpus(self) -> int:
        """GPUs that a training here would use."""
        on_cuda = self.device is not None and self.device.torch_device.type == "cuda"
        return torch.cuda.device_count() if on_cuda else 0

    def need_device(self) -> Device:
        """Returns the device."""
        return _needed(self.device, "there is no device to do it on")

    def need_data(self) -> PackedDataset:
        """Returns the dataset."""
        missing = self.recipe.data is None
        return _needed(
            self.data, "no data: give --data" if missing else "the data could not be opened"
        )

    def need_speeds(self) -> dict[int, float]:
        """Returns how fast it trains."""
        return _needed(self.speeds, "how fast it trains is not known")

    def need_time(self) -> None:
        """Asks for minutes."""
        if not self.thorough:
            raise SkippedError("takes minutes: leave --quick out")

    def largest_segment(self) -> Segment:
        """Returns the segment whose steps have the most pixels."""
        timeline = Timeline.planned(self.recipe, IMAGENET)
        return max(kinds(timeline), key=lambda s: s.batch_size * s.resolution**2)

    def largest_step(self) -> Footprint:
        """Returns what a step of that segment takes of each device."""
        segment, ranks = self.largest_segment(), max(1, self.gpus)
        return footprint(self.recipe, segment, num_classes=self.num_classes, ranks=ranks)


Check = Callable[[Patient], Finding]


def _needed(value: T | None, why: str) -> T:
    if value is None:
        raise SkippedError(why)
    return value


def examine(recipe: Recipe, *, thorough: bool, say: Callable[[str], None]) -> list[Finding]:
    """Does all checks, in an order in which each finds what it needs.

    Args:
        recipe: names the data, or none: then the checks of data are skipped.
        thorough: whether to do those that take minutes.
        say: told what is being done.
    """
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="pitstop-doctor-") as scratch:
        patient = Patient(recipe, thorough, Path(scratch), say)
        for name, of in CHECKS.items():
            say(f"checking: {name}")
            findings.append(checked(name, of, patient))
    return findings


def checked(name: str, of: Check, patient: Patient) -> Finding:
    """Returns what a check finds; that it fails or cannot be done is a finding too."""
    try:
        return of(patient)
    except SkippedError as why:
        return Finding(name, "skipped", str(why))
    except InputError as error:
        return Finding(name, "fail", str(error))
    except Exception as error:  # whatever is broken here is what we look for
        first_line = str(error).strip().partition("\n")[0]
        return Finding(name, "fail", f"{type(error).__name__}: {first_line}")


# The machine


def versions(patient: Patient) -> Finding:
    """Finds what is installed."""
    packages = ("torch", "torchvision", "timm", "numpy", "pyarrow")
    found = {"pitstop": __version__, "python": platform.python_version()}
    found |= {name: version(name) for name in packages}
    if torch.version.cuda is not None:
        found |= {"CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version())}
    if driver := _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader"):
        found["driver"] = driver.splitlines()[0]
    said = ", ".join(f"{name} {number}" for name, number in found.items())
    return Finding("versions", "ok", said, numbers=found)


def _nvidia_smi(*arguments: str) -> str | None:
    """Returns what nvidia-smi says, None where it is not there, fails, or does not answer."""
    if (command := shutil.which("nvidia-smi")) is None:
        return None
    try:
        return subprocess.run(
            [command, *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def devices(patient: Patient) -> Finding:
    """Finds the device that the recipe would be trained on, and how many there are."""
    recipe = patient.recipe
    patient.device = Device.choose(
        recipe.precision,
        recipe.compile,
        recipe.threads,
        device=recipe.device,
        deterministic=recipe.deterministic,
    )
    there, (used, why) = machine(), training(recipe.device)["device"]
    gpus = [f"{gpu['name']} with {gpu['memory_gib']} GiB" for gpu in there["gpus"]]
    cpu = f"{there['cpu']['name']}, {there['cpu']['cores']} cores to use"
    said = f"{used} ({why}): {'; '.join([*gpus, cpu])}"
    numbers = {"device": used, "gpus": len(gpus), "cores": there["cpu"]["cores"]}
    listed = None if gpus or recipe.device == "cpu" else _nvidia_smi("--list-gpus")
    if listed:
        what = f"{said}; but the driver lists {len(listed.splitlines())} GPUs"
        fix = (
            "install a torch that is built for CUDA and no newer than the driver allows; look at "
            "CUDA_VISIBLE_DEVICES; or give device: cpu"
        )
        return Finding("devices", "fail", what, fix, numbers)
    return Finding("devices", "ok", said, numbers=numbers)


def precision(patient: Patient) -> Finding:
    """Finds whether the device computes in the recipe's precision, and right."""
    device = patient.need_device()
    name = device.circumstance()["precision"]
    fastest, why = auto_precision(device.torch_device)
    error = rounding(device)
    said = f"{name}: a product is {error:.1e} off"
    numbers = {"precision": name, "fastest": fastest, "rounding": error}
    if not error < ROUNDING:
        return Finding("precision", "fail", said, "give precision: fp32", numbers)
    if name != fastest:
        fix = f"precision: auto takes {fastest}: {why}"
        return Finding("precision", "warn", said, fix, numbers)
    return Finding("precision", "ok", f"{said}; {why}", numbers=numbers)


@torch.no_grad()
def rounding(device: Device) -> float:
    """Returns the relative error of a product of matrices in a device's precision."""
    drawn = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    one, other = drawn.to(device.torch_device).unbind()
    with device.autocast():
        product = (one @ other).double().cpu()
    exact = torch.matmul(*drawn.double().unbind())
    return ((product - exact).norm() / exact.norm()).item()


def links(patient: Patient) -> Finding:
    """Finds how the GPUs are connected, and how fast they add up gradients."""
    if patient.gpus < 2:
        raise SkippedError("fewer than two GPUs: there is nothing to connect")
    pairs = list(combinations(range(patient.gpus), 2))
    direct = sum(torch.cuda.can_device_access_peer(*pair) for pair in pairs)
    speed = all_reduce_gb_per_second(patient.gpus, "nccl", patient.scratch)
    kinds_of_links = link_kinds(_nvidia_smi("topo", "-m") or "")
    said = f"all-reduce {speed:.1f} GB/s; {direct} of {len(pairs)} pairs reach each other directly"
    said += f"; links: {', '.join(kinds_of_links)}" if kinds_of_links else ""
    numbers = {"all_reduce_gb_per_second": speed, "direct_pairs": direct, "pairs": len(pairs)}
    if speed < LINK_GB_PER_SECOND:
        fix = "raise batch_size or grad_accum_steps; look for ACS or IOMMU settings that stop P2P"
        return Finding("links", "warn", said, fix, numbers)
    return Finding("links", "ok", said, numbers=numbers)


def link_kinds(topology: str) -> list[str]:
    """Returns the kinds of links between GPUs that `nvidia-smi topo -m` prints: NV18, PIX, ..."""
    table = [line.split() for line in topology.splitlines()]
    of_gpus = [words for words in table if "X" in words and words[0].startswith("GPU")]
    found = {kind for words in of_gpus for kind in words[1 : len(of_gpus) + 1]}
    return sorted(found - {"X"})


def all_reduce_gb_per_second(
    world: int, backend: str, scratch: Path, *, size: int = 2**26, times: int = 20
) -> float:
    """Returns the bus bandwidth of an all-reduce of `size` bytes, as nccl-tests counts it.

    Args:
        world: processes, on "nccl" each with a GPU of its own.
        scratch: a directory, where they meet.
    """
    answer, meeting = scratch / "all-reduce", scratch / "meeting"
    arguments = (world, backend, str(meeting), str(answer), size, times)
    spawn(_all_reduce, arguments, nprocs=world)
    return 2 * (world - 1) / world * size * times / float(answer.read_text()) / 1e9


def _all_reduce(
    rank: int, world: int, backend: str, meeting: str, answer: str, size: int, times: int
) -> None:
    """Is one of the processes; the first writes the seconds into `answer`."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        values = torch.zeros(size // 4, device=device)

        def add_up(count: int) -> float:
            started = time.perf_counter()
            for _ in range(count):
                dist.all_reduce(values)
            values[0].item()  # waits for the device
            return time.perf_counter() - started

        add_up(3)
        seconds = add_up(times)
        if rank == 0:
            Path(answer).write_text(repr(seconds))
    finally:
        dist.destroy_process_group()


def memory(patient: Patient) -> Finding:
    """Finds how much of the system's memory is left."""
    total, free = total_memory(), available_memory()
    if free is None:
        said = f"{total / GIB:.1f} GiB; how much is free, this system does not say"
        return Finding("memory", "ok", said, numbers={"total_bytes": total})
    said = f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free"
    numbers = {"total_bytes": total, "free_bytes": free}
    if free < LEAST_MEMORY:
        fix = "end what else runs here, or take a larger machine; fewer workers need less"
        return Finding("memory", "warn", said, fix, numbers)
    return Finding("memory", "ok", said, numbers=numbers)


# The data


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
        f"images, {_size(bytes_there)}"
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
        raise SkippedError(f"{_size(size)} take long: `pitstop data check {opened.path}` does it")
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
    said = f"{_size(free)} free in {here}, of which checkpoints take about {_size(needed)}"
    numbers: dict[str, Any] = {"free_bytes": free, "checkpoint_bytes": needed}
    if free < needed:
        fix = "make room, train elsewhere with --out, or lower checkpoint.keep_last"
        return Finding("space", "fail", said, fix, numbers)
    if patient.data is not None:
        cache.mkdir(parents=True, exist_ok=True)
        data_bytes = describe_packed(patient.data.path)["bytes"]
        free_there = shutil.disk_usage(cache).free
        said += f"; {_size(free_there)} in {cache} for data of {_size(data_bytes)}"
        numbers |= {"cache_free_bytes": free_there, "data_bytes": data_bytes}
        if free_there < data_bytes and not patient.data.path.is_relative_to(cache.resolve()):
            fix = "a copy of the data does not fit there: set PITSTOP_CACHE to a larger disk"
            return Finding("space", "warn", said, fix, numbers)
    return Finding("space", "ok", said, numbers=numbers)


def _size(count: float) -> str:
    """Returns bytes as text."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


# Speed and memory


def speed(patient: Patient) -> Finding:
    """Finds how fast one device trains at each of the recipe's resolutions, data apart."""
    device = patient.need_device()
    measured = calibrate(
        patient.recipe, None, device, Ranks(), started=time.perf_counter(), say=patient.say
    )
    assert measured is not None
    timeline = Timeline.planned(patient.recipe, IMAGENET)
    sides = {segment.resolution for segment in timeline.segments}
    key = model_key(patient.recipe.model)
    newest_last = reversed(measured.training)
    found = {s.resolution: s.images_per_second for s in newest_last if s.model == key}
    patient.speeds = {side: found[side] for side in sorted(sides)}
    rates = [f"{rate:,.1f} images/s at {side} px" for side, rate in patient.speeds.items()]
    said = f"{patient.recipe.model.name} on one device: {', '.join(rates)}"
    numbers = {
        "images_per_second": patient.speeds,
        "save_seconds": measured.save_seconds,
        "evaluated_images_per_second": measured.evaluation[0].images_per_second,
    }
    return Finding("speed", "ok", said, numbers=numbers)


def headroom(patient: Patient) -> Finding:
    """Finds whether the largest batch fits the memory, and how much larger it might be."""
    device, recipe, segment = patient.need_device(), patient.recipe, patient.largest_segment()
    room, taken, ranks = _room(device), patient.largest_step().bytes, max(1, patient.gpus)
    batch = f"{-(-segment.batch_size // ranks)} images of {segment.resolution} px"
    said = f"a step of {batch} a device takes {_size(taken)} of {_size(room)}"
    numbers = {"step_bytes": taken, "memory_bytes": room}
    if taken <= USABLE * room:
        said += f": there is room for {USABLE * room / taken:.1f} times as much"
        return Finding("headroom", "ok", said, numbers=numbers)
    most = largest_micro_batch(
        recipe, segment, room / GIB, num_classes=patient.num_classes, ranks=ranks
    )
    if most is None:
        fix = "lower the resolution, or take a smaller model"
        return Finding("headroom", "fail", f"{said}; not even one image fits", fix, numbers)
    fix = f"--batch-size auto cuts it into micro-batches of {most} images; or lower batch_size"
    return Finding("headroom", "warn", said, fix, numbers | {"micro_batch": most})


def _room(device: Device) -> int:
    """Returns the bytes of memory that a step on a device may take: of a GPU, all that it has."""
    if device.torch_device.type == "cuda":
        return torch.cuda.get_device_properties(device.torch_device).total_memory
    return available_memory() or total_memory()


def loader(patient: Patient) -> Finding:
    """Finds whether images are decoded as fast as they are trained on."""
    opened, speeds = patient.need_data(), patient.need_speeds()
    devices_fed = max(1, patient.gpus)
    resolution, wanted = max(speeds.items(), key=lambda one: one[1])
    found = bench(opened, resolution=resolution, threads=[cores()], seconds=LOADED, say=patient.say)
    delivered, wanted = found.images_per_second[cores()], wanted * devices_fed
    said = (
        f"{delivered:,.0f} images/s at {resolution} px on {cores()} cores; "
        f"training takes {wanted:,.0f} ({devices_fed} x {wanted / devices_fed:,.0f})"
    )
    numbers = {"images_per_second": delivered, "wanted_images_per_second": wanted}
    if delivered >= wanted:
        return Finding("loader", "ok", said, numbers=numbers)
    options = cheaper_packing(resolution, read_manifest(opened.path)["made"])
    fix = f"pack with {' or '.join(options)}" if options else "take more cores, or a larger model"
    return Finding("loader", "warn", said, fix, numbers)


def utilization(patient: Patient) -> Finding:
    """Finds how busy the GPU is while it trains on the data, loading included."""
    device = patient.need_device()
    if patient.gpus == 0:
        raise SkippedError("there is no GPU")
    opened = patient.need_data()
    recipe = Timeline.planned(quick(patient.recipe, device, 1), len(opened.train)).recipe
    state = TrainState.initial(recipe, len(opened.classes), device)
    seen = sampled(
        device.utilization,
        lambda: paces_of(
            recipe, state, opened, device, Ranks(), workers=patient.workers, fit_memory=True
        ),
    )
    return busy(seen)


def sampled(ask: Callable[[], float | None], work: Callable[[], object]) -> list[float]:
    """Returns what `ask` answers, twice a second, while `work` is done; None is no answer."""
    answers: list[float | None] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            answers.append(ask())

    watcher = threading.Thread(target=watch, name="utilization")
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return [answer for answer in answers if answer is not None]


def busy(seen: Sequence[float]) -> Finding:
    """Judges how busy the GPU was, in percent: by the upper half, as there is setting up too."""
    if not seen:
        raise SkippedError("NVML is missing: pip install nvidia-ml-py")
    upper = sorted(seen)[len(seen) // 2 :]
    percent = sum(upper) / len(upper)
    numbers = {"busy_percent": percent}
    said = f"the GPU is busy {percent:.0f}% of the time, loading included"
    if percent < BUSY:
        fix = "see loader and disk; then a larger batch, or compile: true"
        return Finding("utilization", "warn", said, fix, numbers)
    return Finding("utilization", "ok", said, numbers=numbers)


# Training


def lr(patient: Patient) -> Finding:
    """Finds the lr that a range test suggests, and compares the recipe's."""
    device, opened, speeds = patient.need_device(), patient.need_data(), patient.need_speeds()
    patient.need_time()
    recipe = patient.recipe
    spec = recipe.lr_finder or LrFinder(fallback=recipe.phases[0].peak_lr())
    segment = Timeline.planned(recipe, len(opened.train)).segments[0]
    seconds = (
        spec.iterations * segment.batch_size / speeds.get(segment.resolution, min(speeds.values()))
    )
    if seconds > SECONDS:
        raise SkippedError(
            f"{spec.iterations} steps of {segment.batch_size} images take {seconds / 60:.0f} min "
            "here: `pitstop lr-find` does it"
        )
    found = search_lr(recipe, spec, opened, device, workers=patient.workers)
    first = recipe.phases[0]
    return compared(found, None if first.lr == "auto" else first.peak_lr())


def compared(found: Search, own: float | None) -> Finding:
    """Judges a search beside the recipe's own lr, None where that is to be found."""
    numbers = {"suggested": found.peak, "recipe": own}
    if not isinstance(found.result, Suggestion):
        return Finding("lr", "warn", found.explained(), "see docs/lr-finder.md", numbers)
    said = found.explained() + ("" if own is None else f"; the recipe's is {own:g}")
    if own is not None and not 1 / FAR <= own / found.peak <= FAR:
        return Finding("lr", "warn", said, f"try --lr {found.peak:.2g}", numbers)
    return Finding("lr", "ok", said, numbers=numbers)


def learning(patient: Patient) -> Finding:
    """Trains ten epochs on some images of some classes, twice: the second time it is killed."""
    device, opened, speeds = patient.need_device(), patient.need_data(), patient.need_speeds()
    patient.need_time()
    recipe = trial_recipe(patient.recipe)
    a_class = images_a_class(speeds, recipe.phases[0].resolution, len(opened.classes))
    subset = _subset(opened, a_class, patient)
    file = patient.scratch / "trial.yaml"
    stated = plain(recipe) | {"data": str(subset.path)}
    file.write_text(yaml.safe_dump(stated, sort_keys=False))
    command = [sys.executable, "-P", "-m", "pitstop", "train", str(file), "--nproc", "1"]
    command += ["--max-fruitless-starts", "0"]
    command += [] if device.torch_device.type == "cpu" else ["--deterministic"]
    torch.cuda.empty_cache()  # others are to train on it now
    runs = patient.scratch / "runs"
    try:
        patient.resumed = verify_resume(command, runs, kills=2, seed=0, say=patient.say)
    except InputError as error:
        return Finding("learning", "fail", _why(runs) or str(error), "mend what it says")
    events = read_events(RunDirectory(runs / "uninterrupted").events)
    last = [*rows(events)][-1]
    counts = np.bincount(subset.val.labels, minlength=len(subset.classes)).tolist()
    return learned(last.val_top1, last.val_loss, counts, images=len(subset.train))


def trial_recipe(recipe: Recipe) -> Recipe:
    """Returns the recipe's model, optimizer and loss in ten plain epochs with small batches.

    The lr goes with the square root of the batch (Krizhevsky, arXiv 1404.5997). What makes the
    first epochs look worse than they are (mixing, augmentation, smoothing, averages) is left out.
    """
    first = recipe.with_lr(recipe.lr_finder.fallback if recipe.lr_finder else 0.0).phases[0]
    raw = plain(recipe)
    side = first.resolution if isinstance(first.resolution, int) else first.resolution[0]
    phase = raw["phases"][0] | {
        "name": "trial",
        "duration": "rest",
        "resolution": side,
        "batch_size": BATCH,
        "grad_accum_steps": 1,
        "data_fraction": 1.0,
        "lr": first.peak_lr() * math.sqrt(BATCH / first.batch_size),
        "lr_per": None,
        "lr_cap": None,
        "lr_scale": 1.0,
        "lr_schedule": {"name": "onecycle"},
        "color_jitter": None,
        "augment": None,
        "random_erasing": None,
        "repeated_augmentation": 1,
        "mix": None,
        "label_smoothing": 0.0,
        "freeze": [],
        "optimizer_state": "keep",
    }
    changed: dict[str, Any] = {"name": "trial", "epochs": EPOCHS, "phases": [phase], "ema": None}
    changed |= {"lr_finder": None, "target_accuracy": None, "checkpoint": {}, "sync_bn": False}
    changed["eval"] = raw["eval"] | {"every": EPOCHS, "also": []}
    return parse_recipe(raw | changed, f"{recipe.name}, for ten epochs")


def images_a_class(speeds: dict[int, float], side: int | tuple[int, int], classes: int) -> int:
    """Returns how many training images of a class ten epochs may have within `SECONDS`."""
    slowest = min(speeds.values())
    rate = slowest if isinstance(side, tuple) else speeds.get(side, slowest)
    count = min(classes, CLASSES)
    fit = int(SECONDS * rate / (EPOCHS * count))
    if fit < LEAST_TRAIN:
        least = EPOCHS * count * LEAST_TRAIN / rate / 60
        raise SkippedError(f"{EPOCHS} epochs of {count * LEAST_TRAIN} images take {least:.0f} min")
    return min(TRAIN, fit)


def _subset(opened: PackedDataset, train: int, patient: Patient) -> PackedDataset:
    """Packs some images of some classes, which lie far apart in the list: alike are neighbours."""
    chosen = [*opened.classes[:: max(1, len(opened.classes) // CLASSES)]][:CLASSES]
    source = subset_source(packed_source(opened.path), chosen, train=train, val=VAL)
    made = read_manifest(opened.path)["made"]
    place = patient.scratch / "subset"
    pack(
        source,
        place,
        short_side=made["short_side"],
        quality=made["quality"],
        workers=patient.workers,
    )
    return PackedDataset.open(place)


def _why(runs: Path) -> str | None:
    """Returns the last line of the log of a training that did not end well."""
    logs = sorted(runs.glob("*.log"), key=lambda path: path.stat().st_mtime)
    lines = [line for log in logs[-1:] for line in log.read_text().splitlines() if line.strip()]
    return lines[-1].strip() if lines else None


def learned(top1: float, loss: float, counts: Sequence[int], *, images: int) -> Finding:
    """Judges what ten epochs on a subset came to.

    Accuracy at chance, or a loss that is not below that of a guess, is failed. Chance is the
    largest class; at it is what lies within two standard deviations of its accuracy.

    Args:
        top1: percent of the validation images.
        loss: their mean cross entropy.
        counts: validation images of each class.
        images: trained on.
    """
    n, guess = sum(counts), math.log(len(counts))
    chance = max(counts) / n
    beyond = 100 * (chance + 2 * math.sqrt(chance * (1 - chance) / n))
    said = (
        f"{EPOCHS} epochs of {images:,} images of {len(counts)} classes: top-1 {top1:.1f}% "
        f"(chance {100 * chance:.1f}%), loss {loss:.3f} (a guess {guess:.3f})"
    )
    numbers = {"top1": top1, "loss": loss, "chance": 100 * chance, "guess_loss": guess}
    fix = "it does not learn: see docs/troubleshooting.md, 'The loss stays where it is'"
    if not top1 > beyond or not loss <= guess:
        return Finding("learning", "fail", said, fix, numbers)
    return Finding("learning", "ok", said, numbers=numbers)


def resume(patient: Patient) -> Finding:
    """Finds whether the training that was killed ended as the one that nobody touched."""
    patient.need_time()
    verdict = _needed(patient.resumed, "the ten epochs were not trained to their end")
    return equal(verdict)


def equal(verdict: Verdict) -> Finding:
    """Judges a killed run beside another."""
    numbers = {"kills": verdict.kills, "lost_steps": verdict.lost_steps}
    if not verdict.equal:
        first, *_ = verdict.differences
        said = f"the killed run ended otherwise: {len(verdict.differences)} differences, {first}"
        fix = "`pitstop verify-resume` repeats it; --deterministic on a GPU"
        return Finding("resume", "fail", said, fix, numbers)
    if verdict.kills == 0:
        fix = "`pitstop verify-resume --kills 5` tries more"
        return Finding("resume", "warn", "no kill found the run at work", fix, numbers)
    said = f"{verdict.kills} kills, {verdict.lost_steps} steps trained again: equal, bit by bit"
    return Finding("resume", "ok", said, numbers=numbers)


CHECKS: dict[str, Check] = {
    "versions": versions,
    "devices": devices,
    "precision": precision,
    "links": links,
    "memory": memory,
    "bucket": bucket,
    "data": data,
    "classes": classes,
    "mount": mount,
    "integrity": integrity,
    "speed": speed,
    "headroom": headroom,
    "disk": disk,
    "space": space,
    "loader": loader,
    "utilization": utilization,
    "lr": lr,
    "learning": learning,
    "resume": resume,
}
"""In an order in which each finds what it needs."""
