"""The order of samples: a function of timeline and seed, whoever asks."""

from contextlib import closing
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.core.order import Order, alternating_sides, permutation, rank_slice
from pitstop.core.recipe import parse_recipe
from pitstop.core.timeline import Amendment, Rebase, Timeline

CHI_SQUARE_15_AT_1E_4 = 44.26
"""Above it lies one in ten thousand of the sums of 16 uniform cells."""

seeds = st.integers(0, 2**63 - 1)
sizes = st.integers(1, 3000)
ONCE = st.just(1)


def recipe(**stated):
    return parse_recipe({"epochs": 4, "batch_size": 10, **stated}, "test")


@st.composite
def timelines(draw, repeats=ONCE):
    """One to three phases of some batch sizes, each on a fraction of 8 to 300 images."""
    num_samples = draw(st.integers(8, 300))
    phases = [
        {
            "duration": draw(st.sampled_from(["1ep", "1.5ep", "2ep"])),
            "batch_size": draw(st.integers(num_samples // 20 + 1, num_samples // 4)),
            "data_fraction": fraction,
            "repeated_augmentation": draw(repeats),
        }
        for fraction in draw(st.lists(st.sampled_from([1.0, 0.5]), min_size=1, max_size=3))
    ]
    stated = parse_recipe({"seed": draw(st.integers(0, 3)), "phases": phases}, "test")
    return Timeline(stated, num_samples=num_samples)


def passes_by_counting(timeline: Timeline) -> list[list[int]]:
    """For each step, of each image: how many passes, of all walks, had begun before its own."""
    begun: dict[tuple[int, int], int] = {}
    counted = []
    for step in range(timeline.last):
        segment, at = timeline.segment_at(step), timeline.position(step)
        of_step = []
        for index in range(at.index, at.index + segment.batch_size):
            key = (at.walk, at.pass_ + index // segment.num_samples)
            of_step.append(begun.setdefault(key, len(begun)))
        counted.append(of_step)
    return counted


# Permutations


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 255, 256, 257, 65_536, 65_537])
def test_a_permutation_holds_every_id_once(size):
    ids = permutation(0, 0, 0, size)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(np.sort(ids), np.arange(size))


@given(seeds, st.integers(0, 1000), st.integers(0, 1000), sizes)
def test_every_permutation_holds_every_id_once(seed, walk, pass_, size):
    ids = permutation(seed, walk, pass_, size)
    np.testing.assert_array_equal(np.sort(ids), np.arange(size))
    np.testing.assert_array_equal(ids, permutation(seed, walk, pass_, size))


@given(seeds, st.integers(0, 1000), st.integers(0, 1000), st.integers(50, 3000))
def test_seeds_walks_and_passes_have_permutations_of_their_own(seed, walk, pass_, size):
    ids = permutation(seed, walk, pass_, size)
    for other in [(seed + 1, walk, pass_), (seed, walk + 1, pass_), (seed, walk, pass_ + 1)]:
        assert not np.array_equal(ids, permutation(*other, size))


def test_seed_1_pass_0_is_not_seed_0_pass_1():
    assert not np.array_equal(permutation(1, 0, 0, 100), permutation(0, 0, 1, 100))
    assert not np.array_equal(permutation(0, 1, 0, 100), permutation(0, 0, 1, 100))


@pytest.mark.parametrize("place", [0, 7, 15])
def test_each_id_is_equally_likely_at_a_place(place):
    trials = 3200
    counts = np.bincount([permutation(s, 0, 0, 16)[place] for s in range(trials)], minlength=16)
    expected = trials / 16
    assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE_15_AT_1E_4


def test_neighbours_are_not_neighbours_any_more():
    ids = permutation(0, 0, 0, 10_000)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(ids, np.arange(10_000))[0, 1]) < 0.05


# Ranks


@given(st.integers(1, 5000), st.integers(1, 16))
def test_ranks_share_a_batch_in_contiguous_parts_that_differ_by_at_most_one(batch_size, world):
    batch = np.arange(batch_size)
    parts = [batch[rank_slice(batch_size, rank, world)] for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(parts), batch)
    lengths = {len(part) for part in parts}
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("world", range(1, 17))
def test_any_number_of_ranks_sees_the_same_batches(world):
    timeline = Timeline(recipe(batch_size=37), num_samples=101)
    with closing(Order(timeline)) as order:
        batches = [order.ids(step) for step in range(timeline.last)]
    parts: list[list[np.ndarray]] = []
    for rank in range(world):
        with closing(Order(timeline)) as own:
            part = rank_slice(37, rank, world)
            parts.append([own.ids(step)[part] for step in range(timeline.last)])
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), batch)


# Batches


@given(timelines(), st.randoms(use_true_random=False))
def test_a_batch_does_not_depend_on_what_was_asked_before(timeline, random):
    with closing(Order(timeline)) as order:
        in_order = [order.ids(step) for step in range(timeline.last)]
    steps = list(range(timeline.last))
    random.shuffle(steps)
    with closing(Order(timeline)) as fresh:
        for step in steps:
            np.testing.assert_array_equal(fresh.ids(step), in_order[step])


