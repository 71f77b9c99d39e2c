"""Writing the shards of a split (`packed` describes them), with a journal to go on from.

A shard counts when its entry in the journal is on the disk; a packing that was killed goes on
behind the last one that counts.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa

from pitstop.data.convert import Picture, Split
from pitstop.data.converters import Converted, Result, Why, why_odd
from pitstop.data.packed import SCHEMA, write_index
from pitstop.io.storage import read_json, sync, write_json


class ShardWriter:
    """Collects rows and writes them out, a shard at a time, in a thread of its own.

    Memory: the images of two shards. A level has its own shards, of the same rows.
    """

    def __init__(
        self, folder: Path, journal: Path, split: Split, levels: Sequence[int], limit: int
    ) -> None:
        """
        Args:
            folder: of the dataset.
            journal: a folder; the shards that it names are taken as they are.
            levels: short sides of the split's small copies.
            limit: bytes of images, after which a shard is closed.
        """
        self.split: Split = split
        self._folder, self._journal, self._limit = folder, journal, limit
        self._levels = levels
        self._names = [split, *(f"{split}-{level}" for level in levels)]
        self._finished: list[dict[str, Any]] = []
        self._contents = [sha256() for _ in self._names]
        for file in sorted(journal.glob(f"{split}-*.json")):
            self._count(read_json(file))
        self._open, self._spare = (_OpenShard(len(self._names)) for _ in range(2))
        self._open.clear(self.items)
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[dict[str, Any]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown()

    @property
    def items(self) -> int:
        """How many of the split's items the finished shards cover, skipped ones included."""
        return self._finished[-1]["items"] if self._finished else 0

    @property
    def bytes(self) -> int:
        """Of the finished shards, levels included."""
        return sum(entry["bytes"] for shard in self._finished for entry in shard["shards"])

    def earlier(self) -> Iterator[Why]:
        """Yields what became of each item that the finished shards cover."""
        first = 0
        for shard in self._finished:
            bad, converted = dict(shard["bad"]), dict(shard["converted"])
            for position in range(first, shard["items"]):
                yield Why(bad.get(position), converted.get(position))
            first = shard["items"]

    def add(self, label: int, name: str, result: Result) -> None:
        """Takes what became of the next item.

        Raises:
            OSError: a shard could not be written; nothing is left of it.
        """
        self._open.add(label, name, result)
        if self._open.bytes >= self._limit:
            self._write()

    def close(self) -> None:
        """Writes what is left."""
        if self._open.labels:
            self._write()
        self._wait()

    def entry(self) -> dict[str, Any]:
        """Returns the split's entry in the manifest, having written the index.

        `content` hashes labels and images, wherever shards end.
        """
        entries = [self._entry(column) for column in range(len(self._names))]
        rows = sum(shard["rows"] for shard in entries[0]["shards"])
        levels = dict(zip(map(str, self._levels), entries[1:], strict=True))
        return {"rows": rows, **entries[0]} | ({"levels": levels} if levels else {})

    def _write(self) -> None:
        self._wait()
        full, self._open, self._spare = self._open, self._spare, self._open
        self._open.clear(full.items)
        self._writing = self._thread.submit(self._finish, len(self._finished), full)

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._count(writing.result())

    def _count(self, shard: dict[str, Any]) -> None:
        """Takes a shard's entry in the journal for finished."""
        for content, digests in zip(self._contents, shard.pop("digests"), strict=True):
            content.update(bytes.fromhex(digests))
        self._finished.append(shard)

    def _finish(self, number: int, shard: "_OpenShard") -> dict[str, Any]:
        """Writes a shard and its levels; returns its entry in the journal, which is last."""
        files = [self._folder / f"{name}-{number:05}.arrow" for name in self._names]
        try:
            entries = [shard.write(column, file) for column, file in enumerate(files)]
            sync(self._folder)
            entry = shard.journal_entry() | {"shards": entries}
            write_json(self._journal / f"{self.split}-{number:05}.json", entry)
        except OSError:
            for file in files:
                file.unlink(missing_ok=True)
            raise
        return entry

    def _entry(self, column: int) -> dict[str, Any]:
        name = self._names[column]
        shards = [shard["shards"][column] for shard in self._finished]
        index = write_index(self._folder, name, shards)
        return {"content": self._contents[column].hexdigest(), "shards": shards, "index": index}


