import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pitstop.data.resize import Interpolation, resize, resize_center_crop

SIDE = st.integers(1, 160)
RESOLUTION = st.integers(2, 64)  # torchvision itself raises at 1: an assertion inside torch
INTERPOLATION = st.sampled_from(["bilinear", "bicubic"])


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def slots(height: int, width: int, layout: torch.memory_format) -> torch.Tensor:
    return torch.full((3, 3, height, width), 7, dtype=torch.uint8).to(memory_format=layout)


def chw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()


def worst(a: torch.Tensor, b: torch.Tensor) -> int:
    assert a.shape == b.shape
    return int((a.int() - b.int()).abs().max())


@settings(max_examples=60, deadline=None)
@given(st.data(), SIDE, SIDE, RESOLUTION, INTERPOLATION)
def test_the_resize_of_a_crop_is_torchvisions(data, height, width, resolution, interpolation):
    crop_height, crop_width = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top = data.draw(st.integers(0, height - crop_height))
    left = data.draw(st.integers(0, width - crop_width))
    image = pixels(height, width)
    batch = slots(resolution, resolution, torch.channels_last)
    crop = image[top : top + crop_height, left : left + crop_width]
    resize(crop, batch[1:2], interpolation)
    size = [resolution, resolution]
    reference = F.resize(chw(crop), size, F.InterpolationMode(interpolation), antialias=True)
    assert worst(batch[1], reference) <= 1
    assert bool((batch[0] == 7).all() and (batch[2] == 7).all())


def test_resize_fills_a_contiguous_or_oblong_slot_too():
    image = pixels(50, 40)
    batch = slots(20, 30, torch.contiguous_format)
    resize(image[5:38, 6:36], batch[1:2])
    reference = F.resized_crop(chw(image), 5, 6, 33, 30, [20, 30], antialias=True)
    assert worst(batch[1], reference) <= 1


@settings(max_examples=60, deadline=None)
@given(SIDE, SIDE, RESOLUTION, st.sampled_from([0.875, 0.95, 1.0, 0.7]), INTERPOLATION)
def test_resize_center_crop_is_torchvisions(height, width, resolution, ratio, interpolation):
    image = pixels(height, width)
    batch = slots(resolution, resolution, torch.channels_last)
    resize_center_crop(image, resolution, ratio, batch[1:2], interpolation)
    mode = F.InterpolationMode(interpolation)
    resize = T.Resize(round(resolution / ratio), interpolation=mode, antialias=True)
    reference = T.CenterCrop(resolution)(resize(chw(image)))
    assert worst(batch[1], reference) <= 1
    assert bool((batch[0] == 7).all() and (batch[2] == 7).all())


@pytest.mark.parametrize(("resolution", "ratio", "side"), [(224, 0.875, 256), (176, 0.95, 185)])
def test_short_side_of_the_usual_protocols(resolution, ratio, side):
    assert round(resolution / ratio) == side
    interpolation: Interpolation = "bilinear"
    image = pixels(side, side + 10)
    out = slots(resolution, resolution, torch.channels_last)[:1]
    resize_center_crop(image, resolution, ratio, out, interpolation)
    assert worst(out[0], F.center_crop(chw(image), [resolution, resolution])) == 0
