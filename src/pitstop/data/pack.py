"""Packing: a source of images becomes a packed dataset (`packed` describes it), once.

The same source gives the same bytes, whatever the number of workers. It is made in a folder beside
its place, `.NAME.packing`, and renamed when it is whole, so that nothing unfinished looks ready. A
packing that was killed goes on in that folder behind the last finished shard, if source, settings
and versions are the same.
"""

import contextlib
import csv
import errno
import fcntl
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import PIL
import simplejpeg

from pitstop import __version__
from pitstop.core.errors import InputError
from pitstop.data.convert import Settings, Split
from pitstop.data.converters import Convert, Why, converters, why_odd
from pitstop.data.manifest import (
    FORMAT,
    MANIFEST,
    REMARKS,
    VERSION,
    digest_of,
    is_packed,
    read_manifest,
)
from pitstop.data.packed import PackedDataset
from pitstop.data.shards import ShardWriter
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

OnBad = Literal["skip", "fail"]

_CANNOT_WRITE = (
    errno.EACCES,
    errno.EBUSY,
    errno.EDQUOT,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
    errno.EXDEV,
)


class PackingStoppedError(Exception):
    """`should_stop` said so. The same packing goes on behind the last finished shard."""


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
    bytes: int
    """Of all shards, levels included."""
    resumed: int
    """Images that an earlier packing, which did not finish, had done."""
    skipped: tuple[Remark, ...]
    """Bad images, left out. `remarks.csv` in `path` lists these and the converted ones."""
    converted: tuple[Remark, ...]
    """Images whose mode, format or orientation was changed; shrunk ones are not counted."""


@dataclass(frozen=True)
class _Job:
    source: Source
    settings: Settings
    shard_bytes: int
    on_bad: OnBad
    workers: int
    progress: Callable[[int, int], None] | None
    should_stop: Callable[[], bool] | None

    @property
    def key(self) -> str:
        """Changes with whatever the packed bytes depend on."""
        decides = [self.source.key, asdict(self.settings), self.shard_bytes]
        versions = [VERSION, __version__, PIL.__version__, simplejpeg.__version__]
        return sha256(json.dumps([decides, versions]).encode()).hexdigest()

    def show(self, tally: "_Tally") -> None:
        if self.progress is not None:
            self.progress(tally.done, tally.total)

    def check_stop(self) -> None:
        if self.should_stop is not None and self.should_stop():
            raise PackingStoppedError


