"""The operations of `operations` on a CPU: the same pixels, one image at a time, in place.

A fresh page costs a virtual machine 2.8 us, a pass over an image that lies in the cache 5 to 15 us.
So an image stays where it is, and what is in between goes to memory that a thread uses again and
again. numpy and Pillow work on the thread that calls them; torch would share out each pass, for
more than the pass takes.

Every function takes uint8 pixels [H, W, 3], contiguous, and the operation's argument, and changes
the pixels. What they compute, and why it is exact: see `operations`.
"""

import math
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from pitstop.nn import operations
from pitstop.nn.operations import GRID, LOW, Operation


class _Scratch(threading.local):
    """A thread's memory, used again and again: few buffers, so that they stay in the cache."""

    def __init__(self) -> None:
        self.buffers = [np.empty(0, np.uint8)] * 4

    def array(self, number: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Returns an array with any values, good until the next of the same number, 0 to 3."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if len(self.buffers[number]) < size:
            self.buffers[number] = np.empty(size, np.uint8)
        return self.buffers[number][:size].view(dtype).reshape(shape)


_scratch = _Scratch()


# What moves pixels


def _copied(pixels: np.ndarray) -> np.ndarray:
    copy = _scratch.array(0, pixels.shape, np.uint8)
    np.copyto(copy, pixels)
    return copy


def translate_x(pixels: np.ndarray, by: float) -> None:
    _translate(pixels.swapaxes(0, 1), _copied(pixels).swapaxes(0, 1), int(by))


def translate_y(pixels: np.ndarray, by: float) -> None:
    _translate(pixels, _copied(pixels), int(by))


def _translate(pixels: np.ndarray, source: np.ndarray, by: int) -> None:
    """Moves by so many places of the first axis."""
    by = max(-len(pixels), min(by, len(pixels)))
    if by < 0:
        pixels, source, by = pixels[::-1], source[::-1], -by
    pixels[:by] = 0
    pixels[by:] = source[: len(pixels) - by]


def shear_x(pixels: np.ndarray, tangent: float) -> None:
    height, width, _ = pixels.shape
    right = -np.floor(tangent * (np.arange(height) + 0.5) + 0.5).clip(-width, width)
    margin = int(np.abs(right).max())
    framed = _framed(pixels, 0, margin)
    edges = np.flatnonzero(np.diff(right, prepend=np.nan, append=np.nan)).tolist()
    for top, bottom in pairwise(edges):  # rows that move alike, together
        left = margin - int(right[top])
        pixels[top:bottom] = framed[top:bottom, left : left + width]


def _framed(pixels: np.ndarray, y: int, x: int) -> np.ndarray:
    """Returns a copy with so many black rows above and below, and columns left and right."""
    height, width, channels = pixels.shape
    framed = _scratch.array(3, (height + 2 * y, width + 2 * x, channels), np.uint8)
    framed[:y], framed[y + height :] = 0, 0
    framed[:, :x], framed[:, x + width :] = 0, 0
    framed[y : y + height, x : x + width] = pixels
    return framed


def shear_y(pixels: np.ndarray, tangent: float) -> None:
    height, width, _ = pixels.shape
    *_, by_x, _, from_0 = operations.fixed_point(operations.shear_y_matrices(tangent)).tolist()
    x, y = np.arange(width), np.arange(height)[:, None]
    up = ((by_x * x + from_0 >> 32) - 1).clip(-height, height)
    margin = int(np.abs(up).max())
    _take(_framed(pixels, margin, 0), (y + margin) * width, up * width + x, pixels)


def _take(source: np.ndarray, row: np.ndarray, column: np.ndarray, out: np.ndarray) -> None:
    """Writes the source's pixels number row + column, int, to `out`."""
    index = _scratch.array(2, out.shape[:2], np.intp)
    np.add(row, column, out=index)
    # three bytes as one thing: 95 us instead of 125
    np.take(source.view("V3").ravel(), index, out=out.view("V3")[..., 0], mode="clip")


def rotate(pixels: np.ndarray, degrees: float) -> None:
    height, width, _ = pixels.shape
    matrix = operations.rotate_matrices(degrees, height, width)
    xx, xy, x1, yx, yy, y1 = operations.fixed_point(matrix).tolist()
    x, y = np.arange(width), np.arange(height)[:, None]

    def source(number: int, by_x: int, by_y: int, from_0: int, size: int) -> np.ndarray:
        index = _scratch.array(number, (height, width), np.int32)
        along = (by_x * x >> 16).astype(np.int32)
        np.add(along, (by_y * y + from_0 >> 16).astype(np.int32), out=index)
        np.right_shift(index, 16, out=index)
        return np.clip(index, 0, size + 1, out=index)

    row = source(0, yx, yy, y1, height)
    row *= width + 2
    _take(_framed(pixels, 1, 1), row, source(1, xx, xy, x1, width), pixels)


# What looks at a pixel alone


def brightness(pixels: np.ndarray, factor: float) -> None:
    grid = _grid(factor)
    product = _scratch.array(0, pixels.shape, np.int16)
    _multiply(pixels, grid, product)
    if grid > 2**GRID:
        np.clip(product, 0, 255, out=product)
    np.copyto(pixels, product, casting="unsafe")


def _grid(factor: float) -> int:
    """Returns a factor in units of 1/8192."""
    return round(factor * 2**GRID)


def _multiply(values: np.ndarray, grid: int, out: np.ndarray) -> None:
    """Writes floor(values x factor) to `out`, int16; see `operations` for the ranges."""
    below = _scratch.array(3, out.shape, np.int16)
    high, low = divmod(grid, 2**LOW)
    np.multiply(values, np.int16(low), out=below)
    np.right_shift(below, LOW, out=below)
    np.multiply(values, np.int16(high), out=out)
    np.add(out, below, out=out)
    np.right_shift(out, GRID - LOW, out=out)


def posterize(pixels: np.ndarray, bits: float) -> None:
    np.bitwise_and(pixels, np.uint8(256 - 2 ** (8 - int(bits))), out=pixels)


def solarize(pixels: np.ndarray, level: float) -> None:
    bright = _scratch.array(0, pixels.shape, np.bool_)
    np.greater_equal(pixels, int(level), out=bright)
    mask = bright.view(np.uint8)
    np.negative(mask, out=mask)
    np.bitwise_xor(pixels, mask, out=pixels)


def invert(pixels: np.ndarray, _: float) -> None:
    np.bitwise_not(pixels, out=pixels)


def solarize_add(pixels: np.ndarray, added: float) -> None:
    dark = _scratch.array(0, pixels.shape, np.bool_)
    np.less(pixels, 128, out=dark)
    change = dark.view(np.uint8)
    np.multiply(change, np.uint8(added), out=change)
    np.add(pixels, change, out=pixels)


# What looks at the whole image, and then at a pixel alone


def auto_contrast(pixels: np.ndarray, _: float) -> None:
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, -1)
    low = rows.min(0).reshape(-1, 3).min(0)
    high = rows.max(0).reshape(-1, 3).max(0)
    flat = low == high
    scale = np.where(flat, np.float32(1), (high - low) * np.float32(1 / 255))
    stretched = _scratch.array(0, rows.shape, np.float32)
    np.subtract(rows, np.tile(np.where(flat, np.uint8(0), low), width), out=rows)
    np.divide(rows, np.tile(scale, width), out=stretched)
    np.copyto(rows, stretched, casting="unsafe")


