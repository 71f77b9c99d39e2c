"""Exact evaluation: every image counts once."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from pitstop.core.recipe import Recipe
from pitstop.data.load import EvalLoader
from pitstop.data.packed import PackedSplit
from pitstop.engine.step import normalize
from pitstop.nn import losses
from pitstop.runtime.devices import Device


@dataclass(frozen=True)
class Protocol:
    """How a figure was obtained; an accuracy without it is not a figure."""

    resolution: int
    crop_ratio: float
    interpolation: str
    flip_average: bool
    weights: str
    precision: str
    images: int


@dataclass(frozen=True)
class Evaluation:
    """Mean cross entropy, and top-1 and top-5 accuracy in percent."""

    loss: float
    top1: float
    top5: float
    protocol: dict[str, object]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: PackedSplit,
    recipe: Recipe,
    device: Device,
    *,
    weights: str,
    workers: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluates a model by the recipe's protocol; None when `should_stop` said so.

    Each module is left in the mode in which it came: frozen ones are not in training mode.
    """
    spec, resolution = recipe.eval, recipe.eval_resolution()
    loss = 0.0
    top1 = top5 = 0
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with EvalLoader(split, spec, resolution, workers=workers) as batches:
            for images, labels in batches:
                if should_stop():
                    return None
                labels = labels.to(device.torch_device)
                logits = predict(model, images, recipe, device)
                loss += losses.loss_sum("cross_entropy", logits, labels, 0.0).item()
                first, five = losses.correct(logits, labels)
                top1, top5 = top1 + int(first), top5 + int(five)
    finally:
        for module, training in modes:
            module.training = training
    n = len(split)
    protocol = Protocol(
        resolution=resolution,
        crop_ratio=spec.crop_ratio,
        interpolation=spec.interpolation,
        flip_average=spec.flip_average,
        weights=weights,
        precision=device.circumstance()["precision"],
        images=n,
    )
    return Evaluation(loss / n, 100 * top1 / n, 100 * top5 / n, asdict(protocol))


def predict(model: nn.Module, images: torch.Tensor, recipe: Recipe, device: Device) -> torch.Tensor:
    """Returns the logits of uint8 images [B, 3, R, R], float32 [B, C].

    With `flip_average` they are the mean over an image and its mirror image.
    """
    inputs = normalize(images.to(device.torch_device), recipe)
    with device.autocast():
        logits = model(inputs).float()
        if recipe.eval.flip_average:
            logits = (logits + model(inputs.flip(3)).float()) / 2
    return logits
