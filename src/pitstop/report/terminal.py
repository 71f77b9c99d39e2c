"""Rows of text for terminals of any kind: curves, sparklines, facts.

Each row is exactly one row high. Where there are no colours, a curve's line and its dots are told
apart all the same; where there is only ASCII, that is what they are drawn with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

TRAIN, VAL, DIM = "cyan", "bold yellow", "dim"
"""Styles: of what training is drawn with, and validation, and of what matters less."""

Points = Sequence[tuple[float, float]]

_GUTTER = 5
"""Columns for the labels of a plot."""

_LEAST_ROWS = 3
"""Of a plot, besides its title."""


@dataclass(frozen=True)
class Glyphs:
    """The characters that a terminal can show."""

    ascii_only: bool

    @property
    def separator(self) -> str:
        return " | " if self.ascii_only else " · "

    @property
    def dot(self) -> str:
        return "o" if self.ascii_only else "●"

    @property
    def ellipsis(self) -> str:
        return "~" if self.ascii_only else "…"

    @property
    def bar(self) -> tuple[str, str]:
        return ("#", "-") if self.ascii_only else ("━", "─")

    @property
    def levels(self) -> str:
        return "_.-=*#" if self.ascii_only else "▁▂▃▄▅▆▇█"

    def clean(self, text: str) -> str:
        """Returns what may be shown of a text: records must not steer the terminal."""
        shown = "".join(c if c.isprintable() else "?" for c in text)
        return shown.encode("ascii", "replace").decode() if self.ascii_only else shown


# Curves


def plot(
    name: str,
    unit: str,
    line: Points,
    dots: Points,
    width: int,
    height: int,
    glyphs: Glyphs,
    most: float = math.inf,
) -> list[Text]:
    """Returns a plot of exactly so many rows: its title, the curves, and the epochs below.

    Args:
        line: x and y of training.
        dots: the same of validation.
        most: what is higher leaves at the top.
    """
    if height < _LEAST_ROWS + 1:
        return []
    axis = height > _LEAST_ROWS + 1
    rows = height - 1 - axis
    title = _plot_title(name, unit, line, dots, glyphs)
    shown = [(x, y) for x, y in (*line, *dots) if math.isfinite(y) and y <= most]
    if not shown:
        return [title, *(Text("") for _ in range(height - 1))]
    low, high = min(y for _, y in shown), max(y for _, y in shown)
    begin, end = min(x for x, _ in shown), max(x for x, _ in shown)
    canvas = Canvas(width - _GUTTER - 1, rows, (begin, end), (low, high), glyphs)
    canvas.line(line)
    canvas.dots(dots)
    drawn = canvas.rows()
    labels = [_label(high), *[""] * (rows - 2), _label(low)]
    body = [
        Text.assemble((label.rjust(_GUTTER) + " ", DIM), each)
        for label, each in zip(labels, drawn, strict=True)
    ]
    if not axis:
        return [title, *body]
    last = f"epoch {end:.4g}"
    first = f"{begin:.2g}".ljust(width - _GUTTER - 1 - len(last))
    return [title, *body, Text(" " * (_GUTTER + 1) + first + last, DIM)]


def _plot_title(name: str, unit: str, line: Points, dots: Points, glyphs: Glyphs) -> Text:
    digits = ".1f" if unit else ".4g"
    parts: list[tuple[str, str]] = [(name, "bold")]
    if line:
        parts.append((f"  train {line[-1][1]:{digits}}{unit}", TRAIN))
    if dots:
        parts.append((f"  {glyphs.dot} val {dots[-1][1]:{digits}}{unit}", VAL))
    return Text.assemble(*parts, no_wrap=True, overflow="crop")


def _label(value: float) -> str:
    """Returns a number in the gutter's columns."""
    text = f"{value:.3g}"
    return text if len(text) <= _GUTTER else f"{value:.0e}"


