"""Models: timm's, by name, with BlurPool as an option."""

import copy
from collections.abc import Iterable

import timm
import torch
from timm.layers.blur_pool import BlurPool2d
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.recipe import Model
from pitstop.core.rng import Stream, seed_for
from pitstop.core.strict import did_you_mean


def build(spec: Model, num_classes: int, seed: int) -> nn.Module:
    """Returns a new model, float32 on the CPU, whose weights follow from `seed`.

    The last norm of each residual branch starts at zero where the model offers it (timm's ResNets
    do so by default; "Bag of Tricks", arXiv 1812.01187).

    Raises:
        InputError: timm has no such model, or it does not take these kwargs.
    """
    if not timm.is_model(spec.name):
        meant = did_you_mean(spec.name, timm.list_models())
        raise InputError(f"model.name: timm has no model {spec.name!r}{meant}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, Stream.INIT))
        try:
            model = timm.create_model(spec.name, num_classes=num_classes, **spec.kwargs)
        except Exception as error:  # what a model's constructor raises is as varied as the models
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise InputError(f"model.kwargs: {spec.name} does not take them: {why}") from error
    return with_blurpool(model) if spec.blurpool else model


def check_resolutions(model: nn.Module, name: str, resolutions: Iterable[int]) -> None:
    """Passes an image of each side in pixels through the model, on the meta device.

    Raises:
        InputError: it does not take one of them, as a model of a fixed size.
    """
    shapes_only = copy.deepcopy(model).to("meta").eval()
    for side in sorted(set(resolutions)):
        try:
            shapes_only(torch.empty(1, 3, side, side, device="meta"))
        except (RuntimeError, AssertionError, ValueError) as error:
            why = str(error).partition("\n")[0]
            raise InputError(f"model.name: {name} does not take {side} px: {why}") from error


class BlurConv2d(nn.Conv2d):
    """A strided convolution with a 3x3 binomial blur before it (arXiv 1904.11486).

    Its parameters and their names are those of the plain convolution.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # pyright: ignore[reportArgumentType]
            conv.stride,  # pyright: ignore[reportArgumentType]
            conv.padding,  # pyright: ignore[reportArgumentType]
            conv.dilation,  # pyright: ignore[reportArgumentType]
            conv.groups,
            conv.bias is not None,
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.blur = BlurPool2d(conv.in_channels, filt_size=3, stride=1, pad_mode="constant")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(self.blur(input))


def with_blurpool(model: nn.Module) -> nn.Module:
    """Puts a blur before every convolution of stride > 1 with at least 16 input channels.

    The rule is that of FFCV's ImageNet script, which measured +1.25 points for ResNet-50.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and child.in_channels >= 16:
                setattr(module, name, BlurConv2d(child))
    return model
