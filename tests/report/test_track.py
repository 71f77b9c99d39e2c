"""Trackers get each step once, whatever the run goes through; and the run nothing from them."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.core.tracking import TRACKERS, Tracking
from pitstop.io.run_directory import RunDirectory
from pitstop.io.storage import read_json
from pitstop.report import tracker as parent
from pitstop.report.track import Follower, points, without_secrets
from pitstop.report.tracker import AGAIN_AFTER, Trackers

FAKES = Path(__file__).with_name("fakes")
NAMES = {"train/loss", "train/top1", "train/top5", "val/loss", "val/top1", "val/top5", "lr"}
SECRET = "a-key-that-nobody-prints"


def train(step: int, **changed: Any) -> dict[str, Any]:
    sums = {"images": 200, "loss": 300.0, "top1": 50, "top5": 150}
    return {"kind": "train", "step": step, "time": "2026-01-02T03:04:05Z", "lr": 0.1, **sums} | (
        changed
    )


def val(step: int, **changed: Any) -> dict[str, Any]:
    scores = {"images": 100, "loss": 2.0, "top1": 40.0, "top5": 80.0}
    return {"kind": "val", "step": step, "time": "2026-01-02T03:04:09Z", "lr": 0.1, **scores} | (
        changed
    )


def write(run: RunDirectory, *events: dict[str, Any]) -> None:
    """Writes the records anew, as a start of the run does."""
    run.path.mkdir(exist_ok=True)
    file = run.path / "new"
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    file.replace(run.events)


# What is sent


def test_a_step_has_what_was_trained_and_evaluated_in_percent_and_its_time():
    one, two = points([train(10), {**train(20), "lr": 0.2}, val(20)])
    assert one.values == {"train/loss": 1.5, "train/top1": 25.0, "train/top5": 75.0, "lr": 0.1}
    assert two.values.keys() == NAMES
    assert two.values["val/loss"] == 2.0
    assert two.values["val/top1"] == 40.0
    assert (one.step, two.step) == (10, 20)
    assert (one.time, two.time) == (1767323045.0, 1767323049.0)


def test_training_waits_for_the_evaluation_that_may_follow():
    assert [point.step for point in points([train(10), train(20)])] == [10]
    assert points([train(10)]) == []
    assert points([]) == []


def test_what_is_not_finite_or_of_no_image_is_left_out():
    nan, none = points([train(10, loss=math.nan), train(20, images=0, loss=0.0), val(30)])[:2]
    assert nan.values.keys() == {"train/top1", "train/top5", "lr"}
    assert none.values.keys() == {"lr"}


def test_a_line_is_read_when_it_is_whole(tmp_path: Path):
    run = RunDirectory(tmp_path)
    write(run, train(10), train(20))
    follower = Follower(run.events)
    line = json.dumps(val(20)) + "\n"
    with run.events.open("a") as file:
        file.write(line[:30])
        file.flush()
        assert [point.step for point in follower.read(0)] == [10]
        file.write(line[30:])
    assert [point.values.keys() >= {"val/loss"} for point in follower.read(10)] == [True]
    follower.close()


EVERY = 5
"""Steps from one evaluation to the next, in the test below."""


def recorded(first: int, last: int, stride: int) -> list[dict[str, Any]]:
    """What a start records that goes on at one step and is struck at another."""
    events = []
    for step in range(first + 1, last + 1):
        evaluated = step % EVERY == 0
        if evaluated or (step - first) % stride == 0:
            events.append(train(step))
        if evaluated:
            events.append(val(step))
    return events


STARTS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 20), st.integers(1, 7), st.booleans()),
    min_size=1,
    max_size=5,
)


@given(STARTS)
def test_however_a_run_is_killed_and_goes_on_each_step_is_sent_once(
    tmp_path_factory: pytest.TempPathFactory, starts: list[tuple[int, int, int, bool]]
):
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    kept: list[dict[str, Any]] = []
    sent = 0
    history = []
    write(run)
    follower = Follower(run.events)
    for back, steps, stride, same_process in starts:
        checkpoint = max((e["step"] for e in kept), default=0)
        checkpoint = max(0, checkpoint - back)
        kept = [e for e in kept if e["step"] <= checkpoint]
        write(run, *kept)
        if not same_process:
            follower.close()
            follower = Follower(run.events)
        for event in recorded(checkpoint, checkpoint + steps, stride):
            kept.append(event)
            with run.events.open("a") as file:
                file.write(json.dumps(event) + "\n")
            history += (new := follower.read(sent))
            sent = new[-1].step if new else sent
    follower.close()
    assert all(one.step < other.step for one, other in pairwise(history))
    evaluated = {point.step for point in history if "val/loss" in point.values}
    assert evaluated == set(range(EVERY, sent + 1, EVERY))


def test_passwords_of_urls_and_what_the_environment_hides_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "")
    said = without_secrets(f"https://me:pw@host/x@y refused {SECRET}")
    assert said == "https://host/x@y refused ***"


# The processes


class Server:
    """What the stand-ins have been told."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def calls(self, tracker: str, what: str) -> list[dict[str, Any]]:
        file = self._folder / f"{tracker}.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line for line in map(json.loads, lines) if line["what"] == what]

    def steps(self, tracker: str) -> list[int]:
        return [line["step"] for line in self.calls(tracker, "log")]

    def trouble(self, tracker: str, what: str | None) -> None:
        file = self._folder / f"{tracker}.trouble"
        file.unlink(missing_ok=True)
        if what is not None:
            file.write_text(what)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.setenv("FAKE_SERVER", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr(parent, "ENDED_SECONDS", 120.0)  # this machine may be busy
    return Server(folder)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "a-run")


