"""The picture of a simulation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pitstop.plan.simulate import Course, Simulation, simulate
from pitstop.plan.simulation_picture import draw

HOUR = Course(120, 3600, 600, 2, 180, dollars_per_hour=12.0)


def drawn(
    simulation: Simulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Figure, Path]:
    """The figure as it was saved, and where."""
    figures: list[Figure] = []
    savefig = Figure.savefig

    def kept(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    draw(simulation, "fast on p4d.24xlarge", tmp_path / "runs.png")
    return figures[0], tmp_path / "runs.png"


def labels(figure: Figure) -> list[str]:
    return [label for label in figure.axes[0].get_legend_handles_labels()[1] if label]


def test_runs_are_stacked_by_their_interruptions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = simulate(HOUR, 1, runs=2000)
    figure, path = drawn(simulation, tmp_path, monkeypatch)
    axes = figure.axes[0]
    quiet = (simulation.interruptions == 0).mean()
    assert labels(figure)[:2] == [
        f"no interruption: {quiet:.0%} of the runs",
        f"1 interruption: {(simulation.interruptions == 1).mean():.0%} of the runs",
    ]
    assert f"mean: {simulation.minutes.mean():.1f} min" in labels(figure)
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in axes.collections]  # pyright: ignore
    assert tops == pytest.approx([100 * quiet, *tops[1:-1], 100])
    assert tops == sorted(tops)
    with Image.open(path) as image:
        assert np.asarray(image.convert("L"), dtype=np.float32).std() > 10


def test_the_upper_axis_has_dollars_where_there_is_a_price(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure, _ = drawn(simulate(HOUR, 1, runs=100), tmp_path, monkeypatch)
    (upper,) = figure.axes[0].child_axes
    assert upper.get_xlabel() == "dollars, at $12.00 an hour"
    low, high = figure.axes[0].get_xlim()
    assert upper.get_xlim() == pytest.approx((low / 5, high / 5))


def test_runs_that_are_all_alike_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alike = simulate(replace(HOUR, dollars_per_hour=None), 0, runs=10)
    figure, _ = drawn(alike, tmp_path, monkeypatch)
    assert figure.axes[0].child_axes == []
    assert labels(figure)[0] == "no interruption: 100% of the runs"


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        draw(simulate(HOUR, 0, runs=1), "", tmp_path / "file" / "runs.png")
