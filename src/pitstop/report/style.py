"""How all pictures of a run look.

Colours are Okabe and Ito's palette, which is safe for the colour-blind.
"""

from typing import Any

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