@pytest.fixture
def told(run: RunDirectory) -> Callable[..., list[str]]:
    """Tells trackers of the run as it stands, and returns what there is to say."""

    def told(*names: str, **named: Any) -> list[str]:
        trackers = Trackers(run, Tracking(names or TRACKERS, **named))
        return trackers.update() + trackers.finish()

    return told


def test_each_tracker_gets_the_same_figures(
    run: RunDirectory, server: Server, told: Callable[..., list[str]]
):
    write(run, train(10), train(20), val(20), train(30))
    run.write(exit_code=0)
    lines = told(project="my project", name="first try")
    assert [line.partition(":")[0] for line in lines] == list(TRACKERS)
    assert lines[0].startswith("wandb: https://wandb.test/my project/")
    assert lines[1] == f"tensorboard: tensorboard --logdir {run.path}/trackers/tensorboard"
    assert lines[2] == "mlflow: https://mlflow.test/#/experiments/0/runs/run-0"
    expected = {point.step: point.values for point in points([train(10), train(20), val(20)])}
    for tracker in TRACKERS:
        logged = {line["step"]: line["values"] for line in server.calls(tracker, "log")}
        assert logged == expected
    for tracker in ("tensorboard", "mlflow"):
        times = [line["time"] for line in server.calls(tracker, "log")]
        assert times == [1767323045.0, 1767323049.0]
    [init], [made] = server.calls("wandb", "init"), server.calls("mlflow", "run")
    assert (init["project"], init["name"], made["name"]) == ("my project", "first try", "first try")
    assert len(server.calls("wandb", "finish")) == 1
    assert [line["status"] for line in server.calls("mlflow", "status")] == ["FINISHED"]
    assert SECRET not in str(init["command"])


def test_a_run_that_goes_on_stays_the_same_and_repeats_nothing(
    run: RunDirectory, server: Server, told: Callable[..., list[str]]
):
    before = [train(10), train(20), val(20)]
    write(run, *before, train(30), train(40), val(40))
    run.write(exit_code=75)
    told()
    assert server.steps("mlflow") == [10, 20, 30, 40]
    write(run, *before, train(25), train(35), train(40), val(40), train(50))
    told()
    write(run, *before, train(40), val(40), train(50), train(60), val(60))
    run.write(exit_code=0)
    told()
    for tracker in TRACKERS:
        assert server.steps(tracker) == [10, 20, 30, 40, 50, 60]
        assert len({line["id"] for line in server.calls(tracker, "log")}) == 1
    states = [line["status"] for line in server.calls("mlflow", "status")]
    assert states == ["KILLED", "RUNNING", "KILLED", "RUNNING", "FINISHED"]