def equalize(pixels: np.ndarray, _: float) -> None:
    height, width, _ = pixels.shape
    image = Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)
    np.copyto(pixels, np.asarray(ImageOps.equalize(image)))


def contrast(pixels: np.ndarray, factor: float) -> None:
    height, width, _ = pixels.shape
    gray = _gray(pixels, _floats(pixels))
    mean = np.float32(gray.sum(0, dtype=np.uint32).sum()) / np.float32(height * width)
    grid = _grid(factor)
    exact = (grid * np.arange(256) << 23) + (2**GRID - grid) * int(mean * np.float32(2**23))
    table = (exact.astype(np.float32) * np.float32(2.0 ** -(GRID + 23))).clip(0, 255)
    image = Image.frombuffer("L", (3 * width, height), pixels, "raw", "L", 0, 1)
    np.copyto(pixels.reshape(height, -1), np.asarray(image.point(table.astype(np.uint8).tolist())))


# What looks at other channels, or at neighbors

GRAY = np.array([2989, 5870, 1140], np.float32)
"""Parts of 10,000: sums of products with levels are exact, whatever their order."""

DARKER = {
    np.float32(1_060_000): (250, 9, 228),
    np.float32(990_000): (250, 13, 146),
    np.float32(1_250_000): (250, 47, 199),
}
"""Of the 1704 colors whose gray is a whole number those for which torchvision's is one less, by
their sums: it rounds its products to float32."""


