"""What only a CUDA GPU can show."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pitstop.core.recipe import Recipe, parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.data.load import Batch
from pitstop.engine.state import TrainState
from pitstop.engine.step import Stage, train_step
from pitstop.runtime import devices
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CLASSES, SIDE, SIZE = 10, 64, 32


@pytest.fixture(autouse=True)
def as_before():
    yield
    devices._be_deterministic(False)
    torch.set_float32_matmul_precision("highest")


def choose(precision: Any = "auto", compile: Any = False, **how: Any) -> Device:
    return Device.choose(precision, compile, device="cuda", **how)


@dataclass(frozen=True)
class Draws:
    lam: torch.Tensor


@dataclass(frozen=True)
class Parcel:
    images: torch.Tensor
    labels: torch.Tensor
    draws: Draws


def parcel(seed: int, pinned: bool) -> Parcel:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (64, 128, 128, 3), dtype=torch.uint8, generator=generator)
    if pinned:
        images = images.pin_memory()
    lam = torch.rand(64, generator=generator)
    return Parcel(images.permute(0, 3, 1, 2), torch.arange(64) + seed, Draws(lam))


def test_auto_is_what_the_gpu_computes_in():
    device = choose()
    with device.autocast():
        product = torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
    native = torch.cuda.get_device_capability() >= (8, 0)
    assert product.dtype == device.autocast_dtype == (torch.bfloat16 if native else torch.float16)


@pytest.mark.parametrize("pinned", [True, False])
def test_copied_batches_equal_their_sources_whatever_is_computed_meanwhile(pinned):
    """The sums are kept on the device, so that copies run while it is busy."""
    busy = torch.randn(2048, 2048, device="cuda")
    seen: list[tuple[torch.Tensor, ...]] = []
    for batch in choose().prefetch(parcel(seed, pinned) for seed in range(40)):
        assert batch.images.device == torch.device("cuda", 0)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for _ in range(4):
            busy = (busy @ busy).clamp(-1, 1)
        weights = torch.arange(batch.images[0].numel(), device="cuda").view(3, 128, 128) % 251
        seen.append(((batch.images * weights).sum(), batch.labels.sum(), batch.draws.lam.clone()))
    assert len(seen) == 40
    weights = weights.cpu()
    for seed, (images, labels, lam) in enumerate(seen):
        source = parcel(seed, pinned=False)
        assert images.item() == (source.images * weights).sum().item()
        assert labels.item() == source.labels.sum().item()
        assert torch.equal(lam.cpu(), source.draws.lam)


def test_a_gradient_that_overflows_skips_the_step_and_halves_the_scale():
    device = choose("fp16")
    scaler = device.grad_scaler()
    weight = nn.Parameter(torch.ones(4, device="cuda"))
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9, fused=device.fused)
    for factor, after in [(3.0, -0.5), (torch.inf, -0.5)]:
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert weight.tolist() == [after] * 4
    assert scaler.get_scale() == 2.0**15


# Whole steps


def recipe(**stated: Any) -> Recipe:
    full = {
        "epochs": 1,
        "batch_size": SIZE,
        "resolution": SIDE,
        "lr": 0.05,
        "lr_schedule": "constant",
        "mix": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "mode": "elem"},
        "clip_grad_norm": 1.0,
        "ema": {"half_life": 5},
        "model": {"name": "resnet18", "kwargs": {"drop_rate": 0.2}},
    }
    return parse_recipe({**full, **stated}, "test")


def batches(steps: int) -> Iterator[Batch]:
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (SIZE, SIDE, SIDE, 3), dtype=torch.uint8, generator=draw)
        yield Batch(
            step=step,
            share=slice(0, SIZE),
            ids=np.arange(SIZE),
            images=images.permute(0, 3, 1, 2),
            labels=torch.arange(SIZE) % CLASSES,
        )


def trained(device: Device, steps: int = 4, **stated: Any) -> tuple[TrainState, torch.Tensor]:
    """Returns the state after so many steps, and the metrics of the last."""
    spec = recipe(**stated)
    timeline = Timeline(spec, num_samples=10 * SIZE)
    state = TrainState.initial(spec, CLASSES, device)
    stage = Stage(timeline.segments[0], state, device, Ranks(), CLASSES)
    assert stage.warm_up() is None
    for batch in device.prefetch(batches(steps)):
        metrics = train_step(stage, state, batch, timeline.settings_at(batch.step))
    return state, metrics


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adamw", "lamb"])
def test_steps_are_near_those_of_the_cpu(precision, optimizer):
    stated = {"optimizer": {"name": optimizer, "weight_decay": 0.01}, "lr": 1e-3}
    _, metrics = trained(choose(precision), 2, **stated)
    _, on_cpu = trained(Device.choose("fp32", False, device="cpu"), 2, **stated)
    assert metrics.device == torch.device("cuda", 0)
    torch.testing.assert_close(metrics[0].cpu(), on_cpu[0], rtol=0.05, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_deterministic_runs_have_the_same_bits(precision, compile):
    device = choose(precision, compile, deterministic=True)
    (one, _), (other, _) = (trained(device) for _ in range(2))
    assert all(map(torch.equal, one.model.state_dict().values(), other.model.state_dict().values()))


def test_a_state_goes_to_the_cpu_and_back():
    state, _ = trained(choose("fp32"))
    saved = {key: value for key, value in state.state_dict().items() if key != "scaler"}
    cpu = TrainState.initial(recipe(), CLASSES, Device.choose("fp32", False, device="cpu"))
    cpu.load(saved)
    again = TrainState.initial(recipe(), CLASSES, choose("fp32"))
    again.load(cpu.state_dict())
    kept = zip(state.optimizer.param_groups, again.optimizer.param_groups, strict=True)
    assert all(one["fused"] and other["fused"] for one, other in kept)
    assert not any(group["fused"] for group in cpu.optimizer.param_groups)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_trains_as_an_eager_one(mode):
    _, eager = trained(choose("fp32"))
    _, compiled = trained(choose("fp32", mode))
    torch.testing.assert_close(eager[0], compiled[0], rtol=0.01, atol=0)


def test_what_is_known_of_the_gpu():
    device = choose()
    held = torch.ones(64, 2**20, device="cuda")
    assert device.memory_mb() >= held.nbytes / 1e6
    busy = device.utilization()
    assert busy is None or 0 <= busy <= 100
    circumstance = device.circumstance()
    assert circumstance["device"] == "cuda"
    assert circumstance["gpu"] == torch.cuda.get_device_name()
    assert circumstance["cudnn"] == torch.backends.cudnn.version()
    gpus = devices.machine()["gpus"]
    assert len(gpus) == devices.training()["ranks"][0] == torch.cuda.device_count()
