"""`pitstop verify-resume`: whether a run that is killed ends as one that nobody touches.

The oracle of exact resume: the same command trains to its end in peace, and again under SIGKILL at
random times, each time started anew. All tensors of the last checkpoint, and the ids of the images
of all steps, must be the same.
"""

import math
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pitstop.core.errors import InputError
from pitstop.core.exit_codes import FINISHED
from pitstop.core.recipe import Checkpoint
from pitstop.io.ledger import Ledger
from pitstop.io.records import Event, read_events
from pitstop.io.run_directory import RunDirectory
from pitstop.runtime.checkpoint import Checkpointer, parse

IN_START = 0.2
"""The share of kills that come before the run is opened."""

POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Verdict:
    """What came of it."""

    differences: tuple[str, ...]
    """None where the runs are equal."""
    kills: int
    """That found the run at work: it may end before the last of those planned."""
    seconds: float
    """Of the run that nobody touched, with its start."""
    seconds_killed: float
    """Of all starts of the other."""
    lost_steps: int
    """Trained again after kills."""

    @property
    def equal(self) -> bool:
        return not self.differences


def verify_resume(
    command: Sequence[str], out: Path, *, kills: int, seed: int, say: Callable[[str], None]
) -> Verdict:
    """Trains twice, in `out / "uninterrupted"` and, with kills, in `out / "killed"`.

    Args:
        command: trains; `--out DIRECTORY` is appended to it.
        kills: how many to try.
        seed: of their times.
        say: is told each.

    Raises:
        InputError: `out` is not empty, or the command does not train to its end in peace.
    """
    if shutil.which("ps") is None:
        raise InputError("ps: there is no such command here: install procps, which finds the ranks")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty: give another --out")
    whole, killed = RunDirectory(out / "uninterrupted"), RunDirectory(out / "killed")
    began = time.monotonic()
    start = _run_to_its_end(command, whole)
    seconds = time.monotonic() - began
    began = time.monotonic()
    hits = 0
    for delay in _delays(kills, random.Random(seed), start=start, work=seconds - start):
        code, _ = _run(command, killed, kill_after=delay)
        if code != -signal.SIGKILL:
            say(f"the run ended with exit code {code} before a kill after {delay:.1f} s")
            break
        hits += 1
        at = (read_events(killed.events) or [{"step": 0}])[-1]["step"]
        say(f"kill {hits} of {kills}: after {delay:.1f} s, at step {at} or a little later")
    _run_to_its_end(command, killed)
    lost_steps, _ = Ledger(killed.ledger).lost()
    seconds_killed = time.monotonic() - began
    return Verdict(tuple(differences(whole, killed)), hits, seconds, seconds_killed, lost_steps)


def _delays(kills: int, rng: random.Random, *, start: float, work: float) -> list[float]:
    """Returns the seconds from each start to its kill: so drawn that few runs end before.

    Args:
        start: seconds from the start of a process until it has opened the run.
        work: seconds from there to the end.
    """
    longest = 1.5 * work / (kills + 1)
    return [
        rng.uniform(0, start) if rng.random() < IN_START else start + rng.uniform(0, longest)
        for _ in range(kills)
    ]


def _run_to_its_end(command: Sequence[str], run: RunDirectory) -> float:
    """Returns after how many seconds the run was opened."""
    code, start = _run(command, run)
    if code != FINISHED:
        raise InputError(f"{_log(run)}: training ended with exit code {code}: mend what it says")
    return start


def _log(run: RunDirectory) -> Path:
    return run.path.with_suffix(".log")


def _run(
    command: Sequence[str], run: RunDirectory, kill_after: float = math.inf
) -> tuple[int, float]:
    """Runs a command for a run; kills it, and all that it started, after so many seconds.

    Returns:
        The exit code, and after how many seconds the run was opened.
    """
    run.path.parent.mkdir(parents=True, exist_ok=True)
    began, opened = time.monotonic(), 0.0
    with _log(run).open("ab") as log:
        process = subprocess.Popen(
            [*command, "--out", str(run.path)],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while process.poll() is None:
            passed = time.monotonic() - began
            opened = opened or (passed if run.events.exists() else 0.0)
            if passed > kill_after:
                break
            time.sleep(POLL_SECONDS)
    finally:
        if process.poll() is None:
            _kill(process)
    return process.wait(), opened


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and its descendants at once; they may be in sessions of their own."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    )
    children: dict[int, list[int]] = {}
    for line in listed.stdout.splitlines():
        pid, parent = map(int, line.split())
        children.setdefault(parent, []).append(pid)
    family = [process.pid]
    for pid in family:
        family += children.get(pid, [])
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def differences(one: RunDirectory, other: RunDirectory) -> list[str]:
    """Returns in what two runs differ: ids of the images, tensors, accuracies; a line each."""
    lines: list[str] = []
    for what, of in (("steps trained", _steps), ("ids of the images", _ids), ("top1", _top1)):
        if (a := of(one)) != (b := of(other)):
            lines.append(f"{what}: {a} and {b}")
    tensors = unequal(_last_state(one), _last_state(other))
    return lines + [f"{name} differs" for name in tensors]


def _trained(run: RunDirectory) -> list[Event]:
    return [event for event in read_events(run.events) if event["kind"] == "train"]


def _steps(run: RunDirectory) -> list[int]:
    """Returns the first step and the end of each stretch of steps that are recorded."""
    ends: list[int] = []
    for event in _trained(run):
        if ends and ends[-1] == event["first"]:
            ends.pop()
        else:
            ends.append(event["first"])
        ends.append(event["step"])
    return ends


def _ids(run: RunDirectory) -> int:
    return sum(event["ids"] for event in _trained(run))


def _top1(run: RunDirectory) -> dict[int, float]:
    return {e["step"]: e["top1"] for e in read_events(run.events) if e["kind"] == "val"}


def _last_state(run: RunDirectory) -> dict[str, Any]:
    checkpointer = Checkpointer(run, Checkpoint())
    return parse(checkpointer.read(checkpointer.manifests()[-1]))


def unequal(one: Any, other: Any, name: str = "") -> list[str]:
    """Returns the names of what is not equal, bit by bit, in nested containers of tensors."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return [] if same and _bits(one).equal(_bits(other)) else [name]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(key, one[key], other[key]) for key in one]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [name]
        pairs = [(i, a, b) for i, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        return [] if type(one) is type(other) and one == other else [name]
    return [line for key, a, b in pairs for line in unequal(a, b, f"{name}.{key}".lstrip("."))]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor's bytes: a NaN is equal to itself, and 0 is not -0."""
    return tensor.contiguous().flatten().view(torch.uint8)
