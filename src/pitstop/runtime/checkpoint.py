"""Checkpoints: whole or not there, written behind the training's back.

A checkpoint is `NAME.pt` and, written after it, `NAME.json` with its size and SHA-256. Without a
manifest that matches, it does not count: a kill at any instant leaves the one before. The training
stands still only while the state is copied on the host; a thread does the rest.
"""

import io
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import save as safetensors_bytes

from pitstop.core.errors import InputError
from pitstop.core.interval import SHORTEST, optimal_interval
from pitstop.core.recipe import Checkpoint, amount_and_unit
from pitstop.core.timeline import Timeline
from pitstop.io.run_directory import RunDirectory
from pitstop.io.storage import PARTIAL, atomic_write, read_json, sha256, write_json, write_text

StateDict = dict[str, Any]

MAX_FAILURES = 2
"""Saves in a row that fail, after which a run ends: it would go on for nothing."""

MEND = "make room or mend the rights, and start it again; the checkpoints before it stand"


@dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint without opening it. `top1` is None before its evaluation."""

    step: int
    epoch: float
    top1: float | None
    file: str
    bytes: int
    sha256: str
    attempt: int = 0
    """The start of the run, as numbered by its bucket, that saved it; 0 without a bucket."""
    sequence: int = 0
    """How many the run has saved: a rollback leaves the newest with fewer steps than before."""


Restored = tuple[Manifest, StateDict]


def parse(data: bytes) -> StateDict:
    """Returns the state in a checkpoint's bytes, on the CPU."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def is_among_best(top1: float, before: Iterable[float], policy: Checkpoint) -> bool:
    """Tells whether an evaluation is one to keep, given the accuracies of those before it."""
    return sum(other >= top1 for other in before) < policy.keep_best


class SaveSchedule:
    """When to save: by the policy, and at the end of the run."""

    def __init__(self, policy: Checkpoint, timeline: Timeline) -> None:
        self._policy = policy
        self._amount, self._unit = 0, policy.every
        if policy.every == "auto":
            self._seconds = SHORTEST
        else:
            self._amount, self._unit = amount_and_unit(policy.every)
            self._seconds = 60.0 * self._amount if self._unit == "min" else math.inf
        self._epoch_ends = timeline.epoch_ends(self._amount) if self._unit == "ep" else frozenset()
        self._last = timeline.last
        self._saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Tells whether to save after `step` steps, as far as the steps decide."""
        if step == self._last or step in self._epoch_ends:
            return True
        return self._unit == "steps" and step % self._amount == 0

    def overdue(self) -> bool:
        """Tells whether to save by this process's clock."""
        return time.monotonic() - self._saved_at >= self._seconds

    def saved(self, seconds: float) -> None:
        """Notes a save, for which this process stood still for so many seconds."""
        self._saved_at = time.monotonic()
        if self._policy.every == "auto":
            self._seconds = optimal_interval(seconds, self._policy.mtbf_seconds)