class Canvas:
    """Characters to draw on: lines of 2 x 4 points each (braille), or of one where only ASCII is.

    Args:
        width, height: characters.
        xs, ys: the lowest and the highest value.
    """

    def __init__(
        self,
        width: int,
        height: int,
        xs: tuple[float, float],
        ys: tuple[float, float],
        glyphs: Glyphs,
    ) -> None:
        self._width, self._height, self._glyphs = width, height, glyphs
        self._fine = (1, 1) if glyphs.ascii_only else (2, 4)
        self._xs, self._ys = xs, ys
        self._line: set[tuple[int, int]] = set()
        self._dots: set[tuple[int, int]] = set()

    def line(self, points: Points) -> None:
        """Draws a line through the means of the points in each column."""
        columns, rows = self._width * self._fine[0], self._height * self._fine[1]
        before: tuple[int, int] | None = None
        for x, y in _means(points, columns, self._xs).items():
            here = x, _place(self._ys[1] - y, self._ys[1] - self._ys[0], rows)
            self._line.update(_between(before or here, here))
            before = here

    def dots(self, points: Points) -> None:
        """Draws each point as a character."""
        (begin, end), (low, high) = self._xs, self._ys
        for x, y in points:
            if math.isfinite(y):
                row = _place(high - y, high - low, self._height)
                self._dots.add((_place(x - begin, end - begin, self._width), row))

    def rows(self) -> list[Text]:
        """Returns what was drawn."""
        return [
            Text.assemble(*(self._cell(x, y) for x in range(self._width)), no_wrap=True)
            for y in range(self._height)
        ]

    def _cell(self, x: int, y: int) -> tuple[str, str]:
        if (x, y) in self._dots:
            return self._glyphs.dot, VAL
        if self._glyphs.ascii_only:
            return ("." if (x, y) in self._line else " "), TRAIN
        bits = sum(
            bit for (dx, dy), bit in _BRAILLE.items() if (2 * x + dx, 4 * y + dy) in self._line
        )
        return chr(0x2800 + bits) if bits else " ", TRAIN


_BRAILLE = {
    **{(0, 0): 0x01, (0, 1): 0x02, (0, 2): 0x04, (0, 3): 0x40},
    **{(1, 0): 0x08, (1, 1): 0x10, (1, 2): 0x20, (1, 3): 0x80},
}
"""The bit of each point of a character, from U+2800 on."""


def spark(points: Points, width: int, glyphs: Glyphs) -> str:
    """Returns a curve from 0 up as one row of characters."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if not finite:
        return ""
    means = _means(finite, width, (finite[0][0], finite[-1][0]))
    highest, levels = max(means.values()), glyphs.levels
    level, row = 0, ""
    for column in range(max(means) + 1):
        if column in means:
            level = _place(means[column], highest, len(levels))
        row += levels[level]
    return row


def _means(points: Points, columns: int, xs: tuple[float, float]) -> dict[int, float]:
    """Returns the mean of the finite points that fall into each column, in their order."""
    sums: dict[int, tuple[float, int]] = {}
    for x, y in points:
        if math.isfinite(y):
            column = _place(x - xs[0], xs[1] - xs[0], columns)
            total, count = sums.get(column, (0.0, 0))
            sums[column] = total + y, count + 1
    return {column: total / count for column, (total, count) in sorted(sums.items())}


def _place(value: float, whole: float, places: int) -> int:
    """Returns which of the places a share of the whole is in; what is outside is at the edge."""
    share = value / whole if whole > 0 else 0.0
    return round(min(1.0, max(0.0, share)) * (places - 1))


def _between(begin: tuple[int, int], end: tuple[int, int]) -> set[tuple[int, int]]:
    """Returns the points of a straight line, both ends included."""
    length = max(abs(end[0] - begin[0]), abs(end[1] - begin[1]), 1)
    steps = (i / length for i in range(length + 1))
    return {
        (
            round(begin[0] + (end[0] - begin[0]) * share),
            round(begin[1] + (end[1] - begin[1]) * share),
        )
        for share in steps
    }


# Words


def lines(facts: Sequence[str], width: int, glyphs: Glyphs, style: str = "") -> list[Text]:
    """Returns facts in as few rows as they fit into."""
    rows: list[str] = []
    for fact in facts:
        longer = f"{rows[-1]}{glyphs.separator}{fact}" if rows else fact
        if rows and len(longer) <= width:
            rows[-1] = longer
        else:
            rows.append(fact)
    return [row(each, width, glyphs, style) for each in rows]


def row(text: str, width: int, glyphs: Glyphs, style: str = "") -> Text:
    """Returns a text as a row; what is too long ends with an ellipsis."""
    shown = Text(text, style, no_wrap=True)
    shown.truncate(width, overflow="crop" if glyphs.ascii_only else "ellipsis")
    return shown


def clock(seconds: float) -> str:
    """Returns h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def duration(seconds: float) -> str:
    """Returns a time as people say it: 12 s, 3 min, 2 h, 4 d."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"
