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


def stated(tmp_path: Path) -> dict[str, object]:
    return json.loads((tmp_path / "run" / "run.json").read_text())


def test_the_tasks_of_a_slurm_step_train_together(train, environment, tmp_path):
    """Two machines of a task each, as far as SLURM's variables say."""
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    tasks = [
        subprocess.Popen(
            [sys.executable, *train],
            env={**environment, **step, "SLURM_PROCID": str(task), "SLURM_LOCALID": "0"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    first, second = (task.communicate(timeout=100)[0] for task in tasks)
    assert [task.returncode for task in tasks] == [0, 0]
    assert "finished at step 18" in first
    assert "finished" not in second
    assert (stated(tmp_path)["status"], stated(tmp_path)["exit_code"]) == ("finished", 0)
    assert stated(tmp_path)["circumstance"]["ranks"] == 2


@pytest.mark.slow
def test_torchrun_starts_ranks_too(train, environment, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([sys.executable, *torchrun, *train], env=environment, check=True, timeout=200)
    assert stated(tmp_path)["circumstance"]["ranks"] == 2
    subprocess.run([sys.executable, *torchrun, *train], env=environment, check=True, timeout=200)
