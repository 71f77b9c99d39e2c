"""The order of samples: which images make up the global batch of a step.

`Order` is random access: the ids of any step follow from the timeline and the seed alone, so the
number of workers, ranks or machines has no say in them, and nothing needs saving.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pitstop.core.rng import Stream, generator, philox
from pitstop.core.timeline import Segment, Timeline

Ids = NDArray[np.int64]
_Pass = NDArray[np.integer[Any]]


def permutation(seed: int, walk: int, pass_: int, size: int) -> Ids:
    """Returns the permutation of range(size) for one pass of a walk, int64 [size].

    The ids ride in the low bits of random 64-bit keys, and the keys are sorted. A sort of integers
    is vectorised and releases the GIL, unlike a shuffle. Ties of the remaining 64 - log2(size)
    random bits are ordered by id: at 14 million ids, about 90 pairs.
    """
    bits = np.uint64(max(1, (size - 1).bit_length()))
    keys = philox(seed, Stream.ORDER, walk, pass_).random_raw(size)
    keys >>= bits
    keys <<= bits
    keys |= np.arange(size, dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << bits) - np.uint64(1)
    return keys.view(np.int64)


def _compact_permutation(seed: int, walk: int, pass_: int, size: int) -> _Pass:
    """Returns the permutation in as few bytes as suffice, since two passes are kept."""
    return permutation(seed, walk, pass_, size).astype(np.min_scalar_type(size))


def rank_slice(batch_size: int, rank: int, world: int) -> slice:
    """Returns the rank's contiguous share of a global batch; shares differ by at most one."""
    return slice(batch_size * rank // world, batch_size * (rank + 1) // world)


class Order:
    """The ids of each step's global batch.

    The permutation of the pass after the one in use is computed by a thread ahead of its time:
    with 14 million images it takes about a second.
    """

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="order")
        self._passes: dict[tuple[int, int, int, int], Future[_Pass]] = {}

    def ids(self, step: int) -> Ids:
        """Returns the rows of the packed training split for `step`, int64 [batch_size]."""
        segment = self._timeline.segment_at(step)
        at = self._timeline.position(step)
        pieces: list[_Pass] = []
        pass_, index, missing = at.pass_, at.index, segment.batch_size
        while missing:
            end = min(index + missing, segment.num_samples)
            places = np.arange(index, end) // segment.phase.repeated_augmentation
            pieces.append(self._pass(segment, pass_)[places])
            missing -= end - index
            pass_, index = pass_ + 1, 0
        return np.concatenate(pieces).astype(np.int64)

    def passes(self, step: int) -> Ids:
        """Returns how often the run has begun a pass before each image's own, int64 [batch_size].

        It grows by one with each pass, so its parity alternates from one time an image is seen to
        the next (but for a change of data fraction, which may break off a pass). Passes of which
        images were skipped count.
        """
        segment = self._timeline.segment_at(step)
        begin = segment.image_position(step)
        positions = np.arange(begin, begin + segment.batch_size, dtype=np.int64)
        return segment.walk_passes + positions // segment.num_samples

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _pass(self, segment: Segment, pass_: int) -> _Pass:
        key = (segment.recipe.seed, segment.walk, pass_, segment.num_samples)
        after = (segment.recipe.seed, segment.walk, pass_ + 1, segment.num_samples)
        self._passes = {k: self._passes.get(k) or self._later(k) for k in (key, after)}
        return self._passes[key].result()

    def _later(self, key: tuple[int, int, int, int]) -> Future[_Pass]:
        return self._pool.submit(_compact_permutation, *key)


def alternating_sides(seed: int, num_samples: int) -> NDArray[np.bool_]:
    """Returns on which side each image is seen first, bool [num_samples].

    Alternating flip: an image is flipped in every second of its epochs, beginning at a random side
    (Jordan, "94% on CIFAR-10 in 3.29 seconds", arXiv 2404.00498, section 3.6).
    """
    return generator(seed, Stream.FLIP).integers(0, 2, num_samples, dtype=np.uint8).astype(bool)
