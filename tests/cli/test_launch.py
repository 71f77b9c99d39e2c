"""`pitstop launch` and `pitstop fetch` as they are typed: options, refusals, what is printed."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pitstop.core.recipe import load_recipe

from .conftest import Command

Refused = Callable[..., str]

SKY = ("launch", "sky", "demo", "--data", "s3://bucket/data", "--remote", "s3://bucket/run")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dry(command: Command, *arguments: str) -> dict[str, Any]:
    """The task that SkyPilot would be given."""
    said = command(*arguments, "--dry-run")
    assert said.code == 0, said.err
    text = said.out.split("\n\n", 1)[1].rsplit("\nsky jobs launch", 1)[0]
    return yaml.safe_load(text)


def trained(task: dict[str, Any]) -> list[str]:
    """The arguments of `train` in it."""
    words = shlex.split(task["run"])
    return words[words.index("train") + 1 :]


# The options of train


@pytest.mark.parametrize(
    "typed",
    [
        ("launch", "sky", "--epochs", "3", "--no-compile", "demo", "--data=s3://b/d", "--spot"),
        ("launch", "sky", "demo", "--spot", "--data", "s3://b/d", "--epochs", "3", "--no-compile"),
        ("launch", "sky", "--data", "s3://b/d", "--epochs", "3", "--no-compile", "--spot", "demo"),
    ],
)
def test_the_options_of_train_stand_anywhere(typed: tuple[str, ...], command: Command) -> None:
    task = dry(command, *typed, "--remote", "s3://bucket/run")
    assert task["resources"]["use_spot"] is True
    words = trained(task)
    assert words[-3:] == ["--epochs", "3", "--no-compile"]
    assert words[words.index("--data") + 1] == "s3://b/d"


def test_a_value_that_looks_like_an_option_stays_a_value(refused: Refused) -> None:
    assert "--set --spot: write it as KEY=VALUE" in refused(*SKY, "--set", "--spot")
    assert "--name --epochs" in refused(*SKY, "--name", "--epochs", "--spot")


def test_what_train_would_refuse_is_refused_before_anything_is_made(
    refused: Refused, here: Path
) -> None:
    assert "--epochs" in refused(*SKY, "--epochs", "many")
    assert "--epochs" in refused(*SKY, "--epochs")
    assert "--nproc" in refused(*SKY, "--nproc", "0")
    assert "No such option: --epoch" in refused(*SKY, "--epoch", "3")
    assert "unexpected extra argument" in refused(*SKY, "more")
    assert "unknown key 'colour'" in refused(*SKY, "--set", "colour=red")
    assert "--batch-size lots" in refused(*SKY, "--batch-size", "lots")
    assert "exclude each other" in refused(*SKY, "--minutes", "9", "--set", "epochs=3")
    assert "exclude each other" in refused(*SKY, "--resume", "run", "--no-resume")
    assert "--minutes 0: must be more than 0" in refused(*SKY, "--minutes", "0")
    assert "--max-cost: give --price" in refused(*SKY, "--max-cost", "9")
    assert "no recipe 'demmo'" in refused("launch", "sky", "demmo")
    assert "--out: the launcher sets it itself" in refused(*SKY, "--out", "mine")
    assert "--name" in refused(*SKY, "--name", "my_run")
    assert not [*here.iterdir()]


# local


def test_local_is_train_with_restarts(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, Any]]] = []

    def launch(ranks: list[str], **options: Any) -> int:
        started.append((ranks, options))
        return 75

    monkeypatch.setattr("pitstop.cli.launching.launch", launch)
    said = command("launch", "local", "--epochs", "3", "demo", "--nproc", "2", "--device", "cpu")
    assert said.code == 75
    [(ranks, options)] = started
    assert ranks[ranks.index("train") :] == [
        *("train", "demo", "--max-restarts", "3", "--epochs", "3"),
        *("--nproc", "2", "--device", "cpu"),
    ]
    assert (options["nproc"], options["max_restarts"]) == (2, 3)
    command("launch", "local", "demo", "--device", "cpu", "--max-restarts", "7")
    assert started[1][1]["max_restarts"] == 7


def test_a_dry_run_of_local_prints_the_command(command: Command) -> None:
    said = command("launch", "local", "demo", "--set", "lr_schedule={name: cosine}", "--dry-run")
    assert said.code == 0
    assert shlex.split(said.out)[:2] == ["pitstop", "train"]
    assert "lr_schedule={name: cosine}" in shlex.split(said.out)


# sky


def test_a_dry_run_makes_nothing(command: Command, here: Path) -> None:
    said = command(*SKY, "--dry-run", "--name", "mine", "--gpus", "A100:8", "--spot")
    assert said.code == 0, said.err
    assert "nothing was created" in said.out
    assert "s3://bucket/run" in said.out
    assert not [*here.iterdir()]


def test_nobody_there_to_ask_makes_nothing(refused: Refused, here: Path) -> None:
    line = refused(*SKY, "--name", "mine")
    assert "nothing was created" in line
    assert not [*here.iterdir()]


def test_what_is_launched_is_what_was_printed(
    command: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "bin").mkdir()
    program = here / "bin" / "sky"
    program.write_text(f'#!/bin/sh\necho "$@" > {here}/said\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(here / "bin"))
    planned = dry(command, *SKY, "--name", "mine", "--seed", "3")
    said = command(*SKY, "--name", "mine", "--seed", "3", "--yes")
    assert said.code == 0, said.err
    task = here / "launched" / "mine" / "task.yaml"
    assert yaml.safe_load(task.read_text()) == planned
    assert (here / "said").read_text().split() == [
        *("jobs", "launch", "--name", "mine", "--yes", "--detach-run"),
        str(task.relative_to(here)),
    ]
    assert load_recipe(str(task.parent / "files" / "recipe.yaml")) == load_recipe("demo")
    assert "pitstop fetch s3://bucket/run DIR" in said.out


def test_without_sky_the_command_is_printed(
    command: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(here))
    said = command(*SKY, "--name", "mine", "--to", "there", "--yes")
    assert said.code == 0, said.err
    assert "sky jobs launch --name mine --yes --detach-run there/task.yaml" in said.out
    assert (here / "there" / "task.yaml").exists()


def test_a_run_that_goes_away_with_its_machine_is_refused(refused: Refused) -> None:
    line = refused("launch", "sky", "demo", "--data", "s3://bucket/data", "--spot")
    assert "--remote" in line
    assert "--data" in refused("launch", "sky", "sprint", "--remote", "s3://bucket/run")
    line = refused("launch", "sky", "sprint", "--remote", "s3://bucket/run", "--data", "images")
    assert "is on this machine" in line


# fetch


def test_a_run_is_fetched(command: Command, here: Path) -> None:
    there = here / "there"
    there.mkdir()
    state = {"status": "finished", "step": 8, "steps": 8}
    (there / "run.json").write_text(json.dumps(state))
    said = command("fetch", "there", "home/run")
    assert (said.code, said.err) == (0, "")
    assert said.out == "home/run: finished, step 8 of 8, from there\n"
    assert json.loads((here / "home" / "run" / "run.json").read_text()) == state


def test_what_cannot_be_fetched_is_one_line(
    refused: Refused, s3_endpoint: str, aws: pytest.MonkeyPatch
) -> None:
    aws.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    assert "a-job: no URL, and no launch either" in refused("fetch", "a-job", "home")
    assert "no such bucket" in refused("fetch", "s3://nobodys-bucket/run", "home")
    aws.delenv("AWS_REGION")
    assert "--region" in refused("fetch", "a-job", "home")
