"""The records of a run: `events.jsonl` is the truth, the CSV and the text log follow from it.

On resume the events are cut back to the checkpoint's step, and the other two are written anew from
what is left, so that all three read as if nothing had happened.
"""

import csv
import io
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pitstop.core.errors import InputError
from pitstop.io.run_directory import RunDirectory
from pitstop.io.storage import write_text

Event = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of training_log.csv: an epoch, from the evaluation before to its own.

    Losses are means, accuracies percentages, rates of training alone, `seconds` and `wait_seconds`
    (waiting for data) those of training, `wall_seconds` of the run so far with all restarts.
    """

    epoch: float
    step: int
    phase: str
    resolution: int
    batch_size: int
    lr: float
    momentum: float
    train_loss: float | None
    train_top1: float | None
    train_top5: float | None
    val_loss: float
    val_top1: float
    val_top5: float
    images_per_second: float | None
    seconds: float
    wait_seconds: float
    memory_mb: float
    wall_seconds: float


def rows(events: Iterable[Event]) -> Iterator[Row]:
    """Yields a row for each evaluation among the events."""
    since = {"images": 0, "loss": 0.0, "top1": 0, "top5": 0, "seconds": 0.0, "wait_seconds": 0.0}
    sums = dict(since)
    for event in events:
        if event["kind"] == "train":
            sums = {key: value + event[key] for key, value in sums.items()}
        elif event["kind"] == "val":
            yield _row(event, sums)
            sums = dict(since)


def _row(val: Event, sums: dict[str, float]) -> Row:
    n, seconds = sums["images"], sums["seconds"]
    return Row(
        epoch=round(val["epoch"], 2),
        step=val["step"],
        phase=val["phase"],
        resolution=val["resolution"],
        batch_size=val["batch_size"],
        lr=val["lr"],
        momentum=val["momentum"],
        train_loss=round(sums["loss"] / n, 5) if n else None,
        train_top1=round(100 * sums["top1"] / n, 3) if n else None,
        train_top5=round(100 * sums["top5"] / n, 3) if n else None,
        val_loss=round(val["loss"], 5),
        val_top1=round(val["top1"], 3),
        val_top5=round(val["top5"], 3),
        images_per_second=round(n / seconds, 1) if seconds else None,
        seconds=round(seconds, 3),
        wait_seconds=round(sums["wait_seconds"], 3),
        memory_mb=round(val["memory_mb"], 1),
        wall_seconds=round(val["wall_seconds"], 1),
    )


def read_events(path: Path) -> list[Event]:
    """Returns the events of a file, up to the first line that a kill left unfinished."""
    events: list[Event] = []
    if not path.exists():
        return events
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events


def lost_work(run: RunDirectory, step: int) -> tuple[int, float]:
    """Returns the steps that are recorded after `step`, and the seconds that they took."""
    after = [e for e in read_events(run.events) if e["kind"] == "train" and e["step"] > step]
    return max((e["step"] - step for e in after), default=0), sum(e["seconds"] for e in after)


class Records:
    """Appends to a run's records.

    Args:
        run: where.
        step: the step of the checkpoint that the run goes on from; None for a new run. What was
            recorded after it is cut off.
        evaluated: whether that checkpoint was saved after its step's evaluation. If not, an
            evaluation recorded at the step is cut off too: it is done again.
    """

    def __init__(self, run: RunDirectory, step: int | None, *, evaluated: bool = True) -> None:
        before = read_events(run.events)
        self._wall_before = max((e["wall_seconds"] for e in before), default=0.0)
        self._started = time.monotonic()
        kept: list[Event] = []
        if step is not None:
            end = {"val": step + evaluated}
            kept = [e for e in before if e["step"] < end.get(e["kind"], step + 1)]
        if before:  # what is cut off has taken its time all the same
            kept.append({"kind": "opened", "step": step or 0, "wall_seconds": self._wall_before})
        self._run = run
        self._unrowed: list[Event] = []
        self.evaluations: dict[int, Event] = {}
        """The `val` events, by step."""
        write_text(run.events, "".join(json.dumps(event) + "\n" for event in kept))
        write_text(run.csv, _csv_line(field.name for field in fields(Row)))
        write_text(run.text, "")
        self._events = run.events.open("a", encoding="utf-8")
        self._csv = run.csv.open("a", encoding="utf-8")
        self._text = run.text.open("a", encoding="utf-8")
        for event in kept:
            self._derive(event)
        self._flush()

    def add(self, kind: str, step: int, **values: Any) -> None:
        """Appends an event; `step` counts the steps done.

        Raises:
            InputError: the disk is full, or gone: a run whose records end is none to go on with.
        """
        event = {
            "kind": kind,
            "step": step,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "wall_seconds": round(self.wall_seconds(), 3),
            **values,
        }
        try:
            self._events.write(json.dumps(event) + "\n")
            self._derive(event)
            self._flush()
        except OSError as error:
            fix = "make room, and start it again; it goes on from its last checkpoint"
            raise InputError(f"{self._run.events}: {error.strerror}: {fix}") from None

    def wall_seconds(self) -> float:
        """Returns the seconds that the run's processes have run, restarts included."""
        return self._wall_before + time.monotonic() - self._started

    def best(self) -> Event | None:
        """Returns the evaluation with the highest top-1, the first of equal ones."""
        return max(self.evaluations.values(), key=lambda e: e["top1"], default=None)

    def last(self) -> Event | None:
        """Returns the latest evaluation."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else None

    def sync(self) -> None:
        """Puts what was added on disk; a checkpoint must not be newer than the records."""
        os.fsync(self._events.fileno())

    def close(self) -> None:
        """Closes the files."""
        for file in (self._events, self._csv, self._text):
            with suppress(OSError):  # it is told where it came up
                file.close()

    def _flush(self) -> None:
        for file in (self._events, self._csv, self._text):
            file.flush()

    def _derive(self, event: Event) -> None:
        """Writes what the event means for the CSV and the text log."""
        self._unrowed.append(event)
        if event["kind"] == "val":
            self.evaluations[event["step"]] = event
            row = next(rows(self._unrowed))
            self._unrowed = []
            self._csv.write(_csv_line(asdict(row).values()))
            self._text.write(_text_line(row))
        elif event["kind"] == "note":
            self._text.write(event["text"] + "\n")


def _csv_line(values: Iterable[Any]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(values)
    return out.getvalue()


def _text_line(row: Row) -> str:
    speed = f"{row.images_per_second:,.0f} images/s" if row.images_per_second else ""
    train = (
        f"train loss {row.train_loss:.4f}  top1 {row.train_top1:5.2f}"
        if row.train_loss is not None
        else ""
    )
    return (
        f"epoch {row.epoch:6.2f}  step {row.step:7d}  {row.phase}  {row.resolution} px  "
        f"lr {row.lr:.3g}  {train}  val loss {row.val_loss:.4f}  top1 {row.val_top1:5.2f}  "
        f"top5 {row.val_top5:5.2f}  {speed}\n"
    )
