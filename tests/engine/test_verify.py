"""What is compared bit by bit, and that the least difference is found."""

import copy
import json
import shutil
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pitstop.core.errors import InputError
from pitstop.engine.outcome import FINISHED
from pitstop.engine.verify import differences, unequal, verify_resume
from pitstop.io.run_directory import RunDirectory

# Containers of tensors


def state() -> dict[str, Any]:
    return {
        "step": 7,
        "model": {"conv.weight": torch.arange(6.0).view(2, 3), "bn.count": torch.tensor(3)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.tensor([1.5, -2.0])}}},
        "amendments": ["a", ("b", None)],
    }


def float_of(bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


def test_equal_states_have_no_differences_however_they_lie_in_memory():
    other = state()
    other["model"]["conv.weight"] = other["model"]["conv.weight"].t().contiguous().t()
    assert unequal(state(), other) == []


@pytest.mark.parametrize("bit", [0, 13, 31])
def test_one_flipped_bit_is_found_and_named(bit):
    other = state()
    momentum = other["optimizer"]["state"][0]["momentum_buffer"].view(torch.int32)
    momentum[1] ^= -(2**31) if bit == 31 else 1 << bit
    assert unequal(state(), other) == ["optimizer.state.0.momentum_buffer"]


def test_a_nan_is_equal_to_itself_but_not_to_another_nan():
    nan, other = float_of(0x7FC00000), float_of(0x7FC00001)
    assert unequal({"loss": nan}, {"loss": nan.clone()}) == []
    assert unequal({"loss": nan}, {"loss": other}) == ["loss"]


def test_zero_is_not_minus_zero():
    assert unequal([torch.tensor(0.0)], [torch.tensor(-0.0)]) == ["0"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda s: s.update(step=8), "step"),
        (lambda s: s["model"].pop("bn.count"), "model"),
        (lambda s: s["model"].update(more=torch.zeros(1)), "model"),
        (lambda s: s["amendments"].append("c"), "amendments"),
        (lambda s: s["model"].update({"bn.count": torch.tensor(3.0)}), "model.bn.count"),
        (lambda s: s["model"].update({"bn.count": torch.tensor([3])}), "model.bn.count"),
        (lambda s: s["model"].update({"bn.count": 3}), "model.bn.count"),
        (lambda s: s["optimizer"]["state"].clear(), "optimizer.state"),
        (lambda s: s.update(amendments=None), "amendments"),
    ],
)
def test_other_keys_lengths_types_and_shapes_are_found(
    change: Callable[[dict[str, Any]], object], name
):
    other = copy.deepcopy(state())
    change(other)
    assert unequal(state(), other) == [name]
    assert unequal(other, state()) == [name]


# Runs


@pytest.fixture
def pair(trainer, tmp_path) -> tuple[RunDirectory, RunDirectory]:
    """A run and a copy of it."""
    assert trainer(tmp_path / "one") == FINISHED
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    return RunDirectory(tmp_path / "one"), RunDirectory(tmp_path / "other")


def change_events(
    run: RunDirectory, change: Callable[[dict[str, Any]], dict[str, Any] | None]
) -> None:
    """Puts what `change` returns in the place of each event; None leaves it out."""
    events = [change(json.loads(line)) for line in run.events.read_text().splitlines()]
    kept = [json.dumps(event) + "\n" for event in events if event is not None]
    run.events.write_text("".join(kept))


def test_each_kind_of_difference_between_two_runs_is_found(pair):
    one, other = pair
    assert differences(one, other) == []
    records = other.events.read_text()

    first = {"kind": "train", "first": 0}
    is_first = first.items().__le__
    change_events(other, lambda e: {**e, "ids": e["ids"] + 1} if is_first(e.items()) else e)
    assert [line.partition(":")[0] for line in differences(one, other)] == ["ids of the images"]

    other.events.write_text(records)
    change_events(other, lambda e: None if is_first(e.items()) else e)
    missing = differences(one, other)
    assert missing[0].startswith("steps trained: [0, 14] and [4, 14]")
    assert missing[1].startswith("ids of the images")

    other.events.write_text(records)
    change_events(other, lambda e: {**e, "top1": e["top1"] + 1e-6} if e["kind"] == "val" else e)
    assert [line.partition(":")[0] for line in differences(one, other)] == ["top1"]

    other.events.write_text(records)
    assert differences(one, other) == []
    last = max(other.checkpoints.glob("*step-00000014*.pt"))
    saved = torch.load(last, weights_only=True)
    saved["ema"]["fc.bias"].view(torch.int32)[-1] ^= 1
    torch.save(saved, last)
    assert differences(one, other) == ["ema.fc.bias differs"]


def test_steps_that_were_recorded_in_other_stretches_are_the_same_steps(trainer, pair, tmp_path):
    whole, _ = pair
    while trainer(tmp_path / "run", steps=3) != FINISHED:
        pass
    stretches = [
        e for e in (tmp_path / "run/events.jsonl").read_text().splitlines() if "train" in e
    ]
    assert len(stretches) > 4
    assert differences(RunDirectory(tmp_path / "run"), whole) == []


def test_another_seed_differs_in_everything(trainer, tiny, pair, tmp_path):
    whole, _ = pair
    assert trainer(tmp_path / "run", recipe=tiny(seed=1)) == FINISHED
    lines = differences(RunDirectory(tmp_path / "run"), whole)
    assert lines[0].startswith("ids of the images")
    assert "model.fc.weight differs" in lines


# The command


def test_a_command_that_does_not_train_is_told_of(tmp_path):
    fails = [sys.executable, "-c", "import sys; sys.exit('no such data')"]
    with pytest.raises(InputError, match=r"uninterrupted\.log: training ended with exit code 1:"):
        verify_resume(fails, tmp_path / "out", kills=1, seed=0, say=print)
    assert "no such data" in (tmp_path / "out" / "uninterrupted.log").read_text()


def test_it_does_not_write_where_something_is(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InputError, match=r"is not empty: give another --out$"):
        verify_resume(["false"], tmp_path, kills=1, seed=0, say=print)
    assert [*tmp_path.iterdir()] == [tmp_path / "mine.txt"]
