"""airbench94's network; that it trains as the original does is tested with the cifar recipe."""

import pytest
import timm
import torch
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.recipe import Model
from pitstop.nn.cifarnet import CifarNet, ConvGroup
from pitstop.nn.freezing import freeze
from pitstop.nn.models import build, check_resolutions

WIDTHS = (4, 6, 6)


def images(n: int = 64, side: int = 32) -> torch.Tensor:
    """Smooth ones, whose patches are far from white."""
    coarse = torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, size=side, mode="bicubic")


def test_it_is_a_model_of_timm_with_the_original_parameters():
    model = timm.create_model("cifarnet", num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 1_972_792  # as airbench's make_net()
    assert model.get_classifier() is model.head
    model.reset_classifier(7)
    assert model(images(2)).shape == (2, 7)


def test_kwargs_that_it_does_not_have_are_refused():
    with pytest.raises(InputError, match=r"cifarnet does not take them: .*depth"):
        build(Model(name="cifarnet", kwargs={"depth": 3}), 10, seed=0)


@pytest.mark.parametrize("side", [9, 24, 32, 48, 64])
def test_it_takes_images_of_many_sizes(side):
    model = timm.create_model("cifarnet", num_classes=5, widths=WIDTHS)
    assert model(images(2, side)).shape == (2, 5)


def test_images_that_are_too_small_are_refused():
    with pytest.raises(InputError, match="cifarnet does not take 8 px"):
        check_resolutions(CifarNet(widths=WIDTHS), "cifarnet", [8, 32])


def test_patches_come_out_of_the_first_layer_white():
    model = CifarNet(widths=WIDTHS)
    many = images(600, 16)
    model.initialize(many)
    with torch.no_grad():
        features = model.whiten(many).permute(0, 2, 3, 1).flatten(0, 2)
    half = len(features.T) // 2
    torch.testing.assert_close(features[:, half:], -features[:, :half])
    second_moments = (features.T @ features / len(features))[:half, :half]
    off = second_moments - torch.diag(second_moments.diag())
    assert off.abs().max() < 1e-2
    assert (second_moments.diag() <= 1.001).all()  # less where EPS outweighs the variance
    assert second_moments.diag().max() > 0.99


def test_convolutions_begin_by_handing_their_inputs_on():
    group = ConvGroup(3, 5, batchnorm_momentum=0.6)
    inputs = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(group.conv1(inputs)[:, :3], inputs)
    features = torch.randn(2, 5, 8, 8)
    torch.testing.assert_close(group.conv2(features), features)


def test_only_the_filters_of_the_whitening_and_the_scales_of_norms_stand_still():
    model = CifarNet(widths=WIDTHS)
    held = {name for name, p in model.named_parameters() if not p.requires_grad}
    norms = {f"groups.{i}.norm{j}.weight" for i in range(3) for j in (1, 2)}
    assert held == {"whiten.weight", *norms}
    freeze(model, ())
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == held


def test_norms_keep_as_much_as_the_originals():
    norm = CifarNet(widths=WIDTHS).groups.get_submodule("0.norm1")
    assert isinstance(norm, nn.BatchNorm2d)
    assert (norm.eps, norm.momentum) == (1e-12, 1 - 0.6)
