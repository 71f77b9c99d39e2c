"""Records: after a kill and a resume they read as if nothing had happened."""

import csv
import json
import tempfile
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pitstop.io import records as records_module
from pitstop.io.records import Records, Row, read_events, rows
from pitstop.io.run_directory import RunDirectory

PASSING = {"time", "wall_seconds"}
"""What depends on the clock."""


def train(images: int = 10, loss: float = 20.0, top1: int = 4, top5: int = 8, seconds: float = 0.5):
    sums = {"images": images, "loss": loss, "top1": top1, "top5": top5}
    return {**sums, "seconds": seconds, "wait_seconds": seconds / 10}


def val(epoch: float = 1.0, top1: float = 50.0, **more):
    at = {"epoch": epoch, "phase": "small", "resolution": 96, "batch_size": 10, "lr": 0.1}
    found = {"momentum": 0.9, "loss": 1.25, "top1": top1, "top5": 90.0, "memory_mb": 12.34}
    return {**at, **found, **more}


def event(kind: str, step: int, wall_seconds: float = 1.0, **values):
    return {"kind": kind, "step": step, "wall_seconds": wall_seconds, **values}


def play(records: Records, steps: Iterable[int], evaluated: int | None = None) -> None:
    """What a run records while `steps` are done: an evaluation owed at a step comes before it.

    That of the step `evaluated` has been done already.
    Sums of training come every 2 steps, an evaluation every 6, a note at every 5.
    """
    for step in steps:
        if step and step % 6 == 0 and step != evaluated:
            records.add("val", step, **val(epoch=step / 6, top1=step / 3))
        done = step + 1
        if done % 2 == 0:
            records.add("train", done, **train(loss=100.0 / done, seconds=0.25 + done))
        if done % 5 == 0:
            records.add("note", done, text=f"{done} steps done")


def without_clock(run: RunDirectory) -> tuple[list, list, str]:
    lasting = [event for event in read_events(run.events) if event["kind"] != "opened"]
    events = [{k: v for k, v in e.items() if k not in PASSING} for e in lasting]
    return (
        events,
        [{k: v for k, v in r.items() if k not in PASSING} for r in table(run)],
        (run.text.read_text()),
    )


def table(run: RunDirectory) -> list[dict[str, str]]:
    with run.csv.open(newline="") as file:
        return list(csv.DictReader(file))


def recorded(
    run: RunDirectory, steps: Iterable[int], step: int | None = None, evaluated: bool = False
) -> None:
    """A process that goes on from the checkpoint of `step` and is gone after `steps`."""
    with closing(Records(run, step, evaluated=evaluated)) as records:
        play(records, steps, step if evaluated else None)


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the records' clock shows, to set."""
    shown = SimpleNamespace(now=0.0)
    fake = SimpleNamespace(
        monotonic=lambda: shown.now,
        gmtime=lambda: None,
        strftime=lambda *_: "2026-01-01T00:00:00Z",
    )
    monkeypatch.setattr(records_module, "time", fake)
    return shown


# Rows


def test_a_row_sums_what_was_trained_since_the_evaluation_before():
    first, second = rows(
        [
            event("train", 2, **train(images=10, loss=20.0, top1=4, top5=8, seconds=2.0)),
            event("train", 4, **train(images=30, loss=40.0, top1=4, top5=20, seconds=3.0)),
            event("val", 4, **val()),
            event("train", 6, **train(images=20, loss=10.0, top1=20, top5=20, seconds=4.0)),
            event("val", 6, 7.77, **val(epoch=1.5, top1=60.12345)),
        ]
    )
    assert (first.train_loss, first.train_top1, first.train_top5) == (1.5, 20.0, 70.0)
    assert (first.images_per_second, first.seconds, first.wait_seconds) == (8.0, 5.0, 0.5)
    assert (second.train_loss, second.train_top1, second.images_per_second) == (0.5, 100.0, 5.0)
    assert (second.epoch, second.step, second.val_top1) == (1.5, 6, 60.123)
    assert (second.val_loss, second.val_top5, second.wall_seconds) == (1.25, 90.0, 7.8)
    assert (second.phase, second.resolution, second.batch_size) == ("small", 96, 10)


def test_there_is_no_row_without_an_evaluation():
    assert list(rows([event("train", 2, **train())])) == []
    assert list(rows([])) == []


def test_an_evaluation_without_training_before_it_has_no_training_values():
    (row,) = rows([event("val", 4, **val())])
    assert (row.train_loss, row.train_top1, row.images_per_second) == (None, None, None)
    assert row.val_top1 == 50.0


def test_other_events_do_not_disturb_a_row():
    noted = [event("note", 1, text="x"), event("train", 2, **train()), event("val", 2, **val())]
    assert list(rows(noted)) == list(rows(noted[1:]))


# Files


def test_the_csv_is_numbers_under_the_names_of_a_row(run):
    recorded(run, range(13))
    lines = table(run)
    assert [line["step"] for line in lines] == ["6", "12"]
    assert list(lines[0]) == list(Row.__dataclass_fields__)
    numbers = [{k: float(v) for k, v in line.items() if k != "phase"} for line in lines]
    assert [line["val_top1"] for line in numbers] == [2.0, 4.0]
    assert [line["epoch"] for line in numbers] == [1.0, 2.0]


def test_the_csv_has_a_header_before_there_is_a_row(run):
    recorded(run, [])
    assert run.csv.read_text().strip().split(",") == list(Row.__dataclass_fields__)


def test_a_value_that_is_missing_is_an_empty_cell(run):
    records = Records(run, None)
    records.add("val", 1, **val(phase='small, "odd"'))
    records.close()
    (line,) = table(run)
    assert (line["train_loss"], line["phase"]) == ("", 'small, "odd"')


