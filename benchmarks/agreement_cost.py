"""What agreement and records cost per step, on one rank and on several.

Trains ResNet-18 on the digits at 64 px, 32 images a rank, with pitstop's own command on real
processes. The time spent in the calls that let the ranks agree (`Ranks.agree`, `Ranks.begin`), that
add up and read the metrics (`Meter`, whose reading gathers those of all ranks) and that record and
show them (`Journal.trained`, `Journal.show`) is summed on rank 0 and divided by the time of
training, in which it is contained. Evaluations and saves are not counted.

    python benchmarks/agreement_cost.py      # about 8 minutes on 2 cores with bf16 instructions
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pitstop.core.recipe import parse_recipe
from pitstop.engine.journal import Journal
from pitstop.engine.meter import Meter
from pitstop.engine.resume import Wish
from pitstop.engine.run import run_training
from pitstop.io.records import read_events
from pitstop.launch.local import launch
from pitstop.runtime.place import Place, end_process
from pitstop.runtime.ranks import Ranks

PARTS = {
    "agreement": (Ranks, ("agree", "begin")),
    "metrics": (Meter, ("add", "due", "flush")),
    "records": (Journal, ("trained", "show")),
}
IMAGES_A_RANK = 32


def recipe(world: int, steps: int) -> dict[str, Any]:
    """Returns so many steps of training as plain data."""
    batch = IMAGES_A_RANK * world
    return {
        "name": "agreement",
        "data": "digits",
        "epochs": steps * batch / 1438,
        "batch_size": batch,
        "resolution": 64,
        "lr": 0.01,
        "model": "resnet18",
        "device": "cpu",
        "threads": 1,
        "checkpoint": {"every": "1000ep"},
        "eval": {"every": 1000},
    }


def timed(spent: list[float], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - started)

    return call


def run_rank(out: Path, steps: int) -> int:
    """Trains as one of the ranks; rank 0 writes the share of each part."""
    spent: dict[str, list[float]] = {part: [] for part in PARTS}
    for part, (kind, methods) in PARTS.items():
        for method in methods:
            setattr(kind, method, timed(spent[part], getattr(kind, method)))
    place = Place.find() or Place()
    wish = Wish(parse_recipe(recipe(place.world, steps), "benchmark"))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        outcome = run_training(wish, out)
    if place.rank == 0:
        events = [e for e in read_events(out / "events.jsonl") if e["kind"] == "train"]
        seconds, last = sum(event["seconds"] for event in events), events[-1]["step"]
        shares = {part: sum(calls) / seconds for part, calls in spent.items()}
        result = {"step_ms": 1000 * seconds / last, "steps": last, "shares": shares}
        out.with_suffix(".json").write_text(json.dumps(result))
    return outcome.exit_code


def measure(world: int, steps: int) -> dict[str, Any]:
    """Trains on so many ranks and returns what rank 0 wrote."""
    with TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        command = [sys.executable, __file__, "--out", str(out), "--steps", str(steps)]
        assert launch(command, nproc=world) == 0
        return json.loads(out.with_suffix(".json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="of each number of ranks (default 5)")
    parser.add_argument("--steps", type=int, default=100, help="a run (default 100)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="(default 1 2)")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out is not None:
        end_process(run_rank(options.out, options.steps))
    for world in options.ranks:
        runs = [measure(world, options.steps) for _ in range(options.runs)]
        totals = [100 * sum(run["shares"].values()) for run in runs]
        parts = {
            part: round(100 * statistics.median(run["shares"][part] for run in runs), 4)
            for part in PARTS
        }
        step_ms = statistics.median(run["step_ms"] for run in runs)
        print(
            f"{world} ranks: agreement and records take {statistics.median(totals):.3f}% of a step "
            f"of {step_ms:.1f} ms (median of {len(runs)} runs; {min(totals):.3f} to "
            f"{max(totals):.3f}): {parts}"
        )
        result = {
            "benchmark": "agreement_cost",
            "ranks": world,
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "step_ms": round(step_ms, 3),
            "percent": [round(total, 4) for total in totals],
            "parts_percent": parts,
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
