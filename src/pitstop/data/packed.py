"""The packed dataset: a directory of Arrow IPC shards and a manifest; this module reads it.

A shard (`train-00000.arrow`, ..., `val-00000.arrow`, ...) is an Arrow IPC file of one uncompressed
record batch of `SCHEMA`, so any Arrow tool opens it. Training images may be there a second time, in
smaller copies ("levels": `train-160-00000.arrow`, ...), row for row. What is needed to find the
images of a split again stands in its index (`train.index.arrow`, of `INDEX_SCHEMA`).
`manifest.json` is written last: without it the dataset is not ready. Its `digest` identifies the
content, wherever and whenever it was made.

The index is memory-mapped: 14 million images are open at once and take no memory of their own.
Image bytes are read with `os.pread` only: a page fault of a map under the GIL would stop every
thread, and a truncated map is SIGBUS.
"""

import mmap
import os
import resource
import sys
import threading
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pitstop.core.errors import InputError
from pitstop.data.manifest import STAGING, STAGING_LOCK, read_manifest
from pitstop.io.storage import is_locked, sha256, sync

SCHEMA = pa.schema(
    [
        pa.field("image", pa.large_binary(), nullable=False),  # a JPEG or PNG, mode RGB or L
        pa.field("label", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),  # pixels of the image as stored
        pa.field("width", pa.int32(), nullable=False),
        pa.field("name", pa.large_string(), nullable=False),  # path relative to the source
    ]
)

INDEX_SCHEMA = pa.schema(
    [
        pa.field("label", pa.int32(), nullable=False),
        pa.field("size", pa.list_(pa.field("side", pa.uint16(), nullable=False), 2), False),
        pa.field("start", pa.int64(), nullable=False),  # of the image in its shard's file, bytes
        pa.field("length", pa.uint32(), nullable=False),  # of the image, bytes
    ]
)
"""20 bytes an image; `size` is (height, width)."""

LEVEL_MARGIN = 8 / 7
"""A level serves resolutions up to its short side over this, as 256 serves 224."""

_NEVER = threading.Event()

_SPARE_FILES = 256
"""Open files that the rest of a run may need besides the shards."""


class PackedSplit:
    """The images of a split, by row. Reading is thread-safe.

    Args:
        folder: of the dataset.
        entry: the split's, or a level's, in the manifest.
        num_classes: to check the labels.

    Raises:
        InputError: a file is missing or not as listed.
    """

    labels: np.ndarray
    """int32 [n]: class indices."""
    sizes: np.ndarray
    """uint16 [n, 2]: (height, width) in pixels of the images as stored."""
    levels: Mapping[int, "PackedSplit"]
    """The smaller copies by their short side in pixels, in ascending order."""

    def __init__(self, folder: Path, entry: dict[str, Any], num_classes: int) -> None:
        rows = [shard["rows"] for shard in entry["shards"]]
        index = folder / entry["index"]["file"]
        self.labels, self.sizes, self._starts, self._lengths = map_index(
            index, entry["index"]["bytes"], sum(rows), num_classes
        )
        self._first_rows = list(accumulate(rows[:-1], initial=0))
        self._shards = _Shards(folder, entry["shards"])
        self.levels = {
            int(side): PackedSplit(folder, level, num_classes)
            for side, level in sorted(entry.get("levels", {}).items(), key=lambda kv: int(kv[0]))
        }

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, resolution: int) -> "PackedSplit":
        """Returns the smallest copies of the images that serve a resolution in pixels."""
        serving = (side for side in self.levels if side >= LEVEL_MARGIN * resolution)
        return self.levels.get(next(serving, 0), self)

    def read(self, row: int, given_up: threading.Event = _NEVER) -> bytes:
        """Returns the encoded image of a row, 0 <= row < len(self).

        Args:
            given_up: ends the waiting for a shard that is still being copied here.

        Raises:
            InputError: the shard was cut short since it was opened, or was never copied here.
            OSError: the disk cannot read it.
        """
        shard = self._shard(row)
        length = int(self._lengths[row])
        data = os.pread(self._shards.descriptor(shard, given_up), length, int(self._starts[row]))
        if len(data) != length:
            raise InputError(f"{self._shards.path(shard)} was cut short while in use: pack again")
        return data

    def prefetch(self, rows: np.ndarray) -> None:
        """Asks the kernel to read the images of these rows ahead; does nothing where it cannot.

        Args:
            rows: int64 [k].
        """
        if sys.platform != "linux":
            return
        rows = np.sort(rows)  # as they lie on the disk
        shards = np.searchsorted(self._first_rows, rows, "right") - 1
        starts, lengths = self._starts[rows].tolist(), self._lengths[rows].tolist()
        for shard, start, length in zip(shards.tolist(), starts, lengths, strict=True):
            if (descriptor := self._shards.open_descriptor(shard)) is not None:
                os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)

    def name(self, row: int) -> str:
        """Returns the path that a row's image had in the source. Slow: it opens the shard."""
        shard = self._shard(row)
        names = read_names(self._shards.path(shard), self._shards.rows(shard))
        return names[row - self._first_rows[shard]].as_py()

    def place(self, row: int) -> str:
        """Returns where a row's image lies, to tell the user: shard file, row in it, and name."""
        shard = self._shard(row)
        path, row_in_shard = self._shards.path(shard), row - self._first_rows[shard]
        try:
            return f"{self.name(row)} (row {row_in_shard} of {path})"
        except InputError:  # so damaged that it does not even open
            return f"in row {row_in_shard} of {path}"

    def _shard(self, row: int) -> int:
        assert 0 <= row < len(self), f"row {row} of {len(self)}"
        return bisect_right(self._first_rows, row) - 1


