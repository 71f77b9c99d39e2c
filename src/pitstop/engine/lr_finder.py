"""The learning-rate finder: a range test through `train_step`, and what its curve suggests.

The lr rises exponentially while the model trains on the run's first images; the curve of losses
shows from where on training fails (Smith, "Cyclical learning rates for training neural networks",
arXiv 1506.01186, section 3.3). The model, all that goes with it, and torch's random numbers are
afterwards what they were before.
"""

import io
import json
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pitstop.core.recipe import LrFinder
from pitstop.core.timeline import Timeline
from pitstop.data.load import Loader
from pitstop.data.packed import PackedDataset
from pitstop.engine.state import TrainState
from pitstop.engine.step import Stage, train_step
from pitstop.io.storage import write_text
from pitstop.runtime.checkpoint import parse
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

DIVERGED = 4.0
"""A smoothed loss so many times its lowest ends the test, as in fastai's."""

WINDOW = 0.1
"""The smoothing looks back over so much of the test: it sees the lowest loss late by the same
factor of the lr, however many iterations there are. fastai's always looks back over 50."""

LEAST_WINDOW = 5.0
"""Iterations that the smoothing looks back over at least."""

LEAST = 10
"""Losses that make a curve."""

FLAT = 0.01
"""A loss that changes by less than this part of itself stays where it is."""

NOISY = 6.0
"""A fall must be so many standard deviations of the smoothed loss deep."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Suggestion:
    """The lr that a curve suggests."""

    lr: float
    """Within floor and cap."""
    at: int
    """The place in the curve that the policy has chosen: of the lowest loss for `min0.1`."""
    why: str
    """How it came about."""


@dataclass(frozen=True)
class NoSuggestion:
    """A curve that suggests nothing."""

    reason: str


@dataclass(frozen=True)
class Search:
    """A range test and its result. `losses` end where the test ended."""

    spec: LrFinder
    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    result: Suggestion | NoSuggestion

    @cached_property
    def peak(self) -> float:
        """The lr that the recipe's `auto` stands for."""
        if isinstance(self.result, NoSuggestion):
            return self.spec.fallback
        return self.result.lr * self.spec.multiplier

    def explained(self) -> str:
        """Returns how the peak came about, in a line."""
        if isinstance(self.result, NoSuggestion):
            return (
                f"peak lr {self.peak:.4g}: the declared fallback, as the search has no suggestion: "
                f"{self.result.reason}"
            )
        times = f" x {self.spec.multiplier:g}" if self.spec.multiplier != 1 else ""
        return f"peak lr {self.peak:.4g}: found {self.result.lr:.4g}{times} ({self.result.why})"

    def as_record(self) -> dict[str, Any]:
        """Returns the curve and its result as plain data; None stands for what is not finite."""
        found = self.result if isinstance(self.result, Suggestion) else None
        return {
            "policy": self.spec.policy,
            "peak": self.peak,
            "suggestion": None if found is None else found.lr,
            "at": None if found is None else found.at,
            "explained": self.explained(),
            "lrs": list(self.lrs),
            "losses": _finite_or_none(self.losses),
            "smoothed": _finite_or_none(smoothed(self.losses, self.spec.iterations)),
        }


def _finite_or_none(values: Sequence[float] | Array) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]


def swept(spec: LrFinder) -> Array:
    """Returns the lr of each iteration, float64 [iterations]."""
    return np.geomspace(spec.start_lr, spec.end_lr, spec.iterations)


def write_curve(path: Path, search: Search) -> None:
    """Writes the curve as CSV: iteration, lr, loss, smoothed."""
    smooth = smoothed(search.losses, search.spec.iterations)
    rows = zip(count(), search.lrs, search.losses, smooth, strict=False)
    lines = [f"{i},{lr:.6g},{loss:.6g},{mean:.6g}\n" for i, lr, loss, mean in rows]
    write_text(path, "iteration,lr,loss,smoothed\n" + "".join(lines))


# The test


