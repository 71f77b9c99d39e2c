"""The running sums of training: kept on the device, read now and then."""

import math
import time
from dataclasses import dataclass

import torch

from pitstop.core.timeline import StepSettings, Timeline
from pitstop.io.records import Records

FLUSH_SECONDS = 2.0
"""Reading the sums waits for the device: so often at most, but for evaluations and saves."""


@dataclass(frozen=True)
class Reading:
    """Training since the last reading: means and rates over its images."""

    loss: float
    top1: float
    images_per_second: float
    wait_share: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)


class Meter:
    """Adds up what `train_step` returns and records the sums.

    Args:
        records: where each reading becomes a `train` event.
        timeline: the run's.
    """

    def __init__(self, records: Records, timeline: Timeline) -> None:
        self._records = records
        self._timeline = timeline
        self.images = 0
        """Trained by this process."""
        self.seconds = 0.0
        """Spent on them."""
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
        """Reads and records the sums since the last time, None if there was no step.

        Sums that are not finite are not recorded: the caller ends the run.
        """
        if not self._metrics:
            return None
        loss, top1, top5 = torch.stack(self._metrics).cpu().double().sum(0).tolist()
        first, last = self._settings[0], self._settings[-1]
        images = sum(settings.segment.batch_size for settings in self._settings)
        seconds = time.perf_counter() - self._since
        reading = Reading(
            loss / images, 100 * top1 / images, images / seconds, self._waited / seconds
        )
        if reading.finite:
            self._records.add(
                "train",
                last.step + 1,
                first=first.step,
                epoch=self._timeline.epoch(last.step + 1),
                **described(last),
                images=images,
                loss=loss,
                top1=int(top1),
                top5=int(top5),
                seconds=round(seconds, 4),
                wait_seconds=round(self._waited, 4),
            )
        self.images += images
        self.seconds += seconds
        self._reset()
        return reading


def described(settings: StepSettings) -> dict[str, object]:
    """Returns what events say of a step's settings."""
    segment = settings.segment
    return {
        "phase": segment.phase.name,
        "resolution": segment.resolution,
        "batch_size": segment.batch_size,
        "lr": settings.lr,
        "momentum": settings.momentum,
    }
