"""The picture of a search for the learning rate."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pitstop.io.records import Records
from pitstop.io.run_directory import RunDirectory
from pitstop.report import plots
from pitstop.report.lr_curve import draw


def found(**changes: Any) -> dict[str, Any]:
    """A search, as records have it."""
    lrs = np.geomspace(1e-5, 1.0, 40).tolist()
    losses = [2.3 - 0.02 * i for i in range(40)]
    result = {"policy": "valley", "peak": 0.1, "suggestion": lrs[20], "at": 20, "explained": "why"}
    return {"lrs": lrs, "losses": losses, "smoothed": losses, **result, **changes}


BLUE, GREEN = (0, 114, 178), (0, 158, 115)


def colours(path: Path) -> set[tuple[int, int, int]]:
    """Which of the two colours are in a picture."""
    with Image.open(path) as image:
        assert min(image.size) > 500
        pixels = np.asarray(image.convert("RGB"))
    return {colour for colour in (BLUE, GREEN) if (pixels == colour).all(-1).any()}


def test_the_point_and_the_peak_are_marked(tmp_path):
    draw(found(), tmp_path / "found.png")
    draw(found(suggestion=None, at=None), tmp_path / "none.png")
    assert colours(tmp_path / "found.png") == {BLUE, GREEN}
    assert colours(tmp_path / "none.png") == {GREEN}


@pytest.mark.parametrize(
    "curve",
    [
        {"lrs": [1e-5], "losses": [None], "smoothed": [None]},
        {"lrs": [1e-5, 1.0], "losses": [2.0, None], "smoothed": [2.0, None]},
        {"lrs": [1e-5, 1.0], "losses": [2.0, 2.0], "smoothed": [2.0, 2.0]},
        {"lrs": [1e-5, 1.0], "losses": [2.0, 1e30], "smoothed": [2.0, 1e29]},
    ],
    ids=["nothing finite", "not finite", "flat", "explodes"],
)
def test_any_curve_is_drawn(tmp_path, curve):
    draw(found(suggestion=None, at=None, **curve), tmp_path / "curve.png")
    assert GREEN in colours(tmp_path / "curve.png")


def test_the_search_of_a_run_is_drawn_once_and_before_any_training(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with closing(Records(run, None)) as records:
        assert plots.draw(run) == []
        records.add("lr_find", 0, **found())
    assert plots.draw(run) == [run.lr_picture]
    before = run.lr_picture.stat().st_mtime_ns
    assert plots.draw(run) == []
    assert run.lr_picture.stat().st_mtime_ns == before
