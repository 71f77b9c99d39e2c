from io import BytesIO

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pitstop.data.decode import decode, decode_crop
from pitstop.data.jpeg import encode as encode_tiled


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {"quality": 90}), ("JPEG", {"quality": 80, "progressive": True}), ("PNG", {})],
)
def test_decodes_as_pillow_does(photo, encode, mode, format, options):
    data = encode(photo(61, 83).convert(mode), format, **options)
    image = decode(data)
    assert image.shape == (61, 83, 3)
    assert image.dtype == np.uint8
    assert image.flags.writeable
    reference = np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    difference = np.abs(image.astype(int) - reference.astype(int))
    assert difference.max() <= (4 if format == "JPEG" else 0)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_truncated_data_raises(photo, encode, format):
    data = encode(photo(61, 83), format)
    with pytest.raises((ValueError, OSError)):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["tiled", "plain", "PNG", "gray"])
def test_a_crop_is_what_the_whole_image_has_there(photo, encode, kind):
    image = photo(120, 171)
    pixels = np.asarray(image.convert("L") if kind == "gray" else image)
    data = encode(image, "JPEG") if kind == "plain" else encode_tiled(pixels, 90)
    if kind == "PNG":
        data, whole = encode(image, "PNG"), np.asarray(image)
    elif kind == "plain":
        whole = decode(data)
    else:
        whole = simplejpeg.decode_jpeg(data, "RGB", fastupsample=True)
    for top, left, height, width in [(37, 50, 60, 41), (0, 0, 120, 171), (119, 170, 1, 1)]:
        crop = decode_crop(data, (top, left, height, width))
        assert np.array_equal(crop, whole[top : top + height, left : left + width])


def test_a_crop_of_a_photo_is_close_to_what_pillow_decodes(photo):
    data = encode_tiled(np.asarray(photo(200, 300)), 90)
    reference = np.asarray(Image.open(BytesIO(data)).convert("RGB")).astype(int)
    difference = decode_crop(data, (33, 21, 150, 180)) - reference[33:183, 21:201]
    assert np.abs(difference).mean() < 2
    assert abs(difference.mean()) < 0.2
