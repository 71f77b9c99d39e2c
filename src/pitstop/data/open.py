"""`--data`: whatever the user names becomes an open packed dataset."""

from collections.abc import Callable
from pathlib import Path

from pitstop.core.errors import InputError
from pitstop.data.manifest import REMARKS
from pitstop.data.pack import PackReport, pack_once
from pitstop.data.packed import PackedDataset
from pitstop.data.resolve import resolve
from pitstop.data.sources.base import Source
from pitstop.io.cache import cache_directory


def open_dataset(
    spec: str,
    *,
    cache: Path | None = None,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    say: Callable[[str], None],
) -> PackedDataset:
    """Opens a dataset; a class folder or the digits are packed first, once.

    Args:
        spec: a packed directory, a class folder (layouts: `source`), or "digits"
            (a folder of that name is "./digits").
        cache: where packed datasets are kept, by name and content listing; by default
            `cache_directory()`.
        workers: threads that pack.
        progress: called with (images packed, all images).
        should_stop: asked while packing.
        say: called with lines for the user: what was held out, where it was packed, what was bad.

    Raises:
        InputError: `spec` is none of these, or is damaged, or cannot be packed.
        PackingStoppedError: `should_stop` returned True.
    """
    named = resolve(spec)
    if isinstance(named, Path):
        return PackedDataset.open(named)
    source = named
    for note in source.notes:
        say(note)
    target = (cache or cache_directory()) / f"{_name(source)}-{source.key[:16]}"
    if target.exists():
        try:
            return PackedDataset.open(target)
        except InputError as error:
            say(f"{error} (which is done now)")
    report = pack_once(
        source,
        target,
        replace=True,
        workers=workers,
        progress=progress,
        should_stop=should_stop,
        say=say,
    )
    if report is not None:
        _say_packed(report, say)
    return PackedDataset.open(target)


def _name(source: Source) -> str:
    return Path(source.origin).resolve().name[:80] or "root"


def _say_packed(report: PackReport, say: Callable[[str], None]) -> None:
    count = report.train + report.val
    say(f"packed {count:,} images ({report.val:,} for validation) into {report.path}")
    if report.converted:
        say(f"converted {len(report.converted):,} images: see {report.path / REMARKS}")
    if report.skipped:
        say(f"skipped {len(report.skipped):,} bad images: see {report.path / REMARKS}")
