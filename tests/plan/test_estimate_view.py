"""What a run will cost, as it is shown."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pitstop.core.recipe import bundled_recipes, load_recipe
from pitstop.core.timeline import Timeline
from pitstop.plan.cost import Estimate, estimate
from pitstop.plan.estimate_view import (
    FAST,
    StepMemory,
    Told,
    beside,
    memory_table,
    ranking,
    ranking_json,
    simulated_table,
    table,
    told_json,
    told_table,
)
from pitstop.plan.machines import find_machine
from pitstop.plan.prices import Price
from pitstop.plan.simulate import Course, simulate

PRICE = Price(on_demand=10.0, spot=4.0, date="2026-01-02", region="eu-west-1", source="a test")


@pytest.fixture(autouse=True)
def nothing_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PITSTOP_CONFIG", str(tmp_path))
    monkeypatch.setenv("PITSTOP_CACHE", str(tmp_path))


def plan(name: str = "sprint", samples: int = 1_281_167, **stated: Any) -> Timeline:
    return Timeline.planned(load_recipe(name, stated), samples)


def on(machine: str = "p4d.24xlarge", name: str = "sprint", **terms: Any) -> Estimate:
    return estimate(plan(name), find_machine(machine), **{"price": PRICE, **terms})


def printed(what: object) -> str:
    file = io.StringIO()
    Console(file=file, width=160).print(what)
    return file.getvalue()


def rows(text: str) -> list[list[str]]:
    """The cells of tables' rows: what two spaces or more set apart."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]


def test_each_mark_has_its_source_and_no_source_is_missing() -> None:
    run = on(spot=True)
    shown, sources = printed(table(run)).split("\nsources\n")
    listed = re.findall(r"^\[(\d+)\] (.+?)\s*$", sources, re.MULTILINE)
    marks = list(dict.fromkeys(re.findall(r"\[(\d+)\]", shown)))
    assert marks == [number for number, _ in listed][: len(marks)]
    assert {text for _, text in listed} >= set(run.sources)
    (gpu,) = re.findall(r"160 px: images/s of each part: gpu ([\d,]+) \[1\]", shown)
    assert float(gpu.replace(",", "")) == pytest.approx(run.segments[0].rates["gpu"].value, abs=1)
    assert dict(listed)["1"] == run.segments[0].rates["gpu"].source


def test_segments_have_their_time_and_cost() -> None:
    run = on(spot=True)
    cells = [row for row in rows(printed(table(run))) if row[-1].startswith("gpu [")]
    assert [row[0] for row in cells] == ["160 px", "192 px", "224 px"]
    assert [row[2] for row in cells] == ["4,096", "3,072", "2,048"]
    assert sum(float(row[4]) for row in cells) == pytest.approx(run.training_seconds / 60, abs=0.2)
    paid = run.dollars_of(run.training_seconds + run.compile_seconds)
    assert sum(float(row[6]) for row in cells) == pytest.approx(paid, abs=0.02)


def test_the_headline_has_time_cost_and_bottleneck() -> None:
    run = on("g5.xlarge", spot=True)
    headline = printed(table(run)).splitlines()[0]
    assert headline.startswith("sprint on g5.xlarge (1 x A10G, 4 vCPUs, spot): ")
    assert f"{run.minutes:,.1f} min, ${run.dollars:,.2f}" in headline
    assert headline.endswith(f"bottleneck: {run.bottleneck}")


def test_interruptions_are_those_of_the_spot_market() -> None:
    spot, bought = printed(table(on(spot=True))), printed(table(on()))
    assert "0.05 interruptions an hour" in spot
    assert "max-wait" in spot
    assert "$4.00 an hour, spot" in spot
    assert "interruptions" not in bought
    assert "max-wait" not in bought
    assert "$10.00 an hour, on demand" in bought


def test_nodes_are_paid_for() -> None:
    shown = printed(table(on(nodes=2)))
    assert "sprint on 2 x p4d.24xlarge" in shown
    assert "$20.00 an hour for 2 machines" in shown


