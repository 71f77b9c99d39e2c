"""The timeline: everything that varies, as a pure function of the step."""

import json
import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from pitstop.core.errors import InputError
from pitstop.core.order import Order
from pitstop.core.recipe import Recipe, parse_recipe
from pitstop.core.timeline import (
    Amendment,
    Extend,
    Fit,
    FoundLr,
    LowerLr,
    MicroBatch,
    Rebase,
    SkipData,
    Timeline,
    dump_amendments,
    parse_amendments,
)

VALUES = ("epoch", "lr", "momentum", "mixup_alpha", "cutmix_alpha", "ema_decay")
RAMPS = [[32, 128], [96, 100], [64, 64], [1, 2], [100, 333]]
SCHEDULES = [
    "constant",
    "cosine",
    "linear",
    {"name": "cosine", "warmup": "10%"},
    {"name": "onecycle", "base_momentum": 0.85, "max_momentum": 0.95},
    {"name": "step", "milestones": ["30%", "0.8ep"]},
    {"name": "keypoints", "keypoints": [[0, 0.1], ["50%", 1.0], ["100%", 0.0]]},
]


def recipe(**stated) -> Recipe:
    return parse_recipe({"epochs": 4, "batch_size": 10, **stated}, "test")


def extend(step: int, epochs: float, lr: float = 0.01) -> Amendment:
    return Amendment(step=step, change=Extend(epochs=epochs, lr=lr))


def rebase(step: int, onto: Recipe) -> Amendment:
    return Amendment(step=step, change=Rebase(recipe=onto))


def found(lr: float) -> Amendment:
    return Amendment(step=0, change=FoundLr(lr=lr))


def fit(onto: Recipe) -> Amendment:
    return Amendment(step=0, change=Fit(minutes=5.0, recipe=onto))


def micro_batches(step: int, parts: int) -> Amendment:
    return Amendment(step=step, change=MicroBatch(grad_accum_steps=parts))


def skip(step: int, batches: int) -> Amendment:
    return Amendment(step=step, change=SkipData(batches=batches))


def lower(step: int, factor: float = 0.5) -> Amendment:
    return Amendment(step=step, change=LowerLr(factor=factor))


def amended(timeline: Timeline, *amendments: Amendment) -> Timeline:
    return Timeline(timeline.recipe, amendments, num_samples=timeline.num_samples)


def facts(timeline: Timeline, step: int) -> tuple:
    """All that a step does, whatever segment it is in."""
    settings_ = timeline.settings_at(step)
    segment = settings_.segment
    shape = (segment.resolution, segment.batch_size, segment.num_samples, segment.recipe.seed)
    return (*(getattr(settings_, name) for name in VALUES), *shape, timeline.position(step))


def assert_same_until(step: int, one: Timeline, other: Timeline) -> None:
    assert [facts(one, s) for s in range(step)] == [facts(other, s) for s in range(step)]
    assert {s for s in one.evaluations if s <= step} == {s for s in other.evaluations if s <= step}


def walks(timeline: Timeline) -> dict[int, tuple[np.ndarray, int]]:
    """The ids that each walk draws, one after the other, and the size of its subset."""
    order = Order(timeline)
    drawn: dict[int, list[np.ndarray]] = {}
    sizes: dict[int, int] = {}
    for step in range(timeline.last):
        segment = timeline.segment_at(step)
        drawn.setdefault(segment.walk, []).append(order.ids(step))
        assert sizes.setdefault(segment.walk, segment.num_samples) == segment.num_samples
    order.close()
    return {walk: (np.concatenate(ids), sizes[walk]) for walk, ids in drawn.items()}


def assert_each_pass_visits_each_image_once(timeline: Timeline) -> None:
    for ids, size in walks(timeline).values():
        for begin in range(0, len(ids), size):
            visited = ids[begin : begin + size]
            assert len(np.unique(visited)) == len(visited)
            assert visited.min() >= 0
            assert visited.max() < size


def evaluations_by_counting(timeline: Timeline) -> set[int]:
    """The steps after which the image that completes a pass has been drawn, and the end."""
    due, walk, drawn = {timeline.last}, None, 0
    for step in range(timeline.last):
        segment = timeline.segment_at(step)
        drawn = drawn if segment.walk == walk else 0
        walk = segment.walk
        for _ in range(segment.batch_size):
            drawn += 1
            if drawn % segment.num_samples == 0:
                due.add(step + 1)
    return due


