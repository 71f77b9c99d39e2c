"""`pitstop train cifar` against airbench94 itself, in turn, each in a process of its own.

Both take the same JPEG files. Seconds are those of training and of the whole process, which
decodes or packs the files if nobody has before; a first pair with `--epochs 0.1` sees to that.

Usage: python benchmarks/cifar.py [--seeds 0,1,2] [--set KEY=VALUE ...] [--out DIR]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from airbench import DATA

Result = dict[str, Any]
"""seed, plain, views (percent), training_seconds, seconds."""


def airbench(data: Path, seed: int, out: Path, epochs: float | None) -> Result:
    """Trains by the bare script."""
    to = out / f"airbench-{seed}.json"
    script = Path(__file__).with_name("airbench.py")
    command = [sys.executable, script, "--data", data, "--seeds", seed, "--json", to]
    seconds = run(*command, *(() if epochs is None else ("--epochs", epochs)))
    (result,) = json.loads(to.read_text())
    return result | {"seconds": seconds}


def pitstop(data: Path, seed: int, out: Path, epochs: float | None, sets: list[str]) -> Result:
    """Trains by the recipe."""
    to = out / f"pitstop-{seed}"
    command = [Path(sys.executable).with_name("pitstop"), "train", "cifar", "--no-resume"]
    options = ["--data", data, "--seed", seed, "--out", to]
    options += [] if epochs is None else ["--epochs", epochs]
    for each in sets:
        options += ["--set", each]
    seconds = run(*command, *options)
    metrics = json.loads((to / "run.json").read_text())["metrics"]
    events = [json.loads(line) for line in (to / "events.jsonl").read_text().splitlines()]
    return {
        "seed": seed,
        "plain": metrics["top1"],
        "views": metrics["also"][0]["top1"],
        "training_seconds": sum(e["seconds"] for e in events if e["kind"] == "train"),
        "seconds": seconds,
    }


def run(*command: object) -> float:
    """Runs a command and returns its seconds."""
    started = time.perf_counter()
    subprocess.run([str(word) for word in command], check=True)
    return time.perf_counter() - started


def table(results: dict[str, list[Result]]) -> str:
    """Returns the results as Markdown, a row a run, and the means."""
    columns = ("plain", "views", "training_seconds", "seconds")
    lines = ["| who | seed | one view | six views | training, s | all, s |", "|---" * 6 + "|"]
    for who, runs in results.items():
        means = {key: statistics.mean(run[key] for run in runs) for key in columns}
        for each in (*runs, means | {"seed": "mean"}):
            plain, views, training, seconds = (each[key] for key in columns)
            figures = f"{plain:.2f} | {views:.2f} | {training:.0f} | {seconds:.0f}"
            lines.append(f"| {who} | {each['seed']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="an archive of class folders")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=float, help="of both (default: 9.9 and the recipe's)")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE for pitstop")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-cifar"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Result]] = {"airbench94": [], "pitstop": []}
    for seed in map(int, options.seeds.split(",")):
        common = (options.data, seed, options.out, options.epochs)
        results["airbench94"].append(airbench(*common))
        results["pitstop"].append(pitstop(*common, options.set))
        (options.out / "results.json").write_text(json.dumps(results, indent=2))
        print(table(results), flush=True)


if __name__ == "__main__":
    main()
