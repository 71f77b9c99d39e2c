"""The plan's error here: what `plan --machine local` says of a run, and what the run then takes.

Method. For each recipe `pitstop calibrate` measures this machine, `pitstop plan` predicts by that
alone, and `pitstop train` runs to its end. Minutes are those of the whole process: start-up,
training, evaluations, saving, pictures. The data are packed before. A machine whose speed drifts
between calibration and run is part of the error; nothing else should be running.

    python benchmarks/plan_here.py
"""

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path

import proof

DEFAULT = (proof.RECIPES / "ablation.yaml", proof.RECIPES / "against_timm.yaml")


def predicted_seconds(recipe: Path, options: tuple[object, ...], log: Path) -> float:
    """Calibrates, and returns what the plan says."""
    proof.seconds_of((*proof.PITSTOP, "calibrate", recipe, *options), log)
    command = (*proof.PITSTOP, "plan", recipe, *options, "--machine", "local", "--json")
    done = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
    return 60 * json.loads(done.stdout)["minutes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipes", nargs="+", type=Path, default=DEFAULT, help="YAML files")
    parser.add_argument("--epochs", type=float, default=3, help="of each (default 3)")
    parser.add_argument("--runs", type=int, default=3, help="of each (default 3)")
    parser.add_argument("--data", type=Path, default=proof.CIFAR10, help="what to train on")
    parser.add_argument("--out", type=Path, default=Path("runs/plan-here"))
    options = parser.parse_args()
    os.environ["PITSTOP_CACHE"] = str((options.out / "cache").resolve())
    stated = ("--data", options.data, "--set", f"epochs={options.epochs:g}")
    rows: list[proof.Result] = []
    for recipe in options.recipes:
        errors: list[float] = []
        for run in range(options.runs):
            out = options.out / f"{recipe.stem}-{run}"
            predicted = predicted_seconds(recipe, stated, out.with_suffix(".calibrate.log"))
            taken = proof.pitstop_run(recipe, out, *stated)["seconds"]
            errors.append(100 * (predicted / taken - 1))
            row = {"recipe": recipe.stem, "run": run, "predicted": predicted, "taken": taken}
            rows.append(row | {"error": errors[-1]})
            print(f"{recipe.stem}: {predicted:.0f} s predicted, {taken:.0f} s: {errors[-1]:+.1f}%")
        print(f"{recipe.stem}: median error {statistics.median(errors):+.1f}%", flush=True)
    print(json.dumps({"benchmark": "plan_here", **proof.machine(), "runs": rows}))


if __name__ == "__main__":
    main()
