"""Crop boxes: torchvision's RandomResizedCrop is the oracle of their distribution."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from pitstop.core.recipe import Crop
from pitstop.data.augment import crop_boxes

DRAWS = 3000
SIZES = {
    "photo": (375, 500),
    "square": (64, 64),
    "wide": (50, 300),
    "narrow": (500, 60),
    "ribbon": (20, 900),
    "dot": (3, 4),
}
CROPS = {
    "default": Crop(),
    "mild": Crop(scale=(0.6, 1.0)),
    "any shape": Crop(scale=(0.2, 0.5), ratio=(0.25, 4.0)),
    "square": Crop(scale=(0.08, 1.0), ratio=(1.0, 1.0)),
}


def ours(size: tuple[int, int], crop: Crop, seed: int = 0) -> np.ndarray:
    sizes = np.tile(np.array(size, np.int32), (DRAWS, 1))
    return crop_boxes(sizes, crop, np.random.default_rng(seed))


def torchvisions(size: tuple[int, int], crop: Crop) -> np.ndarray:
    image = torch.empty(1, *size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = [
            RandomResizedCrop.get_params(image, list(crop.scale), list(crop.ratio))
            for _ in range(DRAWS)
        ]
    return np.array(draws)


def features(boxes: np.ndarray, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """What of a crop is independent of its image's size, as fractions."""
    (height, width), (top, left, h, w) = size, boxes.T.astype(float)
    down, right = top / np.maximum(height - h, 1), left / np.maximum(width - w, 1)
    return {
        "area": h * w / (height * width),
        "log aspect": np.log(w / h),
        "top": down,
        "left": right,
        "top and left": down - right,  # each alone would not tell that they go together
        "area and aspect": np.sqrt(h * w / (height * width)) * np.log(w / h),
        "area and top": h * w / (height * width) * (down - 0.5),
    }


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The Kolmogorov-Smirnov distance, in units of its critical value at 1e-4."""
    both = np.concatenate([one, other])
    cdfs = [
        np.searchsorted(np.sort(sample), both, "right") / len(sample) for sample in (one, other)
    ]
    return np.abs(cdfs[0] - cdfs[1]).max() / (2.23 * np.sqrt(1 / len(one) + 1 / len(other)))


def inside(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    top, left, height, width = boxes.T
    ok = (top >= 0) & (left >= 0) & (height >= 1) & (width >= 1)
    return bool((ok & (top + height <= sizes[:, 0]) & (left + width <= sizes[:, 1])).all())


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("size", SIZES)
def test_the_distribution_is_torchvisions(size, crop):
    mine = features(ours(SIZES[size], CROPS[crop]), SIZES[size])
    theirs = features(torchvisions(SIZES[size], CROPS[crop]), SIZES[size])
    for name, values in mine.items():
        assert distance(values, theirs[name]) < 1, name


def test_a_wrong_formula_would_be_seen():
    """The likely mistakes, made on purpose, are beyond the tolerance."""
    size, rng = (400, 400), np.random.default_rng(0)
    crop = Crop(scale=(0.2, 0.5))
    right = features(ours(size, crop), size)
    assert distance(np.log(rng.uniform(3 / 4, 4 / 3, DRAWS)), right["log aspect"]) > 1
    assert distance(rng.uniform(0.2**0.5, 0.5**0.5, DRAWS) ** 2, right["area"]) > 1
    assert distance(np.full(DRAWS, 0.5), right["top"]) > 1


@pytest.mark.parametrize(
    ("size", "box"), [((20, 900), (0, 436, 20, 27)), ((900, 20), (436, 0, 27, 20))]
)
def test_where_nothing_fits_the_box_is_the_largest_central_one(size, box):
    crop = Crop(scale=(0.9, 1.0))
    assert (ours(size, crop) == box).all()
    assert (torchvisions(size, crop)[:5] == box).all()


def test_a_whole_image_is_a_crop_too():
    boxes = ours((32, 32), Crop(scale=(1.0, 1.0), ratio=(1.0, 1.0)))
    assert (boxes == (0, 0, 32, 32)).all()


sides = st.integers(2, 2000)
shares = st.floats(1e-4, 1.0)
ratios = st.floats(1 / 3, 3.0)


@given(
    sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=50),
    scale=st.tuples(shares, shares).map(sorted),
    ratio=st.tuples(ratios, ratios).map(sorted),
    seed=st.integers(0, 2**32),
)
def test_boxes_are_always_inside(sizes, scale, ratio, seed):
    image_sizes = np.array(sizes, np.int32)
    crop = Crop(scale=tuple(scale), ratio=tuple(ratio))
    boxes = crop_boxes(image_sizes, crop, np.random.default_rng(seed))
    assert boxes.dtype == np.int64
    assert boxes.shape == (len(sizes), 4)
    assert inside(boxes, image_sizes)


def test_images_of_a_single_pixels_height_or_width_have_boxes_too():
    sizes = np.array([[1, 1], [1, 2], [2, 1], [1, 5000], [5000, 1]] * 100, np.int32)
    assert inside(crop_boxes(sizes, Crop(), np.random.default_rng(0)), sizes)


def test_the_box_of_an_image_does_not_depend_on_the_others():
    """Also not on how many tries the others need."""
    sizes = np.random.default_rng(0).integers(10, 500, (64, 2)).astype(np.int32)
    others = np.tile(np.array([[5, 4000]], np.int32), (64, 1))
    others[10], others[63] = sizes[10], sizes[63]
    boxes = crop_boxes(sizes, Crop(), np.random.default_rng(3))
    among_others = crop_boxes(others, Crop(), np.random.default_rng(3))
    assert np.array_equal(boxes[[10, 63]], among_others[[10, 63]])


def test_the_generator_decides_the_boxes():
    sizes = np.full((16, 2), 200, np.int32)
    assert np.array_equal(ours((200, 200), Crop(), 1), ours((200, 200), Crop(), 1))
    boxes = crop_boxes(sizes, Crop(), np.random.default_rng(1))
    assert len(np.unique(boxes, axis=0)) == 16
    assert not np.array_equal(boxes, crop_boxes(sizes, Crop(), np.random.default_rng(2)))
