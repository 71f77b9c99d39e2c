import contextlib
from io import BytesIO

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pitstop.data.decode import decode_crop
from pitstop.data.jpeg import cut, encode


def plain(data: bytes | bytearray) -> np.ndarray:
    """The pixels with plain chroma upsampling."""
    return simplejpeg.decode_jpeg(data, "RGB", fastupsample=True)


def noise(height: int, width: int, channels: int, seed: int) -> np.ndarray:
    """Noise over patches: tiles of very different lengths."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 24), -(-width // 24), channels))
    image = coarse.repeat(24, 0).repeat(24, 1)[:height, :width]
    image = np.clip(image + rng.normal(0, 20, image.shape), 0, 255).astype(np.uint8)
    return image if channels == 3 else image[..., 0]


@settings(max_examples=80, deadline=None)
@given(
    st.data(), st.integers(1, 200), st.integers(1, 200), st.sampled_from([1, 3]), st.integers(0, 9)
)
def test_a_cut_has_the_pixels_of_the_whole_image(data, height, width, channels, seed):
    encoded = encode(noise(height, width, channels, seed), 90)
    crop_height, crop_width = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top = data.draw(st.integers(0, height - crop_height))
    left = data.draw(st.integers(0, width - crop_width))
    part = cut(encoded, (top, left, crop_height, crop_width))
    assert part is not None
    assert 0 <= top - part.top < 16
    assert left >= part.left
    assert channels == 1 or left - part.left < 16
    pixels = plain(part.data)[top - part.top :, left - part.left :]
    assert pixels.shape[0] >= crop_height
    assert pixels.shape[1] >= crop_width
    whole = plain(encoded)[top : top + crop_height, left : left + crop_width]
    assert np.array_equal(pixels[:crop_height, :crop_width], whole)


@pytest.mark.parametrize("channels", [1, 3])
def test_other_decoders_read_it_as_pillows_own_jpeg(channels):
    pixels = noise(133, 217, channels, 0)
    ours, pillows = BytesIO(encode(pixels, 85)), BytesIO()
    Image.fromarray(pixels).save(pillows, "JPEG", quality=85, subsampling="4:2:0")
    with Image.open(ours) as one, Image.open(pillows) as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_a_small_crop_needs_few_of_the_bytes():
    encoded = encode(noise(400, 533, 3, 0), 90)
    part = cut(encoded, (100, 200, 48, 48))
    assert part is not None
    assert len(part.data) < len(encoded) / 20


def test_a_jpeg_of_somebody_else_is_not_cut():
    out = BytesIO()
    Image.fromarray(noise(64, 64, 3, 0)).save(out, "JPEG", restart_marker_blocks=1)
    assert cut(out.getvalue(), (0, 0, 8, 8)) is None
    assert cut(b"", (0, 0, 8, 8)) is None


def test_a_large_image_has_wider_tiles_and_a_crop_of_it_is_the_same():
    """4,000 x 4,800 pixels are 75,000 blocks: more than the index has room for."""
    pixels = np.zeros((4000, 4800, 3), np.uint8)
    pixels[1000:1200, 2000:2300] = noise(200, 300, 3, 1)
    encoded = encode(pixels, 90)
    part = cut(encoded, (990, 1990, 220, 320))
    assert part is not None
    top, left = 990 - part.top, 1990 - part.left
    found = plain(part.data)[top : top + 220, left : left + 320]
    assert np.array_equal(found, plain(encoded)[990:1210, 1990:2310])


def test_it_travels_through_arrow_as_plain_bytes():
    encoded = encode(noise(60, 60, 3, 0), 90)
    assert pa.array([encoded], pa.large_binary())[0].as_py() == encoded


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_index_is_an_error_and_never_a_crash(data):
    encoded = bytearray(encode(noise(70, 90, 3, 0), 90))
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(24, 24 + 20 + 60))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        crop = decode_crop(bytes(encoded), (10, 20, 40, 50))
        assert crop.shape == (40, 50, 3)
