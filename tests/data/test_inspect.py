import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pitstop.core.errors import InputError
from pitstop.data.inspect import describe_packed, describe_source
from pitstop.data.pack import pack
from pitstop.data.packed import PackedDataset
from pitstop.data.sources.digits import digits_source
from pitstop.data.sources.folder import folder_source


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    (folder / "train/cat/odd.webp").write_bytes((folder / "train/cat/5.jpg").read_bytes())
    Image.open(folder / "train/cat/4.jpg").save(folder / "train/cat/odd.gif")
    out = tmp_path / "packed"
    pack(folder_source(folder), out, short_side=60, levels=(32,), workers=1, shard_bytes=9000)
    return out


def test_counts_and_sizes_are_those_of_the_images(packed):
    facts, dataset = describe_packed(packed), PackedDataset.open(packed)
    for name, split in (("train", dataset.train), ("val", dataset.val)):
        told = facts["splits"][name]
        lengths = [len(split.read(row)) for row in range(len(split))]
        sides = split.sizes.min(axis=1)
        assert told["images"] == len(split)
        assert told["shards"] == len(list(packed.glob(f"{name}-00*.arrow")))
        assert told["bytes"] == sum(lengths)
        assert (told["image_bytes"]["min"], told["image_bytes"]["max"]) == (
            min(lengths),
            max(lengths),
        )
        assert told["short_side"]["p50"] in sides
        histogram = told["short_side_histogram"]
        assert sum(histogram["images"]) == len(split)
        assert histogram["images"] == np.histogram(sides, histogram["edges"])[0].tolist()
        assert histogram["images"][0] > 0 < histogram["images"][-1]
    assert facts["levels"]["32"]["short_side"]["max"] == 32
    assert facts["bytes"] == sum(file.stat().st_size for file in packed.iterdir())


def test_classes_and_how_it_was_made(packed, folder):
    facts = describe_packed(packed)
    assert facts["classes"] == ["cat", "dog"]
    assert facts["images_a_class"]["train"] == {
        "min": 6,
        "median": 7.0,
        "max": 8,
        "fewest": [["dog", 6], ["cat", 8]],
        "most": [["cat", 8], ["dog", 6]],
    }
    assert facts["made"]["source"] == str(folder)
    assert facts["made"]["short_side"] == 60
    assert facts["converted"] == {"format GIF": 1}
    assert facts["skipped"] == 0
    assert facts["digest"] == PackedDataset.open(packed).digest
    assert json.loads(json.dumps(facts)) == facts


def test_a_source_is_described_without_reading_an_image(folder):
    for file in folder.rglob("*.jpg"):
        file.write_bytes(b"no image")
    facts = describe_source(folder_source(folder))
    assert facts["splits"] == {"train": {"images": 12}, "val": {"images": 4}}
    assert facts["images_a_class"]["val"]["median"] == 2
    assert json.loads(json.dumps(describe_source(digits_source())))["classes"][9] == "9"


def test_a_damaged_index_is_named(packed):
    (packed / "val.index.arrow").write_bytes(b"hello")
    with pytest.raises(InputError, match=r"val\.index\.arrow is damaged"):
        describe_packed(packed)
    (packed / "val.index.arrow").unlink()
    with pytest.raises(InputError, match=r"val\.index\.arrow cannot be read \(No such"):
        describe_packed(packed)
