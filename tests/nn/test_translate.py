"""Random translation against torch's padding, and its draws as a function of the step."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pitstop.core.errors import InputError
from pitstop.core.order import rank_slice
from pitstop.core.recipe import parse_recipe
from pitstop.core.timeline import StepSettings, Timeline
from pitstop.nn.translate import draw, translate

ALL = slice(None)


def settings(step: int = 0, *, batch_size: int = 64, seed: int = 0, **stated) -> StepSettings:
    given = {"epochs": 1, "batch_size": batch_size, "resolution": 32, "seed": seed, **stated}
    return Timeline(parse_recipe(given, "test"), num_samples=10 * batch_size).settings_at(step)


def drawn(step: StepSettings, share: slice = ALL) -> np.ndarray:
    shifts = draw(step, share)
    assert shifts is not None
    return shifts


def pictures(n: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=generator)
    return pixels.permute(0, 3, 1, 2)


def one_by_one(images: torch.Tensor, shifts: np.ndarray, most: int) -> torch.Tensor:
    """What F.pad and a crop make of each image."""
    height, width = images.shape[2:]
    padded = F.pad(images.float(), (most,) * 4, "reflect").to(torch.uint8)
    places = (shifts + most).tolist()
    moved = [
        image[:, y : y + height, x : x + width]
        for image, (y, x) in zip(padded, places, strict=True)
    ]
    return torch.stack(moved)


@given(
    st.integers(1, 9),
    st.integers(2, 12),
    st.integers(2, 12),
    st.integers(0, 2**32 - 1),
)
def test_it_is_reflect_padding_and_a_crop(n, height, width, seed):
    most = min(height, width) - 1
    shifts = np.random.default_rng(seed).integers(-most, most, (n, 2), endpoint=True)
    images = pictures(n, height, width)
    before = images.clone()
    moved = translate(images, shifts)
    assert torch.equal(moved, one_by_one(images, shifts, most))
    assert torch.equal(images, before)
    assert moved.is_contiguous(memory_format=torch.channels_last)


def test_all_shifts_come_and_equally_often():
    shifts = drawn(settings(batch_size=25_000, translate=2))
    pairs, counts = np.unique(shifts, axis=0, return_counts=True)
    assert pairs.tolist() == [[y, x] for y in range(-2, 3) for x in range(-2, 3)]
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000)


def test_where_nothing_is_moved_nothing_is_drawn_or_copied():
    assert draw(settings(), ALL) is None
    images = pictures(3, 4, 4)
    assert translate(images, np.zeros((3, 2), np.int64)) is images


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_move_what_one_does(world):
    step = settings(4, batch_size=50, translate=3)
    images = pictures(50, 32, 32)
    whole = translate(images, drawn(step))
    for rank in range(world):
        part = rank_slice(50, rank, world)
        assert torch.equal(translate(images[part], drawn(step, part)), whole[part])


def test_draws_follow_from_seed_and_step_alone():
    first = drawn(settings(5, seed=1, translate=2))
    for step, seed, equal in [(5, 1, True), (6, 1, False), (5, 2, False)]:
        other = drawn(settings(step, seed=seed, translate=2))
        assert np.array_equal(first, other) == equal


def test_a_shift_as_large_as_the_image_is_refused():
    with pytest.raises(InputError, match="translate 32 must be less than the resolution 32"):
        settings(translate=32)
    assert drawn(settings(translate=31)).shape == (64, 2)
