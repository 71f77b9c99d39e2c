"""Parquet files of images, in the layout of Hugging Face's datasets.

The column of images is the first of `IMAGE_COLUMNS` that is there: encoded images as binary or as
a struct {bytes, path}. That of labels is the first of `LABEL_COLUMNS`: integers, whose names the
schema may declare (ClassLabel), or strings. The splits follow from the files' names.

Packing takes images in another order than they have, and a read at random would decode a whole row
group. So the images are copied once, in sequence, into a file that is read at random.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pitstop.core.errors import InputError
from pitstop.data.sources.base import Reader, Source
from pitstop.data.sources.folder import stamp
from pitstop.data.sources.layout import files_by_split, tabular
from pitstop.data.sources.spans import read_at
from pitstop.io.storage import atomic_write

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls", "class", "target")

_ROWS_AT_ONCE = 64
"""Images in memory while they are copied."""


def parquet_source(root: Path, files: Sequence[str], origin: str, key: str | None = None) -> Source:
    """Returns the labelled images of Parquet files. A row without a label is left out, with a note.

    Args:
        root: the folder that the files are relative to.
        origin: what the user calls them.
        key: hex digest of the content, if it is known; otherwise from the files' sizes and times.

    Raises:
        InputError: one is damaged or has no such columns, or they are of no known layout.
    """
    splits = files_by_split(origin, files)
    tables = {name: _Table.read(root / name) for name in (*splits.train, *splits.val)}
    declared = _declared(root, tables)
    train, val = (
        {f"{name}/{row:07}": label for name in names for row, label in tables[name].labels.items()}
        for names in (splits.train, splits.val)
    )
    layout = tabular(origin, train, val, declared)
    key = key or stamp(root, tables)
    return Source(
        origin=origin,
        classes=layout.classes,
        train=layout.train,
        val=layout.val,
        key=key,
        notes=(*_notes(origin, tables, splits.ignored), *layout.notes),
        open=partial(_open, root, {name: table.column for name, table in tables.items()}, key),
    )


@dataclass(frozen=True)
class _Table:
    column: str
    """Of the encoded images; dots lead into a struct."""
    rows: int
    labels: dict[int, int | str]
    """By row, of those that have one."""
    declared: tuple[str, ...] | None
    """The names of the classes."""

    @staticmethod
    def read(path: Path) -> "_Table":
        """Reads the labels only."""
        try:
            with pq.ParquetFile(path) as file:
                image, label = _columns(path, file.schema_arrow)
                labels = file.read(columns=[label]).column(label)
                declared = _class_names(file.schema_arrow, label)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from None
        values = _values(path, label, labels)
        known = {row: value for row, value in enumerate(values) if value not in (None, -1)}
        return _Table(image, len(values), known, declared)


def _columns(path: Path, schema: pa.Schema) -> tuple[str, str]:
    """Returns the columns of images and of labels."""
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if image is None or label is None:
        lack, known = ("images", IMAGE_COLUMNS) if image is None else ("labels", LABEL_COLUMNS)
        raise InputError(
            f"{path} has the columns {', '.join(schema.names)}, none of {lack}: rename that to "
            f"{known[0]!r} (known: {', '.join(known)})"
        )
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return f"{image}.bytes", label
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return image, label
    raise InputError(f"{path}: column {image!r} is {kind}, not encoded images: store their files")


def _values(path: Path, name: str, column: pa.ChunkedArray) -> list[Any]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (
        pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    ):
        raise InputError(f"{path}: column {name!r} is {kind}, not one label an image: convert it")
    return column.to_pylist()


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """Returns the names that a schema declares for its labels, as `datasets` writes them."""
    if not pa.types.is_integer(schema.field(label).type):
        return None
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return tuple(map(str, names))


def _declared(root: Path, tables: dict[str, _Table]) -> tuple[str, ...] | None:
    """Returns the classes that all files declare."""
    (first, table), *others = tables.items()
    for name, other in others:
        if other.declared != table.declared:
            raise InputError(f"{root / name} declares other classes than {first}: rewrite one")
    return table.declared


def _notes(origin: str, tables: dict[str, _Table], ignored: Sequence[str]) -> list[str]:
    notes = []
    unlabelled = sum(table.rows - len(table.labels) for table in tables.values())
    if unlabelled:
        notes.append(f"{origin}: ignored {unlabelled:,} images without a label")
    if ignored:
        notes.append(
            f"{origin}: ignored {len(ignored):,} files of other splits, such as {ignored[0]}"
        )
    return notes


# The images: copied once, then read at random.


@dataclass(frozen=True)
class _Rows:
    """Reads images by "FILE/ROW"."""

    files: dict[str, Path]
    ends: dict[str, np.ndarray]
    """int64 [rows + 1], of each file."""

    def __call__(self, name: str) -> bytes:
        file, _, row = name.rpartition("/")
        start, end = self.ends[file][int(row) : int(row) + 2].tolist()
        return read_at(self.files[file], start, end - start)


def _open(root: Path, columns: dict[str, str], key: str, folder: Path) -> Reader:
    """Copies the images of each file that is not there yet: one of images, one of their ends."""
    files = {name: folder / f"{key[:16]}-{number:05}.images" for number, name in enumerate(columns)}
    for name, column in columns.items():
        if not _ends_file(files[name]).exists():
            _copy(root / name, column, files[name])
    return _Rows(files, {name: np.load(_ends_file(file)) for name, file in files.items()})


def _ends_file(images: Path) -> Path:
    """Is written last: with it, the file of images is whole."""
    return images.with_suffix(".npy")


def _copy(path: Path, column: str, target: Path) -> None:
    ends = [0]
    with atomic_write(target) as out:
        for image in _images(path, column):
            ends.append(ends[-1] + out.write(image))
    with atomic_write(_ends_file(target)) as out:
        np.save(out, np.array(ends, dtype=np.int64))


def _images(path: Path, column: str) -> Iterator[pa.Buffer | bytes]:
    """Yields the encoded images of a Parquet file, in sequence; a missing one is empty."""
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[column], use_threads=False):
                images = batch.column(0)
                for image in images.field("bytes") if "." in column else images:
                    yield image.as_buffer() or b""
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return InputError(f"{path} is damaged or no Parquet file ({reason[:100]}): download it again")
