"""`pitstop verify-resume`: it says what it was asked, and finds a resume that forgets something."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("place")

FORGETFUL = """
from pitstop.cli import main
from pitstop.engine.state import TrainState

load = TrainState.load

def load_without_momentum(self, saved):
    load(self, saved)
    self.optimizer.state.clear()

TrainState.load = load_without_momentum
main()
"""

LONGER = ("--set", "checkpoint.every=2 steps", "--set", "epochs=12")


def test_mistakes_are_refused_before_anything_runs(refused, place):
    mine = place / "mine" / "file"
    mine.parent.mkdir()
    mine.touch()
    assert refused("verify-resume", "--out", "mine") == "mine: is not empty: give another --out"
    nameless = "recipe sprint names no data: give --data"
    assert refused("verify-resume", "sprint") == nameless
    assert "no recipe 'demmo'" in refused("verify-resume", "demmo")
    assert [*place.rglob("*")] == [mine.parent, mine]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_is_equal(command, settings, place, ranks):
    said = command(
        *("verify-resume", "demo", *settings[2:], *LONGER, "--device", "cpu"),
        *("--kills", 3, "--nproc", ranks, "--out", "both"),
    )
    assert said.code == 0, said
    assert said.out.splitlines()[-1] == "EQUAL: ids, accuracies and all tensors, bit by bit"
    assert "kill 1 of 3: after" in said.out
    weights = [Path("both", run, "last.safetensors") for run in ("uninterrupted", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_a_resume_that_forgets_the_momentum_is_found(command, settings, place, monkeypatch):
    script = place / "forgetful.py"
    script.write_text(FORGETFUL)
    monkeypatch.setattr("pitstop.cli.launching.RANK", (sys.executable, str(script)))
    said = command(
        *("verify-resume", "demo", *settings[2:], *LONGER, "--device", "cpu", "--kills", 4)
    )
    assert said.code == 1, said
    lines = said.out.splitlines()
    assert "NOT EQUAL:" in lines
    assert "  model.conv1.weight differs" in lines or "  model.conv1.0.weight differs" in lines
    assert not any("ids of the images" in line for line in lines)  # it forgets nothing else
