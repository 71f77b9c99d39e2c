"""Mixup and CutMix against timm's `Mixup`, and their draws as a function of the step."""

from functools import cache

import numpy as np
import pytest
import timm.data.mixup as timm_mixup
import torch

from pitstop.core.order import rank_slice
from pitstop.core.recipe import parse_recipe
from pitstop.core.timeline import StepSettings, Timeline
from pitstop.nn.mixing import MixDraws, draw, mix

STEPS = 3000
ALL = slice(None)
KINDS = {
    "mixup": {"mixup_alpha": 0.4},
    "cutmix": {"cutmix_alpha": 1.0},
    "both": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0},
}


@cache
def timeline(batch_size: int, resolution: int, seed: int, mix: tuple) -> Timeline:
    stated = {"epochs": 1, "batch_size": batch_size, "resolution": resolution, "seed": seed}
    recipe = parse_recipe({**stated, "mix": dict(mix)}, "test")
    return Timeline(recipe, num_samples=batch_size * STEPS)


def settings(step=0, *, batch_size=8, resolution=16, seed=0, **mix) -> StepSettings:
    return timeline(batch_size, resolution, seed, tuple(mix.items())).settings_at(step)


def drawn(step=0, **stated) -> MixDraws:
    draws = draw(settings(step, **stated), ALL)
    assert draws is not None
    return draws


def images_like(batch_size: int, resolution: int) -> torch.Tensor:
    noise = torch.rand(
        batch_size, resolution, resolution, 3, generator=torch.Generator().manual_seed(7)
    )
    return noise.permute(0, 3, 1, 2)


def same(one: MixDraws, other: MixDraws) -> bool:
    return all(
        np.array_equal(getattr(one, k), getattr(other, k)) for k in ("lam", "boxes", "cutmix")
    )


