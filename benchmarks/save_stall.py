"""The stall of a save: how long training stands still for a checkpoint of a ResNet-50.

Method. The state is that of a run with SGD momentum and EMA (three float32 copies of the weights).
A stall is the time of what the loop does: `TrainState.state_dict` and `Checkpointer.save`, which
copies the state on the host and leaves the writing to a thread; the fsync of the run's records
before it is not in it. Each write is waited for before the next save and timed on its own, with
nothing else running: to disk with fsync, checksum, weights as safetensors, older checkpoints
removed. The first save also allocates the copy's memory, so it is reported alone, and the median is
that of the others. The naive way, `torch.save` of the same state in the foreground with fsync, is
timed in between, into a new file each time; it has no checksum and writes no safetensors.

    python benchmarks/save_stall.py --saves 7
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pitstop.core.recipe import Recipe, parse_recipe
from pitstop.engine.state import TrainState
from pitstop.io.run_directory import RunDirectory
from pitstop.runtime.checkpoint import Checkpointer
from pitstop.runtime.devices import Device

CLASSES = 1000


@dataclass(frozen=True)
class Round:
    """Seconds of a save's stall and its write, and of the naive save."""

    stall: float
    write: float
    naive: float


def recipe_of(model: str) -> Recipe:
    """Returns a recipe whose state is the model, its EMA and the momentum."""
    stated = {"name": "stall", "epochs": 1, "model": model, "optimizer": "sgd", "ema": {}}
    return parse_recipe(stated, "benchmark")


def trained_state(recipe: Recipe) -> TrainState:
    """Returns the state after one step of the optimizer, which makes the momentum."""
    device = Device.choose(recipe.precision, recipe.compile)
    state = TrainState.initial(recipe, CLASSES, device)
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return state


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors in nested mappings and sequences."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def measure(state: TrainState, recipe: Recipe, directory: Path, saves: int) -> list[Round]:
    """Saves both ways in turn, once more than `saves`: the first one is special."""
    checkpointer = Checkpointer(RunDirectory(directory / "run"), recipe.checkpoint)
    rounds: list[Round] = []
    for step in range(1, saves + 2):
        state.step = step
        stall, write = save(checkpointer, state)
        rounds.append(Round(stall, write, naive_save(state, directory / "naive.pt")))
    assert checkpointer.rejected is None
    checkpointer.close()
    return rounds


def save(checkpointer: Checkpointer, state: TrainState) -> tuple[float, float]:
    """Returns the seconds of the stall, and those from its end until the checkpoint counts."""
    started = time.perf_counter()
    checkpointer.save(state.state_dict(), epoch=state.step, top1=None, best=False, metadata={})
    copied = time.perf_counter()
    checkpointer.wait()
    return copied - started, time.perf_counter() - copied


def naive_save(state: TrainState, path: Path) -> float:
    """Returns the seconds of writing the state in the foreground."""
    started = time.perf_counter()
    with path.open("wb") as file:
        torch.save(state.state_dict(), file)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def report(model: str, megabytes: float, rounds: list[Round]) -> None:
    """Prints the result, and again as JSON."""
    first, *others = rounds
    stall, write, naive = (
        median(getattr(each, what) for each in others) for what in ("stall", "write", "naive")
    )
    print(
        f"stall of a save: {model} with momentum and EMA, {megabytes:.0f} MB, "
        f"median of {len(others)}\n"
        f"  stall   {stall:.4f} s, {megabytes / stall:,.0f} MB/s "
        f"(the first save: {first.stall:.4f} s, it allocates)\n"
        f"  write   {write:.2f} s in the background\n"
        f"  naive   {naive:.2f} s, torch.save and fsync in the foreground: "
        f"{naive / stall:.0f} times the stall"
    )
    result = {
        "benchmark": "save_stall",
        "model": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "megabytes": round(megabytes, 1),
        "saves": len(others),
        "stall_seconds": round(stall, 5),
        "first_stall_seconds": round(first.stall, 5),
        "megabytes_per_second": round(megabytes / stall, 1),
        "write_seconds": round(write, 3),
        "naive_seconds": round(naive, 3),
        "stalls": [round(each.stall, 5) for each in others],
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--saves", type=int, default=7, help="after the first one (default 7)")
    parser.add_argument("--model", default="resnet50", help="a timm model (default resnet50)")
    parser.add_argument("--directory", type=Path, help="where to save: on the disk to measure")
    options = parser.parse_args()
    recipe = recipe_of(options.model)
    state = trained_state(recipe)
    megabytes = sum(tensor.nbytes for tensor in tensors(state.state_dict())) / 1e6
    with TemporaryDirectory(dir=options.directory) as directory:
        rounds = measure(state, recipe, Path(directory), options.saves)
    report(options.model, megabytes, rounds)


if __name__ == "__main__":
    main()
