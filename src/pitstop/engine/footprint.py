"""What a step of training takes of a GPU: memory and FLOPs, counted without one.

The engine's own `train_step` runs on fake tensors, which have shapes and no values: torch's
MemTracker adds up what is held at a time, its FlopCounterMode what is multiplied. The images are
taken as they are: augmentation works on bytes, before there is anything else. What a GPU takes by
itself (its context, workspaces of kernels, memory in pieces) is not known here.
"""

import copy
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from pitstop import __version__
from pitstop.core.errors import InputError
from pitstop.core.length import Length
from pitstop.core.recipe import Recipe
from pitstop.core.schedule import Constant
from pitstop.core.timeline import Segment, Timeline
from pitstop.data.load import Batch
from pitstop.engine.state import TrainState
from pitstop.engine.step import Stage, train_step
from pitstop.io.storage import read_json, write_json
from pitstop.nn import optimizers
from pitstop.plan.rates import footprints_file, model_key
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

USABLE = 0.9
"""The part of a GPU's memory that a step may take. The rest is for its context, the kernels'
workspaces and memory in pieces (assumed)."""

COUNTED_PARTS = 2
"""Micro-batches that are counted: in the second, the gradients of the first are there too."""


@dataclass(frozen=True)
class Footprint:
    """What a step takes."""

    bytes: int
    """The most that one GPU holds at a time."""
    flops_per_image: float
    """Forward and backward; a multiplication and an addition are two."""
    gmacs: float
    """Billions of multiplications, each with its addition, in an image's forward pass."""
    params: int
    """Of the model."""


