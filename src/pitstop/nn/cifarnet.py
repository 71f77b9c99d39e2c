"""The network of airbench94: CIFAR-10's speed record (K. Jordan, arXiv 2404.00498).

https://github.com/KellerJordan/cifar10-airbench, legacy/airbench94.py, MIT licence. With images of
32 px it computes what that script's network does. At its end stands the maximum over all that is
left of the image, 3 x 3 there, so it takes any image of at least 17 px.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

KERNEL = 2
"""Side of the whitened patches."""

EPS = 5e-4
"""Added to the variance of a patch's components before they are divided by its root."""

CHUNK = 500
"""Images whose patches are in memory at a time: they have four times as many numbers."""


class CifarNet(nn.Module):
    """Three groups of two convolutions behind a frozen one that whitens patches of 2 x 2 pixels.

    Args:
        num_classes: outputs.
        widths: channels of the three groups.
        batchnorm_momentum: how much of a running statistic stays.
        scale: of the logits.
    """

    def __init__(
        self,
        num_classes: int = 10,
        widths: Sequence[int] = (64, 256, 256),
        batchnorm_momentum: float = 0.6,
        scale: float = 1 / 9,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.scale = scale
        white = 2 * 3 * KERNEL**2
        self.whiten = nn.Conv2d(3, white, KERNEL)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(_bias(self.whiten))
        self.activ = nn.GELU()
        channels = (white, *widths)
        self.groups = nn.Sequential(
            *(
                ConvGroup(before, after, batchnorm_momentum)
                for before, after in zip(channels, widths, strict=False)
            )
        )
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(channels[-1], num_classes, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the logits [B, num_classes] of images [B, 3, H, W]."""
        features = self.groups(self.activ(self.whiten(images)))
        return self.head(self.pool(features).flatten(1)) * self.scale

    @torch.no_grad()
    def initialize(self, images: torch.Tensor) -> None:
        """Sets the first filters to those that whiten the patches of images, and their negatives.

        They are the eigenvectors of the patches' covariance over the roots of its eigenvalues.

        Args:
            images: normalised, float32 [N, 3, H, W].
        """
        sums = [patches.T @ patches for patches in map(_patches, images.split(CHUNK))]
        count = len(images) * (images.shape[2] - KERNEL + 1) * (images.shape[3] - KERNEL + 1)
        values, vectors = torch.linalg.eigh(torch.stack(sums).sum(0).cpu() / count, UPLO="U")
        filters = (vectors / torch.sqrt(values + EPS)).T.flip(0).view(-1, 3, KERNEL, KERNEL)
        self.whiten.weight.copy_(torch.cat((filters, -filters)))

    def get_classifier(self) -> nn.Linear:
        """Returns the last layer, as timm's models do."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the last layer, as timm's models do."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.head.in_features, num_classes, bias=False)


class ConvGroup(nn.Module):
    """Convolution, pooling, norm, GELU, convolution, norm, GELU: half as many pixels a side."""

    def __init__(self, before: int, after: int, batchnorm_momentum: float) -> None:
        super().__init__()
        self.conv1 = _conv(before, after)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = _norm(after, batchnorm_momentum)
        self.conv2 = _conv(after, after)
        self.norm2 = _norm(after, batchnorm_momentum)
        self.activ = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activ(self.norm1(self.pool(self.conv1(x))))
        return self.activ(self.norm2(self.conv2(x)))


def _conv(before: int, after: int) -> nn.Conv2d:
    """Returns a 3 x 3 convolution whose first outputs are its inputs; the others are random."""
    conv = nn.Conv2d(before, after, 3, padding="same", bias=False)
    nn.init.dirac_(conv.weight.detach()[:before])
    return conv


def _norm(channels: int, batchnorm_momentum: float) -> nn.BatchNorm2d:
    """Returns a norm that has a bias, and a weight that stays 1."""
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=1 - batchnorm_momentum)
    norm.weight.requires_grad_(False)
    return norm


def _patches(images: torch.Tensor) -> torch.Tensor:
    """Returns all patches of images [N, 3, H, W], flat: [patches, 3 x KERNEL x KERNEL]."""
    windows = images.unfold(2, KERNEL, 1).unfold(3, KERNEL, 1)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)


def _bias(layer: nn.Conv2d) -> torch.Tensor:
    assert layer.bias is not None
    return layer.bias


default_cfgs = generate_default_cfgs(
    {
        "cifarnet.untrained": {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2470, 0.2435, 0.2616),
            "first_conv": "whiten",
            "classifier": "head",
        }
    }
)


@register_model
def cifarnet(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """Returns airbench94's network: 1.97 million parameters, 0.12 GMACs at 32 px."""
    filtered = ("in_chans",)
    return build_model_with_cfg(CifarNet, "cifarnet", pretrained, kwargs_filter=filtered, **kwargs)
