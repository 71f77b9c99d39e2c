"""What a launcher is given, and what it says before it acts."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.cli.launch.common import get_train
from pitstop.core.errors import InputError
from pitstop.core.recipe import Model, bundled_recipes, load_recipe
from pitstop.launch.request import (
    Request,
    ask,
    default_name,
    recipe_yaml,
    refuse_local_files,
    refuse_unsafe_spot,
    train_command,
)

DEMO = Request("mine", load_recipe("demo"), "demo", "s3://bucket/data")


# Names


@given(st.text(min_size=1))
def test_the_default_name_suits_all_services(recipe_name: str) -> None:
    assert replace(DEMO, name=default_name(recipe_name)).name


def test_the_default_name_tells_recipe_and_time() -> None:
    assert default_name("sprint", now=0.0) == "sprint-19700101-000000"
    assert default_name("../my recipes/fast_2.yaml", now=0.0) == "fast-2-19700101-000000"
    assert default_name("2fast.yml", now=0.0) == "run-2fast-19700101-000000"


@pytest.mark.parametrize("name", ["", "a_b", "-a", "a-", "a--b", "1a", "a b", "a" * 64, "ä"])
def test_a_name_that_some_service_refuses_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="--name"):
        replace(DEMO, name=name)


# The recipe


@pytest.mark.parametrize("name", bundled_recipes())
def test_a_recipe_that_travels_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    there = tmp_path / "recipe.yaml"
    there.write_text(recipe_yaml(name), encoding="utf-8")
    assert load_recipe(str(there)) == load_recipe(name)


def test_a_recipe_travels_without_what_it_extends_and_stays_scalable(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: sprint\nlr: 0.3\n")
    own = tmp_path / "own.yaml"
    own.write_text("extends: base.yaml\nseed: 7\n")
    there = tmp_path / "there" / "recipe.yaml"
    there.parent.mkdir()
    there.write_text(recipe_yaml(str(own)))
    changes = {"epochs": 7, "lr": 0.1}
    assert load_recipe(str(there), changes) == load_recipe(str(own), changes)
    assert load_recipe(str(there)).name == "own"


# The command


def parsed(command: list[str]) -> dict[str, Any]:
    """What `train` makes of it."""
    verb, *arguments = command
    assert verb == "train"
    return get_train().make_context("train", arguments).params


def test_train_accepts_the_command() -> None:
    options = ("--epochs", "3", "--set", "lr=1", "--no-compile")
    command = train_command(
        options,
        recipe="r.yaml",
        data="s3://b/d",
        out="o",
        remote="s3://b/r",
        resume="before",
        nproc=2,
        nodes=3,
        node_rank=1,
        endpoint="10.0.0.1:29400",
        max_restarts=4,
    )
    said = parsed(command)
    assert (said["recipe"], said["data"], said["out"]) == ("r.yaml", "s3://b/d", Path("o"))
    assert (said["remote"], said["resume"]) == ("s3://b/r", Path("before"))
    assert (said["nproc"], said["nodes"], said["node_rank"]) == (2, 3, 1)
    assert (said["rdzv_endpoint"], said["max_restarts"]) == ("10.0.0.1:29400", 4)
    assert (said["epochs"], said["set_"], said["compile"]) == (3.0, ["lr=1"], False)


def test_what_the_user_says_wins() -> None:
    command = train_command(
        ("--max-restarts", "9"), recipe="demo", data=None, out="o", max_restarts=3
    )
    assert parsed(command)["max_restarts"] == 9


def test_one_machine_is_told_nothing_of_others() -> None:
    assert train_command((), recipe="demo", data=None, out="o") == ["train", "demo", "--out", "o"]


# Refusals


@pytest.mark.parametrize("data", ["s3://b/d", "hf://owner/name", "digits", "/no/such/place"])
def test_data_that_may_be_there_are_accepted(data: str) -> None:
    refuse_local_files(replace(DEMO, data=data))


def test_data_and_weights_of_this_machine_are_refused(tmp_path: Path) -> None:
    for data in (str(tmp_path), "data/imagenet"):
        with pytest.raises(InputError, match=r"--data .* is on this machine"):
            refuse_local_files(replace(DEMO, data=data))
    recipe = DEMO.recipe.model_copy(update={"model": Model(weights="runs/before")})
    with pytest.raises(InputError, match=r"model\.weights runs/before: is on this machine"):
        refuse_local_files(replace(DEMO, recipe=recipe))


def test_spot_wants_a_place_that_outlives_the_machine() -> None:
    refuse_unsafe_spot(DEMO, kept=None)
    spot = replace(DEMO, spot=True)
    refuse_unsafe_spot(spot, kept="s3://b/r")
    with pytest.raises(InputError, match="--spot"):
        refuse_unsafe_spot(spot, kept=None)


# Asking


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self) -> bool:
        return True


def test_nothing_happens_where_nobody_can_be_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(InputError, match=r"nothing was created.*--yes"):
        ask(["a machine", "$3"], yes=False)
    assert capsys.readouterr().out == "a machine\n$3\n"
    ask(["a machine"], yes=True)


@pytest.mark.parametrize(
    ("answer", "goes_on"),
    [("y\n", True), ("YES\n", True), ("n\n", False), ("\n", False), ("", False)],
)
def test_only_a_yes_is_a_yes(answer: str, goes_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    if goes_on:
        ask(["a machine"], yes=False)
    else:
        with pytest.raises(InputError, match="nothing was created"):
            ask(["a machine"], yes=False)
