from collections import Counter
from io import BytesIO

import numpy as np
from PIL import Image

from pitstop.data.decode import decode
from pitstop.data.sources.digits import digits_source


def test_holds_out_a_fifth_of_each_digit():
    source = digits_source()
    assert source.classes == tuple("0123456789")
    assert len(source.train) + len(source.val) == 1797
    train, val = (Counter(item.label for item in split) for split in (source.train, source.val))
    for digit in range(10):
        assert abs(val[digit] / (val[digit] + train[digit]) - 0.2) < 0.004
    assert not set(source.train) & set(source.val)
    assert digits_source().val == source.val


def test_images_are_the_original_greys(tmp_path):
    source = digits_source()
    first = next(item for item in (*source.train, *source.val) if item.name == "0/0000.png")
    data = source.open(tmp_path)(first.name)
    image = Image.open(BytesIO(data))
    assert (image.format, image.mode, image.size) == ("PNG", "L", (8, 8))
    # the first line of the UCI file, in sixteenths
    greys = [0, 0, 5, 13, 9, 1, 0, 0]
    assert np.asarray(image)[0].tolist() == [round(grey * 255 / 16) for grey in greys]
    assert (decode(data) == np.asarray(image.convert("RGB"))).all()
