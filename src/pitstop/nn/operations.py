"""What augmentation does to pixels: torchvision's operations, each image with its own argument.

Every function takes uint8 images [n, H, W, 3], contiguous, with an argument each, float64 [n] on
the host, and returns new images like them on the same device; nothing waits for the device.

The oracle is torchvision.transforms.v2.functional on one uint8 image at a time. Factors are rounded
to multiples of 1/8192, so that int16 and int64 hold what torchvision's float32 computes: point
operations are equal to it, and alike on every device. Coordinates are fixed-point integers: what
moves pixels is alike on every device too, and equal to torchvision's nearest neighbor but where a
source lies within 1e-4 px of the middle between two pixels. `hue` is float32: equal within a level.
"""

from collections.abc import Callable
from enum import IntEnum

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import rgb_to_grayscale

GRID = 13
"""Bits after the point of a factor."""

LOW = 7
"""Of these, the bits of its lower part: products with each of both parts fit 16 bits."""


class Operation(IntEnum):
    """Names and arguments: torchvision's, and timm's `SOLARIZE_ADD`."""

    IDENTITY = 0
    SHEAR_X = 1
    """The tangent of the angle; so for `SHEAR_Y`."""
    SHEAR_Y = 2
    TRANSLATE_X = 3
    """Pixels, whole ones; so for `TRANSLATE_Y`."""
    TRANSLATE_Y = 4
    ROTATE = 5
    """Degrees, counterclockwise."""
    BRIGHTNESS = 6
    """A factor from 0 to 2; so for the next three."""
    COLOR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10
    """Bits to keep, 0 to 8."""
    SOLARIZE = 11
    """The level from which on it is inverted, 0 to 256."""
    AUTO_CONTRAST = 12
    EQUALIZE = 13
    INVERT = 14
    SOLARIZE_ADD = 15
    """What is added to levels below 128, 0 to 128."""
    HUE = 16
    """Turns, -0.5 to 0.5."""


