"""A recipe with every augmentation trains, and goes on as if nothing had happened."""

import hashlib
from pathlib import Path

import pytest
import torch

from pitstop.core.timeline import Timeline
from pitstop.data.load import Loader
from pitstop.engine.outcome import FINISHED, INTERRUPTED
from pitstop.engine.state import TrainState
from pitstop.engine.step import Stage, prepare, train_step
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

RISING = {"keypoints": [[0, 2.0], ["100%", 9.0]]}
AUGMENTED = {
    "epochs": 1,
    "batch_size": 15,
    "grad_accum_steps": 1,
    "color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "augment": {"name": "rand_augment", "magnitude": RISING, "magnitude_std": 0.5},
    "random_erasing": {"prob": {"keypoints": [[0, 0.5], ["100%", 1.0]]}, "mode": "pixel"},
    "phases": [
        {"duration": "50%", "resolution": 16, "mix": {"mixup_alpha": 0.4}},
        {"duration": "rest", "resolution": 24, "augment": "trivial_augment_wide"},
    ],
}
CPU = Device.choose("fp32", compile=False, threads=1)


def fingerprint(out: Path) -> str:
    return hashlib.sha256((out / "last.safetensors").read_bytes()).hexdigest()


def test_a_run_with_every_augmentation_resumes_exactly(trainer, tiny, tmp_path):
    recipe, whole, parts = tiny(**AUGMENTED), tmp_path / "whole", tmp_path / "parts"
    assert trainer(whole, recipe=recipe) == FINISHED
    assert trainer.steps == 4
    while trainer(parts, recipe=recipe, steps=1) == INTERRUPTED:
        pass
    assert fingerprint(parts) == fingerprint(whole)


@pytest.mark.parametrize("without", ["color_jitter", "augment", "random_erasing"])
def test_each_of_them_changes_the_images(digits, tiny, without):
    phase = [{"resolution": 16}]
    spec = tiny(**{**AUGMENTED, "phases": phase})
    less = tiny(**{**AUGMENTED, "phases": phase, without: None})
    images = [prepared(recipe, digits, rank=0, world=1) for recipe in (spec, spec, less)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_train_on_the_images_of_one(digits, tiny, world):
    recipe = tiny(**{**AUGMENTED, "phases": [{"resolution": 16}]})
    shares = [prepared(recipe, digits, rank=rank, world=world) for rank in range(world)]
    assert torch.equal(torch.cat(shares), prepared(recipe, digits, rank=0, world=1))


def prepared(recipe, data, *, rank: int, world: int) -> torch.Tensor:
    """The images that a rank's model gets in the first step."""
    timeline = Timeline(recipe, num_samples=len(data.train))
    state = TrainState.initial(recipe, 10, CPU)
    stage = Stage(timeline.segments[0], state, CPU, Ranks(), 10)
    with Loader(data.train, timeline, range(1), rank=rank, world=world, workers=1) as batches:
        batch = next(batches)
        images, _ = prepare(stage, batch, timeline.settings_at(0))
    assert images.is_contiguous(memory_format=torch.channels_last)
    return images


def test_a_step_with_every_augmentation_leaves_finite_weights(digits, tiny):
    recipe = tiny(**AUGMENTED)
    timeline = Timeline(recipe, num_samples=len(digits.train))
    state = TrainState.initial(recipe, 10, CPU)
    stage = Stage(timeline.segments[0], state, CPU, Ranks(), 10)
    with Loader(digits.train, timeline, range(2), workers=1) as batches:
        for step, batch in enumerate(batches):
            train_step(stage, state, batch, timeline.settings_at(step))
    assert state.step == 2
    assert all(torch.isfinite(p).all() for p in state.model.parameters())
