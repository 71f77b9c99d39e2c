"""Color jitter, RandAugment (arXiv 1909.13719) and TrivialAugment (arXiv 2103.10158), batched.

What happens to each image is drawn on the host for the global batch, as a list of operations with
an argument each; it is done on the device, to all images of an operation at once.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from pitstop.core.recipe import RandAugment, TrivialAugmentWide
from pitstop.core.rng import Stream, generator
from pitstop.core.timeline import StepSettings
from pitstop.nn import operations_cpu
from pitstop.nn.operations import FUNCTIONS, Operation


@dataclass(frozen=True)
class Draws:
    """What is done to each image, one operation after the other.

    `operations` are values of `Operation`, int64 [operations, n]; `arguments` are theirs, float64
    [operations, n].
    """

    operations: np.ndarray
    arguments: np.ndarray


def draw(settings: StepSettings, share: slice) -> Draws | None:
    """Returns the draws of a step for one rank's share of the batch, None where nothing is done.

    Color jitter comes first, then the policy, as in torchvision's and timm's pipelines.

    Args:
        settings: the step's.
        share: the rank's rows of the global batch.
    """
    parts = [*_jitter(settings), *_policy(settings)]
    if not parts:
        return None
    operations, arguments = (np.concatenate(each)[:, share] for each in zip(*parts, strict=True))
    return Draws(operations, arguments)


Part = tuple[np.ndarray, np.ndarray]
"""Operations and arguments, as in `Draws`."""


def _jitter(settings: StepSettings) -> Iterator[Part]:
    """Yields torchvision's ColorJitter: each image has the four in an order of its own."""
    strengths = {
        Operation.BRIGHTNESS: settings.brightness,
        Operation.CONTRAST: settings.contrast,
        Operation.COLOR: settings.saturation,
        Operation.HUE: settings.hue,
    }
    used = {operation: strength for operation, strength in strengths.items() if strength > 0}
    if not used:
        return
    n = settings.segment.batch_size
    rng = generator(settings.segment.recipe.seed, Stream.JITTER, settings.step)
    # for all four, so that an image's draws do not depend on which of them are used
    deviations, ranks = rng.random((2, len(strengths), n))
    center = {operation: 0.0 if operation == Operation.HUE else 1.0 for operation in used}
    places = [list(strengths).index(operation) for operation in used]
    lowest = np.array([[max(center[op] - s, 0.0 if center[op] else -s)] for op, s in used.items()])
    highest = np.array([[center[op] + s] for op, s in used.items()])
    arguments = lowest + deviations[places] * (highest - lowest)
    order = ranks[places].argsort(0)
    operations = np.array(list(used), dtype=np.int64)[order]
    yield operations, np.take_along_axis(arguments, order, 0)


def _policy(settings: StepSettings) -> Iterator[Part]:
    """Yields what the phase's policy does."""
    policy = settings.segment.phase.augment
    if policy is None:
        return
    rng = generator(settings.segment.recipe.seed, Stream.AUGMENT, settings.step)
    shape = (policy.num_ops if isinstance(policy, RandAugment) else 1, settings.segment.batch_size)
    which, sign, level, applied = rng.random((4, *shape))
    side = settings.segment.resolution
    if isinstance(policy, TrivialAugmentWide):
        table, strength = trivial_augment_wide(side), np.floor(level * BINS) / (BINS - 1)
    else:
        table = timm_increasing(side) if policy.increasing else rand_augment(side)
        top = policy.highest_magnitude
        magnitude = settings.magnitude + policy.magnitude_std * rng.standard_normal(shape)
        strength = np.clip(magnitude, 0, top) / top
    operations = np.array(list(table), dtype=np.int64)[(which * len(table)).astype(np.int64)]
    if isinstance(policy, RandAugment):
        operations[applied >= policy.prob] = Operation.IDENTITY
    arguments = np.zeros(shape)
    signed = np.where(sign < 0.5, -strength, strength)
    for operation, argument in table.items():
        rows = operations == operation
        arguments[rows] = argument(strength[rows], signed[rows])
    yield operations, arguments


# Tables of a policy: the operations, and their arguments for strengths from 0 to 1, with a sign

Argument = Callable[[np.ndarray, np.ndarray], np.ndarray]
Table = dict[Operation, Argument]

BINS = 31
"""Of torchvision's magnitudes, from 0 to the highest."""


def rand_augment(side: int) -> Table:
    """Returns torchvision's table of RandAugment for images of `side` pixels."""
    shift = 150 / 331 * side
    return _table(shear=0.3, shift=shift, degrees=30.0, factor=0.9, posterize=4)