def test_a_price_that_is_not_known_is_not_made_up() -> None:
    unknown = Price(None, None, "2026-01-02", "eu-west-1", "a test")
    run = on(price=unknown)
    shown = printed(table(run))
    assert "the price of p4d.24xlarge is not known" in shown
    assert "$" not in shown.replace("  $  ", "").replace("$8.25", "")
    assert printed(ranking([run])).count("?") == 2
    assert told_json([Told(run.timeline, run)])["dollars"] is None


def test_what_others_claimed_is_said_of_their_recipe_only() -> None:
    assert "- claimed: 45 min, $8.25 (the source systems)" in printed(table(on()))
    assert "claimed" not in printed(table(on(name="fast")))
    assert "claimed" not in printed(ranking([on(name="fast")]))


# Beside each other


def test_recipes_stand_beside_each_other() -> None:
    runs = [on(name="sprint"), on(name="fast")]
    shown = rows(printed(beside(runs)))
    assert shown[0] == ["sprint", "fast"]
    assert ["epochs", "60", "16"] in shown
    assert ["time", *(f"{run.minutes:.1f} min" for run in runs)] in shown
    told = [Told(run.timeline, run) for run in runs]
    both = printed(told_table(told))
    assert ["batch", "4,096 → 3,072 → 2,048", "4,096"] in rows(both)
    assert both.count("sources\n") == 1


def test_what_is_published_of_fast_is_what_its_header_says() -> None:
    header = bundled_recipes()["fast"].read_text().partition("# epochs")[0]
    ((shortest, others),) = re.findall(r"(\d+\.\d+)% top-1.*?--epochs (.*)", header, re.DOTALL)
    longer = re.findall(r"(\d+): (\d+\.\d+)", others)
    assert {16: float(shortest)} | {int(n): float(top1) for n, top1 in longer} == FAST


@pytest.mark.parametrize(
    ("epochs", "published"),
    [
        (10, "73.76% at 16 epochs"),
        (16, "73.76% at 16, 75.56% at 24 epochs"),
        (71, "78.02% at 56, 78.43% at 88 epochs"),
        (300, "78.43% at 88 epochs"),
    ],
)
def test_what_is_published_of_fast_is_that_of_the_nearest_epochs(
    epochs: int, published: str
) -> None:
    run = on()
    fast = estimate(plan("fast", epochs=epochs), find_machine("p4d.24xlarge"), price=PRICE)
    shown = printed(told_table([Told(run.timeline, run)], fast))
    assert f"(published: FFCV's logs, ResNet-50): {published}" in shown
    assert ["sprint", "fast"] in rows(shown)


def test_json_has_costs_in_all_and_by_segment() -> None:
    run = on(spot=True)
    data = json.loads(json.dumps(told_json([Told(run.timeline, run)])))
    assert data["steps"] == run.timeline.last
    for key in ("minutes", "dollars", "images_per_second", "bottleneck"):
        assert data[key] == getattr(run, key)
        assert all(key in segment for segment in data["segments"])
    assert [segment["steps"][1] for segment in data["segments"]][-1] == run.timeline.last
    fast = on(name="fast")
    both = told_json([Told(run.timeline, run), Told(fast.timeline, fast)])
    assert [each["minutes"] for each in both["plans"]] == [run.minutes, fast.minutes]
    assert both["differences"]["epochs"] == ["60", "16"]


def test_without_a_machine_the_plan_is_alone() -> None:
    timeline = plan()
    assert "minutes" not in told_json([Told(timeline)])
    assert "sources" not in printed(told_table([Told(timeline)]))


# All machines


