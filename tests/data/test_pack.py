import csv
import errno
import json
import os
import struct
import tarfile
import zlib
from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pitstop.core.errors import InputError
from pitstop.data import converters, jpeg
from pitstop.data.convert import Settings, convert
from pitstop.data.decode import decode
from pitstop.data.pack import pack, stratified_order
from pitstop.data.packed import PackedDataset
from pitstop.data.sources.base import Item, constant_reader
from pitstop.data.sources.folder import folder_source
from pitstop.data.sources.packed import packed_source

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


def test_same_bytes_with_any_number_of_workers(folder, tmp_path, photo, encode, monkeypatch):
    for name, data in (odd_images(photo, encode) | {"bad.jpg": b"bad"}).items():
        (folder / "train/cat" / name).write_bytes(data)
    for few, workers in ((2000, 1), (2000, 4), (0, 1), (0, 3)):
        monkeypatch.setattr(converters, "FEW", few)  # fewer images are converted by threads
        out = tmp_path / f"packed {few} {workers}"
        pack(folder_source(folder), out, workers=workers, shard_bytes=9000, levels=(30, 45))
    first, *others = (packed_files(out) for out in sorted(tmp_path.glob("packed *")))
    assert len(others) == 3
    assert all(other == first for other in others)
    assert len([name for name in first if name.startswith("train-00")]) > 2


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


def test_a_photo_that_is_halved_while_decoding_looks_the_same(encode):
    """Sides that 8 does not divide: what libjpeg adds at the edges must not shift the rest."""
    down, right = np.arange(1205)[:, None] / 4, np.arange(1603) / 4
    waves = (128 + 100 * np.sin(right / 1.6) * np.cos(down / 1.6)).astype(np.uint8)
    data = encode(Image.fromarray(waves).convert("RGB"), "JPEG", quality=95)
    picture = convert(data, "train", Settings(100, 100)).pictures[0]
    full = Image.fromarray(decode(data)).resize((133, 100), Image.Resampling.LANCZOS)
    assert (picture.height, picture.width) == (100, 133)
    expected = decode(jpeg.encode(np.asarray(full), 100)).astype(float)
    assert np.abs(decode(picture.data) - expected).mean() < 2  # 10 if shifted


def test_none_keeps_the_sizes(folder, tmp_path, photo):
    photo(500, 600, 1).save(folder / "train/cat/large.jpg")
    pack(folder_source(folder), tmp_path / "packed", workers=1, short_side=None)
    data = stored(PackedDataset.open(tmp_path / "packed"))
    assert decode(data["train/cat/large.jpg"]).shape == (500, 600, 3)
    assert data["train/cat/0.jpg"] == (folder / "train/cat/0.jpg").read_bytes()


def test_a_training_image_becomes_tiles_where_that_is_faster(folder, tmp_path, photo):
    """The fine one needs fewer bytes in tiles of quality 90; the coarse one has few already."""
    place = folder / "train/cat"
    photo(300, 320, 1).save(place / "fine.jpg", quality=100, subsampling=0)
    photo(300, 320, 2).save(place / "coarse.jpg", quality=20)
    photo(300, 320, 3).save(place / "lossless.png")
    photo(128, 320, 4).save(place / "small.png")
    report = pack(folder_source(folder), tmp_path / "packed", workers=1)
    data = stored(PackedDataset.open(tmp_path / "packed"))
    for name, tiled in [("fine.jpg", 1), ("coarse.jpg", 0), ("lossless.png", 1), ("small.png", 0)]:
        after, before = data[f"train/cat/{name}"], (place / name).read_bytes()
        assert (jpeg.cut(after, (0, 0, 8, 8)) is not None) == tiled
        assert (after == before) == (not tiled)
        with Image.open(place / name) as image:
            difference = np.abs(decode(after).astype(float) - np.asarray(image))
        assert difference.mean() < 3
    assert report.converted == ()


