"""Checking a packed dataset: is each file, each row and each image what the manifest says?

Each shard is read once. Its checksum is compared, its rows with the index, and each image is
decoded; of one that is tiled, a crop as well, and compared. The manifest's digests are computed
anew. A byte that flipped inside a JPEG may still decode: then the checksum tells in which file
it is, but nothing tells the row.

Duplicates across train and val are looked for by content. Training images are stored shrunk, so
their files are gone; each validation image is therefore converted once more as if it was for
training, with the settings that the manifest states, and compared byte by byte. That finds a file
that was in both splits, whatever its names. It does not find the same photo in another resolution
or quality, nor what versions of libjpeg-turbo or Pillow packed that encode otherwise than those
here.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import Image

from pitstop.data import jpeg
from pitstop.data.convert import Settings, convert, why_bad
from pitstop.data.decode import decode, decode_crop
from pitstop.data.manifest import MANIFEST, digest_of, read_manifest
from pitstop.data.packed import INDEX_SCHEMA, SCHEMA

_ROWS_A_TASK = 32

Look = Callable[[bytes], Sequence[bytes]]
"""Returns digests of an image's content; duplicates have one in common."""


class Place(NamedTuple):
    """Where an image is stored."""

    file: str
    row: int
    """In the file, from 0."""
    name: str
    """That it had in the source."""


class Problem(NamedTuple):
    """Something that is not as it should be; row and name are None if it is the whole file."""

    file: str
    row: int | None
    name: str | None
    why: str


class Duplicate(NamedTuple):
    """An image that is in both splits."""

    train: Place
    val: Place


@dataclass
class CheckReport:
    """What came of a check."""

    files: int
    images: int
    """Those of train, val and the levels."""
    problems: list[Problem] = field(default_factory=list)
    """By file, then by row; what is wrong with a file as a whole comes first."""
    duplicates: list[Duplicate] = field(default_factory=list)


def check(
    path: Path, *, workers: int, progress: Callable[[int, int], None] | None = None
) -> CheckReport:
    """Checks all files, rows and images of a packed dataset. Memory: two shards.

    Args:
        workers: threads that decode.
        progress: called with (images done, all images).

    Raises:
        InputError: there is no manifest, or it is damaged.
    """
    manifest = read_manifest(path)
    train, val = (manifest["splits"][split] for split in ("train", "val"))
    entries = [val, train, *train.get("levels", {}).values()]
    images = sum(_num_rows(entry) for entry in entries)
    report = CheckReport(sum(1 + len(entry["shards"]) for entry in entries), images)
    if manifest["digest"] != digest_of(manifest["classes"], manifest["splits"]):
        why = "its digest is not that of its classes, rows and content"
        report.problems.append(Problem(MANIFEST, None, None, why))
    settings = Settings(manifest["made"]["short_side"], manifest["made"]["quality"])
    with ThreadPoolExecutor(workers) as pool, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # odd metadata; what matters is raised
        checker = _Checker(path, len(manifest["classes"]), report, pool, progress)
        seen: dict[bytes, Place] = {}
        for place, digests in checker.images(val, partial(_as_train, settings)):
            seen |= dict.fromkeys(digests, place)
        for entry in entries[1:]:
            for place, digests in checker.images(entry, _as_it_is):
                found = next((seen[digest] for digest in digests if digest in seen), None)
                if entry is train and found is not None:
                    report.duplicates.append(Duplicate(train=place, val=found))
    return report


def _num_rows(entry: dict[str, Any]) -> int:
    return sum(shard["rows"] for shard in entry["shards"])


def _as_it_is(data: bytes) -> Sequence[bytes]:
    return [sha256(data).digest()]


def _as_train(settings: Settings, data: bytes) -> Sequence[bytes]:
    """Returns the digests of what an image of val may be in train.

    A PNG may have been made of another format, and such images become JPEG in train.
    """
    possible = [convert(data, "train", settings).pictures[0].data]
    with Image.open(BytesIO(data)) as image:
        if image.format == "PNG":
            possible.append(jpeg.encode(np.asarray(image), settings.quality))
    return [sha256(each).digest() for each in possible]


