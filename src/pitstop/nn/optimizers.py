"""Optimizers: torch's and timm's, with parameters grouped by their number of dimensions."""

from fnmatch import fnmatch
from typing import Any

import torch
from timm.optim.lamb import Lamb as TimmLamb
from torch import nn

from pitstop.core.recipe import AdamW, AnyOptimizer, Lamb, RmsProp, Sgd


def build(spec: AnyOptimizer, model: nn.Module, *, fused: bool = False) -> torch.optim.Optimizer:
    """Returns the optimizer over all of the model's parameters.

    Its lr and momentum are placeholders: `set_lr_and_momentum` gives each step's. `fused` takes
    torch's fused kernels, which SGD and AdamW have; else nothing is said, and results stay
    those of torch's defaults.
    """
    optimizer = _make(spec, model, {"fused": True} if fused else {})
    optimizer.register_load_state_dict_pre_hook(_keep_own_kernels)
    if fused and isinstance(spec, Sgd):
        optimizer.register_step_pre_hook(_begin_momentum)
    return optimizer


def _make(spec: AnyOptimizer, model: nn.Module, kernels: dict[str, Any]) -> torch.optim.Optimizer:
    groups = parameter_groups(model, spec.weight_decay, spec.norm_weight_decay)
    match spec:
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


def _keep_own_kernels(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Puts this optimizer's `fused` into a state to be loaded: it may be of another device.

    torch would take over the saved one, and leave what follows from it (where Adam counts its
    steps, whether a GradScaler may call it) as it was made.
    """
    own = optimizer.param_groups[0]
    groups = [
        group | {"fused": own["fused"]} if "fused" in own else group
        for group in saved["param_groups"]
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


def parameter_groups(
    model: nn.Module, weight_decay: float, norm_weight_decay: float
) -> list[dict[str, object]]:
    """Returns two groups: matrices and kernels, and everything of one dimension or none.

    Norms and biases are found by `ndim`, as in timm: lists of names miss the norms inside
    downsample blocks. What the model itself exempts (`no_weight_decay`, such as position
    embeddings) is in the second group too.
    """
    declared: Any = getattr(model, "no_weight_decay", set)
    exempt = set(declared())
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        alone = parameter.ndim <= 1 or any(fnmatch(name, pattern) for pattern in exempt)
        (others if alone else decayed).append(parameter)
    groups = [(decayed, weight_decay), (others, norm_weight_decay)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def set_lr_and_momentum(optimizer: torch.optim.Optimizer, lr: float, momentum: float) -> None:
    """Gives a step's learning rate and momentum (beta1 of Adam and LAMB) to all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum
