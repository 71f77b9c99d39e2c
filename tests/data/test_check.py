import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pitstop.core.errors import InputError
from pitstop.data.check import CheckReport, Place, check
from pitstop.data.decode import decode
from pitstop.data.jpeg import is_tiled
from pitstop.data.manifest import digest_of, read_manifest
from pitstop.data.pack import pack
from pitstop.data.packed import PackedDataset
from pitstop.data.sources.folder import folder_source

SHORT_SIDE = 50


@pytest.fixture
def folder(folder: Path, photo) -> Path:
    """The common one, but with other images in val than in train."""
    for seed, file in enumerate(sorted(folder.glob("val/*/*.jpg"))):
        photo(45, 60, seed=1000 + seed).save(file)
    return folder


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    """12 + 4 images, some shrunk, each in several shards, and a level."""
    out = tmp_path / "packed"
    source = folder_source(folder)
    pack(source, out, short_side=SHORT_SIDE, levels=(32,), workers=2, shard_bytes=6000)
    return out


def checked(path: Path) -> CheckReport:
    return check(path, workers=2)


def test_a_whole_dataset_has_no_problems(packed):
    steps: list[tuple[int, int]] = []
    report = check(packed, workers=2, progress=lambda done, total: steps.append((done, total)))
    assert (report.problems, report.duplicates) == ([], [])
    assert report.files == len(list(packed.glob("*.arrow")))
    assert report.images == 12 + 12 + 4
    assert steps[-1] == (28, 28)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def image_at(packed: Path, file: str, row: int) -> tuple[int, int, str]:
    """Where an image begins in its shard's file, its length, and its name."""
    data = (packed / file).read_bytes()
    batch = pa.ipc.open_file(data).get_batch(0)
    image = batch.column("image")[row].as_py()
    return data.index(image), len(image), batch.column("name")[row].as_py()


def overwrite(file: Path, at: int, data: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        stream.write(data)


@pytest.mark.parametrize("file", ["train-00001.arrow", "val-00000.arrow", "train-32-00000.arrow"])
def test_a_damaged_image_is_named_by_file_and_row(packed, file):
    start, length, name = image_at(packed, file, row=1)
    overwrite(packed / file, start + length // 2, b"\xff\xd9" * 8)  # as if the JPEG ended there
    whole_file, row = checked(packed).problems
    assert whole_file == (file, None, None, "its checksum is not the manifest's")
    assert row[:3] == (file, 1, name)
    assert row.why


def test_all_damaged_rows_are_listed(packed):
    shards = read_manifest(packed)["splits"]["train"]["shards"]
    for shard in shards:
        for row in range(shard["rows"]):
            start, _, _ = image_at(packed, shard["file"], row)
            overwrite(packed / shard["file"], start, b"\0\0")
    problems = checked(packed).problems
    assert sum(problem.row is not None for problem in problems) == 12
    assert {problem.file for problem in problems} == {shard["file"] for shard in shards}


def test_a_flipped_bit_anywhere_names_the_file(packed):
    rng = np.random.default_rng(0)
    for file in sorted(packed.glob("*.arrow")):
        content = file.read_bytes()
        at = int(rng.integers(len(content)))
        overwrite(file, at, bytes([content[at] ^ 1]))
        assert {problem.file for problem in checked(packed).problems} == {file.name}
        overwrite(file, at, content[at : at + 1])
    assert checked(packed).problems == []


def test_missing_cut_and_foreign_files_are_named(packed):
    (packed / "train-00000.arrow").unlink()
    cut = packed / "val-00000.arrow"
    cut.write_bytes(cut.read_bytes()[:-10])
    (packed / "train.index.arrow").write_bytes(b"hello")
    problems = checked(packed).problems
    why = {problem.file: problem.why for problem in problems[::-1]}
    assert why["train-00000.arrow"] == "cannot be read (No such file or directory)"
    size = cut.stat().st_size
    assert why["val-00000.arrow"] == f"has {size:,} bytes instead of {size + 10:,}"
    assert "bytes instead of" in why["train.index.arrow"]
    assert any("is no Arrow file" in problem.why for problem in problems)
    assert all(problem.row is None for problem in problems)


def rewrite(packed: Path, entry: dict, column: str, row: int, value: object) -> None:
    """Changes a value in a file, and its checksum in the manifest: what nobody could see."""
    file = packed / entry["file"]
    table = pa.ipc.open_file(file.read_bytes()).read_all()
    values = table[column].to_pylist()
    values[row] = value
    at = table.schema.get_field_index(column)
    table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.types[at]))
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_batch(table.combine_chunks().to_batches()[0])
    manifest = (packed / "manifest.json").read_text()
    size, checksum = file.stat().st_size, sha256(file.read_bytes()).hexdigest()
    manifest = manifest.replace(entry["sha256"], checksum)
    listed = json.loads(manifest)
    for split in (*listed["splits"].values(), *listed["splits"]["train"]["levels"].values()):
        for each in (split["index"], *split["shards"]):
            if each["file"] == entry["file"]:
                each["bytes"] = size
    (packed / "manifest.json").write_text(json.dumps(listed))


