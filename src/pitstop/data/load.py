"""Loaders: batches as a function of the timeline, decoded by threads a few batches ahead.

A loader keeps nothing worth saving: what the batch of a step is follows from the timeline and the
seed, whatever the number of threads or ranks. Prefetching does not stop at the end of a segment:
the next one's images are decoded at its own resolution while this one's are trained on.
"""

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
from pitstop.data.decode import crop_resize, decode, resize_center_crop
from pitstop.data.packed import PackedSplit

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
    """uint8 [B, 3, R, R], channels_last."""
    labels: torch.Tensor
    """int64 [B]."""
    flip: torch.Tensor | None
    """bool [B]: which images are to be mirrored, None where none is."""


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
    """A batch in the making: `fill(i)` decodes image i into it, for i < size; it is `name(i)`."""

    result: T
    size: int
    fill: Callable[[int], None]
    name: Callable[[int], str]


class _Threads(Generic[T]):
    """Runs jobs on threads, `prefetch` of them ahead, and yields their results in order."""

    def __init__(self, jobs: Iterator[_Job[T]], workers: int, prefetch: int) -> None:
        assert workers >= 1
        assert prefetch >= 1
        self._jobs = jobs
        self._prefetch = prefetch
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._ahead: deque[tuple[T, list[Future[None]]]] = deque()

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
            self._ahead.append((job.result, [self._pool.submit(_fill, job, i) for i in starts]))
        if not self._ahead:
            raise StopIteration
        result, tasks = self._ahead.popleft()
        for task in tasks:
            task.result()
        return result

    def close(self) -> None:
        """Ends the threads; what they were at is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _fill(job: _Job[T], start: int) -> None:
    for i in range(start, min(start + CHUNK, job.size)):
        try:
            job.fill(i)
        except InputError:
            raise
        except Exception as error:
            raise RuntimeError(f"image {job.name(i)} cannot be read: {error}") from error


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
        self._pin_memory = pin_memory
        self._order = Order(timeline)
        self._sides: dict[int, np.ndarray] = {}
        super().__init__((self._job(step, rank, world) for step in steps), workers, prefetch)

    def close(self) -> None:
        super().close()
        self._order.close()

    def _job(self, step: int, rank: int, world: int) -> _Job[Batch]:
        segment = self._timeline.segment_at(step)
        share = rank_slice(segment.batch_size, rank, world)
        everyone = self._order.ids(step)
        ids = everyone[share]
        rng = generator(segment.recipe.seed, Stream.CROP, step)
        boxes = crop_boxes(self._split.sizes[everyone], segment.phase.crop, rng)[share]
        flip = self._flip(segment, step, everyone)
        images = _empty_batch(len(ids), segment.resolution, self._pin_memory)
        batch = Batch(
            step=step,
            share=share,
            ids=ids,
            images=images,
            labels=torch.from_numpy(self._split.labels[ids]),
            flip=None if flip is None else torch.from_numpy(flip[share]),
        )
        interpolation = segment.phase.crop.interpolation

        def fill(i: int) -> None:
            image = decode(self._split.read(int(ids[i])))
            top, left, height, width = boxes[i].tolist()
            crop_resize(image, (top, left, height, width), images[i], interpolation)

        self._split.prefetch(ids.tolist())
        return _Job(batch, len(ids), fill, lambda i: self._split.name(int(ids[i])))

    def _flip(self, segment: Segment, step: int, ids: np.ndarray) -> np.ndarray | None:
        """Returns which images of the global batch are mirrored, bool [batch_size]."""
        seed = segment.recipe.seed
        if segment.phase.flip == "random":
            return generator(seed, Stream.FLIP, 1, step).random(len(ids)) < 0.5
        if segment.phase.flip == "alternating":
            if seed not in self._sides:
                self._sides[seed] = alternating_sides(seed, len(self._split))
            return self._sides[seed][ids] ^ (self._order.passes(step) % 2 == 1)
        return None


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
        self._pin_memory = pin_memory
        rows = range(len(split)) if rows is None else rows
        batches = (rows[i : i + spec.batch_size] for i in range(0, len(rows), spec.batch_size))
        super().__init__((self._job(batch, spec, resolution) for batch in batches), workers, 4)

    def _job(self, rows: range, spec: Eval, resolution: int) -> _Job[EvalBatch]:
        images = _empty_batch(len(rows), resolution, self._pin_memory)
        labels = torch.from_numpy(self._split.labels[rows.start : rows.stop])

        def fill(i: int) -> None:
            image = decode(self._split.read(rows[i]))
            resize_center_crop(image, resolution, spec.crop_ratio, images[i], spec.interpolation)

        self._split.prefetch(rows)
        return _Job(EvalBatch(images, labels), len(rows), fill, lambda i: self._split.name(rows[i]))


def _empty_batch(size: int, resolution: int, pin_memory: bool) -> torch.Tensor:
    shape = (size, resolution, resolution, 3)
    return torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory).permute(0, 3, 1, 2)
