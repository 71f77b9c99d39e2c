import csv
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pitstop.core.errors import InputError
from pitstop.data.decode import decode
from pitstop.data.pack import PackingStoppedError, pack, stratified_order
from pitstop.data.packed import PackedDataset
from pitstop.data.sources.base import Item
from pitstop.data.sources.digits import digits_source
from pitstop.data.sources.folder import folder_source

ORIENTATION = 0x0112
REPOSITORY = Path(__file__).parents[2]


def packed_files(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir())}


def stored(dataset: PackedDataset) -> dict[str, bytes]:
    """The stored bytes by name, of both splits."""
    return {
        split.name(row): split.read(row)
        for split in (dataset.train, dataset.val)
        for row in range(len(split))
    }


def test_same_bytes_with_any_number_of_workers(folder, tmp_path):
    source = folder_source(folder)
    for workers in (1, 4):
        pack(source, tmp_path / f"packed{workers}", workers=workers, shard_bytes=3000)
    assert packed_files(tmp_path / "packed1") == packed_files(tmp_path / "packed4")


def test_digest_tells_the_content_not_the_place_or_the_shards(folder, tmp_path):
    first = pack(folder_source(folder), tmp_path / "a", workers=1)
    folder.rename(tmp_path / "moved")
    moved = folder_source(tmp_path / "moved")
    assert pack(moved, tmp_path / "b", workers=1, shard_bytes=3000).digest == first.digest
    renamed = replace(moved, classes=("cats", "dogs"))
    assert pack(renamed, tmp_path / "c", workers=1).digest != first.digest


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_every_prefix_is_stratified(counts):
    items = [
        Item(f"{label}/{index}", label) for label, n in enumerate(counts) for index in range(n)
    ]
    order = stratified_order(items)
    assert sorted(order) == sorted(items)
    assert order == stratified_order(items[::-1])
    seen = Counter[int]()
    for length, item in enumerate(order, start=1):
        seen[item.label] += 1
        for label, count in enumerate(counts):
            share = count / len(items)
            tolerance = 0.5 + len(counts) * share / 2 + 1e-9
            assert abs(seen[label] - length * share) <= tolerance


def test_training_images_are_shrunk_and_others_keep_their_bytes(folder, tmp_path):
    report = pack(folder_source(folder), tmp_path / "packed", workers=2, short_side=50)
    dataset = PackedDataset.open(tmp_path / "packed")
    shrunk = 0
    for name, data in stored(dataset).items():
        original = (folder / name).read_bytes()
        before, after = (Image.open(BytesIO(image)) for image in (original, data))
        if name.startswith("train") and min(before.size) > 50:
            shrunk += 1
            assert after.format == "JPEG"
            assert min(after.size) == 50
            ratio = max(before.size) / min(before.size)
            assert abs(max(after.size) - 50 * ratio) <= 0.5
            reference = before.resize(after.size, Image.Resampling.LANCZOS)
            difference = np.abs(decode(data) - np.asarray(reference, dtype=float))
            assert difference.mean() < 5  # half the chroma of a small image
        else:
            assert data == original
    assert 0 < shrunk < 12
    assert report.converted == ()


def test_none_keeps_the_sizes(folder, tmp_path, photo):
    photo(500, 600, 1).save(folder / "train/cat/large.jpg")
    pack(folder_source(folder), tmp_path / "packed", workers=1, short_side=None)
    data = stored(PackedDataset.open(tmp_path / "packed"))
    assert data["train/cat/large.jpg"] == (folder / "train/cat/large.jpg").read_bytes()


