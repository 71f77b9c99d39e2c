"""Fine-tuning: weights of a run on some digits, layers frozen and thawed, to train on others."""

import hashlib
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.utils.clip_grad import dispatch_clip_grad

from pitstop.core.errors import InputError
from pitstop.core.recipe import Recipe, parse_recipe
from pitstop.core.timeline import Amendment, Extend, MicroBatch, Rebase, Timeline
from pitstop.data.load import Batch, Loader
from pitstop.data.pack import pack
from pitstop.data.packed import PackedDataset
from pitstop.data.sources.digits import digits_source
from pitstop.data.sources.select import subset_source
from pitstop.engine.outcome import FINISHED, INTERRUPTED
from pitstop.engine.state import TrainState
from pitstop.engine.step import Stage, train_step
from pitstop.io.run_directory import RunDirectory
from pitstop.nn import losses
from pitstop.nn.optimizers import build
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

CPU = Device.choose("fp32", compile=False)
MODEL = {
    "name": "resnet18",
    "kwargs": {
        "layers": [1, 1, 0, 0],
        "channels": [16, 32, 32, 32],
        "stem_type": "deep",
        "stem_width": 16,
    },
}
COMMON = {
    "name": "tiny",
    "lr": 0.05,
    "flip": "none",
    "resolution": 16,
    "precision": "fp32",
    "eval": {"crop_ratio": 1.0, "every": 2},
}
PRETRAINING = {**COMMON, "model": MODEL, "epochs": 6, "batch_size": 32, "optimizer": "adamw"}
PRETRAINING |= {"lr": 0.01, "crop": {"scale": [0.7, 1.0]}}
BODY = ["conv1", "bn1", "layer*"]
FROZEN_THEN_NOT = {
    **COMMON,
    "epochs": 4,
    "batch_size": 15,
    "grad_accum_steps": 2,
    "agc": 0.05,
    "ema": {"half_life": 5, "every": 3, "lookahead": True},
    "optimizer": {
        "name": "sgd",
        "weight_decay": 1e-3,
        "decoupled_weight_decay": True,
        "layer_decay": 0.7,
        "lr_scales": {"*.bias": 2.0},
    },
    "phases": [
        {"name": "head", "duration": "50%", "freeze": BODY},
        {"name": "all", "duration": "rest", "lr": 0.02, "optimizer_state": "reset"},
    ],
}
"""Everything of a fine-tuning that could keep a state."""


def digits_of(classes: str, place: Path, train: int | None = None) -> PackedDataset:
    pack(subset_source(digits_source(), tuple(classes), train=train), place, workers=1)
    return PackedDataset.open(place)


@pytest.fixture(scope="module")
def six(tmp_path_factory) -> PackedDataset:
    return digits_of("012345", tmp_path_factory.mktemp("data") / "six", train=60)


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> PackedDataset:
    """30 images a class."""
    return digits_of("6789", tmp_path_factory.mktemp("data") / "four", train=30)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs") / "pretrained"


@pytest.fixture
def pretrained(trainer, six, four, trained_once, tmp_path) -> Path:
    """A run on six digits; the trainer goes on with the other four."""
    if not trained_once.exists():
        trainer.data = six
        spec = parse_recipe(PRETRAINING, "pretraining.yaml")
        assert trainer(trained_once, recipe=spec) == FINISHED
    trainer.data = four
    shutil.copytree(trained_once, tmp_path / "pretrained")
    return tmp_path / "pretrained"


@pytest.fixture
def tune(trainer, pretrained):
    """Fine-tunes in a directory, by the recipe with some keys changed."""

    def tune(out: Path, steps: int | None = None, **changes):
        return trainer(out, steps=steps, recipe=recipe(pretrained, **changes))

    return tune


def recipe(weights: object = None, **changes) -> Recipe:
    model = MODEL if weights is None else {**MODEL, "weights": str(weights)}
    return parse_recipe({"model": model, **FROZEN_THEN_NOT, **changes}, "finetune.yaml")


def weights_of(out: Path, which: str = "last-raw") -> dict[str, torch.Tensor]:
    return load_file(out / f"{which}.safetensors")


def of_the_body(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.startswith("fc.")}


def fingerprint(out: Path) -> str:
    names = ("last", "last-raw", "best", "best-raw")
    data = b"".join((out / f"{name}.safetensors").read_bytes() for name in names)
    return hashlib.sha256(data).hexdigest()


# The whole of it


def test_frozen_layers_stay_those_of_the_weights_and_then_move(tune, trainer, pretrained, tmp_path):
    out, source = tmp_path / "tuned", weights_of(pretrained, "best")
    assert tune(out, steps=16) == INTERRUPTED
    assert "weights of" in trainer.said
    assert "head reset: 6 classes there, 4 here" in trainer.said
    for which in ("last-raw", "last"):
        for key, tensor in of_the_body(weights_of(out, which)).items():
            assert torch.equal(tensor, source[key]), (which, key)
    assert weights_of(out)["fc.weight"].shape[0] == 4
    assert tune(out) == FINISHED
    tuned = weights_of(out)
    still = [key for key, tensor in source.items() if torch.equal(tensor, tuned[key])]
    assert still == []