def footprint(
    recipe: Recipe, segment: Segment, *, num_classes: int = 1000, ranks: int = 1
) -> Footprint:
    """Returns what a step of a segment takes of each of `ranks` GPUs.

    Counting takes seconds. It is kept in the cache, by model, resolution and all that the step
    depends on; there `pitstop plan` finds the GMACs of models that it does not know.

    Raises:
        InputError: there is no such model, or it does not take the recipe's keys.
    """
    share = -(-segment.batch_size // ranks)
    step = _Step(recipe, segment, share, segment.phase.grad_accum_steps, num_classes)
    file = footprints_file()
    known = _read(file)
    name, key = f"{model_key(recipe.model)}@{segment.resolution}", step.key()
    steps = known.get(name, {}).get("steps", {})
    if key in steps:
        return Footprint(**steps[key])
    found = _count(step)
    about = {"gmacs": found.gmacs, "params": found.params}
    write_json(file, known | {name: {**about, "steps": {**steps, key: asdict(found)}}})
    return found


def largest_micro_batch(
    recipe: Recipe,
    segment: Segment,
    gpu_memory_gib: float,
    *,
    num_classes: int = 1000,
    ranks: int = 1,
) -> int | None:
    """Returns the images of the largest micro-batch that fits into the memory of each GPU.

    Batches that do not fit are cut in half until they do, as `train` does.

    Returns:
        None where not even single images fit.
    """
    share, parts = -(-segment.batch_size // ranks), segment.phase.grad_accum_steps
    while True:
        phase = segment.phase.model_copy(update={"grad_accum_steps": parts})
        taken = footprint(
            recipe, replace(segment, phase=phase), num_classes=num_classes, ranks=ranks
        )
        if taken.bytes <= USABLE * gpu_memory_gib * 2**30:
            return -(-share // parts)
        if parts == share:
            return None
        parts = min(2 * parts, share)


def _read(file: Path) -> dict[str, Any]:
    """Returns what was counted before; a damaged file is counted again."""
    try:
        return read_json(file)
    except (FileNotFoundError, InputError):
        return {}


@dataclass(frozen=True)
class _Step:
    """A step of one rank: `share` images in `parts` micro-batches."""

    recipe: Recipe
    segment: Segment
    share: int
    parts: int
    num_classes: int

    @property
    def counted_parts(self) -> int:
        return min(self.parts, COUNTED_PARTS)

    @property
    def images(self) -> int:
        """Those of the micro-batches that are counted."""
        return self.counted_parts * -(-self.share // self.parts)

    def key(self) -> str:
        """Returns all that decides what it takes, besides the resolution."""
        recipe, phase = self.recipe, self.segment.phase
        kept = {"model", "optimizer", "ema", "loss", "clip_grad_norm", "agc", "precision"}
        stated = recipe.model_dump(mode="json", include=kept)
        stated |= phase.model_dump(mode="json", include={"mix", "freeze", "frozen_batch_norm"})
        stated |= {"images": self.share, "parts": self.parts, "classes": self.num_classes}
        stated |= {"torch": torch.__version__, "pitstop": __version__}
        return json.dumps(stated, sort_keys=True)

    def timeline(self) -> Timeline:
        """Returns a plan of nothing but this step."""
        plain = {
            "duration": Length(1.0, "ep"),
            "resolution": self.segment.resolution,
            "batch_size": self.images,
            "grad_accum_steps": self.counted_parts,
            "data_fraction": 1.0,
            "lr": 0.1,
            "lr_per": None,
            "lr_schedule": Constant(),
            "optimizer_state": "keep",
            "translate": 0,
            "color_jitter": None,
            "augment": None,
            "random_erasing": None,
        }
        phase = self.segment.phase.model_copy(update=plain)
        recipe = self.recipe.model_copy(update={"epochs": 1.0, "phases": (phase,), "lr": 0.1})
        return Timeline(recipe, num_samples=self.images)


class _Peak(MemTracker):
    """MemTracker without its figures by module, which frozen layers and micro-batches break."""

    def _nothing(self, *_: Any, **__: Any) -> None: ...

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _nothing

    def bytes(self, device: torch.device) -> int:
        """Returns the most that was held at a time."""
        return self.get_tracker_snapshot("peak")[device]["Total"]


def _flop_counter() -> FlopCounterMode:
    """Returns torch's, which also knows attention as it is computed on a CPU."""
    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=attention)


def _count(step: _Step) -> Footprint:
    """Runs the step on fake tensors of the CPU: those of CUDA get through a forward pass only."""
    recipe, side = step.recipe, step.segment.resolution
    half = torch.bfloat16 if recipe.precision != "fp32" else None  # fp16 is of the same size
    device = Device(torch.device("cpu"), half, compile=False)
    timeline = step.timeline()
    real = TrainState.initial(recipe, step.num_classes, device)
    params = sum(parameter.numel() for parameter in real.model.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        with FakeCopyMode(fake):
            model, average = copy.deepcopy((real.model, real.ema))
        peak = _Peak()
        peak.track_external(*(each for each in (model, average) if each is not None))
        with peak, _flop_counter() as flops:
            optimizer = optimizers.build(recipe.optimizer, model)
            state = replace(real, model=model, ema=average, optimizer=optimizer)
            stage = Stage(timeline.segments[0], state, device, Ranks(), step.num_classes)
            _begin(stage, optimizer)
            train_step(stage, state, _batch(step.images, side), timeline.settings_at(0))
        with torch.no_grad(), _flop_counter() as forward:
            model.eval()(torch.empty(1, 3, side, side))
    return Footprint(
        bytes=peak.bytes(device.torch_device) + _waiting(step),
        flops_per_image=flops.get_total_flops() / step.images,
        gmacs=forward.get_total_flops() / 2e9,
        params=params,
    )


def _begin(stage: Stage, optimizer: torch.optim.Optimizer) -> None:
    """Has the optimizer make what it keeps, which is there in all steps but the first."""
    for parameter in stage.trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _batch(images: int, side: int) -> Batch:
    pixels = torch.empty(images, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    labels = torch.zeros(images, dtype=torch.int64)
    return Batch(0, slice(0, images), np.arange(images), pixels, labels)


def _waiting(step: _Step) -> int:
    """Returns the bytes of images that are on the GPU and not counted.

    Those of the other micro-batches, as bytes and as float32, and the next batch, which is copied
    ahead.
    """
    numbers = 3 * step.segment.resolution**2
    return numbers * ((step.share - step.images) * (1 + 4) + step.share)
