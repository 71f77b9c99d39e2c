"""The cifar recipe's steps are those of airbench94, of which benchmarks/airbench.py is a copy."""

import importlib.util
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pitstop.core.recipe import load_recipe
from pitstop.core.timeline import Timeline
from pitstop.data.load import Batch
from pitstop.engine.state import TrainState
from pitstop.engine.step import Normalizer, Stage, train_step
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

PLACE = Path(__file__).parents[2] / "benchmarks" / "airbench.py"
BATCH, STEPS, EPOCHS = 32, 200, 2
WIDTHS = (8, 16, 16)


def airbench() -> Any:
    spec = importlib.util.spec_from_file_location("airbench", PLACE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """As many as an epoch has, uint8, in 10 classes that can be told apart; and their labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, STEPS // EPOCHS * BATCH)
    patterns = rng.integers(40, 216, (10, 8, 8, 3)).repeat(4, 1).repeat(4, 2)
    pixels = (patterns[labels] + rng.normal(0, 60, (len(labels), 32, 32, 3))).clip(0, 255)
    return torch.from_numpy(pixels.astype(np.uint8)).permute(0, 3, 1, 2), torch.from_numpy(labels)


class InOrder:
    """The loader of airbench, without its augmentation and its shuffling."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self.batches)


def test_losses_and_weights_are_those_of_airbench(monkeypatch):
    bare = airbench()
    images, labels = pictures()
    stated = {
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "lr": 1.5 * BATCH / 1024,
        "flip": "none",
        "translate": 0,
        "model.kwargs.widths": WIDTHS,
        "phases": [  # whole images; the whitening's bias is trained for the first epoch
            {"duration": "50%"},
            {"duration": "rest", "freeze": ["whiten"]},
        ],
    }
    device, ranks = Device.choose("fp32", compile=False), Ranks()
    recipe = load_recipe("cifar", overrides=stated)
    timeline = Timeline(recipe, num_samples=len(images))
    assert timeline.last == STEPS
    state = TrainState.initial(recipe, 10, device)
    normalised = Normalizer(recipe, device.torch_device)(images)

    monkeypatch.setattr(bare, "BATCH_SIZE", BATCH)
    monkeypatch.setattr(bare, "WIDTHS", WIDTHS)
    monkeypatch.setattr(bare, "WHITEN_BIAS_EPOCHS", 1)
    net = bare.make_net()
    for theirs, own in zip(
        net.state_dict().values(), state.model.state_dict().values(), strict=True
    ):
        theirs.copy_(own)
    monkeypatch.setattr(bare, "make_net", lambda: net)
    monkeypatch.setattr(bare, "CifarLoader", InOrder)
    monkeypatch.setattr(bare, "evaluate", lambda *_: 0.0)
    monkeypatch.setattr(torch, "autocast", lambda *_: nullcontext())
    expected = bare.train((normalised, labels), None, seed=0, epochs=EPOCHS)["losses"]

    state.model.initialize(normalised)  # pyright: ignore[reportCallIssue]
    assert state.ema is not None
    state.ema.load_state_dict(state.model.state_dict())
    losses = []
    for segment in timeline.segments:
        stage = Stage(segment, state, device, ranks, 10)
        for step in segment.steps_from(0):
            rows = np.arange(step * BATCH, (step + 1) * BATCH) % len(images)
            batch = Batch(step, slice(0, BATCH), rows, images[rows], labels[rows])
            losses.append(train_step(stage, state, batch, timeline.settings_at(step))[0])

    losses = (torch.stack(losses) / BATCH).tolist()
    assert losses == pytest.approx(expected, rel=5e-3)  # both schedules are placed a bit otherwise
    pairs = zip(state.ema.parameters(), net.parameters(), strict=True)
    apart = [(own - theirs).norm() / theirs.norm() for own, theirs in pairs]
    assert max(apart) < 0.05
