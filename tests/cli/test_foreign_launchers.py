"""Ranks that somebody else has started: torchrun, SLURM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "PITSTOP_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def train(settings: tuple[str, ...], tmp_path: Path) -> list[str]:
    command = ["-m", "pitstop", "train", "demo", *settings, "--out", str(tmp_path / "run")]
    return [*command, "--device", "cpu"]


def slurm_step(environment: dict[str, str], *commands: list[str]) -> list[tuple[int, str, str]]:
    """Runs a task a machine, as far as SLURM's variables say; returns code, output, errors."""
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0"}
    step |= {"SLURM_STEP_NUM_TASKS": str(len(commands)), "SLURM_STEP_NODELIST": "localhost"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
    tasks = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**environment, **step, "SLURM_PROCID": str(number), "SLURM_NODEID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, command in enumerate(commands)
    ]
    said = [task.communicate(timeout=100) for task in tasks]
    return [(task.returncode, *words) for task, words in zip(tasks, said, strict=True)]


def stated(tmp_path: Path) -> dict[str, object]:
    return json.loads((tmp_path / "run" / "run.json").read_text())


@pytest.mark.slow
def test_the_tasks_of_a_slurm_step_train_together(train, environment, tmp_path):
    (zero, first, _), (other, second, _) = slurm_step(environment, train, train)
    assert (zero, other) == (0, 0)
    assert "finished at step 18" in first
    assert "finished" not in second
    assert (stated(tmp_path)["status"], stated(tmp_path)["exit_code"]) == ("finished", 0)
    assert stated(tmp_path)["circumstance"]["ranks"] == 2


def test_machines_with_different_commands_are_refused(train, environment, tmp_path):
    mistaken = [*train, "--lr", "0.3"]
    (zero, _, heard), (other, _, _) = slurm_step(environment, train, mistaken)
    assert (zero, other) == (2, 2)
    assert "rank 1 is not as rank 0: phases.0.lr" in heard
    assert "give all machines the same command" in heard
    assert not (tmp_path / "run").exists()


def test_who_is_a_rank_already_starts_none(train, environment):
    (code, _, said), _ = slurm_step(environment, [*train, "--nproc", "2"], [*train, "--nproc", "2"])
    assert code == 2
    assert said.startswith("pitstop: --nproc and --nodes start ranks, but torchrun or SLURM has")


@pytest.mark.slow
def test_torchrun_starts_ranks_too(train, environment, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([sys.executable, *torchrun, *train], env=environment, check=True, timeout=200)
    assert stated(tmp_path)["circumstance"]["ranks"] == 2
    subprocess.run([sys.executable, *torchrun, *train], env=environment, check=True, timeout=200)