def pack(
    source: Source,
    out: Path,
    *,
    short_side: int | None = SHORT_SIDE,
    quality: int = QUALITY,
    levels: Sequence[int] = (),
    on_bad: OnBad = "skip",
    shard_bytes: int = SHARD_BYTES,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> PackReport:
    """Packs a source into the directory `out`; a packed dataset that is there is replaced.

    What is stored of an image: see `convert`. Memory: two shards, and 0.1 GB a worker.

    Args:
        short_side: pixels, for training images; None keeps their sizes.
        quality: of the JPEGs that are written, 1 to 100.
        levels: short sides, below `short_side`, of small copies of the training images.
        on_bad: "fail" tolerates no bad image, "skip" a few.
        shard_bytes: of images, after which a shard is closed.
        workers: processes that decode and encode.
        progress: called with (images done, all images).
        should_stop: asked at each image.

    Raises:
        InputError: too many bad images, a class without any good one, a level that is no smaller
            than the images, or `out` cannot be written or holds something else.
        PackingStoppedError: `should_stop` returned True.
    """
    settings = _settings(short_side, quality, levels)
    job = _Job(source, settings, shard_bytes, on_bad, workers, progress, should_stop)
    out = _place(out)
    with _locked(out, job):
        return _pack(job, out)


def pack_once(
    source: Source,
    out: Path,
    *,
    short_side: int | None = SHORT_SIDE,
    quality: int = QUALITY,
    levels: Sequence[int] = (),
    on_bad: OnBad = "skip",
    replace: bool = False,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    say: Callable[[str], None],
) -> PackReport | None:
    """As `pack`, unless `out` is what would come of it: then returns None.

    Of several processes that call it at once, one packs and the others wait, having said so.

    Args:
        replace: another packed dataset, which is refused otherwise.
    """
    settings = _settings(short_side, quality, levels)
    job = _Job(source, settings, SHARD_BYTES, on_bad, workers, progress, should_stop)
    out = _place(out)
    with _locked(out, job, say):
        try:
            found = _made(out)
        except InputError as error:
            if not replace:
                raise InputError(f"{error}, with --force to replace what is there") from None
            found = None
        if found is not None and _as_made(job).items() <= found.items():
            _remove(_beside(out, "packing"))
            return None
        if found is not None and not replace:
            raise InputError(
                f"{out} is another packed dataset (of {found.get('source')}, {_shown(found)}): "
                "name another place, or say --force to replace it"
            )
        return _pack(job, out)


def _settings(short_side: int | None, quality: int, levels: Sequence[int]) -> Settings:
    levels = tuple(sorted(set(levels)))
    if short_side is not None and levels and levels[-1] >= short_side:
        raise InputError(
            f"level {levels[-1]} is not below the short side of {short_side}: leave it out"
        )
    return Settings(short_side, quality, levels)


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


def _place(out: Path) -> Path:
    """Returns where the dataset shall lie, which must have room beside it."""
    with _writing(out):
        out = out.resolve() if out.is_symlink() else out
        mounted = out.resolve().is_mount()
        if mounted or out.resolve() == Path.cwd():
            what = "where a disk is mounted" if mounted else "the folder that you are in"
            raise InputError(f"{out} is {what}: name a folder in it")
    return out


@contextlib.contextmanager
def _locked(out: Path, job: _Job, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds the lock of `out`, which goes with the process, however that ends."""
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        file = _beside(out, "lock").open("w")
    with file:
        while not _try_lock(file):
            if say is not None:
                say(f"another process is packing {out}: waiting for it")
                say = None
            job.check_stop()
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
    """Packs in a folder beside `out`: the dataset, the journal, and what the source unpacks."""
    if out.exists() and not is_packed(out) and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} is there and is no packed dataset: name another place")
    place, replaced = _beside(out, "packing"), _beside(out, "replaced")
    with _writing(out):
        _remove(replaced)
        _prepare(place, job.key)
        try:
            report = _write(job, place, out)
        except BaseException as error:
            kept = any((place / "journal").iterdir()) or (place / "source").exists()
            if isinstance(error, _RefusedError) or not kept:
                _remove(place)
            raise
        if out.exists():
            out.rename(replaced)
        (place / "packed").rename(out)
        sync(out.parent)
        _remove(place, replaced)
    return report


def _prepare(place: Path, key: str) -> None:
    """Makes the folders to pack in; what is there of the same packing is kept."""
    file = place / "key"
    if (place / "packed").exists() and file.exists() and file.read_text() == key:
        return
    _remove(place)
    for folder in ("packed", "journal"):
        (place / folder).mkdir(parents=True)
    write_text(file, key)


def _beside(out: Path, what: str) -> Path:
    return out.parent / f".{out.name}.{what}"


def _remove(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)


def _made(out: Path) -> dict[str, Any] | None:
    """Returns how the packed dataset that is there was made, None if none is.

    Raises:
        InputError: it is unfinished, damaged, or of another version.
    """
    if not is_packed(out):
        return None
    PackedDataset.open(out)
    return read_manifest(out)["made"]


def _as_made(job: _Job) -> dict[str, Any]:
    """Returns what a manifest says of source and settings."""
    settings = asdict(job.settings)
    return {"key": job.source.key, **settings, "levels": list(job.settings.levels)}


def _shown(made: dict[str, Any]) -> str:
    levels = ", ".join(map(str, made["levels"]))
    side = made["short_side"] or "original"
    return f"short side {side}, quality {made['quality']}" + (f", levels {levels}" * bool(levels))


# The contents: shards and their index, then remarks, then the manifest.


class _RefusedError(InputError):
    """Too many images are bad: the source must change, so nothing is kept to go on from."""


def _write(job: _Job, place: Path, out: Path) -> PackReport:
    """Writes into `place` what will be `out`."""
    folder, tally = place / "packed", _Tally(job.source)
    read = job.source.open(place / "source")
    journal, limit = place / "journal", job.shard_bytes
    with (
        ShardWriter(folder, journal, "train", job.settings.levels, limit) as train,
        ShardWriter(folder, journal, "val", (), limit) as val,
        converters(
            read, job.settings, images=tally.total, workers=job.workers, check=job.check_stop
        ) as convert,
    ):
        _write_split(job, convert, tally, train, stratified_order(job.source.train), out)
        _write_split(job, convert, tally, val, job.source.val, out)
    _refuse_bad(job, tally, out)
    splits = {"train": train.entry(), "val": val.entry()}
    classes = [_printable(name) for name in job.source.classes]
    digest = digest_of(classes, splits)
    _write_remarks(folder / REMARKS, tally)
    content = {"digest": digest, "classes": classes, "splits": splits}
    _write_manifest(folder, content | _how_made(job, tally))
    return PackReport(
        out,
        digest,
        train=splits["train"]["rows"],
        val=splits["val"]["rows"],
        bytes=train.bytes + val.bytes,
        resumed=tally.resumed,
        skipped=(*tally.skipped,),
        converted=(*tally.converted,),
    )


@dataclass
class _Tally:
    """What became of the images so far."""

    source: Source
    stored: Counter[tuple[Split, int]] = field(default_factory=Counter)
    """By split and label."""
    skipped: list[Remark] = field(default_factory=list)
    converted: list[Remark] = field(default_factory=list)
    done: int = 0
    resumed: int = 0

    @property
    def total(self) -> int:
        return len(self.source.train) + len(self.source.val)

    def too_many_bad(self, on_bad: OnBad) -> bool:
        tolerated = max(TOLERATED_FEW, TOLERATED_BAD * self.total) if on_bad == "skip" else 0
        return len(self.skipped) > tolerated

    def add(self, split: Split, item: Item, why: Why) -> None:
        """Counts an item that was done."""
        self.done += 1
        name = _printable(item.name)
        if why.bad is not None:
            self.skipped.append(Remark(split, name, why.bad))
        else:
            self.stored[split, item.label] += 1
        if why.converted is not None:
            self.converted.append(Remark(split, name, why.converted))


def _write_split(
    job: _Job,
    convert: Convert,
    tally: _Tally,
    shards: ShardWriter,
    items: Sequence[Item],
    out: Path,
) -> None:
    """Writes the shards of a split, some of which may be there."""
    for item, why in zip(items, shards.earlier(), strict=False):
        tally.add(shards.split, item, why)
    if shards.items:
        tally.resumed += shards.items
        job.show(tally)
    left = items[shards.items :]
    with contextlib.closing(convert(shards.split, left)) as results:
        for item, result in zip(left, results, strict=True):
            tally.add(shards.split, item, why_odd(result))
            shards.add(item.label, _printable(item.name), result)
            job.show(tally)
            if tally.too_many_bad(job.on_bad) and len(tally.skipped) >= GIVE_UP_AFTER:
                _refuse_bad(job, tally, out)
    shards.close()


def _refuse_bad(job: _Job, tally: _Tally, out: Path) -> None:
    origin = job.source.origin
    if tally.too_many_bad(job.on_bad):
        listed = out.parent / f"{out.name}.bad.txt"
        listed.write_text("".join(f"{name}\t{why}\n" for _, name, why in tally.skipped))
        few = ", ".join(f"{name} ({why})" for _, name, why in tally.skipped[:3])
        reason = f"{len(tally.skipped):,} of {tally.total:,} images in {origin} are bad"
        raise _RefusedError(f"{reason}, such as {few}: repair or delete those listed in {listed}")
    for label in sorted({item.label for item in job.source.train}):
        if not tally.stored["train", label]:
            name = job.source.classes[label]
            raise _RefusedError(f"{origin}: all training images of class {name} are bad: add some")
    if not any(split == "val" for split, _ in tally.stored):
        raise _RefusedError(f"{origin}: all validation images are bad: add some")


def _how_made(job: _Job, tally: _Tally) -> dict[str, Any]:
    made = {"pitstop": __version__, "source": _printable(job.source.origin), **_as_made(job)}
    converted = Counter(remark.why for remark in tally.converted)
    return {
        "made": made,
        "skipped": len(tally.skipped),
        "converted": dict(sorted(converted.items())),
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
