from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitstop.core.errors import InputError
from pitstop.data.sources.base import Item, Source, constant_reader
from pitstop.data.sources.folder import folder_source
from pitstop.data.sources.select import split_source, subset_source

Counts = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 10)), min_size=2, max_size=8)


def made_up(counts: list[tuple[int, int]]) -> Source:
    """A source with so many (training, validation) images a class."""
    train, val = (
        sorted(
            Item(f"{split}/{label}/{index}", label)
            for label, both in enumerate(counts)
            for index in range(both[which])
        )
        for which, split in enumerate(("train", "val"))
    )
    classes = tuple(f"class {label}" for label in range(len(counts)))
    return Source("made up", classes, train, val, "key", (), constant_reader(str.encode))


def by_class(items) -> Counter[int]:
    return Counter(item.label for item in items)


@given(Counts, st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_split_is_stratified_and_keeps_each_image_once(counts, fraction, seed):
    source = made_up([(max(2, train), val) for train, val in counts])
    split = split_source(source, fraction, seed=seed)
    assert sorted([*split.train, *split.val]) == source.train
    assert list(split.train) == sorted(split.train)
    assert list(split.val) == sorted(split.val)
    total, held = by_class(source.train), by_class(split.val)
    for label, n in total.items():
        assert 1 <= held[label] < n
        assert abs(held[label] - fraction * n) <= 1


def test_a_class_of_one_image_is_trained_on():
    split = split_source(made_up([(1, 1), (4, 1)]), 0.5)
    assert (by_class(split.train), by_class(split.val)) == ({0: 1, 1: 2}, {1: 2})
    with pytest.raises(InputError, match="one image a class, too few to split: add images"):
        split_source(made_up([(1, 1), (1, 1)]), 0.5)


def test_own_validation_images_are_left_out_and_said_so_or_divided_too():
    source = made_up([(10, 5), (10, 5)])
    without, with_them = split_source(source, 0.2), split_source(source, 0.2, every=True)
    assert (len(without.train), len(without.val)) == (16, 4)
    assert (
        "made up: its 10 validation images are left out (--all divides them too)"
    ) in without.notes
    assert (len(with_them.train), len(with_them.val)) == (24, 6)
    assert sorted([*with_them.train, *with_them.val]) == sorted([*source.train, *source.val])
    assert with_them.notes == ("made up: its 10 validation images are divided too",)


def test_images_that_were_held_out_for_want_of_others_are_divided_too(folder: Path):
    source = folder_source(folder / "train")
    split = split_source(source, 0.5)
    assert (len(source.train), len(source.val)) == (10, 2)
    assert by_class(split.train) == by_class(split.val) == {0: 3, 1: 3}
    assert split.notes[-1].endswith("its 2 validation images are divided too")
    assert split.key == split_source(source, 0.5, every=True).key


def test_a_split_is_the_same_each_time_and_another_with_another_seed():
    source = made_up([(50, 1), (50, 1)])
    split, again, other = (split_source(source, 0.2, seed=seed) for seed in (0, 0, 1))
    assert (split.val, split.key) == (again.val, again.key)
    assert split.val != other.val
    assert len({split.key, other.key, source.key, split_source(source, 0.3).key}) == 4


def test_an_image_more_moves_hardly_any_other():
    """The division follows from each name alone, not from its place in the list."""
    before, after = (split_source(made_up([(n, 1), (50, 1)]), 0.2) for n in (100, 101))
    assert len(set(before.val) - set(after.val)) <= 1


@given(Counts, st.integers(1, 12), st.integers(1, 12))
def test_a_subset_has_so_many_images_of_each_class(counts, train, val):
    source = made_up(counts)
    chosen = source.classes[::2] if len(counts) > 2 else source.classes
    subset = subset_source(source, chosen, train=train, val=val)
    assert subset.classes == chosen
    for items, every, count in (
        (subset.train, source.train, train),
        (subset.val, source.val, val),
    ):
        of_class, there = by_class(items), by_class(every)
        for label, name in enumerate(subset.classes):
            assert of_class[label] == min(count, there[source.classes.index(name)])
        named = {item.name: source.classes[item.label] for item in every}
        assert all(named[item.name] == subset.classes[item.label] for item in items)
        assert list(items) == sorted(items)


def test_a_larger_subset_holds_the_smaller_one():
    source = made_up([(30, 9), (30, 9)])
    small, large = (subset_source(source, source.classes, train=n) for n in (5, 12))
    assert set(small.train) < set(large.train)
    assert small.val == large.val == source.val
    assert small.key != large.key


def test_classes_keep_the_order_of_the_source():
    source = made_up([(2, 1)] * 4)
    assert subset_source(source, ["class 3", "class 1"]).classes == ("class 1", "class 3")


def test_too_few_images_are_noted():
    subset = subset_source(made_up([(3, 1), (9, 1)]), ["class 0", "class 1"], train=5, val=1)
    assert subset.notes == ("1 of 2 classes have fewer than 5 training images: all are taken",)


def test_what_cannot_be_chosen_is_refused():
    source = made_up([(3, 1), (3, 0), (3, 0)])
    with pytest.raises(InputError, match="made up has no class clas 1; did you mean 'class 1'"):
        subset_source(source, ["class 0", "clas 1"])
    with pytest.raises(InputError, match="at least two classes"):
        subset_source(source, ["class 0", "class 0"])
    with pytest.raises(InputError, match="no validation images of these classes: `pitstop data sp"):
        subset_source(source, ["class 1", "class 2"])


def test_only_what_was_chosen_is_read(folder: Path, tmp_path: Path):
    (folder / "val/dog/0.jpg").unlink()
    (folder / "val/dog/0.jpg").symlink_to("nowhere")
    source = folder_source(folder)
    subset = subset_source(source, source.classes, val=1)
    chosen = [item.name for item in subset.val if "dog" in item.name]
    read = subset.open(tmp_path / "not made")
    assert all(read(item.name) for item in subset.val if item.name != "val/dog/0.jpg")
    assert len(chosen) == 1
    assert not (tmp_path / "not made").exists()