def _floats(pixels: np.ndarray) -> np.ndarray:
    values = _scratch.array(0, pixels.shape, np.float32)
    np.copyto(values, pixels)
    return values


def _gray(pixels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns torchvision's shades of gray, uint8 [H, W].

    Args:
        pixels: uint8 [H, W, 3].
        values: the same as float32.
    """
    sums = np.matmul(values, GRAY, out=_scratch.array(1, pixels.shape[:2], np.float32))
    suspects = [sums == total for total in DARKER]
    np.multiply(sums, np.float32(1e-4), out=sums)
    gray = _scratch.array(2, pixels.shape[:2], np.uint8)
    np.copyto(gray, sums, casting="unsafe")
    for suspect, color in zip(suspects, DARKER.values(), strict=True):
        if suspect.any():
            gray[suspect] -= (pixels[suspect] == color).all(1)
    return gray


def color(pixels: np.ndarray, factor: float) -> None:
    grid = _grid(factor)
    own = _floats(pixels)
    gray = _gray(pixels, own)
    common = _scratch.array(1, gray.shape, np.float32)
    np.multiply(own, np.float32(grid / 2**GRID), out=own)
    np.multiply(gray, np.float32(1 - grid / 2**GRID), out=common)
    for channel in range(3):  # one by one: three at a time take 6 times as long
        np.add(own[..., channel], common, out=own[..., channel])
    if grid > 2**GRID:
        np.clip(own, np.float32(0), np.float32(255), out=own)
    np.copyto(pixels, own, casting="unsafe")


def sharpness(pixels: np.ndarray, factor: float) -> None:
    height, width, _ = pixels.shape
    if height <= 2 or width <= 2:
        return
    # in one row, which wraps: numpy is faster, and what it makes of the edges is not used
    row, size = 3 * width, pixels.size - 6 * width - 6
    values = _scratch.array(0, (pixels.size,), np.uint16)
    np.copyto(values, pixels.reshape(-1))
    middle = values[row + 3 :][:size]
    across = _scratch.array(1, (pixels.size - 6,), np.uint16)
    np.add(values[:-6], values[3:-3], out=across)
    np.add(across, values[6:], out=across)
    mean = _scratch.array(2, (size,), np.uint16)
    np.left_shift(middle, 2, out=mean)
    for each in (across[:size], across[row:][:size], across[2 * row :], np.uint16(6)):
        np.add(mean, each, out=mean)
    np.floor_divide(mean, np.uint16(13), out=mean)
    middle, away = middle.view(np.int16), mean.view(np.int16)
    np.subtract(away, middle, out=away)
    sharp = _scratch.array(1, (height, row), np.int16)
    change = sharp.reshape(-1)[row + 3 :][:size]
    _multiply(away, 2**GRID - _grid(factor), change)
    np.add(change, middle, out=change)
    np.clip(change, 0, 255, out=change)
    inside = np.s_[1:-1, 3:-3]
    np.copyto(pixels.reshape(height, row)[inside], sharp[inside], casting="unsafe")


def hue(pixels: np.ndarray, turns: float) -> None:
    changed = operations.hue(torch.from_numpy(pixels)[None], np.array([turns]))
    np.copyto(pixels, changed[0].numpy())


Function = Callable[[np.ndarray, float], None]

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
