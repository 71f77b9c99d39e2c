"""Losses and accuracy against torch, timm and brute force."""

import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from pitstop.nn.losses import correct, loss_sum

BATCH = 7


def logits_and_labels(classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(BATCH, classes, generator=generator) * 3
    return logits, torch.randint(classes, (BATCH,), generator=generator)


def mixed(labels: torch.Tensor, classes: int) -> torch.Tensor:
    one_hot = F.one_hot(labels, classes).float()
    return torch.lerp(one_hot.flip(0), one_hot, torch.linspace(0.1, 0.9, BATCH)[:, None])


def correct_by_hand(logits: torch.Tensor, labels: torch.Tensor, k: int) -> int:
    """An image counts when fewer than k classes score higher than its own."""
    rows = zip(logits.tolist(), labels.tolist(), strict=True)
    return sum(sum(score > row[label] for score in row) < k for row, label in rows)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [2, 10])
def test_cross_entropy_of_labels_is_torchs_and_timms(classes, smoothing):
    logits, labels = logits_and_labels(classes)
    ours = loss_sum("cross_entropy", logits, labels, smoothing)
    torch.testing.assert_close(
        ours, F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    )
    torch.testing.assert_close(ours / BATCH, LabelSmoothingCrossEntropy(smoothing)(logits, labels))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_mixed_targets_is_timms(smoothing):
    logits, labels = logits_and_labels(10)
    targets = mixed(labels, 10)
    smoothed = targets * (1 - smoothing) + smoothing / 10
    torch.testing.assert_close(
        loss_sum("cross_entropy", logits, targets, smoothing) / BATCH,
        SoftTargetCrossEntropy()(logits, smoothed),
    )


@pytest.mark.parametrize("kind", ["bce", "bce_sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [2, 10])
def test_bce_of_labels_is_timms(classes, smoothing, kind):
    logits, labels = logits_and_labels(classes)
    torch.testing.assert_close(
        loss_sum(kind, logits, labels, smoothing) / BATCH,
        BinaryCrossEntropy(smoothing=smoothing, sum_classes=kind == "bce_sum")(logits, labels),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_of_mixed_targets_is_timms(smoothing):
    """timm's loss smooths labels only: its Mixup smooths the mixed ones before."""
    logits, labels = logits_and_labels(10)
    targets = mixed(labels, 10)
    smoothed = targets * (1 - smoothing) + smoothing / 10
    torch.testing.assert_close(
        loss_sum("bce", logits, targets, smoothing) / BATCH,
        BinaryCrossEntropy(smoothing=smoothing)(logits, smoothed),
    )


@pytest.mark.parametrize("kind", ["cross_entropy", "bce", "bce_sum"])
def test_labels_and_their_one_hots_have_the_same_loss(kind):
    logits, labels = logits_and_labels(10)
    torch.testing.assert_close(
        loss_sum(kind, logits, labels, 0.1),
        loss_sum(kind, logits, F.one_hot(labels, 10).float(), 0.1),
    )


@pytest.mark.parametrize("kind", ["cross_entropy", "bce", "bce_sum"])
def test_the_sum_over_shares_is_the_sum_over_the_batch(kind):
    logits, labels = logits_and_labels(10)
    shares = zip(logits.tensor_split(3), labels.tensor_split(3), strict=True)
    total = sum(loss_sum(kind, x, y, 0.1) for x, y in shares)
    torch.testing.assert_close(total, loss_sum(kind, logits, labels, 0.1))


@pytest.mark.parametrize("kind", ["cross_entropy", "bce", "bce_sum"])
def test_half_precision_logits_are_summed_in_float32(kind):
    logits, labels = logits_and_labels(1000)
    half = logits.bfloat16()
    loss = loss_sum(kind, half, labels, 0.1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, loss_sum(kind, half.float(), labels, 0.1))


@pytest.mark.parametrize("classes", [2, 3, 5, 6, 20])
def test_correct_counts_as_brute_force_does(classes):
    for seed in range(5):
        logits, labels = logits_and_labels(classes, seed)
        first, five = correct(logits, labels)
        assert first.item() == correct_by_hand(logits, labels, 1)
        assert five.item() == correct_by_hand(logits, labels, 5)
        assert (first.dtype, five.dtype) == (torch.int64, torch.int64)


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_with_up_to_five_classes_top5_is_everything(classes):
    logits, labels = logits_and_labels(classes)
    assert correct(logits, labels)[1].item() == BATCH


def test_a_mixed_target_counts_as_its_larger_part():
    logits, labels = logits_and_labels(10)
    share = torch.linspace(0.1, 0.9, BATCH)
    larger = torch.where(share > 0.5, labels, labels.flip(0))
    assert correct(logits, mixed(labels, 10))[0].item() == correct_by_hand(logits, larger, 1)
    sure = F.one_hot(larger, 10).float()
    assert correct(sure, mixed(labels, 10))[0].item() == BATCH