def by_timm(monkeypatch, images, labels, classes, draws, mode):
    """The batch as timm's Mixup mixes it when it happens to draw the same shares and boxes."""
    side = images.shape[2]
    mixer = timm_mixup.Mixup(1.0, 1.0, mode=mode, label_smoothing=0.0, num_classes=classes)
    pasted = draws.cutmix & (draws.lam != 1)
    boxes = iter(draws.boxes[pasted].tolist())

    def box_and_lam(*_, **__):
        top, bottom, left, right = next(boxes)
        return (top, bottom, left, right), 1.0 - (bottom - top) * (right - left) / float(
            side * side
        )

    per_elem = (draws.lam.copy(), draws.cutmix)
    per_batch = (float(draws.lam[0]), bool(draws.cutmix[0]))
    monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", box_and_lam)
    monkeypatch.setattr(mixer, "_params_per_elem", lambda _: per_elem)
    monkeypatch.setattr(mixer, "_params_per_batch", lambda: per_batch)
    out = mixer(images.clone(), labels)
    assert next(boxes, None) is None
    return out


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The Kolmogorov-Smirnov distance of two samples, in units of its 0.1% critical value."""
    both = np.concatenate([one, other])
    cdfs = [
        np.searchsorted(np.sort(sample), both, "right") / len(sample) for sample in (one, other)
    ]
    return np.abs(cdfs[0] - cdfs[1]).max() / (1.95 * np.sqrt(1 / len(one) + 1 / len(other)))


def assert_share(hits: np.ndarray, expected: float) -> None:
    """Within five standard deviations of a coin of that probability."""
    assert abs(hits.mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / len(hits)) + 1e-12


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("kind", KINDS)
def test_images_and_targets_are_timms(monkeypatch, kind, mode):
    images, labels = images_like(8, 16), torch.arange(8) % 5
    seen = set()
    for step in range(12):
        draws = drawn(step, mode=mode, prob=0.8, **KINDS[kind])
        mixed, targets = mix(images, labels, 5, draws)
        expected, wanted = by_timm(monkeypatch, images, labels, 5, draws, mode)
        torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(targets, wanted, rtol=1e-5, atol=1e-6)
        seen |= set(draws.cutmix[draws.lam != 1].tolist())
    assert seen == {"mixup": {False}, "cutmix": {True}, "both": {False, True}}[kind]


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_share_in_the_target_is_that_of_the_pixels(kind, mode):
    """Image i is of the constant value i and of class i: its mean tells what was kept of it."""
    n, side = 8, 16
    value = torch.arange(n, dtype=torch.float64)
    images = value[:, None, None, None].expand(n, 3, side, side).clone()
    for step in range(20):
        mixed, targets = mix(images, torch.arange(n), n, drawn(step, mode=mode, **KINDS[kind]))
        kept = (mixed.mean((1, 2, 3)) - value.flip(0)) / (value - value.flip(0))
        torch.testing.assert_close(targets.diagonal().double(), kept, rtol=0, atol=1e-6)
        torch.testing.assert_close(targets.sum(1), torch.ones(n))


def test_the_image_in_the_middle_of_an_odd_batch_stays_itself():
    images, labels = images_like(7, 16), torch.arange(7)
    draws = drawn(batch_size=7, mode="elem", mixup_alpha=1.0)
    mixed, targets = mix(images, labels, 7, draws)
    torch.testing.assert_close(mixed[3], images[3])
    torch.testing.assert_close(targets[3], torch.eye(7)[3])
    assert not torch.allclose(mixed[0], images[0])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_given_stays_and_its_dtype_and_memory_format_too(kind):
    images = images_like(8, 16).to(torch.bfloat16)
    before = images.clone()
    mixed, targets = mix(images, torch.arange(8), 8, drawn(1, mode="elem", **KINDS[kind]))
    assert torch.equal(images, before)
    assert mixed.dtype == torch.bfloat16
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert targets.dtype == torch.float32


def test_only_the_pixels_of_the_box_are_pasted():
    images, n = images_like(64, 16), 64
    draws = drawn(batch_size=n, mode="elem", cutmix_alpha=1.0)
    mixed, _ = mix(images, torch.zeros(n, dtype=torch.int64), 2, draws)
    for i, (top, bottom, left, right) in enumerate(draws.boxes):
        expected = images[i].clone()
        expected[:, top:bottom, left:right] = images[n - 1 - i][:, top:bottom, left:right]
        assert torch.equal(mixed[i], expected)


# The draws


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_shares_are_of_the_beta_distribution(alpha):
    lam = drawn(batch_size=20_000, mode="elem", mixup_alpha=alpha).lam
    rng = np.random.default_rng(1)
    expected, others = (rng.beta(a, a, 200_000).astype(np.float32) for a in (alpha, 1.15 * alpha))
    assert distance(lam, expected) < 1
    assert distance(lam, others) > 1  # the test can tell


def test_where_both_are_on_each_has_its_own_alpha():
    draws = drawn(batch_size=20_000, mode="elem", mixup_alpha=0.3, cutmix_alpha=2.0, resolution=256)
    rng, side = np.random.default_rng(1), 256
    shares = [timm_mixup.cutmix_bbox_and_lam((3, side, side), a)[1] for a in rng.beta(2, 2, 20_000)]
    assert distance(draws.lam[~draws.cutmix], rng.beta(0.3, 0.3, 50_000).astype(np.float32)) < 1
    assert distance(draws.lam[draws.cutmix], np.array(shares)) < 1


def test_boxes_and_shares_are_of_timms_distribution():
    """At 8 pixels each pair of edges is a cell of its own, so a pixel's shift would be seen."""
    n, side = 20_000, 8
    draws = drawn(batch_size=n, resolution=side, mode="elem", cutmix_alpha=1.0)
    np.random.seed(1)  # timm draws from it
    theirs = [
        timm_mixup.cutmix_bbox_and_lam((3, side, side), lam)
        for lam in np.random.default_rng(2).beta(1.0, 1.0, n)
    ]
    boxes, shares = (np.array(column) for column in zip(*theirs, strict=True))
    assert distance(draws.lam, shares) < 1
    for edges in ([0, 1], [2, 3], [0, 2]):
        ours = np.zeros((side + 1, side + 1))
        expected = ours.copy()
        np.add.at(ours, tuple(draws.boxes[:, edges].T), 1)
        np.add.at(expected, tuple(boxes[:, edges].T), 1)
        assert np.all(np.abs(ours - expected) <= 5 * np.sqrt(ours + expected))


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("kind", KINDS)
def test_prob_is_the_share_that_is_mixed(kind, mode):
    stated = {"mode": mode, "prob": 0.3, "resolution": 256, **KINDS[kind]}
    if mode == "elem":
        mixed = drawn(batch_size=5000, **stated).lam != 1
    else:
        mixed = np.array([drawn(step, **stated).lam[0] != 1 for step in range(STEPS)])
    assert_share(mixed, 0.3)


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_switch_prob_is_the_share_of_cutmix_among_the_mixed(mode):
    stated = {"mode": mode, "prob": 0.6, "switch_prob": 0.25, "resolution": 256, **KINDS["both"]}
    if mode == "elem":
        all_draws = [drawn(batch_size=5000, **stated)]
    else:
        all_draws = [drawn(step, **stated) for step in range(STEPS)]
    lam, cutmix = (np.concatenate([getattr(d, k) for d in all_draws]) for k in ("lam", "cutmix"))
    assert_share(cutmix[lam != 1], 0.25)


