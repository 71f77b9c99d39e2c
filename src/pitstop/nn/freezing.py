"""Freezing: modules whose parameters and batch statistics stand still for a phase."""

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pitstop.core.errors import InputError
from pitstop.core.strict import did_you_mean


def freeze(
    model: nn.Module, patterns: Sequence[str], batch_norm: Literal["eval", "train"] = "eval"
) -> None:
    """Puts the model in training mode with just the modules of these names frozen.

    A frozen parameter has no gradient, so the optimizer, which keeps all of them, leaves it and
    its momentum alone. A frozen module is in evaluation mode. What the model itself holds off (had
    no gradient before the first freezing) stays so.

    Args:
        patterns: names of modules, such as `layer1`, or patterns of them: `layer[12]`, `blocks.0*`.
        batch_norm: `train` lets the batch statistics of frozen modules go on.

    Raises:
        InputError: the model has no module of such a name, or nothing is left to train.
    """
    held: frozenset[str] = vars(model).setdefault("held_off", _without_gradient(model))
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in held)
    for module in _named(model, patterns):
        module.eval().requires_grad_(False)
        for parameter in module.parameters():
            parameter.grad = None
        for inner in module.modules():
            if batch_norm == "train" and isinstance(inner, _BatchNorm):
                inner.training = True
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            f"freeze: {', '.join(patterns)} leave nothing to train: name fewer modules"
        )


def _without_gradient(model: nn.Module) -> frozenset[str]:
    return frozenset(n for n, parameter in model.named_parameters() if not parameter.requires_grad)


def _named(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    modules = {name: module for name, module in model.named_modules() if name}
    found: list[nn.Module] = []
    for pattern in patterns:
        matching = [module for name, module in modules.items() if fnmatch(name, pattern)]
        if not matching:
            top = ", ".join(name for name, _ in model.named_children())
            meant = did_you_mean(pattern, list(modules)) or f"; at the top: {top}"
            raise InputError(f"freeze: the model has no module {pattern!r}{meant}")
        found += matching
    return found