def odd_images(photo, encode) -> dict[str, bytes]:
    """File name to the bytes of an image that cannot be stored as it is."""
    rgb = photo(40, 60)
    alpha = Image.linear_gradient("L").resize(rgb.size)
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    palette = rgb.convert("P")
    palette.putpixel((0, 0), 7)
    grey16 = np.linspace(0, 65535, 2400).reshape(40, 60).astype(np.uint16)
    turned = {
        f"turned{turn}.jpg": encode(rgb, "JPEG", exif=exif(turn), quality=95)
        for turn in range(2, 9)
    }
    return {
        "rgba.png": encode(rgba, "PNG"),
        "la.png": encode(rgba.convert("LA"), "PNG"),
        "palette.png": encode(palette, "PNG"),
        "transparent palette.png": encode(palette, "PNG", transparency=7),
        "bits.png": encode(rgb.convert("1"), "PNG"),
        "grey16.png": encode(Image.fromarray(grey16), "PNG"),
        "cmyk.jpg": encode(rgb.convert("CMYK"), "JPEG"),
        "photo.webp": encode(rgb, "WEBP"),
        "photo.gif": encode(rgb, "GIF", save_all=True, append_images=[photo(40, 60, 1)]),
        "photo.bmp": encode(rgb, "BMP"),
        "photo.tiff": encode(rgb, "TIFF"),
        "grey16.ppm": b"P5 2 2 65535 " + bytes([0, 0, 255, 255, 128, 0, 0, 255]),
    } | turned


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def as_user_sees(data: bytes) -> np.ndarray:
    """The upright pixels on white, float [height, width, 3]: the oracle, through Pillow."""
    image = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    if image.mode.startswith("I"):
        return np.repeat(np.asarray(image, dtype=float)[..., None] / 257, 3, axis=2)
    layers = np.asarray(image.convert("RGBA"), dtype=float)
    opacity = layers[..., 3:] / 255
    return layers[..., :3] * opacity + 255 * (1 - opacity)


def test_odd_images_become_upright_rgb(tmp_path, photo, encode):
    odd = odd_images(photo, encode)
    for place in ("train/a", "train/b", "val/a"):
        (tmp_path / "odd" / place).mkdir(parents=True)
        for name, data in odd.items():
            (tmp_path / "odd" / place / name).write_bytes(data)
    report = pack(folder_source(tmp_path / "odd"), tmp_path / "packed", workers=2)
    assert report.skipped == ()
    assert len(report.converted) == 3 * len(odd)
    for name, data in stored(PackedDataset.open(tmp_path / "packed")).items():
        image = Image.open(BytesIO(data))
        assert image.mode in ("RGB", "L"), name
        assert image.format == ("JPEG" if name.startswith("train") else "PNG"), name
        assert image.getexif().get(ORIENTATION, 1) == 1
        difference = np.abs(decode(data) - as_user_sees(odd[Path(name).name]))
        if image.format == "PNG":
            assert difference.max() <= 1, name
        else:
            assert np.percentile(difference, 50) < 12, name


