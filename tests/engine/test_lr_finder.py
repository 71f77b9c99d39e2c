"""The search for the learning rate: what curves suggest, and what a search leaves behind."""

import csv
import json
import math
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.core.errors import InputError
from pitstop.core.recipe import LrFinder, Recipe
from pitstop.core.timeline import Timeline
from pitstop.data.packed import PackedDataset
from pitstop.engine import train as engine
from pitstop.engine.lr_finder import (
    NoSuggestion,
    Suggestion,
    longest_fall,
    search,
    smoothed,
    suggest,
    swept,
)
from pitstop.engine.outcome import FINISHED, INTERRUPTED
from pitstop.engine.state import TrainState
from pitstop.io.records import read_events
from pitstop.io.run_directory import RunDirectory
from pitstop.nn.freezing import freeze
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

from .as_rank import state_fingerprint

SPEC = LrFinder(fallback=0.1, iterations=200, start_lr=1e-5, end_lr=10.0)
FINDER = {"fallback": 0.07, "iterations": 60, "start_lr": 1e-4, "end_lr": 3.0, "policy": "valley"}


# Curves


def valley(spec: LrFinder = SPEC, lowest: float = 0.5, noise: float = 0.01) -> list[float]:
    """A loss of 2.3 that falls to 1.3 at an lr of `lowest` and rises steeply from there on."""
    rng = np.random.default_rng(0)
    decades = np.log10(swept(spec) / lowest)
    loss = np.where(decades < 0, 2.3 - np.exp(decades), 1.3 + 4 * decades**2)
    return (loss + noise * rng.standard_normal(spec.iterations)).tolist()


def suggestion(spec: LrFinder, losses: list[float]) -> Suggestion:
    found = suggest(swept(spec).tolist(), losses, spec)
    assert isinstance(found, Suggestion), found
    return found


def reason(losses: list[float], spec: LrFinder = SPEC) -> str:
    found = suggest(swept(spec).tolist(), losses, spec)
    assert isinstance(found, NoSuggestion), found
    return found.reason


@pytest.mark.parametrize("iterations", [50, 100, 400])
@pytest.mark.parametrize("lowest", [0.01, 0.5])
def test_a_tenth_of_the_lr_of_the_lowest_loss(iterations, lowest):
    spec = SPEC.model_copy(update={"iterations": iterations, "policy": "min0.1"})
    found = suggestion(spec, valley(spec, lowest))
    assert lowest / 10 / 2 < found.lr < lowest / 10 * 4  # smoothing sees the turn late


@pytest.mark.parametrize(("policy", "before"), [("steepest", 50), ("valley", 500)])
def test_the_other_policies_stay_before_the_lowest_loss(policy, before):
    spec = SPEC.model_copy(update={"policy": policy})
    found = suggestion(spec, valley(spec))
    assert 0.5 / before < found.lr < 0.5
    assert found.lr == swept(spec)[found.at]


def test_the_steepest_is_where_a_kink_is():
    spec = SPEC.model_copy(update={"policy": "steepest"})
    decades = np.log10(swept(spec))
    steps = 2.3 - 0.05 * (decades + 5) - 0.8 * np.clip((decades + 2) / 0.2, 0, 1)
    losses = np.where(decades > 0, 9.0, steps)
    assert suggestion(spec, losses.tolist()).lr == pytest.approx(10**-1.9, rel=0.5)


def test_floor_and_cap_bound_what_is_found_and_the_multiplier_comes_after():
    free = suggestion(SPEC, valley())
    high = suggestion(SPEC.model_copy(update={"floor": 2 * free.lr}), valley())
    low = suggestion(SPEC.model_copy(update={"cap": free.lr / 2}), valley())
    assert (high.lr, low.lr) == (2 * free.lr, free.lr / 2)
    assert "floor" in high.why
    assert f"{free.lr:.4g}" in low.why


RISING = [2.3 * 1.02**i for i in range(200)]
MISLEADING: dict[str, tuple[list[float], str]] = {
    "diverges from the start": ([2.3 * 1.7**i for i in range(8)], "diverges within 8"),
    "only rises": (RISING, "only rises"),
    "flat": ([2.3] * 200, "flat"),
    "flat, then fails": ([2.3] * 100 + [math.nan], "only rises"),
    "still falling": (np.linspace(2.3, 1.0, 200).tolist(), "still falling"),
    "noise": ((2.3 + 0.3 * np.random.default_rng(1).standard_normal(200)).tolist(), "noisy"),
    "nan at once": ([math.nan], "not finite"),
    "inf after a few": ([2.3, 2.2, math.inf], "not finite at lr"),
    "only nan": ([math.nan] * 200, "not finite"),
    "few": ([2.3, 2.0, 1.5], "3 iterations are too few"),
    "none": ([], "too few"),
    "a loss of zero": ([0.0] * 200, "flat"),
}


