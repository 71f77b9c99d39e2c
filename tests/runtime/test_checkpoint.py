"""Checkpoints are whole or not there, and give back what was saved."""

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.interval import SHORTEST, optimal_interval
from pitstop.core.recipe import Checkpoint, parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.io.run_directory import RunDirectory
from pitstop.runtime import checkpoint as module
from pitstop.runtime.checkpoint import (
    Checkpointer,
    Manifest,
    Restored,
    SaveSchedule,
    copy_checkpoint,
    is_among_best,
    parse,
)

METADATA = {"name": "tiny", "classes": ["cat", "dog"]}


class KilledError(Exception):
    """Stands for a SIGKILL at a moment of the test's choice."""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.checkpoints.mkdir(parents=True)
    return made


@pytest.fixture
def open_checkpointer() -> Iterator[Callable[..., Checkpointer]]:
    """Opens checkpointers and closes them in the end."""
    opened: list[Checkpointer] = []

    def open_one(run: RunDirectory, **policy: Any) -> Checkpointer:
        opened.append(Checkpointer(run, Checkpoint(**policy)))
        return opened[-1]

    yield open_one
    for checkpointer in opened:
        with contextlib.suppress(OSError, KilledError):  # it says again what it said to the test
            checkpointer.close()


@pytest.fixture
def checkpointer(run, open_checkpointer) -> Checkpointer:
    return open_checkpointer(run)


def filled(step: int, ema: bool = False) -> dict[str, Any]:
    """A state whose every number is its step."""
    full = {"weight": torch.full((3, 4), float(step)), "count": torch.tensor(step)}
    average = {key: tensor.clone() + 1000 for key, tensor in full.items()}
    optimizer = {"state": {0: {"momentum_buffer": torch.full((3, 4), float(step))}}}
    return {"step": step, "model": full, "ema": average if ema else None, "optimizer": optimizer}


def save(checkpointer: Checkpointer, state: dict[str, Any], **options: Any) -> None:
    """Saves and waits; an epoch is 10 steps unless it is said."""
    fields = {"epoch": state["step"] / 10, "top1": None, "best": False, "metadata": METADATA}
    checkpointer.save(state, **fields | options)
    checkpointer.wait()


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def restore(checkpointer: Checkpointer, say: Callable[[str], None]) -> Restored | None:
    manifest = checkpointer.newest(say)
    return None if manifest is None else (manifest, parse(checkpointer.read(manifest)))


def restored(checkpointer: Checkpointer) -> dict[str, Any]:
    found = restore(checkpointer, lambda line: pytest.fail(f"said: {line}"))
    assert found is not None
    assert found[0].step == found[1]["step"]
    return found[1]