class _Checker:
    """Goes through one split or level after the other, and reports what is wrong."""

    def __init__(
        self,
        path: Path,
        num_classes: int,
        report: CheckReport,
        pool: ThreadPoolExecutor,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._path, self._num_classes, self._report = path, num_classes, report
        self._pool, self._progress = pool, progress
        self._done = 0

    def images(self, entry: dict[str, Any], look: Look) -> Iterator[tuple[Place, Sequence[bytes]]]:
        """Yields where each image is that decodes, and what `look` returns of it.

        Args:
            entry: of a split or level in the manifest.
        """
        listed = entry["index"] | {"rows": _num_rows(entry)}
        index = self._table(listed, self._read(listed), INDEX_SCHEMA)
        reads = map(self._read, entry["shards"])
        ahead = next(reads)
        first, content_hash = 0, sha256()
        for shard in entry["shards"]:
            content, ahead = ahead, next(reads, ahead)
            table = self._table(shard, content, SCHEMA)
            if table is None:
                self._count(shard["rows"])
            else:
                part = None if index is None else index.batch.slice(first, shard["rows"])
                self._compare(table, part)
                yield from self._look(table, look, content_hash.update)
            first += shard["rows"]
        self._compare_content(entry, content_hash.hexdigest(), first)

    def _read(self, listed: dict[str, Any]) -> "Future[_Content]":
        return self._pool.submit(_read, self._path / listed["file"])

    def _table(
        self, listed: dict[str, Any], content: "Future[_Content]", schema: pa.Schema
    ) -> "_Table | None":
        """Returns the rows of a file, None if they cannot be had.

        Args:
            listed: the file in the manifest: file, rows, bytes, sha256.
        """
        file = listed["file"]
        try:
            data, checksum = content.result()
        except OSError as error:
            self._tell(file, f"cannot be read ({error.strerror})")
            return None
        if len(data) != listed["bytes"]:
            self._tell(file, f"has {len(data):,} bytes instead of {listed['bytes']:,}")
        elif checksum != listed["sha256"]:
            self._tell(file, "its checksum is not the manifest's")
        try:
            batch = pa.ipc.open_file(data).get_batch(0)
            batch.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            self._tell(file, f"is no Arrow file ({' '.join(str(error).split())})")
            return None
        missing = any(column.null_count for column in batch.columns)
        if batch.schema != schema or batch.num_rows != listed["rows"] or missing:
            self._tell(file, "has other rows than the manifest lists")
            return None
        return _Table(file, batch, pa.py_buffer(data).address)

    def _compare(self, table: "_Table", index: pa.RecordBatch | None) -> None:
        """Reports rows whose label is out of range, or that the index describes otherwise."""
        label, size, start, length = table.index_columns()
        self._tell_rows(table, (label < 0) | (label >= self._num_classes), "its label has no class")
        if index is None:
            return
        listed_size = index.column("size").flatten().to_numpy().reshape(-1, 2)
        differs = (listed_size != size).any(axis=1)
        for name, found in (("label", label), ("start", start), ("length", length)):
            differs |= index.column(name).to_numpy() != found
        self._tell_rows(table, differs, "the index differs from the shard")

    def _compare_content(self, entry: dict[str, Any], content: str, rows: int) -> None:
        """Reports what the manifest says wrong of the shards, unless they are damaged anyway."""
        damaged = {problem.file for problem in self._report.problems if problem.row is None}
        if not damaged.isdisjoint(shard["file"] for shard in entry["shards"]):
            return
        of = entry["index"]["file"].removesuffix(".index.arrow")
        if entry["content"] != content:
            self._tell(MANIFEST, f"its content of {of} is not that of the shards")
        if entry.get("rows", rows) != rows:  # a level states none
            self._tell(MANIFEST, f"its rows of {of} are not those of the shards")

    def _look(
        self, table: "_Table", look: Look, add: Callable[[bytes], None]
    ) -> Iterator[tuple[Place, Sequence[bytes]]]:
        """As `images`, of a shard; `add` gets each row's digest, for that of the content."""
        rows = table.batch.num_rows
        spans = [range(i, min(i + _ROWS_A_TASK, rows)) for i in range(0, rows, _ROWS_A_TASK)]
        tasks = deque((span, self._pool.submit(_look_at, table, span, look)) for span in spans)
        while tasks:
            span, task = tasks.popleft()
            for row, (content, (why, digests)) in zip(span, task.result(), strict=True):
                add(content)
                place = table.place(row)
                if why is None:
                    yield place, digests
                else:
                    self._report.problems.append(Problem(*place, why))
            self._count(len(span))

    def _tell(self, file: str, why: str) -> None:
        self._report.problems.append(Problem(file, None, None, why))

    def _tell_rows(self, table: "_Table", wrong: np.ndarray, why: str) -> None:
        for row in np.flatnonzero(wrong).tolist():
            self._report.problems.append(Problem(*table.place(row), why))

    def _count(self, rows: int) -> None:
        self._done += rows
        if self._progress is not None:
            self._progress(self._done, self._report.images)


class _Content(NamedTuple):
    """Of a file."""

    data: bytes
    checksum: str
    """Hex sha256."""


def _read(file: Path) -> _Content:
    data = file.read_bytes()
    return _Content(data, sha256(data).hexdigest())


class _Table(NamedTuple):
    """The rows of a file that is in memory."""

    file: str
    batch: pa.RecordBatch
    address: int
    """Where in memory the file begins."""

    def place(self, row: int) -> Place:
        return Place(self.file, row, self.batch.column("name")[row].as_py())

    def index_columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns what the index should say of a shard: label, size, start and length."""
        label, height, width = (
            self.batch.column(name).to_numpy() for name in ("label", "height", "width")
        )
        _, offsets, images = self.batch.column("image").buffers()
        ends = np.frombuffer(offsets, np.int64, self.batch.num_rows + 1)
        start = ends[:-1] + (images.address - self.address)
        return label, np.stack([height, width], axis=1), start, np.diff(ends)


class _Seen(NamedTuple):
    """What came of an image."""

    why_bad: str | None
    digests: Sequence[bytes]


def _look_at(table: _Table, rows: range, look: Look) -> list[tuple[bytes, _Seen]]:
    """Returns of each row the digest of label and image, as packing computes it, and the rest."""
    return [_look_at_row(table, row, look) for row in rows]


def _look_at_row(table: _Table, row: int, look: Look) -> tuple[bytes, _Seen]:
    data, label, height, width = (
        table.batch.column(name)[row].as_py() for name in ("image", "label", "height", "width")
    )
    content = sha256(label.to_bytes(4, "little", signed=True) + data).digest()
    return content, _look_at_image(data, height, width, look)


def _look_at_image(data: bytes, height: int, width: int, look: Look) -> _Seen:
    try:
        pixels = _decode(data)
        found = pixels.shape[:2]
        if found != (height, width):
            return _Seen(f"is {found[1]} x {found[0]} pixels instead of {width} x {height}", ())
        if jpeg.is_tiled(data) and not _crops_alike(data, pixels):
            return _Seen("its index of tiles is wrong: a crop differs from the whole image", ())
        return _Seen(None, look(data))
    except Exception as error:  # decoders raise nearly anything
        return _Seen(why_bad(error), ())


def _decode(data: bytes) -> np.ndarray:
    """As `decode`, but the pixels of a tiled image are those that its crops have."""
    return (
        simplejpeg.decode_jpeg(data, "RGB", fastupsample=True)
        if jpeg.is_tiled(data)
        else decode(data)
    )


def _crops_alike(data: bytes, pixels: np.ndarray) -> bool:
    """Says whether the middle half of a tiled image, decoded alone, is as in the whole image.

    It is as high as the image, so that each row of tiles has to be found.
    """
    height, width = pixels.shape[:2]
    left = width // 4
    right = width - left
    return np.array_equal(decode_crop(data, (0, left, height, right - left)), pixels[:, left:right])
