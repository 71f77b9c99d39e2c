"""Optimizers: torch's and timm's, with parameters grouped by dimensions and by layer."""

from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

import torch
from timm.optim._param_groups import param_groups_layer_decay
from timm.optim.lamb import Lamb as TimmLamb
from timm.optim.sgdw import SGDW
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.recipe import AdamW, AnyOptimizer, Lamb, Optimizer, RmsProp, Sgd
from pitstop.core.strict import did_you_mean


def build(spec: AnyOptimizer, model: nn.Module, *, fused: bool = False) -> torch.optim.Optimizer:
    """Returns the optimizer over all of the model's parameters.

    Its lr and momentum are placeholders: `set_lr_and_momentum` gives each step's. `fused` takes
    torch's fused kernels, which SGD and AdamW have; else nothing is said, and results stay
    those of torch's defaults.

    Raises:
        InputError: `lr_scales` or `layer_decay` do not fit the model.
    """
    optimizer = _make(spec, model, {"fused": True} if fused else {})
    optimizer.register_load_state_dict_pre_hook(_keep_own_settings)
    if fused and isinstance(optimizer, torch.optim.SGD):
        optimizer.register_step_pre_hook(_begin_momentum)
    return optimizer


def _make(spec: AnyOptimizer, model: nn.Module, kernels: dict[str, Any]) -> torch.optim.Optimizer:
    groups = parameter_groups(model, spec)
    match spec:
        case Sgd(decoupled_weight_decay=True):
            groups = [group | {"decay_at_peak": group["weight_decay"]} for group in groups]
            return SGDW(groups, lr=0.0, momentum=0.9, nesterov=spec.nesterov)
        case Sgd():
            # torch wants momentum > 0 for nesterov when it is made; each step sets the real one
            return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=spec.nesterov, **kernels)
        case RmsProp():
            return torch.optim.RMSprop(groups, lr=0.0, alpha=spec.alpha, eps=spec.eps, momentum=0.9)
        case Lamb():
            return TimmLamb(groups, lr=0.0, betas=(0.9, spec.beta2), eps=spec.eps)
        case AdamW():
            betas = (0.9, spec.beta2)
            return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=spec.eps, **kernels)


def _keep_own_settings(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Puts the settings of this optimizer's groups into a state to be loaded.

    A rebase may have changed them, and another device has other kernels: torch would take over the
    saved ones, and leave what follows from them (where Adam counts its steps, whether a GradScaler
    may call it) as it was made. The steps that LAMB counts in its groups are not settings.
    """
    settings = {*optimizer.defaults, "lr_scale", "decay_at_peak"}
    groups = [
        group | {key: own[key] for key in settings & own.keys()}
        for own, group in zip(optimizer.param_groups, saved["param_groups"], strict=True)
    ]
    return saved | {"param_groups": groups}


def _begin_momentum(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Gives each parameter that has a gradient a momentum buffer of zeros, if it has none.

    The result is that of torch's own first step, which copies the gradient. But fused SGD raises
    TypeError when a few have none (layers that thaw), and a GradScaler that skips its first
    step leaves uninitialised memory in them (torch 2.14).
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def parameter_groups(model: nn.Module, spec: Optimizer) -> list[dict[str, Any]]:
    """Returns groups of one weight decay and one `lr_scale`, timm's key for a factor of the lr.

    Matrices and kernels come first, then everything of one dimension or none. Norms and biases are
    found by `ndim`, as in timm: lists of names miss the norms inside downsample blocks. What the
    model itself exempts (`no_weight_decay`, such as position embeddings) is with them.

    Raises:
        InputError: as `lr_scales`.
    """
    declared: Any = getattr(model, "no_weight_decay", set)
    exempt = set(declared())
    scales = lr_scales(model, spec)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        alone = parameter.ndim <= 1 or any(fnmatch(name, pattern) for pattern in exempt)
        groups.setdefault((alone, scales[name]), []).append(parameter)
    decays = {False: spec.weight_decay, True: spec.norm_weight_decay}
    return [
        {"params": groups[alone, scale], "weight_decay": decays[alone], "lr_scale": scale}
        for alone, scale in sorted(groups)
    ]


def lr_scales(model: nn.Module, spec: Optimizer) -> dict[str, float]:
    """Returns the factor of each parameter's lr: its layer's, times that of its pattern.

    Of several patterns that match a name the last counts, so that a recipe which extends another
    can be more specific.

    Raises:
        InputError: a pattern matches no parameter, or the model has no layers to tell apart.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in spec.lr_scales:
        if not any(fnmatch(name, pattern) for name in names):
            raise InputError(
                f"optimizer.lr_scales: {pattern!r} is the name of no parameter"
                + _meant(pattern, names)
            )
    scales = dict.fromkeys(names, 1.0) | _layer_scales(model, spec.layer_decay or 1.0)
    for name in names:
        factors = [by for pattern, by in spec.lr_scales.items() if fnmatch(name, pattern)]
        scales[name] *= factors[-1] if factors else 1.0
    return scales


def _meant(pattern: str, names: list[str]) -> str:
    tops = list(dict.fromkeys(f"{name.partition('.')[0]}.*" for name in names))
    if any(fnmatch(name, f"{pattern}.*") for name in names):
        return f"; did you mean '{pattern}.*'?"
    return did_you_mean(pattern, [*names, *tops]) or f"; at the top: {', '.join(tops)}"


def _layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Returns decay ** (layers between a parameter's own and the head), with timm's layers."""
    if decay == 1:
        return {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=decay)
    scales = {names[p]: group["lr_scale"] for group in groups for p in group["params"]}
    if len(set(scales.values())) < 2:
        raise InputError(
            f"optimizer.layer_decay: timm tells no layers of {type(model).__name__} apart: "
            "give lr_scales instead"
        )
    return scales


def set_lr_and_momentum(
    optimizer: torch.optim.Optimizer, lr: float, momentum: float, peak_lr: float
) -> None:
    """Gives a step's learning rate and momentum (beta1 of Adam and LAMB) to all groups.

    Args:
        peak_lr: of the phase. Decoupled weight decay is in units of it: timm's SGDW takes
            lr x weight_decay off a weight, so at the peak it takes off what the recipe says.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if "decay_at_peak" in group:
            group["weight_decay"] = group["decay_at_peak"] / (peak_lr * group["lr_scale"])
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


def forget(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Drops what the optimizer remembers of these parameters: they go on as new ones."""
    forgotten = set(parameters)
    for parameter in forgotten:
        optimizer.state.pop(parameter, None)
    for group in optimizer.param_groups:
        if forgotten.issuperset(group["params"]):
            group.pop("step", None)  # LAMB counts a group's steps together
