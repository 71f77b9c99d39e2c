"""What a packed dataset stores of one image, given its file.

Images in mode RGB or L (JPEG or PNG, upright) keep their bytes, except that training images whose
short side exceeds the limit are shrunk to it and become JPEG. All others (RGBA, palette, CMYK,
16 bit, WebP, GIF's first frame, BMP, TIFF, turned by EXIF, ...) become upright RGB, with
transparency laid on white and 16 bits scaled to 8: JPEG for training, lossless PNG for validation.

Every image is decoded in full, so that a training run never meets a bad one.
"""

from io import BytesIO
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from pitstop.data.decode import decode

Split = Literal["train", "val"]

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

_JPEG = ("JPEG", "MPO")
"""MPO is a JPEG with further pictures behind it, as phones write; the first one counts."""

_16_TO_8_BITS = 65535 / 255


class Stored(NamedTuple):
    """An image as it is stored."""

    image: bytes
    """A JPEG or PNG in mode RGB or L."""
    height: int
    width: int
    converted: str | None
    """Why mode, format or orientation were changed; None if not, even when it was shrunk."""


def convert(data: bytes, split: Split, short_side: int | None, quality: int) -> Stored:
    """Returns what is stored of an image file.

    Args:
        short_side: pixels; larger training images are shrunk to it. None keeps their sizes.
        quality: of the JPEGs that are written, 1 to 100.

    Raises:
        Exception: the image is bad. Decoders raise nearly anything; `why_bad` puts it in words.
    """
    if not data:
        raise ValueError("empty file")
    with Image.open(BytesIO(data)) as image:
        if image.format not in _JPEG:
            image.load()  # before EXIF is asked for: in a PNG it may lie behind the pixels
        turn = _TURNS.get(_orientation(image))
        why = _why_convert(image, turn is not None)
        shrink = split == "train" and short_side is not None and min(image.size) > short_side
        if why is None and not shrink:
            if image.format == "PNG" or _decodes(data):
                return Stored(data, image.height, image.width, None)
            why = "damaged JPEG, decoded in part"
        pixels = image if turn is None else image.transpose(turn)
        pixels = _rgb_or_l(pixels)
    if shrink and short_side is not None:
        pixels = _shrunk(pixels, short_side)
    encoded = _jpeg(pixels, quality) if split == "train" else _png(pixels)
    return Stored(encoded, pixels.height, pixels.width, why)


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


def _why_convert(image: Image.Image, turned: bool) -> str | None:
    if image.format not in (*_JPEG, "PNG"):
        return f"format {image.format}"
    if image.mode not in ("RGB", "L"):
        return f"mode {image.mode}"
    return "EXIF orientation" if turned else None


def _decodes(data: bytes) -> bool:
    """Says whether the decoder of training takes a JPEG; it is stricter than Pillow's."""
    try:
        decode(data)
    except ValueError:
        return False
    return True


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


def _shrunk(image: Image.Image, short_side: int) -> Image.Image:
    scale = short_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    """Through simplejpeg, which releases the GIL while it encodes; Pillow does not."""
    pixels = np.ascontiguousarray(image).reshape(image.height, image.width, -1)
    colorspace, subsampling = ("GRAY", "Gray") if image.mode == "L" else ("RGB", "420")
    return simplejpeg.encode_jpeg(pixels, quality, colorspace, subsampling)


def _png(image: Image.Image) -> bytes:
    out = BytesIO()
    image.save(out, "PNG", exif=b"", icc_profile=None)
    return out.getvalue()
