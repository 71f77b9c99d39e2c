"""The ledger: nothing that was paid for is forgotten, whatever ends a process."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pitstop.io import ledger as ledger_module
from pitstop.io.ledger import Ledger


class Clock:
    """What stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_767_225_600.0 + self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ledger_module, "time", clock)
    return clock


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "ledger.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sums(path: Path) -> tuple[float, float, tuple[int, float], int]:
    ledger = Ledger(path)
    return ledger.seconds(), ledger.spent(), ledger.lost(), ledger.fruitless()


# Examples


def test_what_a_run_writes_reads_as_what_happened(path, clock):
    ledger = Ledger(path)
    ledger.begin(step=0, world=8, machine="p4d.24xlarge", price=12.0, attempt=3)
    clock.now += 90
    ledger.alive(step=40, saved_step=25)
    clock.now += 10.5
    ledger.end(step=50, saved_step=50, status="interrupted", exit_code=75)
    start, alive, end = read(path)
    assert start.pop("host")
    assert start == {
        "id": alive["id"],
        "kind": "start",
        "time": "2026-01-01T00:16:40.000+00:00",
        "machine": "p4d.24xlarge",
        "price": 12.0,
        "world": 8,
        "step": 0,
        "attempt": 3,
        "lost_steps": 0,
        "lost_seconds": 0.0,
    }
    mark = {"id": end["id"], "kind": "alive", "seconds": 90.0, "step": 40, "saved_step": 25}
    assert alive == mark
    last = {"kind": "end", "seconds": 100.5, "step": 50, "saved_step": 50}
    assert end == {**mark, **last, "status": "interrupted", "exit_code": 75}
    assert Ledger(path).seconds() == 100.5
    assert Ledger(path).spent() == pytest.approx(100.5 * 12 / 3600)


def test_a_run_that_was_killed_costs_what_it_last_said(path, clock):
    ledger = Ledger(path)
    ledger.begin(step=0, world=1, price=3600.0)
    clock.now += 100
    ledger.alive(step=10, saved_step=0)
    clock.now += 30  # and then it was killed
    assert Ledger(path).spent() == 100
    next_one = Ledger(path)
    next_one.begin(step=0, world=1, price=7200.0)
    clock.now += 5
    assert (next_one.seconds(), next_one.spent()) == (105, 110)


def test_this_process_is_counted_up_to_now(path, clock):
    """Else a limit of cost would be noticed a minute late."""
    ledger = Ledger(path)
    ledger.begin(step=0, world=1, price=3600.0)
    clock.now += 7
    assert (ledger.seconds(), ledger.spent()) == (7, 7)
    ledger.end(step=3, saved_step=3, status="finished", exit_code=0)
    clock.now += 100
    assert (ledger.seconds(), ledger.spent()) == (7, 7)


def test_without_a_price_time_counts_and_dollars_are_those_that_are_known(path, clock):
    for price in (None, 3600.0):
        ledger = Ledger(path)
        ledger.begin(step=0, world=1, price=price)
        clock.now += 20
        ledger.end(step=0, saved_step=0, status="interrupted", exit_code=75)
    assert (Ledger(path).seconds(), Ledger(path).spent()) == (40, 20)


def test_it_says_that_it_lives_once_a_minute_and_at_each_save(path, clock):
    ledger = Ledger(path)
    ledger.begin(step=100, world=1)
    for step in range(101, 301):
        clock.now += 1
        ledger.alive(step, saved_step=200 if step >= 210 else 100)
    said = [(line["seconds"], line["saved_step"]) for line in read(path)[1:]]
    assert said == [(60, 100), (110, 200), (170, 200)]


def test_what_the_starts_have_lost_adds_up(path, clock):
    Ledger(path).begin(step=0, world=1)
    Ledger(path).begin(step=100, world=1, lost_steps=60, lost_seconds=30.25)
    ledger = Ledger(path)
    ledger.begin(step=100, world=1, lost_steps=2, lost_seconds=1.5)
    assert ledger.lost() == Ledger(path).lost() == (62, 31.75)


