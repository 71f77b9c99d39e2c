"""What a packed dataset stores of one image, given its file.

Training images whose short side exceeds the limit are shrunk to it. They are stored as JPEGs of
tiles (see `jpeg`), unless that would not make them faster to read. Validation images in mode RGB or
L (JPEG or PNG, upright) keep their bytes. All others (RGBA, palette, CMYK, 16 bit, WebP, GIF's
first frame, BMP, TIFF, turned by EXIF, ...) become upright RGB, with transparency laid on white and
16 bits scaled to 8: JPEG for training, lossless PNG for validation.
A level is a second limit, below the first.

Every image is decoded in full, so that a training run never meets a bad one. What it takes of
ImageNet's photos on one core: 1.4 ms to decode (1.2 if only to check), 0.9 to 2.4 to shrink, 2.3 to
encode at short side 400.
"""

from dataclasses import dataclass
from io import BytesIO
from math import ceil
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from pitstop.data import jpeg

Split = Literal["train", "val"]

MOST_PIXELS_A_SIDE = 65_535
"""The index of a packed dataset has two bytes for each side of an image."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what makes the image upright."""

_SIDEWAYS = (5, 6, 7, 8)
"""The orientations that exchange height and width."""

_JPEG = ("JPEG", "MPO")
"""MPO is a JPEG with further pictures behind it, as phones write; the first one counts."""

_16_TO_8_BITS = 65535 / 255

_SMALL = 128
"""Training images of a short side up to this keep their bytes: they are soon decoded whole."""

_CROPPED = 0.6
"""The part of the tiles that the crops of RandomResizedCrop touch in the mean. A JPEG of fewer
bytes than this part of the tiled one's keeps them: decoding takes its time by the byte."""

_GAP = 3.0
"""An image may be halved by cheap means first, if it keeps so many times the wanted side."""


@dataclass(frozen=True)
class Settings:
    """What decides on the bytes that are stored."""

    short_side: int | None
    """Pixels; larger training images are shrunk to it. None keeps their sizes."""
    quality: int
    """Of the JPEGs that are written, 1 to 100."""
    levels: tuple[int, ...] = ()
    """Short sides of small copies of the training images, in pixels, ascending."""


class Picture(NamedTuple):
    """An encoded image."""

    data: bytes
    """A JPEG or PNG in mode RGB or L."""
    height: int
    width: int


class Stored(NamedTuple):
    """An image as it is stored."""

    pictures: tuple[Picture, ...]
    """The image, then one for each level if it is for training."""
    converted: str | None
    """Why mode, format or orientation were changed; None if not, even when it was shrunk."""


def convert(data: bytes, split: Split, settings: Settings) -> Stored:
    """Returns what is stored of an image file.

    Raises:
        Exception: the image is bad. Decoders raise nearly anything; `why_bad` puts it in words.
    """
    if not data:
        raise ValueError("empty file")
    with Image.open(BytesIO(data)) as image:
        if max(image.size) > MOST_PIXELS_A_SIDE:
            raise ValueError(f"more than {MOST_PIXELS_A_SIDE:,} pixels a side")
        if image.format not in _JPEG:
            image.load()  # before EXIF is asked for: in a PNG it may lie behind the pixels
        turn = _orientation(image)
        why = _why_convert(image, turn)
        sides = _shrunk_sides(min(image.size), split, settings)
        original = Picture(data, image.height, image.width)
        tiled = split == "train" and min(image.size) > _SMALL and not _is_well_tiled(data)
        keeps = why is None and not tiled and not any(sides)
        if keeps and (image.format == "PNG" or _decodes(data)):
            return Stored((original,) * len(sides), None)
        is_jpeg = image.format in _JPEG
        pixels = None
        if why is None and is_jpeg:
            pixels = _decoded(data, image, sides)
            why = "damaged JPEG, decoded in part" if pixels is None else None
        if pixels is None:
            upright = image.transpose(_TURNS[turn]) if turn in _TURNS else image
            pixels = _rgb_or_l(upright)
        width, height = image.size if turn not in _SIDEWAYS else image.size[::-1]
    if None in sides and (why is not None or tiled):
        encoded = _encoded(pixels, split, settings.quality)
        if why is not None or not is_jpeg or len(data) > _CROPPED * len(encoded.data):
            original = encoded
    pictures = (
        original
        if side is None
        else _encoded(_shrunk(pixels, (width, height), side), split, settings.quality)
        for side in sides
    )
    return Stored(tuple(pictures), why)


