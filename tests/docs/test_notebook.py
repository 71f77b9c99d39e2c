"""The notebook docs/logs.ipynb runs from top to bottom, and what it computes is right."""

import csv
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from pitstop.io.records import Row

NOTEBOOK = Path(__file__).parents[2] / "docs/logs.ipynb"

Notebook = Callable[[], dict[str, Any]]


def write_log(run: Path, top1: list[float], minutes: float) -> None:
    """Writes the log of a run that is evaluated each epoch, waits a tenth, and resumes once."""
    run.mkdir(parents=True)
    with (run / "training_log.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(field.name for field in fields(Row))
        for epoch, accuracy in enumerate(top1, 1):
            wall = 60 * minutes * epoch / len(top1)
            place = (epoch, 10 * epoch, "all", 32, 64, 0.1, 0.9)
            trained = (2.0, accuracy, 99.0) if epoch > 1 else ("", "", "")
            rates = (100.0, 10.0, 1.0, 512.0)
            rows.writerow([*place, *trained, 1.5, accuracy, 99.0, *rates, wall])


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Notebook:
    """Runs all code cells in a folder of its own; returns the names they leave."""
    monkeypatch.chdir(tmp_path)

    def notebook() -> dict[str, Any]:
        names: dict[str, Any] = {}
        for cell in json.loads(NOTEBOOK.read_text())["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        return names

    return notebook


def test_it_compares_the_runs_that_are_there(
    notebook: Notebook, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_log(tmp_path / "runs/slow", [20, 40, 60, 80], minutes=8)
    write_log(tmp_path / "runs/quick", [50, 70], minutes=3)
    names = notebook()
    printed = capsys.readouterr().out.splitlines()
    slow = ["slow", "4.00", "80.00", "80.00", "8.0", "10.0%"]
    assert slow in [line.split() for line in printed]
    assert printed[-1] == "minutes to 70.00%: {'quick': 3.0, 'slow': 8.0}"
    figure = names["figure"]
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "figure.png")


def test_it_runs_where_there_is_no_run_yet(notebook: Notebook):
    assert notebook()["logs"] == {}


def test_smoothing_is_the_weighted_mean_by_age(notebook: Notebook):
    smooth = notebook()["smooth"]
    epochs, values = np.array([1.0, 2.0, 4.0]), np.array([8.0, 2.0, np.nan])
    by_hand = [8, (8 / 2 + 2) / (1 / 2 + 1), (8 / 8 + 2 / 4) / (1 / 8 + 1 / 4)]
    np.testing.assert_allclose(smooth(epochs, values, half_life=1), by_hand)
    np.testing.assert_allclose(smooth(epochs, np.full(3, 5.0), half_life=0.3), 5)
