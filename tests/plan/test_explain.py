"""The plan in words and figures."""

import csv
import io
import json
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console

from pitstop.core.recipe import parse_recipe
from pitstop.core.timeline import Amendment, Extend, FoundLr, Timeline
from pitstop.plan.explain import as_csv, as_json, table

PHASES = [
    {
        "name": "small",
        "duration": "2ep",
        "resolution": [64, 128],
        "data_fraction": 0.5,
        "batch_size": 64,
    },
    {
        "name": "large",
        "duration": "3ep",
        "resolution": 128,
        "batch_size": 32,
        "grad_accum_steps": 2,
        "mix": {"mixup_alpha": {"keypoints": [[0, 0.0], ["100%", 0.4]]}},
        "freeze": ["conv1", "layer1"],
    },
]
STATED = {
    "name": "[bold]lab[/bold]",
    "epochs": 5,
    "lr": 0.1,
    "lr_per": 32,
    "lr_schedule": {"name": "onecycle", "base_momentum": 0.85, "max_momentum": 0.95},
    "label_smoothing": 0.1,
    "ema": {"half_life": 20},
    "phases": PHASES,
}


def timeline(**stated: Any) -> Timeline:
    return Timeline(parse_recipe({**STATED, **stated}, "test"), num_samples=1000)


def printed(plan: Timeline, width: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(table(plan))
    return file.getvalue()


def read_rows(plan: Timeline) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(as_csv(plan))))


def test_csv_has_the_settings_of_the_first_step_of_each_epoch() -> None:
    plan = timeline()
    rows = read_rows(plan)
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2, 3, 4]
    for row in rows:
        settings = plan.settings_at(int(row["step"]))
        assert settings.epoch >= int(row["epoch"])
        assert settings.step == 0 or plan.settings_at(settings.step - 1).epoch < int(row["epoch"])
        for key in ("lr", "momentum", "mixup_alpha", "cutmix_alpha", "ema_decay"):
            assert float(row[key]) == pytest.approx(getattr(settings, key), rel=1e-9)
        phase = settings.segment.phase
        assert row["phase"] == phase.name
        assert int(row["resolution"]) == settings.segment.resolution
        assert int(row["batch_size"]) == phase.batch_size
        assert float(row["data_fraction"]) == phase.data_fraction
        assert float(row["label_smoothing"]) == phase.label_smoothing