def test_a_machine_with_an_old_copy_of_the_run_asks_the_tracker_how_far_it_is(
    run: RunDirectory, server: Server, told: Callable[..., list[str]]
):
    write(run, train(10), val(10))
    told()
    copies = {path: path.read_bytes() for path in run.trackers.glob("*.json")}
    write(run, train(10), val(10), train(20), val(20))
    told()
    for path, content in copies.items():
        path.write_bytes(content)
    (run.trackers / "tensorboard").rename(run.trackers / "lost")  # its files are of the machine
    told()
    assert server.steps("wandb") == server.steps("mlflow") == [10, 20]
    assert server.steps("tensorboard") == [10, 20, 10, 20]


def test_another_run_of_the_same_name_is_another_one_there(
    run: RunDirectory, tmp_path: Path, server: Server, told: Callable[..., list[str]]
):
    write(run, train(10), val(10))
    told("wandb")
    run.path.rename(tmp_path / "aside")
    write(run, train(10), val(10))
    told("wandb")
    one, other = (line["id"] for line in server.calls("wandb", "log"))
    assert one != other


def test_a_package_that_is_missing_is_one_line(
    run: RunDirectory, server: Server, told: Callable[..., list[str]]
):
    server.trouble("wandb", "missing")
    write(run, train(10), val(10))
    said, other = told("wandb", "mlflow")
    assert said == (
        "wandb: is not installed: pip install 'pitstop[track]'; training goes on without it"
    )
    assert other.startswith("mlflow: https://")
    assert server.steps("mlflow") == [10]


def test_a_missing_login_is_one_line_without_a_secret(
    run: RunDirectory, server: Server, told: Callable[..., list[str]]
):
    server.trouble("wandb", f"raises in init: \nno login for {SECRET}\nsee the manual")
    write(run, train(10), val(10))
    assert told("wandb") == ["wandb: no login for ***; training goes on without it"]
    assert SECRET not in run.tracker("wandb").read_text()


def test_one_that_fails_is_told_once_and_tried_again_later(
    run: RunDirectory, server: Server, monkeypatch: pytest.MonkeyPatch
):
    now = 0.0
    write(run, train(10), val(10))
    server.trouble("mlflow", "raises in log: 503")
    trackers = Trackers(run, Tracking(("mlflow",)), clock=lambda: now)
    assert trackers.update() == []
    [said, why] = trackers.finish()
    assert said.startswith("mlflow: https://")
    assert why == "mlflow: 503; training goes on without it"
    assert trackers.update() == trackers.finish() == []
    now += AGAIN_AFTER
    assert trackers.update() == trackers.finish() == []
    server.trouble("mlflow", None)
    now += AGAIN_AFTER - 1
    assert trackers.update() == trackers.finish() == []
    assert server.steps("mlflow") == []
    now += 1
    assert trackers.update() == trackers.finish() == []
    assert server.steps("mlflow") == [10]


def test_one_that_hangs_at_the_end_is_left_behind(
    run: RunDirectory, server: Server, monkeypatch: pytest.MonkeyPatch
):
    server.trouble("wandb", "hangs in init")
    write(run, train(10), val(10))
    monkeypatch.setattr(parent, "INTERRUPTED_SECONDS", 0.05)
    trackers = Trackers(run, Tracking(("wandb",)))
    assert trackers.update() == []
    assert trackers.finish(hurried=True) == ["wandb: took too long and was stopped"]


def test_one_that_hangs_ends_itself(run: RunDirectory, server: Server):
    server.trouble("wandb", "hangs in log")
    write(run, train(10), val(10))
    code = (
        "import sys; from pitstop.report import track; from pitstop.io.run_directory import *\n"
        "track.HANGS_AFTER = 0.3\n"
        f"sys.exit(track.track('wandb', RunDirectory(Path({str(run.path)!r})), 'p', 'n'))"
    )
    child = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, check=False)
    assert child.returncode == 1
    assert read_json(run.tracker("wandb"))["problem"] == "took too long and was stopped"


def test_a_child_that_cannot_start_is_one_line(
    run: RunDirectory, told: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
):
    write(run)
    monkeypatch.setattr(sys, "executable", os.devnull)
    [said] = told("wandb")
    assert said.startswith("wandb: ")
    assert said.endswith("; training goes on without it")


def test_without_trackers_no_process_is_started(run: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(subprocess, "Popen")
    trackers = Trackers(run, Tracking())
    assert trackers.update() == trackers.finish() == []
    assert not run.path.exists()