def test_labels_without_a_class_are_named(packed):
    shard = read_manifest(packed)["splits"]["val"]["shards"][0]
    name = image_at(packed, shard["file"], 0)[2]
    rewrite(packed, shard, "label", 0, 2)
    assert (shard["file"], 0, name, "its label has no class") in checked(packed).problems


@pytest.mark.parametrize(
    ("column", "value"), [("label", 1), ("size", [7, 7]), ("start", 0), ("length", 9)]
)
def test_an_index_that_differs_is_found(packed, column, value):
    train = read_manifest(packed)["splits"]["train"]
    dataset = PackedDataset.open(packed)
    row = next(row for row in range(12) if dataset.train.labels[row] == 0)
    name = dataset.train.name(row)
    rewrite(packed, train["index"], column, row, value)
    [problem] = checked(packed).problems
    assert problem.name == name
    assert problem.file.startswith("train-0")
    assert problem.why == "the index differs from the shard"


def test_missing_values_are_found(packed):
    train = read_manifest(packed)["splits"]["train"]
    for entry, column in ((train["shards"][0], "label"), (train["index"], "start")):
        rewrite(packed, entry, column, 0, None)
        why = {problem.file: problem.why for problem in checked(packed).problems}
        assert why[entry["file"]] == "has other rows than the manifest lists"


def test_an_image_of_another_size_is_found(packed):
    shard = read_manifest(packed)["splits"]["train"]["shards"][0]
    dataset = PackedDataset.open(packed)
    height, width = dataset.train.sizes[0].tolist()
    rewrite(packed, shard, "height", 0, height + 1)
    why = [problem.why for problem in checked(packed).problems if problem.row == 0]
    assert f"is {width} x {height} pixels instead of {width} x {height + 1}" in why


def change_manifest(packed: Path, change: Callable[[dict], object]) -> list[str]:
    """Returns what is said of it then."""
    manifest = read_manifest(packed)
    change(manifest)
    (packed / "manifest.json").write_text(json.dumps(manifest))
    problems = checked(packed).problems
    assert {problem[:3] for problem in problems} == {("manifest.json", None, None)}
    return [problem.why for problem in problems]


DIGEST = "its digest is not that of its classes, rows and content"


def test_a_manifest_of_other_classes_or_another_digest_is_found(packed):
    assert change_manifest(packed, lambda m: m.update(classes=["dog", "cat"])) == [DIGEST]
    assert change_manifest(packed, lambda m: m.update(classes=["cat", "dog"], digest="0" * 64)) == [
        DIGEST
    ]


def test_a_manifest_of_other_content_is_found(packed):
    def change(manifest: dict) -> None:
        train = manifest["splits"]["train"]
        train["levels"]["32"]["content"] = train["content"]
        manifest["splits"]["val"]["rows"] = 5
        manifest["digest"] = digest_of(manifest["classes"], manifest["splits"])

    assert change_manifest(packed, change) == [
        "its rows of val are not those of the shards",
        "its content of train-32 is not that of the shards",
    ]


def test_a_label_that_was_changed_everywhere_is_found_by_the_content(packed):
    train = read_manifest(packed)["splits"]["train"]
    row = PackedDataset.open(packed).train.labels[: train["shards"][0]["rows"]].tolist().index(0)
    rewrite(packed, train["shards"][0], "label", row, 1)
    rewrite(packed, train["index"], "label", row, 1)
    assert [problem.why for problem in checked(packed).problems] == [
        "its content of train is not that of the shards"
    ]


