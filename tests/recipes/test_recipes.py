"""The recipes that come with pitstop: each loads, plans as its golden says, and has its header."""

import csv
import re
from pathlib import Path

import pytest

from pitstop.core.recipe import bundled_recipes, load_recipe
from pitstop.core.timeline import Timeline
from pitstop.plan.explain import as_csv

GOLDEN = Path(__file__).parent / "golden"
IMAGENET = 1_281_167
RECIPES = bundled_recipes()


def test_each_recipe_has_a_golden_and_each_golden_a_recipe():
    assert {path.stem for path in GOLDEN.glob("*.csv")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_the_settings_are_those_of_the_golden(name):
    """`pitstop plan NAME --samples 1281167 --csv` makes it; floats may differ in the last digit."""
    planned = list(
        csv.reader(as_csv(Timeline(load_recipe(name), num_samples=IMAGENET)).split("\n"))
    )
    golden = list(csv.reader((GOLDEN / f"{name}.csv").read_text().split("\n")))
    assert len(planned) == len(golden)
    for row, expected in zip(planned, golden, strict=True):
        assert [_number(cell) for cell in row] == [_number(cell) for cell in expected]


def _number(cell: str) -> object:
    try:
        return pytest.approx(float(cell), rel=1e-9)
    except ValueError:
        return cell


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_says_how_accurate_by_which_protocol_and_who_says_so(name):
    header = "".join(re.findall(r"^#.*\n", RECIPES[name].read_text(), re.MULTILINE))
    for word in ("accuracy", "protocol", "epochs", "hardware"):
        assert re.search(rf"^# {word}  ", header, re.MULTILINE), word
    assert re.search(r"\b(measured|published|expected)\b", header)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_on_a_page(name):
    lines = [line for line in RECIPES[name].read_text().split("\n") if not line.startswith("#")]
    assert len(lines) <= 40
