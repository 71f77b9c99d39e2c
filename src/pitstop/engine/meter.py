"""The running sums of training: kept on the device, read now and then."""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pitstop.core.timeline import StepSettings
from pitstop.runtime.ranks import Ranks

HISTORY = 100
"""Steps whose gradient norms are kept, for when one is not finite."""

SHOWN = 5

MIX_1, MIX_2, MIX_3 = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xBF58476D1CE4E5B9
"""Odd 64-bit numbers: of SplitMix64 and its kin."""

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
    ids: int
    """The sum of `fingerprint`s of the steps: which images they saw, in which order."""
    seconds: float
    wait_seconds: float
    """Of these, waiting for data, on the rank that waited longest."""
    finite_gradients: bool = True
    grad_norm: float | None = None
    """The largest finite norm of a step's gradient, before clipping."""
    trouble: "Trouble | None" = None
    """The first step whose loss or gradient was not finite."""

    @property
    def mean_loss(self) -> float:
        return self.loss / self.images

    @property
    def finite_loss(self) -> bool:
        return math.isfinite(self.loss)


@dataclass(frozen=True)
class Trouble:
    """What is known of a step that was not finite, as this rank saw it."""

    step: int
    lr: float
    loss_is_finite: bool
    layers: tuple[str, ...]
    """Whose gradients are not finite, from the output to the input, as they are computed; none
    where those of all layers are not."""
    norms: tuple[float, ...]
    """Of the gradients of the steps before, up to HISTORY, the latest last."""
    largest: tuple[str, float] | None
    """Of the last step before: the layer with the largest gradient, and its share of the norm."""

    def explained(self) -> str:
        """Returns it as a line, without the step."""
        what = "the gradient" if self.loss_is_finite else "the loss"
        if self.layers:
            first, more = self.layers[0], len(self.layers) - 1
            what += f", first of {first}" + (f" and then of {more} more layers" if more else "")
        norms = " ".join(f"{norm:.3g}" for norm in self.norms[-SHOWN:])
        line = f"{what}, at lr {self.lr:.3g}"
        line += f"; norm of the gradient before: {norms}" if norms else ""
        if self.largest is None:
            return line
        layer, share = self.largest
        return f"{line}; the largest was that of {layer}, {100 * share:.0f}% of it"


def fingerprint(step: int, rows: slice, ids: np.ndarray) -> int:
    """Returns a sum over images that tells which ones a step saw, and in which order.

    Those of all ranks, and of many steps, add up to what one rank alone would have: each image
    counts with less than 2^28, so that a float64 holds 2^25 of them exactly.

    Args:
        rows: of the global batch, in which the images are.
        ids: int64 [B].
    """
    place = np.arange(rows.start, rows.stop, dtype=np.uint64)
    mixed = ids.astype(np.uint64) * np.uint64(MIX_1) + place + np.uint64(step * MIX_2 % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(MIX_3)
    return int((mixed >> np.uint64(36)).sum())


class Meter:
    """Adds up what `train_step` returns on each rank."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._history: deque[float] = deque(maxlen=HISTORY)
        self._reset()

    def _reset(self) -> None:
        self._metrics: list[torch.Tensor] = []
        self._settings: list[StepSettings] = []
        self._layers: list[Sequence[str]] = []
        self._ids = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def resume(self) -> None:
        """Leaves out the time since the last reading: it was not spent on training."""
        assert not self._metrics
        self._since = time.perf_counter()

    def add(
        self,
        settings: StepSettings,
        metrics: torch.Tensor,
        waited: float,
        layers: Sequence[str] = (),
        ids: np.ndarray | None = None,
        rows: slice = slice(0, 0),
    ) -> None:
        """Adds a step.

        Args:
            metrics: of `train_step`, float32 [3 + P], still on the device.
            waited: seconds, for its data.
            layers: the P names.
            ids: of the images that it saw, int64 [B].
            rows: of the global batch, which these are.
        """
        self._settings.append(settings)
        self._metrics.append(metrics)
        self._layers.append(layers)
        self._ids += 0 if ids is None else fingerprint(settings.step, rows, ids)
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
        steps = torch.stack([metrics[:3] for metrics in self._metrics]).cpu().double()
        sums = steps.sum(0).tolist()
        norms = torch.stack([torch.linalg.vector_norm(m[3:]) for m in self._metrics]).tolist()
        everyone = self._ranks.gather([*sums, self._waited, self._ids])
        loss, top1, top5, _, ids = everyone.sum(0).tolist()
        reading = Reading(
            first=self._settings[0],
            last=self._settings[-1],
            images=sum(settings.segment.batch_size for settings in self._settings),
            loss=loss,
            top1=int(top1),
            top5=int(top5),
            ids=int(ids),
            seconds=time.perf_counter() - self._since,
            wait_seconds=everyone[:, 3].max().item(),
            finite_gradients=all(map(math.isfinite, norms)),
            grad_norm=max(filter(math.isfinite, norms), default=None),
            trouble=self._trouble(steps[:, 0].tolist(), norms),
        )
        self._history += norms
        self._reset()
        return reading

    def _trouble(self, losses: Sequence[float], norms: Sequence[float]) -> Trouble | None:
        """Returns the first step that is not finite, given those of this rank."""
        finite = [math.isfinite(a) and math.isfinite(b) for a, b in zip(losses, norms, strict=True)]
        if all(finite):
            return None
        i = finite.index(False)
        layers = self._layers[i]
        bad = (~torch.isfinite(self._metrics[i][3:])).nonzero().flatten().tolist()
        settings = self._settings[i]
        return Trouble(
            step=settings.step,
            lr=settings.lr,
            loss_is_finite=math.isfinite(losses[i]),
            layers=tuple(layers[int(j)] for j in reversed(bad)) if len(bad) < len(layers) else (),
            norms=(*self._history, *norms[:i])[-HISTORY:],
            largest=self._largest(i - 1, norms[i - 1]) if i > 0 else None,
        )

    def _largest(self, i: int, norm: float) -> tuple[str, float] | None:
        each = self._metrics[i][3:]
        if norm == 0 or len(each) != len(self._layers[i]):
            return None
        j = int(each.argmax())
        return self._layers[i][j], float(each[j]) / norm
