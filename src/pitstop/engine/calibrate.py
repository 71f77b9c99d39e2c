"""How fast this machine trains, evaluates, loads and saves: measured in about a minute."""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import date
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.machine import cores
from pitstop.core.order import rank_slice
from pitstop.core.recipe import Checkpoint, Eval, Phase, Recipe
from pitstop.core.timeline import Segment, Timeline
from pitstop.data.bench import bench
from pitstop.data.load import Batch, EvalBatch
from pitstop.data.packed import PackedDataset
from pitstop.engine.evaluate import predict, protocols, side
from pitstop.engine.micro_batch import fitting_parts
from pitstop.engine.state import TrainState
from pitstop.engine.step import Normalizer, Stage, train_step
from pitstop.io.cache import cache_directory
from pitstop.io.run_directory import RunDirectory
from pitstop.plan import calibration
from pitstop.plan.calibration import Calibration, Decode, Speed
from pitstop.plan.cost import IMAGENET
from pitstop.plan.rates import model_key
from pitstop.runtime.checkpoint import Checkpointer
from pitstop.runtime.devices import Device, machine, with_each_tensor
from pitstop.runtime.ranks import Ranks

SECONDS = 2.0
"""For which a figure is measured, at least."""

PIXELS = 2**20
"""Of a rank's batch on a CPU, at most: with more images at once it is no faster, and a step of
ResNet-50 would take minutes."""

DISK_BYTES = 128 * 2**20
"""Written and read back to measure a disk."""

WORK = {
    *("batch_size", "grad_accum_steps", "crop", "translate", "color_jitter", "augment"),
    *("random_erasing", "mix", "freeze", "frozen_batch_norm"),
}
"""What makes a step of one phase take longer than that of another, besides the resolution."""


def calibrate(
    recipe: Recipe,
    data: PackedDataset | None,
    device: Device,
    ranks: Ranks,
    *,
    started: float,
    say: Callable[[str], None],
) -> Calibration | None:
    """Measures this machine at what a recipe does: all ranks together, which all call this.

    Each part is measured alone: the training and the evaluation on images that are made up. What
    was measured before of other models and resolutions on the same device is kept.

    Args:
        data: that the loader is measured on; None: it is not.
        device: this rank's.
        started: when the command began, by `time.perf_counter`.
        say: told what is being measured.

    Returns:
        None on other ranks than the first.

    Raises:
        InputError: the recipe does not fit the model or the data.
    """
    num_classes = 1000 if data is None else len(data.classes)
    num_samples = IMAGENET if data is None else len(data.train)
    timeline = Timeline.planned(quick(recipe, device, ranks.world), num_samples)
    state = TrainState.initial(timeline.recipe, num_classes, device, ranks.world)
    startup = time.perf_counter() - started
    training: list[Speed] = []
    for segment in kinds(timeline):
        say(f"training at {segment.resolution} px")
        training.append(_training_speed(segment, timeline, state, device, ranks, num_classes))
    device.undo_compile(state.model)
    say("evaluation")
    evaluation = _evaluation_speed(state.model, timeline.recipe, device, ranks)
    if not ranks.main:
        ranks.from_main(None)  # rank 0 has the machine to itself for the rest
        return None
    say("saving")
    saving = save_seconds(state)
    decode = [] if data is None else [_decode(data, size, say) for size in _sides(timeline)]
    say("the disk")
    disk = disk_mb_per_second(_place_on_disk(data))
    ranks.from_main(b"measured")
    gpus = 0 if device.torch_device.type == "cpu" else ranks.world
    about = machine()
    measured = Calibration(
        date=date.today().isoformat(),
        device=_in_words(device, gpus),
        cores=cores(),
        gpus=gpus,
        gpu_memory_gib=about["gpus"][0]["memory_gib"] if about["gpus"] and gpus else None,
        memory_gib=about["ram_gib"],
        training=tuple(training),
        evaluation=(evaluation,),
        decode=tuple(decode),
        disk_mb_per_second=disk,
        startup_seconds=startup,
        save_seconds=saving,
    )
    return with_earlier(measured, _earlier())


def _place_on_disk(data: PackedDataset | None) -> Path:
    """Returns a directory on the data's disk, where it can be written to; else the cache."""
    if data is None or not os.access(data.path, os.W_OK):
        return cache_directory()
    return data.path


def _in_words(device: Device, gpus: int) -> str:
    if gpus == 0:
        return f"{machine()['cpu']['name']}, {cores()} cores"
    return device.name if gpus == 1 else f"{gpus} x {device.name}"


