"""Images that lie at known places in files: an index of them is a reader."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pitstop.data.sources.base import name_hash


class Span(NamedTuple):
    """Where an image lies."""

    name: str
    file: int
    """Which of the files."""
    offset: int
    size: int


@dataclass(frozen=True)
class Spans:
    """Reads images by name. 32 bytes an image: names are known by their hashes."""

    files: tuple[Path, ...]
    hashes: np.ndarray
    """uint64 [N], sorted."""
    where: np.ndarray
    """int64 [N, 3]: file, offset and size of each."""

    def __call__(self, name: str) -> bytes:
        row = int(np.searchsorted(self.hashes, np.uint64(name_hash(name))))
        file, offset, size = self.where[row].tolist()
        return read_at(self.files[file], offset, size)


def index_spans(files: Sequence[Path], spans: Sequence[Span]) -> Spans:
    """Returns the reader of images of different names."""
    hashes = np.array([name_hash(span.name) for span in spans], dtype=np.uint64)
    where = np.array([span[1:] for span in spans], dtype=np.int64).reshape(-1, 3)
    order = np.argsort(hashes)
    hashes = hashes[order]
    assert (hashes[1:] != hashes[:-1]).all(), "two images of one name"
    return Spans(tuple(files), hashes, where[order])


def read_at(file: Path, offset: int, size: int) -> bytes:
    """Returns `size` bytes of a file; raises OSError if it is shorter."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        data = os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
    if len(data) < size:
        raise OSError(f"{file} ends before byte {offset + size:,}")
    return data
