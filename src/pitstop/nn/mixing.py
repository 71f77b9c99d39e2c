"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899), batched on the device.

Names and meaning are those of timm's `Mixup`: image i is mixed with image B - 1 - i, targets with
the share that each image really has. The parameters are drawn on the host for the global batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from pitstop.core.rng import Stream, generator
from pitstop.core.timeline import StepSettings


@dataclass(frozen=True)
class MixDraws:
    """How a batch is mixed: a row for each image, or a single row for all of them.

    `lam` is the share that the image keeps, float32 [n]; `boxes` the pixels that CutMix pastes
    over, (top, bottom, left, right) int64 [n, 4], empty where the row is mixup's or unmixed;
    `cutmix` tells which rows are CutMix's, bool [n].
    """

    lam: np.ndarray
    boxes: np.ndarray
    cutmix: np.ndarray


def draw(settings: StepSettings, share: slice) -> MixDraws | None:
    """Returns the draws of a step for one rank's share of the batch, None where nothing is mixed.

    Args:
        settings: the step's.
        share: the rank's rows of the global batch.
    """
    mix = settings.segment.phase.mix
    mixup, cutmix = settings.mixup_alpha, settings.cutmix_alpha
    if mix is None or mix.prob == 0 or (mixup <= 0 and cutmix <= 0):
        return None
    per_image = mix.mode == "elem"
    n = settings.segment.batch_size if per_image else 1
    rng = generator(settings.segment.recipe.seed, Stream.MIX, settings.step)
    use_cutmix = rng.random(n) < (mix.switch_prob if mixup > 0 and cutmix > 0 else cutmix > 0)
    mixed = rng.random(n) < mix.prob
    lam = np.ones(n)
    if mixup > 0:
        lam = np.where(mixed & ~use_cutmix, rng.beta(mixup, mixup, n), lam)
    if cutmix > 0:
        lam = np.where(mixed & use_cutmix, rng.beta(cutmix, cutmix, n), lam)
    side = settings.segment.resolution
    boxes = _boxes(lam, rng.random((2, n)), side)
    boxes[~use_cutmix] = 0
    area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
    lam = np.where(use_cutmix, 1 - area / side**2, lam).astype(np.float32)
    rows = share if per_image else slice(None)
    return MixDraws(lam[rows], boxes[rows], use_cutmix[rows])


def _boxes(lam: np.ndarray, centers: np.ndarray, side: int) -> np.ndarray:
    """Returns boxes of area 1 - lam around uniform centers, clipped to the image, int64 [n, 4]."""
    cut = (side * np.sqrt(1 - lam)).astype(np.int64)
    y, x = (centers * side).astype(np.int64)
    edges = [y - cut // 2, y + (cut + 1) // 2, x - cut // 2, x + (cut + 1) // 2]
    return np.stack(edges, axis=1).clip(0, side)


def mix(
    images: torch.Tensor, labels: torch.Tensor, num_classes: int, draws: MixDraws
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mixed images and their targets.

    Args:
        images: float [B, 3, H, W].
        labels: int64 [B].
        draws: of this batch.

    Returns:
        images like those given, and probabilities float32 [B, num_classes].
    """
    device, on_gpu = images.device, images.is_cuda  # a Mac's GPU reads what is freed by then
    lam = torch.from_numpy(draws.lam).to(device, non_blocking=on_gpu)
    keep = lam[:, None, None, None]
    if draws.cutmix.any():
        boxes = torch.from_numpy(draws.boxes).to(device, non_blocking=on_gpu)[:, :, None, None]
        y = torch.arange(images.shape[2], device=device)[:, None]
        x = torch.arange(images.shape[3], device=device)
        top, bottom, left, right = boxes.unbind(1)
        pasted = (y >= top) & (y < bottom) & (x >= left) & (x < right)
        cutmix = torch.from_numpy(draws.cutmix).to(device, non_blocking=on_gpu)[:, None, None, None]
        keep = torch.where(cutmix, (~pasted)[:, None].float(), keep)
    mixed = torch.lerp(images.flip(0), images, keep.to(images.dtype))
    one_hot = F.one_hot(labels, num_classes).float()
    return mixed, torch.lerp(one_hot.flip(0), one_hot, lam[:, None])
