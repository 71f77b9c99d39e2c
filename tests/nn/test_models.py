"""Models by name: seeds, refusals, BlurPool."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, StdConv2d
from torch import nn

from pitstop.core.errors import InputError
from pitstop.core.recipe import Model
from pitstop.nn.models import build, with_blurpool

TINY = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 32]}


def resnet(blurpool: bool = False, seed: int = 0, **kwargs) -> nn.Module:
    return build(Model(name="resnet18", kwargs={**TINY, **kwargs}, blurpool=blurpool), 5, seed)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def images(size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def blurred(inputs: torch.Tensor) -> torch.Tensor:
    """The 3x3 binomial blur, written out; zeros at the edges, as FFCV has it."""
    row = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(row, row).expand(inputs.shape[1], 1, 3, 3)
    return F.conv2d(inputs, kernel, padding=1, groups=inputs.shape[1])


# Building


def test_the_seed_decides_the_weights():
    assert same_weights(resnet(seed=3), resnet(seed=3))
    assert not same_weights(resnet(seed=3), resnet(seed=4))


def test_the_weights_do_not_depend_on_torchs_generator_nor_touch_it():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = resnet()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_weights(one, resnet())


def test_the_model_is_timms_with_its_kwargs():
    model = resnet()
    oracle = timm.create_model("resnet18", num_classes=5, **TINY)
    shapes = {key: tensor.shape for key, tensor in oracle.state_dict().items()}
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes
    assert model(images()).shape == (2, 5)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_drop_rate_reaches_the_model():
    """With dropout two passes in training differ; those in evaluation do not."""
    for rate, differ in ((0.0, False), (0.5, True)):
        model = resnet(drop_rate=rate).train()
        torch.manual_seed(0)
        one, other = model(images()), model(images())
        assert torch.equal(one, other) != differ
        model.eval()
        assert torch.equal(model(images()), model(images()))


def test_the_last_norm_of_each_residual_branch_starts_at_zero():
    model = resnet()
    last = [m for name, m in model.named_modules() if name.endswith("bn2")]
    assert len(last) == 4
    assert all(torch.all(norm.weight == 0) for norm in last)
    first = [m for name, m in model.named_modules() if name.endswith("bn1")]
    assert all(torch.all(norm.weight == 1) for norm in first)


@pytest.mark.parametrize(
    ("name", "biases"),
    [
        ("resnet18", ["fc.bias"]),
        ("deit_tiny_distilled_patch16_224", ["head.bias", "head_dist.bias"]),
        ("levit_128s", ["head.linear.bias", "head_dist.linear.bias"]),
    ],
)
def test_the_classifier_may_begin_at_the_prior(name, biases):
    """Each class then has the probability 1 / classes, as binary cross entropy has it."""
    kwargs = TINY if name == "resnet18" else {}
    plain = build(Model(name=name, kwargs=kwargs), 20, 0).state_dict()
    model = build(Model(name=name, kwargs=kwargs, prior_bias=True), 20, 0)
    for key, tensor in model.state_dict().items():
        if key in biases:
            assert torch.allclose(tensor.exp(), torch.tensor(1 / 20))
        else:
            assert torch.equal(tensor, plain[key])


# Refusals


@pytest.mark.parametrize("name", ["cifarnet"])
def test_a_classifier_without_a_bias_has_no_prior(name):
    with pytest.raises(InputError, match=rf"^model\.prior_bias: .*{name} has no bias"):
        build(Model(name=name, prior_bias=True), 5, 0)


@pytest.mark.parametrize(
    ("name", "meant"), [("resnet5O", "resnet50"), ("vit_tiny_patch16_224x", "vit_tiny")]
)
def test_a_misspelt_model_is_refused_with_a_suggestion(name, meant):
    with pytest.raises(InputError, match=rf"model\.name: .*{name!r}; did you mean '{meant}"):
        build(Model(name=name), 5, 0)


def test_a_name_like_none_is_refused_without_one():
    with pytest.raises(InputError, match=r"model\.name: timm has no model 'qqqqqqqq'$"):
        build(Model(name="qqqqqqqq"), 5, 0)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"nonsense": 1},
        {"layers": 5},
        {"num_classes": 3},
        {"global_pool": "zz"},
        {"act_layer": "nope"},
        {"norm_layer": "nope"},
        {"block": "BasicBlock"},
        {"layers": [1, 0, 0, 0]},
    ],
    ids=str,
)
def test_kwargs_that_the_model_does_not_take_are_one_line(kwargs):
    with pytest.raises(
        InputError, match=r"^model\.kwargs: resnet18 does not take them: .+"
    ) as refusal:
        build(Model(name="resnet18", kwargs=kwargs), 5, 0)
    assert "\n" not in str(refusal.value)


# BlurPool


def test_just_the_strided_convolutions_of_16_channels_or_more_are_blurred():
    model = resnet(blurpool=True)
    names = {name for name, module in model.named_modules() if hasattr(module, "blur")}
    assert names == {
        f"layer{k}.0.{part}" for k in (3, 4) for part in ("conv1", "downsample.0")
    }  # conv1 has 3 channels, layer2 begins with 8


def test_plain_and_blurred_models_load_each_others_weights():
    plain, blurry = resnet(seed=1), resnet(blurpool=True, seed=2)
    assert list(plain.state_dict()) == list(blurry.state_dict())
    blurry.load_state_dict(plain.state_dict(), strict=True)
    assert same_weights(plain, blurry)
    plain.load_state_dict(resnet(blurpool=True, seed=3).state_dict(), strict=True)


def test_blurpool_does_not_change_the_initial_weights():
    assert same_weights(resnet(), resnet(blurpool=True))


def test_the_output_is_that_of_the_blur_done_by_hand():
    plain, blurry = resnet().eval(), resnet(blurpool=True).eval()
    without = plain(images())
    for name in (
        "layer3.0.conv1",
        "layer3.0.downsample.0",
        "layer4.0.conv1",
        "layer4.0.downsample.0",
    ):
        plain.get_submodule(name).register_forward_pre_hook(lambda _, args: (blurred(args[0]),))
    torch.testing.assert_close(blurry(images()), plain(images()))
    assert not torch.allclose(blurry(images()), without, atol=1e-4)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(16, 8, 3, stride=2, padding=1),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16, bias=False),
        nn.Conv2d(16, 8, (3, 1), stride=(2, 1), dilation=2),
        nn.Conv2d(16, 8, 3, stride=2, padding=1, padding_mode="reflect"),
        Conv2dSame(16, 8, 3, stride=2),
        StdConv2d(16, 8, 3, stride=2, padding=1),
    ],
    ids=["plain", "depthwise", "dilated", "padding_mode", "tf_same", "weight_standardised"],
)
def test_any_convolution_stays_itself_behind_the_blur(conv):
    inputs = torch.randn(2, 16, 13, 13, generator=torch.Generator().manual_seed(0))
    expected = conv(blurred(inputs))
    blurry = with_blurpool(nn.Sequential(conv))
    torch.testing.assert_close(blurry(inputs), expected)


def test_a_blurred_model_takes_images_as_small_as_the_plain_one_does():
    """At 16 pixels the last stage sees one pixel."""
    assert resnet(blurpool=False).eval()(images(16)).shape == (2, 5)
    assert resnet(blurpool=True).eval()(images(16)).shape == (2, 5)


def test_a_blurred_model_trains_and_its_blur_does_not():
    model = resnet(blurpool=True)
    filters = [m.blur.filt.clone() for m in model.modules() if hasattr(m, "blur")]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images()).square().sum().backward()
    optimizer.step()
    after = [m.blur.filt for m in model.modules() if hasattr(m, "blur")]
    assert len(after) == 4
    assert all(map(torch.equal, filters, after))