def search(
    spec: LrFinder,
    timeline: Timeline,
    data: PackedDataset,
    state: TrainState,
    device: Device,
    ranks: Ranks,
    *,
    workers: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Search | None:
    """Tests the learning rates of `spec` on the run's first batches; returns None if stopped.

    All ranks call this. The steps are those of the run's first segment, over and over where it is
    shorter than the test, with all that they come with but the lr. They are not compiled: that
    takes longer than so few steps gain.

    Args:
        spec: the recipe's.
        timeline: the run's.
        data: what the run trains on.
        state: at the step where the run begins; the same bits afterwards.
        device, ranks: what the run uses.
        workers: threads that decode images.
        should_stop: asked before each iteration; one rank that says yes stops all.
    """
    segment = timeline.segments[0]
    losses: list[float] = []
    lrs = swept(spec)
    smoothing = Smoothing(spec.iterations)
    with untouched(state, device):
        stage = Stage(segment, state, replace(device, compile=False), ranks, len(data.classes))
        with Loader(
            data.train,
            timeline,
            [i % segment.last for i in range(spec.iterations)],
            rank=ranks.rank,
            world=ranks.world,
            workers=workers,
            prefetch=segment.recipe.prefetch,
            pin_memory=device.pin_memory,
        ) as loader:
            for lr, batch in zip(lrs.tolist(), device.prefetch(loader), strict=True):
                ranks.begin(f"finding the lr: iteration {len(losses)}")
                settings = replace(timeline.settings_at(batch.step), lr=lr)
                loss, *_ = train_step(stage, state, batch, settings).tolist()
                everyone = ranks.gather([loss, should_stop()]).sum(0).tolist()
                if everyone[1]:
                    return None
                losses.append(everyone[0] / segment.batch_size)
                if smoothing.add(losses[-1]) > DIVERGED * smoothing.lowest:
                    break
                if not math.isfinite(losses[-1]):
                    break
    tried = lrs[: len(losses)].tolist()
    result = _as_rank_0(suggest(tried, losses, spec), ranks)
    return Search(spec, tuple(tried), tuple(losses), result)


def _as_rank_0(result: Suggestion | NoSuggestion, ranks: Ranks) -> Suggestion | NoSuggestion:
    """Returns rank 0's result on all: another processor may round otherwise."""
    said = json.loads(ranks.from_main(json.dumps(asdict(result)).encode() if ranks.main else None))
    return NoSuggestion(**said) if "reason" in said else Suggestion(**said)


@contextmanager
def untouched(state: TrainState, device: Device) -> Generator[None]:
    """Gives the state and torch's random numbers back as they were, to the bit."""
    saved = io.BytesIO()
    torch.save(state.state_dict(), saved)  # on the host: a GPU may have no room for two
    groups = [dict(group) for group in state.optimizer.param_groups]
    trained = [(parameter, parameter.requires_grad) for parameter in state.model.parameters()]
    modes = [(module, module.training) for module in state.model.modules()]
    gpus = [device.torch_device] if device.torch_device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            state.optimizer.zero_grad(set_to_none=True)
            state.load(parse(saved.getvalue()))
            for group, before in zip(state.optimizer.param_groups, groups, strict=True):
                group.clear()
                group.update(before)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
            for module, training in modes:
                module.training = training


# The curve


def _beta(iterations: int) -> float:
    return 1 - 1 / max(LEAST_WINDOW, WINDOW * iterations)


class Smoothing:
    """A running mean that forgets exponentially, without bias at its start (as Adam's)."""

    def __init__(self, iterations: int) -> None:
        self._beta = _beta(iterations)
        self._sum = self._weight = 0.0
        self.lowest = math.inf

    def add(self, loss: float) -> float:
        """Returns the mean with one loss more."""
        self._sum = self._beta * self._sum + (1 - self._beta) * loss
        self._weight = self._beta * self._weight + (1 - self._beta)
        mean = self._sum / self._weight
        self.lowest = min(self.lowest, mean)
        return mean


def smoothed(losses: Sequence[float], iterations: int) -> Array:
    """Returns the losses of a test of so many iterations smoothed, float64 [n]."""
    smoothing = Smoothing(iterations)
    return np.array([smoothing.add(loss) for loss in losses])


def suggest(
    lrs: Sequence[float], losses: Sequence[float], spec: LrFinder
) -> Suggestion | NoSuggestion:
    """Returns what a curve suggests, or why it suggests nothing.

    A loss that is not finite ends the curve: training has failed there. The first tenth counts for
    nothing but the loss that it begins with, as in fastai's.

    Args:
        lrs: of each iteration, ascending.
        losses: of each iteration, means over the global batch.
        spec: the recipe's.
    """
    raw = np.asarray(losses, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(raw))
    length = int(bad[0]) if len(bad) else len(raw)
    curve = smoothed(losses[:length], spec.iterations)
    if (reason := _problem(lrs, raw[:length], curve, spec, failed=len(bad) > 0)) is not None:
        return NoSuggestion(reason)
    skip = length // 10
    low = skip + int(curve[skip:].argmin())
    match spec.policy:
        case "min0.1":
            at, lr = low, lrs[low] / 10
            how = f"a tenth of lr {lrs[low]:.4g}, where the loss is lowest"
        case "steepest":
            slopes = np.diff(curve[skip : low + 1]) / np.diff(np.log(lrs[skip : low + 1]))
            at = skip + int(slopes.argmin())
            lr, how = lrs[at], "where the loss falls fastest"
        case "valley":
            fall = longest_fall(curve[skip:])
            at = skip + fall[len(fall) // 2]
            lr, how = lrs[at], "halfway down the longest fall of the loss"
    if spec.floor is not None and lr < spec.floor:
        return Suggestion(spec.floor, at, f"the floor; the policy says {lr:.4g}: {how}")
    if spec.cap is not None and lr > spec.cap:
        return Suggestion(spec.cap, at, f"the cap; the policy says {lr:.4g}: {how}")
    return Suggestion(lr, at, how)


def _problem(
    lrs: Sequence[float], raw: Array, curve: Array, spec: LrFinder, *, failed: bool
) -> str | None:
    """Returns what is wrong with a curve of finite losses, None if nothing is."""
    length = len(raw)
    if length < LEAST:
        if failed:
            where = f"at lr {lrs[length]:.3g}, after {length} iterations"
            return f"the loss is not finite {where}: lower start_lr"
        if length and curve[-1] > DIVERGED * curve.min():
            return f"the loss diverges within {length} iterations: lower start_lr"
        return f"{length} iterations are too few for a curve: give it {LEAST} or more"
    skip = length // 10
    begin, low = curve[skip], skip + int(curve[skip:].argmin())
    fall, rise = begin - curve[low], curve[skip:].max() - begin
    single = float(np.diff(raw[: max(low, LEAST)]).std()) / math.sqrt(2)
    beta = _beta(spec.iterations)
    noise = NOISY * single * math.sqrt((1 - beta) / (1 + beta))
    flat = FLAT * abs(begin)
    if fall <= max(flat, noise):
        if failed or rise > max(flat, noise):
            return "the loss never falls, it only rises: lower start_lr"
        if noise <= flat:
            return f"the loss is flat, {begin:.4g} from begin to end: raise end_lr"
        return (
            f"the loss is noisy: it falls by {fall:.3g}, and single ones differ by {single:.3g}: "
            "raise batch_size or iterations"
        )
    diverged = failed or curve[-1] > DIVERGED * curve[low]
    if not diverged and low >= length - max(1, length // 20):
        return f"the loss is still falling at lr {lrs[length - 1]:.3g}: raise end_lr"
    return None


def longest_fall(values: Array) -> list[int]:
    """Returns the places of the longest strictly decreasing subsequence."""
    lengths = np.ones(len(values), dtype=np.int64)
    before = np.full(len(values), -1)
    for i in range(1, len(values)):
        reached = np.where(values[:i] > values[i], lengths[:i], 0)
        if reached.any():
            before[i] = reached.argmax()
            lengths[i] = reached.max() + 1
    at, places = int(lengths.argmax()), list[int]()
    while at >= 0:
        places.append(at)
        at = int(before[at])
    return places[::-1]
