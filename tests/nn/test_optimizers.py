"""Parameter groups by dimension, and optimizers equal to those made by hand."""

import copy

import pytest
import timm
import torch
from pydantic import TypeAdapter
from timm.optim import param_groups_weight_decay
from timm.optim.lamb import Lamb
from torch import nn

from pitstop.core.recipe import AnyOptimizer
from pitstop.nn.optimizers import build, parameter_groups, set_lr_and_momentum

TINY_RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
TINY_VIT = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
TINY_XCIT = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
MODELS = {
    "resnet18": TINY_RESNET,
    "resnet50": {"layers": [1, 1, 1, 1]},
    "vit_tiny_patch16_224": TINY_VIT,
    "xcit_nano_12_p16_224": TINY_XCIT,
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)},
}


def optimizer_spec(**stated) -> AnyOptimizer:
    return TypeAdapter(AnyOptimizer).validate_python(stated)


def tiny(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=5, **MODELS[name])


def names_by_decay(model: nn.Module, groups: list[dict]) -> dict[float, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in groups}


def small_net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def by_hand(model: nn.Module) -> list[dict]:
    """Groups of `small_net` written out: kernels with 0.1, all else with 0.01."""
    kernels = [model[0].weight, model[2].weight]
    others = [model[0].bias, model[1].weight, model[1].bias, model[2].bias]
    return [
        {"params": kernels, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.01},
    ]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4, 6, generator=generator)
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    optimizer.step()


# Groups


@pytest.mark.parametrize("name", MODELS)
def test_each_parameter_is_in_exactly_one_group(name):
    model = tiny(name)
    grouped = [p for g in parameter_groups(model, 0.1, 0.0) for p in g["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_the_groups_are_timms(name):
    model = tiny(name)
    declared = getattr(model, "no_weight_decay", set)()
    oracle = param_groups_weight_decay(model, 0.1, no_weight_decay_list=declared)
    wanted = names_by_decay(model, oracle)
    assert names_by_decay(model, parameter_groups(model, 0.1, 0.0)) == wanted


def test_norms_in_downsample_blocks_and_biases_do_not_decay():
    model = tiny("resnet18")
    groups = names_by_decay(model, parameter_groups(model, 0.1, 0.0))
    assert {"layer2.0.downsample.1.weight", "layer2.0.downsample.1.bias", "fc.bias"} <= groups[0.0]
    assert {"bn1.weight", "layer1.0.bn2.bias"} <= groups[0.0]
    assert {"conv1.weight", "layer2.0.downsample.0.weight", "fc.weight"} <= groups[0.1]


def test_what_a_vit_exempts_does_not_decay():
    model = tiny("vit_tiny_patch16_224")
    groups = names_by_decay(model, parameter_groups(model, 0.1, 0.0))
    assert {"pos_embed", "cls_token", "blocks.0.norm1.weight", "head.bias"} <= groups[0.0]
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= groups[0.1]


def test_norms_decay_when_asked():
    model = tiny("resnet18")
    decays = [g["weight_decay"] for g in parameter_groups(model, 0.1, 0.02)]
    assert decays == [0.1, 0.02]


def test_a_model_without_norms_and_biases_has_one_group():
    groups = parameter_groups(nn.Linear(2, 2, bias=False), 0.1, 0.0)
    assert [g["weight_decay"] for g in groups] == [0.1]


# Steps

KINDS = {
    "sgd": (
        {"name": "sgd"},
        lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.8),
    ),
    "nesterov": (
        {"name": "sgd", "nesterov": True},
        lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.8, nesterov=True),
    ),
    "rmsprop": (
        {"name": "rmsprop", "alpha": 0.9, "eps": 1e-3},
        lambda groups: torch.optim.RMSprop(groups, lr=0.05, alpha=0.9, eps=1e-3, momentum=0.8),
    ),
    "adamw": (
        {"name": "adamw", "beta2": 0.95, "eps": 1e-6},
        lambda groups: torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.95), eps=1e-6),
    ),
    "lamb": (
        {"name": "lamb", "beta2": 0.95},
        lambda groups: Lamb(groups, lr=0.05, betas=(0.8, 0.95), eps=1e-6),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_optimizer_made_by_hand(kind):
    stated, make = KINDS[kind]
    model = small_net()
    twin = copy.deepcopy(model)
    ours = build(optimizer_spec(**stated, weight_decay=0.1, norm_weight_decay=0.01), model)
    theirs = make(by_hand(twin))
    initial = copy.deepcopy(model)
    for seed in range(3):
        set_lr_and_momentum(ours, 0.05, 0.8)
        step(model, ours, seed)
        step(twin, theirs, seed)
    for parameter, other, start in zip(
        *(m.parameters() for m in (model, twin, initial)), strict=True
    ):
        assert torch.equal(parameter, other)
        assert not torch.equal(parameter, start)


def test_nesterov_is_not_plain_momentum():
    models = []
    for nesterov in (False, True):
        model = small_net()
        optimizer = build(optimizer_spec(name="sgd", nesterov=nesterov), model)
        set_lr_and_momentum(optimizer, 0.05, 0.8)
        step(model, optimizer, 0)
        models.append(model)
    assert not torch.equal(models[0][0].weight, models[1][0].weight)


@pytest.mark.parametrize("kind", KINDS)
def test_lr_and_momentum_reach_every_group(kind):
    optimizer = build(optimizer_spec(**KINDS[kind][0], weight_decay=0.1), small_net())
    set_lr_and_momentum(optimizer, 0.25, 0.5)
    assert len(optimizer.param_groups) == 2
    for group in optimizer.param_groups:
        assert group["lr"] == 0.25
        momentum = group["betas"][0] if "betas" in group else group["momentum"]
        assert momentum == 0.5
    assert all(g["betas"][1] == 0.95 for g in optimizer.param_groups if "betas" in g)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"rmsprop"}))
