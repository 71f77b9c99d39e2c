"""The exponential moving average of a model's weights and buffers."""

import copy

import torch
from torch import nn


def shadow(model: nn.Module) -> nn.Module:
    """Returns a copy of the model to hold the average: without gradients, in evaluation mode."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def update(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves the average towards the model: average = decay x average + (1 - decay) x model.

    Floating-point buffers (batch-norm statistics) are averaged like weights; integer ones copied.
    """
    averaged = [*average.parameters(), *average.buffers()]
    current = [*model.parameters(), *model.buffers()]
    floats = [(a, c) for a, c in zip(averaged, current, strict=True) if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floats], [c for _, c in floats], 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
    for a, c in zip(averaged, current, strict=True):
        if not a.is_floating_point():
            a.copy_(c)


@torch.no_grad()
def look_ahead(average: nn.Module, model: nn.Module) -> None:
    """Sets the model to the average (Lookahead, arXiv 1907.08610).

    Only what moves: parameters that are trained, and the floating-point buffers of modules in
    training mode. What is frozen stays as it is, and the average goes on towards it.
    """
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for its, own in zip(average.modules(), model.modules(), strict=True):
        parameters = zip(own.parameters(False), its.parameters(False), strict=True)
        pairs += [(p, a) for p, a in parameters if p.requires_grad]
        buffers = zip(own.buffers(False), its.buffers(False), strict=True)
        pairs += [(b, a) for b, a in buffers if own.training and b.is_floating_point()]
    torch._foreach_copy_([own for own, _ in pairs], [a for _, a in pairs])  # pyright: ignore[reportPrivateImportUsage]
