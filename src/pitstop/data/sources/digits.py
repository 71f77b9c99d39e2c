"""The embedded default dataset: 1,797 handwritten digits of 8 x 8 pixels (see DIGITS.md).

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49, CC BY 4.0.
"""

import gzip
from collections.abc import Mapping
from functools import partial
from hashlib import blake2b
from importlib.resources import files
from io import BytesIO

import numpy as np
from PIL import Image

from pitstop.data.sources.base import Item, Source, constant_reader, hold_out

HELD_OUT = 0.2
"""The part of each digit that is held out for validation."""

_GREY_LEVELS = 16


def digits_source() -> Source:
    """Returns the digits as 8-bit grayscale PNG, classes "0" to "9", 20% of each held out.

    The greys 0 to 16 of the original become 0 to 255. The split is the same everywhere.
    """
    packed = (files("pitstop.data") / "digits.csv.gz").read_bytes()
    table = np.loadtxt(BytesIO(gzip.decompress(packed)), delimiter=",", dtype=np.int64)
    greys, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1]
    pixels = np.round(greys * (255 / _GREY_LEVELS)).astype(np.uint8)
    items = sorted(Item(f"{label}/{row:04}.png", int(label)) for row, label in enumerate(labels))
    train, val = hold_out(items, HELD_OUT)
    images = {f"{label}/{row:04}.png": pixels[row] for row, label in enumerate(labels)}
    return Source(
        origin="digits",
        classes=tuple(str(digit) for digit in range(10)),
        train=train,
        val=val,
        key=blake2b(packed, digest_size=32).hexdigest(),
        notes=(),
        open=constant_reader(partial(_png, images)),
    )


def _png(images: Mapping[str, np.ndarray], name: str) -> bytes:
    """Uncompressed, so that the bytes do not depend on the version of zlib."""
    out = BytesIO()
    Image.fromarray(images[name]).save(out, "PNG", compress_level=0)
    return out.getvalue()
