"""`train --minutes`: the epochs that fit are solved for once, and are the run's from then on."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pitstop import cli
from pitstop.core.errors import InputError
from pitstop.core.recipe import Recipe, parse_recipe
from pitstop.core.timeline import Fit, FoundLr, SkipData, Timeline, parse_amendments
from pitstop.engine import calibrate as measuring
from pitstop.engine import minutes as module
from pitstop.engine.calibrate import kind
from pitstop.engine.minutes import Pace, Paces, measured
from pitstop.engine.outcome import DIVERGED, FINISHED, INTERRUPTED
from pitstop.engine.resume import TimeLimit
from pitstop.engine.state import TrainState
from pitstop.io.run_directory import RunDirectory
from pitstop.runtime.checkpoint import parse
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

from .as_rank import state_fingerprint
from .conftest import TINY

IMAGE, EVALUATION = 0.1, 2.0
"""Seconds, as the tests pretend them."""


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Has each image take 0.1 s, and each evaluation 2; the recipes that were measured."""
    asked: list[Recipe] = []

    def pretend(recipe: Recipe, *_: object, **__: object) -> Paces:
        asked.append(recipe)
        timeline = Timeline.planned(recipe, 60)
        steps = {kind(segment): Pace(0.0, IMAGE) for segment in timeline.segments}
        return Paces(steps, EVALUATION, also=0.0, save=0.0)

    monkeypatch.setattr(module, "measured", pretend)
    return asked


def limit(minutes: float, **changes: object) -> TimeLimit:
    return TimeLimit(
        minutes, lambda epochs: parse_recipe({**TINY, **changes, "epochs": epochs}, "tiny.yaml")
    )


def seconds(timeline: Timeline) -> float:
    images = sum(segment.steps * segment.batch_size for segment in timeline.segments)
    return IMAGE * images + EVALUATION * len(timeline.evaluations)


def newest(out: Path) -> dict[str, Any]:
    return parse(max((out / "checkpoints").glob("*.pt")).read_bytes())


def weights(out: Path) -> bytes:
    return (out / "last.safetensors").read_bytes()


def test_the_run_is_that_of_the_epochs_that_fit(trainer, tiny, measurements, tmp_path) -> None:
    assert trainer(tmp_path / "fitted", limit=limit(0.5)) == FINISHED
    amendment, *others = parse_amendments(newest(tmp_path / "fitted")["amendments"])
    assert others == []
    assert isinstance(amendment.change, Fit)
    epochs = amendment.change.recipe.epochs
    assert seconds(Timeline.planned(tiny(epochs=epochs), 60)) <= 30
    assert seconds(Timeline.planned(tiny(epochs=epochs + 0.5), 60)) > 30
    assert f"--minutes 0.5: {epochs:g} epochs instead of 4, as 10 images/s at 16 px" in trainer.said
    trainer(tmp_path / "stated", recipe=tiny(epochs=epochs))
    assert weights(tmp_path / "fitted") == weights(tmp_path / "stated")
    assert json.loads((tmp_path / "fitted/run.json").read_text())["steps"] == trainer.steps


def test_the_same_command_goes_on_and_measures_nothing(trainer, measurements, tmp_path) -> None:
    trainer(tmp_path / "whole", limit=limit(0.5))
    measurements.clear()
    out, starts = tmp_path / "run", 0
    while trainer(out, limit=limit(0.5), steps=6) == INTERRUPTED:
        starts += 1
    assert starts > 1
    assert len(measurements) == 1
    assert weights(out) == weights(tmp_path / "whole")
    ended = trainer(out, limit=limit(0.5))
    assert (ended, trainer.steps) == (FINISHED, 0)


def test_before_the_first_step_it_is_known_already(trainer, measurements, tmp_path) -> None:
    assert trainer(tmp_path / "run", limit=limit(0.5), stop_at=1) == INTERRUPTED
    assert trainer.steps == 0
    assert trainer(tmp_path / "run", limit=limit(0.5)) == FINISHED
    assert len(measurements) == 1


def test_another_limit_is_another_run(trainer, tiny, measurements, tmp_path) -> None:
    out = tmp_path / "run"
    trainer(out, limit=limit(0.5), steps=3)
    with pytest.raises(InputError, match=r"--minutes 0.5 -> 0.6"):
        trainer(out, limit=limit(0.6))
    with pytest.raises(InputError, match=r"--minutes 0.5 -> None"):
        trainer(out)
    trainer(tmp_path / "stated", steps=3)
    with pytest.raises(InputError, match=r"--minutes None -> 0.5"):
        trainer(tmp_path / "stated", limit=limit(0.5))
    assert len(measurements) == 1
    assert trainer(out, recipe=tiny(epochs=3), rebase=True) == FINISHED
    assert trainer(out, recipe=tiny(epochs=3)) == FINISHED


def test_it_can_be_extended(trainer, measurements, tmp_path) -> None:
    out = tmp_path / "run"
    trainer(out, limit=limit(0.5))
    before = newest(out)["step"]
    assert trainer(out, extend_epochs=1.0) == FINISHED
    assert newest(out)["step"] == before + 3  # half of 60 images, in batches of 10