def test_the_fastest_machine_is_first_and_each_has_its_rank_by_cost() -> None:
    names = ("g5.xlarge", "p4d.24xlarge", "g5.12xlarge", "ml.p3.8xlarge")
    runs = [on(name, price=Price(float(i), None, "", "", "")) for i, name in enumerate(names, 1)]
    head, _, *body = rows(printed(ranking(runs)))[1:]
    body = body[: len(names)]
    by_time = sorted(runs, key=lambda run: run.seconds)
    assert [row[0] for row in body] == [run.machine.name for run in by_time]
    by_cost = sorted(runs, key=lambda run: run.dollars or 0)
    assert [int(row[head.index("by $")]) for row in body] == [
        by_cost.index(run) + 1 for run in by_time
    ]
    shown = printed(ranking(runs))
    assert "- claimed: g5.12xlarge: 150 min, $5.00 (the source systems)" in shown
    assert "- claimed: ml.p3.8xlarge: 90 min, $5.25 (the source systems)" in shown
    data = json.loads(json.dumps(ranking_json(runs)))
    assert [each["machine"] for each in data["machines"]] == [run.machine.name for run in by_time]
    assert {claim["machine"] for claim in data["claims"]} == set(names) - {"g5.xlarge"}


# Memory


def memory(largest: int | None, card: float | None = 40.0) -> list[StepMemory]:
    segments = plan("fast").segments
    return [StepMemory(segment, 8, card, 30 * 2**30, 24.3e9, largest) for segment in segments]


def test_a_phase_that_overflows_is_told_what_fits() -> None:
    shown = printed(memory_table(memory(200)))
    assert ["160 px", "160", "512", "30.0", "24.3", "no"] in rows(shown)
    assert "- 192 px: micro-batches of 200 fit: --set phases.1.grad_accum_steps=3" in shown
    assert "not even one image fits" in printed(memory_table(memory(None)))


def test_a_phase_that_fits_is_not_advised() -> None:
    shown = printed(memory_table(memory(512)))
    assert ["192 px", "192", "512", "30.0", "24.3", "yes"] in rows(shown)
    assert "grad_accum_steps" not in shown
    assert "yes" not in printed(memory_table(memory(None, card=None)))


def test_accumulation_makes_micro_batches_smaller() -> None:
    (segment, *_) = plan("fast", grad_accum_steps=4).segments
    step = StepMemory(segment, 8, 40.0, 2**30, 1e9, 128)
    assert (step.micro_batch, step.overflows) == (128, False)


def test_memory_is_in_the_json_by_segment() -> None:
    counted = told_json([Told(plan("fast"), memory=tuple(memory(200)))])["segments"]
    assert [part["memory_gib"] for part in counted] == [30.0, 30.0]
    assert [part["largest_micro_batch"] for part in counted] == [200, 200]
    assert [part["resolution"] for part in counted] == [160, 192]


# Simulations


def test_a_simulation_is_summed_up() -> None:
    run = on(spot=True, interruptions_per_hour=0.5)
    played = simulate(Course.of(run), run.interruptions_per_hour.value, runs=4000)
    shown = printed(simulated_table(run, played))
    assert "4,000 runs with 0.5 interruptions an hour" in shown
    (minutes,) = [row for row in rows(shown) if row[0] == "minutes"]
    assert float(minutes[1]) == pytest.approx(played.minutes.mean(), abs=0.06)
    assert f"expected by the closed form: {run.minutes:.1f} min" in shown


@pytest.mark.parametrize("every", ["auto", "5ep", "7 min"])
def test_the_mean_of_a_simulation_is_what_the_plan_expects(every: str) -> None:
    timeline = plan(**{"checkpoint.every": every})
    run = estimate(
        timeline, find_machine("p4d.24xlarge"), price=PRICE, spot=True, interruptions_per_hour=1.0
    )
    played = simulate(Course.of(run), run.interruptions_per_hour.value, runs=40_000)
    room = 5 * played.minutes.std() / 200
    assert played.minutes.mean() == pytest.approx(run.minutes, abs=room)
    assert played.interruptions.mean() == pytest.approx(run.interruptions, rel=0.05)
    assert played.dollars is not None
    assert played.dollars.mean() == pytest.approx(run.dollars, abs=room / 60 * 4)
