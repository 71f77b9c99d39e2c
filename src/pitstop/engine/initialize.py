"""Weights that follow from the data: a new run may set them from training images.

A model that has a method `initialize(images)` gets it called once, before the first step, with
normalised images float32 [N, 3, R, R].
"""

import io
from typing import Any

import torch

from pitstop.core.timeline import Timeline
from pitstop.data.load import EvalLoader
from pitstop.data.packed import PackedSplit
from pitstop.engine.state import TrainState
from pitstop.engine.step import Normalizer
from pitstop.runtime.checkpoint import parse
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

IMAGES = 5000
"""As many as airbench takes; with fewer in the dataset, all of them."""


def initialize(
    state: TrainState,
    split: PackedSplit,
    timeline: Timeline,
    device: Device,
    ranks: Ranks,
    *,
    workers: int,
) -> None:
    """Has a new run's model initialise itself, if it does such a thing; the average is its copy.

    Its images are the first of the training split, as evaluation would show them at the resolution
    of the run's first step. Rank 0 does it and sends its weights, so that all ranks have the same.
    A model that begins with given weights is left as it is.
    """
    method: Any = getattr(state.model, "initialize", None)
    if method is None or timeline.recipe.model.weights is not None:
        return
    ranks.begin("initialising the model from training images")
    sent = None
    if ranks.main:
        method(_images(split, timeline, device, workers))
        saved = io.BytesIO()
        torch.save(state.model.state_dict(), saved)
        sent = saved.getvalue()
    weights = parse(ranks.from_main(sent))
    for model in (state.model, state.ema):
        if model is not None:
            model.load_state_dict(weights)


def _images(split: PackedSplit, timeline: Timeline, device: Device, workers: int) -> torch.Tensor:
    first = timeline.segments[0]
    normalize = Normalizer(first.recipe, device.torch_device)
    with EvalLoader(
        split.at(first.resolution),
        first.recipe.eval,
        first.resolution,
        rows=range(min(IMAGES, len(split))),
        workers=workers,
    ) as batches:
        return torch.cat([normalize(batch.images) for batch in device.prefetch(batches)])
