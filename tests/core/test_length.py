"""Lengths as a recipe writes them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.core.length import Length

amounts = st.floats(0, 1e9, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("8ep", 8.0, "ep"),
        ("0.5ep", 0.5, "ep"),
        (" 8 ep ", 8.0, "ep"),
        ("30%", 30.0, "%"),
        ("12.5 %", 12.5, "%"),
        ("1e-3ep", 0.001, "ep"),
        ("0%", 0.0, "%"),
        (0, 0.0, "ep"),
        (0.0, 0.0, "ep"),
    ],
)
def test_reads_epochs_and_shares(text, amount, unit):
    assert Length.parse(text) == Length(amount, unit)


@pytest.mark.parametrize(
    "text",
    [
        *["", "ep", "8", "8 epochs", "-1ep", "+1ep", "1,5ep", "8ep 9ep", "nan%", "infep", ".5ep"],
        *["30 percent", "8EP", 8, 1.5, None, True, [], ["8ep"], {}],
    ],
)
def test_refuses_anything_else_and_says_how_to_write_it(text):
    with pytest.raises(ValueError, match=r"is not a length: .*'8ep'.*'30%'"):
        Length.parse(text)


def test_refuses_a_length_beyond_all_numbers():
    with pytest.raises(ValueError, match="1e400ep"):
        Length.parse("1e400ep")


@given(amounts, st.sampled_from(["ep", "%"]))
def test_is_read_back_as_it_was_written(amount, unit):
    length = Length(amount, unit)
    assert Length.parse(str(length)) == length


@pytest.mark.parametrize(
    ("length", "text"), [(Length(8.0, "ep"), "8ep"), (Length(2.5, "%"), "2.5%")]
)
def test_is_written_without_an_idle_fraction(length, text):
    assert str(length) == text


@given(amounts, amounts)
def test_epochs_are_absolute_and_percentages_are_of_what_they_measure(amount, of):
    assert Length(amount, "ep").epochs(of) == amount
    assert Length(amount, "%").epochs(of) == pytest.approx(amount * of / 100)


@given(amounts)
def test_a_hundred_percent_is_everything(of):
    assert Length(100.0, "%").epochs(of) == of


def test_a_length_is_its_own_length():
    length = Length(3.0, "ep")
    assert Length.parse(length) is length
