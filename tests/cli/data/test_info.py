import json
from pathlib import Path

import pytest
from PIL import Image

from pitstop.data.pack import pack
from pitstop.data.sources.digits import digits_source


@pytest.fixture
def packed(place: Path) -> str:
    pack(digits_source(), place / "packed", workers=1)
    return "packed"


def test_a_packed_dataset_on_one_screen(command, packed):
    said = command("data", "info", packed)
    assert (said.code, said.err) == (0, "")
    assert "1,438 for training, 359 for validation" in said.out
    assert "10: 0, 1, 2, 3, 4, ..." in said.out
    assert "139 to 146, median 144.5 images a class (fewest 8, most 5)" in said.out
    assert "from digits" in said.out
    assert "short side 400, quality 90" in said.out
    bar = next(line for line in said.out.splitlines() if "█" in line)
    assert bar.split() == ["8", "-", "11", "█" * 40, "1,438"]
    assert len(said.out.splitlines()) < 24


def test_json_is_one_object(command, packed):
    facts = json.loads(command("data", "info", packed, "--json").out)
    assert facts["kind"] == "packed"
    assert facts["splits"]["val"]["short_side_histogram"] == {"edges": [8, 12], "images": [359]}
    assert json.loads(command("data", "info", "digits", "--json").out)["kind"] == "source"


def test_the_sizes_are_drawn(command, refused, packed):
    said = command("data", "info", packed, "--plot", "sizes.png", "--json")
    assert json.loads(said.out)
    assert said.err == "drawn into sizes.png\n"
    with Image.open("sizes.png") as picture:
        assert picture.width > 500
    line = refused("data", "info", packed, "--plot", "sizes.png/no.png")
    assert line == "--plot sizes.png/no.png: cannot be written: File exists"
    line = refused("data", "info", "digits", "--plot", "sizes.png")
    assert line == "--plot: the sizes of digits are not known: pack it first"
