"""A run that is interrupted anywhere ends with the bits of one that is not."""

import csv
import hashlib
import json
from pathlib import Path

import pytest

from pitstop.engine.outcome import FINISHED, INTERRUPTED, TARGET_MET
from pitstop.io.records import read_events
from pitstop.io.run_directory import RunDirectory

WEIGHTS = ("last", "last-raw", "best", "best-raw")


def fingerprints(out: Path) -> dict[str, str]:
    files = {name: out / f"{name}.safetensors" for name in WEIGHTS}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def log_without_times(out: Path) -> list[dict[str, str]]:
    timed = {"images_per_second", "seconds", "wait_seconds", "memory_mb", "wall_seconds"}
    with RunDirectory(out).csv.open() as file:
        return [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]


@pytest.fixture
def uninterrupted(trainer, tmp_path):
    out = tmp_path / "uninterrupted"
    assert trainer(out) == FINISHED
    return out


def test_interrupted_at_every_single_step(trainer, uninterrupted, tmp_path):
    out, starts = tmp_path / "run", 1
    while trainer(out, steps=1) == INTERRUPTED:
        assert trainer.steps == 1
        starts += 1
    assert starts == json.loads((out / "run.json").read_text())["steps"] + 1
    assert fingerprints(out) == fingerprints(uninterrupted)
    assert log_without_times(out) == log_without_times(uninterrupted)


def test_interrupted_at_any_moment_also_within_an_evaluation(trainer, uninterrupted, tmp_path):
    trainer(tmp_path / "count")
    for moment in range(1, trainer.polls, 3):
        out = tmp_path / f"stopped-at-{moment}"
        assert trainer(out, stop_at=moment) == INTERRUPTED
        assert json.loads((out / "run.json").read_text())["exit_code"] == 75
        assert trainer(out) == FINISHED
        assert fingerprints(out) == fingerprints(uninterrupted), moment
        assert log_without_times(out) == log_without_times(uninterrupted), moment


def test_each_epoch_is_evaluated_once_in_the_records(trainer, uninterrupted, tmp_path):
    out = tmp_path / "run"
    while trainer(out, steps=3) == INTERRUPTED:
        pass
    steps = [e["step"] for e in read_events(RunDirectory(out).events) if e["kind"] == "val"]
    assert steps == [4, 8, 11, 14]


def test_other_seed_other_weights(trainer, tiny, uninterrupted, tmp_path):
    trainer(tmp_path / "other", recipe=tiny(seed=1))
    assert fingerprints(tmp_path / "other")["last"] != fingerprints(uninterrupted)["last"]


def test_the_number_of_decoding_threads_changes_nothing(trainer, uninterrupted, tmp_path):
    from pitstop.engine import train as engine

    class OneWorker(engine.Loader):
        def __init__(self, *args, workers: int, prefetch: int, **options) -> None:
            super().__init__(*args, workers=1, prefetch=1, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "Loader", OneWorker)
        trainer(tmp_path / "one")
    assert fingerprints(tmp_path / "one") == fingerprints(uninterrupted)


def test_a_damaged_newest_checkpoint_costs_only_its_work(trainer, uninterrupted, tmp_path):
    out = tmp_path / "run"
    assert trainer(out, stop_at=20) == INTERRUPTED
    newest = max((out / "checkpoints").glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(bytes(damaged))
    assert trainer(out) == FINISHED
    assert "is damaged" in trainer.said
    assert fingerprints(out) == fingerprints(uninterrupted)
    assert log_without_times(out) == log_without_times(uninterrupted)


def test_extension_leaves_the_past_alone_and_is_exact_too(trainer, uninterrupted, tmp_path):
    before = log_without_times(uninterrupted)
    assert trainer(uninterrupted, extend_epochs=2.0, extend_lr=0.01) == FINISHED
    assert "the end moves from epoch" in trainer.said
    after = log_without_times(uninterrupted)
    assert after[: len(before)] == before
    assert len(after) == len(before) + 2

    out = tmp_path / "run"
    assert trainer(out) == FINISHED
    while trainer(out, steps=2, extend_epochs=2.0, extend_lr=0.01) == INTERRUPTED:
        pass
    assert fingerprints(out) == fingerprints(uninterrupted)


def test_a_finished_run_is_left_alone(trainer, uninterrupted):
    before = (uninterrupted / "events.jsonl").read_text()
    assert trainer(uninterrupted) == FINISHED
    assert "finished" in trainer.said
    assert (uninterrupted / "events.jsonl").read_text() == before


def test_the_target_ends_the_run_at_the_evaluation_that_meets_it(trainer, tiny, tmp_path):
    recipe = tiny(target_accuracy=1.0)
    assert trainer(tmp_path / "run", recipe=recipe) == TARGET_MET
    stated = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (stated["status"], stated["exit_code"]) == ("target met", 0)
    assert stated["step"] in (4, 8, 11)
    assert trainer(tmp_path / "run", recipe=recipe) == TARGET_MET
    assert "target met" in trainer.said
