"""Frozen modules stand still, and go on where they were."""

from hashlib import sha256

import pytest
import timm
import torch
from pydantic import TypeAdapter
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.recipe import AnyOptimizer
from pitstop.nn.freezing import freeze
from pitstop.nn.optimizers import build, set_lr_and_momentum

OPTIMIZERS = ["sgd", "rmsprop", "adamw", "lamb"]


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kwargs = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "zero_init_last": False}
        return timm.create_model("resnet18", num_classes=5, **kwargs)


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    spec = TypeAdapter(AnyOptimizer).validate_python({"name": name, "weight_decay": 0.1})
    optimizer = build(spec, model)
    set_lr_and_momentum(optimizer, 0.01, 0.9)
    return optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        images = torch.randn(4, 3, 32, 32, generator=generator)
        nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def digest(*tensors: torch.Tensor) -> str:
    out = sha256()
    for tensor in tensors:
        out.update(tensor.detach().contiguous().numpy().tobytes())
    return out.hexdigest()


def digests(model: nn.Module) -> dict[str, str]:
    return {key: digest(tensor) for key, tensor in model.state_dict().items()}


def slots(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """The hash of the optimizer's memory of each parameter that it has one of."""
    tensors = {
        name: [v for _, v in sorted(optimizer.state[p].items()) if isinstance(v, torch.Tensor)]
        for name, p in model.named_parameters()
        if p in optimizer.state
    }
    return {name: digest(*values) for name, values in tensors.items()}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {key for key in before if before[key] != after[key]}


def under(names: set[str], *modules: str) -> set[str]:
    return {name for name in names if name.startswith(tuple(f"{m}." for m in modules))}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_frozen_module_stands_still_and_the_rest_moves(model, name):
    freeze(model, ())
    optimizer = optimizer_of(name, model)
    train(model, optimizer, 2)
    freeze(model, ("conv1", "bn1", "layer1"))
    weights, memory = digests(model), slots(model, optimizer)
    train(model, optimizer, 3)
    frozen = under(set(weights), "conv1", "bn1", "layer1")
    assert len(frozen) > 10
    assert "layer1.0.bn1.running_mean" in frozen
    assert changed(weights, digests(model)) == set(weights) - frozen
    trained = {key for key, _ in model.named_parameters()} - frozen
    assert changed(memory, slots(model, optimizer)) == trained


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_unfreezing_everything_moves(model, name):
    freeze(model, ("layer1",))
    optimizer = optimizer_of(name, model)
    train(model, optimizer, 1)
    weights = digests(model)
    freeze(model, ())
    train(model, optimizer, 2)
    assert changed(weights, digests(model)) == set(weights)


def test_a_gradient_from_before_the_freezing_moves_nothing(model):
    freeze(model, ())
    optimizer = optimizer_of("sgd", model)
    nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    freeze(model, ("layer1",))
    weights = digests(model)
    optimizer.step()
    assert not under(changed(weights, digests(model)), "layer1")


def test_all_parameters_stay_in_the_optimizer(model):
    freeze(model, ("layer1",))
    optimizer = optimizer_of("sgd", model)
    grouped = sum(len(group["params"]) for group in optimizer.param_groups)
    assert grouped == len(list(model.parameters()))


def test_freezing_says_nothing_of_what_was_frozen_before(model):
    freeze(model, ("layer1",))
    freeze(model, ("layer2",))
    assert all(p.requires_grad for p in model.layer1.parameters())
    assert all(module.training for module in model.layer1.modules())
    assert not any(p.requires_grad for p in model.layer2.parameters())
    assert not any(module.training for module in model.layer2.modules())
    assert model.training


def test_a_module_deep_inside_can_be_frozen(model):
    freeze(model, ("layer2.0.bn1",))
    assert not model.layer2[0].bn1.training
    assert model.layer2[0].bn2.training
    assert model.layer2[0].conv1.weight.requires_grad


@pytest.mark.parametrize("names", [("layre1",), ("layer2", "layre1")])
def test_an_unknown_module_is_refused_with_a_suggestion(model, names):
    with pytest.raises(InputError, match=r"freeze: .* no module 'layre1'; did you mean 'layer1'\?"):
        freeze(model, names)


def test_a_name_like_none_is_refused_with_those_at_the_top(model):
    with pytest.raises(InputError, match=r"'zzz'; at the top: conv1, bn1, .*fc$"):
        freeze(model, ("zzz",))
