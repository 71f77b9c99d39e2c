"""The exponential moving average against a loop by hand and timm's ModelEmaV3."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from pitstop.core.recipe import parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.nn.ema import look_ahead, shadow, update
from pitstop.nn.freezing import freeze


def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = small_model()
        made(torch.randn(2, 3, 6, 6))
    return made


def trained(model: nn.Module, step: int) -> nn.Module:
    """The model after a step: every weight moves, batch norm counts a batch more."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        model.train()(torch.randn(5, 3, 6, 6, generator=generator))
    return model


def assert_same(one: dict, other: dict, **tolerance) -> None:
    assert list(one) == list(other)
    for key, value in one.items():
        torch.testing.assert_close(
            value, other[key], msg=lambda m, key=key: f"{key}: {m}", **tolerance
        )


def test_a_shadow_is_a_copy_to_evaluate(model):
    average = shadow(model)
    assert_same(average.state_dict(), model.state_dict(), rtol=0, atol=0)
    before = copy.deepcopy(average.state_dict())
    trained(model, 0)
    assert_same(average.state_dict(), before, rtol=0, atol=0)
    assert not any(module.training for module in average.modules())
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_it_is_the_average_by_hand_under_changing_decays(model):
    average = shadow(model)
    expected = {key: value.double() for key, value in model.state_dict().items()}
    for step, decay in enumerate([0.1, 0.5, 0.9, 0.99]):
        trained(model, step)
        update(average, model, decay)
        for key, value in model.state_dict().items():
            expected[key] = (
                decay * expected[key] + (1 - decay) * value
                if value.is_floating_point()
                else value.double()
            )
    assert_same({k: v.double() for k, v in average.state_dict().items()}, expected)
    assert average.state_dict()["1.running_mean"].abs().sum() > 0


@pytest.mark.parametrize("foreach", [False, True])
def test_it_is_timms(model, foreach):
    oracle, average = ModelEmaV3(model, decay=0.9, foreach=foreach), shadow(model)
    for step in range(5):
        trained(model, step)
        oracle.update(model)
        update(average, model, 0.9)
    assert_same(average.state_dict(), oracle.module.state_dict())


def test_integer_buffers_are_copied(model):
    average = shadow(model)
    for step in range(3):
        update(average, trained(model, step), 0.99)
        counted = average.get_buffer("1.num_batches_tracked")
        assert torch.equal(counted, model.get_buffer("1.num_batches_tracked"))
    assert counted.dtype == torch.int64


def test_a_decay_of_zero_is_the_model_itself(model):
    average = shadow(model)
    update(average, trained(model, 0), 0.0)
    assert_same(average.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_model_is_not_touched_and_no_graph_grows(model):
    average = shadow(model)
    trained(model, 0)
    before = copy.deepcopy(model.state_dict())
    update(average, model, 0.9)
    assert_same(model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad_fn is None for parameter in average.parameters())


# Lookahead


class AirbenchLookahead:
    """LookaheadState of airbench94 (arXiv 2404.00498), in plain terms."""

    def __init__(self, model: nn.Module) -> None:
        self.slow = {key: value.clone() for key, value in model.state_dict().items()}

    def update(self, model: nn.Module, decay: float) -> None:
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                self.slow[key].lerp_(value, 1 - decay)
                value.copy_(self.slow[key])


def test_looking_ahead_is_airbenchs(model):
    twin = copy.deepcopy(model)
    average, oracle = shadow(model), AirbenchLookahead(twin)
    for step in range(4):
        trained(model, step)
        trained(twin, step)
        if step % 2:
            update(average, model, 0.7)
            look_ahead(average, model)
            oracle.update(twin, 0.7)
    assert_same(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    for key, value in average.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


def test_looking_ahead_moves_nothing_that_is_frozen(model):
    average = shadow(model)
    trained(model, 0)
    freeze(model, ("0", "1"))
    before = copy.deepcopy(model.state_dict())
    update(average, model, 0.7)
    look_ahead(average, model)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"3.weight", "3.bias"}
    assert not torch.equal(average.state_dict()["0.weight"], before["0.weight"])


def test_looking_ahead_moves_statistics_that_go_on_in_frozen_layers(model):
    average = shadow(model)
    trained(model, 0)
    freeze(model, ("0", "1"), "train")
    before = copy.deepcopy(model.state_dict())
    update(average, model, 0.7)
    look_ahead(average, model)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"3.weight", "3.bias", "1.running_mean", "1.running_var"}


# Its decay over the run


def decays(**ema) -> list[float]:
    recipe = parse_recipe({"epochs": 100, "batch_size": 10, "ema": ema}, "test")
    timeline = Timeline(recipe, num_samples=100)
    return [timeline.settings_at(step).ema_decay for step in range(timeline.last)]


def test_an_update_of_several_steps_decays_as_theirs_would_together():
    each, fourth = decays(half_life=20), decays(half_life=20, every=4)
    assert fourth == pytest.approx([decay**4 for decay in each])
    assert fourth[-1] == pytest.approx(0.5 ** (4 / 20))
    assert fourth[0] == pytest.approx(0.1**4)  # the warm-up counts steps too


def test_after_the_half_life_half_is_left_however_often_it_is_updated():
    for every in (1, 5, 10):
        updates = decays(half_life=50, every=every)[every - 1 :: every]
        assert torch.tensor(updates[-50 // every :]).prod().item() == pytest.approx(0.5, rel=1e-5)
