"""`pitstop train --track`, from the command line to the stand-in of a tracker."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FAKES = Path(__file__).parents[1] / "report" / "fakes"


@pytest.fixture
def logged(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """What wandb has got, call by call."""
    folder = place / "server"
    folder.mkdir()
    monkeypatch.setenv("FAKE_SERVER", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    monkeypatch.setattr("pitstop.report.tracker.ENDED_SECONDS", 120.0)  # this machine may be busy

    def logged() -> list[dict[str, Any]]:
        lines = map(json.loads, (folder / "wandb.jsonl").read_text().splitlines())
        return [line for line in lines if line["what"] == "log"]

    return logged


def test_a_tracked_run_restored_on_an_empty_machine_goes_on_as_the_same(
    command, tiny, logged: Callable[[], list[dict[str, Any]]]
):
    where = ("--out", "run", "--remote", "copy")
    said = command(*tiny, *where, "--track", "wandb,mlflow", "--track-project", "mine")
    assert said.code == 0, said
    assert "wandb: https://wandb.test/mine/" in said.out
    with Path("run/training_log.csv").open() as file:
        expected = {int(row["step"]): float(row["val_top1"]) for row in csv.DictReader(file)}
    got = {line["step"]: line["values"]["val/top1"] for line in logged()}
    assert got == pytest.approx(expected, abs=1e-3)

    shutil.rmtree("run")
    said = command(*tiny, *where, "--track", "wandb", "--track-project", "mine", "--extend", "1")
    assert said.code == 0, said
    steps = [line["step"] for line in logged()]
    assert max(steps) > max(expected)
    assert steps == sorted(set(steps))
    assert len({line["id"] for line in logged()}) == 1


def test_what_cannot_be_tracked_is_refused_before_anything_is_done(refused, place: Path):
    assert refused("train", "--track", "wandbb") == (
        "--track wandbb: is none of wandb, tensorboard, mlflow"
    )
    assert refused("train", "--track-name", "x").startswith("--track-name: ")
    assert [*place.iterdir()] == []
