"""The device: where tensors live, in which precision, and whether the model is compiled."""

import os
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.machine import cores, cores_a_rank

T = TypeVar("T")

Kind = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {dtype: precision for precision, dtype in DTYPES.items()}

WITH_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes of torch.compile that replay CUDA graphs, each in the memory of the time before."""

WITHOUT_NVML: set[torch.device] = set()
"""Devices that could not say once how busy they are: they are not asked again."""


@dataclass(frozen=True)
class Device:
    """A device and how it is used.

    `autocast_dtype` is the dtype of the forward pass, None for float32 throughout. `compile` is
    torch.compile's mode, False for none.
    """

    torch_device: torch.device
    autocast_dtype: torch.dtype | None
    compile: bool | str
    deterministic: bool = False

    @classmethod
    def choose(
        cls,
        precision: Precision,
        compile: bool | str,
        threads: int | None = None,
        *,
        device: Kind = "auto",
        deterministic: bool = False,
        local_rank: int = 0,
    ) -> "Device":
        """Returns a device of this machine, and sets torch up for it in the whole process.

        Args:
            precision: `auto` is what `auto_precision` returns.
            compile: a mode of torch.compile; True is its default, `auto` that on CUDA alone.
            threads: that compute on a CPU; None leaves torch's number.
            device: `auto` is a GPU where there is one.
            deterministic: same bits on each run; what has no such kernel on CUDA raises.
            local_rank: which of the machine's GPUs.

        Raises:
            InputError: the device is not there, or cannot compute in the precision.
        """
        chosen = find(device, local_rank)
        _be_deterministic(deterministic)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
            torch.set_float32_matmul_precision("high")  # TF32
            torch.backends.cudnn.benchmark = not deterministic  # it chooses by timing
        if threads is not None:
            torch.set_num_threads(threads)
        if precision == "auto":
            precision, _ = auto_precision(chosen)
        if precision == "fp16" and chosen.type == "mps" and torch.__version__ < "2.8":
            raise InputError("precision fp16: on a Mac it needs torch 2.8 or newer: take bf16")
        return cls(chosen, DTYPES[precision], _mode(compile, chosen), deterministic)

    # The model

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context of a forward pass."""
        if self.compile in WITH_GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()  # what the pass before returned is used up
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.torch_device.type, self.autocast_dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:  # pyright: ignore[reportPrivateImportUsage]
        """Returns a scaler of the loss; it does nothing but in float16, which underflows."""
        scales = self.autocast_dtype == torch.float16
        return torch.amp.GradScaler(self.torch_device.type, enabled=scales)  # pyright: ignore[reportPrivateImportUsage]

    def place(self, model: nn.Module) -> nn.Module:
        """Moves a model here, its kernels in channels_last memory format."""
        return model.to(self.torch_device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def compile_in_place(self, model: nn.Module) -> None:
        """Compiles the model anew for the shapes to come; state dicts stay those of the model."""
        if self.compile:
            torch.compiler.reset()
            model.compile(dynamic=False, mode=None if self.compile == "default" else self.compile)

    def undo_compile(self, model: nn.Module) -> None:
        """Goes back to eager mode; `Module.compile` has no public inverse."""
        model._compiled_call_impl = None

    @property
    def fused(self) -> bool:
        """Whether optimizers take torch's fused kernels.

        CUDA alone: on a CPU their results are others than those of runs before, and on a Mac
        nobody has tried them here.
        """
        return self.torch_device.type == "cuda"

    # Batches

    @property
    def pin_memory(self) -> bool:
        """Whether batches belong in page-locked memory, from which a GPU copies by itself."""
        return self.torch_device.type == "cuda"

    def prefetch(self, batches: Iterator[T]) -> Iterator[T]:
        """Yields batches, frozen dataclasses, with their tensors here in the strides they had.

        On CUDA the next batch is copied on a stream of its own while the current one is used, so
        one batch more than is asked for is taken from `batches`; elsewhere none is. A batch is to
        be used on the stream that is current when it is asked for.
        """
        match self.torch_device.type:
            case "cuda":
                return self._copied_ahead(batches)
            case "cpu":
                return batches
            case _:
                return (
                    with_each_tensor(batch, lambda tensor: tensor.to(self.torch_device))
                    for batch in batches
                )

    def _copied_ahead(self, batches: Iterator[T]) -> Iterator[T]:
        side = torch.cuda.Stream(self.torch_device)

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
            return pinned.to(self.torch_device, non_blocking=True)

        def lend(tensor: torch.Tensor) -> torch.Tensor:
            tensor.record_stream(current)  # or its memory is free again for `side` too early
            return tensor

        def take() -> T | None:
            batch = next(batches, None)
            with torch.cuda.stream(side):
                return with_each_tensor(batch, copy)

        coming = take()
        while coming is not None:
            current = torch.cuda.current_stream(self.torch_device)
            current.wait_stream(side)  # before the next copy begins, which it need not wait for
            batch = with_each_tensor(coming, lend)
            coming = take()
            yield batch

    # What is known of it

    def memory_mb(self) -> float:
        """Returns the most memory that the process has held, in MB: the GPU's where there is one.

        Of a Mac's GPU only what is held now is known.
        """
        if self.torch_device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.torch_device) / 1e6
        if self.torch_device.type == "mps":
            return torch.mps.driver_allocated_memory() / 1e6
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e6

    def utilization(self) -> float | None:
        """Returns for how many percent of the time the GPU was busy; None where NVML is missing."""
        if self.torch_device.type != "cuda" or self.torch_device in WITHOUT_NVML:
            return None
        try:
            return float(torch.cuda.utilization(self.torch_device))
        except Exception:  # no pynvml, no permission, a share of a GPU: whatever it is, it stays
            WITHOUT_NVML.add(self.torch_device)
            return None

    @property
    def name(self) -> str:
        """What it is, for people: a GPU's name, or the kind of processor."""
        if self.torch_device.type == "cuda":
            return torch.cuda.get_device_name(self.torch_device)
        return f"{self.torch_device.type} ({torch.backends.cpu.get_cpu_capability()})"

    def circumstance(self) -> dict[str, Any]:
        """Returns what may change from one start of a run to the next without being refused."""
        stated = {
            "device": self.torch_device.type,
            "precision": PRECISIONS[self.autocast_dtype],
            "compile": self.compile,
            "deterministic": self.deterministic,
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
        }
        if self.torch_device.type == "cuda":
            stated["gpu"] = torch.cuda.get_device_name(self.torch_device)
            stated["cudnn"] = torch.backends.cudnn.version()
        return stated


