"""Evaluation counts each image once, and leaves the model as it was."""

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from pitstop.core.errors import InputError
from pitstop.core.recipe import Eval, Recipe, parse_recipe
from pitstop.data.pack import pack
from pitstop.data.packed import PackedDataset, PackedSplit
from pitstop.data.sources.folder import folder_source
from pitstop.engine.evaluate import Evaluation, evaluate, predict
from pitstop.nn.freezing import freeze
from pitstop.runtime.devices import Device
from pitstop.runtime.ranks import Ranks

IMAGES, CLASSES = 23, 7
FP32 = Device.choose("fp32", compile=False)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> PackedSplit:
    """23 JPEGs of odd sizes in 7 classes."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("photos")
    for kind, count in (("train", CLASSES), ("val", IMAGES)):
        for i in range(count):
            place = root / "folder" / kind / f"class{i % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
            size = tuple(rng.integers(20, 60, 2).tolist())
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(place / f"{i}.jpg")
    pack(folder_source(root / "folder"), root / "packed", workers=1)
    return PackedDataset.open(root / "packed").val


@pytest.fixture
def model() -> nn.Module:
    """A tiny ResNet that tells images apart, with dropout and statistics of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kwargs = {"layers": [1, 1, 0, 0], "channels": [8, 8, 8, 8], "zero_init_last": False}
        made = timm.create_model("resnet18", num_classes=CLASSES, drop_rate=0.5, **kwargs)
        made.train()(torch.randn(8, 3, 32, 32))
        nn.init.normal_(made.fc.weight)
    return made