Life = Callable[[Ledger], None]


def dies(ledger: Ledger) -> None:
    """Killed before it saved anything."""


def saves(ledger: Ledger) -> None:
    ledger.alive(step=105, saved_step=105)


def is_interrupted(ledger: Ledger) -> None:
    ledger.end(step=100, saved_step=100, status="SIGTERM", exit_code=75)


def finishes(ledger: Ledger) -> None:
    ledger.end(step=100, saved_step=100, status="finished", exit_code=0)


def is_stopped_by_hand(ledger: Ledger) -> None:
    ledger.end(step=103, saved_step=100, status="SIGINT", exit_code=75)


def is_killed_by_hand(ledger: Ledger) -> None:
    ledger.end(step=103, saved_step=100, status="interrupted", exit_code=130)


def runs_out_of_money(ledger: Ledger) -> None:
    ledger.end(step=103, saved_step=100, status="budget spent", exit_code=77)


@pytest.mark.parametrize(
    ("lives", "fruitless"),
    [
        ([], 0),
        ([dies], 1),
        ([dies, is_interrupted, dies], 3),
        ([dies, dies, saves], 0),
        ([dies, saves, dies, is_interrupted], 2),
        ([dies, finishes], 0),
        ([finishes, dies], 1),
        ([dies, is_stopped_by_hand, is_killed_by_hand, dies], 2),
        ([dies, runs_out_of_money, dies], 2),
        ([saves, is_stopped_by_hand], 0),
    ],
)
def test_starts_without_progress_are_counted_from_the_last_that_made_some(
    path, clock, lives: list[Life], fruitless
):
    for life in lives:
        ledger = Ledger(path)
        ledger.begin(step=100, world=1)
        clock.now += 1
        life(ledger)
    assert Ledger(path).fruitless() == fruitless


def test_the_start_that_asks_does_not_count_itself(path, clock):
    ledger = Ledger(path)
    ledger.begin(step=0, world=1)
    assert ledger.fruitless() == 0
    assert Ledger(path).fruitless() == 1


# The file


def test_only_a_start_makes_the_file(path, tmp_path):
    ledger = Ledger(path)
    ledger.merge(tmp_path / "absent")
    assert (ledger.seconds(), ledger.spent(), ledger.lost(), ledger.fruitless()) == (
        0,
        0,
        (0, 0),
        0,
    )
    assert not path.exists()


def test_a_line_is_on_disk_before_the_process_goes_on(path, clock, monkeypatch):
    synced = []

    def fsync(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").resolve()
        synced.append((target, len(read(path))))
        real(descriptor)

    real = os.fsync
    monkeypatch.setattr(os, "fsync", fsync)
    ledger = Ledger(path)
    ledger.begin(step=0, world=1)
    assert synced == [(path, 1), (path.parent, 1)]
    ledger.end(step=1, saved_step=1, status="finished", exit_code=0)
    assert synced[2:] == [(path, 2)]


def test_what_cannot_be_written_now_is_counted_and_written_later(tmp_path, clock):
    path = tmp_path / "absent" / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.begin(step=0, world=1, price=3600.0)
    clock.now += 60
    ledger.alive(step=5, saved_step=5)
    assert ledger.problem == f"{path}: cannot be written: No such file or directory"
    assert ledger.spent() == 60
    path.parent.mkdir()
    clock.now += 60
    ledger.alive(step=9, saved_step=5)
    assert ledger.problem is None
    assert Ledger(path).spent() == 120


def test_a_disk_that_was_full_leaves_no_line_halved_or_doubled(path, clock, monkeypatch):
    ledger = Ledger(path)
    ledger.begin(step=0, world=1)
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(full))
        ledger.alive(step=5, saved_step=5)
        assert "No space left" in str(ledger.problem)
        os.truncate(path, path.stat().st_size - 20)  # so much of it got there
    ledger.alive(step=6, saved_step=6)
    assert [line.get("saved_step") for line in read(path)] == [None, 5, 6]