def files(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def steps(checkpointer: Checkpointer) -> list[int]:
    return [manifest.step for manifest in checkpointer.manifests()]


def trained_state() -> dict[str, Any]:
    """Weights in channels_last, a bf16 tensor, integer buffers, and an optimizer that has run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 2))
        model = model.to(memory_format=torch.channels_last)
        model.register_buffer("bf16", torch.randn(5).bfloat16())
        model.register_buffer("empty", torch.zeros(0, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(torch.randn(4, 3, 4, 4)).square().sum().backward()
        optimizer.step()
    return {
        "step": 7,
        "model": model.state_dict(),
        "ema": copy.deepcopy(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "recipe": {"name": "tiny", "phases": [{"lr": 0.1}, {"lr": None}]},
    }


# Saving and restoring


def test_there_is_nothing_to_restore_in_the_beginning(checkpointer, tmp_path, open_checkpointer):
    assert restore(checkpointer, pytest.fail) is None
    assert restore(open_checkpointer(RunDirectory(tmp_path / "not there")), pytest.fail) is None


def test_what_is_saved_comes_back(checkpointer, run, open_checkpointer):
    state = trained_state()
    kernel = state["model"]["0.weight"]
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert not kernel.is_contiguous()
    save(checkpointer, state)
    assert_same(dict(restored(open_checkpointer(run))), plain(state))


def plain(value: Any) -> Any:
    """With dict in the place of OrderedDict."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def test_a_file_is_opened_by_torch_without_pickled_code(checkpointer, run):
    save(checkpointer, trained_state())
    (file,) = run.checkpoints.glob("*.pt")
    assert torch.load(file, weights_only=True)["step"] == 7


def test_an_optimizer_goes_on_from_a_checkpoint(checkpointer):
    layers = [nn.Linear(3, 2) for _ in range(2)]
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9) for layer in layers]

    def train(layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        layer(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()

    train(layers[0], optimizers[0])
    model, optimizer = layers[0].state_dict(), optimizers[0].state_dict()
    save(checkpointer, {"step": 1, "model": model, "ema": None, "optimizer": optimizer})
    saved = restored(checkpointer)
    layers[1].load_state_dict(saved["model"])
    optimizers[1].load_state_dict(saved["optimizer"])
    for layer, optimizer in zip(layers, optimizers, strict=True):
        train(layer, optimizer)
    assert torch.equal(layers[0].weight, layers[1].weight)


def test_a_save_is_a_snapshot(checkpointer, monkeypatch):
    """What becomes of the tensors while the thread writes does not matter."""
    state = filled(1)
    fields = {"epoch": 0.1, "top1": None, "best": False, "metadata": METADATA}
    before = copy.deepcopy(state)
    write = torch.save

    def write_late(value: Any, file: Any) -> None:
        mutated.result()
        write(value, file)

    mutated = module.Future()
    monkeypatch.setattr(torch, "save", write_late)
    checkpointer.save(state, **fields)
    for tensors in (state["model"], state["optimizer"]["state"][0]):
        for tensor in tensors.values():
            tensor.fill_(99)
    state["step"] = 99
    mutated.set_result(None)
    checkpointer.wait()
    assert_same(restored(checkpointer), before)


def test_a_snapshot_does_not_change_when_the_shapes_or_the_keys_do(checkpointer):
    """The host's memory is used again where it fits: a run may be rebased, an optimizer grow."""
    first = filled(1)
    save(checkpointer, first)
    other = filled(2, ema=True)
    other["model"]["weight"] = torch.arange(12.0).reshape(4, 3).T
    other["model"]["more"] = torch.ones(2, dtype=torch.bfloat16)
    other["optimizer"]["state"] = {1: {"exp_avg": torch.ones(2)}}
    other["optimizer"]["param_groups"] = [{"params": [0, 1], "betas": (0.9, torch.tensor(0.5))}]
    save(checkpointer, other)
    assert_same(restored(checkpointer), other)
    other["optimizer"]["param_groups"] = [{"params": [0], "betas": (0.8, torch.tensor(0.7))}]
    other["step"] = 3
    save(checkpointer, other)
    assert_same(restored(checkpointer), other)


def test_a_manifest_says_what_is_known(checkpointer, run):
    save(checkpointer, filled(250), epoch=2.5, top1=87.654)
    (manifest,) = checkpointer.manifests()
    path = run.checkpoints / manifest.file
    assert manifest == Manifest(
        step=250,
        epoch=2.5,
        top1=87.654,
        file=path.name,
        bytes=path.stat().st_size,
        sha256=module.sha256(path),
        attempt=0,
        sequence=1,
    )
    for part in ("2.50", "250", "87.65"):
        assert part in path.name


def test_file_names_sort_by_step(checkpointer, run, open_checkpointer):
    keeps_all = open_checkpointer(run, keep_last=10)
    for step in (5, 50, 500, 5000):
        save(keeps_all, filled(step), top1=50.0 if step == 50 else None)
    named = [path.name for path in sorted(run.checkpoints.glob("*.pt"))]
    assert named == [manifest.file for manifest in keeps_all.manifests()]


def test_what_kept_a_save_from_the_disk_is_said_and_the_third_save_is_refused(checkpointer, run):
    run.checkpoints.rmdir()
    run.checkpoints.write_text("in the way")
    save(checkpointer, filled(1))
    assert ".pt: the checkpoint was not saved: Not a directory: make room" in checkpointer.problem
    save(checkpointer, filled(2))
    with pytest.raises(InputError, match="the checkpoint was not saved: "):
        save(checkpointer, filled(3))


def test_a_save_that_succeeds_makes_up_for_one_that_failed(checkpointer, run):
    run.checkpoints.rmdir()
    run.checkpoints.write_text("in the way")
    save(checkpointer, filled(1))
    run.checkpoints.unlink()
    save(checkpointer, filled(2))
    assert checkpointer.problem is None
    assert_same(restored(checkpointer), filled(2))


def test_the_newest_is_the_last_that_was_saved_though_it_has_fewer_steps(checkpointer):
    """As after a run went back because it had diverged."""
    for step in (2, 4, 3):
        save(checkpointer, filled(step))
    assert checkpointer.newest(print).step == 3
    assert steps(checkpointer) == [4, 3]


def test_a_later_start_counts_more_than_any_number_of_saves(checkpointer, run, open_checkpointer):
    for step in (2, 4, 6):
        save(checkpointer, filled(step))
    later = open_checkpointer(run)
    later.attempt = 1
    save(later, filled(3))
    assert later.newest(print).step == 3


# Damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "bit flipped": flip_a_bit,
    "zero length": lambda path: os.truncate(path, 0),
    "file missing": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "manifest not JSON": lambda path: path.with_suffix(".json").write_text("{"),
    "manifest empty": lambda path: path.with_suffix(".json").write_text(""),
    "manifest of another kind": lambda path: path.with_suffix(".json").write_text('{"a": 1}'),
}


@pytest.fixture
def damaged(checkpointer, run) -> Callable[[str], str]:
    """Saves steps 1 and 2, and damages 2; returns the name of its file."""

    def damage(how: str) -> str:
        for step in (1, 2):
            save(checkpointer, filled(step))
        name = checkpointer.manifests()[-1].file
        DAMAGE[how](run.checkpoints / name)
        return name

    return damage


@pytest.mark.parametrize("how", DAMAGE)
def test_from_a_damaged_newest_it_goes_back_to_the_one_before(damaged, how, run, open_checkpointer):
    name = damaged(how)
    found = restore(open_checkpointer(run), lambda _: None)
    assert found is not None
    assert_same(found[1], filled(1))
    assert not [file for file in files(run) if file.startswith(Path(name).stem)]
    assert_same(restored(open_checkpointer(run)), filled(1))  # and now there is nothing to say


@pytest.mark.parametrize("how", DAMAGE)
def test_it_says_that_it_goes_back(damaged, how, run, open_checkpointer):
    name = damaged(how)
    said: list[str] = []
    restore(open_checkpointer(run), said.append)
    assert len(said) == 1
    assert Path(name).stem in said[0]
    assert "damaged" in said[0]


def test_a_file_without_manifest_is_what_a_kill_left_and_is_swept(checkpointer, run):
    for step in (1, 2):
        save(checkpointer, filled(step))
    (run.checkpoints / checkpointer.manifests()[-1].file).with_suffix(".json").unlink()
    assert_same(restored(checkpointer), filled(1))
    assert len(files(run)) == 2


def test_when_all_are_damaged_there_is_none(damaged, checkpointer, run):
    damaged("truncated")
    for path in run.checkpoints.glob("*.pt"):
        flip_a_bit(path)
    said: list[str] = []
    assert restore(checkpointer, said.append) is None
    assert len(said) == 2
    assert files(run) == []


def test_what_kills_left_is_swept(checkpointer, run):
    save(checkpointer, filled(1))
    whole = files(run)
    for orphan in ("epoch-1.pt.partial", "epoch-1.json.partial", "epoch-1.pt"):
        (run.checkpoints / orphan).write_bytes(b"half")
    assert_same(restored(checkpointer), filled(1))
    assert files(run) == whole


def test_half_written_weights_are_swept_too(checkpointer, run):
    save(checkpointer, filled(1))
    orphan = run.weights("best").with_name("best.safetensors.partial")
    orphan.write_bytes(b"half")
    restored(checkpointer)
    assert not orphan.exists()


@pytest.mark.parametrize("renames", range(6))
def test_killed_after_any_rename_the_weights_are_not_older_than_the_checkpoint(
    checkpointer, run, open_checkpointer, monkeypatch, renames
):
    """Else a run that is killed right after its last checkpoint ends with the weights before."""
    save(checkpointer, filled(1, ema=True), top1=10.0, best=True)
    left = [renames]
    rename = Path.replace

    def replace_until_killed(self: Path, target: Path) -> Path:
        if left[0] == 0:
            raise KilledError
        left[0] -= 1
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace_until_killed)
    with pytest.raises(KilledError):
        save(checkpointer, filled(2, ema=True), top1=20.0, best=True)
    monkeypatch.undo()
    step = restored(open_checkpointer(run))["step"]
    for which in ("last", "best"):
        for raw in (False, True):
            weights = load_file(run.weights(which, raw=raw))
            assert weights["count"].item() % 1000 >= step, (which, raw)


