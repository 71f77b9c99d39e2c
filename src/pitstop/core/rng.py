"""Random numbers as a function of (seed, stream, counter).

Philox is a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): any draw of any step is reached directly, so a resumed run needs no generator state.
A key is a tuple, never a sum: `seed + epoch` would make seed 1, epoch 0 equal to seed 0, epoch 1.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What the numbers are for. The values are part of every run's identity: only append."""

    ORDER = 0
    CROP = 1
    FLIP = 2
    MIX = 3
    INIT = 4
    MODEL = 5
    AUGMENT = 6
    JITTER = 7
    ERASE = 8
    NOISE = 9
    TRANSLATE = 10


def philox(seed: int, stream: Stream, *counter: int) -> np.random.Philox:
    """Returns the bit generator of (seed, stream) placed at `counter`.

    Args:
        seed: the run's seed, 0 <= seed < 2**64.
        counter: up to 3 integers below 2**64, such as (step,) or (walk, epoch). They fill the high
            words, so each counter owns 2**64 blocks that no other counter reaches.
    """
    assert len(counter) <= 3
    words = [0, *counter, *[0] * (3 - len(counter))]
    return np.random.Philox(
        key=np.array([seed, stream], dtype=np.uint64), counter=np.array(words, dtype=np.uint64)
    )


def generator(seed: int, stream: Stream, *counter: int) -> np.random.Generator:
    """Returns numpy's generator over `philox(seed, stream, *counter)`."""
    return np.random.Generator(philox(seed, stream, *counter))


def seed_for(seed: int, stream: Stream, *counter: int) -> int:
    """Returns a 63-bit integer to seed another library's generator with, such as torch's."""
    return int(philox(seed, stream, *counter).random_raw()) >> 1
