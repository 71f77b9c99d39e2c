"""When a command line becomes several processes, and when it is refused before that."""

import json
import sys

import pytest

from pitstop.cli import launching
from pitstop.launch.local import Nodes

HERE = {"RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in HERE:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def launched(monkeypatch) -> list[tuple]:
    """What was launched; it ends with 75."""
    calls = []

    def launch(command, **options):
        calls.append((command, options))
        return 75

    monkeypatch.setattr(launching, "launch", launch)
    return calls


def test_the_ranks_get_the_arguments_that_the_command_line_got(command, launched):
    words = ["train", "demo", "--set", "ema.half_life=7", "--out", "a run", "--nproc", "3"]
    assert command(*words).code == 75
    options = {"nproc": 3, "nodes": Nodes(), "max_restarts": 0}
    assert launched == [([*launching.RANK, *words], options)]


def test_several_machines_are_launched_with_one_rank_each_without_gpus(command, launched):
    words = ["train", "--device", "cpu", "--nodes", "2", "--node-rank", "1"]
    assert command(*words, "--rdzv-endpoint", "gpu-1:7", "--max-restarts", "4").code == 75
    options = {"nproc": 1, "nodes": Nodes(2, 1, "gpu-1:7"), "max_restarts": 4}
    assert [options for _, options in launched] == [options]


@pytest.mark.parametrize(
    ("environment", "max_restarts", "launches"),
    [
        ({}, 0, False),
        ({}, 1, True),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 1, False),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, 1, False),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 1, True),
    ],
)
def test_a_rank_and_a_process_alone_train_themselves(
    launched, monkeypatch, environment, max_restarts, launches
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code = launching.launch_ranks(
        ["train"], nproc=None, nodes=Nodes(), device="cpu", max_restarts=max_restarts
    )
    assert code == (75 if launches else None)
    assert bool(launched) is launches


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nproc", "0"], "--nproc"),
        (["--nodes", "0"], "--nodes"),
        (["--max-restarts", "-1"], "--max-restarts"),
        (["--rank-timeout", "0"], "--rank-timeout"),
        (["--nodes", "2"], "--nodes 2: give --rdzv-endpoint HOST:PORT"),
        (["--node-rank", "0"], "--node-rank and --rdzv-endpoint want --nodes"),
        (["--nodes", "2", "--rdzv-endpoint", "a", "--node-rank", "2"], "--node-rank 2: must be"),
        (["--nproc", "2", "--set", "lr=no"], "lr"),
        (["--nproc", "2", "--resume", "x", "--no-resume"], "exclude each other"),
    ],
)
def test_bad_input_is_refused_before_anything_is_launched(refused, launched, words, message):
    assert message in refused("train", "demo", *words)
    assert launched == []


def test_a_launched_rank_is_pitstop_itself(command, monkeypatch, tmp_path, capfd):
    script = tmp_path / "rank.py"
    script.write_text(
        "import json, os, sys\n"
        "if os.environ['RANK'] == '0':\n"
        "    print(json.dumps(sys.argv[1:]))\n"
        "    open(os.environ['PITSTOP_OUTCOME'], 'w').write('76')"
    )
    assert (sys.executable, "-P", "-m", "pitstop") == launching.RANK
    monkeypatch.setattr(launching, "RANK", (sys.executable, str(script)))
    said = command("train", "demo", "--nproc", "2")
    assert (said.code, said.err) == (76, "")
    assert json.loads(said.out) == ["train", "demo", "--nproc", "2"]
