"""Where a process stands, as torchrun and SLURM say it."""

import pytest

from pitstop.runtime.place import PORTS, Place, first_host, is_restarted, meeting_point

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
TORCHRUN |= {"GROUP_RANK": "1"}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[003,007]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM, {**SLURM, **TORCHRUN}])
def test_a_rank_finds_its_place(environment):
    place = Place.find(environment)
    assert place == Place(rank=5, world=8, local_rank=1, local_world=4, node=1)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0"},
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_who_is_nobodys_rank_has_no_place(environment):
    assert Place.find(environment) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu003", "gpu003"),
        ("gpu[003-008,011],login", "gpu003"),
        ("a-1,b-2", "a-1"),
        ("rack1-n[7]", "rack1-n7"),
        ("n[1-2].cluster.org", "n1.cluster.org"),
        ("10.0.0.7", "10.0.0.7"),
    ],
)
def test_the_first_host_of_a_list_in_slurms_way(nodes, first):
    assert first_host(nodes) == first


def test_the_ranks_of_a_step_meet_at_its_first_machine_at_a_port_of_its_own():
    one = meeting_point(SLURM)
    assert one == meeting_point({**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert one["MASTER_ADDR"] == "gpu003"
    assert int(one["MASTER_PORT"]) in PORTS
    assert one["MASTER_PORT"] != meeting_point({**SLURM, "SLURM_STEP_ID": "1"})["MASTER_PORT"]


def test_an_address_that_is_set_stays():
    given = {"MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "1234"}
    assert meeting_point({**SLURM, **given}) == given


def test_ranks_know_whether_others_were_there_before_them():
    assert not is_restarted({})
    assert not is_restarted({"TORCHELASTIC_RESTART_COUNT": "0"})
    assert is_restarted({"TORCHELASTIC_RESTART_COUNT": "2"})
    assert is_restarted({"TORCHELASTIC_RESTART_COUNT": "0", "PITSTOP_RESTARTED": "1"})
