"""Real processes, killed by real signals: the weights are those of a run that nobody killed."""

import fcntl
import functools
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pitstop.io.run_directory import RunDirectory

from .soak import MOST_LOST, Run, states_here

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


def train(
    cache: Path,
    out: Path,
    moment: str = "never",
    nth: int = 1,
    by: str = "SIGKILL",
    *,
    who: str = "0",
    nproc: int = 1,
) -> int:
    """Trains the tiny recipe on so many ranks, with a signal for `who`; see kill.py."""
    done = subprocess.run(
        [*command(cache, out, moment, nth, by, who), "--nproc", str(nproc)],
        env=environment(cache),
        capture_output=True,
        text=True,
        check=False,
    )
    expected = (0, 75, -signal.SIGKILL) if nproc == 1 else (0, 70, 75, -signal.SIGKILL)
    assert done.returncode in expected, done.stderr
    return done.returncode


def command(
    cache: Path, out: Path, moment: str = "never", nth: int = 1, by: str = "SIGKILL", who: str = "0"
) -> list[str]:
    recipe = cache / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    script = Path(__file__).with_name("kill.py")
    train = ["train", str(recipe), "--out", str(out), "--device", "cpu"]
    return [sys.executable, str(script), moment, str(nth), by, who, *train]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "PITSTOP_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


def fingerprints(out: Path) -> list[str]:
    files = [out / f"{name}.safetensors" for name in WEIGHTS]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


