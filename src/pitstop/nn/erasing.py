"""Random erasing (arXiv 1708.04896), with torchvision's distribution and timm's names."""

from dataclasses import dataclass

import numpy as np
import torch

from pitstop.core.recipe import RandomErasing
from pitstop.core.rng import Stream, generator
from pitstop.core.timeline import StepSettings

TRIES = 10

NOISE = 2**16
"""Places in the noise, beyond an image's size, at which an image's noise may begin."""


@dataclass(frozen=True)
class EraseDraws:
    """What is erased: `boxes` (top, bottom, left, right), int64 [n, 4], empty where nothing is;
    `offsets`, int64 [n], where in the noise an image's noise begins."""

    boxes: np.ndarray
    offsets: np.ndarray


def draw(settings: StepSettings, share: slice) -> EraseDraws | None:
    """Returns the draws of a step for one rank's share of the batch, None where nothing is erased.

    Ten boxes are tried for an image; if none fits, nothing is erased. All ten are always drawn.

    Args:
        settings: the step's.
        share: the rank's rows of the global batch.
    """
    erasing = settings.segment.phase.random_erasing
    if erasing is None or settings.erasing_prob <= 0:
        return None
    n, side = settings.segment.batch_size, settings.segment.resolution
    rng = generator(settings.segment.recipe.seed, Stream.ERASE, settings.step)
    erased = rng.random(n) < settings.erasing_prob
    offsets = rng.integers(NOISE, size=n)
    boxes = _boxes(erasing, rng.random((4, TRIES, n)), side)
    boxes[~erased] = 0
    return EraseDraws(boxes[share], offsets[share])


def _boxes(erasing: RandomErasing, draws: np.ndarray, side: int) -> np.ndarray:
    """Returns the first box that fits of each image, int64 [n, 4]; an empty one if none does."""
    area, ratio, y, x = draws
    area = (erasing.scale[0] + area * (erasing.scale[1] - erasing.scale[0])) * side**2
    low, high = np.log(erasing.ratio[0]), np.log(erasing.ratio[1])
    ratio = np.exp(low + ratio * (high - low))
    h, w = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (h < side) & (w < side)
    chosen = (fits.argmax(0), np.arange(fits.shape[1]))
    h, w, y, x = h[chosen], w[chosen], y[chosen], x[chosen]
    top, left = np.floor(y * (side - h + 1)), np.floor(x * (side - w + 1))
    boxes = np.stack([top, top + h, left, left + w], axis=1).astype(np.int64)
    boxes[~fits.any(0)] = 0
    return boxes


def noise_for(seed: int, side: int, device: torch.device) -> torch.Tensor:
    """Returns standard normal numbers, float32 [3 x side^2 + NOISE], that follow from the seed.

    An image's noise is a piece of them. So all ranks and devices have the same, at no cost a step.
    """
    numbers = generator(seed, Stream.NOISE).standard_normal(3 * side**2 + NOISE, np.float32)
    return torch.from_numpy(numbers).to(device)


def erase(images: torch.Tensor, draws: EraseDraws, noise: torch.Tensor | None) -> None:
    """Erases boxes in place.

    Args:
        images: float [n, 3, H, W], normalised: 0 is the mean color.
        draws: of this batch.
        noise: of `noise_for`, to put there; None for 0.
    """
    for image, box, offset in zip(
        images, draws.boxes.tolist(), draws.offsets.tolist(), strict=True
    ):
        top, bottom, left, right = box
        if top == bottom or left == right:
            continue
        piece = image[:, top:bottom, left:right]
        if noise is None:
            piece.zero_()
        else:
            piece.copy_(noise[offset : offset + piece.numel()].view(piece.shape))