# Values that are not finite


def poisoned(where: str) -> dict[str, Any]:
    state = filled(2, ema=True)
    state["optimizer"]["state"][0]["half"] = torch.ones(3, dtype=torch.bfloat16)
    tensors = {
        "model": state["model"]["weight"],
        "ema": state["ema"]["weight"],
        "optimizer": state["optimizer"]["state"][0]["half"],
    }
    tensors[where].view(-1)[-1] = float("nan") if where == "model" else float("inf")
    return state


@pytest.mark.parametrize("where", ["model", "ema", "optimizer"])
def test_a_value_that_is_not_finite_is_rejected_and_nothing_written(checkpointer, run, where):
    save(checkpointer, filled(1, ema=True), top1=50.0, best=True)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    save(checkpointer, poisoned(where), top1=60.0, best=True)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    assert checkpointer.rejected is not None
    assert checkpointer.rejected.startswith(f"{where}.")
    assert "step 2" in checkpointer.rejected
    assert_same(restored(checkpointer), filled(1, ema=True))


def test_what_was_rejected_is_not_said_of_the_next_one(checkpointer):
    save(checkpointer, poisoned("model"))
    assert checkpointer.rejected is not None
    save(checkpointer, filled(3))
    assert checkpointer.rejected is None


def test_a_finite_state_is_not_rejected(checkpointer):
    save(checkpointer, trained_state())
    assert checkpointer.rejected is None


