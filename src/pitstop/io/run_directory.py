"""The run directory: what a run leaves behind, and where.

run.json             status, metrics with their protocol, identity, circumstance, exit code
events.jsonl         the records: one JSON object a line; the truth
ledger.jsonl         what each start of the run cost and lost; never cut back
training_log.csv     a row an epoch
training_log.txt     the same to read
checkpoints/         *.pt, each with a *.json manifest, without which it does not count
best.safetensors     weights (the EMA's when there is one)
last.safetensors
plots/*.png
lr_find.csv          with `lr: auto`: the curve that the lr was found on
lr_find.png
trackers/*.json      with `--track`: how far each tracker has got; beside them its own files
"""

import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from pitstop.core.errors import InputError
from pitstop.io.storage import locked, read_json, write_json


@dataclass(frozen=True)
class RunDirectory:
    """The places in a run's directory."""

    path: Path

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def csv(self) -> Path:
        return self.path / "training_log.csv"

    @property
    def text(self) -> Path:
        return self.path / "training_log.txt"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def lr_curve(self) -> Path:
        return self.path / "lr_find.csv"

    @property
    def lr_picture(self) -> Path:
        return self.path / "lr_find.png"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def trackers(self) -> Path:
        return self.path / "trackers"

    def tracker(self, name: str) -> Path:
        """Returns the state file of a tracker."""
        return self.trackers / f"{name}.json"

    def weights(self, which: str, *, raw: bool = False) -> Path:
        """Returns the place of the `best` or `last` weights; `raw` are those beside the EMA's."""
        return self.path / f"{which}{'-raw' if raw else ''}.safetensors"

    @contextmanager
    def lock(self) -> Generator[None]:
        """Holds the run for this process; raises InputError if another one writes it.

        A directory that it made, and in which nothing came about, goes away with the lock.
        """
        file = self.path / ".lock"
        made_here = not self.path.exists()
        busy = "another process is writing this run: wait for it, or give another --out"
        with locked(file, f"{self.path}: {busy}"):
            try:
                yield
            finally:
                if self.path.exists() and [*self.path.iterdir()] == [file]:
                    file.unlink()
                    if made_here:
                        self.path.rmdir()

    def read(self) -> dict[str, Any] | None:
        """Returns run.json, None where there is none; a damaged one is none: it only reports."""
        try:
            return read_json(self.run_json) if self.run_json.exists() else None
        except InputError:
            return None

    def write(self, **fields: Any) -> None:
        """Updates fields of run.json."""
        before = self.read() or {}
        write_json(self.run_json, before | fields)

    def refuse_foreign(self) -> None:
        """Raises InputError when the path is a file, or a directory of something else."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: is a file, not a directory: give another --out")
        empty = not self.path.exists() or all(p.name == ".lock" for p in self.path.iterdir())
        if not empty and not self.events.exists() and not self.checkpoints.exists():
            raise InputError(f"{self.path}: is not empty and holds no run: give another --out")

    def remove(self) -> None:
        """Removes the directory and all that is in it."""
        shutil.rmtree(self.path)

    def set_aside(self) -> Path | None:
        """Moves a run that is in the way to a name with the time in it; returns where to."""
        self.refuse_foreign()
        if not self.path.exists():
            return None
        name = f"{self.path.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        aside = self.path.with_name(name)
        for other in count(2):
            if not aside.exists():
                break
            aside = self.path.with_name(f"{name}-{other}")
        self.path.rename(aside)
        return aside
