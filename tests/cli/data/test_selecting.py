"""`info`, `split` and `subset` on each kind of source, and `check` on what they make."""

import json
import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pitstop.data.pack import pack
from pitstop.data.packed import PackedDataset
from pitstop.data.sources.folder import folder_source

CLASSES = ("ant", "bee", "cat")
TRAIN, VAL = 8, 3
KINDS = ("folder", "packed", "tar", "parquet", "bucket")


def images() -> dict[str, bytes]:
    """Path to JPEG, all different, larger than what is stored for training."""
    rng = np.random.default_rng(0)
    files = {}
    for split, count in (("train", TRAIN), ("val", VAL)):
        for name in CLASSES:
            for index in range(count):
                out = BytesIO()
                coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((60, 44)).save(out, "JPEG")
                files[f"{split}/{name}/{index}.jpg"] = out.getvalue()
    return files


@pytest.fixture
def photos(place: Path) -> Path:
    for name, data in images().items():
        file = place / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return place / "photos"


@pytest.fixture(params=KINDS)
def spec(request: pytest.FixtureRequest, photos: Path) -> str:
    """The photos as each kind of source."""
    if request.param == "bucket":
        return in_bucket(request.getfixturevalue("bucket"))
    return {
        "folder": lambda: str(photos),
        "packed": lambda: as_packed(photos),
        "tar": lambda: as_tar(photos),
        "parquet": lambda: as_parquet(photos.parent / "parquet"),
    }[request.param]()


def as_packed(photos: Path) -> str:
    out = photos.parent / "packed"
    pack(folder_source(photos), out, short_side=40, workers=1, shard_bytes=9000)
    return str(out)


def as_tar(photos: Path) -> str:
    out = photos.parent / "photos.tar"
    with tarfile.open(out, "w") as archive:
        archive.add(photos, ".")
    return str(out)


def as_parquet(folder: Path) -> str:
    folder.mkdir()
    for split in ("train", "val"):
        files = {name: data for name, data in images().items() if name.startswith(split)}
        column = [{"bytes": data, "path": name} for name, data in files.items()]
        labels = [CLASSES.index(name.split("/")[1]) for name in files]
        pq.write_table(pa.table({"image": column, "label": labels}), folder / f"{split}.parquet")
    return str(folder)


def in_bucket(url: str) -> str:
    import boto3

    client = boto3.client("s3", region_name="us-east-1")
    for name, data in images().items():
        client.put_object(Bucket=url.removeprefix("s3://"), Key=f"photos/{name}", Body=data)
    client.close()
    return f"{url}/photos"


def by_class(path: Path | str) -> dict[str, Counter[int]]:
    dataset = PackedDataset.open(path)
    return {
        "train": Counter(dataset.train.labels.tolist()),
        "val": Counter(dataset.val.labels.tolist()),
    }


def test_info_counts_images_and_classes(command, spec):
    said = command("data", "info", spec)
    assert said.code == 0, said.err
    assert "24 for training, 9 for validation" in said.out
    assert "8 images a class" in said.out
    facts = json.loads(command("data", "info", spec, "--json").out)
    assert len(facts["classes"]) == 3
    assert {split: told["images"] for split, told in facts["splits"].items()} == {
        "train": 24,
        "val": 9,
    }


def test_split_takes_a_part_of_each_class(command, spec):
    said = command("data", "split", spec, "out", "--val", "0.25")
    assert said.code == 0, said.err
    assert said.out == "out: 18 training and 6 validation images of 3 classes\n"
    assert "9 validation images are left out" in said.err
    assert by_class("out") == {"train": Counter([0, 1, 2] * 6), "val": Counter([0, 1, 2] * 2)}
    assert command("data", "check", "out").code == 0


def test_subset_takes_some_classes_and_images(command, spec):
    options = ("--classes", "2", "--train", "5", "--val", "1", "--json")
    said = command("data", "subset", spec, "out", *options)
    assert said.code == 0, said.err
    answer = json.loads(said.out)
    assert (answer["classes"], answer["train"], answer["val"]) == (2, 10, 2)
    assert answer["digest"] == PackedDataset.open("out").digest
    assert by_class("out") == {"train": Counter([0, 1] * 5), "val": Counter([0, 1])}
    assert command("data", "check", "out").code == 0


