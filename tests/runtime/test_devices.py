"""Precision, memory format, compilation; and a whole step on the `meta` device."""

import itertools
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.recipe import Recipe, parse_recipe
from pitstop.core.timeline import StepSettings, Timeline
from pitstop.data.load import Batch
from pitstop.engine.state import TrainState
from pitstop.engine.step import Stage, check_shares, train_step
from pitstop.runtime import devices
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

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
        stage = Stage(timeline.segments[0], state, device, Ranks(), CLASSES)
        assert stage.warm_up() is None
        return cls(stage, state, timeline)

    def settings(self, step: int) -> StepSettings:
        return self.timeline.settings_at(step)

    def train(self, steps: int = 1) -> list[torch.Tensor]:
        steps_left = range(self.state.step, self.state.step + steps)
        batches = self.stage.device.prefetch(batch(step) for step in steps_left)
        return [train_step(self.stage, self.state, b, self.settings(b.step)) for b in batches]


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch):
    """Takes back what a device sets in the whole process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    yield
    devices._be_deterministic(False)
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]


def pretend(monkeypatch: pytest.MonkeyPatch, accelerator: str | None, gpus: int = 1) -> list[Any]:
    """Has torch find a kind of GPU, or none; returns the list of those that were chosen."""
    chosen: list[Any] = []
    found = accelerator and torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: found is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: accelerator == "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    gpu = SimpleNamespace(major=9, minor=0, name="Fast One", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Fast One")
    return chosen


# Precision


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("precision", DTYPES)
def test_the_forward_pass_is_in_the_given_precision(precision):
    device = Device.choose(precision, compile=False)
    with device.autocast():
        logits = nn.Linear(3, 2)(torch.randn(4, 3))
    assert logits.dtype == DTYPES[precision]
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


@pytest.mark.parametrize(("major", "precision"), [(7, "fp16"), (8, "bf16"), (9, "bf16")])
def test_auto_on_cuda_is_what_the_gpu_computes_in(monkeypatch, major, precision):
    """A T4 (7.5) only emulates bf16."""
    pretend(monkeypatch, "cuda")
    gpu = SimpleNamespace(major=major, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    device = Device.choose("auto", compile=False)
    assert device.autocast_dtype == DTYPES[precision]
    assert device.circumstance()["precision"] == precision


def test_auto_on_a_mac_is_fp32(monkeypatch):
    pretend(monkeypatch, "mps")
    device = Device.choose("auto", compile="auto")
    assert (device.torch_device.type, device.autocast_dtype) == ("mps", None)
    assert device.compile is False


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_and_sums_stay_in_float32(precision):
    ready = Ready.on(Device.choose(precision, compile=False), recipe())
    (metrics,) = ready.train()
    assert metrics.dtype == torch.float32
    tensors = [*ready.state.model.state_dict().values(), *ready.state.ema.state_dict().values()]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_lower_precision_is_another_result_and_near(precision):
    one, other = (
        Ready.on(Device.choose(precision, compile=False), recipe()).train()[0][0]
        for precision in ("fp32", precision)
    )
    assert one != other
    torch.testing.assert_close(one, other, rtol=0.02, atol=0)


def test_fp16_on_a_mac_needs_a_torch_that_can_scale_the_loss_there(monkeypatch):
    pretend(monkeypatch, "mps")
    assert Device.choose("fp16", compile=False).grad_scaler().is_enabled()
    old = type(torch.__version__)("2.7.1")
    monkeypatch.setattr(torch, "__version__", old)
    with pytest.raises(InputError, match=r"^precision fp16: .* torch 2.8 or newer: take bf16$"):
        Device.choose("fp16", compile=False)


# The scale of the loss


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_does_not_underflow_is_not_scaled(precision):
    scaler = Device.choose(precision, compile=False).grad_scaler()
    loss = torch.ones(())
    assert scaler.scale(loss) is loss
    assert scaler.state_dict() == {}


def test_fp16_scales_the_loss_and_unscales_the_gradients():
    device = Device.choose("fp16", compile=False)
    scaler = device.grad_scaler()
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler.scale((weight * 3).sum()).backward()
    assert weight.grad.tolist() == [3 * 2.0**16] * 2
    scaler.step(optimizer)
    assert weight.tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_whose_gradients_overflow_is_skipped_and_the_scale_halved(clip):
    ready = Ready.on(Device.choose("fp16", compile=False), recipe(clip_grad_norm=clip))
    ready.train()
    before = {key: tensor.clone() for key, tensor in ready.state.model.named_parameters()}
    scale = ready.state.scaler.get_scale()
    hook = ready.state.model.fc.bias.register_hook(lambda grad: grad * torch.inf)
    ready.train()
    hook.remove()
    for key, tensor in ready.state.model.named_parameters():
        assert torch.equal(tensor, before[key]), key
    assert ready.state.scaler.get_scale() == scale / 2
    ready.train()
    assert not torch.equal(ready.state.model.fc.bias, before["fc.bias"])


# Which device


@pytest.mark.parametrize("accelerator", [None, "cuda", "mps", "xpu"])
def test_auto_is_the_gpu_that_is_there_else_the_cpu(monkeypatch, accelerator):
    chosen = pretend(monkeypatch, accelerator)
    device = Device.choose("fp32", compile=False).torch_device
    known = accelerator if accelerator in ("cuda", "mps") else "cpu"
    assert device.type == known
    assert chosen == ([torch.device("cuda", 0)] if known == "cuda" else [])


def test_a_cpu_can_be_asked_for_where_there_is_a_gpu(monkeypatch):
    chosen = pretend(monkeypatch, "cuda")
    assert Device.choose("fp32", compile="auto", device="cpu") == Device(CPU, None, False)
    assert chosen == []


@pytest.mark.parametrize(("asked", "there"), [("cuda", None), ("mps", None), ("mps", "cuda")])
def test_a_device_that_is_not_there_is_refused(monkeypatch, asked, there):
    pretend(monkeypatch, there)
    with pytest.raises(InputError, match=rf"^device {asked}: .* finds none: take auto or cpu$"):
        Device.choose("fp32", compile=False, device=asked)


def test_a_task_that_slurm_shows_a_single_gpu_has_that_one(monkeypatch):
    pretend(monkeypatch, "cuda", gpus=1)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    device = Device.choose("fp32", compile=False, local_rank=3)
    assert device.torch_device == torch.device("cuda", 0)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_and_accumulation_exclude_each_other(mode):
    timeline = Timeline(recipe(), num_samples=10 * SIZE)
    with pytest.raises(InputError, match=f"^compile: {mode} keeps gradients in memory"):
        check_shares(timeline, Device(CPU, None, compile=mode), Ranks())
    check_shares(timeline, Device(CPU, None, compile="default"), Ranks())


def test_a_rank_has_the_gpu_of_its_number(monkeypatch):
    chosen = pretend(monkeypatch, "cuda", gpus=4)
    device = Device.choose("fp32", compile=False, local_rank=3)
    assert [device.torch_device] == chosen == [torch.device("cuda", 3)]
    with pytest.raises(InputError, match=r"^local rank 4 has no GPU: start at most 4 ranks here, "):
        Device.choose("fp32", compile=False, local_rank=4)


def test_ranks_share_a_cpu():
    assert Device.choose("fp32", compile=False, device="cpu", local_rank=5).torch_device == CPU


@pytest.mark.parametrize("deterministic", [False, True])
def test_cuda_computes_in_tf32_and_times_its_convolutions_unless_it_must_not(
    monkeypatch, deterministic
):
    pretend(monkeypatch, "cuda")
    Device.choose("fp32", compile=False, deterministic=deterministic)
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cudnn.benchmark is not deterministic


def test_a_cpu_computes_in_full_float32():
    before = torch.get_float32_matmul_precision()
    Device.choose("fp32", compile=False)
    assert torch.get_float32_matmul_precision() == before


def test_what_goes_with_a_kind_of_device():
    for kind, gpu in [("cpu", False), ("mps", False), ("cuda", True)]:
        device = Device(torch.device(kind), None, compile=False)
        assert (device.fused, device.pin_memory) == (gpu, gpu)


@pytest.mark.parametrize(("mode", "begins"), [("reduce-overhead", 2), ("default", 0), (False, 0)])
def test_each_forward_pass_may_take_the_memory_of_the_one_before(monkeypatch, mode, begins):
    calls: list[None] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: calls.append(None))
    device = Device(CPU, torch.bfloat16, compile=mode)
    for _ in range(2):
        with device.autocast():
            pass
    assert len(calls) == begins


# Determinism


def test_determinism_is_switched_on_and_off_in_the_whole_process():
    device = Device.choose("fp32", compile=False, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert device.circumstance()["deterministic"] is True
    device = Device.choose("fp32", compile=False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert device.circumstance()["deterministic"] is False


def test_what_is_so_already_is_not_set_again(monkeypatch):
    """torch imports its compiler to set it: a second at the start of each run."""
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: pytest.fail("set again"))
    Device.choose("fp32", compile=False)


def test_a_workspace_that_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    Device.choose("fp32", compile=False, deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_training_is_possible_in_deterministic_mode():
    device = Device.choose("fp32", compile=False, deterministic=True)
    runs = [Ready.on(device, recipe()) for _ in range(2)]
    for ready in runs:
        ready.train(2)
    one, other = (ready.state.model.state_dict() for ready in runs)
    assert all(torch.equal(one[key], other[key]) for key in one)


# Batches on their way to the device


@dataclass(frozen=True)
class Draws:
    lam: torch.Tensor
    note: str


@dataclass(frozen=True)
class Parcel:
    number: int
    images: torch.Tensor | None = None
    ids: np.ndarray | None = None
    draws: Draws | None = None


@dataclass
class Source(Iterator[Parcel]):
    """Numbered parcels; `taken` counts them."""

    size: int
    taken: int = 0

    def __next__(self) -> Parcel:
        if self.taken == self.size:
            raise StopIteration
        self.taken += 1
        return Parcel(self.taken)


def test_tensors_at_any_depth_are_moved_and_nothing_else():
    images = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    parcel = Parcel(7, images, np.arange(2), Draws(torch.ones(2), "mixed"))
    (moved,) = Device(META, None, compile=False).prefetch(iter([parcel]))
    assert moved.images.device == moved.draws.lam.device == META
    assert moved.images.stride() == images.stride()
    assert moved.ids is parcel.ids
    assert (moved.number, moved.draws.note) == (7, "mixed")
    (moved,) = Device(META, None, compile=False).prefetch(iter([Parcel(8)]))
    assert moved == Parcel(8)


def test_a_cpu_gets_the_very_batches():
    parcels = [Parcel(1, torch.zeros(2)), Parcel(2)]
    got = list(Device(CPU, None, compile=False).prefetch(iter(parcels)))
    assert all(one is other for one, other in zip(parcels, got, strict=True))


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_no_batch_is_taken_before_it_is_asked_for(kind):
    source = Source(5)
    batches = Device(torch.device(kind), None, compile=False).prefetch(source)
    assert source.taken == 0
    for parcel in itertools.islice(batches, 3):
        assert source.taken == parcel.number


def test_cuda_takes_one_batch_ahead_and_waits_for_no_copy_but_its_own(monkeypatch):
    """The streams are stand-ins; tests/runtime/test_cuda.py has the real ones."""
    done: list[Any] = []
    side, current = "side", SimpleNamespace(wait_stream=lambda stream: done.append(stream))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(done.append("copy")))
    source = Source(4)
    batches = Device(torch.device("cuda", 0), None, compile=False).prefetch(source)
    assert source.taken == 0
    numbers = []
    for parcel in batches:
        numbers.append(parcel.number)
        assert source.taken == min(parcel.number + 1, 4)
    assert numbers == [1, 2, 3, 4]
    assert done == ["copy", *[side, "copy"] * 4]


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


@pytest.mark.parametrize(
    ("asked", "mode"),
    [("auto", False), (False, False), (True, "default"), ("max-autotune", "max-autotune")],
)
def test_compile_auto_is_off_on_a_cpu(asked, mode):
    device = Device.choose("fp32", asked)
    assert device.torch_device == CPU
    assert device.compile == mode
    assert device.circumstance()["compile"] == mode


def test_compile_auto_is_torchs_default_on_cuda(monkeypatch):
    pretend(monkeypatch, "cuda")
    assert Device.choose("fp32", "auto").compile == "default"
    assert Device.choose("fp32", compile=False).compile is False


def test_the_circumstance_names_the_gpu(monkeypatch):
    assert "gpu" not in Device.choose("fp32", compile=False).circumstance()
    pretend(monkeypatch, "cuda")
    circumstance = Device.choose("fp32", compile=False).circumstance()
    assert (circumstance["device"], circumstance["gpu"]) == ("cuda", "Fast One")
    assert "cudnn" in circumstance


@pytest.mark.skipif(not STATUS.exists(), reason="the oracle is Linux's")
def test_memory_is_the_peak_in_mb():
    peak = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    mb = float(peak.split()[1]) * 1024 / 1e6
    assert Device.choose("fp32", compile=False).memory_mb() == pytest.approx(mb, rel=0.05)


def test_how_busy_a_gpu_is_is_asked_again_only_if_it_was_told(monkeypatch):
    monkeypatch.setattr(devices, "WITHOUT_NVML", set())
    asked: list[torch.device] = []

    def tells(device: torch.device) -> int:
        asked.append(device)
        return 93

    def fails(device: torch.device) -> int:
        asked.append(device)
        raise ModuleNotFoundError("pynvml")

    gpu = Device(torch.device("cuda", 0), None, compile=False)
    monkeypatch.setattr(torch.cuda, "utilization", tells)
    assert [gpu.utilization(), gpu.utilization()] == [93.0, 93.0]
    monkeypatch.setattr(torch.cuda, "utilization", fails)
    assert [gpu.utilization(), gpu.utilization()] == [None, None]
    assert len(asked) == 3
    assert Device.choose("fp32", compile=False, device="cpu").utilization() is None


# What is there


def test_what_a_training_would_use_is_what_is_chosen():
    device, used = Device.choose("auto", "auto"), devices.training()
    circumstance = device.circumstance()
    for key in ("device", "precision", "compile", "threads"):
        assert used[key][0] == circumstance[key]
        assert used[key][1]
    assert used["ranks"][0] == 1


def test_each_gpu_is_listed_and_has_a_rank(monkeypatch):
    pretend(monkeypatch, "cuda", gpus=2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(13))
    gpu = {"name": "Fast One", "memory_gib": 80.0, "capability": "9.0"}
    assert devices.machine()["gpus"] == [gpu, gpu]
    used = devices.training()
    assert used["device"][0] == "cuda"
    assert used["precision"] == ("bf16", "the GPU computes in it")
    assert used["compile"][0] == "default"
    assert used["ranks"][0] == 2
    assert used["workers"] == used["threads"] == (6, "13 cores among 2 ranks")


@pytest.mark.skipif(not STATUS.exists(), reason="the oracle is Linux's")
def test_the_machine_is_what_the_system_says():
    found = devices.machine()
    total = next(x for x in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in x)
    assert found["ram_gib"] == pytest.approx(int(total.split()[1]) / 2**20, rel=0.02)
    assert found["cpu"]["cores"] == len(os.sched_getaffinity(0))
    names = Path("/proc/cpuinfo").read_text()
    assert found["cpu"]["name"] in names or found["cpu"]["name"] == platform.machine()


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
        assert metrics.shape == (3 + len(list(ready.state.model.parameters())),)
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
    stage = Stage(timeline.segments[0], state, device, Ranks(), CLASSES)
    assert stage.warm_up() == "not compiled, going on in eager mode: no compiler"
    hook.remove()
    for key, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert all(parameter.grad is None for parameter in state.model.parameters())


@pytest.mark.parametrize(
    ("asked", "mode"), [(True, None), ("default", None), ("reduce-overhead", "reduce-overhead")]
)
def test_the_model_is_compiled_anew_for_each_segment(monkeypatch, asked, mode):
    """For fixed shapes, in place, and only if asked."""
    calls: list[Any] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append("reset"))
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: calls.append((self, how)))
    model = nn.Linear(2, 2)
    Device.choose("fp32", compile=False).compile_in_place(model)
    assert calls == []
    device = Device.choose("fp32", compile=asked)
    for _ in range(2):
        device.compile_in_place(model)
    assert calls == ["reset", (model, {"dynamic": False, "mode": mode})] * 2


def test_a_deterministic_compiler_does_not_choose_by_timing(monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: None)
    for deterministic in (True, False):
        device = Device.choose("fp32", compile=True, deterministic=deterministic)
        device.compile_in_place(nn.Linear(2, 2))
        assert config.deterministic is deterministic