class _Shards:
    """The shards' files. All are opened at once, so that they may be deleted or replaced; only
    those that are still being copied here are opened when they come."""

    def __init__(self, folder: Path, entries: Sequence[dict[str, Any]]) -> None:
        self._folder, self._entries = folder, entries
        self._descriptors: list[int | None] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._descriptors)
        staging = (folder / STAGING).exists()
        for entry in entries:
            missing = staging and not (folder / entry["file"]).exists()
            self._descriptors.append(None if missing else self._open(entry))

    def path(self, shard: int) -> Path:
        return self._folder / self._entries[shard]["file"]

    def rows(self, shard: int) -> int:
        return self._entries[shard]["rows"]

    def open_descriptor(self, shard: int) -> int | None:
        """Returns the descriptor of a shard, None if it is not here yet."""
        return self._descriptors[shard]

    def descriptor(self, shard: int, given_up: threading.Event) -> int:
        """Returns the descriptor of a shard, having waited for it if it is being copied here."""
        descriptor = self._descriptors[shard]
        return self._wait_for(shard, given_up) if descriptor is None else descriptor

    def _wait_for(self, shard: int, given_up: threading.Event) -> int:
        path = self.path(shard)
        while not path.exists():
            copying = is_locked(self._folder / STAGING_LOCK) and not given_up.is_set()
            if not copying and not path.exists():
                raise InputError(
                    f"{path} is missing, and nobody is copying it here: run the same "
                    "`pitstop data stage` again"
                )
            given_up.wait(0.1)
        with self._lock:
            descriptor = self._descriptors[shard]
            if descriptor is None:
                descriptor = self._descriptors[shard] = self._open(self._entries[shard])
            return descriptor

    def _open(self, entry: dict[str, Any]) -> int:
        file = self._folder / entry["file"]
        _check_size(file, entry["bytes"])
        return os.open(file, os.O_RDONLY)


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
        splits = manifest["splits"]
        entries = [*splits.values(), *splits["train"].get("levels", {}).values()]
        _allow_open_files(path, sum(len(entry["shards"]) for entry in entries))
        classes = tuple(manifest["classes"])
        train, val = (PackedSplit(path, splits[name], len(classes)) for name in ("train", "val"))
        return cls(path, classes, manifest["digest"], train, val)


