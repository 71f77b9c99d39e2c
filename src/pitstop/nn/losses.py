"""Losses, summed over the samples: who divides by the global batch gets the same on any split."""

import torch
import torch.nn.functional as F


def loss_sum(
    kind: str, logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    """Returns the loss summed over the samples, float32 [].

    Args:
        kind: `cross_entropy`, or binary cross entropy as timm's BinaryCrossEntropy (ResNet strikes
            back, arXiv 2110.00476): `bce`, its mean over the classes, or `bce_sum`, its sum.
        logits: [B, C], of any floating dtype.
        targets: class indices int64 [B], or probabilities float32 [B, C].
        label_smoothing: s moves each target to target x (1 - s) + s / C (arXiv 1512.00567).
    """
    logits = logits.float()
    if kind == "cross_entropy":
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    classes = logits.shape[1]
    if targets.ndim == 1:
        targets = F.one_hot(targets, classes).float()
    targets = targets * (1 - label_smoothing) + label_smoothing / classes
    total = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    return total if kind == "bce_sum" else total / classes


def correct(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns how many samples have their class first, and among the first five: int64 [], [].

    A mixed target counts as its larger part. With fewer than five classes, top-5 is all.

    Args:
        logits: [B, C].
        targets: class indices int64 [B], or probabilities [B, C].
    """
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return ranked[:, 0].sum(), ranked.sum()