def test_the_lr_is_searched_for_in_the_run_that_fits(trainer, tiny, measurements, tmp_path) -> None:
    auto = {"lr": "auto", "lr_finder": {"fallback": 0.05, "iterations": 10}}
    recipe, out = tiny(**auto), tmp_path / "run"
    assert trainer(out, recipe=recipe, limit=limit(0.5, **auto), steps=3) == INTERRUPTED
    changes = [a.change for a in parse_amendments(newest(out)["amendments"])]
    assert [type(change) for change in changes] == [Fit, FoundLr]
    assert trainer(out, recipe=recipe, limit=limit(0.5, **auto)) == FINISHED


def test_too_short_a_time_is_refused_and_leaves_nothing(trainer, measurements, tmp_path) -> None:
    with pytest.raises(InputError, match=r"--minutes 0.01: too little: the least, 1 epoch"):
        trainer(tmp_path / "run", limit=limit(0.01))
    assert not RunDirectory(tmp_path / "run").run_json.exists()


def test_a_run_that_diverges_tries_again_as_long(trainer, tiny, measurements, tmp_path) -> None:
    out = tmp_path / "run"
    bad = {"lr": 1e30}
    assert trainer(out, recipe=tiny(**bad), limit=limit(0.5, **bad)) == DIVERGED
    assert len(measurements) == 1
    changes = [a.change for a in parse_amendments(newest(out)["amendments"])]
    assert [type(change) for change in changes] == [Fit, SkipData, SkipData]
    epochs = changes[0].recipe.epochs
    assert "retry 2 of 2" in trainer.said
    planned = Timeline.planned(tiny(epochs=epochs), 60)
    assert epochs != 4
    assert json.loads((out / "run.json").read_text())["steps"] == planned.last


# Measuring


@pytest.fixture
def begun(tiny, digits) -> Callable[..., tuple[Recipe, TrainState, Device]]:
    def begun(**changes: object) -> tuple[Recipe, TrainState, Device]:
        device = Device.choose("fp32", compile=False)
        recipe = tiny(**changes)
        return recipe, TrainState.initial(recipe, 10, device), device

    return begun


def test_measuring_leaves_no_trace(begun, digits, monkeypatch) -> None:
    monkeypatch.setattr(measuring, "SECONDS", 0.02)
    recipe, state, device = begun(phases=[{"duration": "rest", "freeze": ["conv1"]}], resolution=16)
    state.model.train()
    before = state_fingerprint(state)
    paces = measured(recipe, state, digits, device, Ranks(), workers=2, fit_memory=True)
    assert state_fingerprint(state) == before
    assert paces.minutes(Timeline.planned(recipe, 60)) > 0


def test_what_is_measured_adds_up_to_the_run(begun, digits, monkeypatch) -> None:
    """By a clock on which a step takes 1 s, an evaluated batch 0.5 s, and nothing else anything."""
    now = [0.0]

    class Clock:
        perf_counter = staticmethod(lambda: now[0])

    def taking(seconds: float, method: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def slowly(*arguments: Any) -> torch.Tensor:
            now[0] += seconds
            return method(*arguments)

        return slowly

    monkeypatch.setattr(measuring, "time", Clock)
    monkeypatch.setattr(measuring, "train_step", taking(1.0, measuring.train_step))
    monkeypatch.setattr(measuring, "predict", taking(0.5, measuring.predict))
    monkeypatch.setattr(module, "save_seconds", lambda state: 0.25)
    recipe, state, device = begun(eval={"batch_size": 8, "crop_ratio": 1.0, "also": [{}]})
    paces = measured(recipe, state, digits, device, Ranks(), workers=2, fit_memory=False)
    timeline = Timeline.planned(recipe, len(digits.train))
    batches = -(-len(digits.val) // 8)
    evaluations = len(timeline.evaluations) * (0.5 * batches + 0.25) + 0.5 * batches
    assert 60 * paces.minutes(timeline) == pytest.approx(timeline.last * 1.0 + evaluations)


# The command line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--epochs", "3"], "--minutes and --epochs exclude each other"),
        (["--set", "epochs=3"], "--minutes and --epochs exclude each other"),
        (["--extend", "3"], "--minutes and --extend exclude each other"),
        (["--rebase"], "--minutes and --rebase exclude each other"),
        (["--minutes", "0"], "--minutes 0: must be more than 0"),
    ],
)
def test_what_would_set_the_epochs_twice_is_refused(options, said, capsys) -> None:
    assert cli.run(["train", "demo", "--minutes", "1", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_take_the_epochs_of_the_first(digits, tmp_path) -> None:
    """Each rank measures otherwise; they train the same steps to the end."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(json.dumps({**TINY, "grad_accum_steps": 1, "threads": 1}))
    command = [sys.executable, "-m", "pitstop", "train", str(recipe), "--minutes", "0.05"]
    command += ["--data", str(digits.path), "--out", str(tmp_path / "run"), "--nproc", "2"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    state = json.loads((tmp_path / "run/run.json").read_text())
    assert state["status"] == "finished"
    assert "epochs instead of 4" in ran.stdout