# Retention


def save_all(checkpointer: Checkpointer, top1: dict[int, float | None]) -> None:
    """Saves step 10 x epoch for each epoch."""
    for epoch, accuracy in top1.items():
        save(checkpointer, filled(10 * epoch), epoch=float(epoch), top1=accuracy)


def test_the_last_two_and_the_best_are_kept(checkpointer, run):
    save_all(checkpointer, {1: 10.0, 2: 60.0, 3: 40.0, 4: 50.0, 5: 30.0})
    assert steps(checkpointer) == [20, 40, 50]
    assert len(files(run)) == 6
    named = checkpointer.best_and_last()
    assert (named["best"].step, named["last"].step) == (20, 50)


def test_as_many_are_kept_as_the_policy_says(run, open_checkpointer):
    checkpointer = open_checkpointer(run, keep_last=1, keep_best=3)
    save_all(checkpointer, {1: 10.0, 2: 60.0, 3: 40.0, 4: None, 5: 50.0, 6: 30.0})
    assert steps(checkpointer) == [20, 30, 50, 60]


def test_of_equally_good_ones_the_first_is_the_best(checkpointer):
    save_all(checkpointer, {1: 10.0, 2: 60.0, 3: 60.0, 4: 20.0, 5: 20.0})
    assert steps(checkpointer) == [20, 40, 50]


def test_without_best_and_evaluations_the_last_are_kept(run, open_checkpointer):
    checkpointer = open_checkpointer(run, keep_best=0)
    save_all(checkpointer, {1: 90.0, 2: None, 3: None})
    assert steps(checkpointer) == [20, 30]
    save(checkpointer, filled(40))
    assert set(checkpointer.best_and_last()) == {"last"}


def test_milestones_are_kept(run, open_checkpointer):
    checkpointer = open_checkpointer(run, keep_every="5ep", keep_best=0)
    save_all(checkpointer, dict.fromkeys(range(1, 18)))
    assert steps(checkpointer) == [50, 100, 150, 160, 170]


def test_a_milestone_is_the_first_checkpoint_at_or_past_its_epoch(run, open_checkpointer):
    """A batch may straddle the end of an epoch, and saves may come between."""
    checkpointer = open_checkpointer(run, keep_every="2ep", keep_best=0, keep_last=1)
    for step, epoch in [(7, 1.4), (11, 2.03), (13, 2.4), (17, 3.9), (21, 4.01), (25, 4.9)]:
        save(checkpointer, filled(step), epoch=epoch)
    assert steps(checkpointer) == [11, 21, 25]


def test_retention_goes_on_after_a_restart(run, open_checkpointer):
    save_all(open_checkpointer(run), {1: 10.0, 2: 60.0, 3: 40.0})
    other = open_checkpointer(run)
    restored(other)
    save_all(other, {4: 50.0, 5: 30.0})
    assert steps(other) == [20, 40, 50]


@pytest.mark.parametrize("top1", [None, 75.0])
def test_saving_a_step_again_leaves_a_single_whole_checkpoint(checkpointer, run, top1):
    save(checkpointer, filled(5))
    save(checkpointer, filled(10))
    again = filled(10)
    again["note"] = "again"
    save(checkpointer, again, top1=top1)
    assert [(m.step, m.top1) for m in checkpointer.manifests()] == [(5, None), (10, top1)]
    assert_same(restored(checkpointer), again)
    assert len(files(run)) == 4


# Weights


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["pitstop"])


