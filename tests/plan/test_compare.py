"""Two plans beside each other."""

import io
import json
from typing import Any

from rich.console import Console

from pitstop.core.recipe import parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.plan.compare import compared_json, compared_table, differences


def plan(samples: int = 1000, **stated: Any) -> Timeline:
    recipe = parse_recipe({"name": "one", "epochs": 4, "batch_size": 10, **stated}, "test")
    return Timeline.planned(recipe, samples)


def test_equal_plans_show_their_size_only() -> None:
    assert differences([plan(), plan()]) == {
        "epochs": ["4", "4"],
        "steps": ["400", "400"],
        "images seen": ["4,000", "4,000"],
    }


def test_what_differs_has_a_row_and_what_does_not_has_none() -> None:
    phases = [
        {"duration": "2ep", "data_fraction": 0.5, "resolution": 96, "lr_scale": 0.5},
        {"duration": "2ep", "resolution": 160, "batch_size": 20, "freeze": ["conv1", "layer1"]},
    ]
    other = plan(
        phases=phases,
        lr=0.2,
        ema={"half_life": 10},
        mix={"mixup_alpha": 0.2},
        augment="trivial_augment_wide",
        optimizer={"name": "lamb", "weight_decay": 0.02, "layer_decay": 0.9},
        model={"name": "resnet18", "blurpool": True, "weights": "timm"},
    )
    rows = differences([plan(), other])
    assert {row: cells[1] for row, cells in rows.items()} == {
        "epochs": "4",
        "steps": "200",
        "images seen": "3,000",
        "model": "resnet18, BlurPool, from timm",
        "resolution": "96 → 160",
        "batch": "10 → 20",
        "data": "50% → 100%",
        "peak lr": "0.1 → 0.2",
        "optimizer": "lamb, momentum 0.9, weight decay 0.02, layer decay 0.9",
        "augmentation": "crop 0.08-1, flip random, trivial_augment_wide",
        "mixing": "mixup 0.2",
        "frozen": "none → conv1, layer1",
        "EMA": "decay 0.933033",
        "evaluation": "160 px, crop ratio 0.875",
    }
    assert rows["frozen"][0] == rows["mixing"][0] == rows["EMA"][0] == "none"


def test_a_fallback_is_named_as_such() -> None:
    auto = plan(lr="auto", lr_finder={"fallback": 0.1})
    assert differences([plan(), auto])["peak lr"] == ["0.1", "0.1 (fallback of auto)"]


def test_the_table_has_a_column_for_each() -> None:
    file = io.StringIO()
    plans = [plan(name="[bold]a"), plan(name="b", epochs=8)]
    Console(file=file, width=80).print(compared_table(plans))
    head, *rows = [line.split() for line in file.getvalue().splitlines() if line.strip()]
    assert head == ["[bold]a", "b"]
    assert ["epochs", "4", "8"] in rows


def test_json_has_both_plans() -> None:
    data = json.loads(json.dumps(compared_json([plan(name="a"), plan(name="b", epochs=8)])))
    assert [each["recipe"] for each in data["plans"]] == ["a", "b"]
    assert data["differences"]["epochs"] == ["4", "8"]
