"""Sends a run's figures to a tracker: `python -m pitstop.report.track TRACKER RUN PROJECT NAME`.

The process follows the records until its standard input ends, and then ends too. A state file in
the run directory says how far the tracker has got. So a run that goes on from a checkpoint sends
what the tracker lacks, and what was sent beyond the checkpoint, which is trained again to the same
bits, is not sent twice: wandb would drop it, the others would draw a second line.

Each tracker gets the same names: train/loss, train/top1, train/top5, val/loss, val/top1, val/top5
and lr, over the step. Accuracies are percentages. What is not finite is left out.
"""

import fcntl
import json
import math
import os
import re
import select
import sys
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from importlib import import_module
from pathlib import Path
from threading import Timer
from typing import Any, Protocol

from pitstop.core.errors import InputError
from pitstop.io.records import Event
from pitstop.io.run_directory import RunDirectory
from pitstop.io.storage import read_json, write_json

LOOK_SECONDS = 5.0
"""From one look at the records to the next."""

HANGS_AFTER = 120.0
"""Seconds after which a call of a tracker is given up: more than the 90 s of wandb's own."""

BATCH = 100
"""Points that are sent at once: mlflow takes 1,000 metrics, and a point has at most seven."""


@dataclass(frozen=True)
class Point:
    """What is known at a step."""

    step: int
    time: float
    """Seconds since the epoch: when it was recorded."""
    values: dict[str, float]


class Sink(Protocol):
    """A run at a tracker; opening it goes on with the one of the same id."""

    where: str
    """What a person needs to see it."""
    sent: int | None
    """The last step that it has; 0 without any, None where it cannot know."""

    def send(self, points: Sequence[Point]) -> None:
        """Sends points, of which the steps rise."""
        ...

    def close(self, *, finished: bool) -> None:
        """Sends what it still holds; `finished`: the run came to its end."""
        ...


@dataclass
class State:
    """What the state file of a tracker holds."""

    id: str
    """The run's, at the tracker."""
    sent: int = 0
    """The last step that it was given."""
    pid: int = 0
    """Of the process that wrote this."""
    where: str | None = None
    problem: str | None = None


def read_state(path: Path) -> State | None:
    """Returns the state, None where there is none; a damaged one is none."""
    try:
        stated = read_json(path)
        return State(**{field.name: stated[field.name] for field in fields(State)})
    except (OSError, InputError, KeyError):
        return None


def open_state(path: Path) -> State:
    """Returns the state; a new one, which is written, where there is none."""
    state = read_state(path)
    if state is None:
        state = State(uuid.uuid4().hex)
        write_json(path, asdict(state))
    return state


# What the records say


def points(events: Sequence[Event]) -> list[Point]:
    """Returns the points of `train` and `val` events: an evaluation joins the training before it.

    Training at the end is left out as long as its evaluation may still follow.
    """
    found: dict[int, Point] = {}
    for event in events:
        step = event["step"]
        before = found[step].values if step in found else {}
        when = datetime.fromisoformat(event["time"]).timestamp()
        found[step] = Point(step, when, before | _figures(event))
    if events and events[-1]["kind"] == "train":
        del found[events[-1]["step"]]
    return [point for point in found.values() if point.values]


def _figures(event: Event) -> dict[str, float]:
    kind, images = event["kind"], event["images"]
    scale = {"loss": 1.0, "top1": 1.0, "top5": 1.0}
    if kind == "train":  # there, they are sums
        scale = {"loss": 1 / images, "top1": 100 / images, "top5": 100 / images} if images else {}
    named = {f"{kind}/{key}": event[key] * factor for key, factor in scale.items()}
    return {key: x for key, x in {**named, "lr": event["lr"]}.items() if math.isfinite(x)}


