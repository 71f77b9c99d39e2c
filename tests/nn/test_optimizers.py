"""Parameter groups by dimension, and optimizers equal to those made by hand."""

import copy

import pytest
import timm
import torch
from pydantic import TypeAdapter
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.optim.lamb import Lamb
from timm.optim.sgdw import SGDW
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.recipe import AnyOptimizer
from pitstop.nn.optimizers import build, forget, lr_scales, parameter_groups, set_lr_and_momentum

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


DECAY = optimizer_spec(name="sgd", weight_decay=0.1)


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
    grouped = [p for g in parameter_groups(model, DECAY) for p in g["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_the_groups_are_timms(name):
    model = tiny(name)
    declared = getattr(model, "no_weight_decay", set)()
    oracle = param_groups_weight_decay(model, 0.1, no_weight_decay_list=declared)
    wanted = names_by_decay(model, oracle)
    assert names_by_decay(model, parameter_groups(model, DECAY)) == wanted


def test_norms_in_downsample_blocks_and_biases_do_not_decay():
    model = tiny("resnet18")
    groups = names_by_decay(model, parameter_groups(model, DECAY))
    assert {"layer2.0.downsample.1.weight", "layer2.0.downsample.1.bias", "fc.bias"} <= groups[0.0]
    assert {"bn1.weight", "layer1.0.bn2.bias"} <= groups[0.0]
    assert {"conv1.weight", "layer2.0.downsample.0.weight", "fc.weight"} <= groups[0.1]


def test_what_a_vit_exempts_does_not_decay():
    model = tiny("vit_tiny_patch16_224")
    groups = names_by_decay(model, parameter_groups(model, DECAY))
    assert {"pos_embed", "cls_token", "blocks.0.norm1.weight", "head.bias"} <= groups[0.0]
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= groups[0.1]


def test_norms_decay_when_asked():
    model = tiny("resnet18")
    decays = [
        g["weight_decay"]
        for g in parameter_groups(
            model, optimizer_spec(name="sgd", weight_decay=0.1, norm_weight_decay=0.02)
        )
    ]
    assert decays == [0.1, 0.02]


def test_a_model_without_norms_and_biases_has_one_group():
    groups = parameter_groups(nn.Linear(2, 2, bias=False), DECAY)
    assert [g["weight_decay"] for g in groups] == [0.1]


def test_without_scales_the_groups_are_two_as_in_old_checkpoints():
    groups = parameter_groups(tiny("vit_tiny_patch16_224"), DECAY)
    assert [(g["weight_decay"], g["lr_scale"]) for g in groups] == [(0.1, 1.0), (0.0, 1.0)]


# Learning rates by layer


def scales(model: nn.Module, **stated) -> dict[str, float]:
    """The factor of each parameter's lr, as the groups of the optimizer have it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build(optimizer_spec(name="sgd", **stated), model)
    set_lr_and_momentum(optimizer, 2.0, 0.9, peak_lr=2.0)
    return {names[id(p)]: g["lr"] / 2.0 for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize(
    ("name", "kwargs"), [("resnet18", {}), ("vit_tiny_patch16_224", {}), ("convnext_atto", {})]
)
def test_layers_have_the_scales_of_timms_layer_decay(name, kwargs):
    model = timm.create_model(name, num_classes=5, **kwargs)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.8)
    oracle = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert len(set(oracle.values())) > 3
    ours = scales(model, layer_decay=0.8)
    assert ours == pytest.approx(oracle)
    head = {name for name in ours if name.startswith(("fc.", "head."))}
    assert all(ours[name] == 1.0 for name in head)


def test_decay_and_lr_are_grouped_apart():
    model = tiny("resnet18")
    spec = optimizer_spec(name="sgd", weight_decay=0.1, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {
        names[id(p)]: g["weight_decay"] for g in parameter_groups(model, spec) for p in g["params"]
    }
    assert decays == {name: 0.1 * (p.ndim > 1) for name, p in model.named_parameters()}


def test_a_layer_decay_of_one_is_none():
    assert set(scales(tiny("resnet18"), layer_decay=1.0).values()) == {1.0}


def test_layers_that_timm_cannot_tell_apart_are_refused():
    with pytest.raises(InputError, match=r"optimizer\.layer_decay: .*Sequential.*lr_scales"):
        build(optimizer_spec(name="sgd", layer_decay=0.9), small_net())


def test_patterns_scale_the_lr_and_the_last_that_matches_counts():
    model = tiny("resnet18")
    ours = scales(model, lr_scales={"*": 0.5, "layer?.*": 0.25, "*.bias": 64.0, "layer4.*": 2.0})
    assert ours["conv1.weight"] == 0.5
    assert ours["layer1.0.conv1.weight"] == 0.25
    assert ours["layer1.0.bn1.bias"] == ours["fc.bias"] == 64.0
    assert ours["layer4.0.bn1.bias"] == ours["layer4.0.conv1.weight"] == 2.0


def test_a_pattern_multiplies_the_layers_decay():
    model = tiny("resnet18")
    plain = lr_scales(model, optimizer_spec(name="sgd", layer_decay=0.5))
    ours = lr_scales(model, optimizer_spec(name="sgd", layer_decay=0.5, lr_scales={"*.bias": 3.0}))
    assert ours == {n: by * (3.0 if n.endswith(".bias") else 1.0) for n, by in plain.items()}


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("layer1", r"did you mean 'layer1\.\*'\?"),
        ("layer1.0.conv1.wieght", r"did you mean 'layer1\.0\.conv1\.weight'\?"),
        ("laier1.*", r"did you mean 'layer1\.\*'\?"),
        ("zzz", r"at the top: conv1\.\*, bn1\.\*, .*fc\.\*$"),
    ],
)
def test_a_pattern_without_parameters_is_refused_with_a_suggestion(pattern, meant):
    with pytest.raises(InputError, match=rf"^optimizer\.lr_scales: .*no parameter; {meant}"):
        build(optimizer_spec(name="sgd", lr_scales={pattern: 2.0}), tiny("resnet18"))


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adamw", "lamb"])
def test_a_scaled_parameter_moves_as_under_an_optimizer_of_that_lr(name):
    model = small_net()
    scaled, plain = copy.deepcopy(model), copy.deepcopy(model)
    ours = build(optimizer_spec(name=name, lr_scales={"0.*": 0.25}), scaled)
    theirs = build(optimizer_spec(name=name), plain)
    set_lr_and_momentum(ours, 0.04, 0.9, peak_lr=0.04)
    set_lr_and_momentum(theirs, 0.01, 0.9, peak_lr=0.04)
    for net, optimizer in ((scaled, ours), (plain, theirs)):
        step(net, optimizer, 0)
    assert torch.equal(scaled[0].weight, plain[0].weight)
    assert not torch.equal(scaled[2].weight, plain[2].weight)


# Decoupled weight decay


def composers_step(weights, buffers, gradients, *, decay, lr, peak, momentum, nesterov) -> None:
    """DecoupledSGDW of Composer (composer/optim/decoupled_weight_decay.py), in plain terms."""
    for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        buffers[i] = gradient.clone() if buffers[i] is None else momentum * buffers[i] + gradient
        direction = gradient + momentum * buffers[i] if nesterov else buffers[i]
        weight *= 1 - decay * lr / peak
        weight -= lr * direction


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("nesterov", [False, True])
def test_decoupled_steps_are_composers(nesterov, scale):
    model = small_net()
    stated = {"weight_decay": 0.1, "norm_weight_decay": 0.01, "nesterov": nesterov}
    spec = optimizer_spec(name="sgd", decoupled_weight_decay=True, lr_scales={"*": scale}, **stated)
    ours = build(spec, model)
    weights = [parameter.detach().double() for parameter in model.parameters()]
    decays = [0.1 if weight.ndim > 1 else 0.01 for weight in weights]
    buffers = [None] * len(weights)
    for seed, (lr, peak) in enumerate([(0.05, 0.2), (0.2, 0.2), (0.1, 0.2), (0.1, 0.1)]):
        set_lr_and_momentum(ours, lr, 0.8, peak_lr=peak)
        step(model, ours, seed)
        gradients = [parameter.grad.double() for parameter in model.parameters()]
        for i, decay in enumerate(decays):
            composers_step(
                weights[i : i + 1],
                buffers_of_one := buffers[i : i + 1],
                gradients[i : i + 1],
                decay=decay,
                lr=lr * scale,
                peak=peak * scale,
                momentum=0.8,
                nesterov=nesterov,
            )
            buffers[i] = buffers_of_one[0]
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            torch.testing.assert_close(parameter.double(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_decoupled_decay_leaves_what_is_frozen_alone(fused):
    """A thawed layer then goes on, whatever its neighbours remember."""
    model = small_net()
    spec = optimizer_spec(name="sgd", weight_decay=0.5, decoupled_weight_decay=True)
    optimizer = build(spec, model, fused=fused)
    set_lr_and_momentum(optimizer, 0.1, 0.9, peak_lr=0.1)
    model[0].requires_grad_(False)
    frozen, trained = model[0].weight.clone(), model[2].weight.clone()
    step(model, optimizer, 0)
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[2].weight, trained)
    model.requires_grad_(True)
    step(model, optimizer, 1)
    expected = 0.5 * frozen - 0.1 * model[0].weight.grad
    torch.testing.assert_close(model[0].weight, expected)


def test_a_step_that_a_scaler_skips_decays_nothing():
    model = small_net()
    spec = optimizer_spec(name="sgd", weight_decay=0.5, decoupled_weight_decay=True)
    optimizer = build(spec, model)
    set_lr_and_momentum(optimizer, 0.1, 0.9, peak_lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(1, 6)).sum()).backward()
    model[0].weight.grad[0, 0] = torch.inf
    before = copy.deepcopy(model.state_dict())
    scaler.step(optimizer)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


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
    "decoupled": (
        {"name": "sgd", "decoupled_weight_decay": True},
        lambda groups: SGDW(groups, lr=0.05, momentum=0.8),  # of decays over a peak of 1
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
        set_lr_and_momentum(ours, 0.05, 0.8, peak_lr=1.0)
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
        set_lr_and_momentum(optimizer, 0.05, 0.8, peak_lr=1.0)
        step(model, optimizer, 0)
        models.append(model)
    assert not torch.equal(models[0][0].weight, models[1][0].weight)


@pytest.mark.parametrize("kind", KINDS)
def test_lr_and_momentum_reach_every_group(kind):
    optimizer = build(optimizer_spec(**KINDS[kind][0], weight_decay=0.1), small_net())
    set_lr_and_momentum(optimizer, 0.25, 0.5, peak_lr=1.0)
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
        set_lr_and_momentum(optimizer, 0.01, momentum, peak_lr=1.0)
        step(model, optimizer, seed)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_on_in_a_new_optimizer(kind):
    stated = optimizer_spec(**KINDS[kind][0], weight_decay=0.1)
    model = small_net()
    optimizer = build(stated, model)
    set_lr_and_momentum(optimizer, 0.05, 0.8, peak_lr=1.0)
    step(model, optimizer, 0)
    twin = copy.deepcopy(model)
    other = build(stated, twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, its in ((model, optimizer), (twin, other)):
        set_lr_and_momentum(its, 0.02, 0.7, peak_lr=1.0)
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
            set_lr_and_momentum(optimizer, 0.05, 0.8, peak_lr=1.0)
            step(net, optimizer, seed)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_layers_thaw_under_a_fused_optimizer(kind):
    model = small_net()
    optimizer = build(optimizer_spec(**SPECS[kind]), model, fused=True)
    set_lr_and_momentum(optimizer, 0.05, 0.8, peak_lr=1.0)
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


def test_a_state_from_before_there_were_scales_goes_on():
    model = small_net()
    optimizer = build(DECAY, model)
    set_lr_and_momentum(optimizer, 0.05, 0.8, peak_lr=1.0)
    step(model, optimizer, 0)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["lr_scale"]
    twin = copy.deepcopy(model)
    other = build(DECAY, twin)
    other.load_state_dict(old)
    set_lr_and_momentum(other, 0.05, 0.8, peak_lr=1.0)
    step(model, optimizer, 1)
    step(twin, other, 1)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_a_rebased_weight_decay_counts():
    """Settings are those of the recipe in force, not of the state that is loaded."""
    model = small_net()
    saved = build(optimizer_spec(name="sgd", weight_decay=0.1), model)
    optimizer = build(optimizer_spec(name="sgd", weight_decay=0.2, nesterov=True), model)
    optimizer.load_state_dict(saved.state_dict())
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.2, 0.0]
    assert all(g["nesterov"] for g in optimizer.param_groups)


@pytest.mark.parametrize("parts", [slice(0, 1), slice(0, 3)], ids=["a layer", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_forgotten_goes_on_as_new(kind, parts):
    """But for LAMB, which counts the steps of its groups, and so forgets them together."""
    parts = slice(0, 3) if kind == "lamb" else parts
    spec = optimizer_spec(**KINDS[kind][0])
    model = small_net()
    optimizer = build(spec, model)
    set_lr_and_momentum(optimizer, 0.05, 0.8, peak_lr=1.0)
    for seed in range(2):
        step(model, optimizer, seed)
    forget(optimizer, model[parts].parameters())
    assert not set(optimizer.state) & set(model[parts].parameters())
    twin = copy.deepcopy(model)
    other = build(spec, twin)
    set_lr_and_momentum(other, 0.05, 0.8, peak_lr=1.0)
    step(model, optimizer, 3)
    step(twin, other, 3)
    assert torch.equal(model[0].weight, twin[0].weight)
    assert torch.equal(model[2].weight, twin[2].weight) == (parts.stop == 3)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_state_of_another_device_does_not_bring_its_kernels(kind, fused):
    """It is what was computed that is saved, not how."""
    spec = optimizer_spec(**SPECS[kind])
    model = small_net()
    saved = build(spec, model, fused=not fused)
    set_lr_and_momentum(saved, 0.05, 0.8, peak_lr=1.0)
    step(model, saved, 0)
    optimizer = build(spec, model, fused=fused)
    own = optimizer.param_groups[0]["fused"]
    optimizer.load_state_dict(saved.state_dict())
    assert {group["fused"] for group in optimizer.param_groups} == {own}
    set_lr_and_momentum(optimizer, 0.05, 0.8, peak_lr=1.0)
    step(model, optimizer, 1)
    set_lr_and_momentum(saved, 0.05, 0.8, peak_lr=1.0)
    assert saved.param_groups[0]["fused"] != own
