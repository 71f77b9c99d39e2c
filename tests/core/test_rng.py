"""Randomness is a function of (seed, stream, counter), and core and io are free of torch."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pitstop.core.rng import Stream, generator, philox, seed_for

words = st.integers(0, 2**64 - 1)
keys = st.tuples(words, st.sampled_from(Stream), words, words, words)

IMPORT_ALL = """
import importlib, pkgutil, sys
import pitstop.core, pitstop.io
for package in (pitstop.core, pitstop.io):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
        print(module.name)
heavy = {"torch", "torchvision", "timm", "pyarrow", "matplotlib", "PIL"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else 0)
"""


def draws(key: tuple[int, ...], size: int = 8) -> list[int]:
    seed, stream, *counter = key
    return philox(seed, Stream(stream), *counter).random_raw(size).tolist()


@given(keys)
def test_the_same_key_gives_the_same_numbers(key):
    assert draws(key) == draws(key)


@given(keys, st.integers(0, 4), words)
def test_changing_any_word_of_the_key_changes_the_numbers(key, which, word):
    other = list(key)
    other[which] = word % len(Stream) if which == 1 else word
    assume(tuple(other) != key)
    assert not set(draws(key)) & set(draws(tuple(other)))


def test_seed_and_epoch_are_not_added_up():
    assert draws((1, Stream.ORDER, 0)) != draws((0, Stream.ORDER, 1))
    assert seed_for(1, Stream.MODEL, 0) != seed_for(0, Stream.MODEL, 1)


def test_words_left_out_are_zero():
    assert draws((3, Stream.CROP, 5)) == draws((3, Stream.CROP, 5, 0, 0))
    assert draws((3, Stream.CROP)) == draws((3, Stream.CROP, 0, 0, 0))


@given(st.integers(0, 2**63), st.integers(0, 2))
def test_a_step_never_runs_into_the_numbers_of_the_next(word, place):
    here, after = [0, 0, 0], [0, 0, 0]
    here[place], after[place] = word, word + 1
    mine = draws((0, Stream.MIX, *here), 20_000)
    assert not set(mine) & set(draws((0, Stream.MIX, *after), 20_000))


@given(keys)
def test_the_layout_of_the_key_is_that_of_numpys_philox(key):
    """The layout is part of every run's identity: a checkpoint relies on it."""
    seed, stream, a, b, c = key
    oracle = np.random.Philox(
        key=seed + (stream << 64), counter=(a << 64) + (b << 128) + (c << 192)
    )
    assert draws(key) == oracle.random_raw(8).tolist()


def test_streams_keep_their_numbers():
    """Renumbering a stream would change every run that goes on from an old checkpoint."""
    known = {"ORDER": 0, "CROP": 1, "FLIP": 2, "MIX": 3, "INIT": 4, "MODEL": 5}
    known |= {"AUGMENT": 6, "JITTER": 7, "ERASE": 8, "NOISE": 9}
    assert known.items() <= {stream.name: stream.value for stream in Stream}.items()
    assert len({stream.value for stream in Stream}) == len(Stream.__members__)


@given(keys)
def test_seeds_for_other_libraries_fit_a_signed_integer(key):
    seed, stream, *counter = key
    assert 0 <= seed_for(seed, stream, *counter) < 2**63
    assert seed_for(seed, stream, *counter) == seed_for(seed, stream, *counter)


def test_the_generator_draws_from_its_own_key():
    mine = generator(7, Stream.FLIP, 3).random(1000)
    np.testing.assert_array_equal(mine, generator(7, Stream.FLIP, 3).random(1000))
    assert not np.array_equal(mine, generator(7, Stream.FLIP, 4).random(1000))
    assert abs(mine.mean() - 0.5) < 0.05


@pytest.fixture(scope="module")
def imported():
    command = [sys.executable, "-W", "error", "-c", IMPORT_ALL]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_core_and_io_import_nothing_heavy(imported):
    assert imported.returncode == 0, imported.stderr


def test_the_check_of_imports_saw_the_modules(imported):
    assert {"pitstop.core.rng", "pitstop.core.timeline", "pitstop.io.records"} <= set(
        imported.stdout.split()
    )
