"""Ranks in one process: alone, and 64 of them over torch's fake process group."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from pitstop.core.order import Order
from pitstop.core.recipe import Recipe, parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.data.load import Loader
from pitstop.data.pack import pack
from pitstop.data.packed import PackedDataset
from pitstop.data.sources.digits import digits_source
from pitstop.engine.meter import Meter
from pitstop.engine.state import TrainState
from pitstop.engine.step import Stage, train_step
from pitstop.runtime.devices import Device
from pitstop.runtime.place import Place
from pitstop.runtime.ranks import ENDING, LOST_SECONDS, STARTING, Decision, Judge, Ranks, Signs

WORLD, BATCH = 64, 150


class FakeRanks(Ranks):
    """One of many ranks, of which the others do not exist."""

    def _join(self) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=self.rank, world_size=self.world)
        self._control = dist.new_group(backend="fake")

    def parallel(self, model: nn.Module) -> nn.Module:
        together = super().parallel(model)
        assert isinstance(together, DistributedDataParallel)
        together.register_comm_hook(None, own_gradients)
        return together

    def __exit__(self, *error: object) -> None:
        dist.destroy_process_group()


def own_gradients(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Stands in for the fake group's all-reduce, whose futures hold nothing."""
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    source = digits_source()
    some = replace(source, train=source.train[::7], val=source.val[::50])
    place = tmp_path_factory.mktemp("data") / "digits"
    pack(some, place, workers=1)
    return PackedDataset.open(place)


@pytest.fixture
def recipe() -> Recipe:
    model = {"name": "resnet18", "kwargs": {"layers": [1, 1, 0, 0], "channels": [8] * 4}}
    stated = {"epochs": 2, "batch_size": BATCH, "resolution": 16, "model": model}
    return parse_recipe({**stated, "grad_accum_steps": 2}, "test")


def test_the_batches_of_64_ranks_are_the_global_batches(data, recipe):
    timeline = Timeline(recipe, num_samples=len(data.train))
    order = Order(timeline)
    shares: list[Iterator[np.ndarray]] = []
    for rank in range(WORLD):
        with (
            FakeRanks(Place(rank, WORLD)) as ranks,
            Loader(
                data.train, timeline, range(3), rank=ranks.rank, world=ranks.world, workers=1
            ) as batches,
        ):
            shares.append(iter([batch.ids for batch in batches]))
    for step in range(3):
        ids = [next(share) for share in shares]
        assert {len(share) for share in ids} == {BATCH // WORLD, BATCH // WORLD + 1}
        assert np.array_equal(np.concatenate(ids), order.ids(step))
    order.close()


@pytest.mark.parametrize("rank", [0, 63])
def test_one_of_64_ranks_takes_a_step_on_its_share(data, recipe, rank):
    timeline = Timeline(recipe, num_samples=len(data.train))
    device = Device.choose("fp32", compile=False)
    with FakeRanks(Place(rank, WORLD)) as ranks:
        state = TrainState.initial(recipe, 10, device, ranks.world)
        stage = Stage(timeline.segments[0], state, device, ranks, 10)
        assert isinstance(stage.model, DistributedDataParallel)
        before = {name: buffer.clone() for name, buffer in state.model.named_buffers()}
        assert stage.warm_up() is None
        assert all(torch.equal(before[name], b) for name, b in state.model.named_buffers())
        assert all(parameter.grad is None for parameter in state.model.parameters())
        with Loader(data.train, timeline, range(1), rank=rank, world=WORLD, workers=1) as (batch,):
            metrics = train_step(stage, state, batch, timeline.settings_at(0))
        meter = Meter(ranks)
        meter.add(timeline.settings_at(0), metrics, 0.0)
        assert meter.flush().images == BATCH
        assert not any("module." in key for key in state.state_dict()["model"])
        assert ranks.agree(Decision(stop=True)) == Decision()


def test_who_is_alone_agrees_with_itself_at_once():
    with Ranks() as ranks:
        for wish in (Decision(), Decision(stop=True), Decision(save=True, flush=True)):
            assert ranks.agree(wish) == wish
        assert ranks.gather([1.5, 2.0]).tolist() == [[1.5, 2.0]]
        assert ranks.from_main(b"bytes") == b"bytes"
        assert ranks.any("any", lambda: True)
        model = nn.Linear(2, 2)
        assert ranks.parallel(model) is model
    assert not dist.is_initialized()


# Who is lost, who hangs


def signs(*beats: int, ticks: int, doing: str = "training step 7") -> dict[int, Signs]:
    return {rank: Signs(ticks, count, doing) for rank, count in enumerate(beats)}


@pytest.fixture
def judge() -> Judge:
    return Judge(timedelta(seconds=100))


def test_ranks_that_get_on_are_left_alone(judge):
    for second in range(1000):
        assert judge.verdict(signs(second, second, ticks=second), second) is None


def test_a_rank_that_is_not_heard_of_is_lost(judge):
    for second in range(100):
        heard = signs(second, second, second, ticks=second)
        if second > 10:
            heard[1] = Signs(10, 10, "training step 3")
        verdict = judge.verdict(heard, second)
        if second <= 10 + LOST_SECONDS:
            assert verdict is None
        else:
            assert verdict == "rank 1 was lost: killed, or its machine is gone"


def test_when_all_stand_still_the_one_that_came_least_far_hangs(judge):
    said = []
    for second in range(200):
        heard = signs(9, 9, 9, ticks=second)
        heard[2] = Signs(second, 8, "waiting for the images of step 57")
        said.append(judge.verdict(heard, second))
    first = next(i for i, verdict in enumerate(said) if verdict is not None)
    assert 100 < first <= 100 + LOST_SECONDS + 1
    assert said[first] == (
        "rank 2 hangs: no answer for 100 s while it was waiting for the images of step 57"
    )


@pytest.mark.parametrize("doing", [STARTING, ENDING])
def test_packing_and_the_last_save_take_as_long_as_they_take(judge, doing):
    for second in range(10_000):
        assert judge.verdict(signs(0, 0, ticks=second, doing=doing), second) is None