def test_images_of_a_packed_dataset_keep_their_bytes(command, photos):
    packed = PackedDataset.open(as_packed(photos))
    assert command("data", "subset", packed.path, "out", "--classes", "ant,cat").code == 0
    subset = PackedDataset.open("out")
    assert subset.classes == ("ant", "cat")
    before, after = (
        {
            split.name(row): split.read(row)
            for split in (dataset.train, dataset.val)
            for row in range(len(split))
        }
        for dataset in (packed, subset)
    )
    assert after == {name: data for name, data in before.items() if "/bee/" not in name}
    made = json.loads((subset.path / "manifest.json").read_text())["made"]
    assert made["short_side"] == 40
    assert made["source"].endswith("packed, 2 of 3 classes")


def test_of_a_bucket_only_the_chosen_objects_are_read(command, bucket, place):
    import boto3

    spec = in_bucket(bucket)
    options = ("--classes", "2", "--train", "2", "--val", "1")
    assert command("data", "subset", spec, "first", *options).code == 0
    dataset = PackedDataset.open("first")
    chosen = {
        split.name(row) for split in (dataset.train, dataset.val) for row in range(len(split))
    }
    client = boto3.client("s3", region_name="us-east-1")
    listed = client.list_objects_v2(Bucket=bucket.removeprefix("s3://"))["Contents"]
    for key in (entry["Key"] for entry in listed):
        if not any(key.endswith(name) for name in chosen):
            client.put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=b"no image")
    client.close()
    assert command("data", "subset", spec, "second", *options).code == 0
    assert PackedDataset.open("second").digest == dataset.digest


def test_the_same_command_again_does_nothing_and_another_needs_force(command, refused, photos):
    def mtime() -> int:
        return Path("out/manifest.json").stat().st_mtime_ns

    assert command("data", "split", photos, "out").code == 0
    made = mtime()
    again = command("data", "split", photos, "out")
    assert (again.code, mtime()) == (0, made)
    assert "out is there already" in again.err
    other = command("data", "split", photos, "out", "--seed", "1")
    assert other.code == 2
    assert "--force" in other.err.splitlines()[-1]
    assert mtime() == made
    assert command("data", "split", photos, "out", "--seed", "1", "--force").code == 0
    assert mtime() != made


def test_all_images_can_be_divided(command, photos):
    assert command("data", "split", photos, "out", "--val", "0.5", "--all").code == 0
    counts = by_class("out")
    assert sum(counts["train"].values()) + sum(counts["val"].values()) == 33


def test_classes_are_named_in_a_file_too(command, photos):
    Path("some.txt").write_text("cat\n\n ant \n")
    assert command("data", "subset", photos, "out", "--classes", "@some.txt").code == 0
    assert PackedDataset.open("out").classes == ("ant", "cat")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--classes", "4"), "--classes 4: write a number from 2 to 3"),
        (("--classes", "1"), "--classes 1: write a number from 2 to 3"),
        (("--classes", "ant,bea"), "photos has no class bea; did you mean 'bee'?"),
        (("--classes", "ant"), "a classifier needs at least two classes: name more of photos's"),
        (("--classes", "@no"), "--classes @no: cannot be read (No such file or directory)"),
        ((), "nothing to leave out: give --classes, --train or --val"),
    ],
)
def test_a_subset_that_cannot_be_is_refused(refused, photos, options, line):
    assert refused("data", "subset", "photos", "out", *options) == line
    assert not Path("out").exists()


@pytest.mark.parametrize("part", ["0", "1", "1.5", "nan"])
def test_a_part_that_is_none_is_refused(refused, photos, part):
    said = refused("data", "split", "photos", "out", "--val", part)
    assert said == f"--val {part}: write a part between 0 and 1, such as 0.1"


def test_a_dataset_is_not_replaced_by_a_part_of_itself(refused, photos):
    packed = as_packed(photos)
    for command in (("split", packed, packed), ("subset", packed, packed, "--classes", "2")):
        assert refused("data", *command, "--force").endswith("replace itself: name another place")
    assert len(PackedDataset.open(packed).train) == 24


def test_a_source_that_is_not_there_is_refused(refused, place):
    for verb in (("info", "nothing"), ("split", "nothing", "out"), ("check", "nothing")):
        assert refused("data", *verb).startswith("nothing does not exist")
