"""Memory and FLOPs of a step that never runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pitstop.core.errors import InputError
from pitstop.core.recipe import Recipe, parse_recipe
from pitstop.core.timeline import Segment, Timeline
from pitstop.data.load import Batch
from pitstop.engine import footprint as counting
from pitstop.engine.footprint import USABLE, Footprint, footprint, largest_micro_batch
from pitstop.engine.state import TrainState
from pitstop.engine.step import Stage, train_step
from pitstop.plan.rates import model_size
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

SMALL = {"name": "resnet18", "kwargs": {"layers": [1, 1, 0, 0], "channels": [16, 32, 32, 32]}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PITSTOP_CACHE", str(tmp_path))
    return tmp_path / "footprints.json"


def small(**stated: object) -> tuple[Recipe, Segment]:
    """A recipe whose weights are little beside its activations, and its only segment."""
    plain = {"epochs": 1, "batch_size": 32, "resolution": 64, "model": SMALL, "precision": "fp32"}
    recipe = parse_recipe({**plain, **stated}, "test")
    return recipe, Timeline.planned(recipe, num_samples=320).segments[0]


def of(num_classes: int = 10, ranks: int = 1, **stated: object) -> Footprint:
    return footprint(*small(**stated), num_classes=num_classes, ranks=ranks)


def allocated(recipe: Recipe, segment: Segment) -> int:
    """The most that torch's profiler sees the CPU hold in a real step, its state included."""
    device = Device.choose("fp32", compile=False, threads=1)
    state = TrainState.initial(recipe, 10, device)
    stage = Stage(segment, state, device, Ranks(), 10)
    side, count = segment.resolution, segment.batch_size
    timeline = Timeline.planned(recipe, num_samples=320)

    def batch() -> Batch:
        images = torch.zeros(count, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        labels = torch.zeros(count, dtype=torch.int64)
        return Batch(0, slice(0, count), np.arange(count), images, labels)

    train_step(stage, state, batch(), timeline.settings_at(0))
    before = [*state.model.parameters(), *state.model.buffers()]
    before += [v for kept in state.optimizer.state.values() for v in kept.values()]
    held = sum(t.numel() * t.element_size() for t in before)
    given = batch()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        train_step(stage, state, given, timeline.settings_at(1))
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return held + given.images.numel() + int(np.cumsum(changes).max())


def test_flops_are_those_that_are_published_for_resnet_18() -> None:
    """torchvision: 1.81 GFLOPS (multiplications with additions), 11,689,512 parameters."""
    recipe, segment = small(model="resnet18", resolution=224, batch_size=2)
    counted = footprint(recipe, segment)
    assert counted.params == 11_689_512
    assert counted.gmacs == pytest.approx(1.81, rel=0.005)
    stem = 2 * 112 * 112 * 64 * 3 * 49  # the first layer passes no gradient on
    assert counted.flops_per_image == pytest.approx(6e9 * counted.gmacs - stem)


def test_attention_is_counted() -> None:
    """Scores and their sum of values: 2 x tokens x tokens x width MACs a block."""
    model = {"name": "vit_tiny_patch16_224", "kwargs": {"depth": 1, "img_size": 64}}
    counted = of(model=model, num_classes=1).gmacs * 1e9
    tokens, width = 4 * 4 + 1, 192
    linear = tokens * 12 * width**2
    patches = 16 * 16 * 16 * 3 * width
    assert counted == pytest.approx(linear + patches + 2 * tokens**2 * width + width)


def test_bytes_are_what_a_real_step_holds() -> None:
    recipe, segment = small()
    counted = footprint(recipe, segment, num_classes=10).bytes
    ahead = segment.batch_size * 3 * segment.resolution**2
    assert counted - ahead == pytest.approx(allocated(recipe, segment), rel=0.05)


def test_what_an_optimizer_and_an_average_keep_counts() -> None:
    weights = 4 * of().params
    sgd, adamw = of(optimizer="sgd").bytes, of(optimizer="adamw").bytes
    assert adamw - sgd == pytest.approx(weights, rel=0.01)  # two moments instead of one
    assert of(ema={}).bytes - of().bytes == pytest.approx(weights, rel=0.05)  # and its buffers


def test_half_precision_micro_batches_ranks_and_frozen_layers_take_less() -> None:
    whole = of().bytes
    assert of(precision="bf16").bytes < 0.7 * whole
    assert of(grad_accum_steps=4).bytes < 0.5 * whole
    assert of(ranks=2).bytes < 0.6 * whole
    assert of(freeze=["conv1", "bn1", "layer1"]).bytes < 0.8 * whole


def test_of_many_micro_batches_those_that_wait_count_as_images() -> None:
    """As bytes, as float32, and as bytes of the next batch."""
    two = of(batch_size=16, grad_accum_steps=2).bytes
    eight = of(batch_size=64, grad_accum_steps=8).bytes
    assert eight - two == pytest.approx(48 * 3 * 64**2 * (1 + 4 + 1), rel=0.01)


@pytest.mark.parametrize(
    "stated",
    [
        {
            **{"optimizer": "lamb", "loss": "bce", "ema": {"lookahead": True}},
            **{"lr": "auto", "lr_finder": {"fallback": 0.1}, "resolution": [32, 64]},
            "model": {"name": "test_convnext", "kwargs": {"drop_path_rate": 0.1}},
        },
        {
            **{"optimizer": "rmsprop", "agc": 0.01, "optimizer_state": "reset", "translate": 2},
            **{"mix": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}, "augment": "rand_augment"},
            **{"random_erasing": {"mode": "pixel"}, "color_jitter": {"hue": 0.1}},
        },
        {
            **{"optimizer": {"name": "sgd", "decoupled_weight_decay": True}, "clip_grad_norm": 1.0},
            "model": {**SMALL, "blurpool": True, "prior_bias": True},
        },
        {"model": {"name": "cifarnet", "kwargs": {"widths": [4, 6, 6]}}, "resolution": 32},
    ],
)
def test_whatever_a_recipe_may_ask_for_is_counted(stated: dict[str, object]) -> None:
    counted = of(**{**stated, "precision": "auto", "batch_size": 8})
    assert counted.bytes > 0
    assert counted.flops_per_image > 0


def test_it_is_counted_once(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    first = of(), of(batch_size=16)
    monkeypatch.delattr(counting, "_count")
    assert (of(), of(batch_size=16)) == first
    with pytest.raises(NameError):
        of(optimizer="adamw")  # which is something else
    cache.write_text("not JSON")
    with pytest.raises(NameError):
        of()


def test_the_plan_finds_what_was_counted(cache: Path) -> None:
    counted = of()
    name, _, _ = next(iter(json.loads(cache.read_text()))).rpartition("@")
    size = model_size(name)
    assert size.parameters == pytest.approx(counted.params / 1e6)
    assert size.gmacs == pytest.approx(counted.gmacs * (224 / 64) ** 2)


def test_batches_are_cut_in_half_until_they_fit() -> None:
    recipe, segment = small(batch_size=6)

    def gib(parts: int) -> float:
        return of(batch_size=6, grad_accum_steps=parts).bytes / 2**30 / USABLE

    def largest(memory: float, ranks: int = 1) -> int | None:
        return largest_micro_batch(recipe, segment, memory, num_classes=10, ranks=ranks)

    assert largest(gib(1)) == 6
    assert largest(0.999 * gib(1)) == 3
    assert largest(gib(4)) == 2
    assert largest(0.999 * gib(1), ranks=2) == 3
    assert largest(1e-4) is None


def test_a_model_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="resnet81"):
        of(model="resnet81")