def write_index(folder: Path, name: str, shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Writes the index of a split's shards and returns its entry for the manifest.

    Args:
        folder: of the dataset.
        name: of the split or level, as in the names of its shards: `train`, `train-160`.
        shards: their entries, in order.
    """
    columns = [_columns(folder / shard["file"]) for shard in shards]
    label, size, start, length = (np.concatenate(c) for c in zip(*columns, strict=True))
    sizes = pa.FixedSizeListArray.from_arrays(
        pa.array(size.ravel()), type=INDEX_SCHEMA.field("size").type
    )
    arrays = [pa.array(label), sizes, pa.array(start), pa.array(length)]
    file = folder / f"{name}.index.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=INDEX_SCHEMA))
    sync(file)
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}


def _columns(file: Path) -> tuple[np.ndarray, ...]:
    """Returns a shard's labels, sizes, and the images' starts and lengths in its file."""
    with pa.memory_map(str(file)) as mapped:
        batch = open_batch(mapped, SCHEMA, file)
        mapped.seek(0)
        base = mapped.read_buffer().address
        _, offsets, images = batch.column("image").buffers()
        ends = np.frombuffer(offsets, np.int64, batch.num_rows + 1)
        starts = ends[:-1] + (images.address - base)
        label, height, width = (batch.column(name).to_numpy() for name in SCHEMA.names[1:4])
        size = np.stack([height, width], axis=1).astype(np.uint16)
        return label.copy(), size, starts, np.diff(ends).astype(np.uint32)


def map_index(file: Path, size: int, rows: int, num_classes: int) -> tuple[np.ndarray, ...]:
    """Returns views of the mapped index: labels, sizes, starts and lengths.

    Args:
        size: of the file, in bytes.
        rows: how many it should have.
        num_classes: to check the labels.

    Raises:
        InputError: it is missing or damaged.
    """
    _check_size(file, size)
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_WILLNEED"):
        mapped.madvise(mmap.MADV_WILLNEED)
    batch = open_batch(pa.py_buffer(mapped), INDEX_SCHEMA, file)
    if batch.num_rows != rows:
        raise InputError(f"{file} is damaged (other rows than listed): pack again")
    label, start, length = (batch.column(name).to_numpy() for name in ("label", "start", "length"))
    sizes = batch.column("size").flatten().to_numpy().reshape(rows, 2)
    if label.min() < 0 or label.max() >= num_classes:
        raise InputError(f"{file} is damaged (a label beyond its classes): pack again")
    return label, sizes, start, length


def read_names(file: Path, rows: int) -> pa.LargeStringArray:
    """Returns the names of a shard's images, mapped; of the shard, only that column is read.

    Raises:
        InputError: the shard is missing, damaged, or has another number of rows.
    """
    try:
        mapped = pa.memory_map(str(file))
    except (pa.ArrowException, OSError):
        raise InputError(f"{file} is damaged (not an Arrow file): pack again") from None
    names = open_batch(mapped, SCHEMA, file).column("name")
    try:
        names.validate(full=True)
    except pa.ArrowException:
        raise InputError(f"{file} is damaged (its names): pack again") from None
    if len(names) != rows:
        raise InputError(f"{file} is damaged (other rows than listed): pack again")
    return names


def open_batch(source: pa.Buffer | pa.NativeFile, schema: pa.Schema, file: Path) -> pa.RecordBatch:
    """Returns the rows of a shard or an index, whose columns are as long as it says.

    Arrow itself believes what a file states, and reads beyond its buffers. The lengths of columns
    are checked, in constant time; those of each image and name are not.

    Args:
        source: the file's content.
        file: to name it.

    Raises:
        InputError: it is damaged.
    """
    try:
        batch = pa.ipc.open_file(source).get_batch(0)
        batch.validate()
    except (pa.ArrowException, OSError, ValueError):  # ValueError: there is no batch
        raise InputError(f"{file} is damaged (not an Arrow file): pack again") from None
    if batch.schema != schema or any(column.null_count for column in batch.columns):
        raise InputError(f"{file} is damaged (other columns than packing writes): pack again")
    return batch


def _check_size(file: Path, size: int) -> None:
    try:
        found = file.stat().st_size
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): pack again") from None
    if found != size:
        raise InputError(f"{file} is damaged ({found:,} bytes instead of {size:,}): pack again")


def _close(descriptors: Iterable[int | None]) -> None:
    for descriptor in descriptors:
        if descriptor is not None:
            os.close(descriptor)


def _allow_open_files(path: Path, shards: int) -> None:
    """Raises the soft limit of open files where the shards need it: macOS starts with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = shards + _SPARE_FILES
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (OSError, ValueError):  # above the hard limit, or above what macOS allows anyway
        fix = f"raise the limit (ulimit -n {needed})"
        raise InputError(
            f"{path} has {shards} shards and {soft} files may be open: {fix}"
        ) from None