def with_earlier(now: Calibration, before: Calibration | None) -> Calibration:
    """Returns what was measured, and behind it what was before and has not been measured anew."""
    if before is None or before.device != now.device:
        return now

    def kept(new: tuple[Speed, ...], old: tuple[Speed, ...]) -> tuple[Speed, ...]:
        known = {(speed.model, speed.resolution) for speed in new}
        return (*new, *(s for s in old if (s.model, s.resolution) not in known))

    decoded = {decode.resolution for decode in now.decode}
    return now.model_copy(
        update={
            "training": kept(now.training, before.training),
            "evaluation": kept(now.evaluation, before.evaluation),
            "decode": (*now.decode, *(d for d in before.decode if d.resolution not in decoded)),
        }
    )


def _earlier() -> Calibration | None:
    """Returns the calibration that is there; a damaged one is replaced."""
    try:
        return calibration.load()
    except InputError:
        return None


# What to measure


def quick(recipe: Recipe, device: Device, world: int) -> Recipe:
    """Returns the recipe with batches that a CPU takes seconds for; on a GPU, as it is."""
    if device.torch_device.type != "cpu":
        return recipe

    def smaller(phase: Phase) -> Phase:
        largest = phase.resolution if isinstance(phase.resolution, int) else phase.resolution[1]
        batch_size = min(phase.batch_size, world * _most_images(largest))
        parts = min(phase.grad_accum_steps, batch_size // world)
        return phase.model_copy(update={"batch_size": batch_size, "grad_accum_steps": parts})

    return recipe.model_copy(update={"phases": tuple(map(smaller, recipe.phases))})


def _most_images(resolution: int) -> int:
    return max(1, PIXELS // resolution**2)


def kind(segment: Segment) -> str:
    """Returns what the work of a segment's steps consists of."""
    return f"{segment.phase.model_dump_json(include=WORK)} at {segment.resolution} px"


def kinds(timeline: Timeline) -> list[Segment]:
    """Returns the first segment of each kind of work."""
    first: dict[str, Segment] = {}
    for segment in timeline.segments:
        first.setdefault(kind(segment), segment)
    return [*first.values()]


def _sides(timeline: Timeline) -> list[int]:
    return sorted({segment.resolution for segment in timeline.segments})


# Measuring


def made_ready(
    segment: Segment,
    state: TrainState,
    device: Device,
    ranks: Ranks,
    num_classes: int,
    *,
    fit_memory: bool = False,
) -> tuple[Stage, float]:
    """Returns a segment's stage, and the seconds that compiling it took. All ranks call this.

    Args:
        fit_memory: cut batches that do not fit the memory on other devices than GPUs too.
    """
    ranks.begin(f"preparing to measure {segment.resolution} px")
    if fit_memory or device.torch_device.type == "cuda":
        parts = fitting_parts(segment, state, device, ranks, num_classes)
        phase = segment.phase.model_copy(update={"grad_accum_steps": parts})
        segment = replace(segment, phase=phase)
    stage = Stage(segment, state, device, ranks, num_classes)
    started = time.perf_counter()
    stage.warm_up()
    return stage, time.perf_counter() - started


def step_seconds(
    stage: Stage, state: TrainState, timeline: Timeline, batches: Iterator[Batch]
) -> float:
    """Returns what a step takes, waiting for its batch included. All ranks call this.

    The first two steps are not timed: buffers are made in them, and the first batches are there
    already.
    """

    def take(count: int) -> float:
        started = time.perf_counter()
        metrics = [_step(stage, state, timeline, batch) for batch in islice(batches, count)]
        metrics[-1][0].item()  # waits for the device
        return time.perf_counter() - started

    take(1)
    wanted = max(2.0, SECONDS / take(1))
    count = int(stage.ranks.gather([wanted])[0, 0])  # rank 0's
    return take(count) / count


def _step(stage: Stage, state: TrainState, timeline: Timeline, batch: Batch) -> torch.Tensor:
    stage.ranks.begin(f"measuring a step at {stage.segment.resolution} px")
    return train_step(stage, state, batch, timeline.settings_at(batch.step))


@torch.no_grad()
def image_seconds(
    model: nn.Module,
    batches: Iterable[EvalBatch],
    spec: Eval,
    recipe: Recipe,
    device: Device,
    *,
    at_least: float = SECONDS,
) -> float:
    """Returns what an image takes a rank in an evaluation, waiting for the batches included.

    Args:
        batches: on the device; measuring ends with them, or after `at_least` seconds.
        spec: one of the recipe's `protocols`.
    """
    model.eval()
    normalize = Normalizer(recipe, device.torch_device)
    images, started = 0, time.perf_counter()
    for batch in batches:
        predict(model, normalize(batch.images), spec, device)[0, 0].item()  # waits for the device
        images += len(batch.labels)
        if time.perf_counter() - started >= at_least:
            break
    return (time.perf_counter() - started) / images


def quick_evaluation(spec: Eval, device: Device) -> Eval:
    """Returns a protocol with batches that a CPU takes seconds for; on a GPU, as it is."""
    if device.torch_device.type != "cpu":
        return spec
    return spec.model_copy(update={"batch_size": min(spec.batch_size, _most_images(side(spec)))})


def save_seconds(state: TrainState) -> float:
    """Returns for how long a save stops the training; the first, which makes room, is not timed."""
    with tempfile.TemporaryDirectory(prefix="pitstop-") as scratch:
        checkpointer = Checkpointer(RunDirectory(Path(scratch)), Checkpoint())
        try:
            _save(checkpointer, state)
            checkpointer.wait()
            return _save(checkpointer, state)
        finally:
            checkpointer.close()


def _save(checkpointer: Checkpointer, state: TrainState) -> float:
    return checkpointer.save(state.state_dict(), epoch=0, top1=None, best=False, metadata={})


def disk_mb_per_second(directory: Path) -> float:
    """Returns how fast a directory's disk reads.

    What is read was written just before, and then forgotten by the system where it can be told so
    (Linux); elsewhere this is the speed of its page cache.
    """
    directory.mkdir(parents=True, exist_ok=True)
    block = os.urandom(2**20)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        for _ in range(DISK_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started = time.perf_counter()
        while file.read(len(block)):
            pass
        return DISK_BYTES / 1e6 / (time.perf_counter() - started)


# The machine's figures


def _training_speed(
    segment: Segment,
    timeline: Timeline,
    state: TrainState,
    device: Device,
    ranks: Ranks,
    num_classes: int,
) -> Speed:
    stage, _ = made_ready(segment, state, device, ranks, num_classes)
    share = rank_slice(segment.batch_size, ranks.rank, ranks.world)
    count = share.stop - share.start
    images, labels = _made_up(count, segment.resolution, num_classes)
    middle = (segment.first + segment.last) // 2  # what grows in a phase has grown by then
    batch = Batch(middle, share, np.arange(count), images, labels)
    batches = repeat(with_each_tensor(batch, lambda tensor: tensor.to(device.torch_device)))
    seconds = step_seconds(stage, state, timeline, batches)
    return _speed(segment.recipe, segment.resolution, segment.batch_size, device, seconds)


def _evaluation_speed(model: nn.Module, recipe: Recipe, device: Device, ranks: Ranks) -> Speed:
    """Returns the speed of one view of an image."""
    own, *_ = protocols(recipe)
    spec = quick_evaluation(own, device).model_copy(
        update={"flip_average": False, "translate_average": 0}
    )
    made_up = EvalBatch(*_made_up(spec.batch_size, side(spec), 1))
    batch = with_each_tensor(made_up, lambda tensor: tensor.to(device.torch_device))
    image_seconds(model, [batch], spec, recipe, device)  # the first is slower
    seconds = image_seconds(model, repeat(batch), spec, recipe, device)
    return _speed(
        recipe, side(spec), spec.batch_size, device, seconds * spec.batch_size / ranks.world
    )


def _speed(
    recipe: Recipe, resolution: int, batch_size: int, device: Device, seconds: float
) -> Speed:
    return Speed(
        model=model_key(recipe.model),
        resolution=resolution,
        batch_size=batch_size,
        precision=device.circumstance()["precision"],
        images_per_second=batch_size / seconds,
    )


def _made_up(count: int, resolution: int, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns random images uint8 [count, 3, R, R], channels_last, and labels int64 [count]."""
    pixels = torch.randint(0, 256, (count, resolution, resolution, 3), dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2), torch.arange(count) % num_classes


def _decode(data: PackedDataset, resolution: int, say: Callable[[str], None]) -> Decode:
    say(f"loading at {resolution} px")
    found = bench(data, resolution=resolution, threads=[cores()], seconds=SECONDS)
    return Decode(
        resolution=resolution,
        stored=f"short side {min(found.stored)}",
        images_per_second_a_core=found.images_per_second[cores()] / cores(),
    )