@pytest.mark.parametrize("optimizer_state", ["reset", "reset_frozen"])
def test_it_resumes_exactly_around_the_thaw_and_without_the_weights(
    tune, trainer, pretrained, tmp_path, optimizer_state
):
    phases = deepcopy(FROZEN_THEN_NOT["phases"])
    phases[1]["optimizer_state"] = optimizer_state
    assert tune(tmp_path / "whole", phases=phases) == FINISHED
    assert trainer.steps == 32
    stopped = [tmp_path / f"stopped-at-{step}" for step in (15, 16, 17)]
    for out in stopped:
        assert tune(out, steps=int(out.name.rpartition("-")[2]), phases=phases) == INTERRUPTED
    shutil.rmtree(pretrained)
    for out in stopped:
        assert tune(out, phases=phases) == FINISHED
        assert "head reset" not in trainer.said
        assert fingerprint(out) == fingerprint(tmp_path / "whole"), out.name


def test_30_images_a_class_are_enough_with_the_weights_and_not_without(
    trainer, tune, four, tmp_path
):
    assert len(four.train) == 120
    plain = {"agc": None, "ema": None, "optimizer": "adamw", "lr": 0.01}
    phases = [{"duration": "50%", "freeze": BODY}, {"duration": "rest"}]
    assert tune(tmp_path / "tuned", **plain, phases=phases) == FINISHED
    without = recipe(**plain, phases=phases)
    assert trainer(tmp_path / "without", recipe=without) == FINISHED
    assert best_top1(tmp_path / "tuned") > max(60, best_top1(tmp_path / "without") + 10)


def best_top1(out: Path) -> float:
    return (RunDirectory(out).read() or {})["best"]["top1"]