@pytest.mark.parametrize("name", MISLEADING)
def test_a_curve_that_misleads_suggests_nothing_and_says_why(name):
    losses, expected = MISLEADING[name]
    assert expected in reason(losses)


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_suggests_nothing(seed):
    rng = np.random.default_rng(seed)
    losses = 2.3 + 0.2 * rng.standard_normal(SPEC.iterations)
    assert reason(losses.tolist())


def test_a_fall_that_ends_in_nan_counts_as_far_as_it_went():
    whole = valley()
    fails = [loss if lr < 0.4 else math.nan for lr, loss in zip(swept(SPEC), whole, strict=True)]
    assert suggestion(SPEC, fails).lr < 0.4


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9))
def test_the_longest_fall_is_the_longest(values):
    places = longest_fall(np.array(values))
    fall = [values[place] for place in places]
    assert places == sorted(places)
    assert all(a > b for a, b in pairwise(fall))
    longer = combinations(values, len(places) + 1)
    assert not any(all(a > b for a, b in pairwise(s)) for s in longer)


def test_smoothing_is_a_mean_with_weights_that_fade():
    losses = np.random.default_rng(0).random(50)
    beta = 1 - 1 / 10  # a window of a tenth of 100 iterations
    for i, value in enumerate(smoothed(losses.tolist(), iterations=100)):
        weights = beta ** np.arange(i, -1, -1)
        assert value == pytest.approx(np.average(losses[: i + 1], weights=weights))


# Searches


@pytest.fixture
def auto(tiny: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """Returns the tiny recipe with `lr: auto`."""
    return lambda **changes: tiny(**{"lr": "auto", "lr_finder": FINDER, **changes})


@pytest.mark.parametrize(
    ("precision", "changes"),
    [
        ("fp32", {}),
        ("fp16", {}),
        ("bf16", {"optimizer": {"name": "lamb"}}),
        ("fp32", {"optimizer": {"name": "adamw"}, "ema": None}),
        ("fp32", {"optimizer": {"name": "sgd", "decoupled_weight_decay": True, "lr_scales": {}}}),
        ("fp32", {"freeze": ["layer1"], "ema": {"half_life": 5, "lookahead": True}}),
    ],
    ids=["sgd", "fp16", "lamb", "adamw", "sgdw", "frozen"],
)
def test_all_state_is_afterwards_what_it_was(digits: PackedDataset, auto, precision, changes):
    recipe = auto(**changes, lr_finder={**FINDER, "iterations": 12})
    timeline = Timeline.planned(recipe, len(digits.train))
    device = Device.choose(precision, compile=False)
    state = TrainState.initial(timeline.recipe, 10, device)
    state.model.eval()
    freeze(state.model, ["conv1"])  # modes to be found again
    before = state_fingerprint(state)
    found = search(recipe.lr_finder, timeline, digits, state, device, Ranks(), workers=2)
    assert found is not None
    assert len(found.losses) >= 10
    assert state_fingerprint(state) == before


def test_it_is_the_training_step_with_the_rising_lr(digits: PackedDataset, auto, monkeypatch):
    from pitstop.engine import lr_finder

    recipe = auto()
    timeline = Timeline.planned(recipe, len(digits.train))
    device = Device.choose("fp32", compile=False)
    state = TrainState.initial(timeline.recipe, 10, device)
    seen = []
    step = lr_finder.train_step

    def train_step(stage, state, batch, settings):
        seen.append((batch, settings))
        return step(stage, state, batch, settings)

    monkeypatch.setattr(lr_finder, "train_step", train_step)
    found = search(recipe.lr_finder, timeline, digits, state, device, Ranks(), workers=2)
    assert found is not None
    assert tuple(settings.lr for _, settings in seen) == found.lrs
    with engine.Loader(digits.train, timeline, range(8), workers=1) as batches:
        first = list(batches)
    assert timeline.segments[0].last == 8 < len(seen)  # so it begins again
    for i, (batch, settings) in enumerate(seen):
        assert settings.step == i % 8
        assert settings.segment is timeline.segments[0]
        assert np.array_equal(batch.ids, first[i % 8].ids)


def test_it_ends_early_where_the_loss_is_not_finite(digits: PackedDataset, auto):
    recipe = auto(lr_finder={**FINDER, "start_lr": 1e20, "end_lr": 1e30})
    timeline = Timeline.planned(recipe, len(digits.train))
    device = Device.choose("fp32", compile=False)
    state = TrainState.initial(timeline.recipe, 10, device)
    found = search(recipe.lr_finder, timeline, digits, state, device, Ranks(), workers=2)
    assert found is not None
    assert len(found.losses) < 10
    assert isinstance(found.result, NoSuggestion)
    assert found.peak == FINDER["fallback"]
    json.dumps(found.as_record(), allow_nan=False)


# Runs


def weights(out: Path) -> bytes:
    return (out / "last.safetensors").read_bytes()


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(RunDirectory(out).events) if event["kind"] == kind]