@pytest.mark.parametrize("samples", [101, 1000, 1234])
@pytest.mark.parametrize("epochs", [1, 2.5, 7])
def test_csv_has_a_row_for_each_begun_epoch(samples: int, epochs: float) -> None:
    recipe = parse_recipe({"epochs": epochs, "batch_size": 7}, "test")
    rows = read_rows(Timeline(recipe, num_samples=samples))
    assert [int(row["epoch"]) for row in rows] == list(range(-int(-epochs // 1)))


def test_json_is_plain_and_adds_up() -> None:
    plan = timeline()
    data = json.loads(json.dumps(as_json(plan)))
    segments = data["segments"]
    assert data["recipe"] == STATED["name"]
    assert data["steps"] == plan.last == segments[-1]["steps"][1]
    assert data["evaluations"] == len(plan.evaluations)
    assert data["images"] == sum(segment["images"] for segment in segments)
    assert [s["resolution"] for s in segments] == [64, 80, 112, 128, 128]
    for before, after in pairwise(segments):
        assert before["steps"][1] == after["steps"][0]
    assert segments[-1]["frozen"] == ["conv1", "layer1"]
    assert segments[-1]["data_fraction"] == 1.0


def test_json_tells_the_course_of_what_varies() -> None:
    plan = timeline(phases=[{"duration": "5ep", "batch_size": 32}])
    (segment,) = as_json(plan)["segments"]
    first, top, last = segment["lr"]
    assert first == plan.settings_at(0).lr
    assert top == pytest.approx(max(plan.settings_at(step).lr for step in range(plan.last)))
    assert last == plan.settings_at(plan.last - 1).lr
    assert segment["momentum"] == pytest.approx([0.95, 0.85, 0.95], abs=1e-3)
    assert segment["mixup_alpha"] == [0.0]


def test_notes_say_what_a_change_of_fraction_drops() -> None:
    notes = as_json(timeline())["notes"]
    # 1000 images are 16 batches of 64 (4 for each size, 1024): 24 images into a pass of 500.
    assert notes[0] == (
        "large: a new permutation of 1,000 images begins, 4.8% into a pass of small's 500, the "
        "rest of which is dropped"
    )


def test_notes_say_how_the_peak_comes_about() -> None:
    assert "small: peak lr 0.2 = 0.1 x batch 64 / 32" in as_json(timeline())["notes"]
    capped = as_json(timeline(lr_cap=0.15))["notes"]
    assert "small: peak lr 0.15 = 0.15, the cap of 0.1 x batch 64 / 32" in capped
    plain = parse_recipe({"epochs": 1}, "test")
    assert not [n for n in as_json(Timeline(plain, num_samples=1000))["notes"] if "peak" in n]


def test_an_extension_has_a_peak_of_its_own() -> None:
    extend = Amendment(step=0, change=Extend(epochs=1, lr=0.03))
    plan = Timeline(parse_recipe(STATED, "test"), [extend], num_samples=1000)
    data = as_json(plan)
    assert data["segments"][-1]["lr"][0] == 0.03
    assert not [note for note in data["notes"] if "extension" in note and "peak" in note]


def test_the_table_shows_segments_and_phases() -> None:
    text = printed(timeline())
    assert text.startswith("[bold]lab[/bold]: 1,000 images, 5.008 epochs, 110 steps")
    rows = [line for line in text.splitlines() if " small " in line or " large " in line]
    assert len(rows) == 5
    assert "32 in 2" in rows[-1]
    assert "100%" in rows[-1]
    assert "small: crop 0.08-1, flip random, label smoothing 0.1" in text
    assert "mixup 0 → 0.39" in text
    assert "frozen: conv1 layer1" in " ".join(text.split())
    assert "5 evaluations at 128 px, crop ratio 0.875" in text


AUTO = {"lr": "auto", "lr_per": None, "lr_finder": {"fallback": 0.3, "multiplier": 3.5}}


def test_a_fallback_is_never_shown_as_if_it_were_the_rate() -> None:
    recipe = parse_recipe({**STATED, **AUTO}, "test")
    plan = Timeline.planned(recipe, 1000)
    data = as_json(plan)
    assert data["lr_fallback"] is True
    assert max(value for segment in data["segments"] for value in segment["lr"]) > 0.25
    assert {row["lr_from"] for row in read_rows(plan)} == {"fallback"}
    text = " ".join(printed(plan, 120).split())
    assert "lr (fallback)" in text
    assert (
        "lr: auto: 0.3 is the fallback; the finder decides (min0.1 of 100 steps from 1e-05 to 1, "
        "times 3.5)"
    ) in text


def test_a_stated_or_a_found_rate_is_not_called_a_fallback() -> None:
    found = Amendment(step=0, change=FoundLr(lr=0.2))
    recipe = parse_recipe({**STATED, **AUTO}, "test")
    for plan in (timeline(), Timeline(recipe, [found], num_samples=1000)):
        assert as_json(plan)["lr_fallback"] is False
        assert {row["lr_from"] for row in read_rows(plan)} == {"recipe"}
        assert "fallback" not in printed(plan)


def test_csv_tells_all_that_varies() -> None:
    strong = {
        "augment": "rand_augment",
        "augment_scale": 2.0,
        "color_jitter": {"brightness": 0.1, "hue": 0.2},
        "random_erasing": {"prob": 0.25},
        "translate": 2,
        "flip": "none",
        "crop": {"scale": [0.35, 1.0]},
        "mix": {"cutmix_alpha": 1.0, "prob": 0.5},
        "repeated_augmentation": 3,
        "optimizer_state": "reset",
        "freeze": ["conv1", "layer1"],
    }
    first, second = read_rows(
        timeline(phases=[{"duration": "4ep"}, {**strong, "duration": "1ep"}])
    )[3:]
    changed = {key: value for key, value in second.items() if value != first[key]}
    for key in ("epoch", "step", "phase", "lr", "momentum", "ema_decay"):
        changed.pop(key)
    assert changed == {
        "repeated_augmentation": "3",
        "optimizer_state": "reset",
        "crop_scale": "0.35 1.0",
        "flip": "none",
        "translate": "2",
        "brightness": "0.2",
        "hue": "0.4",
        "augment": "rand_augment",
        "magnitude": "18",
        "erasing_prob": "0.5",
        "cutmix_alpha": "1",
        "mix_prob": "0.5",
        "frozen": "conv1 layer1",
    }


NOTED = [
    ({"repeated_augmentation": 3}, "an image comes 3 times in a row: an epoch shows 1 image in 3"),
    ({"translate": 2}, "an image is moved by up to 2 px; its edge is reflected"),
    (
        {"augment_scale": 1.5, "random_erasing": {}},
        "augmentation is 1.5 x as strong as stated, where it can be",
    ),
    ({"mix": {"mixup_alpha": 1.0, "prob": 0.3}}, "0.3 of the batches are mixed"),
    ({"optimizer_state": "reset"}, "large: the optimizer begins anew"),
    (
        {"optimizer_state": "reset_frozen"},
        "large: what is frozen loses its optimizer state: it thaws without momentum",
    ),
    ({"frozen_batch_norm": "train"}, "large: batch statistics of what is frozen go on"),
    (
        {"model": {"name": "resnet18.a1_in1k", "weights": "timm"}},
        "training starts from weights: timm's for resnet18.a1_in1k",
    ),
    ({"model": {"weights": "runs/pets"}}, "training starts from weights: runs/pets"),
    (
        {"optimizer": {"name": "sgd", "layer_decay": 0.75}},
        "the lr shown is the head's; that of each layer below is x 0.75",
    ),
    ({"optimizer": {"name": "sgd", "lr_scales": {"stem.*": 0.1}}}, "the lr of stem.* is x 0.1"),
    ({"agc": 0.01}, "gradients are clipped unit by unit, at 0.01 of the weights' norm (AGC)"),
    ({"clip_grad_norm": 1}, "gradients are clipped at a norm of 1"),
    ({"ema": {"every": 5}}, "weights are averaged (EMA), every 5 steps, with a decay of"),
    ({"ema": {"lookahead": True}}, "the model is set to the average at each of its updates"),
    (
        {"checkpoint": {"every": "auto"}},
        "checkpoints every 6.3 min, if a save takes 1 s (assumed; the run measures its own) and "
        "the machine is taken away 0.05 times an hour (assumed): each time half of that, 3.2 min, "
        "is expected to be lost",
    ),
    (
        {"checkpoint": {"every": "auto", "interruptions_per_hour": 0.5}},
        "checkpoints every 2.0 min, if a save takes 1 s (assumed; the run measures its own) and "
        "the machine is taken away 0.5 times an hour (assumed): each time half of that, 1.0 min,",
    ),
    ({"target_accuracy": 78}, "ends at the first evaluation whose top-1 reaches 78%"),
    (
        {"eval": {"also": [{"resolution": 256, "flip_average": True}, {"translate_average": 2}]}},
        "evaluations at 128 px, crop ratio 0.875; at the end also at 256 px, crop ratio 0.875, "
        "averaged with the mirror image; at the end also at 128 px, crop ratio 0.875, averaged "
        "with two moved by 2 px",
    ),
]


@pytest.mark.parametrize(("stated", "said"), NOTED)
def test_notes_say_what_is_there_and_only_where_it_is(stated: dict[str, Any], said: str) -> None:
    assert any(said in note for note in as_json(timeline(**stated))["notes"])
    assert not any(said in note for note in as_json(timeline())["notes"])


def test_a_scale_of_what_is_off_is_not_noted() -> None:
    assert not [n for n in as_json(timeline(augment_scale=2.0))["notes"] if "strong" in n]


def test_large_rates_are_written_out() -> None:
    plan = timeline(lr=2048, lr_per=None, lr_schedule="constant")
    assert "2,048" in printed(plan)


def test_augmentation_is_shown_with_its_course() -> None:
    rising = {"keypoints": [[0, 2.0], ["100%", 9.0]]}
    plan = timeline(
        color_jitter={"brightness": 0.4, "hue": 0.1},
        augment={"name": "rand_augment", "magnitude": rising},
        random_erasing={"prob": 0.25},
        phases=[{"duration": "5ep", "batch_size": 100}],
    )
    (segment,) = as_json(plan)["segments"]
    assert segment["augment"] == "rand_augment"
    assert segment["magnitude"] == pytest.approx([2.0, 9.0], abs=0.15)
    assert segment["jitter_brightness"] == [0.4]
    assert segment["jitter_contrast"] == [0.0]
    assert segment["erasing_prob"] == [0.25]
    text = " ".join(printed(plan).split())
    assert "brightness 0.4, hue 0.1, 2 x rand_augment of magnitude 2 → 8.86, erasing 0.25" in text
    trivial = timeline(augment="trivial_augment_wide")
    assert "flip random, trivial_augment_wide, label" in " ".join(printed(trivial).split())


def test_the_table_fits_a_narrow_terminal() -> None:
    assert "…" not in printed(timeline(), width=80)


def test_explaining_imports_little() -> None:
    code = (
        "import sys, pitstop.plan.explain\n"
        "assert not {'torch', 'pyarrow', 'matplotlib', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