def _column(values: np.ndarray, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """Returns numbers [n] as a tensor [n, 1, 1, 1] on the device of `like`."""
    numbers = torch.from_numpy(values).to(dtype)
    return numbers.to(like.device, non_blocking=like.is_cuda)[:, None, None, None]


# What moves pixels


def translate_x(images: torch.Tensor, pixels: np.ndarray) -> torch.Tensor:
    """Moves to the right; black follows."""
    height = images.shape[1]
    return _moved_rows(images, np.repeat(pixels[:, None], height, 1), np.zeros_like(pixels))


def translate_y(images: torch.Tensor, pixels: np.ndarray) -> torch.Tensor:
    """Moves down; black follows."""
    return _moved_rows(images, np.zeros((len(pixels), images.shape[1])), pixels)


def shear_x(images: torch.Tensor, tangents: np.ndarray) -> torch.Tensor:
    """Shears about the upper left corner."""
    centers = np.arange(images.shape[1]) + 0.5
    return _moved_rows(images, -np.floor(tangents[:, None] * centers + 0.5), np.zeros(len(images)))


def _moved_rows(images: torch.Tensor, right: np.ndarray, down: np.ndarray) -> torch.Tensor:
    """Moves rows by whole pixels: a row of the result is a piece of a row with black around it.

    Args:
        right: [n, H], of each row of the result.
        down: [n], of all rows of an image.
    """
    n, height, width, channels = images.shape
    by = right.astype(np.int64).clip(-width, width)
    margin = int(np.abs(by).max(initial=0))
    framed = F.pad(images, (0, 0, margin, margin, 1, 0))  # the row above is black too
    source = np.arange(1, height + 1) - down.astype(np.int64)[:, None]
    source[(source < 1) | (source > height)] = 0
    row = np.arange(n)[:, None] * (height + 1) + source
    starts = torch.from_numpy((row * (width + 2 * margin) + margin - by).ravel())
    starts = starts.to(images.device, non_blocking=images.is_cuda)
    size = width * channels
    pieces = (framed.numel() - size) // channels + 1, size
    return framed.as_strided(pieces, (channels, 1)).index_select(0, starts).view_as(images)


def shear_y(images: torch.Tensor, tangents: np.ndarray) -> torch.Tensor:
    """Shears about the upper left corner."""
    return _affine(images, shear_y_matrices(tangents))


def rotate(images: torch.Tensor, degrees: np.ndarray) -> torch.Tensor:
    """Rotates about the center."""
    return _affine(images, rotate_matrices(degrees, *images.shape[1:3]))


def shear_y_matrices(tangents: np.ndarray | float) -> np.ndarray:
    """Returns float64 [6, n]: of each image the rows of M one after the other.

    A pixel comes from M (x, y, 1); centers of pixels are at x + 1/2.
    """
    ones, zeros = np.ones_like(tangents), np.zeros_like(tangents)
    return np.stack([ones, zeros, zeros, tangents, ones, zeros])


def rotate_matrices(degrees: np.ndarray | float, height: int, width: int) -> np.ndarray:
    """Returns float64 [6, n], as `shear_y_matrices`."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    x, y = width / 2, height / 2
    return np.stack([cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y])


def fixed_point(matrices: np.ndarray) -> np.ndarray:
    """Returns the matrices in units of 2^-32, int64 [6, n], for numbers of pixels.

    Pixel 0's center is at 1/2; the frame of a black pixel around the image adds 1.
    """
    xx, xy, x1, yx, yy, y1 = matrices
    from_x, from_y = x1 + (xx + xy) / 2 + 1, y1 + (yx + yy) / 2 + 1
    return np.rint(np.stack([xx, xy, from_x, yx, yy, from_y]) * 2.0**32).astype(np.int64)


def _affine(images: torch.Tensor, matrices: np.ndarray) -> torch.Tensor:
    """Takes each pixel from the nearest to M (x, y, 1), black where that is outside."""
    n, height, width, channels = images.shape
    m = _column(fixed_point(matrices).ravel(), torch.int64, images).view(6, n, 1, 1)
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)[:, None]

    def source(by_x: torch.Tensor, by_y: torch.Tensor, from_0: torch.Tensor, size: int):
        along = (by_x * x).bitwise_right_shift_(16).int()
        down = (by_y * y).add_(from_0).bitwise_right_shift_(16).int()
        return (along + down).bitwise_right_shift_(16).clamp_(0, size + 1)

    index = source(m[3], m[4], m[5], height).mul_(width + 2).add_(source(m[0], m[1], m[2], width))
    framed = F.pad(images, (0, 0, 1, 1, 1, 1)).view(n, -1, channels)
    return _gathered(framed, index.long().view(n, 1, -1).expand(-1, channels, -1), images)


def _gathered(values: torch.Tensor, index: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Returns values[i, index[i, c, p], c] in the shape of `images`.

    Args:
        values: uint8 [n, any, 3].
        index: int64 [n, 3, pixels]. Of several ways to the same this one is the fastest.
    """
    found = torch.empty(images.shape, dtype=values.dtype, device=images.device)
    by_channel = found.view(len(images), -1, images.shape[3]).transpose(1, 2)
    torch.gather(values.transpose(1, 2), 2, index, out=by_channel)
    return found


# What looks at a pixel alone


def brightness(images: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
    return _saturated(_product(images.short(), _grid(factors), images))


def _grid(factors: np.ndarray) -> np.ndarray:
    """Returns factors in units of 1/8192, int64 [n]."""
    return np.rint(factors * 2**GRID).astype(np.int64)


def _product(
    values: torch.Tensor,
    factors: np.ndarray,
    images: torch.Tensor,
    others: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns floor(values x factor + others x (1 - factor)), int16.

    Args:
        values, others: int16, -255 to 255, of n rows.
        factors: in units of 1/8192, -8192 to 16384; from 0 on with `others`.
    """
    high, low = (_column(part, torch.int16, images) for part in divmod(factors, 2**LOW))
    above, below = values * high, values * low
    if others is not None:
        rest = divmod(2**GRID - factors, 2**LOW)
        other_high, other_low = (_column(part, torch.int16, images) for part in rest)
        above.add_(others * other_high)
        below.add_(others * other_low)
    return above.add_(below.bitwise_right_shift_(LOW)).bitwise_right_shift_(GRID - LOW)


def _saturated(values: torch.Tensor) -> torch.Tensor:
    """Returns int16 values as uint8, clipped; the given ones are lost."""
    return values.clamp_(0, 255).to(torch.uint8)


def posterize(images: torch.Tensor, bits: np.ndarray) -> torch.Tensor:
    return images & _column(256 - 2.0 ** (8 - bits), torch.uint8, images)


def solarize(images: torch.Tensor, levels: np.ndarray) -> torch.Tensor:
    below = images.short().sub_(_column(levels, torch.int16, images))
    return images ^ below.bitwise_right_shift_(15).bitwise_not_().to(torch.uint8)


def invert(images: torch.Tensor, _: np.ndarray) -> torch.Tensor:
    return images.bitwise_not()


def solarize_add(images: torch.Tensor, added: np.ndarray) -> torch.Tensor:
    dark = (images < 128).short()
    return _saturated(dark.mul_(_column(added, torch.int16, images)).add_(images))


# What looks at the whole image, and then at a pixel alone: by a table


def auto_contrast(images: torch.Tensor, _: np.ndarray) -> torch.Tensor:
    rows = images.flatten(2)
    low = rows.amin(1).view(len(images), -1, 3).amin(1).float()[:, :, None]
    high = rows.amax(1).view(len(images), -1, 3).amax(1).float()[:, :, None]
    flat = low == high
    scale = torch.where(flat, 1.0, (high - low).mul_(1 / 255))
    levels = torch.arange(256.0, device=images.device)
    tables = ((levels - torch.where(flat, 0.0, low)) / scale).clamp_(0, 255).to(torch.uint8)
    return _looked_up(tables, images.long())


def _looked_up(tables: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Returns what tables [n, 3, 256] have for pixels, int64 [n, H, W, 3]."""
    return _gathered(tables.transpose(1, 2), pixels.flatten(1, 2).transpose(1, 2), pixels)


def equalize(images: torch.Tensor, _: np.ndarray) -> torch.Tensor:
    """As Pillow, whose steps of the histogram are whole numbers."""
    pixels = images.long()
    counts = torch.zeros(len(images), 3, 256, dtype=torch.int32, device=images.device)
    one = torch.ones(1, dtype=torch.int32, device=images.device)
    by_channel = pixels.flatten(1, 2).transpose(1, 2)
    counts.scatter_add_(2, by_channel, one.expand(by_channel.shape))
    below = counts.cumsum(2, dtype=torch.int32)
    brightest = counts.gather(2, below.argmax(2, keepdim=True))
    step = (by_channel.shape[2] - brightest).div_(255, rounding_mode="floor")
    below = F.pad(below[:, :, :-1], (1, 0))
    tables = below.add_(step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(0, 255)
    tables[:, :, 0] = 0
    levels = torch.arange(256, dtype=torch.int32, device=images.device)
    return _looked_up(torch.where(step > 0, tables, levels).to(torch.uint8), pixels)


def contrast(images: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
    gray = rgb_to_grayscale(images.permute(0, 3, 1, 2))
    mean = gray.sum((1, 2, 3)).float().div_(gray[0].numel())
    grid = _column(_grid(factors), torch.int64, images).view(-1, 1)
    levels = torch.arange(256, device=images.device)
    # an integer, then rounded once: what a fused multiply-add gives torchvision
    exact = (grid * levels << 23) + (2**GRID - grid) * (mean[:, None] * 2**23).long()
    tables = exact.float().mul_(2.0 ** -(GRID + 23)).clamp_(0, 255).to(torch.uint8)
    return tables.gather(1, images.flatten(1).long()).view_as(images)


# What looks at other channels, or at neighbors


def color(images: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
    gray = rgb_to_grayscale(images.permute(0, 3, 1, 2), num_output_channels=3)
    gray = gray.permute(0, 2, 3, 1).contiguous().short()
    return _saturated(_product(images.short(), _grid(factors), images, gray))


def sharpness(images: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
    """Away from, or towards, the mean of 3 x 3 pixels in which the middle counts 5 times."""
    n, height, width, _ = images.shape
    if height <= 2 or width <= 2:
        return images
    rows = images.view(n, height, -1).short()
    middle = rows[:, 1:-1, 3:-3]
    across = rows[:, :, :-6] + rows[:, :, 3:-3] + rows[:, :, 6:]
    total = (across[:, :-2] + across[:, 1:-1]).add_(across[:, 2:]).add_(middle, alpha=4)
    # total / 13, rounded: 5/64 is a little more, and 79/1024 good enough for what is then left
    mean = (total * 5).bitwise_right_shift_(6)
    rest = total.sub_(mean, alpha=13).mul_(79).add_(512).bitwise_right_shift_(10)
    away = mean.add_(rest).sub_(middle)
    change = _product(away[..., None], 2**GRID - _grid(factors), images)[..., 0]
    middle.add_(change)
    return _saturated(rows).view_as(images)


def _planes(images: torch.Tensor) -> torch.Tensor:
    """Returns images as [n, 3, H, W], contiguous."""
    return images.permute(0, 3, 1, 2).contiguous()


def hue(images: torch.Tensor, turns: np.ndarray) -> torch.Tensor:
    """By way of hue, saturation, value."""
    red, green, blue = planes = _planes(images).float().div_(255).unbind(1)
    value, low = torch.stack(planes).amax(0), torch.stack(planes).amin(0)
    chroma = value - low
    over = torch.where(chroma == 0, 1.0, chroma)
    angle = torch.where(value == green, (blue - red) / over + 2, (red - green) / over + 4)
    angle = torch.where(value == red, (green - blue) / over, angle)
    angle = angle + _column(turns * 6, torch.float32, images)[..., 0]
    channels = []
    for corner in (5, 3, 1):
        k = (angle + corner).remainder_(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, 3).mul_(256 - 1e-3).to(torch.uint8)


Function = Callable[[torch.Tensor, np.ndarray], torch.Tensor]

FUNCTIONS: dict[Operation, Function] = {
    Operation.SHEAR_X: shear_x,
    Operation.SHEAR_Y: shear_y,
    Operation.TRANSLATE_X: translate_x,
    Operation.TRANSLATE_Y: translate_y,
    Operation.ROTATE: rotate,
    Operation.BRIGHTNESS: brightness,
    Operation.COLOR: color,
    Operation.CONTRAST: contrast,
    Operation.SHARPNESS: sharpness,
    Operation.POSTERIZE: posterize,
    Operation.SOLARIZE: solarize,
    Operation.AUTO_CONTRAST: auto_contrast,
    Operation.EQUALIZE: equalize,
    Operation.INVERT: invert,
    Operation.SOLARIZE_ADD: solarize_add,
    Operation.HUE: hue,
}
