"""Packing: a source of images becomes a packed dataset (`packed` describes it), once.

The same source gives the same bytes, whatever the number of workers. A packing that is killed
leaves nothing that looks ready, and the next one sweeps what it left.
"""

import contextlib
import csv
import errno
import fcntl
import json
import shutil
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from pitstop import __version__
from pitstop.core.errors import InputError
from pitstop.data.convert import Split, Stored, convert, why_bad
from pitstop.data.manifest import FORMAT, MANIFEST, VERSION, is_packed
from pitstop.data.packed import REMARKS, SCHEMA, PackedDataset, write_index
from pitstop.data.sources.base import Item, Source, name_hash
from pitstop.io.storage import sync, write_text

SHORT_SIDE = 400
"""Pixels. The accuracy cost of storing less, such as 256, was not measured by anybody here."""

QUALITY = 90

SHARD_BYTES = 128 * 2**20
"""ImageNet at the default short side is some 550 shards, and each stays open while training."""

TOLERATED_BAD = 0.001
"""Bad images up to this part of all, or a few, are skipped and listed; more are refused."""

TOLERATED_FEW = 3

GIVE_UP_AFTER = 1000
"""A packing that will be refused goes on to list all bad images, but not more than these."""

_CANNOT_WRITE = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)

T = TypeVar("T")
R = TypeVar("R")


class PackingStoppedError(Exception):
    """`should_stop` said so. Nothing was packed, and nothing is left behind."""


class Remark(NamedTuple):
    """An image that was not taken as it is."""

    split: Split
    name: str
    why: str


@dataclass(frozen=True)
class PackReport:
    """What came of a packing."""

    path: Path
    digest: str
    train: int
    """Images in the split."""
    val: int
    skipped: tuple[Remark, ...]
    """Bad images, left out. `remarks.csv` in `path` lists these and the converted ones."""
    converted: tuple[Remark, ...]
    """Images whose mode, format or orientation was changed; shrunk ones are not counted."""


@dataclass(frozen=True)
class _Job:
    source: Source
    short_side: int | None
    quality: int
    shard_bytes: int
    workers: int
    progress: Callable[[int, int], None] | None
    should_stop: Callable[[], bool] | None