@st.composite
def stated_recipes(draw, num_samples: int, equal: bool | None):
    """A recipe of 1 to 4 phases for that many images, of equal, other or any data fractions."""
    count = draw(st.integers(1 if equal is not False else 2, 4))
    some = st.sampled_from([1.0, 0.75, 0.5, 1 / 3])
    fractions = (
        [draw(some)] * count if equal else draw(st.lists(some, min_size=count, max_size=count))
    )
    assume(equal is not False or len(set(fractions)) > 1)
    phases = []
    for fraction in fractions:
        subset = math.floor(fraction * num_samples)
        assume(subset >= 1)
        phase = {
            "duration": f"{draw(st.sampled_from([0.5, 0.7, 1, 1.5, 2, 3]))}ep",
            "data_fraction": fraction,
            "batch_size": draw(st.integers(max(1, subset // 16), max(1, subset // 3))),
            "resolution": draw(st.integers(1, 300) | st.sampled_from(RAMPS)),
            "lr_scale": draw(st.sampled_from([1.0, 0.5])),
        }
        if draw(st.booleans()):
            phase["lr_schedule"] = draw(st.sampled_from(SCHEDULES))
        phases.append(phase)
    return {
        "seed": draw(st.integers(0, 5)),
        "lr": draw(st.sampled_from([0.1, 2.0])),
        "lr_schedule": draw(st.sampled_from(SCHEDULES)),
        "ema": draw(st.sampled_from([None, {"half_life": 30.0}])),
        "mix": {"mixup_alpha": {"keypoints": [[0, 0.2], ["100%", 0.8]]}},
        "phases": phases,
    }


def planned(stated: dict, num_samples: int, amendments=()) -> Timeline:
    """The timeline; a phase that happens to be shorter than a batch is not this example's point."""
    try:
        return Timeline(parse_recipe(stated, "test"), amendments, num_samples=num_samples)
    except InputError as refused:
        assume("less than one batch" not in str(refused))
        assume("warmup does not fit" not in str(refused))
        raise


@st.composite
def timelines(draw, equal: bool | None = None):
    num_samples = draw(st.integers(1, 500))
    return planned(draw(stated_recipes(num_samples, equal)), num_samples)


@st.composite
def timelines_and_steps(draw, equal: bool | None = None):
    timeline = draw(timelines(equal))
    firsts = [segment.first for segment in timeline.segments]
    near = st.sampled_from(firsts) | st.sampled_from(
        [segment.last - 1 for segment in timeline.segments]
    )
    return timeline, draw(near | st.integers(0, timeline.last - 1))


# Segments


@given(timelines())
def test_segments_tile_the_run(timeline):
    assert timeline.segments[0].first == 0
    assert timeline.segments[-1].last == timeline.last
    for before, after in pairwise(timeline.segments):
        assert before.last == after.first
    assert all(segment.first < segment.last for segment in timeline.segments)


@given(timelines())
def test_every_step_has_the_shapes_of_its_phase(timeline):
    for step in range(timeline.last):
        segment = timeline.settings_at(step).segment
        phase = timeline.recipe.phases[segment.phase_index]
        assert segment.first <= step < segment.last
        assert segment.batch_size == phase.batch_size
        assert segment.num_samples == math.floor(phase.data_fraction * timeline.num_samples + 1e-9)
        stated = phase.resolution
        low, high = (stated, stated) if isinstance(stated, int) else stated
        assert low <= segment.resolution <= high


@given(timelines())
def test_phases_come_in_their_order(timeline):
    indices = [segment.phase_index for segment in timeline.segments]
    assert indices == sorted(indices)
    assert set(indices) == set(range(len(timeline.recipe.phases)))


@given(timelines(equal=True))
def test_a_phase_ends_with_the_batch_that_reaches_its_last_image(timeline):
    epochs = samples = 0
    for index, phase in enumerate(timeline.recipe.phases):
        own = [segment for segment in timeline.segments if segment.phase_index == index]
        samples += sum(segment.steps * segment.batch_size for segment in own)
        epochs += phase.epochs()
        owed = round(epochs * own[0].num_samples)
        assert samples - phase.batch_size < owed <= samples


@given(timelines())
def test_a_run_ends_within_a_batch_of_its_epochs(timeline):
    end = timeline.segments[-1]
    beyond = (timeline.epochs - timeline.recipe.epochs) * end.num_samples
    assert -0.51 <= beyond < end.batch_size
    assert timeline.epoch(0) == 0
    assert timeline.epoch(timeline.last) == timeline.epochs


@given(st.integers(1, 400), st.integers(0, 400), st.integers(1, 30))
def test_a_ramp_is_a_few_distinct_sizes_from_low_to_high(low, more, batch_size):
    ramp = recipe(resolution=[low, low + more], batch_size=batch_size)
    sizes = [segment.resolution for segment in Timeline(ramp, num_samples=100).segments]
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= 4
    assert (sizes[0], sizes[-1]) == (low, low + more)


def test_a_ramp_spends_about_the_same_time_at_each_size():
    segments = Timeline(recipe(resolution=[96, 192]), num_samples=100).segments
    assert [segment.resolution for segment in segments] == [96, 128, 160, 192]
    assert [segment.steps for segment in segments] == [10, 10, 10, 10]


def test_segments_from_a_step_are_those_that_are_not_over():
    timeline = Timeline(recipe(resolution=[96, 192]), num_samples=100)
    assert [s.resolution for s in timeline.segments_from(10)] == [128, 160, 192]
    assert [s.resolution for s in timeline.segments_from(9)] == [96, 128, 160, 192]
    assert list(next(timeline.segments_from(8)).steps_from(8)) == [8, 9]
    assert list(timeline.segments_from(timeline.last)) == []


# Settings


@given(timelines(), st.randoms(use_true_random=False))
def test_settings_do_not_depend_on_what_was_asked_before(timeline, random):
    steps = list(range(timeline.last))
    in_order = [(timeline.settings_at(s), timeline.position(s)) for s in steps]
    random.shuffle(steps)
    fresh = Timeline(timeline.recipe, num_samples=timeline.num_samples)
    for step in steps:
        assert (fresh.settings_at(step), fresh.position(step)) == in_order[step]


@given(timelines())
def test_settings_are_finite_and_within_what_the_recipe_says(timeline):
    for step in range(timeline.last):
        settings_ = timeline.settings_at(step)
        assert settings_.step == step
        assert 0 <= settings_.lr <= settings_.segment.phase.peak_lr()
        assert 0.8 <= settings_.momentum <= 0.96
        assert 0.2 <= settings_.mixup_alpha <= 0.8
        assert settings_.cutmix_alpha == 0
        assert 0 <= settings_.ema_decay < 1


def test_strengths_of_augmentation_vary_over_their_phase_and_are_held_by_an_extension():
    rising = {"keypoints": [[0, 0.0], ["100%", 1.0]]}
    augmented = {
        "augment": {"name": "rand_augment", "magnitude": rising},
        "color_jitter": {"brightness": rising, "contrast": 0.3},
        "random_erasing": {"prob": rising},
    }
    stated = recipe(phases=[{"duration": "50%"}, augmented])
    extend = Amendment(step=40, change=Extend(epochs=1, lr=0.1))
    timeline = Timeline(stated, [extend], num_samples=100)
    for name in ("magnitude", "brightness", "erasing_prob"):
        values = [getattr(timeline.settings_at(s), name) for s in (0, 19, 20, 30, 39, 45)]
        assert values == pytest.approx([0, 0, 0, 0.5, 0.95, 0.95]), name
    assert [timeline.settings_at(s).contrast for s in (0, 20, 45)] == [0, 0.3, 0.3]
    assert timeline.settings_at(20).hue == timeline.settings_at(20).saturation == 0


AUGMENTED = {
    "augment": {"name": "rand_augment", "magnitude": 8},
    "color_jitter": {"brightness": 0.4, "contrast": 0.1, "hue": 0.2},
    "random_erasing": {"prob": 0.25},
}
STRENGTHS = ("magnitude", "brightness", "contrast", "saturation", "hue", "erasing_prob")


def strengths(timeline: Timeline, step: int) -> list[float]:
    return [getattr(timeline.settings_at(step), name) for name in STRENGTHS]


@given(st.floats(0, 20))
def test_augmentation_is_scaled_up_to_the_highest_that_there_is(scale):
    plain = strengths(Timeline(recipe(**AUGMENTED), num_samples=100), 0)
    scaled = strengths(Timeline(recipe(**AUGMENTED, augment_scale=scale), num_samples=100), 0)
    highest = (30, 1, 1, 1, 0.5, 1)
    expected = [min(value * scale, top) for value, top in zip(plain, highest, strict=True)]
    assert scaled == pytest.approx(expected)


def test_the_highest_magnitude_of_timms_scale_is_10():
    timms = {"name": "rand_augment", "magnitude": 8, "increasing": True}
    timeline = Timeline(recipe(augment=timms, augment_scale=2.0), num_samples=100)
    assert timeline.settings_at(0).magnitude == 10


def test_nothing_escalates_from_none():
    timeline = Timeline(recipe(augment_scale=3.0), num_samples=100)
    assert strengths(timeline, 0) == [0.0] * len(STRENGTHS)


def test_each_phase_scales_its_own_and_a_course_is_scaled_as_a_whole():
    rising = {"name": "rand_augment", "magnitude": {"keypoints": [[0, 2], ["100%", 10]]}}
    phases = [{"duration": "2ep"}, {"duration": "2ep", "augment_scale": 1.5}]
    timeline = Timeline(recipe(augment=rising, phases=phases), num_samples=100)
    plain = [timeline.settings_at(step).magnitude for step in range(20)]
    scaled = [timeline.settings_at(step).magnitude for step in range(20, 40)]
    assert scaled == pytest.approx([1.5 * value for value in plain])


def test_a_course_that_reaches_the_highest_stays_there():
    rising = {"name": "rand_augment", "magnitude": {"keypoints": [[0, 10], ["100%", 20]]}}
    plain = Timeline(recipe(augment=rising), num_samples=100)
    doubled = Timeline(recipe(augment=rising, augment_scale=2.0), num_samples=100)
    for step in range(plain.last):
        expected = min(30, 2 * plain.settings_at(step).magnitude)
        assert doubled.settings_at(step).magnitude == pytest.approx(expected)


def test_a_schedule_over_the_run_does_not_notice_the_phases():
    phases = [{"duration": "25%", "batch_size": 20}, {"duration": "rest", "resolution": 64}]
    timeline = Timeline(recipe(lr=0.5, phases=phases), num_samples=100)
    assert timeline.last == 5 + 30
    for step in range(timeline.last):
        cosine = 0.25 * (1 + math.cos(math.pi * step / 35))
        assert timeline.settings_at(step).lr == pytest.approx(cosine, abs=1e-12)


def test_a_schedule_of_a_phase_begins_and_ends_with_it():
    phases = [{"duration": "50%"}, {"lr_schedule": "linear", "lr": 2.0}]
    timeline = Timeline(recipe(phases=phases, lr_schedule="constant"), num_samples=100)
    assert [timeline.settings_at(s).lr for s in (0, 19)] == [0.1, 0.1]
    for step in range(20, 40):
        assert timeline.settings_at(step).lr == pytest.approx(2.0 * (40 - step) / 20)


def test_each_phase_has_its_own_peak():
    phases = [{"duration": "50%", "lr_scale": 0.5}, {"lr_per": 5, "lr_cap": 0.15}]
    timeline = Timeline(recipe(phases=phases, lr_schedule="constant"), num_samples=100)
    assert timeline.settings_at(19).lr == pytest.approx(0.05)
    assert timeline.settings_at(20).lr == pytest.approx(0.15)


@pytest.mark.parametrize("warmup", ["1.5ep", "37.5%"])
def test_a_warmup_ends_where_it_says(warmup):
    timeline = Timeline(
        recipe(lr_schedule={"name": "cosine", "warmup": warmup}, lr=1.0), num_samples=100
    )
    lrs = [timeline.settings_at(step).lr for step in range(timeline.last)]
    assert np.argmax(lrs) == 15
    assert lrs[:16] == pytest.approx([step / 15 for step in range(16)])


def test_a_length_is_measured_over_phases_of_other_batch_sizes_and_subsets():
    phases = [
        {"duration": "1ep", "batch_size": 50, "data_fraction": 0.5},
        {"duration": "1ep", "batch_size": 20},
        {"duration": "2ep"},
    ]
    schedule = {"name": "step", "milestones": ["1ep", "1.4ep", "3ep"]}
    timeline = Timeline(recipe(phases=phases, lr=1.0, lr_schedule=schedule), num_samples=100)
    assert [segment.first for segment in timeline.segments] == [0, 1, 6]
    lrs = [timeline.settings_at(step).lr for step in range(timeline.last)]
    assert lrs == pytest.approx([1.0] + [0.1] * 2 + [0.01] * 13 + [0.001] * 10)


def test_onecycle_moves_the_momentum_and_other_phases_keep_the_optimizers():
    onecycle = {"name": "onecycle", "base_momentum": 0.7, "max_momentum": 0.95}
    phases = [{"duration": "50%"}, {"lr_schedule": onecycle}]
    optimizer = {"name": "sgd", "momentum": 0.8}
    timeline = Timeline(recipe(phases=phases, optimizer=optimizer), num_samples=100)
    momentum = [timeline.settings_at(step).momentum for step in range(40)]
    assert momentum[:20] == [0.8] * 20
    assert (momentum[20], momentum[25], momentum[39]) == pytest.approx((0.95, 0.7, 0.95))


def test_momentum_may_follow_keypoints_over_the_run():
    optimizer = {"name": "sgd", "momentum": {"keypoints": [["0%", 0.5], ["100%", 0.9]]}}
    phases = [{"duration": "50%"}, {}]
    timeline = Timeline(recipe(phases=phases, optimizer=optimizer), num_samples=100)
    momentum = [timeline.settings_at(step).momentum for step in range(40)]
    assert momentum == pytest.approx(np.linspace(0.5, 0.9, 41)[:40])


def test_mixing_may_follow_keypoints_over_the_phase():
    rising = {"cutmix_alpha": {"keypoints": [[0, 0.0], ["100%", 1.0]]}, "mixup_alpha": 0.3}
    timeline = Timeline(recipe(phases=[{"duration": "50%"}, {"mix": rising}]), num_samples=100)
    settings_ = [timeline.settings_at(step) for step in range(40)]
    assert [s.cutmix_alpha for s in settings_] == pytest.approx([0.0] * 20 + [*np.arange(20) / 20])
    assert [s.mixup_alpha for s in settings_] == [0.0] * 20 + [0.3] * 20


def test_a_weight_has_lost_half_its_share_of_the_average_after_the_half_life():
    timeline = Timeline(recipe(epochs=100, ema={"half_life": 50}), num_samples=100)
    decays = [timeline.settings_at(step).ema_decay for step in range(1000)]
    assert math.prod(decays[900:950]) == pytest.approx(0.5)
    assert decays[:3] == pytest.approx([1 / 10, 2 / 11, 3 / 12])
    assert decays == sorted(decays)


# Positions


@given(timelines())
def test_every_pass_visits_each_image_of_the_subset_once(timeline):
    assert_each_pass_visits_each_image_once(timeline)


@given(timelines(equal=True))
def test_phases_of_equal_fraction_share_one_walk(timeline):
    assert {segment.walk for segment in timeline.segments} == {0}
    drawn = 0
    for step in range(timeline.last):
        at = timeline.position(step)
        assert (at.pass_, at.index) == divmod(drawn, timeline.segments[0].num_samples)
        drawn += timeline.segment_at(step).batch_size


@given(timelines(equal=False))
def test_a_change_of_fraction_starts_a_walk_that_was_not_there_before(timeline):
    for before, after in pairwise(timeline.segments):
        if before.num_samples == after.num_samples:
            assert after.walk == before.walk
        else:
            at = timeline.position(after.first)
            assert (at.walk, at.pass_, at.index) == (before.walk + 1, 0, 0)


@given(timelines())
def test_a_fraction_is_the_first_rows_only(timeline):
    for ids, size in walks(timeline).values():
        assert ids.max() < size <= timeline.num_samples


@given(timelines(equal=True))
def test_epochs_are_the_images_seen_over_the_images_there_are(timeline):
    drawn = 0
    for step in range(timeline.last):
        epoch = drawn / timeline.segments[0].num_samples
        assert timeline.settings_at(step).epoch == pytest.approx(epoch)
        assert timeline.epoch(step) == pytest.approx(epoch)
        drawn += timeline.segment_at(step).batch_size


@given(timelines(equal=False))
def test_a_new_walk_begins_at_the_planned_epoch_of_its_phase(timeline):
    begun = 0.0
    for index, phase in enumerate(timeline.recipe.phases):
        first = next(s for s in timeline.segments if s.phase_index == index)
        if first.walk_first == 0:
            assert timeline.settings_at(first.first).epoch == pytest.approx(begun)
        begun += phase.epochs()


# Evaluations


@given(timelines())
def test_evaluations_are_after_the_batches_that_complete_an_epoch_and_at_the_end(timeline):
    assert timeline.evaluations == evaluations_by_counting(timeline)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(40, 200))
def test_evaluations_may_be_every_few_epochs(every, batch_size, num_samples):
    stated = recipe(epochs=7, eval={"every": every}, batch_size=batch_size)
    timeline = Timeline(stated, num_samples=num_samples)
    due = {math.ceil(epoch * num_samples / batch_size) for epoch in range(every, 8, every)}
    assert timeline.evaluations == due | {timeline.last}


# Refusals


@pytest.mark.parametrize(
    ("stated", "num_samples", "said"),
    [
        ({"batch_size": 101}, 100, "phases.0.batch_size 101 .* set it to 100 or less"),
        (
            {"phases": [{"duration": "50%"}, {"data_fraction": 0.05}]},
            100,
            "phases.1.batch_size 10 .* set it to 5 or less",
        ),
        (
            {"phases": [{"duration": "99%"}, {"duration": "1%", "name": "tail"}]},
            20,
            r"phases\.1 \(tail\).*less than one batch.*raise epochs or lower batch_size",
        ),
        ({"epochs": 0.001}, 100, r"phases\.0 .*less than one batch"),
        ({"phases": [{"duration": 0}, {}]}, 100, r"phases\.0 .*less than one batch"),
        ({"epochs": 1, "resolution": [64, 128], "batch_size": 50}, 100, "less than one batch"),
        ({"lr_schedule": {"name": "cosine", "warmup": "5ep"}}, 100, "lr_schedule.*shorten warmup"),
        (
            {"phases": [{"lr_schedule": {"name": "linear", "warmup": "150%"}}]},
            100,
            "lr_schedule.*shorten warmup",
        ),
        (
            {"lr_schedule": {"name": "step", "warmup": "50%", "milestones": ["1ep"]}},
            100,
            "lr_schedule.*warmup",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_the_data_is_refused_with_key_and_fix(stated, num_samples, said):
    with pytest.raises(InputError, match=said) as caught:
        Timeline(recipe(**stated), num_samples=num_samples)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("stated", "num_samples"), [({"data_fraction": 0.01}, 50), ({}, 0)])
def test_a_phase_without_images_is_not_told_to_make_its_batch_smaller(stated, num_samples):
    with pytest.raises(InputError) as caught:
        Timeline(recipe(batch_size=1, **stated), num_samples=num_samples)
    assert "set it to 1 or less" not in str(caught.value)


# Extending


@given(timelines(), st.sampled_from([0.25, 0.5, 1, 2, 3.5]), st.floats(1e-4, 1.0))
def test_an_extension_leaves_the_plan_alone_and_falls_straight_from_its_lr(timeline, epochs, lr):
    old = timeline.last
    amendments = [extend(old, epochs, lr)]
    longer = Timeline(timeline.recipe, amendments, num_samples=timeline.num_samples)
    end = timeline.segments[-1]
    steps = math.ceil(Fraction(epochs) * end.num_samples / end.batch_size)
    assert longer.last == old + steps
    assert_same_until(old, timeline, longer)
    assert longer.segments[: len(timeline.segments)] == timeline.segments
    for step in range(old, longer.last):
        settings_ = longer.settings_at(step)
        assert settings_.lr == pytest.approx(lr * (longer.last - step) / steps)
        assert settings_.segment.batch_size == end.batch_size
        assert settings_.segment.resolution == end.resolution
        assert settings_.momentum == timeline.settings_at(old - 1).momentum
        assert settings_.mixup_alpha == timeline.settings_at(old - 1).mixup_alpha


@given(timelines(), st.sampled_from([0.5, 1, 2]))
def test_an_extension_goes_on_in_the_walk_and_evaluates_at_both_ends(timeline, epochs):
    amendments = [extend(timeline.last, epochs)]
    longer = Timeline(timeline.recipe, amendments, num_samples=timeline.num_samples)
    assert_each_pass_visits_each_image_once(longer)
    assert longer.evaluations == evaluations_by_counting(longer) | {timeline.last}


def test_an_extension_may_be_decided_before_the_end():
    early = Timeline(recipe(), [extend(3, 2.0)], num_samples=100)
    late = Timeline(recipe(), [extend(40, 2.0)], num_samples=100)
    assert_same_until(early.last, early, late)
    assert early.last == late.last == 60


def test_extensions_follow_one_another():
    timeline = Timeline(recipe(), [extend(40, 1, 0.05), extend(50, 2, 0.02)], num_samples=100)
    assert timeline.last == 70
    lrs = [timeline.settings_at(step).lr for step in (40, 49, 50, 69)]
    assert lrs == pytest.approx([0.05, 0.005, 0.02, 0.001])
    assert {40, 50, 60, 70} <= timeline.evaluations
    assert [segment.phase_index for segment in timeline.segments] == [0, 1, 2]


@pytest.mark.parametrize(("epochs", "steps"), [(1.1, 11), (0.7, 7), (2.2, 22), (1.11, 12)])
def test_an_extension_has_no_step_more_than_its_epochs_take(epochs, steps):
    longer = Timeline(recipe(batch_size=1), [extend(40, epochs)], num_samples=10)
    assert longer.last == 40 + steps


# Rebasing


def rebased_onto_itself(timeline: Timeline, step: int) -> Timeline:
    amendments = [rebase(step, timeline.recipe)]
    return Timeline(timeline.recipe, amendments, num_samples=timeline.num_samples)


@given(timelines_and_steps(equal=True))
def test_a_rebase_onto_the_same_recipe_changes_nothing(planned_and_step):
    timeline, step = planned_and_step
    same = rebased_onto_itself(timeline, step)
    assert same.last == timeline.last
    assert_same_until(timeline.last, timeline, same)


@given(timelines_and_steps(equal=False))
def test_a_rebase_onto_the_same_recipe_changes_nothing_across_fractions(planned_and_step):
    timeline, step = planned_and_step
    same = rebased_onto_itself(timeline, step)
    assert same.last == timeline.last
    assert_same_until(timeline.last, timeline, same)


@st.composite
def rebases(draw, equal: bool | None = True):
    """A timeline, a step within it, and what else the recipe may become there."""
    num_samples = draw(st.integers(20, 500))
    stated = draw(stated_recipes(num_samples, equal))
    timeline = planned(stated, num_samples)
    step = draw(st.integers(1, timeline.last))
    change = draw(st.sampled_from(["lr", "batch_size", "data_fraction", "epochs"]))
    phases = [dict(phase) for phase in stated["phases"]]
    new = {**stated, "phases": phases}
    if change == "lr":
        new["lr"] = 0.07
        step = min(step, timeline.last - 1)
    elif change == "epochs":
        phases[-1]["duration"] = "7ep"
    else:
        fraction = draw(st.sampled_from([1.0, 0.5]))
        for phase in phases:
            if change == "data_fraction":
                phase["data_fraction"] = fraction
                phase["batch_size"] = min(phase["batch_size"], math.floor(fraction * num_samples))
            else:
                size = math.floor(phase["data_fraction"] * num_samples)
                phase["batch_size"] = draw(st.integers(max(1, size // 16), max(1, size // 2)))
        phases[-1]["duration"] = "5ep"
    return timeline, step, planned(new, num_samples)


def rebased(timeline: Timeline, step: int, new: Timeline) -> Timeline:
    amendments = [rebase(step, new.recipe)]
    return Timeline(timeline.recipe, amendments, num_samples=timeline.num_samples)


@given(rebases(equal=None))
def test_a_rebase_leaves_the_past_alone_and_follows_the_new_recipe(example):
    timeline, step, new = example
    amended = rebased(timeline, step, new)
    assert_same_until(step, timeline, amended)
    assert amended.recipe == new.recipe
    for s in range(step, amended.last):
        assert amended.settings_at(s).segment.recipe == new.recipe
    for before, after in pairwise(amended.segments):
        assert before.last == after.first


@given(rebases())
def test_a_rebase_keeps_each_image_once_an_epoch(example):
    amended = rebased(*example)
    assert_each_pass_visits_each_image_once(amended)


@given(rebases())
def test_a_rebase_goes_on_in_the_walk_when_the_subset_is_the_same(example):
    timeline, step, new = example
    amended = rebased(timeline, step, new)
    before, after = amended.segment_at(step - 1), amended.segment_at(step)
    at = amended.position(step)
    if before.num_samples == after.num_samples:
        assert after.walk == before.walk
        assert at.pass_ * before.num_samples + at.index == before.walk_position(step)
    else:
        assert (at.walk, at.pass_, at.index) == (before.walk + 1, 0, 0)


@given(rebases())
def test_a_rebased_run_ends_within_a_batch_of_the_new_plan(example):
    timeline, step, new = example
    amended = rebased(timeline, step, new)
    batch = max(segment.batch_size / segment.num_samples for segment in new.segments)
    assert abs(amended.epochs - new.epochs) <= batch + 1e-9


@given(rebases())
def test_a_rebased_run_evaluates_at_the_epochs_it_then_completes(example):
    timeline, step, new = example
    amended = rebased(timeline, step, new)
    old_end = {timeline.last} if step >= timeline.last else set()
    assert amended.evaluations == evaluations_by_counting(amended) | old_end


@given(rebases())
def test_a_rebased_run_follows_the_new_schedule_from_its_epoch_on(example):
    """Its learning rate is that of the new plan at the same epoch, give or take two steps."""
    timeline, step, new = example
    amended = rebased(timeline, step, new)
    for s in range(step, amended.last):
        epoch = amended.settings_at(s).epoch
        there = min(range(new.last), key=lambda k: abs(new.settings_at(k).epoch - epoch))
        around = [new.segment_at(k).curves.lr(k) for k in range(there - 2, there + 3)]
        assert min(around) * (1 - 1e-9) <= amended.settings_at(s).lr <= max(around) * (1 + 1e-9)


def test_a_rebase_at_the_start_is_the_new_recipe():
    new = recipe(lr=3.0, epochs=2)
    amended = Timeline(recipe(), [rebase(0, new)], num_samples=100)
    fresh = Timeline(new, num_samples=100)
    assert amended.last == fresh.last
    assert_same_until(fresh.last, amended, fresh)


def test_a_rebase_onto_another_batch_size_meets_the_new_plan_where_the_epoch_is():
    new = recipe(batch_size=20, lr_schedule="linear", lr=1.0)
    amended = Timeline(recipe(), [rebase(16, new)], num_samples=100)
    assert amended.last == 16 + 12
    assert amended.position(16).index == 60
    assert amended.settings_at(16).lr == pytest.approx(1 - 8 / 20)
    assert amended.evaluations == {10, 18, 23, 28}


def test_a_rebase_onto_another_seed_shows_no_image_twice_in_an_epoch():
    amended = Timeline(recipe(), [rebase(15, recipe(seed=1))], num_samples=100)
    assert_each_pass_visits_each_image_once(amended)


def test_a_rebase_onto_a_recipe_that_is_over_is_refused_with_the_key():
    with pytest.raises(InputError, match=r"epochs.*at epoch 3\.00.*ends at 2\.00") as caught:
        Timeline(recipe(), [rebase(30, recipe(epochs=2))], num_samples=100)
    assert "\n" not in str(caught.value)


def test_a_rebase_onto_a_recipe_that_does_not_fit_the_data_is_refused():
    with pytest.raises(InputError, match="batch_size 200"):
        Timeline(recipe(), [rebase(30, recipe(batch_size=200))], num_samples=100)


# A found learning rate

AUTO = {"lr": "auto", "lr_finder": {"fallback": 0.3}}


def test_a_plan_takes_the_fallback_and_says_so():
    plan = Timeline.planned(recipe(**AUTO), 100)
    assert plan.lr_is_fallback
    assert plan.segments == Timeline(plan.recipe, num_samples=100).segments
    assert plan.settings_at(0).lr == 0.3


@given(timelines())
def test_a_plan_of_stated_rates_is_the_run(timeline):
    plan = Timeline.planned(timeline.recipe, timeline.num_samples)
    assert not plan.lr_is_fallback
    assert plan.segments == timeline.segments
    assert plan.evaluations == timeline.evaluations


def test_a_run_without_its_found_rate_is_refused():
    with pytest.raises(InputError, match=r"lr: auto was not searched for.*give a number"):
        Timeline(recipe(**AUTO), num_samples=100)


@given(timelines(), st.floats(1e-4, 10))
def test_a_found_rate_is_as_a_stated_one(timeline, lr):
    def stated(value):
        phases = [p.model_copy(update={"lr": value}) for p in timeline.recipe.phases]
        own = {"lr": value, "phases": tuple(phases)}
        return timeline.recipe.model_copy(update=own)

    run = Timeline(stated("auto"), [found(lr)], num_samples=timeline.num_samples)
    assert run.segments == Timeline(stated(lr), num_samples=timeline.num_samples).segments
    assert not run.lr_is_fallback


def test_scale_and_cap_of_phases_hold_for_a_found_rate():
    phases = [{"duration": "1ep", "lr_cap": 0.5}, {"duration": "1ep", "lr_scale": 0.1}]
    stated = recipe(**AUTO, lr_schedule="constant", epochs=2, phases=phases)
    run = Timeline(stated, [found(2.0)], num_samples=100)
    assert [run.settings_at(step).lr for step in (0, 10)] == pytest.approx([0.5, 0.2])


def test_a_found_rate_is_that_of_a_rebase_too():
    onto = rebase(10, recipe(**AUTO, lr_schedule="constant"))
    run = Timeline(recipe(**AUTO), [found(0.7), onto], num_samples=100)
    assert run.settings_at(20).lr == 0.7
    with pytest.raises(InputError, match="not searched for in this run"):
        Timeline(recipe(), [onto], num_samples=100)


def test_an_extension_has_its_own_rate_and_not_the_found_one():
    run = Timeline(recipe(**AUTO), [found(0.7), extend(40, 1, 0.05)], num_samples=100)
    assert run.settings_at(40).lr == 0.05


# Micro-batches


@given(timelines_and_steps(), st.integers(1, 8))
def test_more_micro_batches_change_nothing_but_their_number(planned_and_step, parts):
    timeline, step = planned_and_step
    amendments = [micro_batches(step, parts)]
    smaller = Timeline(timeline.recipe, amendments, num_samples=timeline.num_samples)
    assert_same_until(timeline.last, timeline, smaller)
    assert smaller.evaluations == timeline.evaluations
    for before, after in pairwise(smaller.segments):
        assert before.last == after.first
    here = timeline.segment_at(step)
    for at in range(timeline.last):
        expected = timeline.segment_at(at).phase.grad_accum_steps
        changed = step <= at < here.last
        assert smaller.segment_at(at).phase.grad_accum_steps == (parts if changed else expected)


@given(timelines_and_steps())
def test_an_epochs_end_is_found_on_either_side_of_a_split(planned_and_step):
    timeline, step = planned_and_step
    amendments = [micro_batches(step, 2)]
    split = Timeline(timeline.recipe, amendments, num_samples=timeline.num_samples)
    assert split.epoch_ends(1) == timeline.epoch_ends(1)
    assert [split.epoch(s) for s in range(split.last + 1)] == [
        timeline.epoch(s) for s in range(timeline.last + 1)
    ]


def test_micro_batches_get_smaller_and_smaller():
    amendments = [micro_batches(0, 2), micro_batches(0, 4), micro_batches(15, 8)]
    timeline = Timeline(recipe(), amendments, num_samples=100)
    steps = [timeline.segment_at(step).phase.grad_accum_steps for step in (0, 14, 15, 39)]
    assert steps == [4, 4, 8, 8]
    assert [(s.first, s.last) for s in timeline.segments] == [(0, 15), (15, 40)]


def test_the_next_segment_begins_with_the_recipes_micro_batches_again():
    phases = [{"duration": "2ep"}, {"duration": "2ep", "resolution": 32}]
    timeline = Timeline(recipe(phases=phases), [micro_batches(5, 4)], num_samples=100)
    assert timeline.segment_at(19).phase.grad_accum_steps == 4
    assert timeline.segment_at(20).phase.grad_accum_steps == 1


def test_micro_batches_go_with_an_extension_and_end_at_a_rebase():
    longer = Timeline(recipe(), [micro_batches(5, 4), extend(40, 1)], num_samples=100)
    assert longer.segment_at(45).phase.grad_accum_steps == 4
    onto = rebase(20, recipe(lr=0.2))
    changed = Timeline(recipe(), [micro_batches(5, 4), onto], num_samples=100)
    steps = [changed.segment_at(step).phase.grad_accum_steps for step in (4, 5, 19, 20)]
    assert steps == [1, 4, 4, 1]


# Skipped data


def drawn(timeline: Timeline, steps: range) -> dict[int, list[int]]:
    """By walk: the places in it, counted over all its passes, of the images of these steps."""
    places: dict[int, list[int]] = {}
    for step in steps:
        segment, at = timeline.segment_at(step), timeline.position(step)
        begin = at.pass_ * segment.num_samples + at.index
        places.setdefault(at.walk, []).extend(range(begin, begin + segment.batch_size))
    return places


def but_for(timeline: Timeline, step: int, *left_out: str) -> dict:
    """A step's settings without those named, nor what tells its segment from the one it was."""
    settings_ = timeline.settings_at(step)
    names = set(vars(settings_)) - {"segment", *left_out}
    segment = settings_.segment
    shape = (segment.phase, segment.resolution, segment.num_samples, segment.walk, segment.recipe)
    return {name: getattr(settings_, name) for name in names} | {"shape": shape}


def assert_same_course(one: Timeline, other: Timeline) -> None:
    """Both have the same steps, epochs, phases and evaluations."""
    assert one.last == other.last
    assert one.evaluations == other.evaluations
    assert [one.epoch_ends(every) for every in (1, 2)] == [other.epoch_ends(e) for e in (1, 2)]
    assert [one.epoch(s) for s in range(one.last + 1)] == [
        other.epoch(s) for s in range(other.last + 1)
    ]
    for before, after in pairwise(one.segments):
        assert before.last == after.first


batches = st.integers(1, 40)
factors = st.sampled_from([0.1, 0.5, 0.9])


@given(timelines_and_steps(), batches)
def test_skipping_changes_where_images_come_from_and_nothing_else(planned_and_step, count):
    timeline, step = planned_and_step
    skipping = amended(timeline, skip(step, count))
    assert_same_until(step, timeline, skipping)
    assert_same_course(timeline, skipping)
    for s in range(timeline.last):
        assert but_for(skipping, s) == but_for(timeline, s)


@given(timelines_and_steps(), batches)
def test_what_is_skipped_is_left_out_and_what_comes_after_it_follows(planned_and_step, count):
    timeline, step = planned_and_step
    skipping = amended(timeline, skip(step, count))
    window = drawn(timeline, range(step, min(step + count, timeline.last)))
    before = drawn(timeline, range(step))
    for walk, places in drawn(skipping, range(step, timeline.last)).items():
        first = len(before.get(walk, [])) + len(window.get(walk, []))
        assert places == list(range(first, first + len(places)))


@given(st.data())
def test_the_images_are_those_of_so_many_batches_later(data):
    num_samples = data.draw(st.integers(5, 200))
    batch_size = data.draw(st.integers(num_samples // 10 + 1, num_samples))
    timeline = Timeline(recipe(batch_size=batch_size), num_samples=num_samples)
    step = data.draw(st.integers(0, timeline.last - 2))
    count = data.draw(st.integers(1, timeline.last - step - 1))
    skipping = amended(timeline, skip(step, count))
    for s in range(step, timeline.last - count):
        assert skipping.position(s) == timeline.position(s + count)
    drawing, shown = Order(timeline), Order(skipping)
    for s in range(step):
        np.testing.assert_array_equal(shown.ids(s), drawing.ids(s))
    for s in range(step, timeline.last - count):
        np.testing.assert_array_equal(shown.ids(s), drawing.ids(s + count))
        np.testing.assert_array_equal(shown.passes(s), drawing.passes(s + count))
    drawing.close()
    shown.close()


def test_skipping_past_the_end_of_a_pass_leaves_its_evaluation_where_it_is():
    timeline = Timeline(recipe(), [skip(5, 8)], num_samples=100)
    assert [(at.pass_, at.index) for at in map(timeline.position, (4, 5, 12))] == [
        (0, 40),
        (1, 30),
        (2, 0),
    ]
    assert timeline.evaluations == {10, 20, 30, 40}
    assert timeline.settings_at(5).epoch == 0.5


@given(timelines(), st.data())
def test_skips_add_up(timeline, data):
    segment = data.draw(st.sampled_from(timeline.segments))
    assume(segment.steps >= 2)
    step = data.draw(st.integers(segment.first, segment.last - 2))
    both = data.draw(st.integers(2, segment.last - step))
    one = data.draw(st.integers(1, both - 1))
    other = both - one
    twice = amended(timeline, skip(step, one), skip(step, other))
    assert twice.segments == amended(timeline, skip(step, both)).segments


def test_a_skip_from_one_walk_into_the_next_leaves_images_out_of_both():
    phases = [{"duration": "1ep", "data_fraction": 0.5}, {"duration": "2ep"}]
    timeline = Timeline(recipe(epochs=3, phases=phases), [skip(3, 6)], num_samples=100)
    assert [s.first for s in timeline.segments] == [0, 3, 5]
    assert [(at.walk, at.index) for at in map(timeline.position, (2, 3, 4, 5))] == [
        (0, 20),
        (0, 0),
        (0, 10),
        (1, 40),
    ]
    assert timeline.position(3).pass_ == 1


def test_a_skip_does_not_reach_a_walk_that_begins_after_it():
    phases = [{"duration": "1ep", "data_fraction": 0.5}, {"duration": "2ep"}]
    timeline = Timeline(recipe(epochs=3, phases=phases), [skip(3, 2)], num_samples=100)
    assert timeline.position(5).index == 0


@given(timelines_and_steps(), batches, st.sampled_from([0.5, 2]))
def test_an_extension_goes_on_behind_what_was_skipped(planned_and_step, count, epochs):
    timeline, step = planned_and_step
    longer = amended(timeline, skip(step, count), extend(timeline.last, epochs))
    assert_same_course(longer, amended(timeline, extend(timeline.last, epochs)))
    end = longer.segment_at(timeline.last)
    places = drawn(longer, range(step, longer.last))[end.walk]
    assert places == list(range(places[0], places[0] + len(places)))


@given(timelines_and_steps(equal=True), batches, st.data())
def test_a_rebase_onto_the_same_recipe_forgets_nothing_of_a_skip(planned_and_step, count, data):
    timeline, step = planned_and_step
    skipping = amended(timeline, skip(step, count))
    later = data.draw(st.integers(step, timeline.last - 1))
    onto = amended(timeline, skip(step, count), rebase(later, timeline.recipe))
    assert_same_course(skipping, onto)
    assert_same_until(timeline.last, skipping, onto)


def test_a_rebase_onto_another_seed_begins_a_walk_of_which_nothing_is_skipped():
    timeline = Timeline(recipe(), [skip(5, 3), rebase(15, recipe(seed=1))], num_samples=100)
    assert timeline.position(14).index == (14 + 3) * 10 % 100
    assert timeline.position(15).walk > timeline.position(14).walk
    assert (timeline.position(15).pass_, timeline.position(15).index) == (0, 0)


# A lowered learning rate


@given(timelines_and_steps(), factors)
def test_lowering_the_rate_multiplies_it_to_the_end_and_changes_nothing_else(
    planned_and_step, factor
):
    timeline, step = planned_and_step
    lowered = amended(timeline, lower(step, factor))
    assert_same_until(step, timeline, lowered)
    assert_same_course(timeline, lowered)
    for s in range(timeline.last):
        assert but_for(lowered, s, "lr") == but_for(timeline, s, "lr")
        assert lowered.position(s) == timeline.position(s)
        expected = timeline.settings_at(s).lr * (factor if s >= step else 1)
        assert lowered.settings_at(s).lr == pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(timelines_and_steps(), factors, factors)
def test_factors_multiply(planned_and_step, one, other):
    timeline, step = planned_and_step
    twice = amended(timeline, lower(step, one), lower(step, other))
    once = amended(timeline, lower(step, one * other))
    assert [(s.first, s.last) for s in twice.segments] == [(s.first, s.last) for s in once.segments]
    for s in range(timeline.last):
        assert twice.settings_at(s).lr == pytest.approx(once.settings_at(s).lr, abs=1e-15)


def test_what_is_decided_after_the_rate_was_lowered_states_its_own():
    flat = recipe(lr_schedule="constant", lr=1.0)
    early = Timeline(flat, [extend(3, 1, 0.4), lower(20)], num_samples=100)
    assert [early.settings_at(s).lr for s in (19, 20, 39, 40)] == [1.0, 0.5, 0.5, 0.2]
    late = Timeline(flat, [lower(20), extend(40, 1, 0.4)], num_samples=100)
    assert [late.settings_at(s).lr for s in (19, 20, 39, 40)] == [1.0, 0.5, 0.5, 0.4]
    onto = recipe(lr_schedule="constant", lr=0.7)
    rebased_ = Timeline(flat, [lower(20), rebase(30, onto)], num_samples=100)
    assert [rebased_.settings_at(s).lr for s in (20, 29, 30)] == [0.5, 0.5, 0.7]


def test_a_found_rate_is_lowered_too():
    flat = recipe(**AUTO, lr_schedule="constant")
    run = Timeline(flat, [found(0.8), lower(0, 0.25)], num_samples=100)
    assert run.settings_at(0).lr == 0.2


# Several amendments


@given(timelines_and_steps(), st.data())
def test_retries_leave_alone_what_came_before_each_and_no_phase_begins_anew(planned_and_step, data):
    timeline, step = planned_and_step
    begins = [timeline.begins_phase(s) for s in range(timeline.last)]
    retries: list[Amendment] = []
    before = timeline
    for _ in range(data.draw(st.integers(2, 4))):
        kinds = [skip(step, 3), lower(step), micro_batches(step, 2)]
        retries.append(data.draw(st.sampled_from(kinds)))
        after = amended(timeline, *retries)
        assert_same_until(step, before, after)
        assert_same_course(before, after)
        assert [after.begins_phase(s) for s in range(after.last)] == begins
        before, step = after, data.draw(st.integers(step, timeline.last - 1))


def test_a_segment_is_cut_once_where_it_is_amended_and_not_at_all_at_its_start():
    phases = [{"duration": "2ep"}, {"duration": "2ep", "resolution": 32}]
    cut = Timeline(recipe(phases=phases), [skip(5, 2), lower(5), skip(5, 1)], num_samples=100)
    assert [(s.first, s.last) for s in cut.segments] == [(0, 5), (5, 20), (20, 40)]
    whole = Timeline(recipe(phases=phases), [skip(0, 2), lower(20)], num_samples=100)
    assert [(s.first, s.last) for s in whole.segments] == [(0, 20), (20, 40)]


@given(st.data())
def test_each_of_several_amendments_leaves_alone_what_came_before_it(data):
    num_samples = data.draw(st.integers(30, 300))
    stated = data.draw(stated_recipes(num_samples, equal=None))
    timeline = planned(stated, num_samples)
    start, amendments, step = timeline.recipe, [], 0
    for _ in range(data.draw(st.integers(1, 3))):
        step = data.draw(st.integers(step, timeline.last))
        if data.draw(st.booleans()):
            amendment, alone = extend(step, 1.5), timeline.last
        else:
            longer = math.ceil(timeline.epochs) + 1
            batch_size = data.draw(st.integers(num_samples // 16 + 1, num_samples // 3))
            onto = {"epochs": longer, "batch_size": batch_size, "seed": stated["seed"]}
            amendment, alone = rebase(step, parse_recipe(onto, "test")), step
        amendments.append(amendment)
        amended = Timeline(start, amendments, num_samples=num_samples)
        assert_same_until(alone, timeline, amended)
        assert amended.last >= alone
        for before, after in pairwise(amended.segments):
            assert before.last == after.first
        timeline = amended
    assert_each_pass_visits_each_image_once(timeline)
    ends = {t for t in timeline.evaluations if t <= timeline.last}
    assert timeline.evaluations == ends >= evaluations_by_counting(timeline)


@given(st.data())
def test_a_fitted_recipe_is_planned_as_if_it_had_been_stated(data):
    num_samples = data.draw(st.integers(30, 300))
    stated, onto = (data.draw(stated_recipes(num_samples, None)) for _ in range(2))
    alone = planned(onto, num_samples)
    later = [micro_batches(0, 1), lower(alone.last // 2), extend(alone.last, 1.5)]
    for amendments in ([], later):
        fitted = planned(stated, num_samples, [fit(parse_recipe(onto, "test")), *amendments])
        wanted = planned(onto, num_samples, amendments)
        assert fitted.segments == wanted.segments
        assert fitted.evaluations == wanted.evaluations


def test_a_fitted_recipe_has_the_lr_that_is_found_after_it():
    auto = {"lr": "auto", "lr_finder": {"fallback": 0.5}}
    amendments = [fit(recipe(**auto, epochs=7)), found(0.2)]
    fitted = Timeline(recipe(**auto), amendments, num_samples=100)
    assert fitted.segments[0].phase.lr == 0.2
    assert fitted.epochs == 7


@given(st.data())
def test_amendments_are_read_back_unchanged_from_json(data):
    change = st.one_of(
        st.builds(Extend, epochs=st.floats(0.1, 9), lr=st.floats(0.001, 9)),
        stated_recipes(100, None).map(lambda s: Rebase(recipe=parse_recipe(s, "test"))),
        st.builds(FoundLr, lr=st.floats(1e-6, 9)),
        st.builds(
            Fit,
            minutes=st.floats(0.01, 1e4),
            recipe=stated_recipes(100, None).map(lambda s: parse_recipe(s, "test")),
        ),
        st.builds(MicroBatch, grad_accum_steps=st.integers(1, 64)),
        st.builds(SkipData, batches=st.integers(1, 10**6)),
        st.builds(LowerLr, factor=st.floats(0, 1, exclude_min=True, exclude_max=True)),
    )
    amendments = tuple(
        data.draw(
            st.lists(st.builds(Amendment, step=st.integers(0, 10**9), change=change), max_size=3)
        )
    )
    dumped = json.loads(json.dumps(dump_amendments(amendments)))
    assert parse_amendments(dumped) == amendments


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "skip_data", "batches": 0},
        {"kind": "skip_data"},
        {"kind": "lower_lr", "factor": 0.0},
        {"kind": "lower_lr", "factor": 1.0},
    ],
)
def test_an_amendment_that_would_change_nothing_is_none(change):
    with pytest.raises(ValidationError):
        parse_amendments([{"step": 3, "change": change}])


def test_amendments_read_from_json_plan_the_same_run():
    amendments = (
        found(0.2),
        micro_batches(3, 2),
        skip(7, 3),
        lower(7, 0.3),
        rebase(15, recipe(batch_size=20, epochs=5)),
        extend(30, 1.5),
    )
    read = parse_amendments(json.loads(json.dumps(dump_amendments(amendments))))
    one = Timeline(recipe(), amendments, num_samples=100)
    other = Timeline(recipe(), read, num_samples=100)
    assert one.segments == other.segments
    assert one.evaluations == other.evaluations
