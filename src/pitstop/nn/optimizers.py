"""Optimizers: torch's and timm's, with parameters grouped by their number of dimensions."""

from fnmatch import fnmatch
from typing import Any

import torch
from timm.optim.lamb import Lamb as TimmLamb
from torch import nn

from pitstop.core.recipe import AdamW, AnyOptimizer, Lamb, RmsProp, Sgd


def build(spec: AnyOptimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Returns the optimizer over all of the model's parameters.

    Its lr and momentum are placeholders: `set_lr_and_momentum` gives each step's.
    """
    groups = parameter_groups(model, spec.weight_decay, spec.norm_weight_decay)
    match spec:
        case Sgd():
            # torch wants momentum > 0 for nesterov when it is made; each step sets the real one
            return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=spec.nesterov)
        case RmsProp():
            return torch.optim.RMSprop(groups, lr=0.0, alpha=spec.alpha, eps=spec.eps, momentum=0.9)
        case Lamb():
            return TimmLamb(groups, lr=0.0, betas=(0.9, spec.beta2), eps=spec.eps)
        case AdamW():
            return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, spec.beta2), eps=spec.eps)


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
