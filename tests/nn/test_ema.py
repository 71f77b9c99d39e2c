"""The exponential moving average against a loop by hand and timm's ModelEmaV3."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from pitstop.nn.ema import shadow, update


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
