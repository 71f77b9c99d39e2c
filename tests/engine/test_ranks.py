"""Several ranks do what one would: real processes over gloo."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pitstop.core.recipe import parse_recipe
from pitstop.data.packed import PackedDataset
from pitstop.engine.state import TrainState
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Decision

CPU = Device.choose("fp32", compile=False)
RECIPE = {
    "epochs": 1,
    "model": {"name": "resnet18", "kwargs": {"layers": [1, 1, 0, 0], "channels": [8] * 4}},
}

OnRanks = Callable[[int, str], list[Any]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(world: int, packed: Path, out: Path, *tasks: str) -> list[dict[str, Any]]:
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": str(world)}
    script = Path(__file__).with_name("as_rank.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, packed, out, *tasks],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    assert [process.wait(timeout=200) for process in processes] == [0] * world
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def on_ranks(digits: PackedDataset, tmp_path_factory: pytest.TempPathFactory) -> OnRanks:
    """Returns what a task of as_rank.py returned on each of so many ranks."""
    worlds: dict[int, list[dict[str, Any]]] = {}

    def on_ranks(world: int, task: str) -> list[Any]:
        if world not in worlds:
            worlds[world] = run(world, digits.path, tmp_path_factory.mktemp(f"{world}-ranks"))
        return [results[task] for results in worlds[world]]

    return on_ranks


@pytest.mark.parametrize("world", [2, 3])
def test_gradients_of_uneven_ranks_are_those_of_one(on_ranks: OnRanks, world: int):
    (alone,), together = on_ranks(1, "gradients"), on_ranks(world, "gradients")
    for state in together:
        for key, value in alone.items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-6)
            assert torch.equal(state[key], together[0][key]), key


def test_gradients_meet_once_a_step_under_accumulation(on_ranks: OnRanks):
    for log in on_ranks(2, "syncs"):
        assert log[0] == "bucket"  # of the pass that is thrown away
        assert log[log.index("step") :] == ["step", "bucket"] * 3


def test_the_statistics_of_rank_0_are_the_statistics(on_ranks: OnRanks):
    (own, taken, weight), (others, taken_there, weight_there) = on_ranks(2, "statistics")
    assert not torch.equal(own, others)
    assert torch.equal(taken, own)
    assert torch.equal(taken_there, own)
    assert torch.equal(weight, weight_there)


def test_all_begin_with_the_weights_and_statistics_of_rank_0(on_ranks: OnRanks):
    first, second = on_ranks(2, "begins_as_main")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_an_evaluation_is_the_same_on_any_number_of_ranks(on_ranks: OnRanks, digits):
    assert len(digits.val) % 2 == 1
    (alone,) = on_ranks(1, "evaluation")
    for world in (2, 3):
        for results in on_ranks(world, "evaluation"):
            assert len(results) == len(alone) == 2
            for result, expected in zip(results, alone, strict=True):
                assert (result.top1, result.top5) == (expected.top1, expected.top5)
                assert result.loss == pytest.approx(expected.loss, rel=1e-6)
                assert result.protocol == expected.protocol


def test_all_ranks_begin_with_the_weights_that_the_first_made_of_the_data(on_ranks: OnRanks):
    ((expected, _),) = on_ranks(1, "initialized")
    for states in on_ranks(3, "initialized"):
        for state in states:
            assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_one_rank_that_is_asked_stops_the_evaluation_of_all(on_ranks: OnRanks):
    assert on_ranks(3, "interrupted") == [(None, 3)] * 3


def test_what_one_says_all_hear(on_ranks: OnRanks):
    for heard in on_ranks(3, "words"):
        both = Decision(save=True, flush=True)
        assert heard["agreed"] == [Decision(), Decision(stop=True), both, Decision(), Decision()]
        assert heard["gathered"].tolist() == [[0, 0.5], [1, 0.5], [2, 0.5]]
        assert (heard["bytes"], heard["number"]) == (b"\x00state", 7)
        assert (heard["any"], heard["all not"]) == (True, False)


def test_ranks_together_see_what_one_sees(on_ranks: OnRanks):
    (alone,), together = on_ranks(1, "ids"), on_ranks(3, "ids")
    for step, (ids, images) in enumerate(alone):
        shares = [rank[step] for rank in together]
        assert sorted(len(share[0]) for share in shares) == [4, 4, 5]
        assert np.array_equal(np.concatenate([share[0] for share in shares]), ids)
        assert torch.equal(torch.cat([share[1] for share in shares]), images)


def test_ranks_search_for_the_lr_together(on_ranks: OnRanks):
    (alone,), together = on_ranks(1, "lr_search"), on_ranks(2, "lr_search")
    for found in together:
        assert found["losses"][:10] == pytest.approx(alone["losses"][:10], rel=1e-4)
        assert found["losses"] == together[0]["losses"]
        assert (found["peak"], found["why"]) == (together[0]["peak"], together[0]["why"])
        assert found["untouched"]
        assert found["stopped"] == (None, 3)  # one rank was asked to


def test_one_rank_with_little_memory_cuts_the_batches_of_all(on_ranks: OnRanks):
    for parts in on_ranks(2, "little_memory"):  # of 13 images a rank
        assert parts[:2] == [8, 13]
        assert "not even a batch of 26 in 13 micro-batches fits" in parts[2]


@pytest.mark.slow
def test_compiled_and_eager_ranks_have_one_kind_of_checkpoint(digits: PackedDataset, tmp_path):
    for results in run(2, digits.path, tmp_path, "compiled"):
        eager, compiled = results["compiled"]
        assert list(eager["model"]) == list(compiled["model"])
        for key, value in eager["model"].items():
            torch.testing.assert_close(compiled["model"][key], value, rtol=1e-3, atol=1e-5)
        alone = TrainState.initial(parse_recipe(RECIPE, "test"), 10, CPU)
        alone.load(compiled)
        assert torch.equal(alone.model.state_dict()["fc.weight"], compiled["model"]["fc.weight"])
