"""Exact evaluation: every image counts once."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.order import rank_slice
from pitstop.core.recipe import Eval, Recipe
from pitstop.data.load import EvalLoader
from pitstop.data.packed import PackedSplit
from pitstop.engine.step import Normalizer
from pitstop.nn import losses
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Decision, Ranks


@dataclass(frozen=True)
class Evaluation:
    """Mean cross entropy, and top-1 and top-5 accuracy in percent."""

    loss: float
    top1: float
    top5: float
    protocol: dict[str, object]
    """How they were obtained; an accuracy without it is not a figure."""
    also: tuple["Evaluation", ...] = ()
    """The same weights by the protocols of `eval.also`."""


def described(protocol: dict[str, object]) -> str:
    """Returns a protocol of an `Evaluation` as text."""
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in protocol.items())


def protocols(recipe: Recipe) -> tuple[Eval, ...]:
    """Returns the recipe's protocol and those of `eval.also`, each with its resolution.

    Raises:
        InputError: one moves an image out of itself.
    """
    own = recipe.eval.model_copy(update={"resolution": recipe.eval_resolution()})
    also = [
        own.model_copy(update={**dict(spec), "resolution": spec.resolution or own.resolution})
        for spec in own.also
    ]
    for spec in (own, *also):
        if spec.translate_average >= side(spec):
            raise InputError(
                f"eval: translate_average {spec.translate_average} must be less than the "
                f"resolution {spec.resolution}"
            )
    return own, *also


def side(spec: Eval) -> int:
    """Returns the resolution of a protocol of `protocols`."""
    assert spec.resolution is not None
    return spec.resolution


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
    also: Callable[[float], bool] = lambda top1: False,
) -> Evaluation | None:
    """Evaluates a model by the recipe's protocol; None when `should_stop` said so on any rank.

    The ranks share the images, and all get the result. Rank 0's batch statistics count. Each
    module is left in the mode in which it came: frozen ones are not in training mode.

    Args:
        also: tells by the top-1 whether to evaluate by the protocols of `eval.also` too.
    """
    ranks.take_main_buffers(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    results: list[Evaluation] = []
    try:
        for spec in protocols(recipe):
            if results and not also(results[0].top1):
                break
            sums = _sums(model, split, spec, recipe, device, ranks, workers, should_stop)
            if sums is None:
                return None
            results.append(_evaluation(sums, len(split), spec, weights, device, ranks))
    finally:
        for module, training in modes:
            module.training = training
    return replace(results[0], also=tuple(results[1:]))


def _evaluation(
    sums: list[float], n: int, spec: Eval, weights: str, device: Device, ranks: Ranks
) -> Evaluation:
    """Returns the result of all ranks, of which this one has these sums."""
    loss, top1, top5 = (ranks.gather(sums).sum(0) / n).tolist()
    protocol = spec.model_dump(exclude={"batch_size", "every", "also"}) | {
        "weights": weights,
        "precision": device.circumstance()["precision"],
        "images": n,
    }
    return Evaluation(loss, 100 * top1, 100 * top5, protocol)


@torch.no_grad()
def _sums(
    model: nn.Module,
    split: PackedSplit,
    spec: Eval,
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
        spec,
        side(spec),
        rows=range(share.start, share.stop),
        workers=workers,
        pin_memory=device.pin_memory,
    ) as loader:
        batches = device.prefetch(loader)
        for i in range(-(-largest // spec.batch_size)):  # as often on each rank
            ranks.begin(f"in batch {i} of an evaluation")
            if ranks.agree(Decision(stop=should_stop())).stop:
                return None
            for batch in islice(batches, 1):
                logits = predict(model, normalize(batch.images), spec, device)
                loss = losses.loss_sum("cross_entropy", logits, batch.labels, 0.0)
                sums.append(torch.stack((loss, *losses.correct(logits, batch.labels))))
    return torch.stack(sums).cpu().double().sum(0).tolist()


def predict(model: nn.Module, inputs: torch.Tensor, spec: Eval, device: Device) -> torch.Tensor:
    """Returns the logits of normalised images [B, 3, R, R] on the device, float32 [B, C].

    They are means over the views that the protocol asks for, as those of airbench (arXiv
    2404.00498, section 3.5): an image and its mirror image, each where it is and, with half of the
    weight, moved along both diagonals.
    """
    with device.autocast():
        logits = _of_both_sides(model, inputs, spec)
        if (far := spec.translate_average) == 0:
            return logits
        padded = F.pad(inputs, (far,) * 4, "reflect")
        for corner in (slice(0, inputs.shape[2]), slice(2 * far, None)):
            logits = logits + _of_both_sides(model, padded[:, :, corner, corner], spec) / 2
    return logits / 2


def _of_both_sides(model: nn.Module, inputs: torch.Tensor, spec: Eval) -> torch.Tensor:
    """Returns the logits, with `flip_average` the mean over the images and their mirror images."""
    logits = model(inputs).float()
    return (logits + model(inputs.flip(3)).float()) / 2 if spec.flip_average else logits
