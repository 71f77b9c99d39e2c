"""The plan as a picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
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
    draw([timeline()], tmp_path / "plain.png")
    draw([timeline(phases=RICH)], tmp_path / "rich.png")
    plain, rich = pixels(tmp_path / "plain.png"), pixels(tmp_path / "rich.png")
    assert plain.shape[1] == rich.shape[1] == 1350
    assert plain.shape[0] < 900 < rich.shape[0]
    assert min(plain.std(), rich.std()) > 10


def test_two_plans_stand_side_by_side_with_the_panels_of_both(tmp_path: Path) -> None:
    draw([timeline(phases=RICH)], tmp_path / "one.png")
    draw([timeline(), timeline(phases=RICH, epochs=40)], tmp_path / "two.png")
    one, two = pixels(tmp_path / "one.png"), pixels(tmp_path / "two.png")
    assert two.shape[0] == one.shape[0]
    assert two.shape[1] > 1.3 * one.shape[1]


def axes_of(plans: list[Timeline], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Axes]:
    """The panels as drawn, row by row."""
    drawn: list[Figure] = []
    savefig = Figure.savefig

    def kept(figure: Figure, *arguments: Any, **options: Any) -> None:
        drawn.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    draw(plans, tmp_path / "plan.png")
    return list(drawn[0].axes)


def test_each_trick_has_a_ridge_with_its_values(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rising = {"name": "rand_augment", "magnitude": {"keypoints": [[0, 2], ["100%", 9]]}}
    phases = [
        {"duration": "50%", "augment": rising},
        {"duration": "rest", "mix": {"mixup_alpha": 0.2}, "random_erasing": {"prob": 0.25}},
    ]
    plans = [timeline(phases=phases, label_smoothing=0.1)]
    (panel,) = [
        axes
        for axes in axes_of(plans, monkeypatch, tmp_path)
        if axes.get_ylabel() == "augmentation"
    ]
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert names == ["RandAugment", "erasing", "mixup", "smoothing"]
    assert {text.get_text() for text in panel.texts} == {"2 → 8.99", "0.25", "0.2", "0.1"}


def test_a_fallback_is_labelled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    auto = {"epochs": 10, "batch_size": 8, "lr": "auto", "lr_finder": {"fallback": 0.3}}
    found = Timeline.planned(parse_recipe({**auto, "name": "found"}, "test"), 1000)
    first, *_ = axes_of([found], monkeypatch, tmp_path)
    assert "fallback" in first.get_ylabel()
    left, right, *_ = axes_of([timeline(), found], monkeypatch, tmp_path)
    assert "fallback" not in left.get_title() + left.get_ylabel()
    assert "fallback" in right.get_title()


@pytest.mark.parametrize(("epochs", "shown"), [(20, [20, 20]), (200, [10, 200])])
def test_plans_of_much_different_lengths_have_axes_of_their_own(
    epochs: int, shown: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    axes = axes_of([timeline(), timeline(epochs=epochs)], monkeypatch, tmp_path)
    assert [panel.get_xlim()[1] for panel in axes[:2]] == pytest.approx(shown, abs=0.1)


def test_a_single_step_is_drawn(tmp_path: Path) -> None:
    draw([timeline(samples=8, epochs=1)], tmp_path / "plan.png")
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
        draw([timeline()], tmp_path / "file" / "plan.png")