def pack(
    source: Source,
    out: Path,
    *,
    short_side: int | None = SHORT_SIDE,
    quality: int = QUALITY,
    shard_bytes: int = SHARD_BYTES,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> PackReport:
    """Packs a source into the directory `out`; a packed dataset that is there is replaced.

    What is stored of an image: see `convert`. Memory: about one shard and a few images a worker.

    Args:
        short_side: pixels, for training images; None keeps their sizes.
        quality: of the JPEGs that are written, 1 to 100.
        shard_bytes: of images, after which a shard is closed.
        workers: threads that decode and encode.
        progress: called with (images done, all images).
        should_stop: asked at each image.

    Raises:
        InputError: too many bad images, a class without any good one, or `out` cannot be written
            or holds something else.
        PackingStoppedError: `should_stop` returned True.
    """
    job = _Job(source, short_side, quality, shard_bytes, workers, progress, should_stop)
    with _locked(out, should_stop):
        return _pack(job, out)


def pack_once(
    source: Source,
    out: Path,
    *,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    say: Callable[[str], None],
) -> PackReport | None:
    """As `pack`, with its defaults, unless `out` is a whole packed dataset: then returns None.

    Of several processes that call it at once, one packs and the others wait, having said so.
    """
    job = _Job(source, SHORT_SIDE, QUALITY, SHARD_BYTES, workers, progress, should_stop)
    with _locked(out, should_stop, say):
        return None if _is_whole(out) else _pack(job, out)


def stratified_order(items: Sequence[Item]) -> list[Item]:
    """Returns the items in a fixed, random-looking order of which every prefix is stratified.

    Where n_c of n images are of class c, out of C, the first k have k n_c / n of them, give or take
    1/2 + C n_c / 2n. The order depends on names and labels only.
    """
    labels = np.array([item.label for item in items])
    hashes = np.array([name_hash(item.name) for item in items], dtype=np.uint64)
    by_class = np.lexsort((hashes, labels))
    counts = np.bincount(labels)
    rank_in_class = np.arange(len(items)) - np.repeat(np.cumsum(counts) - counts, counts)
    position = np.empty(len(items))
    position[by_class] = (rank_in_class + 0.5) / np.repeat(counts, counts)
    return [items[row] for row in np.lexsort((hashes, position))]


# Under a lock, beside its place, renamed when whole.


@contextlib.contextmanager
def _locked(
    out: Path,
    should_stop: Callable[[], bool] | None,
    say: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Holds the lock of `out`, which goes with the process, however that ends."""
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        file = _beside(out, "lock").open("w")
    with file:
        while not _try_lock(file):
            if say is not None:
                say(f"another process is packing {out}: waiting for it")
                say = None
            _check_stop(should_stop)
            time.sleep(0.1)
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        reason = f"{file.name} cannot be locked ({error.strerror})"
        raise InputError(f"{reason}: put the packed dataset on a local disk") from error
    return True


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        fix = "free some space, or name another place (PITSTOP_CACHE is where packing goes)"
        raise InputError(f"{out} cannot be written ({error.strerror}): {fix}") from error


def _pack(job: _Job, out: Path) -> PackReport:
    if out.exists() and not is_packed(out) and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} is there and is no packed dataset: name another place")
    temporary, replaced = _beside(out, "packing"), _beside(out, "replaced")
    with _writing(out):
        try:
            _remove(temporary, replaced)
            temporary.mkdir()
            report = _write(job, temporary, out)
            if out.exists():
                out.rename(replaced)
            temporary.rename(out)
            sync(out.parent)
        finally:
            _remove(temporary, replaced)
    return report


def _beside(out: Path, what: str) -> Path:
    return out.parent / f".{out.name}.{what}"


def _remove(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)


def _is_whole(out: Path) -> bool:
    try:
        PackedDataset.open(out)
    except InputError:
        return False
    return True


def _check_stop(should_stop: Callable[[], bool] | None) -> None:
    if should_stop is not None and should_stop():
        raise PackingStoppedError


# The contents: shards, then remarks, then the manifest.


def _write(job: _Job, folder: Path, out: Path) -> PackReport:
    """Writes a packed dataset into `folder`, which will be `out`."""
    tally = _Tally(job.source)
    splits = {
        "train": _write_split(job, tally, folder, "train", stratified_order(job.source.train)),
        "val": _write_split(job, tally, folder, "val", job.source.val),
    }
    _refuse_bad(tally, out)
    classes = [_printable(name) for name in job.source.classes]
    digest = _digest(classes, splits)
    _write_remarks(folder / REMARKS, tally)
    content = {"digest": digest, "classes": classes, "splits": splits}
    _write_manifest(folder, content | _how_made(job, tally))
    rows = {split: tally.rows(split) for split in ("train", "val")}
    return PackReport(out, digest, **rows, skipped=(*tally.skipped,), converted=(*tally.converted,))


@dataclass
class _Tally:
    """What became of the images so far."""

    source: Source
    stored: Counter[tuple[Split, int]] = field(default_factory=Counter)
    """By split and label."""
    skipped: list[Remark] = field(default_factory=list)
    converted: list[Remark] = field(default_factory=list)
    done: int = 0

    @property
    def total(self) -> int:
        return len(self.source.train) + len(self.source.val)

    @property
    def too_many_bad(self) -> bool:
        return len(self.skipped) > max(TOLERATED_FEW, TOLERATED_BAD * self.total)

    def rows(self, split: Split) -> int:
        return sum(self.stored[split, label] for label in range(len(self.source.classes)))

    def add(self, split: Split, item: Item, result: Stored | str) -> None:
        name = _printable(item.name)
        self.done += 1
        if isinstance(result, str):
            self.skipped.append(Remark(split, name, result))
            return
        self.stored[split, item.label] += 1
        if result.converted is not None:
            self.converted.append(Remark(split, name, result.converted))


def _digest(classes: Sequence[str], splits: dict[str, dict[str, Any]]) -> str:
    """Depends on what training sees only, not on how Arrow lays it out or where shards end."""
    content = {split: [entry["rows"], entry["content"]] for split, entry in splits.items()}
    return sha256(json.dumps([classes, content]).encode()).hexdigest()


def _write_split(
    job: _Job, tally: _Tally, folder: Path, split: Split, items: Sequence[Item]
) -> dict[str, Any]:
    """Returns the manifest's entry of the split."""
    read = job.source.open(folder / "source")

    def converted(item: Item) -> Stored | str:
        try:
            data = read(item.name)
            return convert(data, split, job.short_side, job.quality)
        except Exception as error:  # decoders raise nearly anything
            return why_bad(error)

    shards = _Shards(folder, split, job.shard_bytes)
    with _quiet_pillow(), contextlib.closing(_mapped(converted, items, job.workers)) as results:
        for item, result in zip(items, results, strict=False):
            tally.add(split, item, result)
            if isinstance(result, Stored):
                shards.add(item, result)
            if job.progress is not None:
                job.progress(tally.done, tally.total)
            _check_stop(job.should_stop)
            if tally.too_many_bad and len(tally.skipped) >= GIVE_UP_AFTER:
                break
    return shards.close()


def _mapped(
    function: Callable[[T], R], items: Sequence[T], workers: int
) -> Generator[R, None, None]:
    """Yields function(item) in order, computed by threads that keep a few items ahead."""
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Mutes warnings about odd metadata and large images; what matters is raised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


class _Shards:
    """Collects rows and writes them out, a shard at a time."""

    def __init__(self, folder: Path, split: Split, limit: int) -> None:
        self._folder, self._split, self._limit = folder, split, limit
        self._written: list[dict[str, Any]] = []
        self._content = sha256()
        self._clear()

    def add(self, item: Item, stored: Stored) -> None:
        self._content.update(b"%d %d " % (item.label, len(stored.image)))
        self._content.update(stored.image)
        self._images += stored.image
        self._ends.append(len(self._images))
        self._rows.append((item.label, stored.height, stored.width, _printable(item.name)))
        if len(self._images) >= self._limit:
            self._flush()

    def close(self) -> dict[str, Any]:
        """Returns the manifest's entry: rows, a hash of the labels and images, and the shards."""
        if self._rows:
            self._flush()
        rows = sum(shard["rows"] for shard in self._written)
        index = write_index(self._folder, self._split, self._written)
        content = self._content.hexdigest()
        return {"rows": rows, "content": content, "shards": self._written, "index": index}

    def _clear(self) -> None:
        self._images = bytearray()
        self._ends = [0]
        self._rows: list[tuple[int, int, int, str]] = []

    def _flush(self) -> None:
        file = self._folder / f"{self._split}-{len(self._written):05}.arrow"
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_batch(self._batch())
        sync(file)
        with file.open("rb") as stream:
            checksum = file_digest(stream, "sha256").hexdigest()
        size = file.stat().st_size
        entry = {"file": file.name, "rows": len(self._rows), "bytes": size, "sha256": checksum}
        self._written.append(entry)
        self._clear()

    def _batch(self) -> pa.RecordBatch:
        ends = pa.py_buffer(np.array(self._ends, dtype=np.int64))
        buffers = [None, ends, pa.py_buffer(self._images)]  # the images are not copied
        images = pa.Array.from_buffers(pa.large_binary(), len(self._rows), buffers)
        columns = zip(*self._rows, strict=True)
        others = [
            pa.array(column, field.type)
            for column, field in zip(columns, list(SCHEMA)[1:], strict=True)
        ]
        return pa.record_batch([images, *others], schema=SCHEMA)


def _refuse_bad(tally: _Tally, out: Path) -> None:
    origin = tally.source.origin
    if tally.too_many_bad:
        listed = out.parent / f"{out.name}.bad.txt"
        listed.write_text("".join(f"{name}\t{why}\n" for _, name, why in tally.skipped))
        few = ", ".join(f"{name} ({why})" for _, name, why in tally.skipped[:3])
        reason = f"{len(tally.skipped):,} of {tally.total:,} images in {origin} are bad"
        raise InputError(f"{reason}, such as {few}: repair or delete those listed in {listed}")
    for label, name in enumerate(tally.source.classes):
        if not tally.stored["train", label]:
            raise InputError(f"{origin}: all training images of class {name} are bad: add some")
    if not tally.rows("val"):
        raise InputError(f"{origin}: all validation images are bad: add some")


def _how_made(job: _Job, tally: _Tally) -> dict[str, Any]:
    return {
        "made": {
            "pitstop": __version__,
            "source": _printable(job.source.origin),
            "short_side": job.short_side,
            "quality": job.quality,
        },
        "skipped": len(tally.skipped),
        "converted": dict(sorted(Counter(remark.why for remark in tally.converted).items())),
    }


def _write_remarks(file: Path, tally: _Tally) -> None:
    with file.open("w", newline="") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(("split", "name", "action", "why"))
        for action, remarks in (("skipped", tally.skipped), ("converted", tally.converted)):
            rows.writerows((split, name, action, why) for split, name, why in remarks)
    sync(file)


def _write_manifest(folder: Path, entries: dict[str, Any]) -> None:
    """Writes the manifest, whole or not at all, when all other files are on the disk."""
    sync(folder)
    text = json.dumps({"format": FORMAT, "version": VERSION, **entries}, indent=1)
    write_text(folder / MANIFEST, text + "\n")


def _printable(name: str) -> str:
    """File names are bytes; those that are not UTF-8 are shown escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
