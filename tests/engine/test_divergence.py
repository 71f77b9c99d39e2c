"""Numbers that are not finite: the run goes back, tries otherwise, gives up with a diagnosis."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pitstop.core.order import Order
from pitstop.core.recipe import Checkpoint
from pitstop.core.timeline import Timeline, parse_amendments
from pitstop.engine import step as steps
from pitstop.engine import train as engine
from pitstop.engine.meter import fingerprint
from pitstop.engine.outcome import DIVERGED, FINISHED, INTERRUPTED
from pitstop.engine.verify import unequal
from pitstop.io.records import read_events
from pitstop.io.run_directory import RunDirectory
from pitstop.runtime.checkpoint import Checkpointer, parse

POISONED_STEP = 6
"""Of the first phase, which has steps 0 to 7; saved are 2, 4, 6, ..."""


@pytest.fixture
def recipe(tiny):
    """Returns the tiny recipe that saves every two steps, with a policy."""

    def make(**policy):
        return tiny(checkpoint={"every": "2 steps", "keep_last": 9}, divergence=policy)

    return make


@pytest.fixture
def poison(monkeypatch, trainer):
    """Has the batch that is planned for POISONED_STEP give a loss that is not finite."""
    order = Order(Timeline(trainer.recipe, num_samples=len(trainer.data.train)))
    poison = order.ids(POISONED_STEP)
    order.close()
    train_step = steps.train_step

    def poisoned(stage, state, batch, settings):
        if np.array_equal(poison, batch.ids):
            with torch.no_grad():
                next(state.model.parameters()).fill_(torch.inf)
        return train_step(stage, state, batch, settings)

    monkeypatch.setattr(engine, "train_step", poisoned)
    monkeypatch.setattr("pitstop.engine.meter.FLUSH_SECONDS", 0.0)  # found at once


def newest(out: Path) -> dict:
    checkpointer = Checkpointer(RunDirectory(out), Checkpoint())
    return parse(checkpointer.read(checkpointer.manifests()[-1]))


def trained(out: Path) -> list[dict]:
    return [event for event in read_events(out / "events.jsonl") if event["kind"] == "train"]


def test_the_data_in_which_it_diverged_is_skipped(trainer, recipe, poison, tmp_path):
    skipping = recipe(policy="skip")
    assert trainer(tmp_path, recipe=skipping) == FINISHED
    (amendment,) = parse_amendments(newest(tmp_path)["amendments"])
    assert (amendment.step, amendment.change.kind) == (6, "skip_data")
    assert "back to step 6: the next 1 batches are skipped (retry 1 of 2)" in trainer.said
    seen = {event["first"]: event["ids"] for event in trained(tmp_path)}
    timeline = Timeline(skipping, num_samples=len(trainer.data.train))
    planned = Order(timeline)
    amended = Order(Timeline(skipping, [amendment], num_samples=len(trainer.data.train)))
    for step in range(timeline.last):
        ids = (planned if step < 6 else amended).ids(step)
        assert seen[step] == fingerprint(step, slice(0, len(ids)), ids)
    assert np.array_equal(amended.ids(6), planned.ids(7))
    planned.close()
    amended.close()


def test_the_lr_is_lowered_and_after_the_last_retry_it_ends_with_a_diagnosis(
    trainer, recipe, poison, tmp_path
):
    assert trainer(tmp_path, recipe=recipe(policy="lower_lr", factor=0.5, retries=2)) == DIVERGED
    amendments = parse_amendments(newest(tmp_path)["amendments"])
    assert [(a.step, a.change.kind) for a in amendments] == [(6, "lower_lr")] * 2
    stated = json.loads((tmp_path / "run.json").read_text())
    assert (stated["status"], stated["exit_code"]) == ("diverged", 76)
    text = (tmp_path / "training_log.txt").read_text()
    lr = Timeline(trainer.recipe, num_samples=len(trainer.data.train)).settings_at(6).lr / 4
    assert f"not finite at step 6: the loss, at lr {lr:.3g}" in text
    assert "norm of the gradient before: " in text
    assert "the checkpoints before it stand" in text
    assert trainer(tmp_path, recipe=recipe(policy="lower_lr")) == DIVERGED  # not once more
    assert trainer.steps == 1


def test_no_retries_are_none(trainer, recipe, poison, tmp_path):
    assert trainer(tmp_path, recipe=recipe(retries=0)) == DIVERGED
    assert newest(tmp_path)["amendments"] == []
    assert newest(tmp_path)["step"] == 6


def test_before_any_checkpoint_it_begins_again(trainer, tiny, poison, tmp_path):
    assert trainer(tmp_path, recipe=tiny(checkpoint={"every": "99 ep", "keep_best": 0})) == FINISHED
    (amendment,) = parse_amendments(newest(tmp_path)["amendments"])
    assert (amendment.step, amendment.change.batches) == (0, 7)


def test_a_retry_that_is_interrupted_goes_on_as_if_it_was_not(trainer, recipe, poison, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert trainer(whole, recipe=recipe()) == FINISHED
    assert trainer(parts, recipe=recipe(), steps=8) == INTERRUPTED
    assert trainer(parts, recipe=recipe()) == FINISHED
    assert unequal(newest(whole), newest(parts)) == []
    assert sum(e["ids"] for e in trained(whole)) == sum(e["ids"] for e in trained(parts))


def test_the_layer_at_which_the_gradient_overflows_first_is_named(
    trainer, recipe, monkeypatch, tmp_path
):
    clip = steps._clip

    def overflow(stage, norms):
        if trainer.steps == 3:
            names = dict(zip(stage.layers, range(len(norms)), strict=True))
            norms[names["layer1.0.conv1.weight"]] = torch.inf
            norms[names["conv1.weight"]] = torch.nan
        clip(stage, norms)

    monkeypatch.setattr(steps, "_clip", overflow)
    assert trainer(tmp_path, recipe=recipe(retries=0)) == DIVERGED
    said = "not finite at step 2: the gradient, first of layer1.0.conv1.weight and then of 1 more"
    assert said in (tmp_path / "training_log.txt").read_text()
    (event,) = [e for e in read_events(tmp_path / "events.jsonl") if e["kind"] == "diverged"]
    assert event["layers"] == ["layer1.0.conv1.weight", "conv1.weight"]
    assert len(event["norms"]) == 2
