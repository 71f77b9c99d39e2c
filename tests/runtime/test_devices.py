"""Precision, memory format, compilation; and a whole step on the `meta` device."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pitstop.core.recipe import Recipe, parse_recipe
from pitstop.core.timeline import StepSettings, Timeline
from pitstop.data.load import Batch
from pitstop.engine.state import TrainState
from pitstop.engine.step import Stage, train_step
from pitstop.runtime.devices import Device

CLASSES, SIDE, SIZE = 5, 32, 6
STATUS = Path("/proc/self/status")
CPU, META = torch.device("cpu"), torch.device("meta")


def recipe(**stated: Any) -> Recipe:
    full = {
        "epochs": 1,
        "batch_size": SIZE,
        "resolution": SIDE,
        "grad_accum_steps": 2,
        "lr": 0.01,
        "lr_schedule": "constant",
        "label_smoothing": 0.1,
        "mix": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "mode": "elem"},
        "clip_grad_norm": 1.0,
        "ema": {"half_life": 5},
        "model": {
            "name": "resnet18",
            "kwargs": {"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 16], "drop_rate": 0.2},
            "blurpool": True,
        },
    }
    return parse_recipe({**full, **stated}, "test")


def batch(step: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (SIZE, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    return Batch(
        step=step,
        share=slice(0, SIZE),
        ids=np.arange(SIZE),
        images=images.permute(0, 3, 1, 2),
        labels=torch.arange(SIZE) % CLASSES,
        flip=torch.arange(SIZE) % 2 == 0,
    )


@dataclass
class Ready:
    """A state and its stage, about to train."""

    stage: Stage
    state: TrainState
    timeline: Timeline

    @classmethod
    def on(cls, device: Device, recipe: Recipe) -> "Ready":
        timeline = Timeline(recipe, num_samples=10 * SIZE)
        state = TrainState.initial(recipe, CLASSES, device)
        stage = Stage(timeline.segments[0], state, device, CLASSES)
        assert stage.compile() is None
        return cls(stage, state, timeline)

    def settings(self, step: int) -> StepSettings:
        return self.timeline.settings_at(step)

    def train(self, steps: int = 1) -> list[torch.Tensor]:
        steps_left = range(self.state.step, self.state.step + steps)
        return [train_step(self.stage, self.state, batch(s), self.settings(s)) for s in steps_left]


# Precision


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_forward_pass_is_in_the_given_precision(precision):
    device = Device.choose(precision, compile=False)
    with device.autocast():
        logits = nn.Linear(3, 2)(torch.randn(4, 3))
    assert logits.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert device.circumstance()["precision"] == precision


@pytest.mark.parametrize(
    ("avx512", "amx", "dtype"),
    [(True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, torch.float32)],
)
def test_auto_is_bf16_where_the_processor_has_it(monkeypatch, avx512, amx, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    with Device.choose("auto", compile=False).autocast():
        assert nn.Linear(3, 2)(torch.randn(4, 3)).dtype == dtype


def test_weights_and_sums_stay_in_float32_under_bf16():
    ready = Ready.on(Device.choose("bf16", compile=False), recipe())
    (metrics,) = ready.train()
    assert metrics.dtype == torch.float32
    tensors = [*ready.state.model.state_dict().values(), *ready.state.ema.state_dict().values()]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float32}


def test_bf16_is_another_result_and_near():
    one, other = (
        Ready.on(Device.choose(precision, compile=False), recipe()).train()[0][0]
        for precision in ("fp32", "bf16")
    )
    assert one != other
    torch.testing.assert_close(one, other, rtol=0.02, atol=0)


# Place and circumstance


def test_place_puts_kernels_in_channels_last():
    plain = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    expected = plain[0].weight.clone()
    model = Device.choose("fp32", compile=False).place(plain)
    kernel = model[0].weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert not kernel.is_contiguous()
    assert torch.equal(kernel, expected)


def test_a_whole_model_is_in_channels_last_and_stays_there():
    ready = Ready.on(Device.choose("fp32", compile=False), recipe())
    ready.train(2)
    for model in (ready.state.model, ready.state.ema):
        kernels = [p for p in model.parameters() if p.ndim == 4]
        assert len(kernels) > 5
        assert all(k.is_contiguous(memory_format=torch.channels_last) for k in kernels)


@pytest.mark.parametrize(("asked", "compiles"), [("auto", False), (False, False), (True, True)])
def test_compile_auto_is_off_on_a_cpu(asked, compiles):
    device = Device.choose("fp32", asked)
    assert device.torch_device == CPU
    assert device.compile is compiles
    assert device.circumstance()["compile"] is compiles


@pytest.mark.skipif(not STATUS.exists(), reason="the oracle is Linux's")
def test_memory_is_the_peak_in_mb():
    peak = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    mb = float(peak.split()[1]) * 1024 / 1e6
    assert Device.choose("fp32", compile=False).memory_mb() == pytest.approx(mb, rel=0.05)


# A step on meta: a tensor that is left behind on the CPU raises


class MetaDevice(Device):
    """torch has no autocast for meta tensors; all else is the real thing."""

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()


def on_meta(**stated: Any) -> Ready:
    return Ready.on(MetaDevice(META, None, compile=False), recipe(**stated))


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adamw", "lamb"])
def test_a_step_leaves_nothing_on_another_device(optimizer):
    ready = on_meta(optimizer={"name": optimizer, "weight_decay": 0.1})
    for metrics in ready.train(2):
        assert metrics.device == META
        assert metrics.shape == (3,)
    assert ready.state.step == 2
    state = ready.state.optimizer.state
    slots = [t for of in state.values() for t in of.values() if torch.is_tensor(t) and t.ndim > 0]
    assert len(slots) >= len(list(ready.state.model.parameters()))
    held = [
        *ready.state.model.state_dict().values(),
        *ready.state.ema.state_dict().values(),
        *slots,
    ]
    assert {tensor.device for tensor in held} == {META}


@pytest.mark.parametrize("mix", [None, {"mixup_alpha": 0.2}, {"cutmix_alpha": 1.0, "mode": "elem"}])
@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_neither_does_any_kind_of_loss_and_mixing(mix, loss):
    on_meta(mix=mix, loss=loss, ema=None, clip_grad_norm=None, grad_accum_steps=1).train()


def plant_in_model(ready: Ready) -> None:
    ready.state.model.fc.bias = nn.Parameter(torch.zeros(CLASSES))


def plant_in_average(ready: Ready) -> None:
    ready.state.ema.fc.weight = nn.Parameter(torch.zeros(CLASSES, 16), requires_grad=False)


def plant_in_statistics(ready: Ready) -> None:
    ready.state.model.bn1.running_mean = torch.zeros(64)


@pytest.mark.parametrize("plant", [plant_in_model, plant_in_average, plant_in_statistics])
def test_a_tensor_planted_on_the_cpu_is_found(plant):
    ready = on_meta()
    plant(ready)
    with pytest.raises(RuntimeError, match=r"(?i)device|meta"):
        ready.train()


# Compiling


@pytest.mark.slow
def test_compiled_and_eager_agree_and_load_each_others_weights():
    spec = recipe(
        model={"name": "resnet18", "kwargs": {"layers": [1, 1, 0, 0], "channels": [8] * 4}}
    )
    eager = Ready.on(Device.choose("fp32", compile=False), spec)
    compiled = Ready.on(Device.choose("fp32", compile=True), spec)
    for one, other in zip(eager.train(2), compiled.train(2), strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=0)
    assert list(eager.state.model.state_dict()) == list(compiled.state.model.state_dict())
    saved = compiled.state.state_dict()
    eager.state.load(saved)
    fresh = Ready.on(Device.choose("fp32", compile=True), spec)
    fresh.state.load(eager.state.state_dict())
    for one, other in zip(eager.train(), fresh.train(), strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=0)


def test_a_model_that_does_not_compile_is_as_before_and_trains_in_eager_mode(monkeypatch):
    """Here the pass fails on its way back, when batch norm has already counted it."""
    spec = recipe(ema=None)
    device = Device.choose("fp32", compile=True)
    monkeypatch.setattr(Device, "compile_in_place", lambda *_: None)
    timeline = Timeline(spec, num_samples=10 * SIZE)
    state = TrainState.initial(spec, CLASSES, device)
    before = {key: tensor.clone() for key, tensor in state.model.state_dict().items()}

    def fails(*_: Any) -> None:
        raise RuntimeError("no compiler\nhere")

    hook = state.model.conv1.weight.register_hook(fails)
    stage = Stage(timeline.segments[0], state, device, CLASSES)
    assert stage.compile() == "not compiled, going on in eager mode: no compiler"
    hook.remove()
    for key, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_the_model_is_compiled_anew_for_each_segment(monkeypatch):
    """For fixed shapes, in place, and only if asked."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append("reset"))
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: calls.append((self, how)))
    model = nn.Linear(2, 2)
    Device.choose("fp32", compile=False).compile_in_place(model)
    assert calls == []
    device = Device.choose("fp32", compile=True)
    for _ in range(2):
        device.compile_in_place(model)
    assert calls == ["reset", (model, {"dynamic": False})] * 2
