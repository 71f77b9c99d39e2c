"""How all pictures look, and how they are written.

Colours are Okabe and Ito's palette, which is safe for the colour-blind.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pitstop.io.storage import atomic_write

if TYPE_CHECKING:  # whoever draws imports it
    from matplotlib.figure import Figure

DPI = 150
SINGLE = (8.0, 4.5)
"""Inches, width and height."""

BLUE, ORANGE, RED, GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"
PURPLE, SKY, INK, GREY = "#AA4499", "#56B4E9", "#222222", "#777777"
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.0,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def save(figure: "Figure", path: Path) -> None:
    """Writes a figure as a PNG that appears whole.

    Raises:
        OSError: `path` cannot be written.
    """
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=DPI)
