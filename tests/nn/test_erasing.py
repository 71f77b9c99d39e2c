"""Random erasing against torchvision's distribution, and its draws as a function of the step."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from pitstop.core.order import rank_slice
from pitstop.core.recipe import parse_recipe
from pitstop.core.timeline import StepSettings, Timeline
from pitstop.nn.erasing import EraseDraws, draw, erase, noise_for

ALL = slice(None)
CPU = torch.device("cpu")


def settings(step=0, *, batch_size=64, resolution=32, seed=0, **erasing) -> StepSettings:
    stated = {"epochs": 1, "batch_size": batch_size, "resolution": resolution, "seed": seed}
    recipe = parse_recipe({**stated, "random_erasing": erasing}, "test")
    return Timeline(recipe, num_samples=10 * batch_size).settings_at(step)


def drawn(*args, **stated) -> EraseDraws:
    return share_of(settings(*args, **stated), ALL)


def share_of(step: StepSettings, share: slice) -> EraseDraws:
    draws = draw(step, share)
    assert draws is not None
    return draws


def test_boxes_are_of_torchvisions_distribution():
    n, side = 6000, 64
    boxes = drawn(batch_size=n, resolution=side, prob=1.0).boxes
    torch.manual_seed(0)
    transform, image = v2.RandomErasing(p=1.0), torch.zeros(3, side, side)
    theirs = [transform.make_params([image]) for _ in range(n)]
    expected = np.array([[p["i"], p["i"] + p["h"], p["j"], p["j"] + p["w"]] for p in theirs])
    for ours, other in zip(boxes.T, expected.T, strict=True):
        both = np.arange(side + 1)
        cdfs = [np.searchsorted(np.sort(each), both, "right") / n for each in (ours, other)]
        assert np.abs(cdfs[0] - cdfs[1]).max() < 1.95 * np.sqrt(2 / n)


def test_prob_is_the_share_that_is_erased_and_may_vary():
    boxes = drawn(batch_size=20_000, prob=0.25).boxes
    erased = (boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2])
    assert erased.mean() == pytest.approx(0.25, abs=0.02)
    rising = {"keypoints": [[0, 0.0], ["100%", 1.0]]}
    assert draw(settings(0, prob=rising), ALL) is None
    assert draw(settings(5, prob=rising), ALL) is not None


def test_where_no_box_fits_nothing_is_erased():
    draws = drawn(prob=1.0, scale=[1.0, 1.0], ratio=[1.0, 1.0])
    assert not draws.boxes.any()
    images = torch.ones(64, 3, 32, 32)
    erase(images, draws, None)
    assert torch.equal(images, torch.ones_like(images))


@pytest.mark.parametrize("mode", ["const", "pixel"])
def test_only_the_box_is_erased(mode):
    draws = drawn(prob=0.5)
    noise = noise_for(3, 32, CPU) if mode == "pixel" else None
    images = torch.full((64, 3, 32, 32), 7.0).contiguous(memory_format=torch.channels_last)
    erase(images, draws, noise)
    for image, (top, bottom, left, right) in zip(images, draws.boxes, strict=True):
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(image != 7, inside.expand(3, -1, -1))
        if mode == "const":
            assert not image[:, inside].any()


def test_noise_is_standard_normal_and_differs_from_image_to_image():
    draws = drawn(prob=1.0, scale=[0.3, 0.3], ratio=[1.0, 1.0])
    images = torch.zeros(64, 3, 32, 32)
    erase(images, draws, noise_for(0, 32, CPU))
    patches = [
        image[:, top:bottom, left:right].flatten()
        for image, (top, bottom, left, right) in zip(images, draws.boxes, strict=True)
    ]
    values = torch.cat(patches)
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02
    assert len({tuple(patch[:5].tolist()) for patch in patches}) == len(patches)


def test_noise_follows_from_the_seed():
    assert torch.equal(noise_for(1, 16, CPU), noise_for(1, 16, CPU))
    assert not torch.equal(noise_for(1, 16, CPU), noise_for(2, 16, CPU))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_erase_what_one_does(world):
    step = settings(4, batch_size=50, prob=0.7)
    noise = noise_for(0, 32, CPU)
    images = torch.rand(50, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = images.clone()
    erase(whole, share_of(step, ALL), noise)
    for rank in range(world):
        part = rank_slice(50, rank, world)
        own = images[part].clone()
        erase(own, share_of(step, part), noise)
        assert torch.equal(own, whole[part])


def test_draws_follow_from_seed_and_step_alone():
    first = drawn(5, seed=1, prob=0.5)
    for step, seed, equal in [(5, 1, True), (6, 1, False), (5, 2, False)]:
        other = drawn(step, seed=seed, prob=0.5)
        assert np.array_equal(first.boxes, other.boxes) == equal
        assert np.array_equal(first.offsets, other.offsets) == equal
