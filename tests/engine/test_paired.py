import pytest

from pitstop.engine.paired import difference, t_quantile

TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 100: 1.984}
"""Degrees of freedom to t of 95%, as printed tables have it."""


@pytest.mark.parametrize(("degrees", "t"), TABLE.items())
def test_the_quantile_of_students_t_is_that_of_the_tables(degrees: int, t: float):
    assert t_quantile(degrees, 0.95) == pytest.approx(t, abs=5e-5)


def test_another_confidence_has_another_quantile():
    assert t_quantile(1, 0.5) == pytest.approx(1)
    assert t_quantile(7, 0.99) == pytest.approx(3.4995, abs=5e-5)


def test_the_interval_is_that_of_the_differences_and_not_of_the_values():
    """0.1, 0.2 and 0.3 apart: mean 0.2, deviation 0.1, and t of two degrees of freedom."""
    found = difference([(90.1, 90.0), (50.2, 50.0), (10.3, 10.0)])
    assert found.mean == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.2 - 0.24841, 0.2 + 0.24841), abs=1e-5)


def test_one_pair_has_a_difference_and_no_interval():
    found = difference([(1.0, 3.0)])
    assert (found.mean, found.interval) == (-2.0, None)