def trivial_augment_wide(side: int) -> Table:
    """Returns torchvision's table of TrivialAugmentWide, the same for all sizes of images."""
    return _table(shear=0.99, shift=32.0, degrees=135.0, factor=0.99, posterize=6)


def _table(*, shear: float, shift: float, degrees: float, factor: float, posterize: int) -> Table:
    def to_shear(_: np.ndarray, signed: np.ndarray) -> np.ndarray:
        return shear * signed

    def to_shift(_: np.ndarray, signed: np.ndarray) -> np.ndarray:
        return np.trunc(shift * signed)

    def to_factor(_: np.ndarray, signed: np.ndarray) -> np.ndarray:
        return 1 + factor * signed

    return {
        Operation.IDENTITY: _none,
        Operation.SHEAR_X: to_shear,
        Operation.SHEAR_Y: to_shear,
        Operation.TRANSLATE_X: to_shift,
        Operation.TRANSLATE_Y: to_shift,
        Operation.ROTATE: lambda _, signed: degrees * signed,
        Operation.BRIGHTNESS: to_factor,
        Operation.COLOR: to_factor,
        Operation.CONTRAST: to_factor,
        Operation.SHARPNESS: to_factor,
        Operation.POSTERIZE: lambda strength, _: 8 - np.rint(posterize * strength),
        Operation.SOLARIZE: lambda strength, _: np.ceil(255 * (1 - strength) - 1e-6),
        Operation.AUTO_CONTRAST: _none,
        Operation.EQUALIZE: _none,
    }


def _none(strength: np.ndarray, _: np.ndarray) -> np.ndarray:
    return np.zeros_like(strength)


def timm_increasing(side: int) -> Table:
    """Returns the table of timm's `inc1`: Invert and SolarizeAdd for Identity, other arguments."""
    table = _table(shear=0.3, shift=0.45 * side, degrees=30.0, factor=0.9, posterize=4)
    del table[Operation.IDENTITY]
    return table | {
        Operation.POSTERIZE: lambda strength, _: 4 - np.trunc(4 * strength),
        Operation.SOLARIZE: lambda strength, _: 256 - np.trunc(256 * strength),
        Operation.INVERT: _none,
        Operation.SOLARIZE_ADD: lambda strength, _: np.trunc(110 * strength),
    }


# On the device


def augment(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Returns the augmented images; the given ones are lost, for a CPU works in their place.

    A GPU works on all images of an operation at once. A CPU takes one image after the other through
    all its operations, so that what they need stays in its cache, on as many threads as torch uses.

    Args:
        images: uint8 [n, 3, H, W], channels_last.
        draws: of this batch.
    """
    pixels = images.permute(0, 2, 3, 1).contiguous()
    if pixels.device.type == "cpu":
        _operate_in_place(pixels.numpy(), draws)
    else:
        pixels = _operated(pixels, draws.operations, draws.arguments)
    return pixels.permute(0, 3, 1, 2)


def _operate_in_place(pixels: np.ndarray, draws: Draws) -> None:
    """Does to images [n, H, W, 3] what was drawn for them."""

    def operate(first: int) -> None:
        some = slice(first, first + AT_ONCE)
        operations, arguments = draws.operations[:, some].T, draws.arguments[:, some].T
        for image, *todo in zip(pixels[some], operations.tolist(), arguments.tolist(), strict=True):
            for operation, argument in zip(*todo, strict=True):
                if operation != Operation.IDENTITY:
                    operations_cpu.FUNCTIONS[Operation(operation)](image, argument)

    for _ in _threads(torch.get_num_threads()).map(operate, range(0, len(pixels), AT_ONCE)):
        pass


AT_ONCE = 8
"""Images for which a thread is asked at a time: asking takes 30 us, an image 200."""


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="augment")


def _operated(pixels: torch.Tensor, operations: np.ndarray, arguments: np.ndarray) -> torch.Tensor:
    """Returns the images [n, H, W, 3] after their operations; those of the same one together."""
    order = np.arange(len(pixels))  # which image is where
    for each, theirs in zip(operations, arguments, strict=True):
        kinds = each[order]
        groups = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
        done = [_done(_rows(pixels, at), kinds[at[0]], theirs[order[at]]) for at in groups]
        pixels = torch.cat(done) if len(done) > 1 else done[0]
        order = order[np.concatenate(groups)]
    return _rows(pixels, order.argsort())


def _rows(pixels: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    if len(pixels) == 1:
        return pixels
    index = torch.from_numpy(rows).to(pixels.device, non_blocking=pixels.is_cuda)
    return pixels.index_select(0, index)


def _done(pixels: torch.Tensor, operation: int, arguments: np.ndarray) -> torch.Tensor:
    if operation == Operation.IDENTITY:
        return pixels
    return FUNCTIONS[Operation(operation)](pixels, arguments)
