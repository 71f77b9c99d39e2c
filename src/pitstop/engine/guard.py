"""What rank 0 watches over besides the training: what the run costs, and its copy in a bucket."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pitstop.core.errors import InputError
from pitstop.core.recipe import Checkpoint
from pitstop.core.safeguards import Safeguards
from pitstop.engine.outcome import BUDGET_SPENT, DIVERGED, INTERRUPTED, NOT_DURABLE, Outcome
from pitstop.io.ledger import Ledger
from pitstop.io.remote import Remote, Say
from pitstop.io.run_directory import RunDirectory
from pitstop.io.upload import Durable, Uploader
from pitstop.runtime.checkpoint import Checkpointer, Manifest

INTERRUPTED_SECONDS = 90.0
"""How long an interrupted run waits for its last upload: a spot machine ends after 120 s."""

ENDED_SECONDS = 3600.0
"""How long any other run does, if its bucket answers at all."""


class Guard:
    """The ledger of a run, and its copy in a bucket where there is one.

    Opening it makes the run directory what the newest copy is, here or there.

    Args:
        run: locked by the caller.
        asked: what for.
        starts_over: whether what the bucket holds is of a run that is given up.
        say: is told what happens to the copies.

    Raises:
        InputError: the bucket cannot be used, or the run has started in vain too often.
    """

    def __init__(
        self, run: RunDirectory, asked: Safeguards, *, starts_over: bool, say: Say
    ) -> None:
        self.run, self.asked = run, asked
        self.attempt = 0
        self._uploader: Uploader | None = None
        self._told: str | None = None
        self._durable: Durable | None = None
        self._opened = self._offered = time.monotonic()
        remote = None if asked.remote is None else Remote(asked.remote)
        if remote is not None and not starts_over:
            _restore(run, remote, say)
        self.ledger = Ledger(run.ledger)
        self._refuse_to_start_in_vain()
        if remote is not None:
            newest = _newest(run)
            above = newest.attempt if newest else 0
            self.attempt = remote.claim(starts_over=starts_over, above=above)
            self._uploader = Uploader(remote, self.attempt)

    def _refuse_to_start_in_vain(self) -> None:
        most, starts = self.asked.max_fruitless_starts, self.ledger.fruitless()
        if most is not None and starts >= most:
            raise InputError(
                f"{self.run.path}: {starts} starts in a row have saved nothing: see what stops "
                f"them, then go on with --max-fruitless-starts {starts + 1}"
            )

    def begin(
        self, step: int, *, world: int, machine: str, lost_steps: int, lost_seconds: float
    ) -> None:
        """Notes in the ledger that training begins, or goes on, after so many steps."""
        self.ledger.begin(
            step=step,
            world=world,
            machine=machine,
            price=self.asked.price,
            attempt=self.attempt,
            lost_steps=lost_steps,
            lost_seconds=lost_seconds,
        )

    def saved(self, manifest: Manifest) -> None:
        """Has the run uploaded as it stands after a save; any thread may call it."""
        self._offered = time.monotonic()
        if self._uploader is not None:
            state = self.run.checkpoints / manifest.file
            files = _files(self.run)
            needed = {state, state.with_suffix(".json"), self.run.events, self.run.ledger}
            self._uploader.offer(
                files,
                [name for name, place in files.items() if place in needed],
                sequence=manifest.sequence,
                step=manifest.step,
                epoch=manifest.epoch,
                top1=manifest.top1,
            )

    def look(self, step: int, saved_step: int) -> tuple[Durable | None, str | None]:
        """Notes in the ledger how far the run has come, and looks after the uploads.

        Returns:
            what has become durable since the last look, and a line if an upload has failed anew.

        Raises:
            InputError: another process has taken the run over.
        """
        self.ledger.alive(step, saved_step)
        if self._uploader is None:
            return None, None
        if self._uploader.superseded is not None:
            raise InputError(str(self._uploader.problem))
        durable, problem = self._uploader.durable, self._uploader.problem
        news = None if durable == self._durable else durable
        line = None if problem == self._told else problem
        self._durable, self._told = durable, problem
        return news, line

    def reason_to_stop(self) -> Outcome | None:
        """Says whether the money is spent, or nothing has been durable for too long."""
        most = self.asked.max_cost
        if most is not None and self.ledger.spent() >= most:
            return BUDGET_SPENT
        oldest = self.asked.max_durable_age
        if oldest is None or self._uploader is None:
            return None
        durable = self._uploader.durable
        since = self._opened if durable is None else durable.monotonic
        return NOT_DURABLE if time.monotonic() - since > 60 * oldest else None

    def copy_is_due(self) -> bool:
        """Says whether to save now, so that there is something newer to upload in time."""
        oldest = self.asked.max_durable_age
        if oldest is None or time.monotonic() - self._offered < 60 * oldest / 2:
            return False
        self._offered = time.monotonic()  # it will be: once is enough
        return True

    def finish(self, outcome: Outcome, step: int, saved_step: int, reason: str | None) -> Outcome:
        """Closes the ledger, and waits until the run as it stands is durable.

        Args:
            reason: the signal or notice that interrupted it.

        Returns:
            The outcome; NOT_DURABLE if an upload was asked for and did not succeed.
        """
        self.ledger.end(step, saved_step, reason or outcome.status, outcome.exit_code)
        return self.settle(outcome)

    def settle(self, outcome: Outcome) -> Outcome:
        """Waits until the run as it stands is durable; returns the outcome, as `finish` does."""
        newest = _newest(self.run)
        if self._uploader is None or newest is None or outcome == NOT_DURABLE:
            return outcome
        self.saved(newest)
        seconds = INTERRUPTED_SECONDS if outcome == INTERRUPTED else ENDED_SECONDS
        if self._uploader.wait(seconds) or outcome == DIVERGED:
            return outcome
        return NOT_DURABLE

    @property
    def durable(self) -> Durable | None:
        """The newest copy in the bucket, as far as it is of this start."""
        return self._uploader.durable if self._uploader else None

    @property
    def problem(self) -> str:
        """Why nothing became durable any more."""
        why = self._uploader.problem if self._uploader else None
        return why or f"{self.asked.remote}: does not answer in time"

    def close(self) -> None:
        """Ends the uploads."""
        if self._uploader is not None:
            self._uploader.close()

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def _newest(run: RunDirectory) -> Manifest | None:
    manifests = Checkpointer(run, Checkpoint()).manifests()
    return manifests[-1] if manifests else None


def _restore(run: RunDirectory, remote: Remote, say: Say) -> None:
    """Makes the run directory the newest snapshot, if that is newer than what is there."""
    snapshot = remote.newest(say)
    if snapshot is None:
        return
    here = Checkpointer(run, Checkpoint()).newest(say)  # whole: a damaged one is no reason to stay
    with TemporaryDirectory(prefix="pitstop-") as scratch:
        ledger = Path(scratch) / run.ledger.name
        ledger.write_bytes(run.ledger.read_bytes() if run.ledger.exists() else b"")
        age = None if here is None else (here.attempt, here.sequence)
        restored = remote.restore(snapshot, run.path, say, newer_than=age)
        if restored is None:
            return
        Ledger(run.ledger).merge(ledger)
    say(f"restored step {restored.step} from {remote.store.url_of(restored.key)}")


def _files(run: RunDirectory) -> dict[str, Path]:
    """Returns what a snapshot holds, in the order in which it is put in place: what counts last."""
    weights = sorted(run.path.glob("*.safetensors"))
    pictures = sorted(run.plots.glob("*.png"))
    others = [run.events, run.csv, run.text, run.run_json, run.ledger, run.lr_curve, run.lr_picture]
    others += sorted(run.trackers.glob("*.json"))
    manifests = Checkpointer(run, Checkpoint()).manifests()
    states = [run.checkpoints / manifest.file for manifest in manifests]
    places = [*states, *weights, *pictures, *others, *(p.with_suffix(".json") for p in states)]
    return {str(place.relative_to(run.path)): place for place in places if place.exists()}