def test_it_begins_anew_when_it_was_killed_before_the_first_checkpoint(tune, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert tune(whole) == FINISHED
    assert tune(again, steps=3) == INTERRUPTED
    shutil.rmtree(again / "checkpoints")
    assert tune(again) == FINISHED
    assert fingerprint(again) == fingerprint(whole)


def test_weights_of_another_model_leave_no_run_behind(tune, tmp_path):
    other = {**MODEL, "kwargs": {**MODEL["kwargs"], "channels": [12, 32, 32, 32]}}
    with pytest.raises(InputError, match=r"model\.weights: .*layer1\.0\.conv1\.weight is \[16, "):
        tune(tmp_path / "out", model={**other, "weights": str(tmp_path / "pretrained")})
    assert not (tmp_path / "out").exists()


# The optimizer's memory at the start of a phase


def steps_of(spec: Recipe, data: PackedDataset, first: int, last: int, state: TrainState) -> None:
    """Trains a state through steps of a recipe; nothing is said, saved or evaluated."""
    timeline = Timeline(spec, num_samples=len(data.train))
    with Loader(data.train, timeline, range(first, last), workers=1) as batches:
        for segment in timeline.segments_from(first):
            stage = Stage(segment, state, CPU, Ranks(), len(data.classes))
            for step in range(max(first, segment.first), min(last, segment.last)):
                train_step(stage, state, next(batches), timeline.settings_at(step))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_a_reset_goes_on_as_with_a_fresh_optimizer(four, name):
    phases = [{"duration": "50%"}, {"duration": "rest", "optimizer_state": "reset"}]
    spec = recipe(phases=phases, optimizer={"name": name, "weight_decay": 0.1}, lr=1e-3)
    reset = TrainState.initial(spec, 4, CPU)
    steps_of(spec, four, 0, 16, reset)
    fresh = TrainState.initial(spec, 4, CPU)
    fresh.load(deepcopy(reset.state_dict()))
    fresh.optimizer = build(spec.optimizer, fresh.model)
    kept = TrainState.initial(spec, 4, CPU)
    kept.load(deepcopy(reset.state_dict()))
    steps_of(spec, four, 16, 18, reset)
    phases[1]["optimizer_state"] = "keep"
    spec = recipe(phases=phases, optimizer={"name": name, "weight_decay": 0.1}, lr=1e-3)
    for state in (fresh, kept):
        steps_of(spec, four, 16, 18, state)
    assert same(reset, fresh)
    assert not same(reset, kept)


def same(one: TrainState, other: TrainState) -> bool:
    return all(map(torch.equal, one.model.parameters(), other.model.parameters()))


def test_frozen_layers_may_lose_their_momentum_alone(four):
    phases = [
        {"duration": "50%"},
        {"duration": "rest", "freeze": ["layer1"], "optimizer_state": "reset_frozen"},
    ]
    spec = recipe(phases=phases, optimizer="sgd", agc=None)
    state = TrainState.initial(spec, 4, CPU)
    steps_of(spec, four, 0, 16, state)
    assert all(parameter in state.optimizer.state for parameter in state.model.parameters())
    steps_of(spec, four, 16, 17, state)
    forgotten = {n for n, p in state.model.named_parameters() if p not in state.optimizer.state}
    assert forgotten == {n for n, _ in state.model.named_parameters() if n.startswith("layer1.")}


def test_a_phase_begins_once_whatever_cuts_it_up(four):
    phases = [
        {"duration": "50%", "optimizer_state": "reset"},
        {"duration": "rest", "resolution": [16, 48], "optimizer_state": "reset"},
    ]
    spec = recipe(phases=phases)
    timeline = Timeline(spec, num_samples=120)
    assert begins(timeline) == [0, 16]
    assert len(timeline.segments) == 4
    for step in (3, 18):
        cut = Amendment(step=step, change=MicroBatch(grad_accum_steps=5))
        changed = Amendment(step=step, change=Rebase(recipe=recipe(phases=phases, lr=0.07)))
        for amendment in (cut, changed):
            amended = Timeline(spec, [amendment], num_samples=120)
            assert step in [segment.first for segment in amended.segments]
            assert begins(amended) == [0, 16]
    longer = Timeline(spec, [Amendment(step=32, change=Extend(epochs=1, lr=0.01))], num_samples=120)
    assert longer.segments[-1].phase.optimizer_state == "keep"


def begins(timeline: Timeline) -> list[int]:
    return [step for step in range(timeline.last) if timeline.settings_at(step).begins_phase]


# Clipping and averaging within a step


@pytest.fixture
def batch(four) -> Batch:
    spec = recipe(phases=[{"duration": "rest"}])
    with Loader(four.train, Timeline(spec, num_samples=120), range(1), workers=1) as batches:
        return next(batches)


@pytest.mark.parametrize("scaled", [False, True])
def test_adaptive_clipping_is_timms_and_spares_the_classifier(batch, scaled):
    phases = [{"duration": "rest", "grad_accum_steps": 1, "lr_schedule": "constant"}]
    spec = recipe(phases=phases, agc=0.01, ema=None, optimizer={"name": "sgd", "momentum": 0})
    timeline = Timeline(spec, num_samples=120)
    state = TrainState.initial(spec, 4, CPU)
    if scaled:
        state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # pyright: ignore[reportPrivateImportUsage]
    twin = deepcopy(state.model).train()
    stage = Stage(timeline.segments[0], state, CPU, Ranks(), 4)
    train_step(stage, state, batch, timeline.settings_at(0))

    logits = twin(stage.normalize(batch.images))
    (losses.loss_sum("cross_entropy", logits, batch.labels, 0.0) / 15).backward()
    whole = deepcopy(twin)
    for copied, parameter in zip(whole.parameters(), twin.parameters(), strict=True):
        copied.grad = parameter.grad.clone()
    dispatch_clip_grad(whole.parameters(), 0.01, mode="agc")
    assert not torch.equal(whole.fc.weight.grad, twin.fc.weight.grad)
    for copied, parameter in zip(whole.parameters(), twin.parameters(), strict=True):
        if parameter not in set(twin.fc.parameters()):
            parameter.grad = copied.grad
    for own, other in zip(state.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other - 0.05 * other.grad)


@pytest.mark.parametrize("lookahead", [False, True])
def test_the_average_moves_after_each_nth_step_only(four, lookahead):
    average = {"half_life": 5, "every": 3, "lookahead": lookahead}
    spec = recipe(phases=[{"duration": "rest"}], ema=average, agc=None)
    state = TrainState.initial(spec, 4, CPU)
    assert state.ema is not None
    moved, equal = [], []
    for step in range(7):
        before = deepcopy(state.ema.state_dict())
        steps_of(spec, four, step, step + 1, state)
        after = state.ema.state_dict()
        if any(not torch.equal(before[key], after[key]) for key in before):
            moved.append(step)
        floats = [key for key, value in after.items() if value.is_floating_point()]
        if all(torch.equal(state.model.state_dict()[key], after[key]) for key in floats):
            equal.append(step)
    assert moved == [2, 5]
    assert equal == ([2, 5] if lookahead else [])


def test_the_average_begins_with_the_weights_too(tune, pretrained, tmp_path):
    average = {"half_life": 1e9, "every": 32}
    assert tune(tmp_path / "tuned", ema=average, steps=31) == INTERRUPTED
    source = of_the_body(weights_of(pretrained, "best"))
    average = weights_of(tmp_path / "tuned", "last")
    assert all(torch.equal(average[key], tensor) for key, tensor in source.items())
