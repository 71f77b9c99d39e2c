"""The packed dataset: a directory of Arrow IPC shards and a manifest; this module reads it.

A shard (`train-00000.arrow`, ..., `val-00000.arrow`, ...) is an Arrow IPC file of one uncompressed
record batch of `SCHEMA`, so any Arrow tool opens it. `manifest.json` is written last: without it
the dataset is not ready. Its `digest` identifies the content, wherever and whenever it was made.

Opening copies the small columns out of the memory-mapped shards and drops the maps. Image bytes are
read with `os.pread` only: a page fault of a map under the GIL would stop every thread, and a
truncated map is SIGBUS.
"""

import os
import resource
import sys
import weakref
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pitstop.core.errors import InputError
from pitstop.data.manifest import read_manifest

REMARKS = "remarks.csv"
"""Which images were skipped or converted, and why: columns split, name, action, why."""

SCHEMA = pa.schema(
    [
        pa.field("image", pa.large_binary(), nullable=False),  # a JPEG or PNG, mode RGB or L
        pa.field("label", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),  # pixels of the image as stored
        pa.field("width", pa.int32(), nullable=False),
        pa.field("name", pa.large_string(), nullable=False),  # path relative to the source
    ]
)

_SPARE_FILES = 256
"""Open files that the rest of a run may need besides the shards."""


@dataclass(frozen=True, eq=False, repr=False)
class PackedSplit:
    """The images of a split, by row. Reading is thread-safe; there is no state to keep."""

    labels: np.ndarray
    """int64 [n]: class indices."""
    sizes: np.ndarray
    """int32 [n, 2]: (height, width) in pixels of the images as stored."""
    _starts: np.ndarray
    """int64 [n]: where an image begins in its shard's file, in bytes."""
    _lengths: np.ndarray
    """int64 [n]: its size in bytes."""
    _first_rows: tuple[int, ...]
    _paths: tuple[Path, ...]
    _descriptors: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, row: int) -> bytes:
        """Returns the encoded image of a row, 0 <= row < len(self).

        Raises:
            InputError: the shard was cut short since it was opened.
            OSError: the disk cannot read it.
        """
        shard = self._shard(row)
        length = int(self._lengths[row])
        data = os.pread(self._descriptors[shard], length, int(self._starts[row]))
        if len(data) != length:
            raise InputError(f"{self._paths[shard]} was cut short while in use: pack again")
        return data

    def prefetch(self, rows: Iterable[int]) -> None:
        """Asks the kernel to read the images of these rows ahead; does nothing where it cannot."""
        if sys.platform != "linux":
            return
        for row in rows:
            start, length = int(self._starts[row]), int(self._lengths[row])
            descriptor = self._descriptors[self._shard(row)]
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)

    def name(self, row: int) -> str:
        """Returns the path that a row's image had in the source. Slow: it opens the shard."""
        shard = self._shard(row)
        with pa.memory_map(str(self._paths[shard])) as file:
            batch = pa.ipc.open_file(file).get_batch(0)
            return batch.column("name")[row - self._first_rows[shard]].as_py()

    def _shard(self, row: int) -> int:
        assert 0 <= row < len(self), f"row {row} of {len(self)}"
        return bisect_right(self._first_rows, row) - 1


@dataclass(frozen=True, eq=False, repr=False)
class PackedDataset:
    """A packed dataset that is open for reading."""

    path: Path
    classes: tuple[str, ...]
    digest: str
    """Hex sha256 over the classes, and the labels and images of the splits in their order."""
    train: PackedSplit
    val: PackedSplit

    @classmethod
    def open(cls, path: Path | str) -> "PackedDataset":
        """Opens a packed dataset; its shards stay open until it is garbage.

        Raises:
            InputError: it is missing, unfinished, of an unknown version, or damaged.
        """
        path = Path(path)
        manifest = read_manifest(path)
        shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
        _allow_open_files(path, len(shards))
        classes = tuple(manifest["classes"])
        train, val = (
            _open_split(path, manifest["splits"][split]["shards"], len(classes))
            for split in ("train", "val")
        )
        return cls(path, classes, manifest["digest"], train, val)


def _open_split(path: Path, shards: list[dict[str, Any]], num_classes: int) -> PackedSplit:
    paths = tuple(path / shard["file"] for shard in shards)
    descriptors: list[int] = []
    try:
        for file, shard in zip(paths, shards, strict=True):
            descriptors.append(_open_shard(file, shard["bytes"]))
        columns = [_read_columns(path / shard["file"], shard["rows"]) for shard in shards]
        labels, sizes, starts, lengths = (np.concatenate(c) for c in zip(*columns, strict=True))
        if labels.min() < 0 or labels.max() >= num_classes:
            raise InputError(f"{path} is damaged (a label beyond its classes): pack again")
    except BaseException:
        _close(descriptors)
        raise
    first_rows = tuple(accumulate((shard["rows"] for shard in shards[:-1]), initial=0))
    split = PackedSplit(labels, sizes, starts, lengths, first_rows, paths, tuple(descriptors))
    weakref.finalize(split, _close, descriptors)
    return split


def _open_shard(file: Path, size: int) -> int:
    try:
        found = file.stat().st_size
        if found == size:
            return os.open(file, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): pack again") from None
    raise InputError(f"{file} is damaged ({found:,} bytes instead of {size:,}): pack again")


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _read_columns(file: Path, rows: int) -> tuple[np.ndarray, ...]:
    """Returns copies of a shard's labels, sizes, and the images' starts and lengths in its file."""
    with pa.memory_map(str(file)) as mapped:
        try:
            batch = pa.ipc.open_file(mapped).get_batch(0)
        except pa.ArrowException:
            raise InputError(f"{file} is damaged (not an Arrow file): pack again") from None
        if batch.schema != SCHEMA or batch.num_rows != rows:
            raise InputError(f"{file} is damaged (other rows than listed): pack again")
        mapped.seek(0)
        base = mapped.read_buffer().address
        _, offsets_buffer, images = batch.column("image").buffers()
        offsets = np.frombuffer(offsets_buffer, np.int64, rows + 1)
        starts = offsets[:-1] + (images.address - base)
        label, height, width = (batch.column(name).to_numpy() for name in SCHEMA.names[1:4])
        return label.astype(np.int64), np.stack([height, width], 1), starts, np.diff(offsets)


def _allow_open_files(path: Path, shards: int) -> None:
    """Raises the soft limit of open files where the shards need it: macOS starts with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = shards + _SPARE_FILES
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        fix = f"raise the limit (ulimit -Hn) to {needed} or pack into larger shards"
        raise InputError(f"{path} has {shards} shards and {hard} files may be open: {fix}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