@pytest.mark.parametrize(
    ("stated", "cutmix"),
    [
        ({"mixup_alpha": 0.4, "switch_prob": 1.0}, False),
        ({"cutmix_alpha": 1.0, "switch_prob": 0.0}, True),
    ],
)
def test_switch_prob_matters_only_where_both_are_on(stated, cutmix):
    draws = drawn(batch_size=100, mode="elem", **stated)
    assert (draws.cutmix == cutmix).all()
    assert (draws.lam != 1).sum() > 80


def test_only_cutmix_has_boxes():
    draws = drawn(batch_size=1000, resolution=256, mode="elem", prob=0.5, **KINDS["both"])
    empty = (draws.boxes[:, 0] == draws.boxes[:, 1]) | (draws.boxes[:, 2] == draws.boxes[:, 3])
    assert np.array_equal(~empty, draws.cutmix & (draws.lam != 1))


@pytest.mark.parametrize("stated", [{"prob": 0.0, "mixup_alpha": 1.0}, {"switch_prob": 1.0}])
def test_nothing_is_drawn_where_nothing_is_mixed(stated):
    assert draw(settings(**stated), ALL) is None


def test_nothing_is_drawn_without_mix():
    recipe = parse_recipe({"epochs": 1, "batch_size": 8}, "test")
    assert draw(Timeline(recipe, num_samples=8).settings_at(0), ALL) is None


def test_an_alpha_on_a_schedule_is_the_steps():
    rising = {"keypoints": [[0, 0.0], ["50%", 0.0], ["100%", 1.0]]}
    stated = {"epochs": 1, "batch_size": 4, "mix": {"mixup_alpha": rising}}
    timeline = Timeline(parse_recipe(stated, "test"), num_samples=400)
    assert draw(timeline.settings_at(20), ALL) is None
    assert draw(timeline.settings_at(80), ALL) is not None


@pytest.mark.parametrize("world", [2, 3])
def test_a_ranks_draws_are_its_rows_of_the_global_ones(world):
    step = settings(3, mode="elem", **KINDS["both"])
    shares = [draw(step, rank_slice(8, rank, world)) for rank in range(world)]
    joined = [np.concatenate([getattr(s, k) for s in shares]) for k in ("lam", "boxes", "cutmix")]
    assert same(MixDraws(*joined), drawn(3, mode="elem", **KINDS["both"]))


def test_all_ranks_have_the_draw_of_the_batch():
    step = settings(3, mode="batch", **KINDS["both"])
    for rank in range(3):
        assert same(draw(step, rank_slice(8, rank, 3)), drawn(3, mode="batch", **KINDS["both"]))


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_draws_follow_from_seed_and_step_alone(mode):
    stated = {"mode": mode, "resolution": 224, **KINDS["both"]}
    np.random.seed(0)
    first = drawn(5, seed=1, **stated)
    np.random.seed(1)
    drawn(6, seed=1, **stated)
    assert same(first, drawn(5, seed=1, **stated))
    others = [drawn(6, seed=1, **stated), drawn(5, seed=2, **stated), drawn(6, seed=0, **stated)]
    assert not any(same(first, other) for other in others)