class _OpenShard:
    """The rows of a shard that is not written yet, with a column of pictures for each level."""

    def __init__(self, columns: int) -> None:
        self._columns = [_Pictures() for _ in range(columns)]
        self.clear(0)

    def clear(self, items: int) -> None:
        """Forgets the rows. `items` is how many of the split's items there were up to here."""
        self.items = items
        self.labels: list[int] = []
        self._names: list[str] = []
        self._bad: list[tuple[int, str]] = []
        self._converted: list[tuple[int, str]] = []
        for column in self._columns:
            column.clear()

    @property
    def bytes(self) -> int:
        """Of the images, without the levels."""
        return self._columns[0].ends[-1]

    def add(self, label: int, name: str, result: Result) -> None:
        bad, converted = why_odd(result)
        if bad is not None:
            self._bad.append((self.items, bad))
        if converted is not None:
            self._converted.append((self.items, converted))
        self.items += 1
        if isinstance(result, Converted):
            self.labels.append(label)
            self._names.append(name)
            pictures, digests = result.stored.pictures, result.digests
            for column, picture, digest in zip(self._columns, pictures, digests, strict=True):
                column.add(picture, digest)

    def write(self, column: int, file: Path) -> dict[str, Any]:
        """Writes a column as a shard; returns its entry in the manifest."""
        with file.open("wb") as opened:
            sink = _Sink(opened)
            with pa.ipc.new_file(pa.PythonFile(sink, "w"), SCHEMA) as writer:
                writer.write_batch(self._batch(self._columns[column]))
            os.fsync(opened.fileno())
            checksum, size = sink.checksum.hexdigest(), opened.tell()
        return {"file": file.name, "rows": len(self.labels), "bytes": size, "sha256": checksum}

    def journal_entry(self) -> dict[str, Any]:
        return {
            "items": self.items,
            "bad": self._bad,
            "converted": self._converted,
            "digests": [column.digests.hex() for column in self._columns],
        }

    def _batch(self, column: "_Pictures") -> pa.RecordBatch:
        ends = pa.py_buffer(np.array(column.ends, dtype=np.int64))
        buffers = [None, ends, column.images]
        images = pa.Array.from_buffers(pa.large_binary(), len(self.labels), buffers)
        heights, widths = zip(*column.sizes, strict=True)
        others = [
            pa.array(values, field.type)
            for values, field in zip(
                (self.labels, heights, widths, self._names), list(SCHEMA)[1:], strict=True
            )
        ]
        return pa.record_batch([images, *others], schema=SCHEMA)


class _Pictures:
    """The pictures of a shard at one level.

    Their memory is used again for the next shard but one: what is new to a process costs more than
    what is copied into it (35 us an image against 15).
    """

    def __init__(self) -> None:
        self._memory = bytearray()
        self.clear()

    def clear(self) -> None:
        self.ends = [0]
        self.sizes: list[tuple[int, int]] = []
        """(height, width) in pixels."""
        self.digests = bytearray()

    def add(self, picture: Picture, digest: bytes) -> None:
        start, end = self.ends[-1], self.ends[-1] + len(picture.data)
        if end > len(self._memory):
            self._memory += bytes(end + end // 4 - len(self._memory))
        self._memory[start:end] = picture.data
        self.ends.append(end)
        self.sizes.append((picture.height, picture.width))
        self.digests += digest

    @property
    def images(self) -> pa.Buffer:
        """All of them, not copied."""
        return pa.py_buffer(memoryview(self._memory)[: self.ends[-1]])


class _Sink:
    """A file that is hashed while it is written."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.checksum = sha256()

    def write(self, data: pa.Buffer) -> int:
        self.checksum.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Does nothing: whoever opened the file closes it."""