def test_levels_are_small_copies_row_for_row(folder, tmp_path, photo, encode):
    (folder / "train/cat/tiny.png").write_bytes(encode(photo(20, 30), "PNG"))
    (folder / "train/cat/large.jpg").write_bytes(encode(photo(700, 900), "JPEG"))
    (folder / "train/cat/turned.jpg").write_bytes(encode(photo(60, 90), "JPEG", exif=exif(6)))
    out = tmp_path / "packed"
    plain = pack(folder_source(folder), tmp_path / "plain", workers=2, short_side=70)
    report = pack(
        folder_source(folder), out, workers=2, short_side=70, levels=(50, 25), shard_bytes=9000
    )
    assert report.digest != plain.digest
    assert report.bytes == sum(file.stat().st_size for file in out.glob("*-00*.arrow"))
    train = PackedDataset.open(out).train
    assert list(train.levels) == [25, 50]
    entry = json.loads((out / "manifest.json").read_text())["splits"]["train"]
    assert len(entry["shards"]) > 1
    for side, level in train.levels.items():
        shards = entry["levels"][str(side)]["shards"]
        assert [s["rows"] for s in shards] == [s["rows"] for s in entry["shards"]]
        assert [s["file"] for s in shards] == [
            s["file"].replace("train", f"train-{side}") for s in entry["shards"]
        ]
        assert (level.labels == train.labels).all()
        for row in range(len(train)):
            assert level.name(row) == train.name(row)
            file, image = folder / train.name(row), Image.open(BytesIO(level.read(row)))
            assert image.size == tuple(level.sizes[row])[::-1]
            before = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
            if min(before.size) <= side:
                assert level.read(row) == train.read(row)
                continue
            assert image.format == "JPEG"
            assert min(image.size) == side
            reference = np.asarray(before.resize(image.size, Image.Resampling.LANCZOS))
            expected = decode(jpeg.encode(reference, 90)).astype(float)
            assert np.abs(decode(level.read(row)) - expected).mean() < 2, train.name(row)
    assert PackedDataset.open(out).val.levels == {}


def test_a_level_must_be_smaller_than_the_images(folder, tmp_path):
    with pytest.raises(InputError, match="level 400 is not below the short side of 400"):
        pack(folder_source(folder), tmp_path / "packed", workers=2, levels=(160, 400))
    report = pack(
        folder_source(folder), tmp_path / "packed", workers=1, short_side=None, levels=[9]
    )
    assert list(PackedDataset.open(report.path).train.levels) == [9]


