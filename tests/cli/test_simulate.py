"""`pitstop simulate`."""

import json

import pytest
from PIL import Image

SPRINT = ("simulate", "sprint", "--machine", "p4d.24xlarge", "--spot")


@pytest.fixture(autouse=True)
def nothing_of_the_users_own(place, monkeypatch):
    monkeypatch.setenv("PITSTOP_CONFIG", str(place))
    monkeypatch.setenv("PITSTOP_CACHE", str(place))


def test_runs_are_played_through_and_drawn(command):
    plan = json.loads(command("plan", *SPRINT[1:], "--interruptions", "0.5/h", "--json").out)
    often = (*SPRINT, "--interruptions", "0.5/h", "--runs", 5000)
    played = json.loads(command(*often, "--json", "--plot", "runs.png").out)
    assert played["runs"] == 5000
    assert played["minutes"]["mean"] == pytest.approx(plan["minutes"], rel=0.01)
    assert played["dollars"]["mean"] == pytest.approx(plan["dollars"], rel=0.01)
    assert played["expected_minutes"] == plan["minutes"]
    with Image.open("runs.png") as image:
        assert image.width > image.height
    said = command(*often)
    assert "5,000 runs with 0.5 interruptions an hour" in " ".join(said.out.split())
    assert f"{played['minutes']['mean']:.1f}" in said.out
    assert said.out == command(*often, "--seed", 0).out != command(*often, "--seed", 1).out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("simulate", "sprint"), "Missing option '--machine'"),
        ((*SPRINT, "--plot", "."), "--plot .: is a directory"),
        (
            (*SPRINT, "--interruptions", "60/h", "--set", "checkpoint.every=40 min"),
            "save more often (checkpoint.every)",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(command, arguments, expected):
    said = command(*arguments)
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert expected in said.err