def test_an_index_of_tiles_that_lies_is_found(folder, tmp_path, photo):
    photo(120, 160, 99).save(folder / "train/cat/large.jpg", quality=95)
    out = tmp_path / "packed"
    pack(folder_source(folder), out, short_side=100, workers=1)
    assert checked(out).problems == []
    [shard] = read_manifest(out)["splits"]["train"]["shards"]
    table = pa.ipc.open_file((out / shard["file"]).read_bytes()).read_all()
    row = table["name"].to_pylist().index("train/cat/large.jpg")
    image = table["image"][row].as_py()
    assert is_tiled(image)
    lengths_at = image.index(b"pitstop\0") + 20
    lengths = np.frombuffer(image, "<u2", 10, lengths_at)
    lied = lengths + np.array([2, -2] * 5).astype("<u2")  # every other tile begins late
    lied = image[:lengths_at] + lied.tobytes() + image[lengths_at + 20 :]
    assert decode(lied).shape == (100, 133, 3)
    start = (out / shard["file"]).read_bytes().index(image)
    overwrite(out / shard["file"], start, lied)
    whole_file, problem = checked(out).problems
    assert whole_file.why == "its checksum is not the manifest's"
    assert problem[:3] == (shard["file"], row, "train/cat/large.jpg")


def test_no_manifest_is_refused(packed):
    (packed / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"has no manifest\.json, so packing did not finish"):
        checked(packed)


# Duplicates


def twin_files(photo, encode) -> dict[str, bytes]:
    """Files of all that packing does to an image; each is put into train and val."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return {
        "small.jpg": encode(photo(40, 60, 77), "JPEG"),
        "large.jpg": encode(photo(90, 120, 78), "JPEG"),
        "large and grey.jpg": encode(photo(90, 120, 79).convert("L"), "JPEG"),
        "small.png": encode(photo(30, 30, 80), "PNG"),
        "large.png": encode(photo(99, 99, 81), "PNG"),
        "small.webp": encode(photo(30, 40, 82), "WEBP"),
        "large.webp": encode(photo(70, 80, 83), "WEBP"),
        "grey.gif": encode(photo(30, 40, 84).convert("L"), "GIF"),
        "turned.jpg": encode(photo(90, 120, 85), "JPEG", exif=exif),
        "small and turned.jpg": encode(photo(30, 45, 86), "JPEG", exif=exif),
        "alpha.png": encode(photo(80, 70, 87).convert("RGBA"), "PNG"),
        "cmyk.jpg": encode(photo(80, 90, 88).convert("CMYK"), "JPEG"),
    }


def test_a_file_in_train_and_val_is_found_whatever_packing_did_to_it(
    folder, tmp_path, photo, encode
):
    twins = twin_files(photo, encode)
    for name, data in twins.items():
        (folder / "train/cat" / name).write_bytes(data)
        (folder / "val/dog" / f"copy of {name}").write_bytes(data)
    pack(folder_source(folder), tmp_path / "out", short_side=SHORT_SIDE, workers=2)
    report = checked(tmp_path / "out")
    assert report.problems == []
    pairs = {(pair.train.name, pair.val.name) for pair in report.duplicates}
    assert pairs == {(f"train/cat/{name}", f"val/dog/copy of {name}") for name in twins}


def test_duplicates_are_told_by_file_and_row(folder, tmp_path):
    shutil.copy(folder / "train/cat/5.jpg", folder / "val/cat/5.jpg")
    pack(folder_source(folder), tmp_path / "out", short_side=SHORT_SIDE, workers=1)
    [(train, val)] = checked(tmp_path / "out").duplicates
    assert val == Place("val-00000.arrow", 2, "val/cat/5.jpg")
    assert image_at(tmp_path / "out", train.file, train.row)[2] == "train/cat/5.jpg" == train.name


def test_images_that_look_alike_are_no_duplicates(folder, tmp_path, encode, photo):
    (folder / "train/cat/a.jpg").write_bytes(encode(photo(90, 90, 5), "JPEG", quality=90))
    (folder / "val/cat/a.jpg").write_bytes(encode(photo(90, 90, 5), "JPEG", quality=91))
    pack(folder_source(folder), tmp_path / "out", short_side=SHORT_SIDE, workers=1)
    dataset = PackedDataset.open(tmp_path / "out")
    assert decode(dataset.val.read(2)).shape == (90, 90, 3)
    assert checked(tmp_path / "out").duplicates == []