def test_a_declared_class_may_have_no_images(folder, tmp_path):
    source = replace(folder_source(folder), classes=("cat", "dog", "unicorn"))
    pack(source, tmp_path / "packed", workers=1)
    assert PackedDataset.open(tmp_path / "packed").classes[2] == "unicorn"


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
        "ycck.jpg": simplejpeg.encode_jpeg(
            np.ascontiguousarray(rgb.convert("CMYK")), 90, "CMYK", "444"
        ),
        "photo.webp": encode(rgb, "WEBP"),
        "webp.JPEG": encode(rgb, "WEBP"),
        "gif.JPEG": encode(rgb, "GIF"),
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
    assert why["photo.webp"] == why["webp.JPEG"] == "format WEBP"
    assert why["gif.JPEG"] == "format GIF"
    assert why["cmyk.jpg"] == why["ycck.jpg"] == "mode CMYK"
    assert why["turned6.jpg"] == "EXIF orientation"
    rows = list(csv.DictReader((tmp_path / "packed/remarks.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == [remark.name for remark in report.converted]
    assert {row["action"] for row in rows} == {"converted"}
    manifest = json.loads((tmp_path / "packed/manifest.json").read_text())
    assert manifest["converted"]["EXIF orientation"] == 7


def test_wrong_extension_and_grey_images_keep_their_bytes(folder, tmp_path, photo, encode):
    files = {
        "train/cat/png.JPEG": encode(photo(30, 40), "PNG"),
        "train/cat/broken exif.jpg": encode(photo(30, 40), "JPEG", exif=b"Exif\0\0II*\0no tags"),
        "train/cat/jpeg.png": encode(photo(30, 40), "JPEG"),
        "train/dog/grey.jpg": encode(photo(30, 40).convert("L"), "JPEG"),
        "val/dog/grey.png": encode(photo(30, 40).convert("L"), "PNG"),
        "val/dog/large.jpg": encode(photo(500, 700), "JPEG"),
        "val/dog/upright.jpg": encode(photo(30, 40), "JPEG", exif=exif(1)),
        "val/dog/broken exif.jpg": encode(photo(30, 40), "JPEG", exif=b"Exif\0\0II*\0no tags"),
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
    "bomb.png",
    "bomb.ppm",
    "empty.jpg",
    "float.tiff",
    "half.jpg",
    "half.png",
    "head.jpg",
    "nearly.jpg",
    "text.jpg",
    "wide.png",
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
        "bomb.png": resized(png, 20_000, 20_000),
        "wide.png": encode(Image.new("L", (65_536, 1)), "PNG"),
        "head.jpg": jpeg[:3],
        "float.tiff": encode(Image.new("F", (4, 4)), "TIFF"),
    }


def resized(png: bytes, width: int, height: int) -> bytes:
    """Returns a PNG that claims another size."""
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


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


@pytest.mark.parametrize("name", ["bomb.png", "bomb.ppm"])
def test_a_decompression_bomb_is_known_by_its_header(photo, encode, name):
    data = bad_images(photo, encode)[name]
    assert len(data) < 100_000
    with pytest.raises(Image.DecompressionBombError):
        convert(data, "train", Settings(400, 90))


def test_an_unreadable_image_is_skipped(folder, tmp_path):
    (folder / "train/dog/gone.jpg").symlink_to("nowhere.jpg")
    (folder / "train/dog/loop.jpg").symlink_to("loop.jpg")
    report = pack(folder_source(folder), tmp_path / "packed", workers=2)
    assert {remark.name: remark.why for remark in report.skipped} == {
        "train/dog/gone.jpg": "cannot be read: No such file or directory",
        "train/dog/loop.jpg": "cannot be read: Too many levels of symbolic links",
    }


def test_a_file_that_may_not_be_read_is_skipped(folder, tmp_path):
    (folder / "train/dog/0.jpg").chmod(0)
    if os.access(folder / "train/dog/0.jpg", os.R_OK):
        pytest.skip("root may read any file")
    report = pack(folder_source(folder), tmp_path / "packed", workers=2)
    assert report.skipped[0].why == "cannot be read: Permission denied"


def test_a_folder_that_is_named_like_an_image(folder, tmp_path):
    (folder / "train/dog/0.jpg").rename(folder / "train/dog/inner.jpg")
    (folder / "train/dog/0.jpg").mkdir()
    (folder / "train/dog/inner.jpg").rename(folder / "train/dog/0.jpg/inner.jpg")
    report = pack(folder_source(folder), tmp_path / "packed", workers=2)
    assert report.skipped == ()
    assert "train/dog/0.jpg/inner.jpg" in stored(PackedDataset.open(tmp_path / "packed"))


def test_fail_tolerates_no_bad_image(folder, tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (folder / "train/cat" / name).write_bytes(b"bad")
    with pytest.raises(InputError, match=r"2 of 18 images .*repair or delete those listed in"):
        pack(folder_source(folder), tmp_path / "packed", workers=2, on_bad="fail")
    listed = (tmp_path / "packed.bad.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in listed) == ["train/cat/a.jpg", "train/cat/b.jpg"]
    assert len(pack(folder_source(folder), tmp_path / "packed", workers=2).skipped) == 2


def test_many_bad_images_are_refused_and_listed(folder, tmp_path, photo, encode):
    bad = bad_images(photo, encode)
    for name, data in bad.items():
        (folder / "train/cat" / name).write_bytes(data)
    with pytest.raises(InputError) as error:
        pack(folder_source(folder), tmp_path / "packed", workers=2)
    text = str(error.value)
    assert f"10 of 26 images in {folder} are bad, such as train/cat/" in text
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


def test_a_packed_dataset_packed_again_keeps_its_tiles(folder, tmp_path, photo):
    photo(300, 320, 1).save(folder / "train/cat/fine.jpg", quality=100, subsampling=0)
    pack(folder_source(folder), tmp_path / "one", workers=1)
    pack(packed_source(tmp_path / "one"), tmp_path / "two", workers=1)
    one, two = PackedDataset.open(tmp_path / "one"), PackedDataset.open(tmp_path / "two")
    assert stored(one) == stored(two)
    assert any(jpeg.is_tiled(data) for data in stored(two).values())


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT, errno.EMFILE])
def test_a_disk_or_network_that_fails_does_not_make_a_bad_image(folder, tmp_path, number):
    def failing(name: str) -> bytes:
        if name == "train/cat/3.jpg":
            raise OSError(number, os.strerror(number))
        return (folder / name).read_bytes()

    source = replace(folder_source(folder), open=constant_reader(failing))
    with pytest.raises(InputError, match=r"train/cat/3\.jpg cannot be read .*: the same command"):
        pack(source, tmp_path / "packed", workers=1)