def newest_step(out: Path) -> int:
    newest = max(out.glob("checkpoints/*.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())["step"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory) -> Callable[[int], Path]:
    """Returns a run on so many ranks that nobody killed."""

    @functools.cache
    def whole(nproc: int) -> Path:
        out = tmp_path_factory.mktemp("whole") / "run"
        assert train(cache, out, nproc=nproc) == 0
        return out

    return whole


@pytest.fixture(scope="module")
def unkilled(whole) -> Callable[[int], list[str]]:
    """Returns the weights of a run on so many ranks that nobody killed."""
    return lambda nproc: fingerprints(whole(nproc))


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_three_signals_at_random_moments_of_one_run(cache, unkilled, tmp_path, seed):
    """Seeds 0 to 2 together strike at every kind of moment."""
    rng = random.Random(seed)
    kinds = sorted(MOMENTS)
    moments = (kinds[2 * seed], kinds[2 * seed + 1], rng.choice(kinds))
    ends = [train(cache, tmp_path / "run", m, rng.randint(1, MOMENTS[m])) for m in moments]
    assert ends.count(-signal.SIGKILL) >= 2
    assert train(cache, tmp_path / "run") == 0
    assert fingerprints(tmp_path / "run") == unkilled(1)


def test_sigterm_saves_exits_75_and_goes_on(cache, unkilled, tmp_path):
    out = tmp_path / "run"
    for moment, nth in (("step", 3), ("evaluation", 4), ("save", 2)):
        assert train(cache, out, moment, nth, by="SIGTERM") == 75
        stated = json.loads((out / "run.json").read_text())
        assert (stated["status"], stated["exit_code"]) == ("interrupted", 75)
        assert newest_step(out) == stated["step"]
    assert train(cache, out) == 0
    assert fingerprints(out) == unkilled(1)


# With a copy elsewhere


@pytest.fixture
def attacked(cache, whole, tmp_path, monkeypatch) -> Run:
    """A run with a copy in a directory, of which soak.py keeps account."""
    whole(1)
    for name, value in environment(cache).items():
        monkeypatch.setenv(name, value)
    return Run(cache / "tiny.yaml", tmp_path / "run", str(tmp_path / "copy"), random.Random(0))


def test_killed_while_it_uploads_and_while_it_restores(attacked, whole):
    """Half a file there, an empty disk here, half of what belongs on it, bit rot."""
    assert attacked.go_on("upload", 16)
    attacked.empty()
    assert attacked.go_on("restore", 16)
    assert attacked.go_on("verify", 12)
    newest = states_here(attacked.out)[-1]
    attacked.damage_here(newest, "bit flipped")
    assert attacked.go_on("snapshot", 1)
    assert not attacked.go_on()
    attacked.compare(RunDirectory(whole(1)))
    assert attacked.tally.wrong == []
    assert max(attacked.tally.lost_here) <= MOST_LOST


@pytest.mark.slow
def test_a_short_soak():
    script = Path(__file__).with_name("soak.py")
    few = ["--kills", "24", "--damages", "8", "--seed", "3", "--json"]
    done = subprocess.run(
        [sys.executable, script, *few], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tally = json.loads(done.stdout)
    assert (tally["kills_equal"], tally["recovered"]) == (24, 8)


# Three ranks


def killed_on_three_ranks(cache: Path, out: Path, rng: random.Random) -> tuple[str, int]:
    """Kills one rank, or all and the launcher, at a random moment of a run on three ranks.

    Returns:
        the moment, and the exit code.
    """
    moment = rng.choice(sorted(MOMENTS))
    ranks = range(3) if moment in ("step", "evaluation") else range(1)  # only rank 0 writes
    who = str(rng.choice(ranks)) + rng.choice(["", "-all"])
    return moment, train(cache, out, moment, rng.randint(1, 6), who=who, nproc=3)


def test_a_rank_killed_and_then_all_of_them(cache, unkilled, tmp_path):
    out = tmp_path / "run"
    assert train(cache, out, "step", 4, who="1", nproc=3) == 70
    assert train(cache, out, "evaluation", 2, who="2-all", nproc=3) == -signal.SIGKILL
    assert train(cache, out, nproc=3) == 0
    assert fingerprints(out) == unkilled(3)


@pytest.mark.slow
def test_sigterm_to_one_rank_the_launcher_or_all_saves_at_one_step(cache, unkilled, tmp_path):
    out = tmp_path / "run"
    assert train(cache, out, "step", 3, "SIGTERM", who="2", nproc=3) == 75
    first = newest_step(out)
    assert first == json.loads((out / "run.json").read_text())["step"]
    assert train(cache, out, "step", 3, "SIGTERM", who="1-launcher", nproc=3) == 75
    second = newest_step(out)
    assert train(cache, out, "evaluation", 2, "SIGTERM", who="1-all", nproc=3) == 75
    assert first < second < newest_step(out)
    assert train(cache, out, nproc=3) == 0
    assert fingerprints(out) == unkilled(3)


@pytest.mark.slow
def test_ranks_save_and_end_when_their_launcher_is_killed(cache, unkilled, tmp_path):
    out = tmp_path / "run"
    assert train(cache, out, "step", 3, "SIGKILL", who="1-launcher", nproc=3) == -signal.SIGKILL
    with (out / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as soon as rank 0 has ended
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    assert train(cache, out, nproc=3) == 0
    assert fingerprints(out) == unkilled(3)


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("places", [None, (0, 1)], ids=["c10d", "fixed places"])
def test_a_machine_is_lost_and_comes_back(cache, unkilled, tmp_path, machines, places):
    """Two machines without a common disk. The second one's power is cut, and it is started anew."""
    first, _ = machines
    meeting = ("--nodes", "2", "--rdzv-endpoint", first.address, "--max-restarts", "2")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": environment(cache)}

    def start(number: int, *strike: str | int) -> subprocess.Popen[str]:
        place = () if places is None else ("--node-rank", str(places[number]))
        own = command(cache, tmp_path / f"disk-{number}" / "run", *strike)
        return machines[number].popen(*own, *meeting, *place, **pipes)

    with start(0) as one, start(1, "step", 8, "SIGKILL", "1-all") as other:
        said, _ = other.communicate(timeout=120)
        assert other.returncode == -signal.SIGKILL, said
        with start(1) as again:
            said, _ = one.communicate(timeout=200)
            assert one.returncode == 0, said
            assert again.wait(timeout=60) == 0
    assert "resuming at step 6" in said
    assert fingerprints(tmp_path / "disk-0" / "run") == unkilled(2)
    assert not (tmp_path / "disk-1").exists()


@pytest.mark.slow
def test_ten_runs_of_three_ranks_killed_at_random(cache, unkilled, tmp_path):
    rng = random.Random(3)
    for run in range(10):
        out = tmp_path / f"run-{run}"
        ends = [killed_on_three_ranks(cache, out, rng) for _ in range(2)]
        assert any(code in (70, -signal.SIGKILL) for _, code in ends), ends
        assert train(cache, out, nproc=3) == 0
        assert fingerprints(out) == unkilled(3), ends
        print(f"run {run + 1} of 10: {ends}: bit-equal")


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
