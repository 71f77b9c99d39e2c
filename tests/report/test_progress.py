"""Progress: lines that stay in place on a terminal, few plain ones elsewhere."""

import io
from typing import Any

import pytest
from rich.console import Console

from pitstop.core.recipe import parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.report.progress import Progress

PHASES = [
    {"name": "small", "duration": "4ep", "resolution": 32, "batch_size": 100},
    {"name": "large", "duration": "2ep", "resolution": 64, "batch_size": 50},
]
TIMELINE = Timeline(parse_recipe({"phases": PHASES}, "test"), num_samples=1000)
"""40 steps of 100 images at 32 px, then 40 steps of 50 images at 64 px."""


class Shown:
    """A progress display on a console that is kept, under a clock that stands."""

    def __init__(self, *, terminal: bool = False, **environment: str) -> None:
        self.file = io.StringIO()
        self.now = 0.0
        # In colour unless the environment says no, as on a real terminal.
        environ = {"TERM": "xterm-256color", **environment}
        console = Console(file=self.file, force_terminal=terminal, width=100, _environ=environ)
        self.progress = Progress(console, TIMELINE, "digits", clock=lambda: self.now)

    def update(self, step: int, **changed: Any) -> str:
        """Returns what an update adds."""
        before = len(self.file.getvalue())
        values = {
            "epoch": TIMELINE.epoch(step),
            "phase": "small",
            "loss": 1.25,
            "top1": 61.5,
            "lr": 0.1,
            "images_per_second": 100.0,
            "wait_share": 0.03,
            "memory_mb": 2100.0,
        }
        self.progress.update(step, **values | changed)
        return self.file.getvalue()[before:]


def test_plain_lines_are_rare_and_plain() -> None:
    shown = Shown()
    with shown.progress:
        assert shown.update(1)
        for second in range(1, 10):
            shown.now = float(second)
            assert shown.update(1 + second) == ""
        shown.now = 10.0
        line = shown.update(11)
    assert line.count("\n") == 1
    for fact in ("digits", "13%", "small", "32 px", "batch 100", "loss 1.25", "top-1 61.5%"):
        assert fact in line
    for fact in ("epoch 1.10/6", "lr 0.1", "100 images/s", "wait 3%", "2.10 GB", "ETA"):
        assert fact in line
    assert "\x1b" not in shown.file.getvalue()


def test_each_evaluation_and_each_message_is_printed_at_once() -> None:
    shown = Shown()
    with shown.progress:
        shown.update(1)
        line = shown.update(10, val_top1=71.25, best_top1=72.5)
        assert "val 71.25%" in line
        assert "best 72.50%" in line
        assert shown.update(11) == ""
        shown.progress.say("saved [bold] :smile: " + "x" * 200)
    assert shown.file.getvalue().endswith("saved [bold] :smile: " + "x" * 200 + "\n")


def test_a_terminal_is_redrawn_in_place() -> None:
    shown = Shown(terminal=True)
    with shown.progress:
        shown.update(10, val_top1=71.25, best_top1=72.5)
        again = shown.update(12)
    assert again.startswith("\r\x1b[2K\x1b[1A\x1b[2K\x1b[1A\x1b[2K"), "three lines are replaced"
    assert again.count("\n") == 2
    assert "val 71.25%" in again, "the last evaluation stays"
    assert "12/80" in again


def test_no_color_is_respected() -> None:
    coloured, plain = Shown(terminal=True), Shown(terminal=True, NO_COLOR="1")
    for shown in (coloured, plain):
        with shown.progress:
            shown.update(10)
    assert "\x1b[38;" in coloured.file.getvalue() or "\x1b[9" in coloured.file.getvalue()
    assert "\x1b[38;" not in plain.file.getvalue()
    assert "\x1b[9" not in plain.file.getvalue()


def test_an_error_leaves_the_terminal_in_order() -> None:
    shown = Shown(terminal=True)
    with pytest.raises(ZeroDivisionError), shown.progress:
        shown.update(1 // 0)
    assert "\x1b[?25l" in shown.file.getvalue(), "the cursor was hidden"
    assert "\x1b[?25h" in shown.file.getvalue(), "the cursor is back"


def eta(line: str) -> int:
    hours, minutes, seconds = line.split("ETA ")[1].split()[0].split(":")
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds)


def test_the_remaining_time_counts_the_pixels_to_come() -> None:
    shown = Shown()
    # 30 x 100 images here, and 40 x 50 that are four times as large.
    assert eta(shown.update(10, val_top1=1.0)) == 30 + 4 * 20
    # Past the border the new speed counts, not the average with the old one.
    slow = {"val_top1": 1.0, "images_per_second": 25.0}
    assert eta(shown.update(41, **slow)) == 39 * 50 / 25
    assert eta(shown.update(80, **slow)) == 0


def test_the_remaining_time_is_steady() -> None:
    shown = Shown()
    before = eta(shown.update(10, val_top1=1.0))
    hiccup = eta(shown.update(10, val_top1=1.0, images_per_second=50.0))
    assert before < hiccup < 1.3 * before


def test_without_a_speed_there_is_no_remaining_time() -> None:
    assert "ETA -:--:--" in Shown().update(1, images_per_second=0.0)
