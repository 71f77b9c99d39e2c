"""The running sums: what is recorded is what was added."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pitstop.core.recipe import parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.engine import meter as module
from pitstop.engine.meter import FLUSH_SECONDS, Meter
from pitstop.io.records import Event, Records, read_events
from pitstop.io.run_directory import RunDirectory

PHASES = [
    {"name": "small", "duration": "1ep", "resolution": 16, "batch_size": 10},
    {"name": "large", "duration": "1ep", "resolution": 24, "batch_size": 4},
]


@pytest.fixture
def timeline() -> Timeline:
    return Timeline(parse_recipe({"epochs": 2, "phases": PHASES}, "test"), num_samples=20)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that stands still unless it is moved."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def meter(run, timeline, clock) -> Iterator[Meter]:
    run.path.mkdir()
    records = Records(run, 0)
    yield Meter(records, timeline)
    records.close()


def add(meter: Meter, timeline: Timeline, step: int, *metrics: float, waited: float = 0.0) -> None:
    meter.add(timeline.settings_at(step), torch.tensor(metrics), waited)


def events(run: RunDirectory) -> list[Event]:
    return [event for event in read_events(run.events) if event["kind"] == "train"]


def test_nothing_added_is_nothing_recorded(meter, run):
    assert meter.flush() is None
    assert events(run) == []


def test_the_sums_recorded_are_those_added(meter, run, timeline, clock):
    add(meter, timeline, 0, 20.5, 3, 7, waited=0.5)
    add(meter, timeline, 1, 10.25, 4, 8, waited=0.25)
    clock.now += 4
    meter.flush()
    (event,) = events(run)
    assert (event["first"], event["step"]) == (0, 2)
    assert (event["images"], event["loss"]) == (20, 30.75)
    assert (event["top1"], event["top5"]) == (7, 15)
    assert (event["seconds"], event["wait_seconds"]) == (4.0, 0.75)
    assert event["epoch"] == timeline.epoch(2) == 1.0


def test_a_reading_is_means_and_rates(meter, timeline, clock):
    add(meter, timeline, 0, 20.0, 3, 7, waited=1.0)
    add(meter, timeline, 1, 10.0, 5, 8)
    clock.now += 4
    reading = meter.flush()
    assert (reading.loss, reading.top1) == (1.5, 40.0)
    assert (reading.images_per_second, reading.wait_share) == (5.0, 0.25)
    assert reading.finite


def test_images_are_those_of_each_steps_batch(meter, run, timeline, clock):
    """A reading may reach from one phase into the next."""
    assert [timeline.settings_at(step).segment.batch_size for step in (1, 2)] == [10, 4]
    add(meter, timeline, 1, 14.0, 3, 7)
    add(meter, timeline, 2, 14.0, 1, 4)
    clock.now += 1
    assert meter.flush().loss == 2.0
    (event,) = events(run)
    assert event["images"] == 14
    assert (event["phase"], event["resolution"], event["batch_size"]) == ("large", 24, 4)
    settings = timeline.settings_at(2)
    assert (event["lr"], event["momentum"]) == (settings.lr, settings.momentum)


def test_each_reading_begins_anew_and_together_they_are_all(meter, run, timeline, clock):
    for step in range(7):
        add(meter, timeline, step, 2.0**step, step, step + 1, waited=0.5)
        clock.now += 1
        if step in (0, 3, 6):
            meter.flush()
    recorded = events(run)
    assert [(e["first"], e["step"]) for e in recorded] == [(0, 1), (1, 4), (4, 7)]
    assert sum(e["loss"] for e in recorded) == 2**7 - 1
    assert sum(e["top1"] for e in recorded) == sum(range(7))
    assert sum(e["seconds"] for e in recorded) == meter.seconds == 7.0
    assert sum(e["images"] for e in recorded) == meter.images == 40
    assert sum(e["wait_seconds"] for e in recorded) == 3.5
    assert meter.flush() is None


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_read_but_not_recorded(meter, run, timeline, clock, loss):
    add(meter, timeline, 0, 1.0, 1, 1)
    add(meter, timeline, 1, loss, 1, 1)
    clock.now += 1
    reading = meter.flush()
    assert reading is not None
    assert not reading.finite
    assert events(run) == []


def test_many_sums_do_not_lose_small_ones(meter, run, timeline, clock):
    """float32 would not see the ones beside 2**24."""
    add(meter, timeline, 0, 2.0**24, 0, 0)
    for _ in range(10):
        add(meter, timeline, 1, 1.0, 0, 0)
    clock.now += 1
    meter.flush()
    assert events(run)[0]["loss"] == 2**24 + 10


def test_it_is_due_after_some_seconds(meter, timeline, clock):
    assert not meter.due()
    clock.now += FLUSH_SECONDS - 0.5
    assert not meter.due()
    clock.now += 0.5
    assert meter.due()
    add(meter, timeline, 0, 1.0, 1, 1)
    meter.flush()
    assert not meter.due()


def test_time_that_was_not_training_is_left_out(meter, run, timeline, clock):
    add(meter, timeline, 0, 1.0, 1, 1)
    clock.now += 2
    meter.flush()
    clock.now += 1000  # an evaluation
    meter.resume()
    add(meter, timeline, 1, 1.0, 1, 1)
    clock.now += 3
    meter.flush()
    assert [event["seconds"] for event in events(run)] == [2.0, 3.0]
    assert meter.seconds == 5.0


def test_what_was_added_is_not_read_before_it_is_flushed(meter, timeline, clock):
    """A meta tensor cannot be read: adding it waits for no device."""
    meter.add(timeline.settings_at(0), torch.zeros(3, device="meta"), 0.0)
    with pytest.raises((RuntimeError, NotImplementedError)):
        meter.flush()
