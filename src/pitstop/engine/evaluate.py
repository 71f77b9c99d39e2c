"""Exact evaluation: every image counts once."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice

import torch
from torch import nn

from pitstop.core.order import rank_slice
from pitstop.core.recipe import Recipe
from pitstop.data.load import EvalLoader
from pitstop.data.packed import PackedSplit
from pitstop.engine.step import Normalizer
from pitstop.nn import losses
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Decision, Ranks


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
    ranks: Ranks,
    *,
    weights: str,
    workers: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluates a model by the recipe's protocol; None when `should_stop` said so on any rank.

    The ranks share the images, and all get the result. Rank 0's batch statistics count. Each
    module is left in the mode in which it came: frozen ones are not in training mode.
    """
    ranks.take_main_buffers(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        sums = _sums(model, split, recipe, device, ranks, workers, should_stop)
    finally:
        for module, training in modes:
            module.training = training
    if sums is None:
        return None
    n = len(split)
    loss, top1, top5 = (ranks.gather(sums).sum(0) / n).tolist()
    protocol = Protocol(
        resolution=recipe.eval_resolution(),
        crop_ratio=recipe.eval.crop_ratio,
        interpolation=recipe.eval.interpolation,
        flip_average=recipe.eval.flip_average,
        weights=weights,
        precision=device.circumstance()["precision"],
        images=n,
    )
    return Evaluation(loss, 100 * top1, 100 * top5, asdict(protocol))


def _sums(
    model: nn.Module,
    split: PackedSplit,
    recipe: Recipe,
    device: Device,
    ranks: Ranks,
    workers: int,
    should_stop: Callable[[], bool],
) -> list[float] | None:
    """Returns the loss, correct top-1 and correct top-5 summed over this rank's images."""
    share = rank_slice(len(split), ranks.rank, ranks.world)
    largest = -(-len(split) // ranks.world)
    normalize = Normalizer(recipe, device.torch_device)
    sums = [torch.zeros(3, device=device.torch_device)]
    with EvalLoader(
        split,
        recipe.eval,
        recipe.eval_resolution(),
        rows=range(share.start, share.stop),
        workers=workers,
        pin_memory=device.pin_memory,
    ) as loader:
        batches = device.prefetch(loader)
        for i in range(-(-largest // recipe.eval.batch_size)):  # as often on each rank
            ranks.begin(f"in batch {i} of an evaluation")
            if ranks.agree(Decision(stop=should_stop())).stop:
                return None
            for batch in islice(batches, 1):
                logits = predict(model, batch.images, normalize, recipe, device)
                loss = losses.loss_sum("cross_entropy", logits, batch.labels, 0.0)
                sums.append(torch.stack((loss, *losses.correct(logits, batch.labels))))
    return torch.stack(sums).cpu().double().sum(0).tolist()


def predict(
    model: nn.Module, images: torch.Tensor, normalize: Normalizer, recipe: Recipe, device: Device
) -> torch.Tensor:
    """Returns the logits of uint8 images [B, 3, R, R] on the device, float32 [B, C].

    With `flip_average` they are the mean over an image and its mirror image.
    """
    inputs = normalize(images)
    with device.autocast():
        logits = model(inputs).float()
        if recipe.eval.flip_average:
            logits = (logits + model(inputs.flip(3)).float()) / 2
    return logits
