"""The running sums: what is read is what was added."""

from types import SimpleNamespace

import pytest
import torch

from pitstop.core.recipe import parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.engine import meter as module
from pitstop.engine.meter import FLUSH_SECONDS, Meter
from pitstop.runtime.ranks import Ranks

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
def meter(clock) -> Meter:
    return Meter(Ranks())


def add(meter: Meter, timeline: Timeline, step: int, *metrics: float, waited: float = 0.0) -> None:
    meter.add(timeline.settings_at(step), torch.tensor(metrics), waited)


def test_nothing_added_is_nothing_read(meter):
    assert meter.flush() is None


def test_the_sums_read_are_those_added(meter, timeline, clock):
    add(meter, timeline, 0, 20.5, 3, 7, waited=0.5)
    add(meter, timeline, 1, 10.25, 4, 8, waited=0.25)
    clock.now += 4
    reading = meter.flush()
    assert (reading.first, reading.last) == (timeline.settings_at(0), timeline.settings_at(1))
    assert (reading.images, reading.loss, reading.mean_loss) == (20, 30.75, 1.5375)
    assert (reading.top1, reading.top5) == (7, 15)
    assert (reading.seconds, reading.wait_seconds) == (4.0, 0.75)
    assert reading.finite_loss


def test_images_are_those_of_each_steps_batch(meter, timeline, clock):
    """A reading may reach from one phase into the next."""
    assert [timeline.settings_at(step).segment.batch_size for step in (1, 2)] == [10, 4]
    add(meter, timeline, 1, 14.0, 3, 7)
    add(meter, timeline, 2, 14.0, 1, 4)
    clock.now += 1
    reading = meter.flush()
    assert (reading.images, reading.mean_loss) == (14, 2.0)
    assert reading.last.segment.phase.name == "large"


def test_each_reading_begins_anew_and_together_they_are_all(meter, timeline, clock):
    readings = []
    for step in range(7):
        add(meter, timeline, step, 2.0**step, step, step + 1, waited=0.5)
        clock.now += 1
        if step in (0, 3, 6):
            readings.append(meter.flush())
    assert [(r.first.step, r.last.step) for r in readings] == [(0, 0), (1, 3), (4, 6)]
    assert sum(r.loss for r in readings) == 2**7 - 1
    assert sum(r.top1 for r in readings) == sum(range(7))
    assert sum(r.seconds for r in readings) == 7.0
    assert sum(r.images for r in readings) == 40
    assert sum(r.wait_seconds for r in readings) == 3.5
    assert meter.flush() is None


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_reading_tells_that_a_loss_was_not_finite(meter, timeline, clock, loss):
    add(meter, timeline, 0, 1.0, 1, 1)
    add(meter, timeline, 1, loss, 1, 1)
    clock.now += 1
    reading = meter.flush()
    assert reading is not None
    assert not reading.finite_loss


def test_many_sums_do_not_lose_small_ones(meter, timeline, clock):
    """float32 would not see the ones beside 2**24."""
    add(meter, timeline, 0, 2.0**24, 0, 0)
    for _ in range(10):
        add(meter, timeline, 1, 1.0, 0, 0)
    clock.now += 1
    assert meter.flush().loss == 2**24 + 10


def test_it_is_due_after_some_seconds(meter, timeline, clock):
    assert not meter.due()
    clock.now += FLUSH_SECONDS - 0.5
    assert not meter.due()
    clock.now += 0.5
    assert meter.due()
    add(meter, timeline, 0, 1.0, 1, 1)
    meter.flush()
    assert not meter.due()


def test_time_that_was_not_training_is_left_out(meter, timeline, clock):
    add(meter, timeline, 0, 1.0, 1, 1)
    clock.now += 2
    first = meter.flush()
    clock.now += 1000  # an evaluation
    meter.resume()
    add(meter, timeline, 1, 1.0, 1, 1)
    clock.now += 3
    assert (first.seconds, meter.flush().seconds) == (2.0, 3.0)


def test_what_was_added_is_not_read_before_it_is_flushed(meter, timeline, clock):
    """A meta tensor cannot be read: adding it waits for no device."""
    meter.add(timeline.settings_at(0), torch.zeros(3, device="meta"), 0.0)
    with pytest.raises((RuntimeError, NotImplementedError)):
        meter.flush()
