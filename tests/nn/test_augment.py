"""Policies against torchvision's and timm's tables; draws as a function of the step."""

import math
from collections import Counter

import numpy as np
import pytest
import timm.data.auto_augment as timm_augment
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

from pitstop.core.order import rank_slice
from pitstop.core.recipe import parse_recipe
from pitstop.core.timeline import StepSettings, Timeline
from pitstop.nn.augment import (
    Draws,
    _operated,
    augment,
    draw,
    rand_augment,
    timm_increasing,
    trivial_augment_wide,
)
from pitstop.nn.operations import FUNCTIONS, Operation

ALL = slice(None)
SIDE = 224

THEIRS = {
    Operation.IDENTITY: "Identity",
    Operation.SHEAR_X: "ShearX",
    Operation.SHEAR_Y: "ShearY",
    Operation.TRANSLATE_X: "TranslateX",
    Operation.TRANSLATE_Y: "TranslateY",
    Operation.ROTATE: "Rotate",
    Operation.BRIGHTNESS: "Brightness",
    Operation.COLOR: "Color",
    Operation.CONTRAST: "Contrast",
    Operation.SHARPNESS: "Sharpness",
    Operation.POSTERIZE: "Posterize",
    Operation.SOLARIZE: "Solarize",
    Operation.AUTO_CONTRAST: "AutoContrast",
    Operation.EQUALIZE: "Equalize",
}
ENHANCING = {Operation.BRIGHTNESS, Operation.COLOR, Operation.CONTRAST, Operation.SHARPNESS}
JITTER = {"brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1}
EVERYTHING = {"augment": {"name": "rand_augment", "magnitude_std": 0.5}, "color_jitter": JITTER}


def settings(step=0, *, batch_size=64, resolution=32, seed=0, steps=10, **stated) -> StepSettings:
    all_ = {"epochs": 1, "batch_size": batch_size, "resolution": resolution, "seed": seed, **stated}
    timeline = Timeline(parse_recipe(all_, "test"), num_samples=batch_size * steps)
    return timeline.settings_at(step)


def drawn(*args, **stated) -> Draws:
    return share_of(settings(*args, **stated), ALL)


def share_of(step: StepSettings, share: slice) -> Draws:
    draws = draw(step, share)
    assert draws is not None
    return draws


def pictures(n: int, side: int = 32) -> torch.Tensor:
    noise = torch.randint(
        256,
        (n, side, side, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(7),
    )
    return noise.permute(0, 3, 1, 2)


def same(one: Draws, other: Draws) -> bool:
    return np.array_equal(one.operations, other.operations) and np.array_equal(
        one.arguments, other.arguments
    )


# The tables


@pytest.mark.parametrize("side", [32, 160, 224, 288])
@pytest.mark.parametrize(
    ("table", "transform"),
    [
        (rand_augment, v2.RandAugment),
        (trivial_augment_wide, v2.TrivialAugmentWide),
    ],
)
def test_arguments_are_torchvisions_at_each_magnitude(table, transform, side):
    space = transform._AUGMENTATION_SPACE
    arguments = table(side)
    assert {THEIRS[operation] for operation in arguments} == set(space)
    strength = np.arange(31) / 30
    for operation, argument in arguments.items():
        magnitudes, signed = space[THEIRS[operation]]
        theirs = magnitudes(31, side, side)
        if theirs is None:
            continue
        theirs = theirs.double().numpy()
        if operation in ENHANCING:
            theirs = 1 + theirs
        elif operation in (Operation.TRANSLATE_X, Operation.TRANSLATE_Y):
            theirs = np.trunc(theirs + 1e-5)  # its float32 has 15.999999 for 16
        elif operation == Operation.SOLARIZE:
            theirs = np.ceil(255 * theirs - 1e-4)  # a pixel is a whole number
        np.testing.assert_allclose(argument(strength, strength), theirs, atol=1e-5)
        mirrored = argument(strength, -strength)
        center = 1 if operation in ENHANCING else 0
        expected = 2 * center - theirs if signed else theirs
        np.testing.assert_allclose(mirrored, expected, atol=1e-5)


def test_arguments_of_the_increasing_variant_are_timms(monkeypatch):
    names = {
        **THEIRS,
        Operation.INVERT: "Invert",
        Operation.SOLARIZE_ADD: "SolarizeAdd",
        Operation.POSTERIZE: "PosterizeIncreasing",
        Operation.SOLARIZE: "SolarizeIncreasing",
        Operation.TRANSLATE_X: "TranslateXRel",
        Operation.TRANSLATE_Y: "TranslateYRel",
        **{operation: f"{THEIRS[operation]}Increasing" for operation in ENHANCING},
    }
    table = timm_increasing(SIDE)
    assert {names[op] for op in table} == set(timm_augment._RAND_INCREASING_TRANSFORMS)
    levels = np.arange(0, 10.5, 0.5)
    monkeypatch.setattr(timm_augment, "_randomly_negate", lambda value: value)
    monkeypatch.setattr("random.random", lambda: 0.0)
    for operation, argument in table.items():
        to_argument = timm_augment.LEVEL_TO_ARG[names[operation]]
        if to_argument is None:
            continue
        theirs = [to_argument(level, {}) for level in levels]
        theirs = np.array([each[0] if isinstance(each, tuple) else each for each in theirs])
        if operation in (Operation.TRANSLATE_X, Operation.TRANSLATE_Y):
            theirs = np.trunc(theirs * SIDE)
        np.testing.assert_allclose(argument(levels / 10, levels / 10), theirs, atol=1e-9)


# The draws


def assert_uniform(counts: Counter, kinds: int) -> None:
    """Each within five standard deviations of an equal share."""
    n = counts.total()
    assert len(counts) == kinds
    for count in counts.values():
        assert abs(count - n / kinds) < 5 * math.sqrt(n / kinds)


@pytest.mark.parametrize(
    ("policy", "kinds", "slots"),
    [
        ({"name": "rand_augment", "num_ops": 3}, 14, 3),
        ({"name": "rand_augment", "increasing": True}, 15, 2),
        ("trivial_augment_wide", 14, 1),
    ],
)
def test_each_operation_is_as_likely_in_each_place(policy, kinds, slots):
    draws = drawn(batch_size=8000, augment=policy)
    assert draws.operations.shape == draws.arguments.shape == (slots, 8000)
    for operations in draws.operations:
        assert_uniform(Counter(operations.tolist()), kinds)


def test_signs_are_a_fair_coin():
    draws = drawn(batch_size=20_000, augment="rand_augment")
    rotated = draws.arguments[draws.operations == Operation.ROTATE]
    np.testing.assert_allclose(np.abs(rotated), 9.0)
    assert_uniform(Counter((rotated > 0).tolist()), 2)


def test_trivial_augment_takes_each_of_31_magnitudes_as_often():
    draws = drawn(batch_size=40_000, augment="trivial_augment_wide", resolution=32)
    rotated = np.abs(draws.arguments[draws.operations == Operation.ROTATE])
    assert_uniform(Counter(np.rint(rotated / 135 * 30).tolist()), 31)


def test_magnitudes_spread_about_theirs_and_stay_on_the_scale():
    policy = {"name": "rand_augment", "magnitude": 7, "magnitude_std": 0.5, "increasing": True}
    draws = drawn(batch_size=20_000, augment=policy)
    levels = np.abs(draws.arguments[draws.operations == Operation.ROTATE]) / 3
    assert levels.mean() == pytest.approx(7, abs=0.05)
    assert levels.std() == pytest.approx(0.5, abs=0.05)
    wide = drawn(batch_size=20_000, augment={**policy, "magnitude_std": 20})
    levels = np.abs(wide.arguments[wide.operations == Operation.ROTATE]) / 3
    assert levels.min() == 0
    assert levels.max() == pytest.approx(10)


def test_prob_is_the_share_of_operations_that_are_done():
    draws = drawn(batch_size=20_000, augment={"name": "rand_augment", "prob": 0.5})
    done = (draws.operations != Operation.IDENTITY).mean()
    assert done == pytest.approx(0.5 * 13 / 14, abs=0.02)


def test_jitter_has_torchvisions_ranges_and_any_order():
    draws = drawn(batch_size=24_000, color_jitter=JITTER)
    ranges = {
        Operation.BRIGHTNESS: (0.6, 1.4),
        Operation.CONTRAST: (0.7, 1.3),
        Operation.COLOR: (0.8, 1.2),
        Operation.HUE: (-0.1, 0.1),
    }
    for operation, (low, high) in ranges.items():
        values = draws.arguments[draws.operations == operation]
        assert len(values) == 24_000
        uniform = np.sort((values - low) / (high - low))
        assert np.abs(uniform - np.linspace(0, 1, len(values))).max() < 0.02
    assert_uniform(Counter(map(tuple, draws.operations.T.tolist())), 24)


def test_a_strength_of_one_does_not_go_below_black():
    draws = drawn(batch_size=1000, color_jitter={"brightness": 1.0})
    assert 0 <= draws.arguments.min() < 0.1
    assert 1.9 < draws.arguments.max() <= 2


def test_an_unused_jitter_does_not_move_the_draws_of_another():
    alone = drawn(color_jitter={"hue": 0.1})
    both = drawn(color_jitter={"hue": 0.1, "contrast": 0.5})
    hue = both.operations == Operation.HUE
    np.testing.assert_array_equal(
        np.take_along_axis(both.arguments, hue.argmax(0)[None], 0), alone.arguments
    )


@pytest.mark.parametrize("stated", [{}, {"color_jitter": {}}])
def test_nothing_is_drawn_where_nothing_is_done(stated):
    assert draw(settings(**stated), ALL) is None


def test_a_magnitude_on_a_schedule_is_the_steps():
    rising = {"keypoints": [[0, 0.0], ["100%", 30.0]]}
    stated = {"augment": {"name": "rand_augment", "magnitude": rising}, "batch_size": 500}
    for step in (0, 5):
        draws = drawn(step, **stated)
        rotated = np.abs(draws.arguments[draws.operations == Operation.ROTATE])
        np.testing.assert_allclose(rotated, 3.0 * step)


@given(
    st.integers(1, 4), st.integers(0, 9), st.integers(0, 2**40), st.integers(1, 40), st.booleans()
)
def test_ranks_share_the_draws_of_the_global_batch(world, step, seed, batch_size, increasing):
    policy = {"name": "rand_augment", "increasing": increasing, "magnitude_std": 1.0}
    stated = {"batch_size": max(world, batch_size), "augment": policy, "color_jitter": JITTER}
    whole = settings(step, seed=seed, **stated)
    shares = [
        share_of(whole, rank_slice(stated["batch_size"], rank, world)) for rank in range(world)
    ]
    joined = Draws(
        np.concatenate([share.operations for share in shares], 1),
        np.concatenate([share.arguments for share in shares], 1),
    )
    assert same(joined, share_of(whole, ALL))


def test_draws_follow_from_seed_and_step_alone():
    first = drawn(5, seed=1, **EVERYTHING)
    assert same(first, drawn(5, seed=1, **EVERYTHING))
    for step, seed in [(6, 1), (5, 2)]:
        assert not same(first, drawn(step, seed=seed, **EVERYTHING))


# What is done


def one_by_one(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    pixels = images.permute(0, 2, 3, 1).contiguous()
    for operations, arguments in zip(draws.operations, draws.arguments, strict=True):
        done = [
            FUNCTIONS[Operation(op)](image[None], np.array([a])) if op else image[None]
            for image, op, a in zip(pixels, operations, arguments, strict=True)
        ]
        pixels = torch.cat(done)
    return pixels.permute(0, 3, 1, 2)


@pytest.mark.parametrize("policy", [EVERYTHING, {"augment": "trivial_augment_wide"}])
def test_each_image_gets_its_own_operations_in_their_order(policy):
    draws, images = drawn(batch_size=64, **policy), pictures(64)
    expected = one_by_one(images, draws)
    result = augment(images, draws)
    assert torch.equal(result, expected)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_a_cpu_augments_the_loaders_batch_in_place():
    draws, images = drawn(batch_size=64, **EVERYTHING), pictures(64)
    assert augment(images, draws).data_ptr() == images.data_ptr()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_make_the_pixels_of_one(world):
    whole, images = settings(3, batch_size=50, **EVERYTHING), pictures(50)
    parts = [rank_slice(50, rank, world) for rank in range(world)]
    joined = torch.cat([augment(images[part].clone(), share_of(whole, part)) for part in parts])
    assert torch.equal(joined, augment(images, share_of(whole, ALL)))


def test_images_are_the_same_together_and_one_by_one():
    """A GPU takes them together, a CPU one by one."""
    draws, images = drawn(batch_size=64, **EVERYTHING), pictures(64)
    together = _operated(images.permute(0, 2, 3, 1), draws.operations, draws.arguments)
    assert torch.equal(together.permute(0, 3, 1, 2), augment(images, draws))


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_pixels_do_not_depend_on_the_number_of_threads(threads):
    draws, images = drawn(batch_size=50, **EVERYTHING), pictures(50)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = augment(images.clone(), draws)
        torch.set_num_threads(threads)
        assert torch.equal(augment(images, draws), expected)
    finally:
        torch.set_num_threads(before)


def test_a_batch_on_the_meta_device_stays_there():
    draws = drawn(batch_size=64, **EVERYTHING)
    result = augment(pictures(64).to("meta"), draws)
    assert result.device.type == "meta"
    assert result.shape == (64, 3, 32, 32)