def test_a_momentum_that_rises_from_zero_does_not_break(kind):
    """A momentum schedule may begin at 0: the buffers appear when they are needed."""
    model = small_net()
    optimizer = build(optimizer_spec(**KINDS[kind][0]), model)
    for seed, momentum in enumerate([0.0, 0.0, 0.5, 0.9]):
        set_lr_and_momentum(optimizer, 0.01, momentum)
        step(model, optimizer, seed)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_on_in_a_new_optimizer(kind):
    stated = optimizer_spec(**KINDS[kind][0], weight_decay=0.1)
    model = small_net()
    optimizer = build(stated, model)
    set_lr_and_momentum(optimizer, 0.05, 0.8)
    step(model, optimizer, 0)
    twin = copy.deepcopy(model)
    other = build(stated, twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, its in ((model, optimizer), (twin, other)):
        set_lr_and_momentum(its, 0.02, 0.7)
        step(net, its, 1)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


# Fused kernels, which a CPU has too

SPECS = {kind: stated for kind, (stated, _) in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_only_sgd_and_adamw_are_fused_and_only_when_asked(kind):
    spec = optimizer_spec(**SPECS[kind])
    asked = build(spec, small_net(), fused=True)
    assert bool(asked.defaults.get("fused")) == (kind in ("sgd", "nesterov", "adamw"))
    assert build(spec, small_net()).defaults.get("fused") is None


@pytest.mark.parametrize("kind", ["sgd", "nesterov", "adamw"])
def test_fused_steps_are_those_of_the_others_but_for_rounding(kind):
    spec = optimizer_spec(**SPECS[kind], weight_decay=0.1)
    model = small_net()
    twin = copy.deepcopy(model)
    for net, optimizer in ((model, build(spec, model)), (twin, build(spec, twin, fused=True))):
        for seed in range(3):
            set_lr_and_momentum(optimizer, 0.05, 0.8)
            step(net, optimizer, seed)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_layers_thaw_under_a_fused_optimizer(kind):
    model = small_net()
    optimizer = build(optimizer_spec(**SPECS[kind]), model, fused=True)
    set_lr_and_momentum(optimizer, 0.05, 0.8)
    model[0].requires_grad_(False)
    step(model, optimizer, 0)
    model.requires_grad_(True)
    before = model[0].weight.clone()
    step(model, optimizer, 1)
    gradient = model[0].weight.grad
    if kind == "sgd":  # the first step of momentum is the gradient
        torch.testing.assert_close(model[0].weight, before - 0.05 * gradient)
    assert not torch.equal(model[0].weight, before)


def test_a_first_step_that_a_scaler_skips_leaves_no_momentum():
    model = small_net()
    optimizer = build(optimizer_spec(name="sgd"), model, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 6)).sum()).backward()
    model[0].weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    for parameter in model.parameters():
        assert not optimizer.state[parameter]["momentum_buffer"].any()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_state_of_another_device_does_not_bring_its_kernels(kind, fused):
    """It is what was computed that is saved, not how."""
    spec = optimizer_spec(**SPECS[kind])
    model = small_net()
    saved = build(spec, model, fused=not fused)
    set_lr_and_momentum(saved, 0.05, 0.8)
    step(model, saved, 0)
    optimizer = build(spec, model, fused=fused)
    own = optimizer.param_groups[0]["fused"]
    optimizer.load_state_dict(saved.state_dict())
    assert {group["fused"] for group in optimizer.param_groups} == {own}
    set_lr_and_momentum(optimizer, 0.05, 0.8)
    step(model, optimizer, 1)
    set_lr_and_momentum(saved, 0.05, 0.8)
    assert saved.param_groups[0]["fused"] != own
