"""What GPUs want of the loader: images of ResNet-50 training in mixed precision, by machine.

A figure is `published`, by somebody who measured it, or `derived` from such a one.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal, NamedTuple


class Rate(NamedTuple):
    """What one GPU trains on."""

    images_per_second: float
    basis: Literal["published", "derived"]
    source: str


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU and its rates by resolution in pixels."""

    name: str
    rates: dict[int, Rate]

    def rate(self, resolution: int) -> Rate:
        """Returns the rate at a resolution; where none is known, from the nearest by its pixels."""
        if resolution in self.rates:
            return self.rates[resolution]
        nearest = min(self.rates, key=lambda known: abs(known - resolution))
        known = self.rates[nearest]
        scaled = known.images_per_second * (nearest / resolution) ** 2
        return Rate(scaled, "derived", f"{nearest} px by the number of pixels; {known.source}")


@dataclass(frozen=True)
class Need:
    """What a machine wants of the loader, and what it gets; images a second are of all its GPUs."""

    machine: str
    gpu: str
    gpus: int
    vcpus: int
    wanted_images_per_second: float
    basis: Literal["published", "derived"]
    source: str
    expected_images_per_second: float

    @property
    def enough(self) -> bool:
        return self.expected_images_per_second >= self.wanted_images_per_second

    @property
    def workers(self) -> int:
        """Threads a GPU: as many as it takes, or all that there are for it."""
        a_thread = self.expected_images_per_second / self.vcpus
        taken = ceil(self.wanted_images_per_second / self.gpus / a_thread)
        return min(self.vcpus // self.gpus, taken)


@dataclass(frozen=True)
class Machine:
    """A machine that can be rented."""

    name: str
    gpu: Gpu
    gpus: int
    vcpus: int
    """Hardware threads: two of them are one core."""

    def need(self, resolution: int, a_thread: float) -> Need:
        """Returns what it wants at a resolution in pixels, and what it gets.

        Args:
            a_thread: images a second that the loader delivers on one of its threads.
        """
        rate = self.gpu.rate(resolution)
        return Need(
            machine=self.name,
            gpu=self.gpu.name,
            gpus=self.gpus,
            vcpus=self.vcpus,
            wanted_images_per_second=round(rate.images_per_second * self.gpus, 1),
            basis=rate.basis,
            source=rate.source,
            expected_images_per_second=round(a_thread * self.vcpus, 1),
        )


_NVIDIA = "NVIDIA DeepLearningExamples, ResNet-50"
_FFCV = "logs of FFCV's ResNet-50, with BlurPool"
_MLPERF = "2.1 x A100, MLPerf"

_A100 = Gpu(
    "A100",
    {
        160: Rate(3508, "published", _FFCV),
        192: Rate(2595, "published", _FFCV),
        224: Rate(2470, "published", _NVIDIA),
    },
)
_H100 = Gpu(
    "H100",
    {
        side: Rate(round(2.1 * known.images_per_second), "derived", f"{_MLPERF}; {known.source}")
        for side, known in _A100.rates.items()
    },
)
_A10G = Gpu("A10G", {224: Rate(1000, "derived", "800 to 1,000 a card, 250 a vCPU of a g5.xlarge")})
_V100 = Gpu("V100", {224: Rate(1200, "published", _NVIDIA)})

MACHINES = {
    machine.name: machine
    for machine in (
        Machine("g5.xlarge", _A10G, 1, 4),
        Machine("g5.12xlarge", _A10G, 4, 48),
        Machine("p3.8xlarge", _V100, 4, 32),
        Machine("p4d.24xlarge", _A100, 8, 96),
        Machine("p5.48xlarge", _H100, 8, 192),
    )
}
