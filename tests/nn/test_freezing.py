"""Frozen modules stand still, and go on where they were."""

from hashlib import sha256

import pytest
import timm
import torch
from pydantic import TypeAdapter
from timm.layers.ml_decoder import add_ml_decoder_head
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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
    set_lr_and_momentum(optimizer, 0.01, 0.9, peak_lr=1.0)
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


# Patterns


@pytest.mark.parametrize(
    ("pattern", "frozen"),
    [
        ("layer[12]", {"layer1", "layer2"}),
        ("layer*", {"layer1", "layer2", "layer3", "layer4"}),
        ("*.bn1", {f"layer{k}.0.bn1" for k in (1, 2, 3, 4)}),
        ("layer?.0.conv[!1]", {f"layer{k}.0.conv2" for k in (1, 2, 3, 4)}),
    ],
)
def test_a_pattern_freezes_the_modules_of_its_names(model, pattern, frozen):
    freeze(model, (pattern,))
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert still == under({name for name, _ in model.named_parameters()}, *frozen)
    evaluating = {name for name, m in model.named_modules() if not m.training}
    assert frozen <= evaluating
    assert all(name.startswith(tuple(frozen)) for name in evaluating)


def test_a_pattern_for_everything_leaves_nothing_to_train(model):
    with pytest.raises(InputError, match=r"freeze: \* leave nothing to train"):
        freeze(model, ("*",))


def test_a_pattern_of_no_module_is_refused(model):
    with pytest.raises(InputError, match=r"no module 'layr\*'; did you mean 'layer.'\?"):
        freeze(model, ("layr*",))


# Batch statistics, and what the model holds off


def test_batch_statistics_of_a_frozen_module_may_go_on(model):
    freeze(model, ())
    optimizer = optimizer_of("sgd", model)
    freeze(model, ("bn1", "layer1"), "train")
    weights = digests(model)
    train(model, optimizer, 2)
    moved = under(changed(weights, digests(model)), "bn1", "layer1")
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    assert {name.rpartition(".")[2] for name in moved} == statistics
    norms = {"bn1", "layer1.0.bn1", "layer1.0.bn2", "layer1.0.downsample.1"}
    assert {name.rpartition(".")[0] for name in moved} == norms


def test_dropout_of_a_frozen_module_is_off_though_its_statistics_go_on():
    model = timm.create_model(
        "resnet18", num_classes=5, layers=[1, 1, 1, 1], channels=[8] * 4, drop_path_rate=0.5
    )
    freeze(model, ("layer4",), "train")
    assert model.layer4[0].bn1.training
    assert not model.layer4[0].drop_path.training
    assert model.layer3[0].drop_path.training


def test_what_a_model_holds_off_itself_stays_so():
    model = timm.create_model("resnet18", num_classes=5, layers=[1, 1, 1, 1], channels=[8] * 4)
    model = add_ml_decoder_head(model)
    held = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert held
    for names in (("layer1",), ("layer2",), ()):
        freeze(model, names)
        still = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert still == held | under({name for name, _ in model.named_parameters()}, *names)


# Its cost


def backward_flops(model: nn.Module, inputs: torch.Tensor) -> int:
    output = model(inputs).sum()
    with FlopCounterMode(display=False) as counter:
        output.backward()
    return counter.get_total_flops()


def test_frozen_first_layers_cost_no_backward(model):
    """What is left is the backward pass of the other layers alone."""
    images = torch.randn(2, 3, 64, 64)
    freeze(model, ())
    everything = backward_flops(model, images)
    freeze(model, ("conv1", "bn1", "layer1", "layer2"))
    rest = nn.Sequential(model.layer3, model.layer4, model.global_pool, model.fc)
    features = model.layer2(model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(images))))))
    assert not features.requires_grad
    assert backward_flops(model, images) == backward_flops(rest, features)
    assert backward_flops(model, images) < everything / 3


def test_a_frozen_layer_in_the_middle_costs_half_its_backward(model):
    images = torch.randn(2, 3, 64, 64)
    freeze(model, ())
    everything = backward_flops(model, images)
    with FlopCounterMode(display=False) as counter:
        model.layer3(torch.empty(2, 8, 8, 8))
    freeze(model, ("layer3",))
    # the gradient of the weights costs what the forward pass does, so does that of the inputs
    assert backward_flops(model, images) == everything - counter.get_total_flops()
