"""Each operation against torchvision's, one uint8 image at a time."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from timm.data.auto_augment import solarize_add
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from pitstop.nn import operations_cpu
from pitstop.nn.operations import FUNCTIONS, GRID, Operation

Image = torch.Tensor
Ours = Callable[[Operation, Image, np.ndarray], Image]
N = 12

SHARE_OF_TIES = 1e-3
"""Of the pixels that an affine operation may take from the other of two neighbors."""


def images_of(height: int, width: int) -> dict[str, Image]:
    """Images uint8 [N, 3, H, W] of several kinds."""
    rng = torch.Generator().manual_seed(height)
    coarse = torch.rand(N, 3, 5, 5, generator=rng)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) * 255
    photo = (smooth + torch.randn(smooth.shape, generator=rng) * 5).clamp(0, 255).to(torch.uint8)
    levels = torch.randint(256, (N, 3, 1, 1), generator=rng, dtype=torch.uint8)
    two = torch.randint(2, (N, 3, height, width), generator=rng, dtype=torch.uint8) * 200
    return {
        "photo": photo,
        "noise": torch.randint(256, photo.shape, generator=rng, dtype=torch.uint8),
        "dim": photo // 4 + 40,
        "gray": photo[:, :1].expand(-1, 3, -1, -1).contiguous(),
        "constant": levels.expand(photo.shape).contiguous(),
        "two levels": two,
        "black": torch.zeros_like(photo),
        "white": torch.full_like(photo, 255),
    }


SIZES = [(32, 32), (57, 33), (1, 5), (2, 2), (224, 224)]


def on_grid(factors: np.ndarray) -> np.ndarray:
    return np.rint(factors * 2**GRID) / 2**GRID


def spread(low: float, high: float) -> np.ndarray:
    """N numbers, both ends and 0 or 1 among them."""
    middle = np.random.default_rng(0).uniform(low, high, N - 3)
    return np.array([low, high, min(max(low, 1.0), high) if low >= 0 else 0.0, *middle])


FACTORS = on_grid(spread(0, 2))
LEVELS = np.array([0, 1, 2, 77, 127, 128, 129, 200, 254, 255, 255, 3], dtype=float)

TURNS = spread(-0.5, 0.5)

Case = tuple[np.ndarray, Callable[[Image, float], Image]]

POINT: dict[Operation, Case] = {
    Operation.BRIGHTNESS: (FACTORS, tv.adjust_brightness),
    Operation.COLOR: (FACTORS, tv.adjust_saturation),
    Operation.CONTRAST: (FACTORS, tv.adjust_contrast),
    Operation.SHARPNESS: (FACTORS, tv.adjust_sharpness),
    Operation.POSTERIZE: (np.arange(N) % 9.0, lambda x, bits: tv.posterize(x, int(bits))),
    Operation.SOLARIZE: (LEVELS, tv.solarize),
    Operation.AUTO_CONTRAST: (np.zeros(N), lambda x, _: tv.autocontrast(x)),
    Operation.EQUALIZE: (np.zeros(N), lambda x, _: tv.equalize(x)),
    Operation.INVERT: (np.zeros(N), lambda x, _: tv.invert(x)),
    Operation.SOLARIZE_ADD: (
        np.array([0, 1, 50, 77, 109, 110, 127, 128, 5, 9, 64, 100.0]),
        lambda x, added: pil_to_tensor(solarize_add(to_pil_image(x), int(added))),
    ),
}


def degrees(tangent: float) -> float:
    return math.degrees(math.atan(tangent))


def affine(x: Image, shift: tuple[int, int]) -> Image:
    return tv.affine(x, 0.0, list(shift), 1.0, [0.0, 0.0])


MOVING: dict[Operation, Case] = {
    Operation.SHEAR_X: (
        spread(-0.99, 0.99),
        lambda x, t: tv.affine(x, 0.0, [0, 0], 1.0, [degrees(t), 0.0], center=[0, 0]),
    ),
    Operation.SHEAR_Y: (
        spread(-0.99, 0.99),
        lambda x, t: tv.affine(x, 0.0, [0, 0], 1.0, [0.0, degrees(t)], center=[0, 0]),
    ),
    Operation.TRANSLATE_X: (np.trunc(spread(-70, 70)), lambda x, by: affine(x, (int(by), 0))),
    Operation.TRANSLATE_Y: (np.trunc(spread(-70, 70)), lambda x, by: affine(x, (0, int(by)))),
    Operation.ROTATE: (spread(-134, 134), tv.rotate),
}


ARGUMENTS = {each: case[0] for each, case in (POINT | MOVING).items()} | {Operation.HUE: TURNS}


def together(operation: Operation, images: Image, arguments: np.ndarray) -> Image:
    """As on a GPU."""
    pixels = images.permute(0, 2, 3, 1).contiguous()
    before = pixels.clone()
    result = FUNCTIONS[operation](pixels, arguments)
    assert torch.equal(pixels, before)
    assert result.dtype == torch.uint8
    return result.permute(0, 3, 1, 2)


def in_place(operation: Operation, images: Image, arguments: np.ndarray) -> Image:
    """As on a CPU."""
    pixels = images.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    for image, argument in zip(pixels.numpy(), arguments.tolist(), strict=True):
        operations_cpu.FUNCTIONS[operation](image, argument)
    return pixels.permute(0, 3, 1, 2)


BOTH = pytest.mark.parametrize("ours", [together, in_place])


def expected(images: Image, case: Case) -> Image:
    arguments, function = case
    return torch.stack([function(x, float(a)) for x, a in zip(images, arguments, strict=True)])


def test_every_operation_is_compared():
    assert {*POINT, *MOVING, Operation.HUE} == set(FUNCTIONS)
    assert {*FUNCTIONS, Operation.IDENTITY} == set(Operation)
    assert operations_cpu.FUNCTIONS.keys() == FUNCTIONS.keys()


@pytest.mark.parametrize("size", [(31, 47), (47, 31), (1, 1), (1, 9), (9, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("operation", FUNCTIONS, ids=lambda each: each.name)
def test_a_cpu_makes_the_pixels_of_a_gpu(operation, size):
    for kind, images in images_of(*size).items():
        expected = together(operation, images, ARGUMENTS[operation])
        assert torch.equal(in_place(operation, images, ARGUMENTS[operation]), expected), kind


@BOTH
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("operation", POINT, ids=lambda each: each.name)
def test_what_leaves_pixels_in_place_equals_torchvision(ours: Ours, operation, size):
    for kind, images in images_of(*size).items():
        result = ours(operation, images, POINT[operation][0])
        assert torch.equal(result, expected(images, POINT[operation])), kind


@BOTH
@pytest.mark.parametrize("operation", [Operation.COLOR, Operation.CONTRAST], ids=lambda e: e.name)
def test_all_shades_of_gray_that_torchvision_tells_apart(ours: Ours, operation):
    """Of colors whose gray is a whole number up to rounding, float32 decides which one."""
    color = np.stack(np.meshgrid(*[np.arange(256)] * 3, indexing="ij")).reshape(3, -1)
    critical = color[:, (np.array([2989, 5870, 1140]) @ color) % 10_000 == 0]
    image = torch.from_numpy(critical.astype(np.uint8))[:, None]
    assert image.shape[2] > 1000
    images = image.expand(N, -1, -1, -1).contiguous()
    assert torch.equal(ours(operation, images, FACTORS), expected(images, POINT[operation]))


@BOTH
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("operation", MOVING, ids=lambda each: each.name)
def test_what_moves_pixels_equals_torchvision_but_at_ties(ours: Ours, operation, size):
    for kind in ("photo", "noise", "white"):
        images = images_of(*size)[kind]
        result = ours(operation, images, MOVING[operation][0])
        differs = (result != expected(images, MOVING[operation])).any(1)
        assert differs.float().mean() <= SHARE_OF_TIES, kind


@BOTH
@pytest.mark.parametrize("angle", [-135.0, -90.0, -45.0, 45.0, 90.0, 135.0, 180.0])
def test_rotation_by_eighths_of_a_turn_differs_along_the_diagonals_at_most(ours: Ours, angle):
    """There, sources lie between two pixels."""
    images = images_of(224, 224)["noise"]
    result = ours(Operation.ROTATE, images, np.full(N, angle))
    differs = (result != torch.stack([tv.rotate(image, angle) for image in images])).any(1)
    y, x = np.mgrid[:224, :224]
    assert not differs[:, (x != y) & (x + y != 223)].any()


@BOTH
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_hue_is_within_a_level_of_torchvision(ours: Ours, size):
    for kind, images in images_of(*size).items():
        result = ours(Operation.HUE, images, TURNS)
        off = (result.int() - expected(images, (TURNS, tv.adjust_hue)).int()).abs()
        assert off.max() <= 1, kind
        assert (off > 0).float().mean() < 1e-3, kind


NEUTRAL = {
    Operation.SHEAR_X: 0,
    Operation.SHEAR_Y: 0,
    Operation.TRANSLATE_X: 0,
    Operation.TRANSLATE_Y: 0,
    Operation.ROTATE: 0,
    Operation.BRIGHTNESS: 1,
    Operation.COLOR: 1,
    Operation.CONTRAST: 1,
    Operation.SHARPNESS: 1,
    Operation.POSTERIZE: 8,
    Operation.SOLARIZE: 256,
    Operation.SOLARIZE_ADD: 0,
}


@BOTH
@pytest.mark.parametrize("operation", NEUTRAL, ids=lambda each: each.name)
def test_a_neutral_argument_changes_nothing(ours: Ours, operation):
    for images in images_of(57, 33).values():
        result = ours(operation, images, np.full(N, float(NEUTRAL[operation])))
        assert torch.equal(result, images)


@pytest.mark.parametrize("operation", FUNCTIONS, ids=lambda each: each.name)
def test_nothing_is_left_on_another_device(operation):
    """On the meta device a tensor of the CPU, or a look at a value, raises."""
    images = torch.empty(N, 20, 30, 3, dtype=torch.uint8, device="meta")
    result = FUNCTIONS[operation](images, np.ones(N))
    assert result.device.type == "meta"
    assert result.shape == images.shape
    assert result.dtype == torch.uint8
