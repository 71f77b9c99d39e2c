"""Progress on the terminal: a few lines that stay in place, or plain lines where there is none."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pitstop.core.timeline import Segment, Timeline

PLAIN_EVERY = 10.0
"""Seconds from one plain line to the next, evaluations and messages aside."""

NEWEST = 0.25
"""The weight of the newest measurement in the speed that the remaining time is computed from."""


@dataclass(frozen=True)
class _Now:
    """What the last update said."""

    step: int
    epoch: float
    phase: str
    loss: float
    top1: float
    lr: float
    images_per_second: float
    wait_share: float
    memory_mb: float
    remaining: float | None
    """Seconds, None as long as it is not known."""


class Progress:
    """Shows how a run goes, as a context manager.

    On a terminal, three lines are redrawn in place at each update; no thread is started. Elsewhere
    a plain line is printed at an update after an evaluation, and otherwise every PLAIN_EVERY
    seconds.
    """

    def __init__(
        self,
        console: Console,
        timeline: Timeline,
        title: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._timeline = timeline
        self._title = title
        self._clock = clock
        self._started = clock()
        self._printed = -float("inf")
        self._speed: tuple[Segment, float] | None = None
        self._val: tuple[float | None, float | None] = (None, None)
        in_place = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, auto_refresh=False) if in_place else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Prints a line above the display, as it is."""
        self._console.print(Text(text), soft_wrap=True)

    def update(
        self,
        step: int,
        epoch: float,
        phase: str,
        loss: float,
        top1: float,
        lr: float,
        images_per_second: float,
        wait_share: float,
        memory_mb: float,
        val_top1: float | None = None,
        best_top1: float | None = None,
    ) -> None:
        """Shows the state after `step` steps; to be called every second or two.

        Args:
            step: steps done.
            epoch: epochs done.
            phase: the phase's name.
            loss: the mean since the last update.
            top1: of training, in percent.
            lr: of the last step.
            images_per_second: of training.
            wait_share: 0 to 1, of the time, spent waiting for data.
            memory_mb: the peak.
            val_top1: in percent; only at the first update after an evaluation.
            best_top1: the best so far, in percent, given along with `val_top1`.
        """
        remaining = self._remaining(step, images_per_second)
        evaluated = val_top1 is not None
        if evaluated:
            self._val = (val_top1, best_top1)
        now = _Now(
            step, epoch, phase, loss, top1, lr, images_per_second, wait_share, memory_mb, remaining
        )
        if self._live is not None:
            self._live.update(self._display(now), refresh=True)
        elif evaluated or self._clock() - self._printed >= PLAIN_EVERY:
            self._printed = self._clock()
            self.say(self._plain(now))

    def _remaining(self, step: int, images_per_second: float) -> float | None:
        """Returns the seconds of training that are left, in segments of different cost.

        An image costs in proportion to its pixels; the speed is a moving average of what was
        measured in the segment.
        """
        here = self._segment(step)
        if images_per_second > 0:
            measured, before = self._speed or (here, images_per_second)
            before = before if measured is here else images_per_second
            self._speed = here, before + NEWEST * (images_per_second - before)
        if self._speed is None:
            return None
        measured, speed = self._speed
        ahead = self._timeline.segments_from(step)
        pixels = sum(
            len(s.steps_from(step)) * s.batch_size * s.resolution * s.resolution for s in ahead
        )
        return pixels / measured.resolution**2 / speed

    def _segment(self, step: int) -> Segment:
        """Returns the segment of the last step done."""
        return self._timeline.segment_at(max(0, step - 1))

    def _where(self, now: _Now) -> list[str]:
        segment = self._segment(now.step)
        return [
            f"epoch {now.epoch:.2f}/{self._timeline.epochs:.4g}",
            now.phase,
            f"{segment.resolution} px",
            f"batch {segment.batch_size:,}",
            f"lr {now.lr:.3g}",
            f"{now.memory_mb / 1000:.2f} GB",
        ]

    def _how(self, now: _Now) -> list[str]:
        val, best = self._val
        return [
            f"loss {now.loss:.4g}",
            f"top-1 {now.top1:.1f}%",
            *([f"val {val:.2f}%"] if val is not None else []),
            *([f"best {best:.2f}%"] if best is not None else []),
            f"{now.images_per_second:,.0f} images/s",
            f"wait {now.wait_share:.0%}",
        ]

    def _plain(self, now: _Now) -> str:
        facts = [*self._where(now), *self._how(now), f"ETA {_time(now.remaining)}"]
        return "  ".join([self._title, _share(now.step, self._timeline.last), *facts])

    def _display(self, now: _Now) -> Group:
        last = self._timeline.last
        top = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, 1, None, None):
            top.add_column(ratio=ratio, no_wrap=True)
        top.add_row(
            Text(self._title, style="bold"),
            ProgressBar(total=last, completed=now.step),
            Text(f"{_share(now.step, last)}  {now.step:,}/{last:,} steps"),
            Text(f"{_time(self._clock() - self._started)}, ETA {_time(now.remaining)}"),
        )
        return Group(top, _line(self._where(now)), _line(self._how(now)))


def _line(facts: list[str]) -> Text:
    return Text(" · ".join(facts), no_wrap=True, overflow="ellipsis")


def _share(step: int, last: int) -> str:
    return f"{100 * step // last:3d}%"


def _time(seconds: float | None) -> str:
    """Returns h:mm:ss."""
    if seconds is None:
        return "-:--:--"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