class Follower:
    """Reads records while they are written, and from the start when they were written anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        self._events: list[Event] = []

    def read(self, after: int) -> list[Point]:
        """Returns the points beyond a step, also those that it has returned before."""
        if not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
            self._file.close()
            self._file = self._path.open("rb")
            self._events = []
        self._events += self._appended()
        self._events = [event for event in self._events if event["step"] > after]
        return points(self._events)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _appended(self) -> list[Event]:
        """Returns what is new, without a line that is still being written."""
        start = self._file.tell()
        lines = self._file.read()
        lines = lines[: lines.rfind(b"\n") + 1]
        self._file.seek(start + len(lines))
        events = (json.loads(line) for line in lines.splitlines())
        return [event for event in events if event["kind"] in ("train", "val")]


# The trackers: each by its documented interface


class Wandb:
    """https://docs.wandb.ai/ref/python/init: `resume="allow"` goes on with the run of an id."""

    def __init__(self, place: Path, run_id: str, project: str, name: str) -> None:
        wandb: Any = import_module("wandb")
        self._run = wandb.init(
            dir=str(place),
            id=run_id,
            project=project,
            name=name,
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.where = str(self._run.url)
        self.sent: int | None = self._run.starting_step - 1
        if self._run.offline:
            self.where = f"offline: wandb sync {Path(self._run.dir).parent}"
            self.sent = None

    def send(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log(point.values, step=point.step, commit=True)

    def close(self, *, finished: bool) -> None:
        self._run.finish()


class TensorBoard:
    """Event files in the run directory, by what torch's SummaryWriter writes them with."""

    def __init__(self, place: Path, run_id: str, project: str, name: str) -> None:
        folder = place / "tensorboard"
        writer: Any = import_module("tensorboard.summary.writer.event_file_writer")
        self._event: Any = import_module("tensorboard.compat.proto.event_pb2").Event
        self._summary: Any = import_module("tensorboard.compat.proto.summary_pb2").Summary
        self.where = f"tensorboard --logdir {folder}"
        self.sent: int | None = None if folder.exists() else 0
        self._writer = writer.EventFileWriter(str(folder))

    def send(self, points: Sequence[Point]) -> None:
        for point in points:
            values = [
                self._summary.Value(tag=key, simple_value=value)
                for key, value in point.values.items()
            ]
            summary = self._summary(value=values)
            event = self._event(step=point.step, wall_time=point.time, summary=summary)
            self._writer.add_event(event)
        self._writer.flush()

    def close(self, *, finished: bool) -> None:
        self._writer.close()


class Mlflow:
    """https://mlflow.org/docs/latest/python_api/mlflow.client.html; its run is found by a tag."""

    def __init__(self, place: Path, run_id: str, project: str, name: str) -> None:
        mlflow: Any = import_module("mlflow")
        self._metric: Any = import_module("mlflow.entities").Metric
        self._client = client = mlflow.MlflowClient()
        known = client.get_experiment_by_name(project)
        experiment = client.create_experiment(project) if known is None else known.experiment_id
        found = client.search_runs([experiment], filter_string=f"tags.`{TAG}` = '{run_id}'")
        if found:
            self._id = found[0].info.run_id
            client.update_run(self._id, status="RUNNING", name=name)
            history = client.get_metric_history(self._id, "lr")
        else:
            self._id = client.create_run(experiment, run_name=name, tags={TAG: run_id}).info.run_id
            history = []
        self.sent: int | None = max((metric.step for metric in history), default=0)
        uri = mlflow.get_tracking_uri()
        at_server = f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{self._id}"
        self.where = at_server if uri.startswith("http") else f"run {self._id} in {uri}"

    def send(self, points: Sequence[Point]) -> None:
        metrics = [
            self._metric(key, value, round(1000 * point.time), point.step)
            for point in points
            for key, value in point.values.items()
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._id, status="FINISHED" if finished else "KILLED")


TAG = "pitstop.run"
"""Of mlflow's runs: the id that the state file has."""

SINKS: dict[str, Callable[[Path, str, str, str], Sink]] = {
    "wandb": Wandb,
    "tensorboard": TensorBoard,
    "mlflow": Mlflow,
}


# The process


def track(tracker: str, run: RunDirectory, project: str, name: str) -> int:
    """Sends what the records say until standard input ends; returns the exit code.

    What goes wrong is the `problem` in the state file.
    """
    run.trackers.mkdir(exist_ok=True)
    with (run.trackers / f"{tracker}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the process of a run that was killed still finishes
        file = run.tracker(tracker)
        state = open_state(file)
        state.pid, state.where, state.problem = os.getpid(), None, None
        write_json(file, asdict(state))
        try:
            _follow(tracker, run, project, name, state)
        except Exception as error:  # whatever a tracker raises
            state.problem = _described(tracker, error)
            write_json(file, asdict(state))
            return 1
    return 0


def _follow(tracker: str, run: RunDirectory, project: str, name: str, state: State) -> None:
    file = run.tracker(tracker)

    @contextmanager
    def limited() -> Generator[None]:
        """Ends the process when the block hangs."""

        def give_up() -> None:
            write_json(file, asdict(state) | {"problem": "took too long and was stopped"})
            os._exit(1)

        timer = Timer(HANGS_AFTER, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    with limited():
        sink = SINKS[tracker](run.trackers, state.id, project, name)
    state.sent = state.sent if sink.sent is None else sink.sent
    state.where = without_secrets(sink.where)
    write_json(file, asdict(state))
    follower, ended = Follower(run.events), False
    while not ended:
        ended = _ends_within(LOOK_SECONDS)
        new = follower.read(state.sent)
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            with limited():
                sink.send(batch)
            state.sent = batch[-1].step
            write_json(file, asdict(state))
    follower.close()
    with limited():
        sink.close(finished=(run.read() or {}).get("exit_code") == 0)


def _ends_within(seconds: float) -> bool:
    """Waits until standard input ends, at most so long; says whether it did."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def _described(tracker: str, error: Exception) -> str:
    """Returns one line of an error, and the fix where it is known."""
    if isinstance(error, ModuleNotFoundError) and error.name == tracker:
        return "is not installed: pip install 'pitstop[track]'"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return without_secrets(lines[0].rstrip(".") if lines else type(error).__name__)


def without_secrets(text: str) -> str:
    """Returns a text without the passwords of URLs, and without what the environment hides."""
    text = re.sub(r"(?<=://)[^/@\s]+@", "", text)
    for name, value in os.environ.items():
        if name.endswith(SECRETS) and value:
            text = text.replace(value, "***")
    return text


SECRETS = ("KEY", "TOKEN", "PASSWORD", "SECRET")
"""How the names of variables end that hold one."""


if __name__ == "__main__":
    tracker_, run_, project_, name_ = sys.argv[1:]
    sys.exit(track(tracker_, RunDirectory(Path(run_)), project_, name_))