def with_each_tensor(value: T, change: Callable[[torch.Tensor], torch.Tensor]) -> T:
    """Returns a dataclass with `change` of each tensor in it and in the dataclasses it holds."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **{name: with_each_tensor(v, change) for name, v in held.items()})
    return value


# Choosing


def find(device: Kind, local_rank: int = 0) -> torch.device:
    """Returns the device of a kind; on CUDA, the rank's own GPU.

    Raises:
        InputError: it is not there.
    """
    accelerator = _accelerator()
    if device == "auto":
        device = "cpu" if accelerator is None else accelerator
    if device not in ("cpu", accelerator):
        raise InputError(f"device {device}: torch {torch.__version__} finds none: take auto or cpu")
    if device != "cuda":
        return torch.device(device)
    gpus = torch.cuda.device_count()
    if gpus == 1 and "SLURM_STEP_ID" in os.environ:
        local_rank = 0  # with --gpus-per-task, a task sees only its own
    if local_rank >= gpus:
        raise InputError(
            f"local rank {local_rank} has no GPU: start at most {gpus} ranks here, "
            "or give --device cpu"
        )
    return torch.device("cuda", local_rank)


def _accelerator() -> Literal["cuda", "mps"] | None:
    """Returns the kind of GPU that is there and that pitstop knows."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    match found and found.type:
        case "cuda" | "mps" as kind:
            return kind
        case _:
            return None


def auto_precision(device: torch.device) -> tuple[Precision, str]:
    """Returns the fastest precision that is safe on a device, and why.

    On a CPU that is bf16 where the processor computes in it: nearly twice as fast there, slower
    where it is emulated.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU computes in it"
        return "fp16", "the GPU does not compute in bf16"
    if device.type == "mps":
        return "fp32", "others are unmeasured on a Mac"
    unit = _bf16_unit()
    if unit is None:
        return "fp32", "the processor has neither AMX nor AVX512-BF16"
    return "bf16", f"the processor has {unit}"


def _bf16_unit() -> str | None:
    """Returns what the processor computes in bf16 with."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else None


def _mode(compile: bool | str, device: torch.device) -> bool | str:
    if compile == "auto":
        compile = device.type == "cuda"
    return "default" if compile is True else compile


def _be_deterministic(wanted: bool) -> None:
    """Has torch, its compiler included, take kernels that give the same bits each time, or any."""
    if wanted == torch.are_deterministic_algorithms_enabled():
        return  # saying it again imports the compiler, which takes a second (torch 2.14)
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(wanted)
    # each new batch buffer would be filled, only to be overwritten
    torch.utils.deterministic.fill_uninitialized_memory = not wanted  # pyright: ignore[reportAttributeAccessIssue]


# What is there


def machine() -> dict[str, Any]:
    """Returns what torch and the system say of this machine; memory is in GiB.

    Keys: `gpus` (each with name, memory_gib, capability), `mps`, `cpu` (name, cores, bf16),
    `ram_gib`.
    """
    accelerator = _accelerator()
    gpus = range(torch.cuda.device_count() if accelerator == "cuda" else 0)
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "gpus": [_gpu(i) for i in gpus],
        "mps": accelerator == "mps",
        "cpu": {"name": _processor(), "cores": cores(), "bf16": _bf16_unit()},
        "ram_gib": round(pages / 2**30, 1),
    }


def _gpu(index: int) -> dict[str, Any]:
    about = torch.cuda.get_device_properties(index)
    memory = round(about.total_memory / 2**30, 1)
    return {
        "name": about.name,
        "memory_gib": memory,
        "capability": f"{about.major}.{about.minor}",
    }


def _processor() -> str:
    """Returns the processor's name, or at least its architecture."""
    known = Path("/proc/cpuinfo")
    for line in known.read_text().splitlines() if known.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def training(device: Kind = "auto", precision: Precision = "auto") -> dict[str, tuple[Any, str]]:
    """Returns what `pitstop train` would use on this machine: by name, (value, why).

    Raises:
        InputError: the device is not there.
    """
    chosen = find(device)
    asked = "as asked for"
    gpus = torch.cuda.device_count() if chosen.type == "cuda" else 0
    ranks = gpus or 1
    share = cores_a_rank(ranks)
    among = f"{cores()} cores" if ranks == 1 else f"{cores()} cores among {ranks} ranks"
    threads = (torch.get_num_threads(), "as torch chooses") if ranks == 1 else (share, among)
    found = "no GPU that torch can use" if chosen.type == "cpu" else "torch finds it"
    return {
        "device": (chosen.type, found if device == "auto" else asked),
        "precision": auto_precision(chosen) if precision == "auto" else (precision, asked),
        "compile": (_mode("auto", chosen), "auto compiles on CUDA only"),
        "ranks": (ranks, "one a GPU" if gpus else "no CUDA GPU"),
        "threads": threads,
        "workers": (share, among),
    }
