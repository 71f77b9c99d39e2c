"""What the proofs share: the images, runs that are made once, budgets of time, tables."""

import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pitstop.engine.paired import difference

RECIPES = Path(__file__).parent / "recipes"
CIFAR10 = Path(__file__).parents[2] / "shared/data/cifar10.tar.gz"
PITSTOP = (sys.executable, "-P", "-m", "pitstop")

Result = dict[str, Any]


def extracted(archive: Path, to: Path) -> Path:
    """Returns the folder that an archive of class folders holds, unpacked at the first time."""
    if not to.exists():
        unfinished = to.with_name(to.name + ".partial")
        with tarfile.open(archive) as file:
            file.extractall(unfinished, filter="data")
        unfinished.rename(to)
    folder, *others = to.iterdir()
    assert not others, f"{archive} holds more than one folder"
    return folder


def use_cores(count: int) -> None:
    """Keeps this process, and those it starts, on so many cores, and their threads to as many."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    os.environ["OMP_NUM_THREADS"] = str(count)


def seconds_of(command: Sequence[object], log: Path) -> float:
    """Runs a command to its end and returns the wall time; what it says goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("w") as file:
        code = subprocess.run(
            [*map(str, command)], stdout=file, stderr=file, check=False
        ).returncode
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        sys.exit(f"{' '.join(map(str, command))}\nended with {code}, see {log}:\n{tail}")
    return time.perf_counter() - started


def once(path: Path, make: Callable[[], Result]) -> Result:
    """Returns the result that a file holds; the first time it is made."""
    if not path.exists():
        result = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=2) + "\n")
        partial.replace(path)
    return json.loads(path.read_text())


def pitstop_run(recipe: Path, out: Path, *options: object) -> Result:
    """Trains with pitstop in a new directory; returns the last top-1 (%) and the wall time (s)."""
    command = (*PITSTOP, "train", recipe, "--out", out, "--no-resume", *options)
    seconds = seconds_of(command, out.with_suffix(".log"))
    stated = json.loads((out / "run.json").read_text())
    return {"top1": stated["metrics"]["top1"], "seconds": seconds, "epochs": stated["epochs"]}


def epochs_within(seconds: float, probes: Mapping[float, float]) -> float:
    """Returns the epochs that fit so many seconds, given the seconds of two numbers of epochs."""
    (few, short), (many, long) = sorted(probes.items())
    per_epoch = (long - short) / (many - few)
    return few + (seconds - short) / per_epoch


def table(sides: Mapping[str, Sequence[Result]]) -> str:
    """Returns a table of sides, of each its runs seed by seed; the others against the first."""
    first, *_ = sides
    lines = [
        f"| | runs | top-1 % | sd | {first} over it | 95% | epochs | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, runs in sides.items():
        top1 = [run["top1"] for run in runs]
        deviation = f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else "-"
        delta, margin = "-", "-"
        if name != first:
            found = difference([(a["top1"], b) for a, b in zip(sides[first], top1, strict=True)])
            delta = f"{found.mean:+.2f}"
            margin = f"±{found.interval[1] - found.mean:.2f}" if found.interval else "-"
        means = [statistics.fmean(run[key] for run in runs) for key in ("epochs", "seconds")]
        cells = (name, len(runs), f"{statistics.fmean(top1):.2f}", deviation, delta, margin)
        lines.append(f"| {' | '.join(map(str, cells))} | {means[0]:.2f} | {means[1]:.1f} |")
    return "\n".join(lines)


def machine() -> Result:
    """Returns what the figures depend on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        **{name: version(name) for name in ("pitstop", "torch", "timm")},
    }