@given(timelines())
def test_batches_are_cut_from_the_permutations_where_the_timeline_says(timeline):
    with closing(Order(timeline)) as order:
        for step in range(timeline.last):
            segment, at = timeline.segment_at(step), timeline.position(step)
            key, size = (timeline.recipe.seed, at.walk), segment.num_samples
            endless = np.concatenate([permutation(*key, at.pass_ + k, size) for k in range(2)])
            ids = order.ids(step)
            assert ids.dtype == np.int64
            np.testing.assert_array_equal(ids, endless[at.index : at.index + segment.batch_size])


def test_a_batch_may_be_the_whole_subset():
    timeline = Timeline(recipe(batch_size=20), num_samples=20)
    with closing(Order(timeline)) as order:
        for step in range(4):
            np.testing.assert_array_equal(np.sort(order.ids(step)), np.arange(20))


def test_the_next_epochs_order_is_another():
    timeline = Timeline(recipe(batch_size=100, epochs=2), num_samples=100)
    with closing(Order(timeline)) as order:
        assert not np.array_equal(order.ids(0), order.ids(1))


# Repeated augmentation


def drawn_by_pass(timeline: Timeline) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """For each walk and pass: the (place, image) drawn, in their order."""
    drawn: dict[tuple[int, int], list[tuple[int, int]]] = {}
    with closing(Order(timeline)) as order:
        for step in range(timeline.last):
            segment, at = timeline.segment_at(step), timeline.position(step)
            for index, image in enumerate(order.ids(step), at.index):
                past, place = divmod(index, segment.num_samples)
                drawn.setdefault((at.walk, at.pass_ + past), []).append((place, int(image)))
    return drawn


@given(
    st.integers(1, 5).flatmap(lambda times: st.tuples(timelines(st.just(times)), st.just(times)))
)
def test_an_image_is_repeated_as_often_as_the_recipe_says(repeated_and_times):
    timeline, times = repeated_and_times
    sizes = {segment.walk: segment.num_samples for segment in timeline.segments}
    for (walk, pass_), draws in drawn_by_pass(timeline).items():
        shuffled = permutation(timeline.recipe.seed, walk, pass_, sizes[walk])
        assert [place for place, _ in draws] == list(range(len(draws)))
        assert [image for _, image in draws] == [shuffled[place // times] for place, _ in draws]


@pytest.mark.parametrize(("times", "lengths"), [(3, [3] * 4), (5, [5, 5, 2]), (20, [12])])
def test_an_epoch_has_as_many_draws_with_each_image_so_often_in_a_row(times, lengths):
    timeline = Timeline(recipe(repeated_augmentation=times, batch_size=4), num_samples=12)
    for draws in drawn_by_pass(timeline).values():
        runs = [list(run) for _, run in groupby(image for _, image in draws)]
        assert [len(run) for run in runs] == lengths
        assert len({run[0] for run in runs}) == len(runs)


# Passes and sides


@given(timelines())
def test_passes_are_those_begun_before_an_images_own(timeline):
    with closing(Order(timeline)) as order:
        passes = [order.passes(step).tolist() for step in range(timeline.last)]
    assert passes == passes_by_counting(timeline)


@given(timelines())
def test_an_image_alternates_sides_from_one_of_its_epochs_to_the_next(timeline):
    seen: dict[tuple[int, int], int] = {}
    with closing(Order(timeline)) as order:
        for step in range(timeline.last):
            walk = timeline.segment_at(step).walk
            for image, pass_ in zip(order.ids(step), order.passes(step), strict=True):
                before = seen.get((walk, int(image)))
                assert before is None or pass_ == before + 1
                seen[walk, int(image)] = int(pass_)


def test_passes_go_on_counting_after_a_change_of_recipe():
    half_then_all = [{"duration": "50%", "data_fraction": 0.5}, {}]
    change = Rebase(recipe=recipe(epochs=6, phases=half_then_all))
    timeline = Timeline(recipe(), [Amendment(step=13, change=change)], num_samples=100)
    with closing(Order(timeline)) as order:
        passes = [order.passes(step).tolist() for step in range(timeline.last)]
    assert len({segment.walk for segment in timeline.segments}) == 3
    assert passes == passes_by_counting(timeline)


def test_about_half_of_the_images_begin_on_either_side():
    sides = alternating_sides(0, 100_000)
    assert sides.dtype == np.bool_
    assert sides.shape == (100_000,)
    assert abs(sides.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(sides[:-1], sides[1:])[0, 1]) < 0.02


@given(seeds, st.integers(0, 500), st.integers(0, 500))
def test_an_images_first_side_does_not_depend_on_how_many_follow(seed, few, more):
    sides = alternating_sides(seed, few + more)
    np.testing.assert_array_equal(alternating_sides(seed, few), sides[:few])


def test_another_seed_begins_on_other_sides():
    assert (alternating_sides(0, 1000) != alternating_sides(1, 1000)).mean() > 0.4
