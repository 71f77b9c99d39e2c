"""Loaders: batches as a function of the timeline, decoded by threads a few batches ahead.

A loader keeps nothing worth saving: what the batch of a step is follows from the timeline and the
seed, whatever the number of threads or ranks. Prefetching does not stop at the end of a segment:
the next one's images are decoded at its own resolution while this one's are trained on.
"""

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np
import torch

from pitstop.core.errors import InputError
from pitstop.core.order import Order, alternating_sides, rank_slice
from pitstop.core.recipe import Eval
from pitstop.core.rng import Stream, generator
from pitstop.core.timeline import Segment, Timeline
from pitstop.data.augment import crop_boxes
from pitstop.data.decode import decode, decode_crop
from pitstop.data.packed import PackedSplit
from pitstop.data.resize import resize, resize_center_crop

CHUNK = 16
"""Images a task: small enough to spread a batch over all threads, large enough to cost nothing."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step's global batch."""

    step: int
    share: slice
    """Which rows of the global batch these are."""
    ids: np.ndarray
    """int64 [B]: rows of the training split."""
    images: torch.Tensor
    """uint8 [B, 3, R, R], channels_last: cropped, resized, and mirrored where the phase says so."""
    labels: torch.Tensor
    """int64 [B]."""


T = TypeVar("T")


@dataclass(frozen=True)
class EvalBatch:
    """Images to evaluate."""

    images: torch.Tensor
    """uint8 [B, 3, R, R], channels_last."""
    labels: torch.Tensor
    """int64 [B]."""


@dataclass(frozen=True)
class _Job(Generic[T]):
    """A batch in the making: `fill(i)` decodes image i of size, which lies at `place(i)`."""

    result: T
    size: int
    fill: Callable[[int], None]
    place: Callable[[int], str]


class _Threads(Generic[T]):
    """Runs jobs on threads, `prefetch` of them ahead, and yields their results in order.

    An error in a thread is raised at the next call, whichever batch it was in.
    """

    def __init__(self, jobs: Iterator[_Job[T]], workers: int, prefetch: int) -> None:
        assert workers >= 1
        assert prefetch >= 1
        self._jobs = jobs
        self._prefetch = prefetch
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._ahead: deque[tuple[T, list[Future[None]]]] = deque()
        self._errors: deque[Exception] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        while len(self._ahead) <= self._prefetch:
            job = next(self._jobs, None)
            if job is None:
                break
            starts = range(0, job.size, CHUNK)
            tasks = [self._pool.submit(self._fill, job, start) for start in starts]
            self._ahead.append((job.result, tasks))
        if not self._ahead:
            raise StopIteration
        result, tasks = self._ahead.popleft()
        for task in tasks:
            task.result()
        if self._errors:
            raise self._errors[0]
        return result

    def close(self) -> None:
        """Ends the threads; what they were at is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _fill(self, job: _Job[T], start: int) -> None:
        if self._errors:
            return
        i = start
        try:
            for i in range(start, min(start + CHUNK, job.size)):
                job.fill(i)
        except InputError as error:
            self._errors.append(error)
        except Exception as error:
            self._errors.append(_named(error, job.place(i)))


def _named(error: Exception, place: str) -> Exception:
    """Returns the error with the image's place: damaged data is for the user to mend."""
    if not isinstance(error, ValueError | OSError):
        named = RuntimeError(f"image {place} cannot be read: {error}")
        named.__cause__ = error
        return named
    fix = "`pitstop data check` lists what is damaged; then pack or stage again"
    return InputError(f"image {place} cannot be read ({error}): {fix}")


class _Memory:
    """Memory for batches, used again when nobody refers to a batch, or a part of it, any more.

    Fresh memory costs as much as a quarter of decoding: the system clears each page at its first
    touch (38 MB, a batch of 256 at 224 pixels: 37 ms fresh, 11 ms used, to write on one core).
    Memory that a GPU fetches from is kept in the same way by torch, which also knows when the GPU
    has done so.
    """

    def __init__(self, pin_memory: bool) -> None:
        self._pin_memory = pin_memory
        self._size = 0
        self._free: deque[np.ndarray] = deque()

    def images(self, count: int, resolution: int) -> torch.Tensor:
        """Returns uint8 [count, 3, resolution, resolution], channels_last, not initialised."""
        shape = (count, resolution, resolution, 3)
        if self._pin_memory:
            nhwc = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            nhwc = torch.from_numpy(self._lend(shape))
        return nhwc.permute(0, 3, 1, 2)

    def _lend(self, shape: tuple[int, ...]) -> np.ndarray:
        size = math.prod(shape)
        if size != self._size:
            self._size, self._free = size, deque()
        block = self._free.pop() if self._free else np.empty(size, np.uint8)
        lent = block.reshape(shape)  # which lives as long as the tensors that are made of it
        weakref.finalize(lent, self._free.append, block).atexit = False
        return lent


