"""`pitstop lr-find`, and `lr: auto` and `--batch-size auto` at the command line."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytestmark = pytest.mark.usefixtures("place")

AUTO = (
    *("--set", "lr=auto"),
    *("--set", "lr_finder={fallback: 0.1, iterations: 20, policy: min0.1, multiplier: 2}"),
)


def run_json(out: str) -> dict[str, Any]:
    return json.loads((Path(out) / "run.json").read_text())


def finder(settings: tuple[str, ...]) -> tuple[str, ...]:
    epochs, number, *others = settings
    assert epochs == "--epochs"
    return ("lr-find", "demo", "--set", f"epochs={number}", *others, "--workers", "2")


def test_the_suggestion_comes_with_its_reason_and_leaves_no_run(command, settings, place):
    said = command(*finder(settings), "--set", "batch_size=128", "--end-lr", 10)
    assert said.code == 0
    result, test = said.out.splitlines()
    assert re.match(r"peak lr [\d.]+: found [\d.]+ \(a tenth of lr [\d.]+, where", result)
    assert re.match(r"min0.1, \d+ of 100 iterations, lr 1e-05 to ", test)
    assert list(place.iterdir()) == []


def test_the_same_command_suggests_the_same(command, settings):
    first, second = (command(*finder(settings), "--iterations", 40).out for _ in range(2))
    assert first == second


def test_without_a_suggestion_it_says_why_and_names_the_fallback(command, settings):
    options = ("--iterations", 20, "--start-lr", 1e-9, "--end-lr", 1e-8)
    said = command(*finder(settings), *options)
    assert said.code == 0
    assert said.out.startswith("peak lr 0.1: the declared fallback, as the search has no suggest")


def test_the_curve_is_written_drawn_and_printed(command, settings):
    options = ("--iterations", 20, "--policy", "steepest", "--csv", "curve.csv")
    said = command(*finder(settings), *options, "--plot", "curve.png", "--json")
    search = json.loads(said.out)
    assert search["policy"] == "steepest"
    with Path("curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == pytest.approx(search["losses"], rel=1e-5)
    assert list(rows[0]) == ["iteration", "lr", "loss", "smoothed"]
    with Image.open("curve.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--policy", "best"), "lr_finder.policy: "),
        (("--iterations", 3), "lr_finder.iterations: "),
        (("--start-lr", 2), "end_lr 1 must be above start_lr 2"),
        (("--data", "digts"), "did you mean 'digits'?"),
        (("--plot", "."), "--plot .: is a directory"),
        (("--iterations", 10, "--csv", "file/curve.csv"), "cannot be written"),
    ],
)
def test_what_cannot_be_is_refused(refused, settings, place, options, expected):
    (place / "file").write_text("mine")
    assert expected in refused(*finder(settings), *options)


def test_a_recipe_without_data_asks_for_it(refused):
    assert "--data" in refused("lr-find", "single-gpu")


def test_a_run_of_auto_is_what_lr_find_announces(command, tiny, settings):
    announced = command(*finder(settings), *AUTO).out.splitlines()[0]
    said = command(*tiny, *AUTO, "--out", "run")
    assert said.code == 0
    assert announced in said.out
    assert announced in Path("run/training_log.txt").read_text()
    assert f"peak lr {run_json('run')['found_lr']:.4g}:" in announced
    again = command(*tiny, *AUTO, "--out", "run")
    assert (again.code, "this run has ended" in again.out) == (0, True)


def test_a_number_overrides_auto(command, refused, tiny):
    assert command(*tiny, *AUTO[2:], "--set", "lr=auto", "--epochs", 1, "--out", "auto").code == 0
    said = command(*tiny, *AUTO[2:], "--lr", 0.05, "--out", "run")
    assert said.code == 0
    assert "peak lr" not in said.out
    assert run_json("run")["found_lr"] is None
    assert not Path("run/lr_find.csv").exists()
    assert "phases.0.lr 0.05 -> auto" in refused(*tiny, *AUTO, "--out", "run")


def test_auto_without_a_finder_asks_for_one(refused, tiny):
    assert "lr: auto needs an lr_finder" in refused(*tiny, "--set", "lr=auto", "--out", "run")


def test_a_batch_size_of_auto_is_the_recipes_and_no_other_recipe(command, tiny, run):
    said = command(*tiny, "--batch-size", "auto", "--out", "tried")
    assert said.code == 0
    assert (Path("tried") / "last.safetensors").read_bytes() == (
        run / "last.safetensors"
    ).read_bytes()
    assert run_json("tried")["identity"] == run_json(str(run))["identity"]
    assert "has ended" in command(*tiny, "--out", "tried").out


def test_a_batch_size_of_neither_kind_is_refused(refused, tiny):
    assert "--batch-size many: give a number" in refused(*tiny, "--batch-size", "many")
