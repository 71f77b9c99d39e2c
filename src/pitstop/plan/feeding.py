"""Whether a machine's threads load as many images as its GPUs train on: those of ResNet-50."""

from dataclasses import dataclass
from math import ceil

from pitstop.plan.machines import Machine
from pitstop.plan.rates import REFERENCE, images_per_second

SHOWN = ("g5.xlarge", "g5.12xlarge", "p3.8xlarge", "p4d.24xlarge", "p5.48xlarge")
"""The machines that are compared unless the user names one."""


@dataclass(frozen=True)
class Need:
    """What a machine wants of the loader, and what it gets; images a second are of all its GPUs."""

    machine: str
    gpu: str
    gpus: int
    vcpus: int
    wanted_images_per_second: float
    source: str
    """Of what is wanted, in words."""
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


def need(machine: Machine, resolution: int, a_thread: float) -> Need:
    """Returns what a rented machine wants at a resolution in pixels, and what it gets.

    Args:
        a_thread: images a second that the loader delivers on one of its threads.
    """
    assert machine.gpu is not None
    a_gpu = images_per_second(machine.gpu, REFERENCE, resolution, gpus=machine.gpus)
    return Need(
        machine=machine.name,
        gpu=machine.gpu,
        gpus=machine.gpus,
        vcpus=machine.vcpus,
        wanted_images_per_second=round(a_gpu.value * machine.gpus, 1),
        source=a_gpu.source,
        expected_images_per_second=round(a_thread * machine.vcpus, 1),
    )
