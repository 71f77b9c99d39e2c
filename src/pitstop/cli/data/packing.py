"""Packing as all verbs do it that pack: with notes, a bar, and an end at a signal."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pitstop.cli.data.progress import image_progress
from pitstop.core.exit_codes import INTERRUPTED
from pitstop.core.machine import cores

if TYPE_CHECKING:
    from pitstop.data.convert import Settings
    from pitstop.data.pack import OnBad, PackReport
    from pitstop.data.sources.base import Source


def pack_with_progress(
    source: "Source",
    out: Path,
    settings: "Settings",
    *,
    on_bad: "OnBad" = "skip",
    workers: int | None,
    force: bool,
) -> "PackReport | None":
    """Packs a source, unless it is packed already: then returns None.

    Raises:
        typer.Exit: a signal ended it.
        InputError: as `pack_once`.
    """
    from pitstop.data.pack import PackingStoppedError, pack_once
    from pitstop.runtime.preemption import Preemption

    for note in source.notes:
        typer.echo(note, err=True)
    with Preemption() as preemption, image_progress("packing") as progress:
        try:
            return pack_once(
                source,
                out,
                short_side=settings.short_side,
                quality=settings.quality,
                levels=settings.levels,
                on_bad=on_bad,
                replace=force,
                workers=workers or cores(),
                progress=progress,
                should_stop=lambda: preemption.requested,
                say=lambda line: typer.echo(line, err=True),
            )
        except PackingStoppedError:
            typer.echo(f"stopped by {preemption.reason}: the same command goes on", err=True)
            raise typer.Exit(INTERRUPTED) from None
