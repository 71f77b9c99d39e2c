"""`pitstop devices` says what is there and what would be used."""

import json
from types import SimpleNamespace

import pytest
import torch

from pitstop.core.machine import cores
from pitstop.engine.evaluate import Evaluation
from pitstop.runtime import devices


def test_one_screen_names_the_processor_and_what_would_be_used(command):
    said = command("devices", "--device", "cpu")
    assert said.code == 0
    lines = {line.strip().partition("  ")[0]: line for line in said.out.splitlines()}
    assert f"{cores()} cores to use" in lines["processor"]
    assert "GiB" in lines["memory"]
    assert devices.auto_precision(torch.device("cpu"))[1] in lines["precision"]
    assert {"device", "compile", "ranks", "threads a rank", "decoders a rank"} <= set(lines)
    assert len(said.out.splitlines()) < 24


def test_json_has_the_same(command):
    said = json.loads(command("devices", "--device", "cpu", "--json").out)
    assert said["machine"] == devices.machine()
    used = devices.training("cpu")
    assert said["training"] == {k: {"value": v, "why": why} for k, (v, why) in used.items()}


def test_what_is_asked_for_is_used(command):
    said = json.loads(command("devices", "--device", "cpu", "--precision", "fp16", "--json").out)[
        "training"
    ]
    assert said["device"] == {"value": "cpu", "why": "as asked for"}
    assert said["precision"] == {"value": "fp16", "why": "as asked for"}


def test_each_gpu_has_its_line(command, monkeypatch):
    gpu = {"name": "Fast One [80]", "memory_gib": 79.6, "capability": "9.0"}
    there = devices.machine() | {"gpus": [gpu, gpu]}
    monkeypatch.setattr(devices, "machine", lambda: there)
    lines = [line for line in command("devices").out.splitlines() if "Fast One [80]" in line]
    assert len(lines) == 2
    assert "79.6 GiB, compute capability 9.0" in lines[1]


@pytest.mark.parametrize("option", ["--device", "--precision"])
def test_a_word_that_means_nothing_is_refused(refused, option):
    assert refused("devices", option, "fast").startswith(f"{option} fast: write one of auto, ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA GPU")
def test_a_gpu_that_is_not_there_is_refused(refused):
    assert refused("devices", "--device", "cuda").startswith("device cuda: ")


def test_train_and_eval_pass_on_what_is_asked_for(command, monkeypatch, tmp_path):
    asked = []
    outcome = SimpleNamespace(exit_code=0)
    evaluated = Evaluation(loss=0.0, top1=0.0, top5=0.0, ece=0.0, protocol={})
    result = SimpleNamespace(evaluation=evaluated)
    monkeypatch.setattr(
        "pitstop.engine.run.run_training", lambda wish, out, **_: asked.append(wish) or outcome
    )
    monkeypatch.setattr(
        "pitstop.engine.predict.examine", lambda *_, **options: asked.append(options) or result
    )
    options = ("--device", "cpu", "--precision", "fp16")
    assert command("train", "demo", *options, "--deterministic", "--out", tmp_path).code == 0
    assert command("train", "demo", "--out", tmp_path).code == 0
    assert command("eval", "run", *options).code == 0
    stated, default, evaluation = asked
    for recipe, wanted in (
        (stated.recipe, ("cpu", "fp16", True)),
        (default.recipe, ("auto", "auto", False)),
    ):
        assert (recipe.device, recipe.precision, recipe.deterministic) == wanted
    assert (evaluation["device"], evaluation["precision"]) == ("cpu", "fp16")
