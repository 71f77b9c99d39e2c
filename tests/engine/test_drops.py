"""Each trick dropped from every bundled recipe that uses it, and from one that uses them all."""

from typing import Any

import pytest

from pitstop.core.errors import InputError
from pitstop.core.recipe import Recipe, bundled_recipes, load_recipe, parse_recipe
from pitstop.engine.drops import DROPS, plain, tricks, without

EVERYTHING = {
    "name": "everything",
    "epochs": 10,
    "label_smoothing": 0.1,
    "flip": "alternating",
    "translate": 2,
    "color_jitter": {"brightness": 0.2},
    "augment": "rand_augment",
    "random_erasing": {"prob": 0.2},
    "augment_scale": 1.5,
    "repeated_augmentation": 3,
    "lr_schedule": {"name": "cosine", "warmup": "2ep", "warmup_init": 0.1},
    "model": {"name": "resnet18", "blurpool": True, "prior_bias": True},
    "optimizer": {"name": "sgd", "weight_decay": 1e-3, "layer_decay": 0.9, "lr_scales": {"a": 2.0}},
    "clip_grad_norm": 1.0,
    "ema": {"half_life": 10, "lookahead": True},
    "eval": {"flip_average": True, "translate_average": 2},
    "phases": [
        {"duration": "5ep", "resolution": 64, "data_fraction": 0.5},
        {"duration": "3ep", "resolution": [64, 96], "mix": {"mixup_alpha": 0.2}},
        {
            "duration": "2ep",
            "resolution": [96, 128],
            "freeze": ["layer1"],
            "mix": {"cutmix_alpha": 1},
        },
    ],
}
NAMES = sorted(bundled_recipes())


def recipe(name: str) -> Recipe:
    return parse_recipe(EVERYTHING, "everything") if name == "everything" else load_recipe(name)


def changed(name: str, trick: str) -> dict[str, tuple[Any, Any]]:
    """What dropping changes: key to its value before and after."""
    before, after = recipe(name).identity(), without(recipe(name), trick).identity()
    keys = sorted(before.keys() | after.keys())
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}


@pytest.mark.parametrize(
    ("name", "trick"), [(n, t) for n in (*NAMES, "everything") for t in tricks(recipe(n))]
)
def test_a_drop_makes_a_recipe_that_does_not_use_the_trick_and_uses_all_others(name, trick):
    left = without(recipe(name), trick)
    gone = {trick, "lookahead"} if trick == "ema" else {trick}
    assert tricks(left) == [t for t in tricks(recipe(name)) if t not in gone]
    assert [phase.duration for phase in left.phases] == [p.duration for p in recipe(name).phases]


def test_one_recipe_has_every_trick_but_the_one_that_excludes_another():
    assert set(DROPS) - set(tricks(recipe("everything"))) == {"agc"}
    agc = parse_recipe({"epochs": 1, "agc": 0.02}, "agc")
    assert without(agc, "agc").agc is None


EXPECTED = {
    "progressive_resizing": {f"phases.{i}.resolution": 128 for i in range(3)},
    "data_fraction": {"phases.0.data_fraction": 1.0},
    "freezing": {"phases.2.freeze": []},
    "alternating_flip": {f"phases.{i}.flip": "random" for i in range(3)},
    "warmup": {f"phases.{i}.lr_schedule.warmup": "0ep" for i in range(3)},
    "no_decay_on_norms": {"optimizer.norm_weight_decay": 1e-3},
    "blurpool": {"model.blurpool": False},
    "lookahead": {"ema.lookahead": False},
    "flip_average": {"eval.flip_average": False},
}


@pytest.mark.parametrize("trick", EXPECTED)
def test_a_drop_changes_that_and_nothing_else(trick):
    assert {k: after for k, (_, after) in changed("everything", trick).items()} == EXPECTED[trick]


def test_mixup_without_cutmix_and_cutmix_without_mixup():
    mixes = [phase.mix for phase in without(recipe("everything"), "mixup").phases]
    assert mixes[:2] == [None, None]
    assert mixes[2] is not None
    assert mixes[2].cutmix_alpha == 1
    both = parse_recipe({"epochs": 1, "mix": {"mixup_alpha": 0.2, "cutmix_alpha": 1}}, "both")
    left = without(both, "cutmix").phases[0].mix
    assert left is not None
    assert (left.mixup_alpha, left.cutmix_alpha) == (0.2, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_as_plain_data_is_the_same_recipe(name):
    again = parse_recipe(plain(recipe(name)), name)
    assert plain(again) == plain(recipe(name))
    assert again.identity() == recipe(name).identity()


def test_what_is_no_trick_is_refused_with_what_the_recipe_uses():
    with pytest.raises(InputError) as unknown:
        without(recipe("demo"), "mix_up")
    assert str(unknown.value) == (
        "--drop mix_up: is no trick; did you mean 'mixup'? recipe demo uses progressive_resizing, "
        "mixup, label_smoothing, no_decay_on_norms"
    )
    with pytest.raises(InputError, match=r"^--drop ema: does not use it: recipe demo uses "):
        without(recipe("demo"), "ema")
    bare = parse_recipe({"name": "bare", "epochs": 1, "resolution": 32}, "bare")
    with pytest.raises(InputError, match="recipe bare uses nothing that can be dropped"):
        without(bare, "ema")