def test_everything_can_be_read_while_the_run_goes_on(run):
    with closing(Records(run, None)) as records:
        play(records, range(7))
        assert [e["step"] for e in read_events(run.events)] == [2, 4, 5, 6, 6]
        assert len(table(run)) == 1
        assert "5 steps done\n" in run.text.read_text()


def test_the_text_log_has_a_line_for_each_evaluation_and_note_in_their_order(run):
    recorded(run, range(13))
    lines = run.text.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["5", "epoch", "10", "epoch"]
    for shown in ("step       6", "small", "96 px", "lr 0.1", "train loss", "top1  2.00"):
        assert shown in lines[1]


def test_a_training_loss_of_zero_is_shown(run):
    records = Records(run, None)
    records.add("train", 2, **train(loss=0.0))
    records.add("val", 2, **val())
    records.close()
    assert "train loss 0.0000" in run.text.read_text()


def test_a_diverged_loss_is_recorded_and_survives_a_resume(run):
    records = Records(run, None)
    records.add("train", 2, **train(loss=float("nan")))
    records.add("val", 2, **val(loss=float("inf")))
    records.close()
    Records(run, 3).close()
    assert (table(run)[0]["train_loss"], table(run)[0]["val_loss"]) == ("nan", "inf")


def test_sync_puts_the_events_on_disk(run):
    records = Records(run, None)
    play(records, range(4))
    records.sync()
    records.close()
    assert len(read_events(run.events)) == 2


# Cutting back


@pytest.mark.parametrize(("evaluated", "left"), [(False, [6]), (True, [6, 12])])
def test_what_was_recorded_after_the_checkpoint_is_cut_off(run, evaluated, left):
    """With it an evaluation at its step that the checkpoint does not know of: it is done again."""
    recorded(run, range(20))
    with closing(Records(run, 12, evaluated=evaluated)) as records:
        assert list(records.evaluations) == left
    kept = read_events(run.events)
    assert [e["step"] for e in kept if e["kind"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert [e["step"] for e in kept if e["kind"] == "val"] == left
    assert [int(line["step"]) for line in table(run)] == left
    assert "10 steps done" in run.text.read_text()
    assert "15 steps done" not in run.text.read_text()


def test_evaluations_are_at_hand_by_their_step(run):
    with closing(Records(run, None)) as records:
        play(records, range(13))
        assert {step: e["top1"] for step, e in records.evaluations.items()} == {6: 2.0, 12: 4.0}


def test_a_new_run_begins_with_empty_records(run):
    recorded(run, range(20))
    Records(run, None).close()
    assert [event["kind"] for event in read_events(run.events)] == ["opened"]
    assert (table(run), run.text.read_text()) == ([], "")


@pytest.mark.parametrize("cut", range(1, 200, 13))
def test_a_line_that_a_kill_left_unfinished_is_ignored(run, cut):
    recorded(run, range(7))
    whole = read_events(run.events)
    line = json.dumps(event("val", 7, **val()))
    with run.events.open("a") as file:
        file.write(line[: min(cut, len(line) - 1)])
    assert read_events(run.events) == whole
    recorded(run, range(6, 14), step=6)
    assert [json.loads(text) for text in run.events.read_text().splitlines()]


def test_events_that_are_not_there_are_none(tmp_path):
    assert read_events(tmp_path / "absent") == []


kills = st.tuples(st.integers(0, 25), st.integers(0, 6), st.booleans(), st.booleans())


@settings(max_examples=20)
@given(st.lists(kills, max_size=4))
def test_an_interrupted_run_leaves_the_records_of_one_that_never_was(kills):
    """Each kill comes some steps after its start; the next process goes on from a step before.

    Its checkpoint was saved before or after the evaluation; the last line may be half written.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = RunDirectory(Path(folder, "whole")), RunDirectory(Path(folder, "killed"))
        recorded(whole, range(30))
        checkpoint, evaluated = 0, False
        for ran, lost, after_evaluation, unfinished in kills:
            reached = min(30, checkpoint + ran)
            recorded(killed, range(checkpoint, reached), checkpoint, evaluated)
            if unfinished:
                with killed.events.open("a") as file:
                    file.write('{"kind": "val", "st')
            if reached - lost > checkpoint:
                checkpoint, evaluated = reached - lost, after_evaluation and lost > 0
        recorded(killed, range(checkpoint, 30), checkpoint, evaluated)
        assert without_clock(killed) == without_clock(whole)


# Wall time


def test_wall_seconds_are_those_of_the_process_so_far(run, clock):
    clock.now = 1000.0
    with closing(Records(run, None)) as records:
        clock.now = 1012.5
        assert records.wall_seconds() == 12.5
        records.add("val", 1, **val())
    assert table(run)[0]["wall_seconds"] == "12.5"
    assert read_events(run.events)[0]["time"] == "2026-01-01T00:00:00Z"


def test_wall_seconds_keep_counting_what_was_cut_off(run, clock):
    records = Records(run, None)
    for step in range(1, 11):
        clock.now = 10.0 * step
        records.add("train", step, **train())
    records.close()
    clock.now = 5000.0
    with closing(Records(run, 4)) as records:
        assert records.wall_seconds() == 100.0
        clock.now = 5001.0
        records.add("train", 5, **train())
    assert read_events(run.events)[-1]["wall_seconds"] == 101.0


def test_wall_seconds_survive_a_process_that_is_killed_before_it_records_anything(run, clock):
    records = Records(run, None)
    for step in range(1, 11):
        clock.now = 10.0 * step
        records.add("train", step, **train())
    records.close()
    Records(run, 4).close()
    with closing(Records(run, 4)) as records:
        assert records.wall_seconds() == 100.0
