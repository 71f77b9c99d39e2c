"""What one rank does in the tests. Usage: python as_rank.py PACKED OUT [TASK ...]

Each task is run on every rank; what it returns is saved, by its name, in OUT/RANK.pt.
"""

import hashlib
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from pitstop.core.errors import InputError
from pitstop.core.recipe import Recipe, parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.data.load import Loader
from pitstop.data.packed import PackedDataset
from pitstop.engine.evaluate import evaluate
from pitstop.engine.initialize import initialize
from pitstop.engine.lr_finder import search
from pitstop.engine.micro_batch import fitting_parts
from pitstop.engine.state import TrainState
from pitstop.engine.step import Stage, train_step
from pitstop.runtime.devices import Device
from pitstop.runtime.place import Place
from pitstop.runtime.ranks import Decision, Ranks

CLASSES = 10
CPU = Device.choose("fp32", compile=False, threads=1)


def recipe(**stated: Any) -> Recipe:
    """A model without batch statistics, and batches that 2 and 3 ranks share unevenly."""
    model = {"name": "test_convnext", "kwargs": {"drop_path_rate": 0.0}}
    some = {"resolution": 32, "batch_size": 13, "grad_accum_steps": 2, "optimizer": "sgd"}
    return parse_recipe({"epochs": 2, "lr": 0.05, "model": model, **some, **stated}, "test")


def steps(
    ranks: Ranks,
    data: PackedDataset,
    spec: Recipe,
    count: int,
    log: list[Any] | None = None,
    device: Device = CPU,
) -> TrainState:
    """Trains for some steps of a recipe's first segment; `log` gets how often gradients met."""
    timeline = Timeline(spec, num_samples=len(data.train))
    state = TrainState.initial(spec, CLASSES, device, ranks.world)
    stage = Stage(timeline.segments[0], state, device, ranks, CLASSES)
    if log is not None:
        stage.model.register_comm_hook(log, counted)  # pyright: ignore[reportCallIssue]
    assert stage.warm_up() is None
    with Loader(
        data.train, timeline, range(count), rank=ranks.rank, world=ranks.world, workers=1
    ) as batches:
        for step, batch in enumerate(batches):
            if log is not None:
                log.append("step")
            train_step(stage, state, batch, timeline.settings_at(step))
    return state


