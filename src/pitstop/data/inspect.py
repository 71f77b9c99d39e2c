"""What a dataset holds, without decoding an image: counts, classes, sizes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pitstop.data.manifest import read_manifest
from pitstop.data.packed import map_index
from pitstop.data.sources.base import Source

PERCENTILES = (0, 5, 50, 95, 100)

FEW = 5
"""The smallest and the largest classes that are named."""

_EDGES = np.array([0, *(side * 2**k for k in range(3, 16) for side in (1.0, 1.5))], dtype=int)
"""0, 8, 12, 16, 24, 32, 48, ... pixels: two bars for each doubling."""


def describe_packed(path: Path) -> dict[str, Any]:
    """Returns what is known of a packed dataset, ready for JSON, from its manifest and its index.

    Raises:
        InputError: one of them is missing or damaged.
    """
    manifest = read_manifest(path)
    num_classes = len(manifest["classes"])
    splits = {name: _Index(path, entry, num_classes) for name, entry in manifest["splits"].items()}
    levels = {
        side: _Index(path, entry, num_classes)
        for side, entry in manifest["splits"]["train"].get("levels", {}).items()
    }
    return {
        "kind": "packed",
        "path": str(path),
        "digest": manifest["digest"],
        "made": manifest["made"],
        "skipped": manifest["skipped"],
        "converted": manifest["converted"],
        "bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        "notes": [],
        **_classes(manifest["classes"], {name: index.labels for name, index in splits.items()}),
        "splits": {name: index.describe() for name, index in splits.items()},
        "levels": {side: index.describe() for side, index in levels.items()},
    }


def describe_source(source: Source) -> dict[str, Any]:
    """Returns what the listing of a source tells, ready for JSON."""
    labels = {
        name: np.array([item.label for item in items], dtype=np.int64)
        for name, items in (("train", source.train), ("val", source.val))
    }
    return {
        "kind": "source",
        "path": source.origin,
        "notes": list(source.notes),
        **_classes(source.classes, labels),
        "splits": {name: {"images": len(of_split)} for name, of_split in labels.items()},
    }


def _classes(names: Sequence[str], labels: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the classes' names, and of each split how many images a class has."""
    counts = {split: np.bincount(found, minlength=len(names)) for split, found in labels.items()}
    return {
        "classes": list(names),
        "images_a_class": {split: _balance(names, of_class) for split, of_class in counts.items()},
    }


def _balance(names: Sequence[str], counts: np.ndarray) -> dict[str, Any]:
    order = np.argsort(counts, kind="stable")
    named = [[names[label], int(counts[label])] for label in order]
    return {
        "min": int(counts.min()),
        "median": float(np.median(counts)),
        "max": int(counts.max()),
        "fewest": named[:FEW],
        "most": named[: -FEW - 1 : -1],
    }


class _Index:
    """The index of a split or level, read whole.

    Raises:
        InputError: it is missing or damaged.
    """

    def __init__(self, path: Path, entry: dict[str, Any], num_classes: int) -> None:
        file, size = path / entry["index"]["file"], entry["index"]["bytes"]
        rows = sum(shard["rows"] for shard in entry["shards"])
        self._shards = len(entry["shards"])
        self.labels, sizes, _, self._lengths = map_index(file, size, rows, num_classes)
        self._short_sides = sizes.min(axis=1)

    def describe(self) -> dict[str, Any]:
        counts = np.histogram(self._short_sides, _EDGES)[0]
        some = np.flatnonzero(counts)
        first, last = some[0], some[-1] + 1
        return {
            "images": len(self.labels),
            "shards": self._shards,
            "bytes": int(self._lengths.sum()),
            "image_bytes": _percentiles(self._lengths),
            "short_side": _percentiles(self._short_sides),
            "short_side_histogram": {
                "edges": _EDGES[first : last + 1].tolist(),
                "images": counts[first:last].tolist(),
            },
        }


def _percentiles(values: np.ndarray) -> dict[str, int]:
    """Returns "min", "p5", "p50", "p95" and "max"."""
    names = ["min", *(f"p{percent}" for percent in PERCENTILES[1:-1]), "max"]
    found = np.percentile(values, PERCENTILES, method="nearest")
    return dict(zip(names, found.astype(int).tolist(), strict=True))
