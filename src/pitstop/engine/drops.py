"""Recipes without one of their tricks: what `pitstop ablate --drop NAME` compares with."""

from collections.abc import Callable
from functools import partial
from typing import Any

from pitstop.core.errors import InputError
from pitstop.core.recipe import PhaseSettings, Recipe, parse_recipe
from pitstop.core.strict import did_you_mean

Raw = dict[str, Any]
Drop = Callable[[Raw], Raw]
"""From a recipe as plain data, whose phases are complete, to the same without the trick."""


def without(recipe: Recipe, trick: str) -> Recipe:
    """Returns the recipe without a trick of its, all else as it was.

    Raises:
        InputError: the recipe does not use it; the message lists what it uses.
    """
    dropped = _dropped(recipe, trick) if trick in DROPS else None
    if dropped is None:
        used = ", ".join(tricks(recipe)) or "nothing that can be dropped"
        unknown = f"is no trick{did_you_mean(trick, [*DROPS]) or ':'}"
        why = "does not use it:" if trick in DROPS else unknown
        raise InputError(f"--drop {trick}: {why} recipe {recipe.name} uses {used}")
    return dropped


def tricks(recipe: Recipe) -> list[str]:
    """Returns the tricks that the recipe uses, by the names of their drops."""
    return [trick for trick in DROPS if _dropped(recipe, trick) is not None]


def plain(recipe: Recipe) -> Raw:
    """Returns the recipe as plain data, without the settings that each phase repeats."""
    return recipe.model_dump(mode="json", exclude=set(PhaseSettings.model_fields))


def _dropped(recipe: Recipe, trick: str) -> Recipe | None:
    """Returns the recipe without the trick, None if it does not use it."""
    before = plain(recipe)
    after = DROPS[trick](before)
    return None if after == before else parse_recipe(after, f"{recipe.name} without {trick}")


def _in_run(**values: Any) -> Drop:
    """Returns a drop that gives keys of the run these values."""
    return lambda raw: raw | values


def _below(part: str, **values: Any) -> Drop:
    """Returns a drop that gives keys of a part of the run, if it has that, these values."""
    return lambda raw: raw | {part: raw[part] and _known(raw[part], values)}


def _in_phases(**values: Any) -> Drop:
    """Returns a drop that gives keys of each phase these values."""
    return _each_phase(lambda phase: phase | values)


def _each_phase(change: Drop) -> Drop:
    return lambda raw: raw | {"phases": [change(phase) for phase in raw["phases"]]}


def _known(kept: Raw, values: Raw) -> Raw:
    """Returns the mapping with those of the values that it has keys for."""
    return kept | {key: value for key, value in values.items() if key in kept}


def _without_mix(alpha: str, phase: Raw) -> Raw:
    """Mixup without CutMix, or CutMix without mixup: each batch that is mixed has the other."""
    mix: Raw | None = phase["mix"]
    if mix is None or mix[alpha] == 0:
        return phase
    left = mix | {alpha: 0.0}
    is_on = left["mixup_alpha"] != 0 or left["cutmix_alpha"] != 0
    return phase | {"mix": left if is_on else None}


def _without_alternating_flip(phase: Raw) -> Raw:
    return phase | {"flip": "random"} if phase["flip"] == "alternating" else phase


def _without_warmup(phase: Raw) -> Raw:
    return phase | {"lr_schedule": _known(phase["lr_schedule"], {"warmup": "0ep"})}


def _at_one_resolution(raw: Raw) -> Raw:
    """All phases at the last phase's largest resolution."""
    last = raw["phases"][-1]["resolution"]
    return _in_phases(resolution=last[1] if isinstance(last, list) else last)(raw)


def _decaying_norms(raw: Raw) -> Raw:
    """Norms and biases decay like kernels."""
    return _below("optimizer", norm_weight_decay=raw["optimizer"]["weight_decay"])(raw)


DROPS: dict[str, Drop] = {
    "progressive_resizing": _at_one_resolution,
    "data_fraction": _in_phases(data_fraction=1.0),
    "freezing": _in_phases(freeze=[]),
    "mixup": _each_phase(partial(_without_mix, "mixup_alpha")),
    "cutmix": _each_phase(partial(_without_mix, "cutmix_alpha")),
    "label_smoothing": _in_phases(label_smoothing=0.0),
    "alternating_flip": _each_phase(_without_alternating_flip),
    "translate": _in_phases(translate=0),
    "color_jitter": _in_phases(color_jitter=None),
    "augment": _in_phases(augment=None),
    "random_erasing": _in_phases(random_erasing=None),
    "augment_scale": _in_phases(augment_scale=1.0),
    "repeated_augmentation": _in_phases(repeated_augmentation=1),
    "warmup": _each_phase(_without_warmup),
    "blurpool": _below("model", blurpool=False),
    "prior_bias": _below("model", prior_bias=False),
    "no_decay_on_norms": _decaying_norms,
    "layer_decay": _below("optimizer", layer_decay=None),
    "lr_scales": _below("optimizer", lr_scales={}),
    "clip_grad_norm": _in_run(clip_grad_norm=None),
    "agc": _in_run(agc=None),
    "ema": _in_run(ema=None),
    "lookahead": _below("ema", lookahead=False),
    "flip_average": _below("eval", flip_average=False),
    "translate_average": _below("eval", translate_average=0),
}
