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

BINS = 15
"""Of equal width, between 0 and 1: by how sure the model is, for the calibration error."""

Seen = Callable[[torch.Tensor, torch.Tensor], None]
"""Is given the logits float32 [B, C] and the labels int64 [B] of a batch, on the device."""


@dataclass(frozen=True)
class Evaluation:
    """Mean cross entropy; top-1 and top-5 accuracy and the calibration error in percent."""

    loss: float
    top1: float
    top5: float
    ece: float
    """Expected calibration error: how far accuracy lies from confidence, the mean over the images
    by bins of confidence (Guo et al., arXiv 1706.04599)."""
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


def _look_away(logits: torch.Tensor, labels: torch.Tensor) -> None: ...


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
    seen: Seen = _look_away,
) -> Evaluation | None:
    """Evaluates a model by the recipe's protocol; None when `should_stop` said so on any rank.

    The ranks share the images, and all get the result. Rank 0's batch statistics count. Each
    module is left in the mode in which it came: frozen ones are not in training mode.

    Args:
        also: tells by the top-1 whether to evaluate by the protocols of `eval.also` too.
        seen: is called with this rank's images, batch by batch in their order, as the recipe's own
            protocol shows them.
    """
    ranks.take_main_buffers(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    results: list[Evaluation] = []
    try:
        for spec in protocols(recipe):
            if results and not also(results[0].top1):
                break
            look = _look_away if results else seen
            sums = _sums(model, split, spec, recipe, device, ranks, workers, should_stop, look)
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
    loss, top1, top5, *calibration = (ranks.gather(sums).sum(0) / n).tolist()
    gaps = zip(calibration[:BINS], calibration[BINS:], strict=True)
    ece = sum(abs(confidence - right) for confidence, right in gaps)
    protocol = spec.model_dump(exclude={"batch_size", "every", "also"}) | {
        "weights": weights,
        "precision": device.circumstance()["precision"],
        "images": n,
    }
    return Evaluation(loss, 100 * top1, 100 * top5, 100 * ece, protocol)


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
    seen: Seen,
) -> list[float] | None:
    """Returns sums over this rank's images: the loss, correct top-1, correct top-5, and those of
    `_calibration`."""
    share = rank_slice(len(split), ranks.rank, ranks.world)
    largest = -(-len(split) // ranks.world)
    normalize = Normalizer(recipe, device.torch_device)
    sums = [torch.zeros(3 + 2 * BINS, device=device.torch_device)]
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
                figures = torch.stack((loss, *losses.correct(logits, batch.labels)))
                sums.append(torch.cat((figures, _calibration(logits, batch.labels))))
                seen(logits, batch.labels)
    return torch.stack(sums).cpu().double().sum(0).tolist()


def answers(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the class that counts as the answer, int64 [B], and its probability, float32 [B].

    Where several are equally probable (logits of bf16 often are), it is the one that
    `losses.correct` takes.

    Args:
        logits: float32 [B, C].
    """
    first = logits.topk(min(5, logits.shape[1]), dim=1).indices[:, :1]
    return first[:, 0], logits.softmax(1).gather(1, first)[:, 0]


def _calibration(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the sums of confidence by bins of confidence, then of right answers: [2 x BINS]."""
    answer, confidence = answers(logits)
    edges = torch.linspace(0, 1, BINS + 1, device=logits.device)[1:-1]
    bins = torch.arange(BINS, device=logits.device)
    inside = torch.bucketize(confidence, edges)[:, None] == bins
    values = torch.stack((confidence, (answer == labels).float()))
    return (values[:, :, None] * inside).sum(1).flatten()


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
