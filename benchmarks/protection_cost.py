"""What protection costs: all that a step of training does so that nothing is lost.

Trains ResNet-18 on the digits at 64 px, 128 images a step, for about a minute as `pitstop train`
does, a copy in a directory (`--remote`), a price and a limit, and `checkpoint.every: auto`. The
time of the main thread in these calls is summed and divided by that of training and saving, in
which it is contained:

    agreement  Ranks.agree, Ranks.begin: one decision of all ranks
    stops      Journal.reason_to_stop: divergence, money, age of the last durable copy
    norms      the norm of each layer's gradient, inside the step
    metrics    Meter.add, due, flush: sums, fingerprint of the images; reading them
    records    Journal.trained, show: events.jsonl, the ledger, news of the uploads, the display
    saves      Journal.save: fsync of the records, copy of the state

What threads do meanwhile (writing, uploading) is not in it. A second training tells what the norms
add to a step another way: every other step, by turns the first or the second of a pair, goes
without them, and the median of the pairs' ratios is taken.

    python benchmarks/protection_cost.py      # about 6 minutes on 2 cores
    python benchmarks/protection_cost.py --batch-size 32 --steps 500

The norms read all gradients once, however large the batch: with small batches they count for more.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from agreement_cost import timed
from pitstop.core.recipe import parse_recipe
from pitstop.core.safeguards import Safeguards
from pitstop.engine import step, train
from pitstop.engine.journal import Journal
from pitstop.engine.meter import Meter
from pitstop.engine.resume import Wish
from pitstop.engine.run import run_training
from pitstop.io.records import read_events
from pitstop.runtime.ranks import Ranks

CALLS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "agreement": (Ranks, ("agree", "begin")),
    "stops": (Journal, ("reason_to_stop",)),
    "norms": (step, ("_grad_norms",)),
    "metrics": (Meter, ("add", "due", "flush")),
    "records": (Journal, ("trained", "show")),
    "saves": (Journal, ("save",)),
}
IMAGES = 1438
WARM_UP = 5
"""Pairs that do not count."""


def recipe(steps: int, batch: int) -> dict[str, Any]:
    """Returns so many steps of training as plain data."""
    return {
        "name": "protection",
        "data": "digits",
        "epochs": steps * batch / IMAGES,
        "batch_size": batch,
        "resolution": 64,
        "lr": 0.01,
        "model": "resnet18",
        "ema": {},
        "device": "cpu",
        "threads": 1,
        "eval": {"every": 1000},
        "checkpoint": {"every": "auto"},
    }


def train_once(out: Path, steps: int, batch: int) -> None:
    """Trains in this process, and says nothing."""
    asked = Safeguards(
        remote=str(out.with_name("copy")), max_durable_age=600, price=1.0, max_cost=1000.0
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        outcome = run_training(
            Wish(parse_recipe(recipe(steps, batch), "benchmark")), out, safeguards=asked
        )
    assert outcome.exit_code == 0


def shares(out: Path, steps: int, batch: int) -> dict[str, Any]:
    """Trains and returns what share of the time went where."""
    spent: dict[str, list[float]] = {part: [] for part in CALLS}
    for part, (owner, names) in CALLS.items():
        for name in names:
            setattr(owner, name, timed(spent[part], getattr(owner, name)))
    train_once(out, steps, batch)
    events = read_events(out / "events.jsonl")
    trained = sum(event["seconds"] for event in events if event["kind"] == "train")
    seconds = trained + sum(spent["saves"])
    return {
        "step_ms": 1000 * trained / steps,
        "seconds": seconds,
        "saves": len(spent["saves"]),
        "copies": sum(event["kind"] == "durable" for event in events),
        "percent": {part: 100 * sum(calls) / seconds for part, calls in spent.items()},
    }


def ratios(out: Path, steps: int, batch: int) -> dict[str, Any]:
    """Trains and returns, pair by pair, a step's time with the norms over that without."""
    with_norms, one_step = step._grad_norms, train.train_step
    times: list[float] = []

    def without_norms(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        return torch.zeros(len(parameters))

    def alternating(*args: Any) -> Any:
        at = len(times)
        step._grad_norms = with_norms if has_norms(at) else without_norms
        started = time.perf_counter()
        result = one_step(*args)
        times.append(time.perf_counter() - started)
        return result

    train.train_step = alternating
    train_once(out, steps, batch)
    pairs = [(at, at + 1) if has_norms(at) else (at + 1, at) for at in range(0, len(times) - 1, 2)]
    return {"ratios": [times[a] / times[b] for a, b in pairs[WARM_UP:]]}


def has_norms(at: int) -> bool:
    """Tells whether the step of this number is one with norms: by turns the first of a pair."""
    return at % 4 in (0, 3)


def measure(what: str, steps: int, batch: int) -> dict[str, Any]:
    """Measures in a process of its own."""
    with TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        sizes = ["--steps", str(steps), "--batch-size", str(batch)]
        command = [sys.executable, __file__, "--what", what, "--out", str(out), *sizes]
        subprocess.run(command, check=True)
        return json.loads(out.with_suffix(".json").read_text())


def report(runs: list[dict[str, Any]], pairs: list[float], batch: int) -> None:
    """Prints the result as Markdown, and again as JSON."""
    totals = [sum(run["percent"].values()) for run in runs]
    parts = {part: median(run["percent"][part] for run in runs) for part in CALLS}
    step_ms = median(run["step_ms"] for run in runs)
    seconds = median(run["seconds"] for run in runs)
    added = 100 * (median(pairs) - 1)
    print(
        f"protection: {median(totals):.2f}% of a training of {seconds:.0f} s, with steps of "
        f"{batch} images in {step_ms:.1f} ms and {runs[0]['saves']} saves (median of "
        f"{len(runs)} runs; {min(totals):.2f} to {max(totals):.2f})\n\n"
        f"| {' | '.join(parts)} | all |\n|{'---|' * (1 + len(parts))}\n"
        f"| {' | '.join(f'{share:.3f}%' for share in parts.values())} | {median(totals):.2f}% |\n\n"
        f"with the norms a step takes {added:+.2f}% (median of {len(pairs)} pairs)\n"
    )
    result = {
        "benchmark": "protection_cost",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "batch_size": batch,
        "step_ms": round(step_ms, 3),
        "percent": [round(total, 4) for total in totals],
        "parts_percent": {part: round(share, 4) for part, share in parts.items()},
        "saves": [run["saves"] for run in runs],
        "copies": [run["copies"] for run in runs],
        "norms_add_percent": round(added, 3),
        "pairs": len(pairs),
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="(default 3)")
    parser.add_argument("--steps", type=int, default=80, help="a run (default 80)")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step (default 128)")
    parser.add_argument("--what", choices=["shares", "ratios"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what is not None:
        sizes = options.out, options.steps, options.batch_size
        result = {"shares": shares, "ratios": ratios}[options.what](*sizes)
        options.out.with_suffix(".json").write_text(json.dumps(result))
        return
    runs = [measure("shares", options.steps, options.batch_size) for _ in range(options.runs)]
    pairs = measure("ratios", options.steps, options.batch_size)
    report(runs, pairs["ratios"], options.batch_size)


if __name__ == "__main__":
    main()
