"""The screen of a watched run: what it says, and that it fits."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from pitstop.io.run_directory import RunDirectory
from pitstop.report.follow import LocalRun, Look, Mark
from pitstop.report.vitals import Gpu, Vitals
from pitstop.report.watch import figures, is_over, screen

from .running import NOW, RECIPE, write_run

GPU = Gpu(0, 98.0, 34e9, 80e9, 312.0, 700.0)
VITALS = Vitals(16, 3.5, 42.0, 60e9, 128e9, 20e9, 64e9, (GPU,))


def look_at(run: Path) -> Look:
    return LocalRun(str(run), RunDirectory(run)).look()


def shown(
    *looks: Look,
    width: int = 80,
    height: int = 24,
    vitals: Vitals | None = None,
    ascii_only: bool = False,
    now: float = NOW,
) -> str:
    file = io.StringIO()
    size = {"width": width, "height": height}
    console = Console(file=file, **size, _environ={})
    console.print(screen(looks, vitals, **size, now=now, ascii_only=ascii_only))
    return file.getvalue()


@pytest.fixture
def look(tmp_path: Path) -> Look:
    """A run at step 60 of 80, in its second phase."""
    look = look_at(write_run(tmp_path / "run", 60, durable={"step": 10, "time": NOW - 300}))
    return replace(look, name="runs/digits", saved=Mark(10, NOW - 180))


def test_a_run_is_told_on_one_screen(look: Look) -> None:
    text = shown(look, vitals=VITALS)
    facts = "runs/digits running 75% step 60/80|epoch 5.00/6|phase large|64 px|batch 50"
    facts += "|25 images/s|data wait 10%|GPU 97%|2.10 GB|best 60.00% at epoch 5"
    facts += "|saved step 10, 3 min ago|50 steps since|in the bucket step 10, 5 min ago"
    facts += "|$0.90 so far|2 starts, 0:15:00|2 steps (2 s) done twice|cpu on box"
    facts += "|train 67.5%|● val 60.0%|lr |12:00Z epoch 5.00: val 60.00%, loss 1.7500"
    facts += "|CPU 42%|load 3.5 of 16|memory 60/128 GB|disk 20 of 64 GB free|GPU 0: 98%, 34/80 GB"
    facts += "|312/700 W"
    words = " ".join(text.split())
    first, *others = facts.split("|")
    assert [fact for fact in (*first.split()[:3], *others) if fact not in words] == []


def test_the_remaining_time_counts_pixels_and_evaluations(tmp_path: Path) -> None:
    # At step 20: 20 x 100 images at 100/s, 40 x 50 that cost four times as much, 4 evaluations.
    early, late = (look_at(write_run(tmp_path / str(n), n)) for n in (20, 60))
    assert figures(early, NOW).remaining == pytest.approx(20 + 80 + 4 * 2)
    # At step 60: 20 x 50 images at 25/s; an evaluation after step 80.
    assert figures(late, NOW).remaining == pytest.approx(40 + 2)
    assert "ETA 0:00:42" in shown(late)
    assert "$0.94 at the end" in shown(late)


def test_a_plan_that_was_amended_is_judged_by_its_steps(tmp_path: Path) -> None:
    extended = look_at(write_run(tmp_path / "run", 60, steps=100))
    assert figures(extended, NOW).remaining == pytest.approx(40 * 2)  # steps of 50 images at 25/s


def test_a_run_that_has_ended_says_so(tmp_path: Path) -> None:
    ended = look_at(write_run(tmp_path / "run", 80, status="finished", exit_code=0, step=80))
    text = shown(ended, now=NOW + 86400 * 3)
    assert "finished, heard 3 d ago" in text
    assert "100%" in text
    assert "ETA" not in text
    assert "at the end" not in text
    assert "$0.90 in all" in text


@pytest.mark.parametrize(("code", "over"), [(0, True), (76, True), (77, True), (75, False)])
def test_what_is_started_again_is_not_over(tmp_path: Path, code: int, over: bool) -> None:
    assert is_over(look_at(write_run(tmp_path / "run", 20, exit_code=code))) == over


def test_a_run_that_is_not_heard_any_more_is_silent(look: Look) -> None:
    assert "running, heard 30 s ago" in shown(look, now=NOW + 30)
    text = shown(look, now=NOW + 900)
    assert "silent for 15 min" in text
    assert "ETA" not in text


def test_a_run_that_has_just_begun_has_a_screen(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    text = shown(look_at(tmp_path / "run"))
    assert "starting" in text
    assert "nothing saved yet" in text


def test_the_log_ends_with_what_was_said_last(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 20)
    durable = {"kind": "durable", "step": 10, "wall_seconds": 20.0, "age_seconds": 7.5}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(durable | {"time": "2026-11-22T12:01:00Z", "at": 20}) + "\n")
    rows = shown(look_at(run)).splitlines()
    assert [row.strip() for row in rows[-4:]] == [
        "11:59Z digits: 6 epochs",
        "11:59Z epoch 1.00: val 10.00%, loss 2.3750",
        "12:00Z epoch 2.00: val 20.00%, loss 2.2500",
        "12:01Z step 10 is in the bucket, 8 s old",
    ]


def test_a_price_that_is_not_known_is_not_zero(tmp_path: Path) -> None:
    text = shown(look_at(write_run(tmp_path / "run", 20, price=None)))
    assert "cost unknown" in text
    assert "$" not in text


def test_runs_stand_side_by_side(look: Look) -> None:
    other = replace(look, name="runs/other")
    first, *rows = shown(look, other).splitlines()
    assert first.index("runs/digits") < 10
    assert 40 < first.index("runs/other") < 50
    assert sum(row.count("val 60.0%") for row in rows) == 2 * 1


def test_many_runs_are_rows(look: Look) -> None:
    looks = [replace(look, name=f"runs/{n}") for n in range(40)]
    rows = shown(*looks[:12]).splitlines()
    assert [f"runs/{n}" for n in range(12)] == [row.split()[0] for row in rows[2:14]]
    figures = "running 75% 0:00:42 5.0 1.5 60.00 60.00 25 $0.90"
    assert rows[2].split()[1:] == figures.split()
    assert "and 19 more" in shown(*looks)


@given(
    count=st.integers(1, 5),
    width=st.integers(40, 160),
    height=st.integers(10, 60),
    ascii_only=st.booleans(),
    gpus=st.integers(0, 8),
)
def test_it_fits(tmp_path_factory, count, width, height, ascii_only, gpus) -> None:
    run = tmp_path_factory.getbasetemp() / "fits"
    look = replace(
        look_at(run if run.exists() else write_run(run, 60)), problem="ünerreichbar " * 9
    )
    vitals = replace(VITALS, gpus=(GPU,) * gpus)
    looks = [replace(look, name="ein/langer/Näme" * (1 + n)) for n in range(count)]
    text = shown(*looks, width=width, height=height, vitals=vitals, ascii_only=ascii_only)
    rows = text.splitlines()
    assert len(rows) <= height
    assert max(map(cell_len, rows)) <= width
    assert text.isascii() or not ascii_only


def test_records_do_not_steer_the_terminal(look: Look) -> None:
    nasty = "\x1b[2J\x07 [bold]and\r\x9b5n"
    note: dict[str, Any] = {"kind": "note", "step": 60, "wall_seconds": 99.0, "text": nasty}
    time = look.events[-1]["time"]
    events = [*look.events, note | {"time": time}]
    events = [e | ({"phase": nasty} if "phase" in e else {}) for e in events]
    text = shown(replace(look, name=nasty, events=events, state=look.state | {"status": nasty}))
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "[bold]and" in text


def test_a_loss_that_is_not_finite_is_shown_as_such(look: Look) -> None:
    events = [e | {"loss": float("nan")} if e["step"] > 30 else e for e in look.events]
    assert "train nan" in shown(replace(look, events=events))


def test_a_long_run_ends_where_it_is(look: Look) -> None:
    train = [event for event in look.events if event["kind"] == "train"]
    many = [train[0] | {"epoch": n / 1000, "loss": 5.0 * train[0]["images"]} for n in range(4999)]
    last = train[0] | {"epoch": 5.0, "loss": 1.0 * train[0]["images"]}
    text = shown(replace(look, events=[*many, last]))
    assert "loss  train 1" in text
    assert any(row.endswith("epoch 5") for row in text.splitlines())


def test_several_gpus_are_one_fact(look: Look) -> None:
    gpus = tuple(replace(GPU, index=n, busy=90.0 + n, power=None) for n in range(8))
    text = shown(look, vitals=replace(VITALS, gpus=gpus))
    assert "8 GPUs: 90-97% busy, 34-34 GB, ? W" in text


def test_the_recipe_of_another_version_does_not_matter(tmp_path: Path) -> None:
    recipe = json.loads(RECIPE.model_dump_json()) | {"key_of_tomorrow": 1}
    unknown = look_at(write_run(tmp_path / "run", 60, recipe=recipe))
    assert figures(unknown, NOW).remaining == pytest.approx(20 * 2)