def test_weights_are_written_beside_with_what_it_takes_to_use_them(checkpointer, run):
    save(checkpointer, filled(1), top1=50.0, best=True)
    save(checkpointer, filled(2), top1=40.0)
    for which, step in (("last", 2), ("best", 1)):
        assert_same(load_file(run.weights(which)), dict(sorted(filled(step)["model"].items())))
        assert header(run.weights(which)) == METADATA
        assert not run.weights(which, raw=True).exists()


def test_the_averaged_weights_come_first_and_the_raw_ones_beside(checkpointer, run):
    state = filled(3, ema=True)
    save(checkpointer, state, top1=50.0, best=True)
    for which in ("last", "best"):
        assert_same(load_file(run.weights(which)), dict(sorted(state["ema"].items())))
        assert_same(load_file(run.weights(which, raw=True)), dict(sorted(state["model"].items())))
        assert header(run.weights(which, raw=True)) == METADATA


def test_weights_in_channels_last_and_halves_are_read_back(checkpointer, run):
    state = trained_state()
    save(checkpointer, state)
    weights = load_file(run.weights("last"))
    assert weights.keys() == state["ema"].keys()
    assert all(torch.equal(weights[key], state["ema"][key]) for key in weights)
    assert weights["bf16"].dtype == torch.bfloat16


def test_there_is_no_best_before_an_evaluation(checkpointer, run):
    save(checkpointer, filled(1))
    assert run.weights("last").exists()
    assert not run.weights("best").exists()


# When to save


def schedule(every: str, **policy: Any) -> SaveSchedule:
    """25 samples in batches of 10, for 8 epochs: 20 steps."""
    recipe = parse_recipe({"epochs": 8, "batch_size": 10}, "test")
    return SaveSchedule(Checkpoint(every=every, **policy), Timeline(recipe, num_samples=25))


def due(saves: SaveSchedule) -> list[int]:
    return [step for step in range(1, 21) if saves.due(step)]


def test_due_by_epochs_is_after_the_batch_that_completes_them():
    assert due(schedule("1ep")) == [3, 5, 8, 10, 13, 15, 18, 20]
    assert due(schedule("3ep")) == [8, 15, 20]


def test_due_by_steps_and_always_at_the_end():
    assert due(schedule("6 steps")) == [6, 12, 18, 20]
    assert due(schedule("1000 steps")) == [20]


