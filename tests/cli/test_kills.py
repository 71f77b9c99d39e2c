"""Real processes, killed by real signals: the weights are those of a run that nobody killed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

WEIGHTS = ("last", "last-raw", "best", "best-raw")
RECIPE = {
    "name": "tiny",
    "data": "digits",
    "epochs": 3,
    "batch_size": 24,
    "data_fraction": 0.1,
    "lr": 0.05,
    "lr_schedule": "onecycle",
    "threads": 1,
    "ema": {"half_life": 5},
    "model": {
        "name": "resnet18",
        "kwargs": {"layers": [1, 1, 0, 0], "channels": [8, 16, 16, 16], "drop_rate": 0.2},
    },
    "eval": {"crop_ratio": 1.0, "batch_size": 64},
    "checkpoint": {"every": "2 steps"},
    "phases": [
        {"duration": "50%", "resolution": 16, "mix": {"mixup_alpha": 0.4}, "batch_size": 36},
        {"duration": "rest", "resolution": 24, "grad_accum_steps": 2},
    ],
}
MOMENTS = {"step": 12, "evaluation": 12, "save": 6, "manifest": 6, "weights": 10, "records": 12}
"""What a process does, and the most times it is waited for before the signal."""


def train(cache: Path, out: Path, moment: str = "never", nth: int = 1, by: str = "SIGKILL") -> int:
    recipe = cache / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    script = Path(__file__).with_name("kill.py")
    done = subprocess.run(
        [sys.executable, script, moment, str(nth), by, "train", recipe, "--out", out],
        env={**os.environ, "PITSTOP_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 75, -signal.SIGKILL), done.stderr
    return done.returncode


def fingerprints(out: Path) -> list[str]:
    files = [out / f"{name}.safetensors" for name in WEIGHTS]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def unkilled(cache, tmp_path_factory) -> list[str]:
    out = tmp_path_factory.mktemp("unkilled") / "run"
    assert train(cache, out) == 0
    return fingerprints(out)


@pytest.mark.parametrize("seed", range(3))
def test_three_signals_at_random_moments_of_one_run(cache, unkilled, tmp_path, seed):
    """Seeds 0 to 2 together strike at every kind of moment."""
    rng = random.Random(seed)
    kinds = sorted(MOMENTS)
    moments = (kinds[2 * seed], kinds[2 * seed + 1], rng.choice(kinds))
    ends = [train(cache, tmp_path / "run", m, rng.randint(1, MOMENTS[m])) for m in moments]
    assert ends.count(-signal.SIGKILL) >= 2
    assert train(cache, tmp_path / "run") == 0
    assert fingerprints(tmp_path / "run") == unkilled


def test_sigterm_saves_exits_75_and_goes_on(cache, unkilled, tmp_path):
    out = tmp_path / "run"
    for moment, nth in (("step", 3), ("evaluation", 4), ("save", 2)):
        assert train(cache, out, moment, nth, by="SIGTERM") == 75
        stated = json.loads((out / "run.json").read_text())
        assert (stated["status"], stated["exit_code"]) == ("interrupted", 75)
        newest = max(out.glob("checkpoints/*.json"), key=lambda path: path.stat().st_mtime_ns)
        assert json.loads(newest.read_text())["step"] == stated["step"]
    assert train(cache, out) == 0
    assert fingerprints(out) == unkilled


@pytest.mark.slow
def test_twenty_random_sigkills_over_successive_demo_runs(tmp_path):
    """`pitstop train demo`, killed after a random share of its time, until 20 kills are done."""
    command = [Path(sys.executable).with_name("pitstop"), "train", "demo", "--out"]
    environment = {**os.environ, "PITSTOP_CACHE": str(tmp_path / "cache")}

    def whole(out: Path) -> str:
        subprocess.run([*command, out], env=environment, check=True, capture_output=True)
        return hashlib.sha256((out / "last.safetensors").read_bytes()).hexdigest()

    reference = whole(tmp_path / "unkilled")
    stated = json.loads((tmp_path / "unkilled" / "run.json").read_text())
    assert stated["status"] == "finished"
    assert stated["metrics"]["top1"] >= 97
    seconds = stated["wall_seconds"]
    rng, kills, runs = random.Random(0), 0, 0
    while kills < 20:
        runs += 1
        out = tmp_path / f"run-{runs}"
        for _ in range(min(4, 20 - kills)):
            try:
                subprocess.run(
                    [*command, out],
                    env=environment,
                    capture_output=True,
                    check=True,
                    timeout=4 + rng.uniform(0.0, 0.5) * seconds,
                )
            except subprocess.TimeoutExpired:  # run() kills with SIGKILL
                kills += 1
        assert whole(out) == reference, f"run {runs} after {kills} kills"
    print(f"{kills} SIGKILLs over {runs} runs: all bit-equal")
