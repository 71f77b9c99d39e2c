"""Whatever happens to one rank, all end, and it is said which one and why."""

import os
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from pitstop.io.records import read_events

HOST = socket.gethostname()


@pytest.fixture
def train(cache: Path, tmp_path: Path, settings: tuple[str, ...]):
    """Trains the tiny demo on two ranks with something planted: see kill.py."""

    def train(
        moment: str, nth: int, what: str, rank: int, *options: str
    ) -> subprocess.CompletedProcess[str]:
        script = Path(__file__).with_name("kill.py")
        command = ["train", "demo", *settings, "--out", tmp_path / "run", "--workers", "1"]
        command += ["--nproc", "2", "--device", "cpu"]
        return subprocess.run(
            [sys.executable, script, moment, str(nth), what, str(rank), *command, *options],
            env={**os.environ, "PITSTOP_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    return train


def test_a_rank_that_raises_is_named_with_its_cause(train):
    done = train("step", 3, "RAISE", 1)
    assert done.returncode == 70
    assert f"pitstop: rank 1 on {HOST}: RuntimeError: a planted failure\n" in done.stderr
    assert done.stderr.count("Traceback") == 1
    assert "internal error of rank 1" in done.stderr


def test_an_image_that_one_rank_cannot_read_is_named(train):
    done = train("images", 20, "RAISE", 1)
    assert done.returncode == 70
    assert f"pitstop: rank 1 on {HOST}: RuntimeError: image " in done.stderr
    assert "cannot be read: a planted failure\n" in done.stderr


def test_a_rank_that_dies_is_named(train):
    done = train("step", 3, "SIGKILL", 1)
    assert done.returncode == 70
    assert "rank 1 was lost: killed, or its machine is gone" in done.stderr
    assert "pitstop: rank 1 was killed by SIGKILL" in done.stderr


@pytest.mark.slow
def test_when_the_first_rank_dies_it_is_named_too(train):
    done = train("step", 3, "SIGKILL", 0)
    assert done.returncode == 70
    assert "pitstop: rank 0 was killed by SIGKILL" in done.stderr


@pytest.mark.parametrize(
    ("moment", "doing"),
    [
        ("step", "training"),
        pytest.param("images", "waiting for the images of", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_is_named_with_what_it_was_at(train, moment, doing):
    done = train(moment, 3, "HANG", 1, "--rank-timeout", "5")
    assert done.returncode == 70
    assert f"rank 1 hangs: no answer for 5 s while it was {doing} step " in done.stderr


def test_a_mistake_is_said_once_and_exits_with_2(train):
    assert train("step", 3, "SIGTERM", 0).returncode == 75
    done = train("never", 1, "SIGTERM", 0, "--lr", "0.3")
    assert done.returncode == 2
    assert done.stderr.count("the run was started with another recipe") == 1
    assert done.stderr.startswith("pitstop: ")
    assert done.stderr.count("\n") == 1


def test_a_batch_that_is_too_small_for_the_ranks_is_refused(train):
    done = train("never", 1, "SIGTERM", 0, "--batch-size", "1")
    assert done.returncode == 2
    assert "less than an image for each of 2 ranks" in done.stderr


def test_failed_ranks_are_started_again_from_their_checkpoint(train, tmp_path):
    """The signal strikes in each attempt, so the second one goes the same way."""
    done = train("step", 12, "SIGKILL", 1, "--max-restarts", "1")
    assert done.returncode == 0, done.stderr
    assert "resuming at step 9" in (tmp_path / "run" / "training_log.txt").read_text()


@pytest.mark.slow
def test_ranks_that_are_started_again_do_not_start_over(train, tmp_path):
    done = train("step", 12, "SIGKILL", 1, "--max-restarts", "1", "--no-resume")
    assert done.returncode == 0, done.stderr
    assert "resuming at step 9" in (tmp_path / "run" / "training_log.txt").read_text()
    assert [path.name for path in tmp_path.glob("run*")] == ["run"]


def test_another_number_of_ranks_goes_on_and_says_so(train, tmp_path):
    assert train("step", 3, "SIGTERM", 0).returncode == 75
    done = train("never", 1, "SIGTERM", 0, "--nproc", "1")
    assert done.returncode == 0
    assert "circumstances changed: ranks 2 -> 1: from here not bit-exact" in done.stdout
    events = read_events(tmp_path / "run" / "events.jsonl")
    trained = [event for event in events if event["kind"] == "train"]
    assert trained[0]["first"] == 0
    assert all(a["step"] == b["first"] for a, b in pairwise(trained))