def test_due_by_minutes_is_since_the_last_save(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    saves = schedule("10 min")
    assert due(saves) == [20]
    clock.now += 599
    assert not saves.overdue()
    clock.now += 1
    assert saves.overdue()
    saves.saved(5.0)
    assert not saves.overdue()
    clock.now += 600
    assert saves.overdue()


def test_auto_is_due_by_what_the_last_save_cost(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    saves = schedule("auto")
    assert due(saves) == [20]
    clock.now += SHORTEST
    assert saves.overdue()
    saves.saved(1.0)
    interval = optimal_interval(1.0, Checkpoint().mtbf_seconds)
    assert interval > SHORTEST
    clock.now += interval - 1
    assert not saves.overdue()
    clock.now += 1
    assert saves.overdue()


def test_only_a_policy_of_minutes_looks_at_the_clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    others = [schedule("1ep"), schedule("6 steps")]
    clock.now += 10**6
    assert not any(saves.overdue() for saves in others)


def test_an_evaluation_is_among_the_best_when_fewer_are_as_good():
    two = Checkpoint(keep_best=2)
    assert is_among_best(50.0, [], two)
    assert is_among_best(50.0, [60.0, 40.0], two)
    assert not is_among_best(50.0, [60.0, 50.0], two)
    assert not is_among_best(50.0, [], Checkpoint(keep_best=0))


# Beginning from another run


@pytest.fixture
def other_run(tmp_path: Path, open_checkpointer) -> RunDirectory:
    made = RunDirectory(tmp_path / "other")
    checkpointer = open_checkpointer(made)
    for step in (1, 2):
        save(checkpointer, filled(step))
    made.events.write_text('{"kind": "note"}\n')
    return made


def test_a_run_begins_from_the_newest_checkpoint_of_another(other_run, run, checkpointer):
    copy_checkpoint(other_run.path, run)
    assert_same(restored(checkpointer), filled(2))
    assert steps(checkpointer) == [2]
    assert run.events.read_text() == other_run.events.read_text()


def test_a_run_begins_from_a_checkpoint_by_its_name(other_run, run, checkpointer):
    first = min(other_run.checkpoints.glob("*.pt"))
    copy_checkpoint(first, run)
    assert_same(restored(checkpointer), filled(1))


def test_the_same_command_again_goes_on_with_the_run_it_began(other_run, run, checkpointer):
    copy_checkpoint(other_run.path, run)
    save(checkpointer, filled(9))
    run.events.write_text("its own")
    copy_checkpoint(other_run.path, run)
    assert steps(checkpointer) == [2, 9]
    assert run.events.read_text() == "its own"


def test_a_run_that_was_begun_otherwise_is_left_alone_and_refused(other_run, run, checkpointer):
    save(checkpointer, filled(9))
    with pytest.raises(InputError, match=r"--resume .*other: .*run holds a run already"):
        copy_checkpoint(other_run.path, run)
    assert steps(checkpointer) == [9]
    assert not run.events.exists()


def test_the_other_run_is_not_changed(other_run, run):
    before = {path: path.read_bytes() for path in other_run.path.rglob("*") if path.is_file()}
    copy_checkpoint(other_run.path, run)
    assert {p: p.read_bytes() for p in other_run.path.rglob("*") if p.is_file()} == before


def test_a_damaged_manifest_of_the_other_run_is_not_removed(other_run, run):
    newest = max(other_run.checkpoints.glob("*.json"))
    newest.write_text("{")
    copy_checkpoint(other_run.path, run)
    assert newest.exists()


def test_from_a_run_whose_newest_is_damaged_the_one_before_is_taken(other_run, run, checkpointer):
    flip_a_bit(max(other_run.checkpoints.glob("*.pt")))
    copy_checkpoint(other_run.path, run)
    assert_same(restored(checkpointer), filled(1))


def test_a_damaged_checkpoint_is_refused_and_not_a_run_from_scratch(other_run, run):
    newest = max(other_run.checkpoints.glob("*.pt"))
    flip_a_bit(newest)
    with pytest.raises(InputError, match=rf"--resume .*{newest.name}"):
        copy_checkpoint(newest, run)


@pytest.mark.parametrize("name", ["missing.pt", "weights.pt", "empty"])
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, run, name):
    (tmp_path / "weights.pt").write_bytes(b"no manifest")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=rf"--resume .*{name}: "):
        copy_checkpoint(tmp_path / name, run)


# A real kill

SAVER = """
import os, sys
from pathlib import Path
import torch
from pitstop.core.recipe import Checkpoint
from pitstop.io.run_directory import RunDirectory
from pitstop.runtime.checkpoint import Checkpointer

torch.set_num_threads(1)
for line in sys.stdin:  # each line is a run; a child of its own saves in it until it is killed
    if os.fork():
        os.wait()
        continue
    checkpointer = Checkpointer(RunDirectory(Path(line.strip())), Checkpoint())
    newest = checkpointer.newest(lambda line: None)
    step = newest.step if newest else 0
    while True:
        step += 1
        tensors = {"weight": torch.full((300_000,), float(step))}
        state = {"step": step, "model": tensors, "ema": tensors, "optimizer": [tensors]}
        checkpointer.save(state, epoch=float(step), top1=float(step), best=True, metadata={})
        print(os.getpid(), step, flush=True)
"""


@pytest.fixture
def saver() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.timeout(120)
def test_killed_in_the_middle_of_saving_it_goes_on_from_a_whole_checkpoint(
    saver, run, checkpointer
):
    """Six kills in one run, each right after the thread has begun to write."""
    assert saver.stdin is not None
    assert saver.stdout is not None
    saved = 0
    for kill in range(6):
        saver.stdin.write(f"{run.path}\n")
        saver.stdin.flush()
        for _ in range(2 + kill % 3):
            pid, step = map(int, saver.stdout.readline().split())
        os.kill(pid, signal.SIGKILL)
        state = restored_after_death(saver, pid, checkpointer)
        assert state["step"] >= step - 1 > saved  # a save returns when the one before is on disk
        saved = state["step"]
        assert all(torch.all(state[key]["weight"] == saved) for key in ("model", "ema"))
        assert not [name for name in files(run) if name.endswith(".partial")]
        assert len(steps(checkpointer)) <= 3
        for which in ("last", "best"):
            (value,) = load_file(run.weights(which))["weight"].unique().tolist()
            assert value >= saved


def restored_after_death(saver: Any, pid: int, checkpointer: Checkpointer) -> dict[str, Any]:
    """Restores once the killed process has gone: its parent has waited for it then."""
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(pid, 0)
            assert saver.poll() is None
    return restored(checkpointer)
