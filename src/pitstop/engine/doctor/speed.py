"""The checks of speed and memory: of the model, of the loader, of both at once."""

import threading
import time
from collections.abc import Callable, Sequence

import torch

from pitstop.core.machine import cores
from pitstop.core.timeline import Timeline
from pitstop.data.bench import bench, cheaper_packing
from pitstop.data.manifest import read_manifest
from pitstop.engine.calibrate import calibrate, quick
from pitstop.engine.doctor.patient import GIB, Patient, SkippedError, size_text
from pitstop.engine.footprint import USABLE, largest_micro_batch
from pitstop.engine.minutes import measured as paces_of
from pitstop.engine.state import TrainState
from pitstop.io.host import available_memory, total_memory
from pitstop.plan.cost import IMAGENET
from pitstop.plan.rates import model_key
from pitstop.report.diagnosis import Finding
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

LOADED = 2.0
"""Seconds for which the loader is measured, at least."""

BUSY = 80.0
"""Percent of the time in which a GPU that is fed well works (assumed)."""


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
    said = f"a step of {batch} a device takes {size_text(taken)} of {size_text(room)}"
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