class Loader(_Threads[Batch]):
    """Training batches of the given steps, in order.

    Args:
        split: the packed training images.
        timeline: the run's.
        steps: which, usually from the checkpoint's to the last.
        rank, world: whose share of each global batch.
        workers: threads that decode.
        prefetch: batches that are decoded ahead.
        pin_memory: whether the images are put where a GPU can fetch them by itself.
    """

    def __init__(
        self,
        split: PackedSplit,
        timeline: Timeline,
        steps: Iterable[int],
        *,
        rank: int = 0,
        world: int = 1,
        workers: int,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        self._split = split
        self._timeline = timeline
        self._memory = _Memory(pin_memory)
        self._closing = threading.Event()
        self._order = Order(timeline)
        self._sides: dict[int, np.ndarray] = {}
        super().__init__((self._job(step, rank, world) for step in steps), workers, prefetch)

    def close(self) -> None:
        self._closing.set()
        super().close()
        self._order.close()

    def _job(self, step: int, rank: int, world: int) -> _Job[Batch]:
        segment = self._timeline.segment_at(step)
        split = self._split.at(segment.resolution)
        share = rank_slice(segment.batch_size, rank, world)
        everyone = self._order.ids(step)
        ids = everyone[share]
        rng = generator(segment.recipe.seed, Stream.CROP, step)
        boxes = crop_boxes(split.sizes[everyone], segment.phase.crop, rng)[share].tolist()
        mirrored = self._mirrored(segment, step, everyone)[share].tolist()
        images = self._memory.images(len(ids), segment.resolution)
        batch = Batch(
            step=step,
            share=share,
            ids=ids,
            images=images,
            labels=torch.from_numpy(split.labels[ids].astype(np.int64)),
        )
        interpolation = segment.phase.crop.interpolation
        rows, slots = ids.tolist(), images.split(1)

        def fill(i: int) -> None:
            resize(
                decode_crop(split.read(rows[i], self._closing), boxes[i]), slots[i], interpolation
            )
            if mirrored[i]:  # 22 us while it is in the cache; 250 us an image in the whole batch
                slots[i].copy_(slots[i].flip(3))

        split.prefetch(ids)
        return _Job(batch, len(ids), fill, lambda i: split.place(rows[i]))

    def _mirrored(self, segment: Segment, step: int, ids: np.ndarray) -> np.ndarray:
        """Returns which images of the global batch are mirrored, bool [batch_size]."""
        seed = segment.recipe.seed
        if segment.phase.flip == "random":
            return generator(seed, Stream.FLIP, 1, step).random(len(ids)) < 0.5
        if segment.phase.flip == "alternating":
            if seed not in self._sides:
                self._sides[seed] = alternating_sides(seed, len(self._split))
            return self._sides[seed][ids] ^ (self._order.passes(step) % 2 == 1)
        return np.zeros(len(ids), bool)


class EvalLoader(_Threads[EvalBatch]):
    """Each of the given images of a split once, in order.

    Args:
        split: the packed validation images.
        spec: the protocol and the batch size.
        resolution: the side of the crop in pixels.
        rows: which images; a rank's share, or all.
        workers: threads that decode.
        pin_memory: as in `Loader`.
    """

    def __init__(
        self,
        split: PackedSplit,
        spec: Eval,
        resolution: int,
        *,
        rows: range | None = None,
        workers: int,
        pin_memory: bool = False,
    ) -> None:
        self._split = split
        self._memory = _Memory(pin_memory)
        rows = range(len(split)) if rows is None else rows
        batches = (rows[i : i + spec.batch_size] for i in range(0, len(rows), spec.batch_size))
        super().__init__((self._job(batch, spec, resolution) for batch in batches), workers, 4)

    def _job(self, rows: range, spec: Eval, resolution: int) -> _Job[EvalBatch]:
        split = self._split
        images = self._memory.images(len(rows), resolution)
        labels = torch.from_numpy(split.labels[rows.start : rows.stop].astype(np.int64))
        slots = images.split(1)

        def fill(i: int) -> None:
            image = decode(split.read(rows[i]))
            resize_center_crop(image, resolution, spec.crop_ratio, slots[i], spec.interpolation)

        split.prefetch(np.arange(rows.start, rows.stop))
        return _Job(EvalBatch(images, labels), len(rows), fill, lambda i: split.place(rows[i]))
