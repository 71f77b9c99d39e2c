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
    planned = list(csv.reader(as_csv(Timeline.planned(load_recipe(name), IMAGENET)).split("\n")))
    golden = list(csv.reader((GOLDEN / f"{name}.csv").read_text().split("\n")))
    assert len(planned) == len(golden)
    for row, expected in zip(planned, golden, strict=True):
        assert [_number(cell) for cell in row] == [_number(cell) for cell in expected]


def _number(cell: str) -> object:
    try:
        return pytest.approx(float(cell), rel=1e-9)
    except ValueError:
        return cell


KEYS = ("accuracy", "epochs", "hardware", "time", "cost", "runs", "source", "protocol")
WORDS = ("measured", "published", "expected")


def header(name: str) -> dict[str, str]:
    """What a recipe's header says, by key; further lines of a key are indented."""
    lines = [line for line in RECIPES[name].read_text().split("\n") if line.startswith("#")]
    text = "\n".join(line.removeprefix("# ") for line in lines)
    entries = re.findall(r"^(\w+)  +(.*(?:\n +.*)*)", text, re.MULTILINE)
    return {key: " ".join(said.split()) for key, said in entries}


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_says_all_that_makes_an_accuracy_a_figure(name):
    assert [key for key in KEYS if not header(name).get(key)] == []


@pytest.mark.parametrize("name", RECIPES)
def test_a_figure_says_who_says_so(name):
    for key in ("accuracy", "time", "cost"):
        said = header(name).get(key, "")
        if re.search(r"\d", said):
            assert any(f"{word}: " in said for word in WORDS), key
        if "measured: " in said:
            assert "`" in said, "the command that repeats it"


@pytest.mark.parametrize("name", RECIPES)
def test_no_header_carries_a_claim_without_data_set_or_log(name):
    said = " ".join(header(name).values())
    assert not re.search(r"(?<![\d.])(88%|90%|65 to 68)", said)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_on_a_page(name):
    lines = [line for line in RECIPES[name].read_text().split("\n") if not line.startswith("#")]
    assert len(lines) <= 40