class Checkpointer:
    """Saves, keeps and restores a run's checkpoints.

    Args:
        run: whose they are.
        policy: when to save and what to keep.
    """

    def __init__(self, run: RunDirectory, policy: Checkpoint) -> None:
        self._run = run
        self._policy = policy
        self._directory = run.checkpoints
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._host: Any = None
        self._failures = 0
        """Saves in a row, up to the last, that did not get to disk."""
        self.attempt = 0
        """Under which checkpoints are saved; raised to that of the newest where it is lower."""
        self.when_saved: Callable[[Manifest], None] = lambda manifest: None
        """Is told, in the thread that writes, of each checkpoint that is on disk."""
        self.rejected: str | None = None
        """Says which value of the last snapshot was not finite, when it was discarded for that."""
        self.problem: str | None = None
        """Says what kept the last save from getting to disk."""

    # Restoring

    def newest(self, say: Callable[[str], None]) -> Manifest | None:
        """Returns the newest whole checkpoint, None where there is none.

        What a kill left behind is swept, and a damaged checkpoint is removed and the one before
        taken; `say` is told so.
        """
        self.wait()
        self.rejected = None
        self._sweep(say)
        for manifest in reversed(self.manifests()):
            if _is_whole(self._directory, manifest):
                return manifest
            say(f"{self._directory / manifest.file}: is damaged; going back to the one before")
            self._remove(manifest)
        return None

    def read(self, manifest: Manifest) -> bytes:
        """Returns the bytes of a checkpoint, for `parse`."""
        return (self._directory / manifest.file).read_bytes()

    def manifests(self) -> list[Manifest]:
        """Returns the manifests, the newest last; one that cannot be read does not count."""
        read = (_read_manifest(path) for path in self._directory.glob("*.json"))
        return sorted((manifest for manifest in read if manifest is not None), key=_age)

    def _sweep(self, say: Callable[[str], None]) -> None:
        """Removes what a kill has left unfinished, and manifests that cannot be read."""
        for path in self._directory.glob("*.json"):
            if _read_manifest(path) is None:
                say(f"{path}: is damaged; going back to the one before")
                path.unlink()
        whole = {manifest.file for manifest in self.manifests()}
        for path in (*self._directory.glob("*"), *self._run.path.glob(f"*{PARTIAL}")):
            if path.suffix == PARTIAL or (path.suffix == ".pt" and path.name not in whole):
                path.unlink()

    # Saving

    def save(
        self,
        state: StateDict,
        *,
        epoch: float,
        top1: float | None,
        best: bool,
        metadata: dict[str, Any],
    ) -> float:
        """Copies the state to the host and writes it in the background.

        Args:
            state: tensors and plain data in nested containers. `step`, `model` and `ema` (None
                without one) are read here: the EMA, else the model, becomes `last.safetensors`.
            epoch: epochs done.
            top1: accuracy of the evaluation at this step in percent, None without one.
            best: whether that is the best yet: `best.safetensors` is written too.
            metadata: goes with the weights: what it takes to build and use the model.

        Returns:
            The seconds for which the training stood still.

        Raises:
            InputError: neither of the last two saves got to disk.
        """
        start = time.perf_counter()
        self.wait()
        if self.problem is not None and self._failures >= MAX_FAILURES:
            raise InputError(self.problem)
        self._host = _to_host(state, self._host)
        self._writing = self._writer.submit(self._write, epoch, top1, best, metadata)
        return time.perf_counter() - start

    def wait(self) -> None:
        """Waits until the last save is on disk, or has failed."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
            self._failures, self.problem = 0, None
        except OSError as error:
            self._failures += 1
            where = error.filename or self._directory
            self.problem = f"{where}: the checkpoint was not saved: {error.strerror}: {MEND}"

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _write(self, epoch: float, top1: float | None, best: bool, metadata: StateDict) -> None:
        step = self._host["step"]
        if (where := _not_finite(self._host)) is not None:
            self.rejected = f"{where} at step {step}"
            return
        self.rejected = None
        name = f"epoch-{epoch:07.2f}-step-{step:08d}"
        name += "" if top1 is None else f"-top1-{top1:.2f}"
        while (path := self._directory / f"{name}.pt").exists():
            name += "+"  # never write over a checkpoint that counts
        try:
            self._write_files(path, epoch, top1, best, metadata)
        except OSError:
            path.unlink(missing_ok=True)  # the disk may be full
            raise

    def _write_files(
        self, path: Path, epoch: float, top1: float | None, best: bool, metadata: StateDict
    ) -> None:
        with atomic_write(path) as file:
            _save(self._host, file)
        before = self.manifests()
        attempt, sequence = (before[-1].attempt, before[-1].sequence) if before else (0, 0)
        manifest = Manifest(
            self._host["step"],
            epoch,
            top1,
            path.name,
            path.stat().st_size,
            sha256(path),
            max(attempt, self.attempt),
            sequence + 1,
        )
        for which in ("last", "best") if best else ("last",):
            self._write_weights(which, metadata)
        write_json(path.with_suffix(".json"), asdict(manifest))  # last: from here on it counts
        self._drop_old(manifest)
        self.when_saved(manifest)

    def _write_weights(self, which: str, metadata: StateDict) -> None:
        model, ema = self._host["model"], self._host["ema"]
        files = {self._run.weights(which): model if ema is None else ema}
        if ema is not None:
            files[self._run.weights(which, raw=True)] = model
        for path, tensors in files.items():
            contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
            with atomic_write(path) as file:
                file.write(safetensors_bytes(contiguous, {"pitstop": json.dumps(metadata)}))

    def best_and_last(self) -> dict[str, Manifest]:
        """Returns the checkpoint of the highest top-1 and the latest one, as far as there are."""
        manifests = self.manifests()
        ranked = _by_accuracy(manifests)
        named = {"best": ranked[0]} if ranked else {}
        return named | ({"last": manifests[-1]} if manifests else {})

    def _drop_old(self, newest: Manifest) -> None:
        """Removes what the policy does not keep: all but the last, the best, the milestones."""
        for manifest in self.manifests():
            if manifest.step == newest.step and manifest != newest:
                self._remove(manifest)
        manifests = self.manifests()
        keep = {m.step for m in manifests[-self._policy.keep_last :]}
        keep |= {m.step for m in _by_accuracy(manifests)[: self._policy.keep_best]}
        if self._policy.keep_every is not None:
            amount, _ = amount_and_unit(self._policy.keep_every)
            reached = {int(m.epoch / amount + 1e-6): m.step for m in reversed(manifests)}
            keep |= {step for epochs, step in reached.items() if epochs > 0}
        for manifest in manifests:
            if manifest.step not in keep:
                self._remove(manifest)

    def _remove(self, manifest: Manifest) -> None:
        path = self._directory / manifest.file
        path.with_suffix(".json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _age(manifest: Manifest) -> tuple[int, int, int, bool]:
    """Returns what orders checkpoints in time; those of older versions have their steps only."""
    return manifest.attempt, manifest.sequence, manifest.step, manifest.top1 is not None


def _read_manifest(path: Path) -> Manifest | None:
    try:
        return Manifest(**read_json(path))
    except (InputError, TypeError):
        return None


def _is_whole(directory: Path, manifest: Manifest) -> bool:
    path = directory / manifest.file
    complete = path.is_file() and path.stat().st_size == manifest.bytes
    return complete and sha256(path) == manifest.sha256


def _by_accuracy(manifests: list[Manifest]) -> list[Manifest]:
    evaluated = [(manifest.top1, manifest) for manifest in manifests if manifest.top1 is not None]
    return [manifest for _, manifest in sorted(evaluated, key=lambda at: (-at[0], at[1].step))]


def _to_host(value: Any, before: Any) -> Any:
    """Returns a copy of nested containers with tensors on the host, in `before`'s memory."""
    if isinstance(value, torch.Tensor):
        fits = (
            isinstance(before, torch.Tensor)
            and before.shape == value.shape
            and before.dtype == value.dtype
            and before.stride() == value.stride()
        )
        host = before if fits else torch.empty_like(value, device="cpu", requires_grad=False)
        return host.copy_(value.detach())
    if isinstance(value, dict):
        old = before if isinstance(before, dict) else {}
        return {key: _to_host(item, old.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        old = before if isinstance(before, list | tuple) and len(before) == len(value) else value
        return type(value)(
            _to_host(item, other if old is not value else None)
            for item, other in zip(value, old, strict=True)
        )
    return value


def _save(state: StateDict, file: IO[bytes]) -> None:
    """Writes a state as torch does; raises OSError, which torch hides, where it cannot."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _not_finite(value: Any, name: str = "") -> str | None:
    """Returns the name of the first tensor with a value that is not finite."""
    if isinstance(value, torch.Tensor):
        bad = value.is_floating_point() and not bool(torch.isfinite(value).all())
        return name if bad else None
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list | tuple):
        items = enumerate(value)
    found = (_not_finite(item, f"{name}.{key}".lstrip(".")) for key, item in items)
    return next((where for where in found if where is not None), None)


def copy_checkpoint(source: Path, run: RunDirectory) -> bool:
    """Begins a run from a copy of another one's checkpoint, records and weights.

    Args:
        source: a checkpoint file, or a run directory, whose newest checkpoint is taken.
        run: the new run. If it was begun from `source` before, nothing is done.

    Returns:
        Whether it was begun now.

    Raises:
        InputError: there is no whole checkpoint at `source`, or `run` was begun otherwise.
    """
    origin = run.path / "resumed_from.txt"
    if run.events.exists() or any(run.checkpoints.glob("*.json")):
        if origin.exists() and origin.read_text() == f"{source.resolve()}\n":
            return False
        raise InputError(f"--resume {source}: {run.path} holds a run already: give another --out")
    directory = source / "checkpoints" if source.is_dir() else source.parent
    there = Checkpointer(RunDirectory(directory.parent), Checkpoint()).manifests()
    named = [m for m in there if source.is_dir() or m.file == source.name]
    whole = [manifest for manifest in named if _is_whole(directory, manifest)]
    if not whole:
        raise InputError(f"--resume {source}: no whole checkpoint there: name a run or a .pt file")
    write_text(origin, f"{source.resolve()}\n")
    records = RunDirectory(directory.parent).events
    if records.exists():
        shutil.copyfile(records, run.events)
    path = run.checkpoints / whole[-1].file
    with atomic_write(path) as file, (directory / path.name).open("rb") as original:
        shutil.copyfileobj(original, file)
    write_json(path.with_suffix(".json"), asdict(replace(whole[-1], attempt=0)))
    if whole[-1] == there[-1]:
        for weights in directory.parent.glob("*.safetensors"):
            shutil.copyfile(weights, run.path / weights.name)
    return True
