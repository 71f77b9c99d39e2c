"""Models: timm's, by name, with BlurPool as an option."""

import copy
import math
from collections.abc import Iterable

import timm
import torch
from timm.layers.blur_pool import BlurPool2d
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.recipe import Model
from pitstop.core.rng import Stream, seed_for
from pitstop.core.strict import did_you_mean
from pitstop.nn import cifarnet as cifarnet  # registered with timm by being imported


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
    if spec.prior_bias:
        _begin_at_prior(model, spec.name, num_classes)
    return with_blurpool(model) if spec.blurpool else model


def classifier(model: nn.Module) -> list[nn.Module]:
    """Returns the layers that give the logits (distilled models have two), as the model tells."""
    get = getattr(model, "get_classifier", list)
    found = get()
    return [*found] if isinstance(found, list | tuple) else [found]


def _begin_at_prior(model: nn.Module, name: str, num_classes: int) -> None:
    """Sets the classifier's bias to -log(classes)."""
    inner = [layer for head in classifier(model) for layer in head.modules()]
    linear = [layer for layer in inner if isinstance(layer, nn.Linear | nn.Conv2d)]
    biases = [layer.bias for layer in linear if layer.bias is not None]
    if not biases or len(biases) < len(linear):
        raise InputError(f"model.prior_bias: the classifier of {name} has no bias: leave it out")
    for bias in biases:
        nn.init.constant_(bias, -math.log(num_classes))


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


def with_blurpool(model: nn.Module) -> nn.Module:
    """Puts a 3x3 binomial blur (arXiv 1904.11486) before every strided convolution.

    Of those with at least 16 input channels; the rule and the zero padding are those of FFCV's
    ImageNet script, which measured +1.25 points for ResNet-50. State dicts stay as they are.
    """
    for conv in list(model.modules()):
        if isinstance(conv, nn.Conv2d) and max(conv.stride) > 1 and conv.in_channels >= 16:
            conv.blur = BlurPool2d(conv.in_channels, filt_size=3, stride=1, pad_mode="constant")
            conv.register_forward_pre_hook(_blur_first)
    return model


def _blur_first(conv: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (conv.get_submodule("blur")(inputs[0]),)
