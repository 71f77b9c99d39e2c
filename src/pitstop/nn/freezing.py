"""Freezing: modules whose parameters and batch statistics stand still for a phase."""

from collections.abc import Sequence

from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.strict import did_you_mean


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Puts the model in training mode with just the modules of these names frozen.

    A frozen parameter has no gradient, so the optimizer, which keeps all of them, leaves it and
    its momentum alone. A frozen module is in evaluation mode.

    Raises:
        InputError: the model has no module of such a name, or nothing is left to train.
    """
    modules = dict(model.named_modules())
    model.train().requires_grad_(True)
    for name in names:
        if not name or name not in modules:
            meant = did_you_mean(name, list(modules)) or f"; at the top: {_top(model)}"
            raise InputError(f"freeze: the model has no module {name!r}{meant}")
        modules[name].eval().requires_grad_(False)
        for parameter in modules[name].parameters():
            parameter.grad = None
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"freeze: {', '.join(names)} leave nothing to train: name fewer modules")


def _top(model: nn.Module) -> str:
    return ", ".join(name for name, _ in model.named_children())
