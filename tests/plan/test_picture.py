"""The plan as a picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pitstop.core.recipe import parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.plan import picture
from pitstop.plan.picture import draw

RICH = [
    {"name": "small", "duration": "50%", "resolution": [64, 128], "data_fraction": 0.5},
    {"name": "a" * 200, "duration": "0.5%", "resolution": 96},
    {"name": "large", "duration": "rest", "mix": {"cutmix_alpha": 1.0}, "freeze": ["conv1"]},
]


def timeline(samples: int = 1000, **stated: Any) -> Timeline:
    recipe = parse_recipe({"epochs": 10, "batch_size": 8, "lr": 0.1, **stated}, "test")
    return Timeline(recipe, num_samples=samples)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"), dtype=np.float32)


def test_panels_with_nothing_to_say_are_left_out(tmp_path: Path) -> None:
    draw(timeline(), tmp_path / "plain.png")
    draw(timeline(phases=RICH), tmp_path / "rich.png")
    plain, rich = pixels(tmp_path / "plain.png"), pixels(tmp_path / "rich.png")
    assert plain.shape[1] == rich.shape[1] == 1350
    assert plain.shape[0] < 900 < rich.shape[0]
    assert min(plain.std(), rich.std()) > 10


def test_a_single_step_is_drawn(tmp_path: Path) -> None:
    draw(timeline(samples=8, epochs=1), tmp_path / "plan.png")
    assert pixels(tmp_path / "plan.png").std() > 10


def test_both_sides_of_each_change_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "SAMPLES", 3)
    plan = timeline(phases=RICH)
    steps = picture._steps(plan)
    assert {s.first for s in plan.segments} | {s.last - 1 for s in plan.segments} <= set(steps)
    assert len(steps) <= 3 + 2 * len(plan.segments)


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        draw(timeline(), tmp_path / "file" / "plan.png")
