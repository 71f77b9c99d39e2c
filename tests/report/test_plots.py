"""Plots: they show what there is, and whatever happens to them is no concern of the training."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pitstop.io import pictures
from pitstop.io.run_directory import RunDirectory
from pitstop.report import plots
from pitstop.report.plots import draw, read_history
from pitstop.report.plotter import HANGS_AFTER, Plotter

NAMES = {*plots.PANELS, "overview"}


def common(step: int, steps: int) -> dict[str, Any]:
    late = step > steps // 2
    return {
        "step": step,
        "epoch": step / 10,
        "phase": "main, which has a long name" if late else "warm",
        "resolution": 64 if late else 32,
        "batch_size": 50,
        "lr": math.sin(math.pi * step / steps),
        "momentum": 0.9,
        "wall_seconds": 3.0 * step,
    }


def train(step: int, steps: int = 40, **changed: Any) -> dict[str, Any]:
    counts = {
        "first": step - 2,
        "images": 100,
        "top1": step,
        "top5": 2 * step,
        "loss": 300.0 / step,
    }
    times = {"seconds": 5.0, "wait_seconds": 0.1}
    return {"kind": "train", **common(step, steps), **counts, **times, **changed}


def val(step: int, steps: int = 40, **changed: Any) -> dict[str, Any]:
    scores = {"loss": 4.0 / step, "top1": float(step), "top5": 2.0 * step, "images": 100}
    costs = {"seconds": 1.0, "memory_mb": 100.0}
    return {"kind": "val", **common(step, steps), **scores, **costs, **changed}


def run_of(path: Path, *events: dict[str, Any]) -> RunDirectory:
    run = RunDirectory(path / "a-run")
    run.path.mkdir()
    run.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def whole(steps: int = 40) -> list[dict[str, Any]]:
    return [
        event
        for step in range(2, steps + 1, 2)
        for event in [train(step, steps), *([val(step, steps)] if step % 10 == 0 else [])]
    ]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"), dtype=np.float32)


def test_a_run_is_drawn_in_legible_sizes(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"kind": "note", "step": 0, "text": "hello"}, *whole())
    written = draw(run)
    assert {path.name for path in run.plots.iterdir()} == {f"{name}.png" for name in NAMES}
    assert sorted(written) == sorted(run.plots.iterdir())
    for path in written:
        image = pixels(path)
        assert image.shape == ((1110, 1950) if path.stem == "overview" else (675, 1200))
        assert image.std() > 10


STATES = {
    "one record": [train(2)],
    "an evaluation alone": [val(10)],
    "diverged": [
        train(2),
        train(4, loss=math.inf),
        val(4, loss=math.inf, top1=math.nan),
        train(6, loss=math.nan),
        train(8, images=0),
    ],
    "only nan": [train(2, loss=math.nan), val(2, loss=math.nan, top1=math.nan, top5=math.nan)],
}


@pytest.mark.parametrize("events", STATES.values(), ids=STATES)
def test_what_there_is_is_drawn(
    tmp_path: Path, events: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "DPI", 40)
    written = draw(run_of(tmp_path, *events))
    assert {path.stem for path in written} == NAMES
    assert all(pixels(path).std() > 1 for path in written)


@pytest.mark.parametrize("events", [[], [{"kind": "note", "step": 0, "text": "hello"}]])
def test_before_the_first_record_there_is_nothing(tmp_path: Path, events: list[Any]) -> None:
    run = run_of(tmp_path, *events)
    assert draw(run) == []
    assert not run.plots.exists()


def test_training_is_averaged_by_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "FINEST", 1)
    events = [
        train(2, images=100, loss=100.0, top1=50, top5=100),
        train(4, images=300, loss=900.0, top1=30, top5=300),
        train(22, images=100, loss=50.0, top1=90, top5=100),
    ]
    history = read_history(run_of(tmp_path, *events))
    assert history.train.phase == ("warm", "main, which has a long name")
    assert history.train.loss.tolist() == [1000 / 400, 0.5]
    assert history.train.top1.tolist() == [20.0, 90.0]
    assert history.train.epoch.tolist() == [0.4, 2.2]
    assert history.images_per_second == 500 / 15


def test_the_best_is_the_first_of_equals_and_never_nan(tmp_path: Path) -> None:
    scores = [math.nan, 40.0, 60.0, 60.0, 50.0]
    history = read_history(run_of(tmp_path, *(val(i + 1, top1=s) for i, s in enumerate(scores))))
    assert history.best() == 2


def test_a_diverged_loss_leaves_at_the_top(tmp_path: Path) -> None:
    losses = [200.0, 150.0, 1e12, math.nan]
    run = run_of(tmp_path, *(train(2 * i, loss=x) for i, x in enumerate(losses, 1)))
    figure = Figure()
    plots.loss(figure, read_history(run), "epoch")
    assert figure.axes[0].get_ylim() == (0.9 * 1.5, 2 * 2.0)


def test_a_child_draws(tmp_path: Path) -> None:
    run = run_of(tmp_path, train(2), val(2))
    plotter = Plotter(run)
    assert plotter.update() is None
    assert plotter.finish() is None
    assert (run.plots / "overview.png").exists()


def test_damaged_records_are_reported_once(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"kind": "train", "step": 1})
    plotter = Plotter(run)
    said = plotter.finish()
    assert said is not None
    assert said.startswith("plots were not drawn: ")
    assert "\n" not in said
    assert plotter.finish() is None


def test_plots_that_cannot_be_written_are_reported(tmp_path: Path) -> None:
    run = run_of(tmp_path, train(2))
    run.plots.write_text("a file is in the way")
    assert "File exists" in (Plotter(run).finish() or "")


def test_a_child_that_cannot_start_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    plotter = Plotter(run_of(tmp_path, train(2)))
    assert "No such file" in (plotter.update() or "")
    assert plotter.finish() is None


def test_a_child_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 1000\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    plotter = Plotter(run_of(tmp_path, train(2)))
    assert "took too long" in (plotter.finish(timeout_seconds=0.05) or "")


class Child:
    """A process that runs until it is told to end."""

    started: list["Child"]

    def __init__(self, command: list[str], **options: Any) -> None:
        self.command, self.options, self.code, self.killed = command, options, None, False
        self.pid = len(self.started)
        self.started.append(self)

    def wait(self, timeout: float | None = None) -> int:
        if self.code is None:
            raise subprocess.TimeoutExpired(self.command, timeout or 0)
        return self.code

    def kill(self) -> None:
        self.killed, self.code = True, -9


def test_children_start_one_at_a_time_and_at_most_every_thirty_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    Child.started = []
    monkeypatch.setattr(subprocess, "Popen", Child)
    priorities: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "setpriority", lambda *stated: priorities.append(stated))
    plotter = Plotter(run_of(tmp_path, train(2)), every_seconds=30, clock=lambda: now)

    def started_after(seconds: float) -> int:
        nonlocal now
        now += seconds
        assert plotter.update() is None
        return len(Child.started)

    assert started_after(0) == 1
    assert started_after(31) == 1, "the first one still runs"
    Child.started[0].code = 0
    assert started_after(1) == 2
    Child.started[1].code = 0
    assert started_after(29) == 2
    assert started_after(1) == 3
    assert Child.started[0].options["process_group"] == 0
    assert priorities == [(os.PRIO_PROCESS, pid, 19) for pid in range(3)]
    now += HANGS_AFTER + 1
    assert "took too long" in (plotter.update() or "")
    assert Child.started[2].killed


def test_the_parent_stays_light() -> None:
    code = (
        "import sys, pitstop.report.plotter, pitstop.report.progress\n"
        "assert not {'matplotlib', 'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
