import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from pitstop.data.pack import pack
from pitstop.data.sources.digits import digits_source
from pitstop.data.sources.folder import folder_source

REFUSED = 2


@pytest.fixture
def packed(place: Path) -> Path:
    pack(digits_source(), place / "packed", workers=1)
    return Path("packed")


def damage(packed: Path, file: str, row: int) -> str:
    """Overwrites the beginning of an image; returns its name."""
    batch = pa.ipc.open_file((packed / file).read_bytes()).get_batch(0)
    image = batch.column("image")[row].as_py()
    with (packed / file).open("r+b") as stream:
        stream.seek((packed / file).read_bytes().index(image))
        stream.write(b"damage")
    return batch.column("name")[row].as_py()


def test_a_whole_dataset_passes(command, packed):
    said = command("data", "check", packed, "--workers", "2")
    assert (said.code, said.err) == (0, "")
    assert said.out == "packed: 4 files and 1,797 images are as they should be\n"
    answer = json.loads(command("data", "check", packed, "--json").out)
    assert answer == {
        "path": "packed",
        "whole": True,
        "files": 4,
        "images": 1797,
        "problems": [],
        "duplicates": [],
    }


def test_all_that_is_damaged_is_listed_and_one_line_sums_it_up(command, packed):
    names = [damage(packed, "train-00000.arrow", row) for row in (3, 700)]
    said = command("data", "check", packed)
    assert said.code == REFUSED
    first, *rows = said.out.splitlines()
    assert first == "train-00000.arrow: its checksum is not the manifest's"
    assert [row.rpartition(": ")[0] for row in rows] == [
        f"train-00000.arrow row 3 ({names[0]})",
        f"train-00000.arrow row 700 ({names[1]})",
    ]
    assert said.err == (
        "pitstop: packed: 1 file is damaged (train-00000.arrow), 2 rows are named: "
        "pack or copy it again\n"
    )
    answer = json.loads(command("data", "check", packed, "--json").out)
    assert not answer["whole"]
    assert [problem["row"] for problem in answer["problems"]] == [None, 3, 700]
    assert answer["problems"][1]["name"] == names[0]


def test_an_image_in_both_splits_is_listed(command, place):
    for split in ("train", "val"):
        for index, name in enumerate(("a", "b")):
            folder = place / "photos" / split / name
            folder.mkdir(parents=True)
            color = (90 * index, 7 if split == "train" else 9, 99)
            Image.new("RGB", (500, 450), color).save(folder / "0.jpg")
    shutil.copy("photos/train/a/0.jpg", "photos/val/b/copy.jpg")
    pack(folder_source(Path("photos")), Path("out"), workers=1)
    said = command("data", "check", "out")
    assert said.code == REFUSED
    assert said.out.startswith("val-00000.arrow row 2 (val/b/copy.jpg): is also in train-00000.arr")
    assert said.out.endswith("(train/a/0.jpg)\n")
    assert said.err == (
        "pitstop: out: 1 validation image is a training image too: "
        "remove one of each two from the source and pack again\n"
    )
    answer = json.loads(command("data", "check", "out", "--json").out)
    assert answer["whole"]
    assert answer["duplicates"][0]["val"] == {
        "file": "val-00000.arrow",
        "row": 2,
        "name": "val/b/copy.jpg",
    }


def test_what_is_not_packed_or_not_finished_is_refused(refused, packed):
    assert refused("data", "check", "digits").startswith("digits is not packed")
    (packed / "manifest.json").unlink()
    assert "has no manifest.json, so packing did not finish" in refused("data", "check", packed)
