"""A folder of photos as people have them: mixed sizes, modes and formats, and a bad one."""

import csv
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

RECIPE = """\
# Photos in a second
epochs: 2
batch_size: 4
lr: 0.05
optimizer: {name: sgd, momentum: 0.9}
model: {name: resnet18, kwargs: {layers: [1, 1, 0, 0], channels: [8, 8, 8, 8]}}
phases: [{name: only, duration: 100%, resolution: 24}]
"""

pytestmark = pytest.mark.usefixtures("own_cache")

PLAIN = 9
"""Plain photos in each class, beside the odd ones."""


def photo(height: int, width: int, seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


@pytest.fixture
def photos(place: Path) -> Path:
    """`train/` only: two classes, the odd ones in the first; the truncated photo is kept back."""
    for label, name in enumerate(("cat", "dog")):
        folder = place / "photos/train" / name
        folder.mkdir(parents=True)
        for i in range(PLAIN):
            photo(30 + 11 * i, 70 - 5 * i, seed=2 * i + label).save(folder / f"plain{i}.jpg")
    cat = place / "photos/train/cat"
    photo(40, 50, 100).convert("L").save(cat / "grey.jpg")
    photo(40, 50, 101).convert("CMYK").save(cat / "print.jpg")
    photo(50, 40, 102).convert("RGBA").save(cat / "glass.png")
    photo(50, 40, 103).convert("P").save(cat / "palette.png")
    deep = np.random.default_rng(104).integers(0, 2**16, (33, 44), dtype=np.uint16)
    Image.fromarray(deep).save(cat / "deep.png")
    photo(30, 60, 105).save(cat / "turned.JPG", "JPEG", exif=turned())
    photo(41, 43, 106).save(cat / "web.webp")
    (cat / "notes.txt").write_text("not a photo")
    whole = BytesIO()
    photo(80, 80, 107).save(whole, "JPEG", quality=95)
    (cat / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 3])
    (place / "photos.yaml").write_text(RECIPE)
    return Path("photos")


@pytest.fixture
def own_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PITSTOP_CACHE", str(place / "cache"))
    return place / "cache"


def packings(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("photos-*") if path.is_dir())


TRAIN = ("train", "photos.yaml", "--data", "photos", "--workers", 2)


def test_a_folder_of_photos_trains(command, photos, own_cache):
    said = command(*TRAIN, "--out", "run")
    assert (said.code, said.err) == (0, "")
    (packed,) = packings(own_cache)
    total = 2 * PLAIN + 8
    assert "photos has no val/, validation/ or test/: held out 3 of 26 images" in said.out
    assert f"packed {total - 1} images (" in said.out
    assert f"for validation) into {packed}" in said.out
    assert f"converted 6 images: see {packed / 'remarks.csv'}" in said.out
    assert f"skipped 1 bad images: see {packed / 'remarks.csv'}" in said.out
    stated = json.loads(Path("run/run.json").read_text())
    assert stated["status"] == "finished"
    assert 2 <= stated["metrics"]["protocol"]["images"] <= 3  # the bad one may be held out
    with (packed / "remarks.csv").open(newline="") as file:
        remarks = {row["name"]: (row["action"], row["why"]) for row in csv.DictReader(file)}
    assert remarks.pop("train/cat/cut.jpg")[0] == "skipped"
    assert {name.removeprefix("train/cat/"): why for name, (_, why) in remarks.items()} == {
        "print.jpg": "mode CMYK",
        "glass.png": "mode RGBA",
        "palette.png": "mode P",
        "deep.png": "mode I;16",
        "turned.JPG": "EXIF orientation",
        "web.webp": "format WEBP",
    }


def test_the_second_run_uses_the_cache(command, photos, own_cache, content):
    command(*TRAIN, "--out", "one")
    before = content(own_cache)
    said = command(*TRAIN, "--out", "two")
    assert said.code == 0
    assert "packed" not in said.out
    assert content(own_cache) == before
    assert Path("one/last.safetensors").read_bytes() == Path("two/last.safetensors").read_bytes()


def test_a_packing_is_data_too_and_the_same(command, photos, own_cache):
    command(*TRAIN, "--out", "run")
    (packed,) = packings(own_cache)
    said = command("train", "photos.yaml", "--data", packed, "--out", "run")
    assert (said.code, said.err) == (0, "")
    assert "this run has ended: finished" in said.out


def test_a_photo_more_is_other_data(command, refused, photos, own_cache, content):
    command(*TRAIN, "--out", "run")
    before = content(Path("run"))
    photo(40, 40, 200).save(photos / "train/dog/new.jpg")
    said = command(*TRAIN, "--out", "run")
    assert said.code == 2
    assert "packed 26 images" in said.out
    assert len(packings(own_cache)) == 2
    line = refused(*TRAIN, "--out", "run")
    assert line.startswith("--data: its content (digest ")
    assert "is not what the run was trained on" in line
    assert content(Path("run")) == before


def test_a_run_is_evaluated_on_what_it_was_trained_on(command, photos):
    """As docs/your-own-data.md says: on the packing, which stays when the folder changes."""
    command(*TRAIN, "--out", "run")
    recorded = json.loads(Path("run/run.json").read_text())["best"]
    for i in range(12):
        photo(40, 40, 300 + i).save(photos / f"train/dog/new{i}.jpg")
    said = command("eval", "run", "--json")
    assert said.code == 0
    measured = json.loads(said.out)
    assert measured["protocol"]["images"] == recorded["protocol"]["images"]
    assert measured["loss"] == pytest.approx(recorded["loss"], abs=1e-6)


def test_a_plan_of_a_folder_says_what_is_odd_about_it(command, photos, own_cache):
    """As docs/your-own-data.md says; nothing is packed for it."""
    photo(40, 40, 400).save(photos / "train/stray.jpg")
    said = command("plan", "photos.yaml", "--data", "photos")
    assert said.code == 0
    assert "23 images" in said.out
    assert packings(own_cache) == []
    assert "ignored 1 images beside the class folders" in said.out + said.err


def test_too_many_bad_photos_are_refused_and_leave_no_run(refused, photos, own_cache):
    for i in range(4):
        (photos / f"train/dog/bad{i}.jpg").write_bytes(b"no image")
    assert "bad" in refused(*TRAIN, "--out", "run")
    assert not Path("run").exists()
    assert packings(own_cache) == []
    assert len(list(own_cache.glob("*.bad.txt"))) == 1


def test_a_folder_without_images_is_refused(refused, photos):
    Path("photos/train/empty").mkdir()
    assert "photos/train/empty has no images" in refused(*TRAIN, "--out", "run")
    assert not Path("run").exists()
