"""Who `pitstop doctor` examines: what the checks need, and leave for one another."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from pitstop.core.machine import cores
from pitstop.core.recipe import Recipe
from pitstop.core.timeline import Segment, Timeline
from pitstop.data.packed import PackedDataset
from pitstop.engine.calibrate import kinds
from pitstop.engine.footprint import Footprint, footprint
from pitstop.engine.verify import Verdict
from pitstop.plan.cost import IMAGENET
from pitstop.report.diagnosis import Finding
from pitstop.runtime.devices import Device

T = TypeVar("T")

GIB = 2**30


class SkippedError(Exception):
    """A check cannot be done here; the message says why."""


@dataclass
class Patient:
    """What is examined, and what the checks have found so far: None where they could not."""

    recipe: Recipe
    """Names the data, or none."""
    thorough: bool
    """Whether the checks that take minutes are done."""
    scratch: Path
    """A directory for what is made in passing."""
    say: Callable[[str], None]
    device: Device | None = None
    data: PackedDataset | None = None
    speeds: dict[int, float] | None = None
    """Images a second of one device in training, data apart, by resolution."""
    resumed: Verdict | None = None

    @property
    def workers(self) -> int:
        """Threads that decode."""
        return cores() if self.recipe.workers == "auto" else self.recipe.workers

    @property
    def num_classes(self) -> int:
        """Those of the data; without, ImageNet's."""
        return 1000 if self.data is None else len(self.data.classes)

    @property
    def gpus(self) -> int:
        """GPUs that a training here would use."""
        on_cuda = self.device is not None and self.device.torch_device.type == "cuda"
        return torch.cuda.device_count() if on_cuda else 0

    def need_device(self) -> Device:
        """Returns the device."""
        return needed(self.device, "there is no device to do it on")

    def need_data(self) -> PackedDataset:
        """Returns the dataset."""
        missing = self.recipe.data is None
        return needed(
            self.data, "no data: give --data" if missing else "the data could not be opened"
        )

    def need_speeds(self) -> dict[int, float]:
        """Returns how fast it trains."""
        return needed(self.speeds, "how fast it trains is not known")

    def need_time(self) -> None:
        """Asks for minutes."""
        if not self.thorough:
            raise SkippedError("takes minutes: leave --quick out")

    def largest_segment(self) -> Segment:
        """Returns the segment whose steps have the most pixels."""
        timeline = Timeline.planned(self.recipe, IMAGENET)
        return max(kinds(timeline), key=lambda s: s.batch_size * s.resolution**2)

    def largest_step(self) -> Footprint:
        """Returns what a step of that segment takes of each device."""
        segment, ranks = self.largest_segment(), max(1, self.gpus)
        return footprint(self.recipe, segment, num_classes=self.num_classes, ranks=ranks)


Check = Callable[[Patient], Finding]


def needed(value: T | None, why: str) -> T:
    """Returns what a check needs; raises SkippedError where it is not known, and says why."""
    if value is None:
        raise SkippedError(why)
    return value


def size_text(count: float) -> str:
    """Returns bytes as text."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"