def why_bad(error: Exception) -> str:
    """Returns in one line, the same each time, why `convert` raised."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata does not make a bad image
        return 1


def _why_convert(image: Image.Image, orientation: int) -> str | None:
    if image.format not in (*_JPEG, "PNG"):
        return f"format {image.format}"
    if image.mode not in ("RGB", "L"):
        return f"mode {image.mode}"
    return "EXIF orientation" if orientation in _TURNS else None


def _shrunk_sides(short_side: int, split: Split, settings: Settings) -> list[int | None]:
    """Returns the short side of each picture that is stored, None where it is not shrunk."""
    if split == "val":
        return [None]
    limits = (settings.short_side, *settings.levels)
    return [limit if limit is not None and short_side > limit else None for limit in limits]


def _is_well_tiled(data: bytes) -> bool:
    """Says whether an image, of another packed dataset, is in tiles and has their right index."""
    try:
        return jpeg.cut(data, (0, 0, 1, 1)) is not None
    except ValueError:
        return False


def _decodes(data: bytes) -> bool:
    """Says whether the decoder of training takes a JPEG; it is stricter than Pillow's.

    All of it is read; leaving out the colours of the pixels takes 20% less.
    """
    try:
        simplejpeg.decode_jpeg(data, "GRAY")
    except ValueError:
        return False
    return True


def _decoded(data: bytes, image: Image.Image, sides: list[int | None]) -> Image.Image | None:
    """Returns the pixels of a JPEG in mode RGB or L, or None where the decoder of training fails.

    If only small pictures are wanted of it, libjpeg halves it, or more, while it decodes: as good
    as the box filter of `reducing_gap` (53 dB either way, against LANCZOS of all), in 2/3 the time.
    """
    wanted = max(side or min(image.size) for side in sides)
    scale = min(1, _GAP * wanted / min(image.size))
    try:
        pixels = simplejpeg.decode_jpeg(
            data,
            "GRAY" if image.mode == "L" else "RGB",
            min_height=ceil(scale * image.height),
            min_width=ceil(scale * image.width),
            min_factor=2,
        )
    except ValueError:
        return None
    return Image.fromarray(pixels[:, :, 0] if image.mode == "L" else pixels)


def _rgb_or_l(image: Image.Image) -> Image.Image:
    if image.mode in ("RGB", "L"):
        image.load()
        return image
    if image.mode.startswith("I"):
        levels = np.asarray(image).clip(0, 65535) / _16_TO_8_BITS
        return Image.fromarray(np.round(levels).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _shrunk(pixels: Image.Image, size: tuple[int, int], short_side: int) -> Image.Image:
    """Returns an image of `size`, of which `pixels` may be a small copy, with that short side.

    The small copies of libjpeg have n/8 of the pixels, rounded up, and nothing in what is beyond.
    """
    scale = short_side / min(size)
    width, height = (round(scale * side) for side in size)
    eighths = round(8 * pixels.width / size[0])
    box = (0, 0, size[0] * eighths / 8, size[1] * eighths / 8)
    return pixels.resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=_GAP)


def _encoded(image: Image.Image, split: Split, quality: int) -> Picture:
    data = jpeg.encode(np.asarray(image), quality) if split == "train" else _png(image)
    return Picture(data, image.height, image.width)


def _png(image: Image.Image) -> bytes:
    out = BytesIO()
    image.save(out, "PNG", exif=b"", icc_profile=None)
    return out.getvalue()