def test_a_file_that_somebody_removes_begins_again(path, clock):
    ledger = Ledger(path)
    ledger.begin(step=0, world=1)
    path.unlink()
    ledger.alive(step=5, saved_step=5)
    assert [line["step"] for line in read(path)] == [5]


APPENDS_FOR_EVER = """
import sys
from itertools import count
from pathlib import Path
from pitstop.io.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
ledger.begin(step=0, world=1)
for step in count(1):
    ledger.alive(step, saved_step=step)
    print(step, flush=True)
"""


def test_what_was_said_before_a_sigkill_stands(path):
    command = [sys.executable, "-c", APPENDS_FOR_EVER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(5):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        said = 5 + len(process.stdout.read().splitlines())
    Ledger(path).begin(step=0, world=1)
    lines = read(path)
    assert [line["saved_step"] for line in lines[1 : said + 1]] == [*range(1, said + 1)]
    assert lines[-1]["kind"] == "start"


# Properties


@dataclass
class Work:
    """A stretch of a process's life."""

    seconds: int
    steps: int
    saves: bool


@dataclass
class Attempt:
    """A process: it goes back so many steps, works, and ends in one of the ways."""

    back: int
    price: int | None
    work: list[Work]
    end: str | None


@dataclass
class Truth:
    """What really happened."""

    step: int = 0
    seconds: int = 0
    dollars: float = 0
    lost: int = 0
    """Steps, of 7 seconds each."""


works = st.builds(Work, st.integers(0, 300), st.integers(0, 5), st.booleans())
attempts = st.builds(
    Attempt,
    st.integers(0, 8),
    st.none() | st.integers(0, 40),
    st.lists(works, max_size=5),
    st.sampled_from([None, "SIGTERM", "SIGINT", "internal"]),
)
histories = st.lists(attempts, max_size=6)
lived = st.lists(attempts, min_size=1, max_size=6)


@contextmanager
def somewhere(alive_seconds: float = 0) -> Generator[tuple[Path, Clock]]:
    """A place for a ledger, and a clock for it."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(ledger_module, "time", clock)
        patch.setattr(ledger_module, "ALIVE_SECONDS", alive_seconds)
        patch.setattr(os, "fsync", lambda _: None)  # no power is cut here
        yield Path(folder, "ledger.jsonl"), clock


def play(path: Path, clock: Clock, history: list[Attempt], truth: Truth | None = None) -> Truth:
    """Lives through a history, with a ledger."""
    truth = truth or Truth()
    for attempt in history:
        clock.now += 1000
        lost = min(truth.step, attempt.back)
        truth.step -= lost
        truth.lost += lost
        saved = truth.step
        ledger = Ledger(path)
        price = attempt.price
        ledger.begin(step=saved, world=1, price=price, lost_steps=lost, lost_seconds=7 * lost)
        for work in attempt.work:
            clock.now += work.seconds
            truth.step += work.steps
            truth.seconds += work.seconds
            truth.dollars += work.seconds * (price or 0) / 3600
            saved = truth.step if work.saves else saved
            ledger.alive(truth.step, saved)
        if attempt.end is not None:
            ledger.end(truth.step, saved, attempt.end, 75)
    return truth


@settings(max_examples=60)
@given(histories)
def test_time_money_and_loss_are_what_really_happened(history):
    with somewhere() as (path, clock):
        truth = play(path, clock, history)
        ledger = Ledger(path)
        assert ledger.seconds() == pytest.approx(truth.seconds)
        assert ledger.spent() == pytest.approx(truth.dollars)
        assert ledger.lost() == (truth.lost, 7 * truth.lost)


@given(histories)
def test_with_a_line_a_minute_no_killed_process_hides_more_than_that_minute(history):
    with somewhere(alive_seconds=60) as (path, clock):
        truth = play(path, clock, history)
        longest = max((w.seconds for a in history for w in a.work), default=0)
        hidden = truth.seconds - Ledger(path).seconds()
        assert 0 <= hidden <= len(history) * (60 + longest)


@settings(max_examples=60)
@given(histories, st.data())
def test_a_file_cut_at_any_byte_has_all_that_its_whole_lines_say(history, data):
    with somewhere() as (path, clock):
        play(path, clock, history)
        whole = path.read_bytes() if path.exists() else b""
        cut = data.draw(st.integers(0, len(whole)))
        lines = whole[: whole.rfind(b"\n", 0, cut) + 1]
        path.write_bytes(lines)
        expected = sums(path)
        path.write_bytes(whole[:cut])
        assert sums(path) == expected
        Ledger(path).begin(step=0, world=1)
        assert path.read_bytes().startswith(lines)
        kinds = [line["kind"] for line in read(path)]
        assert len(kinds) == lines.count(b"\n") + 1
        assert kinds[-1] == "start"


@given(histories)
def test_time_money_and_loss_never_decrease_when_a_line_comes(history):
    with somewhere() as (path, clock):
        play(path, clock, history)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        before = (0.0, 0.0, (0, 0.0))
        for count in range(len(lines) + 1):
            path.write_bytes(b"".join(lines[:count]))
            after = sums(path)[:3]
            assert after[0] >= before[0]
            assert after[1] >= before[1]
            assert after[2] >= before[2]
            before = after


@given(histories, st.data())
def test_a_damaged_byte_costs_no_more_than_the_lines_it_is_in(history, data):
    with somewhere() as (path, clock):
        play(path, clock, [*history, Attempt(0, 1, [Work(100, 1, True)], None)])
        whole = path.read_bytes()
        at, byte = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 255))
        first = whole[:at].count(b"\n")
        lines = whole.splitlines(keepends=True)
        path.write_bytes(
            b"".join(lines[:first] + lines[first + 1 + (whole[at : at + 1] == b"\n") :])
        )
        least = sums(path)[0]
        path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
        assert sums(path)[0] >= least or lines[first].count(b'"start"')


@given(lived, histories, lived)
def test_two_copies_merge_to_the_same_whichever_takes_in_the_other(common, here, there):
    with somewhere() as (ours, clock):
        theirs = ours.with_name("theirs.jsonl")
        truth = play(ours, clock, common)
        theirs.write_bytes(ours.read_bytes())
        paid = Ledger(ours).seconds()
        play(ours, clock, here, replace(truth))
        play(theirs, clock, there, replace(truth))
        apart = [Ledger(path).seconds() - paid for path in (ours, theirs)]
        backup = ours.with_name("backup.jsonl")
        backup.write_bytes(ours.read_bytes())
        Ledger(ours).merge(theirs)
        merged = sums(ours)
        assert merged[0] == pytest.approx(paid + sum(apart))
        Ledger(theirs).merge(backup)
        assert sums(theirs) == merged
        assert theirs.read_bytes() == ours.read_bytes()
        for again in (theirs, ours, backup):
            Ledger(ours).merge(again)
            assert ours.read_bytes() == theirs.read_bytes()


@given(histories, st.data())
def test_a_copy_that_is_behind_adds_nothing_and_one_that_is_ahead_all(history, data):
    with somewhere() as (path, clock):
        play(path, clock, [*history, Attempt(0, 1, [Work(100, 1, True)], "SIGTERM")])
        whole, expected = path.read_bytes(), sums(path)
        behind = path.with_name("behind.jsonl")
        behind.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
        Ledger(path).merge(behind)
        assert sums(path) == expected
        lines = [[*dict.fromkeys(text.splitlines())] for text in (whole, path.read_bytes())]
        assert lines[0] == lines[1]
        Ledger(behind).merge(path)
        assert sums(behind) == expected
