"""Batches that do not fit the memory are cut; all else stays as it was."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.order import Order
from pitstop.core.recipe import Recipe
from pitstop.core.timeline import MicroBatch, Timeline, parse_amendments
from pitstop.engine.micro_batch import fitting_parts
from pitstop.engine.outcome import FINISHED, INTERRUPTED
from pitstop.engine.state import TrainState
from pitstop.nn import models
from pitstop.runtime.checkpoint import parse
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

from .as_rank import state_fingerprint, with_room_for

Room = Callable[[int], None]


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    """Has models run out of memory when they train on more images at once."""
    build = models.build

    def room(images: int) -> None:
        monkeypatch.setattr(models, "build", lambda *a, **k: with_room_for(images, build(*a, **k)))

    return room


def weights(out: Path) -> bytes:
    return (out / "last.safetensors").read_bytes()


def halved(recipe: Recipe, parts: int) -> Recipe:
    """The recipe with so many micro-batches in each phase."""
    phases = [phase.model_copy(update={"grad_accum_steps": parts}) for phase in recipe.phases]
    return recipe.model_copy(update={"phases": tuple(phases)})


def test_the_run_is_that_of_a_recipe_with_smaller_micro_batches(trainer, room, tmp_path):
    trainer(tmp_path / "stated", recipe=halved(trainer.recipe, 4))
    room(4)
    assert trainer(tmp_path / "cut", fit_memory=True) == FINISHED
    said = "does not fit the memory: grad_accum_steps 2 -> 4; batch_size stays"
    assert trainer.said.count(said) == 2  # each segment is tried
    assert weights(tmp_path / "cut") == weights(tmp_path / "stated")
    identity = json.loads((tmp_path / "cut/run.json").read_text())["identity"]
    assert identity["phases.0.grad_accum_steps"] == 2


def test_a_resume_after_the_cut_is_exact(trainer, room, tmp_path):
    room(4)
    trainer(tmp_path / "whole", fit_memory=True)
    out, starts = tmp_path / "run", 0
    while trainer(out, fit_memory=True, steps=3) == INTERRUPTED:
        starts += 1
    assert starts > 3
    assert weights(out) == weights(tmp_path / "whole")
    assert "does not fit" not in trainer.said  # it was known
    for run in (out, tmp_path / "whole"):
        newest = max((run / "checkpoints").glob("*.pt"))
        amendments = parse_amendments(parse(newest.read_bytes())["amendments"])
        assert [(a.step, a.change) for a in amendments] == [
            (0, MicroBatch(grad_accum_steps=4)),
            (8, MicroBatch(grad_accum_steps=4)),
        ]


def test_ids_and_schedule_are_those_of_the_run_without_it(trainer, room, digits, tmp_path):
    room(3)
    trainer(tmp_path / "run", fit_memory=True)
    newest = max((tmp_path / "run/checkpoints").glob("*.pt"))
    amendments = parse_amendments(parse(newest.read_bytes())["amendments"])
    assert len(amendments) == 2
    plain = Timeline(trainer.recipe, num_samples=len(digits.train))
    cut = Timeline(trainer.recipe, amendments, num_samples=len(digits.train))
    assert (cut.last, cut.evaluations) == (plain.last, plain.evaluations)
    for step in range(plain.last):
        assert np.array_equal(Order(cut).ids(step), Order(plain).ids(step))
        before, after = plain.settings_at(step), cut.settings_at(step)
        assert vars(after) | {"segment": None} == vars(before) | {"segment": None}


def test_memory_that_suffices_changes_nothing(trainer, room, tmp_path):
    trainer(tmp_path / "plain")
    room(8)
    trainer(tmp_path / "tried", fit_memory=True)
    assert "does not fit" not in trainer.said
    assert weights(tmp_path / "tried") == weights(tmp_path / "plain")


def test_a_machine_with_less_memory_cuts_from_where_it_goes_on(trainer, room, tmp_path):
    out = tmp_path / "run"
    assert trainer(out, steps=3) == INTERRUPTED
    room(2)
    assert trainer(out, fit_memory=True) == FINISHED
    assert "grad_accum_steps 2 -> 8; batch_size stays 15" in trainer.said
    newest = parse(max((out / "checkpoints").glob("*.pt")).read_bytes())
    assert [a.step for a in parse_amendments(newest["amendments"])] == [3, 8]
    lines = (out / "training_log.csv").read_text().splitlines()
    assert len(lines) == 1 + 4


def test_images_that_do_not_fit_one_by_one_are_refused(trainer, room, tmp_path):
    room(0)
    with pytest.raises(InputError, match="not even a batch of 15 in 15 micro-batches fits"):
        trainer(tmp_path / "run", fit_memory=True)


def test_an_extension_that_is_asked_for_again_is_the_one_being_trained(trainer, room, tmp_path):
    out = tmp_path / "run"
    assert trainer(out) == FINISHED
    room(4)
    wish = {"fit_memory": True, "extend_epochs": 2.0}
    assert trainer(out, steps=2, **wish) == INTERRUPTED
    assert "does not fit" in trainer.said
    end = json.loads((out / "run.json").read_text())["steps"]
    assert trainer(out, **wish) == FINISHED
    assert json.loads((out / "run.json").read_text())["steps"] == end


def test_a_search_for_the_lr_has_micro_batches_that_fit(trainer, tiny, room, tmp_path):
    room(4)
    recipe = tiny(lr="auto", lr_finder={"fallback": 0.05, "iterations": 10})
    assert trainer(tmp_path / "run", recipe=recipe, fit_memory=True, steps=2) == INTERRUPTED
    assert trainer.said.index("does not fit") < trainer.said.index("peak lr")
    assert trainer(tmp_path / "run", recipe=recipe, fit_memory=True) == FINISHED


def started(recipe: Recipe, digits) -> tuple[Timeline, TrainState, Device]:
    device = Device.choose("fp32", compile=False)
    timeline = Timeline(recipe, num_samples=len(digits.train))
    return timeline, TrainState.initial(recipe, 10, device), device


def test_what_is_tried_leaves_no_trace(tiny, room, digits):
    room(3)
    timeline, state, device = started(tiny(), digits)
    before = state_fingerprint(state)
    assert fitting_parts(timeline.segments[0], state, device, Ranks(), 10) == 8
    assert state_fingerprint(state) == before


@pytest.mark.parametrize(
    "message",
    ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory: you tried", "not enough"],
)
def test_only_errors_of_memory_are_taken_for_such(tiny, digits, message):
    timeline, state, device = started(tiny(), digits)

    def fails(module: nn.Module, images: tuple[torch.Tensor]) -> None:
        if len(images[0]) > 4:
            raise RuntimeError(message)

    state.model.register_forward_pre_hook(fails)
    if message == "not enough":
        with pytest.raises(RuntimeError, match="not enough"):
            fitting_parts(timeline.segments[0], state, device, Ranks(), 10)
    else:
        assert fitting_parts(timeline.segments[0], state, device, Ranks(), 10) == 4