def recipe(**protocol: Any) -> Recipe:
    stated = {"epochs": 1, "resolution": 24, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    return parse_recipe({**stated, "eval": protocol}, "test")


def evaluated(model: nn.Module, split: PackedSplit, **protocol: Any) -> Evaluation:
    result = evaluate(model, split, recipe(**protocol), FP32, Ranks(), weights="raw", workers=2)
    assert result is not None
    return result


def one_by_one(model: nn.Module, split: PackedSplit, crop_ratio: float, flip: bool) -> torch.Tensor:
    """The logits of each image by Pillow, torchvision and a plain loop."""
    transform = v2.Compose(
        [
            v2.Resize(round(24 / crop_ratio), antialias=True),
            v2.CenterCrop(24),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
        ]
    )
    model = copy.deepcopy(model).eval()
    rows = []
    for row in range(len(split)):
        with Image.open(io.BytesIO(split.read(row))) as image:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        inputs = transform(pixels)[None]
        with torch.no_grad():
            logits = model(inputs)
            rows.append((logits + model(inputs.flip(3))) / 2 if flip else logits)
    return torch.cat(rows)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop_ratio", [0.875, 1.0])
def test_it_is_a_plain_loop_with_torchvision(model, split, crop_ratio, flip):
    logits, labels = one_by_one(model, split, crop_ratio, flip), torch.tensor(split.labels).long()
    result = evaluated(model, split, crop_ratio=crop_ratio, flip_average=flip, batch_size=8)
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert result.top1 == pytest.approx(100 * (logits.argmax(1) == labels).sum().item() / IMAGES)
    among_five = (logits.topk(5).indices == labels[:, None]).sum().item()
    assert result.top5 == pytest.approx(100 * among_five / IMAGES)
    assert 0 < result.top5 < 100


class CountsImages(nn.Module):
    """Says the class that is written in `answers`, one after the other."""

    def __init__(self, answers: list[int]) -> None:
        super().__init__()
        self.answers = torch.tensor(answers)
        self.sizes: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        seen = sum(self.sizes)
        self.sizes.append(len(images))
        return F.one_hot(self.answers[seen : seen + len(images)], CLASSES).float()


@pytest.mark.parametrize("batch_size", [1, 5, 22, 23, 24, 1000])
def test_each_image_counts_once_at_any_batch_size(split, batch_size):
    answers = split.labels.tolist()
    answers[0] = answers[-1] = CLASSES - 1  # the first of a batch and the last of a small one
    right = sum(answer == label for answer, label in zip(answers, split.labels, strict=True))
    assert right < IMAGES
    model = CountsImages(answers)
    result = evaluated(model, split, batch_size=batch_size)
    assert sum(model.sizes) == IMAGES
    assert result.top1 == pytest.approx(100 * right / IMAGES)
    logits = F.one_hot(model.answers, CLASSES).float()
    expected = F.cross_entropy(logits, torch.tensor(split.labels).long()).item()
    assert result.loss == pytest.approx(expected)


@torch.no_grad()
def test_the_flip_average_is_the_mean_of_the_logits(model):
    images = torch.randn(4, 3, 24, 24)
    model.eval()
    one, other = (predict(model, x, Eval(), FP32) for x in (images, images.flip(3)))
    assert not torch.allclose(one, other, atol=1e-3)
    both = predict(model, images, Eval(flip_average=True), FP32)
    torch.testing.assert_close(both, (one + other) / 2)


@torch.no_grad()
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("far", [1, 3])
def test_the_moved_views_are_those_of_airbench(model, flip, far):
    """`infer_mirror_translate` of its legacy/airbench94.py, whose pad is 1."""
    images = torch.randn(4, 3, 24, 24)
    model.eval()

    def infer(inputs: torch.Tensor) -> torch.Tensor:
        if not flip:
            return model(inputs)
        return 0.5 * model(inputs) + 0.5 * model(inputs.flip(-1))

    padded = F.pad(images, (far,) * 4, "reflect")
    moved = [padded[:, :, 0:24, 0:24], padded[:, :, 2 * far : 24 + 2 * far, 2 * far : 24 + 2 * far]]
    expected = 0.5 * infer(images) + 0.5 * torch.stack([infer(each) for each in moved]).mean(0)
    spec = Eval(flip_average=flip, translate_average=far)
    torch.testing.assert_close(predict(model, images, spec, FP32), expected)
    assert not torch.allclose(expected, infer(images), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("spec", [Eval(), Eval(flip_average=True, translate_average=1)])
def test_logits_are_in_float32_under_bf16(model, spec):
    bf16 = Device.choose("bf16", compile=False)
    assert predict(model.eval(), torch.zeros(2, 3, 24, 24), spec, bf16).dtype == torch.float32


# More protocols


def also_evaluated(
    model: nn.Module, split: PackedSplit, *also: dict[str, Any], asked: bool = True, **own: Any
) -> Evaluation:
    result = evaluate(
        model,
        split,
        recipe(also=also, **own),
        FP32,
        Ranks(),
        weights="raw",
        workers=2,
        also=lambda top1: asked,
    )
    assert result is not None
    return result


VIEWS = {"flip_average": True, "translate_average": 1, "crop_ratio": 1.0}


def test_more_protocols_give_what_each_gives_alone(model, split):
    larger = {"resolution": 40, "interpolation": "bicubic"}
    result = also_evaluated(model, split, VIEWS, larger, batch_size=7)
    assert replace(result, also=()) == evaluated(model, split, batch_size=7)
    assert result.also == tuple(
        evaluated(model, split, batch_size=7, **each) for each in (VIEWS, larger)
    )
    assert len({each.loss for each in (result, *result.also)}) == 3


def test_more_protocols_have_the_resolution_of_the_first(model, split):
    result = also_evaluated(model, split, VIEWS, resolution=32)
    assert result.also == (evaluated(model, split, resolution=32, **VIEWS),)


def test_more_protocols_are_left_out_unless_asked_for(model, split):
    assert also_evaluated(model, split, VIEWS, asked=False) == evaluated(model, split)
    seen = []
    spec = recipe(also=[VIEWS])
    evaluate(
        model, split, spec, FP32, Ranks(), weights="raw", workers=1, also=lambda x: seen.append(x)
    )
    assert seen == [evaluated(model, split).top1]


def test_an_image_cannot_be_moved_out_of_itself(model, split):
    with pytest.raises(InputError, match="translate_average 24 must be less than the resolution"):
        also_evaluated(model, split, {"translate_average": 24})


# The model stays as it was


@pytest.mark.parametrize("training", [True, False])
def test_weights_statistics_and_mode_stay(model, split, training):
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    evaluated(model, split)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_frozen_module_stays_frozen(model, split):
    """Its batch statistics would move otherwise, from the first evaluation of a phase on."""
    freeze(model, ("bn1", "layer1"))
    before = {name: module.training for name, module in model.named_modules()}
    evaluated(model, split)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_twice_gives_the_same(model, split):
    assert evaluated(model, split) == evaluated(model, split)


def test_an_error_leaves_the_mode_too(split):
    model = nn.Sequential(nn.BatchNorm2d(5)).train()
    with pytest.raises(RuntimeError):
        evaluated(model, split)
    assert model.training


# Interruption and protocol


def test_it_can_be_interrupted_in_a_later_protocol(model, split):
    polls = []

    def should_stop() -> bool:
        polls.append(None)
        return len(polls) > 8  # the first takes 6

    result = evaluate(
        model,
        split,
        recipe(batch_size=4, also=[VIEWS]),
        FP32,
        Ranks(),
        weights="raw",
        workers=2,
        should_stop=should_stop,
        also=lambda top1: True,
    )
    assert result is None
    assert len(polls) == 9


@pytest.mark.parametrize("after", [0, 1, 3])
def test_it_can_be_interrupted(model, split, after):
    polls = []

    def should_stop() -> bool:
        polls.append(None)
        return len(polls) > after

    protocol = recipe(batch_size=4)
    result = evaluate(
        model, split, protocol, FP32, Ranks(), weights="raw", workers=2, should_stop=should_stop
    )
    assert result is None
    assert len(polls) == after + 1
    assert model.training


def test_the_protocol_says_how_it_was_obtained(model, split):
    stated = {
        "resolution": 32,
        "crop_ratio": 0.9,
        "interpolation": "bicubic",
        "flip_average": True,
        "translate_average": 2,
    }
    result = evaluate(model, split, recipe(**stated), FP32, Ranks(), weights="ema", workers=1)
    assert result is not None
    assert result.protocol == {
        **stated,
        "weights": "ema",
        "precision": "fp32",
        "images": IMAGES,
    }


def test_the_packed_images_are_those_of_the_folder(split, tmp_path: Path):
    """Else the oracle above would agree on too few of them."""
    assert len(split) == IMAGES
    assert len(np.unique(split.labels)) == CLASSES
    assert len({split.read(row) for row in range(IMAGES)}) == IMAGES
