"""What a budget is good for."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.core.errors import InputError
from pitstop.core.recipe import MOST_EPOCHS, load_recipe
from pitstop.core.timeline import Timeline
from pitstop.plan.budget import epochs_within, estimate_within, fast_for_as_much
from pitstop.plan.cost import Estimate, estimate
from pitstop.plan.machines import find_machine
from pitstop.plan.prices import Price


@given(
    st.floats(0.01, 1e5), st.floats(0, 100), st.floats(0.001, 100), st.integers(1, 40), st.data()
)
def test_it_is_the_most_that_fits(
    limit: float, start: float, an_epoch: float, fewest: int, data: st.DataObject
) -> None:
    """The closed form of a run whose every epoch costs the same is the oracle."""

    def cost(epochs: float) -> float:
        if epochs < fewest:
            raise InputError("phases add up to more")
        return start + an_epoch * epochs

    if cost(fewest) > limit:
        with pytest.raises(InputError, match=f"{fewest} epoch"):
            epochs_within(limit, cost, unit="minutes")
        return
    solved = epochs_within(limit, cost, unit="minutes")
    assert cost(solved) <= limit
    assert fewest <= solved <= MOST_EPOCHS
    assert solved == pytest.approx(min((limit - start) / an_epoch, MOST_EPOCHS), abs=0.0101)


def images(epochs: float, recipe: str) -> float:
    plan = Timeline.planned(load_recipe(recipe, {"epochs": epochs}), 100_000)
    return sum(s.steps * s.batch_size for s in plan.segments)


def test_a_recipe_is_resolved_again_at_each_number_of_epochs() -> None:
    solved = epochs_within(2_000_000, lambda epochs: images(epochs, "fast"), unit="dollars")
    assert images(solved, "fast") <= 2_000_000 < images(solved + 0.1, "fast")


def test_the_fewest_are_those_into_which_absolute_durations_fit() -> None:
    """A warm-up of two epochs does not fit into one."""
    with pytest.raises(InputError) as refused:
        epochs_within(10, lambda epochs: images(epochs, "fast"), unit="dollars")
    assert str(refused.value).startswith(
        "--dollars 10: too little: the least, 2 epochs, comes to $"
    )


def test_absolute_durations_leave_nothing_to_solve(tmp_path: Path) -> None:
    recipe = tmp_path / "fixed.yaml"
    recipe.write_text("phases: [{duration: 3ep}, {duration: 5ep}]")
    with pytest.raises(InputError) as refused:
        epochs_within(1e9, lambda epochs: images(epochs, str(recipe)), unit="minutes")
    assert "write durations as percentages" in str(refused.value)
    assert str(refused.value).startswith(f"--minutes: {recipe}: phases add up to 8 epochs")


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_budget_is_more_than_nothing(limit: float) -> None:
    with pytest.raises(InputError, match="must be more than 0"):
        epochs_within(limit, lambda epochs: epochs, unit="dollars")


@pytest.mark.parametrize(
    ("limit", "said"), [(0.01, "0.05 min"), (1, "1.5 min"), (100, "1,234.0 min")]
)
def test_amounts_are_readable(limit: float, said: str) -> None:
    with pytest.raises(InputError, match=f"1 epoch, comes to {said}"):
        epochs_within(limit, lambda epochs: float(said.split()[0].replace(",", "")), unit="minutes")


def test_dollars_need_a_price() -> None:
    unknown = Price(None, None, "2026-01-02", "eu-west-1", "a test")

    def at(epochs: float) -> Estimate:
        plan = Timeline.planned(load_recipe("fast", {"epochs": epochs}), 100_000)
        return estimate(plan, find_machine("g5.xlarge"), price=unknown)

    with pytest.raises(InputError, match=r"^--dollars: the price of g5\.xlarge is not known"):
        estimate_within(8, at, unit="dollars")
    assert estimate_within(60, at, unit="minutes").minutes <= 60


# `fast` beside another recipe


def on_p4d(timeline: Timeline) -> Estimate:
    return estimate(timeline, find_machine("p4d.24xlarge"))


def run_of(name: str, samples: int, **stated: object) -> Estimate:
    return on_p4d(Timeline.planned(load_recipe(name, stated), samples))


def test_fast_takes_as_long_as_the_other_recipe() -> None:
    run = run_of("sprint", 1_281_167)
    fast = fast_for_as_much(run, on_p4d)
    assert fast is not None
    assert fast.timeline.recipe.name == "fast"
    assert 0.99 * run.minutes < fast.minutes <= run.minutes


def test_fast_is_beside_no_other_data_nor_itself_nor_what_is_too_short_for_it() -> None:
    assert fast_for_as_much(run_of("sprint", 100_000), on_p4d) is None
    assert fast_for_as_much(run_of("fast", 1_281_167), on_p4d) is None
    assert fast_for_as_much(run_of("smoke", 1_281_167, epochs=0.5), on_p4d) is None
