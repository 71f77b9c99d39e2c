"""The running sums of training: kept on the device, read now and then."""

import math
import time
from dataclasses import dataclass

import torch

from pitstop.core.timeline import StepSettings
from pitstop.runtime.ranks import Ranks

FLUSH_SECONDS = 2.0
"""Reading the sums waits for the device: so often at most, but for evaluations and saves."""


@dataclass(frozen=True)
class Reading:
    """Training since the last reading, on all ranks."""

    first: StepSettings
    last: StepSettings
    images: int
    loss: float
    """Summed over the images."""
    top1: int
    """Images that had their class first."""
    top5: int
    """Images that had it among the first five."""
    seconds: float
    wait_seconds: float
    """Of these, waiting for data, on the rank that waited longest."""

    @property
    def mean_loss(self) -> float:
        return self.loss / self.images

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)


class Meter:
    """Adds up what `train_step` returns on each rank."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._reset()

    def _reset(self) -> None:
        self._metrics: list[torch.Tensor] = []
        self._settings: list[StepSettings] = []
        self._waited = 0.0
        self._since = time.perf_counter()

    def resume(self) -> None:
        """Leaves out the time since the last reading: it was not spent on training."""
        assert not self._metrics
        self._since = time.perf_counter()

    def add(self, settings: StepSettings, metrics: torch.Tensor, waited: float) -> None:
        """Adds a step: its metrics float32 [3], still on the device, and the wait for its data."""
        self._settings.append(settings)
        self._metrics.append(metrics)
        self._waited += waited

    def due(self) -> bool:
        """Tells whether it is time to read the sums."""
        return time.perf_counter() - self._since >= FLUSH_SECONDS

    def flush(self) -> Reading | None:
        """Returns the sums since the last time over all ranks, None if there was no step.

        All ranks call this after the same step.
        """
        if not self._metrics:
            return None
        sums = torch.stack(self._metrics).cpu().double().sum(0).tolist()
        everyone = self._ranks.gather([*sums, self._waited])
        loss, top1, top5, _ = everyone.sum(0).tolist()
        reading = Reading(
            first=self._settings[0],
            last=self._settings[-1],
            images=sum(settings.segment.batch_size for settings in self._settings),
            loss=loss,
            top1=int(top1),
            top5=int(top5),
            seconds=time.perf_counter() - self._since,
            wait_seconds=everyone[:, 3].max().item(),
        )
        self._reset()
        return reading
