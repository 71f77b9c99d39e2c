"""The device: where tensors live, in which precision, and whether the model is compiled."""

import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class Device:
    """A device and how it is used.

    `autocast_dtype` is the dtype of the forward pass, None for float32 throughout.
    """

    torch_device: torch.device
    autocast_dtype: torch.dtype | None
    compile: bool

    @classmethod
    def choose(
        cls,
        precision: Literal["auto", "fp32", "bf16"],
        compile: bool | str,
        threads: int | None = None,
    ) -> "Device":
        """Returns the CPU in the given precision, and gives torch so many threads.

        `auto` precision is bf16 where the processor computes in it (AVX512-BF16 or AMX: nearly
        twice as fast there, slower where it is emulated); `auto` compile is off on a CPU.
        """
        if precision == "auto":
            native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            precision = "bf16" if native else "fp32"
        if threads is not None:
            torch.set_num_threads(threads)
        dtype = torch.bfloat16 if precision == "bf16" else None
        return cls(torch.device("cpu"), dtype, compile is True)

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context of a forward pass."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.torch_device.type, self.autocast_dtype)

    def place(self, model: nn.Module) -> nn.Module:
        """Moves a model here, its kernels in channels_last memory format."""
        return model.to(self.torch_device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def compile_in_place(self, model: nn.Module) -> None:
        """Compiles the model anew for the shapes to come; state dicts stay those of the model."""
        if self.compile:
            torch.compiler.reset()
            model.compile(dynamic=False)

    def undo_compile(self, model: nn.Module) -> None:
        """Goes back to eager mode; `Module.compile` has no public inverse."""
        model._compiled_call_impl = None

    def memory_mb(self) -> float:
        """Returns the most memory that the process has held, in MB."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e6

    def circumstance(self) -> dict[str, Any]:
        """Returns what may change from one start of a run to the next without being refused."""
        return {
            "device": self.torch_device.type,
            "precision": "fp32" if self.autocast_dtype is None else "bf16",
            "compile": self.compile,
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
        }
