"""`pitstop plan` on machines: time, cost, budgets, memory. And `pitstop prices`."""

import json
from pathlib import Path

import pytest

from pitstop.plan.machines import machines


@pytest.fixture(autouse=True)
def config(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the user's prices; the machine is not calibrated."""
    monkeypatch.setenv("PITSTOP_CONFIG", str(place / "config"))
    monkeypatch.setenv("PITSTOP_CACHE", str(place / "cache"))
    return place / "config"


def test_a_plan_on_a_machine_has_time_cost_and_fast_beside_it(command):
    said = command("plan", "sprint", "--machine", "p4d.24xlarge", "--spot")
    assert (said.code, said.err) == (0, "")
    plan = json.loads(
        command("plan", "sprint", "--machine", "p4d.24xlarge", "--spot", "--json").out
    )
    for told in (f"{plan['minutes']:.1f} min", f"${plan['dollars']:.2f}", "bottleneck: gpu"):
        assert told in said.out
    assert "[1] published: " in said.out
    rows = [line.split() for line in said.out.splitlines()]
    assert ["sprint", "fast"] in rows
    (times,) = [row for row in rows if row[:1] == ["time"]]
    assert float(times[1]) == pytest.approx(float(times[3]), rel=0.005)


def test_other_data_than_imagenet_has_nothing_beside_it(command):
    said = command("plan", "sprint", "--samples", 100_000, "--machine", "p4d.24xlarge")
    assert "sprint on p4d.24xlarge" in said.out
    assert "published: FFCV's logs, ResNet-50)" not in said.out


@pytest.mark.parametrize(("option", "key"), [("--dollars", "dollars"), ("--minutes", "minutes")])
def test_a_budget_is_spent_on_epochs(command, option, key):
    here = ("plan", "fast", "--machine", "g5.xlarge", "--spot", "--json")
    plan = json.loads(command(*here, option, 500 if key == "minutes" else 8).out)
    assert 0.99 < plan[key] / (500 if key == "minutes" else 8) <= 1
    shares = [segment["images"] / plan["images"] for segment in plan["segments"]]
    assert shares == pytest.approx([0.8, 0.2], abs=0.001)


def test_two_recipes_within_a_budget_are_compared(command):
    here = ("--machine", "g5.12xlarge", "--minutes", 120, "--json")
    both = json.loads(command("plan", "fast", "mild", *here).out)
    assert [plan["minutes"] for plan in both["plans"]] == pytest.approx([120, 120], rel=0.01)
    assert "epochs" in both["differences"]


def test_all_machines_are_ranked_by_time(command):
    ranked = json.loads(command("plan", "fast", "--machines", "all", "--json").out)["machines"]
    times = [each["minutes"] for each in ranked]
    assert times == sorted(times)
    names = [each["machine"] for each in ranked]
    assert set(names) >= {machine.name for machine in machines()} | {"ml.p4d.24xlarge"}
    two = command("plan", "fast", "--machines", "g5.xlarge, p4d.24xlarge").out
    assert two.index("p4d.24xlarge") < two.index("g5.xlarge")
    assert "by $" in two


def test_memory_is_counted_and_tells_the_flops_of_an_unknown_model(command, settings):
    plan = ("plan", "demo", "--samples", 1000, *settings)
    assert "--memory" in command(*plan, "--machine", "g5.xlarge").err
    counted = json.loads(command(*plan, "--machine", "g5.xlarge", "--memory", "--json").out)
    assert counted["minutes"] > 0
    for segment in counted["segments"]:
        assert 0 < segment["memory_gib"] < 1
        assert segment["largest_micro_batch"] == segment["batch_size"]
    alone = command(*plan, "--memory").out
    assert "memory of a single GPU in a step" in alone


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--machine", "g5.xlarg"), "did you mean 'g5.xlarge'"),
        (("--machine", "local"), "run `pitstop calibrate` first"),
        (("--spot",), "--spot: of which machine? give --machine"),
        (("--nodes", 2), "--nodes: of which machine?"),
        (("--interruptions", "1/h"), "--interruptions: of which machine?"),
        (("--minutes", 45), "--minutes: on which machine?"),
        (("--machine", "g5.xlarge", "--minutes", 45, "--dollars", 8), "exclude each other"),
        (("--machine", "g5.xlarge", "--minutes", 3), "the least, 2 epochs, comes to"),
        (("--machine", "g5.xlarge", "--minutes", 45, "--epochs", 9), "leave them out"),
        (("--machine", "g5.xlarge", "--minutes", 45, "--set", "epochs=9"), "leave them out"),
        (("--machine", "g5.xlarge", "--interruptions", "often"), "such as 0.05/h"),
        (("--machine", "g5.xlarge", "--interruptions", "61/h"), "from 0 to 60 an hour"),
        (("--machine", "g5.xlarge", "--machines", "all"), "--machines: ranks them for one"),
        (("mild", "--machines", "all"), "--machines: ranks them for one"),
        (("--machines", "g5.xlarge,p9"), "no machine 'p9' is known"),
    ],
)
def test_what_makes_no_sense_is_refused(refused, arguments, expected):
    assert expected in refused("plan", "fast", *arguments)


def test_prices_are_listed_with_the_users_own_first(command, refused, config):
    bundled = json.loads(command("prices", "--json").out)
    assert set(bundled) >= {machine.name for machine in machines()}
    config.mkdir()
    (config / "prices.yaml").write_text(
        "{date: 2026-01-02, region: eu-west-1, prices: {g5.xlarge: {on_demand: 1.234, spot: 0.5}}}"
    )
    said = command("prices")
    (row,) = [line for line in said.out.splitlines() if line.split()[:1] == ["g5.xlarge"]]
    assert row.split()[1:5] == ["1.234", "0.500", "2026-01-02", "eu-west-1"]
    assert str(config / "prices.yaml") in said.out.replace("\n", "")
    assert "--region: is what --refresh asks AWS for" in refused("prices", "--region", "x")