@pytest.fixture
def no_search(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Has any further search fail."""

    def fails(*_: object, **__: object) -> None:
        raise AssertionError("it searched again")

    return lambda: monkeypatch.setattr(engine, "search", fails)


@pytest.fixture
def found(trainer, auto, tmp_path) -> Path:
    """A run that has found its lr."""
    assert trainer(tmp_path / "found", recipe=auto()) == FINISHED
    return tmp_path / "found"


def test_the_run_is_that_of_the_lr_that_was_found(trainer, tiny, found, tmp_path):
    (event,) = events(found, "lr_find")
    lr = event["peak"]
    assert event["suggestion"] is not None
    assert f"peak lr {lr:.4g}: found" in trainer.said
    assert trainer(tmp_path / "stated", recipe=tiny(lr=lr)) == FINISHED
    assert weights(found) == weights(tmp_path / "stated")


def test_what_was_found_is_written_down(trainer, found):
    (event,) = events(found, "lr_find")
    stated = json.loads((found / "run.json").read_text())
    assert stated["found_lr"] == event["peak"]
    assert stated["identity"]["phases.0.lr"] == "auto"
    assert stated["recipe"]["lr"] == "auto"
    with (found / "lr_find.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == pytest.approx(event["losses"], rel=1e-5)
    assert [float(row["lr"]) for row in rows] == pytest.approx(event["lrs"], rel=1e-5)
    assert "peak lr" in (found / "training_log.txt").read_text()


def test_a_resume_does_not_search_again(trainer, auto, found, tmp_path, no_search):
    out = tmp_path / "run"
    assert trainer(out, recipe=auto(), stop_at=FINDER["iterations"] + 1) == INTERRUPTED
    assert trainer.steps == 0  # right after the search
    no_search()
    assert trainer(out, recipe=auto(), steps=3) == INTERRUPTED
    assert trainer(out, recipe=auto()) == FINISHED
    assert weights(out) == weights(found)
    assert len(events(out, "lr_find")) == 1
    assert len(events(out, "start")) == 3


def test_an_interrupted_search_loses_nothing(trainer, auto, found, tmp_path):
    out = tmp_path / "run"
    for poll in (1, 7):
        assert trainer(out, recipe=auto(), stop_at=poll) == INTERRUPTED
        assert trainer.steps == 0
        assert not list((out / "checkpoints").glob("*"))
        assert json.loads((out / "run.json").read_text())["exit_code"] == 75
    assert trainer(out, recipe=auto()) == FINISHED
    assert weights(out) == weights(found)


def test_the_fallback_is_taken_and_said(trainer, auto, tiny, tmp_path):
    blind = auto(lr_finder={**FINDER, "start_lr": 1e-9, "end_lr": 1e-8})
    assert trainer(tmp_path / "blind", recipe=blind) == FINISHED
    assert "peak lr 0.07: the declared fallback, as the search has no suggestion: " in trainer.said
    assert trainer(tmp_path / "stated", recipe=tiny(lr=0.07)) == FINISHED
    assert weights(tmp_path / "blind") == weights(tmp_path / "stated")


def test_a_number_for_auto_is_another_recipe(trainer, auto, tiny, found):
    number = auto(lr=0.05)
    with pytest.raises(InputError, match=r"phases\.0\.lr auto -> 0\.05"):
        trainer(found, recipe=number)


def test_a_run_that_found_its_lr_is_extended_and_rebased(trainer, auto, found, tmp_path, no_search):
    no_search()
    peak = events(found, "lr_find")[0]["peak"]
    assert trainer(found, recipe=auto(), extend_epochs=1.0) == FINISHED
    assert f"extended by 1 epochs from lr {0.1 * peak:g}" in trainer.said
    out = tmp_path / "rebased"
    longer = auto(label_smoothing=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "search", search)
        assert trainer(out, recipe=auto(), steps=5) == INTERRUPTED
    assert trainer(out, recipe=longer, rebase=True, steps=3) == INTERRUPTED
    assert "label_smoothing" in trainer.said
    assert trainer(out, recipe=longer) == FINISHED
    assert json.loads((out / "run.json").read_text())["found_lr"] == peak


def test_where_the_weights_came_from_may_change_in_a_rebase_but_not_the_lr_scales(
    trainer, tiny, tmp_path
):
    assert trainer(tmp_path / "run", steps=2) == INTERRUPTED
    other = tiny(optimizer={"name": "sgd", "lr_scales": {"fc.*": 2.0}})
    with pytest.raises(InputError, match=r"cannot change optimizer\.lr_scales"):
        trainer(tmp_path / "run", recipe=other, rebase=True)
    moved = tiny(model={**trainer.recipe.model.model_dump(), "weights": "elsewhere"})
    assert trainer(tmp_path / "run", recipe=moved, rebase=True) == FINISHED


def test_the_target_ends_the_run_at_the_first_evaluation_that_meets_it(trainer, tiny, tmp_path):
    trainer(tmp_path / "whole")
    tops = {event["step"]: event["top1"] for event in events(tmp_path / "whole", "val")}
    target = max(tops.values())
    first = min(step for step, top1 in tops.items() if top1 >= target)
    assert first > min(tops)
    trainer(tmp_path / "run", recipe=tiny(target_accuracy=target))
    stated = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (stated["status"], stated["step"]) == ("target met", first)
