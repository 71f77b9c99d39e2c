"""Images that the tests of data share."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Photo = Callable[..., Image.Image]


def _photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth RGB image, as photos are: JPEG changes it little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    out = BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


@pytest.fixture
def photo() -> Photo:
    return _photo


@pytest.fixture
def encode() -> Callable[..., bytes]:
    return encoded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A class folder with validation: 2 classes, 12 + 4 JPEGs of mixed sizes, each different."""
    root = tmp_path / "photos"
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            place = root / split / name
            place.mkdir(parents=True)
            for index in range(count):
                image = _photo(40 + 7 * index, 60 + 5 * label, seed=10 * index + label)
                image.save(place / f"{index}.jpg", quality=90)
    return root
