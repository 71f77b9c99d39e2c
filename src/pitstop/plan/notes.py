"""What a plan's table does not show and one would want to know, a line each."""

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise

from pitstop.core.interval import ASSUMED_SAVE_SECONDS, optimal_interval
from pitstop.core.recipe import Checkpoint, Model, Protocol, RandAugment, Recipe
from pitstop.core.timeline import Segment, Timeline


def notes(timeline: Timeline) -> list[str]:
    """Returns the lines, those of phases first; a fact of several phases is told once."""
    segments, recipe = timeline.segments, timeline.recipe
    return [
        *(note for pair in pairwise(segments) for note in _dropped(*pair)),
        *_found_lr(timeline),
        *by_phase((s.phase.name, fact) for s in segments for fact in _facts(s)),
        *_weights(recipe.model),
        *_optimization(recipe),
        *_average(timeline),
        _evaluation(timeline),
        *_saving(recipe.checkpoint),
        *_target(recipe),
    ]


def by_phase(facts: Iterable[tuple[str, str]]) -> list[str]:
    """Returns a line for each fact, with the names of the phases of which it is true."""
    names: dict[str, dict[str, None]] = {}
    for name, fact in facts:
        names.setdefault(fact, {})[name] = None
    return [f"{', '.join(phases)}: {fact}" for fact, phases in names.items()]


def _dropped(before: Segment, after: Segment) -> Iterator[str]:
    """What a change of data fraction leaves out."""
    into = before.walk_position(before.last) % before.num_samples
    if after.walk != before.walk and into:
        yield (
            f"{after.phase.name}: a new permutation of {after.num_samples:,} images begins, "
            f"{into / before.num_samples:.1%} into a pass of {before.phase.name}'s "
            f"{before.num_samples:,}, the rest of which is dropped"
        )


def _found_lr(timeline: Timeline) -> Iterator[str]:
    finder = timeline.recipe.lr_finder
    if timeline.lr_is_fallback and finder is not None:
        by = f", times {finder.multiplier:g}" if finder.multiplier != 1 else ""
        yield (
            f"lr: auto: {finder.fallback:g} is the fallback; the finder decides ({finder.policy} "
            f"of {finder.iterations} steps from {finder.start_lr:g} to {finder.end_lr:g}{by})"
        )


# Of a phase


def _facts(segment: Segment) -> Iterator[str]:
    yield from _peak(segment)
    yield from _images(segment)
    yield from _standing_still(segment)


def _peak(segment: Segment) -> Iterator[str]:
    """How the peak learning rate comes about, where it is not the one stated."""
    phase = segment.phase
    assert phase.lr != "auto"
    terms, scaled = f"{phase.lr:g}", phase.lr
    if phase.lr_per is not None:
        terms += f" x batch {phase.batch_size:,} / {phase.lr_per:,}"
        scaled *= phase.batch_size / phase.lr_per
    if phase.lr_cap is not None and scaled > phase.lr_cap:
        terms = f"{phase.lr_cap:g}, the cap of {terms}"
    if phase.lr_scale != 1:
        terms += f", x scale {phase.lr_scale:g}"
    peak = phase.peak_lr()
    # An extension is a copy of the last phase whose curve has a peak of its own.
    aims_at_it = any(math.isclose(knot.value, peak) for knot in segment.curves.lr.knots)
    if terms != f"{phase.lr:g}" and aims_at_it:
        yield f"peak lr {peak:g} = {terms}"


def _images(segment: Segment) -> Iterator[str]:
    phase = segment.phase
    if phase.repeated_augmentation > 1:
        times = phase.repeated_augmentation
        yield f"an image comes {times} times in a row: an epoch shows 1 image in {times}"
    if phase.translate:
        yield f"an image is moved by up to {phase.translate} px; its edge is reflected"
    scaled = phase.color_jitter or phase.random_erasing or isinstance(phase.augment, RandAugment)
    if scaled and phase.augment_scale != 1:
        yield f"augmentation is {phase.augment_scale:g} x as strong as stated, where it can be"
    if phase.mix is not None and phase.mix.prob < 1:
        yield f"{phase.mix.prob:.3g} of the batches are mixed"


def _standing_still(segment: Segment) -> Iterator[str]:
    phase = segment.phase
    if phase.freeze and phase.frozen_batch_norm == "train":
        yield "batch statistics of what is frozen go on"
    if phase.optimizer_state == "reset" and segment.phase_index > 0:
        yield "the optimizer begins anew: its state (momentum) is dropped"
    if phase.freeze and phase.optimizer_state == "reset_frozen":
        yield "what is frozen loses its optimizer state: it thaws without momentum"


# Of the run


def _weights(model: Model) -> Iterator[str]:
    if model.weights is not None:
        where = f"timm's for {model.name}" if model.weights == "timm" else model.weights
        yield f"training starts from weights: {where}"


def _optimization(recipe: Recipe) -> Iterator[str]:
    optimizer = recipe.optimizer
    if optimizer.layer_decay is not None:
        yield f"the lr shown is the head's; that of each layer below is x {optimizer.layer_decay:g}"
    for pattern, factor in optimizer.lr_scales.items():
        yield f"the lr of {pattern} is x {factor:g}"
    if recipe.agc is not None:
        yield f"gradients are clipped unit by unit, at {recipe.agc:g} of the weights' norm (AGC)"
    if recipe.clip_grad_norm is not None:
        yield f"gradients are clipped at a norm of {recipe.clip_grad_norm:g}"


def _average(timeline: Timeline) -> Iterator[str]:
    ema = timeline.recipe.ema
    if ema is None:
        return
    decay = timeline.settings_at(timeline.last - 1).ema_decay
    every = f", every {ema.every} steps" if ema.every > 1 else ""
    yield f"weights are averaged (EMA){every}, with a decay of {decay:.6g} at the end"
    if ema.lookahead:
        yield "the model is set to the average at each of its updates (Lookahead)"


def _evaluation(timeline: Timeline) -> str:
    recipe = timeline.recipe
    also = "".join(f"; at the end also at {protocol(recipe, p)}" for p in recipe.eval.also)
    return f"{len(timeline.evaluations)} evaluations at {protocol(recipe, recipe.eval)}{also}"


def protocol(recipe: Recipe, shown: Protocol) -> str:
    """Returns how images are shown in evaluation: `224 px, crop ratio 0.875`."""
    parts = [f"{shown.resolution or recipe.eval_resolution()} px, crop ratio {shown.crop_ratio:g}"]
    if shown.flip_average:
        parts.append("averaged with the mirror image")
    if shown.translate_average:
        parts.append(f"averaged with two moved by {shown.translate_average} px")
    return ", ".join(parts)


def _saving(policy: Checkpoint) -> Iterator[str]:
    if policy.every == "auto":
        minutes = optimal_interval(ASSUMED_SAVE_SECONDS, policy.mtbf_seconds) / 60
        yield (
            f"checkpoints every {minutes:.1f} min, if a save takes {ASSUMED_SAVE_SECONDS:g} s "
            "(assumed; the run measures its own) and the machine is taken away "
            f"{policy.interruptions_per_hour:g} times an hour (assumed): each time half of that, "
            f"{minutes / 2:.1f} min, is expected to be lost"
        )


def _target(recipe: Recipe) -> Iterator[str]:
    if recipe.target_accuracy is not None:
        yield f"ends at the first evaluation whose top-1 reaches {recipe.target_accuracy:g}%"
