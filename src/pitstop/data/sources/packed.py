"""A packed dataset as a source: its images, to be selected or divided anew and packed again.

Packing keeps them byte by byte when it is told the short side that they already have. Only the
images are taken, not their levels (smaller copies): those are made anew where they are asked for.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pitstop.data.manifest import read_manifest
from pitstop.data.packed import PackedDataset, PackedSplit, read_names
from pitstop.data.sources.base import Item, Source, constant_reader


def packed_source(path: Path) -> Source:
    """Returns the images of a packed dataset under the names that they had in its source.

    Raises:
        InputError: it is missing, unfinished or damaged.
    """
    manifest = read_manifest(path)
    dataset = PackedDataset.open(path)
    return Source(
        origin=str(path),
        classes=dataset.classes,
        train=_items(split_names(path, manifest["splits"]["train"]), dataset.train.labels),
        val=_items(split_names(path, manifest["splits"]["val"]), dataset.val.labels),
        key=dataset.digest,
        notes=(),
        open=constant_reader(_Reader(path)),
    )


def split_names(path: Path, entry: dict[str, Any]) -> pa.LargeStringArray:
    """Returns the names of a split's images by row; of its shards, only that column is read.

    Args:
        path: of the packed dataset.
        entry: the split's in its manifest.
    """
    names = [read_names(path / shard["file"], shard["rows"]) for shard in entry["shards"]]
    return pa.concat_arrays(names)


def _items(names: pa.LargeStringArray, labels: np.ndarray) -> Sequence[Item]:
    rows = _rows_by_name(names)
    return [
        Item(name, label)
        for name, label in zip(names.take(rows).to_pylist(), labels[rows].tolist(), strict=True)
    ]


def _rows_by_name(names: pa.LargeStringArray) -> pa.UInt64Array:
    return pc.sort_indices(names)  # pyright: ignore[reportAttributeAccessIssue]


class _Reader:
    """Returns the bytes of the image of a name. It travels as a path and opens where it reads."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[type["_Reader"], tuple[Path]]:
        return _Reader, (self._path,)

    def __call__(self, name: str) -> bytes:
        for split, names, rows in self._splits:
            at = bisect_left(names, name, key=lambda scalar: scalar.as_py())
            if at < len(names) and names[at].as_py() == name:
                return split.read(int(rows[at]))
        raise FileNotFoundError(f"{self._path} has no image {name}")

    @cached_property
    def _splits(self) -> list[tuple[PackedSplit, pa.LargeStringArray, np.ndarray]]:
        """Each split with its names in ascending order, and the rows in that order."""
        manifest, dataset = read_manifest(self._path), PackedDataset.open(self._path)
        splits = []
        for split, which in ((dataset.train, "train"), (dataset.val, "val")):
            names = split_names(self._path, manifest["splits"][which])
            rows = _rows_by_name(names)
            splits.append((split, names.take(rows), rows.to_numpy()))
        return splits
