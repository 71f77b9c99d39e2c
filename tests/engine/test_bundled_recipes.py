"""Each recipe that comes with pitstop trains, in all of its phases, and resumes exactly.

Only what makes it large is made small: the model, the images, the batches, the epochs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pitstop.core.length import Length
from pitstop.core.recipe import Model, Recipe, bundled_recipes, load_recipe, parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.engine.outcome import FINISHED, INTERRUPTED
from pitstop.nn import models

SIDE, BATCH, STEPS, IMAGES = 24, 15, 4, 60
"""The largest resolution and batch, the steps of a phase, and the training images."""

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 16]}
SMALL_CIFARNET = {"widths": [8, 16, 16]}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights of the small model, for recipes that start from some."""
    path = tmp_path / "weights.safetensors"
    model = models.build(Model(name="resnet18", kwargs=SMALL), 5, seed=1)
    save_file(model.state_dict(), path)
    return path


def made_small(name: str, weights: Path) -> Recipe:
    raw = load_recipe(name).model_dump(mode="json")
    phases = raw["phases"]
    smaller = SIDE / max(side for phase in phases for side in _sides(phase))
    fewer = BATCH / max(phase["batch_size"] for phase in phases)
    for phase in phases:
        sides = [max(12, round(side * smaller)) for side in _sides(phase)]
        phase["resolution"] = sides if len(sides) == 2 else sides[0]
        phase["batch_size"] = max(4, round(phase["batch_size"] * fewer))
        _in_percent(phase, raw["epochs"])
        steps = STEPS * len(sides) ** 2  # a ramp has up to four sizes
        images = int(phase["data_fraction"] * IMAGES)
        phase["duration"] = f"{steps * phase['batch_size'] / images:.6f}ep"
    del raw["epochs"]
    _make_model_small(raw["model"], weights)
    for protocol in (raw["eval"], *raw["eval"]["also"]):
        if protocol["resolution"] is not None:
            protocol["resolution"] = round(protocol["resolution"] * smaller)
    if raw["lr_finder"] is not None:
        raw["lr_finder"]["iterations"] = 10
    raw |= {"precision": "fp32", "compile": False, "target_accuracy": None}
    return parse_recipe(raw, name)


def _sides(phase: dict[str, Any]) -> list[int]:
    side = phase["resolution"]
    return side if isinstance(side, list) else [side]


def _in_percent(phase: dict[str, Any], epochs: float) -> None:
    """Makes lengths in epochs relative: they are to fit the few that are left."""
    schedule = phase["lr_schedule"]
    if "warmup" in schedule:
        of = epochs if schedule["over"] == "run" else Length.parse(phase["duration"]).amount
        schedule["warmup"] = f"{100 * Length.parse(schedule['warmup']).epochs(of) / of:.4f}%"


def _make_model_small(model: dict[str, Any], weights: Path) -> None:
    if model["name"] == "cifarnet":
        model["kwargs"] = SMALL_CIFARNET
        return
    model["name"] = "resnet18"
    model["kwargs"] = {**model["kwargs"], **SMALL}
    if model["weights"] is not None:
        model["weights"] = str(weights)


def stops_around_phases(recipe: Recipe) -> Iterator[int]:
    """The steps before, at and after which each change of shapes or phase; else the middle."""
    timeline = Timeline.planned(recipe, IMAGES)
    changes = [segment.first for segment in timeline.segments[1:]] or [timeline.last // 2]
    yield from sorted({step for change in changes for step in (change - 1, change, change + 1)})


@pytest.mark.parametrize("name", bundled_recipes())
def test_it_trains_in_every_phase_and_resumes_around_each_change(name, trainer, weights, tmp_path):
    recipe = made_small(name, weights)
    assert trainer(tmp_path / "uninterrupted", recipe=recipe) == FINISHED
    out, done = tmp_path / "interrupted", 0
    for step in stops_around_phases(recipe):
        assert trainer(out, recipe=recipe, steps=step - done) == INTERRUPTED
        done = step
    assert trainer(out, recipe=recipe) == FINISHED
    files = sorted((tmp_path / "uninterrupted").glob("*.safetensors"))
    assert files
    for expected in files:
        assert (out / expected.name).read_bytes() == expected.read_bytes(), expected.name
        assert all(tensor.isfinite().all() for tensor in load_file(expected).values())
