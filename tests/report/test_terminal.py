"""Curves and facts as rows of text."""

import math

from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from pitstop.report.terminal import Canvas, Glyphs, clock, duration, lines, plot, spark

UNICODE, ASCII = Glyphs(ascii_only=False), Glyphs(ascii_only=True)


def plain(rows: list[Text]) -> list[str]:
    return [row.plain for row in rows]


def test_a_line_in_ascii_is_where_its_points_are() -> None:
    canvas = Canvas(5, 5, (0, 4), (0, 4), ASCII)
    canvas.line([(x, x) for x in range(5)])
    assert plain(canvas.rows()) == ["    .", "   . ", "  .  ", " .   ", ".    "]


def test_a_line_in_braille_is_that_of_a_finer_grid() -> None:
    points = [(x, x * x) for x in range(12)]
    fine, braille = (
        Canvas(12, 16, (0, 11), (0, 121), ASCII),
        Canvas(6, 4, (0, 11), (0, 121), UNICODE),
    )
    for canvas in (fine, braille):
        canvas.line(points)
    # The numbering of the eight dots is Unicode's: 1 to 3 and 7 on the left, 4 to 6 and 8.
    numbers = [[1, 4], [2, 5], [3, 6], [7, 8]]
    rows = plain(braille.rows())
    for y, row in enumerate(plain(fine.rows())):
        for x, shown in enumerate(row):
            cell = rows[y // 4][x // 2]
            bits = 0 if cell == " " else ord(cell) - 0x2800
            assert bool(bits >> (numbers[y % 4][x % 2] - 1) & 1) == (shown == "."), (x, y)


def test_dots_are_told_from_the_line_without_colours() -> None:
    for glyphs in (UNICODE, ASCII):
        canvas = Canvas(5, 3, (0, 4), (0, 2), glyphs)
        canvas.line([(0, 0), (4, 0)])
        canvas.dots([(2, 2), (4, 0)])
        rows = plain(canvas.rows())
        assert rows[0] == f"  {glyphs.dot}  "
        assert rows[2][4] == glyphs.dot
        assert rows[2][0] not in (" ", glyphs.dot)


VALUES = st.floats(1e-9, 1e9) | st.sampled_from([0.0, math.nan, math.inf])
POINTS = st.lists(st.tuples(st.floats(0, 9), VALUES), max_size=20)


@given(
    POINTS,
    POINTS,
    st.integers(30, 60),
    st.integers(0, 12),
    st.booleans(),
)
def test_a_plot_fits_whatever_is_plotted(line, dots, width, height, ascii_only) -> None:
    rows = plot("loss", "", line, dots, width, height, Glyphs(ascii_only))
    assert len(rows) == (height if height >= 4 else 0)
    assert all(row.cell_len <= width for row in rows[1:])
    assert all("\n" not in row.plain for row in rows)


def test_a_plot_says_its_range() -> None:
    rows = plain(plot("loss", "", [(0.0, 2.5), (3.0, 0.5)], [], 40, 8, UNICODE))
    assert rows[0] == "loss  train 0.5"
    assert rows[1].startswith("  2.5 ")
    assert rows[-2].startswith("  0.5 ")
    assert rows[-1].split() == ["0", "epoch", "3"]


def test_a_loss_that_diverged_leaves_the_rest_to_be_seen() -> None:
    rows = plain(
        plot("loss", "", [(0.0, 2.0), (1.0, 1.0), (2.0, 1e9)], [], 40, 8, UNICODE, most=4.0)
    )
    assert rows[1].startswith("    2 ")


def test_a_spark_line_rises_with_what_it_shows() -> None:
    for glyphs in (UNICODE, ASCII):
        ramp = spark([(x, x) for x in range(100)], 20, glyphs)
        assert len(ramp) == 20
        heights = [glyphs.levels.index(level) for level in ramp]
        assert heights == sorted(heights)
        assert {heights[0], heights[-1]} == {0, len(glyphs.levels) - 1}
    assert spark([(0, 0.1), (9, 0.1)], 4, UNICODE) == "████"
    assert spark([(0, math.nan)], 4, UNICODE) == ""


def test_facts_share_a_row_as_long_as_they_fit() -> None:
    assert plain(lines(["aaa", "bbb", "ccc"], 9, UNICODE)) == ["aaa · bbb", "ccc"]
    assert plain(lines(["a" * 9, "b"], 6, UNICODE)) == ["aaaaa…", "b"]


def test_times_read_well() -> None:
    assert [clock(s) for s in (0, 59.6, 3661)] == ["0:00:00", "0:01:00", "1:01:01"]
    assert [duration(s) for s in (0, 119, 120, 7199, 7200, 86400 * 3)] == [
        *("0 s", "119 s", "2 min", "119 min", "2 h", "3 d")
    ]