def counted(
    log: list[Any], bucket: torch.distributed.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    log.append("bucket")
    return allreduce_hook(torch.distributed.group.WORLD, bucket)


def gradients(ranks: Ranks, data: PackedDataset) -> Any:
    """The weights after a step whose learning rate is 1: the gradient of the global batch."""
    spec = recipe(lr=1.0, lr_schedule="constant", flip="random", clip_grad_norm=0.5)
    return steps(ranks, data, spec, 1).model.state_dict()


def syncs(ranks: Ranks, data: PackedDataset) -> Any:
    log: list[Any] = []
    steps(ranks, data, recipe(grad_accum_steps=3), 3, log if ranks.world > 1 else None)
    return log


def statistics(ranks: Ranks, data: PackedDataset) -> Any:
    """Batch statistics after two steps, and after rank 0's were taken over."""
    model = {"name": "resnet18", "kwargs": {"layers": [1, 1, 0, 0], "channels": [8] * 4}}
    state = steps(ranks, data, recipe(model=model, resolution=16), 2)
    own = state.model.get_buffer("bn1.running_mean").clone()
    ranks.take_main_buffers(state.model)
    return own, state.model.get_buffer("bn1.running_mean"), state.model.get_parameter("fc.weight")


def begins_as_main(ranks: Ranks, data: PackedDataset) -> Any:
    """Each rank brings weights and statistics of its own."""
    torch.manual_seed(ranks.rank)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    nn.init.normal_(model.get_buffer("1.running_mean"))
    ranks.parallel(model)
    return model.state_dict()


def evaluation(ranks: Ranks, data: PackedDataset) -> Any:
    """Of an odd number of images; and of fewer images than ranks."""
    views = {"flip_average": True, "translate_average": 1}
    spec = recipe(eval={"batch_size": 4, "crop_ratio": 1.0, "also": [views]})
    state = TrainState.initial(spec, CLASSES, CPU)
    torch.manual_seed(0)
    nn.init.normal_(state.model.get_parameter("head.fc.weight"))
    own = evaluate(
        state.model, data.val, spec, CPU, ranks, weights="raw", workers=1, also=lambda _: True
    )
    assert own is not None
    return own, *own.also


def initialized(ranks: Ranks, data: PackedDataset) -> Any:
    """The weights that follow from the data; each rank brings others."""
    model = {"name": "cifarnet", "kwargs": {"widths": [4, 6, 6]}}
    spec = recipe(model=model, seed=ranks.rank, ema={})
    state = TrainState.initial(spec, CLASSES, CPU)
    timeline = Timeline(spec, num_samples=len(data.train))
    initialize(state, data.train, timeline, CPU, ranks, workers=1)
    assert state.ema is not None
    return state.model.state_dict(), state.ema.state_dict()


def interrupted(ranks: Ranks, data: PackedDataset) -> Any:
    """The last rank is asked to stop in its second batch."""
    spec = recipe(eval={"batch_size": 2, "crop_ratio": 1.0})
    state = TrainState.initial(spec, CLASSES, CPU)
    polls: list[None] = []

    def should_stop() -> bool:
        polls.append(None)
        return ranks.rank == ranks.world - 1 and len(polls) >= 2

    result = evaluate(
        state.model, data.val, spec, CPU, ranks, weights="raw", workers=1, should_stop=should_stop
    )
    return result, len(polls)


def words(ranks: Ranks, data: PackedDataset) -> Any:
    """What is said by one is heard by all."""
    wishes = [Decision(stop=ranks.rank == 1)]
    wishes += [Decision(save=True, flush=ranks.rank == 2)] * 2  # the second is what is done then
    wishes += [Decision()] * 2
    with ranks.node_first("place"):
        pass
    return {
        "agreed": [ranks.agree(wish) for wish in wishes],
        "gathered": ranks.gather([ranks.rank, 0.5]),
        "bytes": ranks.from_main(b"\x00state" if ranks.main else None),
        "number": ranks.say_to_all("number", 7 if ranks.main else None),
        "any": ranks.any("any", lambda: ranks.rank == 1),
        "all not": ranks.any("all not", lambda: False),
    }


def ids(ranks: Ranks, data: PackedDataset) -> Any:
    """Which images this rank sees, cropped and mirrored how."""
    timeline = Timeline(recipe(), num_samples=len(data.train))
    with Loader(
        data.train, timeline, range(5), rank=ranks.rank, world=ranks.world, workers=1
    ) as batches:
        return [(batch.ids, batch.images) for batch in batches]


def state_fingerprint(state: TrainState) -> str:
    """A hash of all that training could change, in this process too."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key, item in value.items():
                digest.update(repr(key).encode())
                add(item)
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add(state.state_dict())
    add(dict(state.model.named_buffers()))
    add([p.grad for p in state.model.parameters()])
    add([p.requires_grad for p in state.model.parameters()])
    add([module.training for module in state.model.modules()])
    add([random.getstate(), np.random.get_state(), torch.get_rng_state()])
    return digest.hexdigest()


def with_room_for(images: int, model: nn.Module) -> nn.Module:
    """The model, which runs out of memory when it trains on more images at once."""

    def hook(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if module.training and len(given[0]) > images:
            raise torch.OutOfMemoryError(f"injected: {len(given[0])} images")

    model.register_forward_pre_hook(hook)
    return model


def lr_search(ranks: Ranks, data: PackedDataset) -> Any:
    """The losses, what they suggest, and whether a trace is left; the last rank may stop it."""
    finder = {"fallback": 0.1, "iterations": 12, "start_lr": 1e-4, "end_lr": 10.0}
    spec = recipe(lr="auto", lr_finder=finder)
    assert spec.lr_finder is not None
    timeline = Timeline.planned(spec, len(data.train))
    state = TrainState.initial(timeline.recipe, CLASSES, CPU)
    state.model.train()
    before = state_fingerprint(state)
    found = search(spec.lr_finder, timeline, data, state, CPU, ranks, workers=1)
    assert found is not None
    untouched = state_fingerprint(state) == before
    polls: list[None] = []

    def should_stop() -> bool:
        polls.append(None)
        return ranks.rank == ranks.world - 1 and len(polls) == 3

    stopped = search(
        spec.lr_finder, timeline, data, state, CPU, ranks, workers=1, should_stop=should_stop
    )
    return {
        "losses": found.losses,
        "peak": found.peak,
        "why": found.explained(),
        "untouched": untouched and state_fingerprint(state) == before,
        "stopped": (stopped, len(polls)),
    }


def little_memory(ranks: Ranks, data: PackedDataset) -> Any:
    """The micro-batches when the last rank has room for 3, for 1, for no images."""
    spec = recipe(batch_size=26, grad_accum_steps=1)
    timeline = Timeline(spec, num_samples=len(data.train))
    parts: list[int | str] = []
    for images in (3, 1, 0):
        state = TrainState.initial(spec, CLASSES, CPU)
        if ranks.rank == ranks.world - 1:
            with_room_for(images, state.model)
        try:
            parts.append(fitting_parts(timeline.segments[0], state, CPU, ranks, CLASSES))
        except InputError as error:
            parts.append(str(error))
    return parts


def compiled(ranks: Ranks, data: PackedDataset) -> Any:
    """Whole states after two steps, in eager mode and compiled; accumulation is uneven."""
    device = Device.choose("fp32", compile=True, threads=1)
    model = {"name": "resnet18", "kwargs": {"layers": [1, 1, 0, 0], "channels": [8] * 4}}
    spec = recipe(model=model, resolution=16, batch_size=14)
    eager = steps(ranks, data, spec, 2).state_dict()
    return eager, steps(ranks, data, spec, 2, device=device).state_dict()


TASKS = (
    words,
    gradients,
    syncs,
    statistics,
    begins_as_main,
    evaluation,
    initialized,
    interrupted,
    ids,
    lr_search,
    little_memory,
)

if __name__ == "__main__":
    packed, out, *names = sys.argv[1:]
    place, data = Place.find() or Place(), PackedDataset.open(Path(packed))
    with Ranks(place, timeout=60) as ranks:
        tasks = [globals()[name] for name in names] or TASKS
        results = {task.__name__: task(ranks, data) for task in tasks}
        torch.save(results, Path(out) / f"{place.rank}.pt")
