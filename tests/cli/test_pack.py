import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pitstop.data.packed import PackedDataset


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """`photos`: 12 + 4 images of 60 x 80 pixels, 2 classes; one GIF and one that is bad."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (60, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(f"photos/{split}/{name}/{index}.jpg")
    Image.open("photos/train/cat/0.jpg").save("photos/train/cat/0.gif")
    Path("photos/train/dog/bad.jpg").write_bytes(b"bad")
    return tmp_path / "photos"


PACK = ("data", "pack", "photos", "packed", "--workers", "2")


def test_packs_and_says_what_came_of_it(command, photos):
    said = command(*PACK, "--short-side", "50", "--levels", "30,20", "--quality", "80")
    assert said.code == 0
    assert said.out.startswith(
        "packed 13 training and 4 validation images of 2 classes, 0.1 MB into packed in "
    )
    assert said.out.splitlines()[1:] == [
        "converted 1 images: see packed/remarks.csv",
        "skipped 1 images: see packed/remarks.csv",
    ]
    assert said.err == ""
    listed = Path("packed/remarks.csv").read_text().splitlines()
    assert listed[1:] == [
        "train,train/dog/bad.jpg,skipped,not an image of a known format",
        "train,train/cat/0.gif,converted,format GIF",
    ]
    dataset = PackedDataset.open("packed")
    assert dataset.train.sizes.min() == 50
    assert {side: level.sizes.min() for side, level in dataset.train.levels.items()} == {
        20: 20,
        30: 30,
    }
    made = json.loads(Path("packed/manifest.json").read_text())["made"]
    assert (made["short_side"], made["quality"], made["levels"]) == (50, 80, [20, 30])


def test_json(command, photos):
    first, second = (json.loads(command(*PACK, "--json").out) for _ in range(2))
    assert first.pop("seconds") > 0
    assert first.pop("images_per_second") > 0
    assert first.pop("resumed") == 0
    assert first == second | {"already_packed": False}
    assert second == {
        "path": "packed",
        "digest": PackedDataset.open("packed").digest,
        "classes": 2,
        "train": 13,
        "val": 4,
        "bytes": sum(file.stat().st_size for file in Path("packed").glob("*-00000.arrow")),
        "skipped": 1,
        "converted": 1,
        "remarks": "packed/remarks.csv",
        "already_packed": True,
    }


def test_original_keeps_the_sizes(command, photos):
    assert command(*PACK, "--short-side", "original").code == 0
    dataset = PackedDataset.open("packed")
    names = [dataset.train.name(row) for row in range(len(dataset.train))]
    row = names.index("train/cat/3.jpg")
    assert dataset.train.read(row) == Path("photos/train/cat/3.jpg").read_bytes()


def test_a_second_time_it_has_nothing_to_do(command, refused, photos):
    command(*PACK)
    before = {file: file.stat().st_mtime_ns for file in Path("packed").iterdir()}
    said = command(*PACK)
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("packed is packed already: 13 training and 4 validation images")
    assert refused(*PACK, "--quality", "50") == (
        "packed is another packed dataset (of photos, short side 400, quality 90): "
        "name another place, or say --force to replace it"
    )
    assert {file: file.stat().st_mtime_ns for file in Path("packed").iterdir()} == before
    assert command(*PACK, "--quality", "50", "--force").code == 0
    assert "packed is packed already" in command(*PACK, "--quality", "50").out


def test_one_of_version_1_is_packed_again_by_force(command, refused, photos):
    command(*PACK)
    manifest = json.loads(Path("packed/manifest.json").read_text())
    Path("packed/manifest.json").write_text(json.dumps(manifest | {"version": 1}))
    assert refused(*PACK) == (
        "packed/manifest.json has version 1, this pitstop reads 2: pack again, "
        "with --force to replace what is there"
    )
    assert command(*PACK, "--force").out.startswith("packed 13 training")
    assert len(PackedDataset.open("packed").train) == 13


def test_refuses_in_one_line(command, refused, photos):
    for options, line in (
        (("--short-side", "big"), "--short-side big: write it in pixels, or original"),
        (("--levels", "160,"), "--levels (nothing): write it in pixels: 160,256"),
        (("--levels", "500"), "level 500 is not below the short side of 400: leave it out"),
    ):
        assert refused(*PACK, *options) == line
    refused(*PACK, "--quality", "101")
    refused(*PACK, "--on-bad", "ignore")
    assert "1 of 18 images in photos are bad, such as train/dog/bad.jpg" in refused(
        *PACK, "--on-bad", "fail"
    )
    assert Path("packed.bad.txt").read_text().startswith("train/dog/bad.jpg\t")
    assert "is there and is no packed dataset" in refused("data", "pack", "photos", "photos")
    command(*PACK)
    assert refused("data", "pack", "packed", "again") == (
        "packed is a packed dataset: name what it was made of"
    )


BY_PROCESSES = """
import sys
from pitstop.cli import main
from pitstop.data import converters
converters.FEW = 0
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_quietly_and_the_same_command_goes_on(command, photos, number):
    """The signal goes to the whole process group, as a terminal sends it."""
    for index in range(3000):
        Path(f"photos/train/cat/more{index}.jpg").symlink_to("1.jpg")
    with subprocess.Popen(
        [sys.executable, "-c", BY_PROCESSES, *PACK, "--short-side", "20"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        while not Path(".packed.packing/key").exists():
            assert process.poll() is None
        os.killpg(process.pid, number)
        assert process.stderr is not None
        assert process.stderr.read() == f"stopped by {number.name}: the same command goes on\n"
    assert process.returncode == 75
    assert not Path("packed").exists()


def test_a_damaged_dataset_is_not_replaced_unasked(command, refused, photos):
    command(*PACK)
    shard = Path("packed/train-00000.arrow")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "with --force to replace what is there" in refused(*PACK)
    assert shard.exists()


def test_a_place_that_cannot_be_is_refused_in_one_line(refused, photos):
    assert "cannot be written" in refused("data", "pack", "photos", "x" * 300)
    assert "is where a disk is mounted: name a folder in it" in refused(
        "data", "pack", "photos", "/proc"
    )
    assert refused("data", "pack", "photos", ".") == (
        ". is the folder that you are in: name a folder in it"
    )