def test_reasons_are_listed(tmp_path, folder, photo, encode):
    for name, data in odd_images(photo, encode).items():
        (folder / "train/cat" / name).write_bytes(data)
    report = pack(folder_source(folder), tmp_path / "packed", workers=2)
    why = {Path(remark.name).name: remark.why for remark in report.converted}
    assert why["rgba.png"] == "mode RGBA"
    assert why["photo.webp"] == "format WEBP"
    assert why["turned6.jpg"] == "EXIF orientation"
    rows = list(csv.DictReader((tmp_path / "packed/remarks.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == [remark.name for remark in report.converted]
    assert {row["action"] for row in rows} == {"converted"}
    manifest = json.loads((tmp_path / "packed/manifest.json").read_text())
    assert manifest["converted"]["EXIF orientation"] == 7


def test_wrong_extension_and_grey_images_keep_their_bytes(folder, tmp_path, photo, encode):
    files = {
        "train/cat/png.JPEG": encode(photo(30, 40), "PNG"),
        "train/cat/jpeg.png": encode(photo(30, 40), "JPEG"),
        "train/dog/grey.jpg": encode(photo(30, 40).convert("L"), "JPEG"),
        "val/dog/grey.png": encode(photo(30, 40).convert("L"), "PNG"),
        "val/dog/large.jpg": encode(photo(500, 700), "JPEG"),
        "val/dog/upright.jpg": encode(photo(30, 40), "JPEG", exif=exif(1)),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    assert pack(folder_source(folder), tmp_path / "packed", workers=2).converted == ()
    data = stored(PackedDataset.open(tmp_path / "packed"))
    assert {name: data[name] for name in files} == files


def test_large_grey_image_stays_grey(folder, tmp_path, photo):
    photo(90, 120).convert("L").save(folder / "train/cat/grey.png")
    pack(folder_source(folder), tmp_path / "packed", workers=1, short_side=60)
    data = stored(PackedDataset.open(tmp_path / "packed"))["train/cat/grey.png"]
    image = Image.open(BytesIO(data))
    assert (image.format, image.mode, image.size) == ("JPEG", "L", (80, 60))


BAD = (
    "bomb.ppm",
    "empty.jpg",
    "float.tiff",
    "half.jpg",
    "half.png",
    "head.jpg",
    "nearly.jpg",
    "text.jpg",
)


def bad_images(photo, encode) -> dict[str, bytes]:
    jpeg, png = encode(photo(40, 60), "JPEG"), encode(photo(40, 60), "PNG")
    return {
        "half.jpg": jpeg[: len(jpeg) // 2],
        "nearly.jpg": jpeg[:-2],
        "half.png": png[: len(png) // 2],
        "empty.jpg": b"",
        "text.jpg": b"hello, world",
        "bomb.ppm": b"P6 30000 30000 255 ",
        "head.jpg": jpeg[:3],
        "float.tiff": encode(Image.new("F", (4, 4)), "TIFF"),
    }


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_skipped_and_named(folder, tmp_path, photo, encode, split, name):
    (folder / split / "dog" / name).write_bytes(bad_images(photo, encode)[name])
    report = pack(folder_source(folder), tmp_path / "packed", workers=2)
    assert [remark[:2] for remark in report.skipped] == [(split, f"{split}/dog/{name}")]
    assert "0x" not in report.skipped[0].why
    dataset = PackedDataset.open(tmp_path / "packed")
    assert (len(dataset.train), len(dataset.val)) == (12, 4)
    assert f"{split}/dog/{name},skipped," in (tmp_path / "packed/remarks.csv").read_text()


def test_an_unreadable_image_is_skipped(folder, tmp_path):
    (folder / "train/dog/gone.jpg").symlink_to("nowhere.jpg")
    report = pack(folder_source(folder), tmp_path / "packed", workers=2)
    assert report.skipped[0].why == "cannot be read: No such file or directory"


def test_many_bad_images_are_refused_and_listed(folder, tmp_path, photo, encode):
    bad = bad_images(photo, encode)
    for name, data in bad.items():
        (folder / "train/cat" / name).write_bytes(data)
    with pytest.raises(InputError) as error:
        pack(folder_source(folder), tmp_path / "packed", workers=2)
    text = str(error.value)
    assert f"8 of 24 images in {folder} are bad, such as train/cat/" in text
    assert "\n" not in text
    listed = (tmp_path / "packed.bad.txt").read_text().splitlines()
    assert {Path(line.split("\t")[0]).name for line in listed} == set(bad) == set(BAD)
    assert not (tmp_path / "packed").exists()


def test_a_class_or_split_without_a_good_image_is_refused(tmp_path, photo):
    for name in ("train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        photo(20, 20).save(tmp_path / "photos" / name)
    (tmp_path / "photos/train/b/1.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="all training images of class b are bad"):
        pack(folder_source(tmp_path / "photos"), tmp_path / "packed", workers=1)
    photo(20, 20).save(tmp_path / "photos/train/b/1.jpg")
    (tmp_path / "photos/val/a/1.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="all validation images are bad"):
        pack(folder_source(tmp_path / "photos"), tmp_path / "packed", workers=1)


def test_a_jpeg_that_only_pillow_decodes_is_repaired(folder, tmp_path, photo, encode):
    plain = encode(photo(200, 300), "JPEG")
    tables = plain.index(b"\xff\xdb")
    jpeg = plain[:tables] + b"junk" + plain[tables:]
    with pytest.raises(ValueError, match="Corrupt JPEG data"):
        decode(jpeg)
    (folder / "train/cat/odd.jpg").write_bytes(jpeg)
    report = pack(folder_source(folder), tmp_path / "packed", workers=1)
    assert [remark.why for remark in report.converted] == ["damaged JPEG, decoded in part"]
    data = stored(PackedDataset.open(tmp_path / "packed"))["train/cat/odd.jpg"]
    assert decode(data).shape == (200, 300, 3)


def test_names_that_are_not_utf8(folder, tmp_path, photo):
    name = os.fsencode(folder / "train/cat") + b"/caf\xe9.png"
    try:
        Path(os.fsdecode(name)).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    photo(20, 20).save(os.fsdecode(name))
    pack(folder_source(folder), tmp_path / "packed", workers=1)
    assert r"train/cat/caf\xe9.png" in stored(PackedDataset.open(tmp_path / "packed"))


def test_replaces_a_packed_dataset_and_nothing_else(folder, tmp_path, photo):
    out = tmp_path / "packed"
    out.mkdir()
    pack(folder_source(folder), out, workers=1)
    photo(20, 20).save(folder / "train/cat/new.jpg")
    pack(folder_source(folder), out, workers=1)
    assert len(PackedDataset.open(out).train) == 13
    with pytest.raises(InputError, match="is there and is no packed dataset"):
        pack(folder_source(folder), folder, workers=1)
    assert len(folder_source(folder).train) == 13


def test_stopping_leaves_nothing_behind(folder, tmp_path):
    done = []
    with pytest.raises(PackingStoppedError):
        pack(
            folder_source(folder),
            tmp_path / "packed",
            workers=2,
            progress=lambda count, _: done.append(count),
            should_stop=lambda: len(done) == 3,
        )
    assert done == [1, 2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"photos", ".packed.lock"}


PACK_DIGITS = """
import sys
from pathlib import Path
from pitstop.data.sources.digits import digits_source
from pitstop.data.pack import pack
pack(digits_source(), Path(sys.argv[1]), workers=2, shard_bytes=20_000,
     progress=lambda done, total: print(done, flush=True))
"""


@pytest.mark.parametrize("kill_after", [1, 900, 1700])
def test_killed_in_the_middle_then_packed_again(tmp_path, kill_after):
    command = [sys.executable, "-c", PACK_DIGITS, str(tmp_path / "packed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == kill_after:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(InputError):
        PackedDataset.open(tmp_path / "packed")
    assert (tmp_path / ".packed.packing").is_dir()
    pack(digits_source(), tmp_path / "packed", workers=2, shard_bytes=20_000)
    pack(digits_source(), tmp_path / "calm", workers=1, shard_bytes=20_000)
    assert packed_files(tmp_path / "packed") == packed_files(tmp_path / "calm")
    assert not (tmp_path / ".packed.packing").exists()


def test_real_photos(tmp_path):
    archive = REPOSITORY.parent / "shared/data/imagenet-sample.tar"
    if not archive.exists():
        pytest.skip(f"{archive} is not there")
    with tarfile.open(archive) as files:
        for member in list(files)[:240]:
            files.extract(member, tmp_path, filter="data")
    # one photo a class: regrouped, they make ten classes that can be split
    photos = sorted((tmp_path / "imagenet-sample").rglob("*.JPEG"))
    for index, file in enumerate(photos):
        place = tmp_path / "photos" / f"class{index % 10}" / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        file.rename(place)
    report = pack(folder_source(tmp_path / "photos"), tmp_path / "packed", workers=2)
    assert report.skipped == ()
    dataset = PackedDataset.open(tmp_path / "packed")
    assert len(dataset.train) + len(dataset.val) == len(photos) > 100
    assert dataset.train.sizes.min(axis=1).max() == 400
    for split in (dataset.train, dataset.val):
        for row in range(0, len(split), 5):
            assert decode(split.read(row)).shape == (*split.sizes[row], 3)
