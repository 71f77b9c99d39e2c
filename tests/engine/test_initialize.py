"""A model that initialises itself from images does so once, before a run's first step."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models import register_model
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.timeline import Timeline
from pitstop.engine.initialize import initialize
from pitstop.engine.outcome import FINISHED, INTERRUPTED, TARGET_MET
from pitstop.engine.state import TrainState
from pitstop.io.records import Event, read_events
from pitstop.io.run_directory import RunDirectory
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

CPU = Device.choose("fp32", compile=False)
MODEL = {"name": "cifarnet", "kwargs": {"widths": [4, 6, 6]}}


@pytest.fixture
def recipe(tiny):
    """Without clipping, dropout and the like; the cifar recipe's network."""
    return tiny(model=MODEL, phases=[{"resolution": 24}])


def initialised(recipe, digits) -> TrainState:
    state = TrainState.initial(recipe, 10, CPU)
    timeline = Timeline(recipe, num_samples=len(digits.train))
    initialize(state, digits.train, timeline, CPU, Ranks(), workers=2)
    return state


def test_model_and_average_are_what_the_training_images_make_of_them(recipe, digits):
    state = initialised(recipe, digits)
    given: list[torch.Tensor] = []
    other = TrainState.initial(recipe, 10, CPU)
    before = other.model.get_parameter("whiten.weight").clone()
    other.model.initialize = given.append  # pyright: ignore[reportAttributeAccessIssue]
    timeline = Timeline(recipe, num_samples=len(digits.train))
    initialize(other, digits.train, timeline, CPU, Ranks(), workers=1)
    (images,) = given
    assert (images.shape, images.dtype) == ((len(digits.train), 3, 24, 24), torch.float32)
    assert torch.equal(other.model.get_parameter("whiten.weight"), before)
    del other.model.initialize
    other.model.initialize(images)  # pyright: ignore[reportCallIssue]
    assert not torch.equal(other.model.get_parameter("whiten.weight"), before)
    assert state.ema is not None
    for model in (state.model, state.ema):
        for key, value in other.model.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key


def test_a_model_without_such_a_method_stays_as_it_is(tiny, digits):
    before = TrainState.initial(tiny(), 10, CPU).model.state_dict()
    after = initialised(tiny(), digits).model.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_given_weights_are_not_written_over(recipe, digits):
    named = recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": "run"})})
    before = TrainState.initial(named, 10, CPU).model.state_dict()
    after = initialised(named, digits).model.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


@register_model
def counts_initializations(pretrained: bool = False, num_classes: int = 10, **_: object):
    return Counts(num_classes)


class Counts(nn.Sequential):
    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, num_classes))
        self.register_buffer("count", torch.zeros(1))

    def initialize(self, images: torch.Tensor) -> None:
        self.get_buffer("count").add_(1)


def test_a_run_does_it_once_however_often_it_starts(trainer, tiny, tmp_path: Path):
    recipe = tiny(model={"name": "counts_initializations"})
    out = tmp_path / "run"
    starts = 1
    while trainer(out, recipe=recipe, steps=4) == INTERRUPTED:
        starts += 1
    assert starts > 2
    for name in ("last", "last-raw"):
        assert load_file(out / f"{name}.safetensors")["count"] == 1


# The end is evaluated by more protocols


VIEWS = {"flip_average": True, "translate_average": 1, "crop_ratio": 1.0}


def evaluations(out: Path) -> list[Event]:
    return [e for e in read_events(RunDirectory(out).events) if e["kind"] == "val"]


def test_only_the_end_is_evaluated_by_more_protocols(trainer, tiny, tmp_path):
    recipe = tiny(eval={"crop_ratio": 1.0, "batch_size": 8, "also": [VIEWS]})
    out = tmp_path / "run"
    while trainer(out, recipe=recipe, steps=5) == INTERRUPTED:
        pass
    *others, last = evaluations(out)
    assert others
    assert not any("also" in each for each in others)
    (also,) = last["also"]
    assert also["protocol"] == last["protocol"] | VIEWS
    stated = json.loads((out / "run.json").read_text())
    assert stated["metrics"]["also"] == [also]
    line = f"also top1 {also['top1']:.2f} by resolution 24"
    assert line in trainer.said
    assert line in RunDirectory(out).text.read_text()


def test_an_end_by_the_target_is_evaluated_by_more_protocols(trainer, tiny, tmp_path):
    recipe = tiny(eval={"crop_ratio": 1.0, "also": [VIEWS]}, target_accuracy=1)
    assert trainer(tmp_path / "run", recipe=recipe) == TARGET_MET
    *others, last = evaluations(tmp_path / "run")
    assert last["step"] < 16
    assert "also" in last
    assert not any("also" in each for each in others)


def test_an_evaluation_by_more_protocols_can_be_interrupted(trainer, tiny, tmp_path):
    recipe = tiny(eval={"crop_ratio": 1.0, "batch_size": 8, "also": [VIEWS]})
    assert trainer(tmp_path / "whole", recipe=recipe) == FINISHED
    out = tmp_path / "run"
    assert trainer(out, recipe=recipe, stop_at=trainer.polls - 1) == INTERRUPTED
    assert trainer(out, recipe=recipe) == FINISHED
    timed = {"time", "wall_seconds", "seconds", "memory_mb"}
    for one, other in zip(evaluations(out), evaluations(tmp_path / "whole"), strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }


def test_resolutions_of_more_protocols_are_checked_before_the_run(trainer, tiny, tmp_path):
    recipe = tiny(model=MODEL, eval={"also": [{"resolution": 8}]})
    with pytest.raises(InputError, match="cifarnet does not take 8 px"):
        trainer(tmp_path / "run", recipe=recipe)
