import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pitstop.core.errors import InputError
from pitstop.data.resolve import resolve
from pitstop.data.sources.base import Source

from .conftest import packed_rows, read_all, read_in_spawned


def write(path: Path, images, labels, image="image", label="label", names=None, struct=True):
    """Writes a Parquet file as `datasets` does, in row groups of two."""
    column = [{"bytes": data, "path": "x.jpg"} for data in images] if struct else list(images)
    table = pa.table({image: column, label: labels, "caption": ["x"] * len(labels)})
    if names is not None:
        features = {label: {"names": names, "_type": "ClassLabel"}, image: {"_type": "Image"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)
    return path


@pytest.fixture
def dataset(tmp_path, images) -> Path:
    """A dataset of the hub: 3 declared classes, 6 + 4 training images, 4 for validation, a test."""
    root = tmp_path / "owner" / "flowers"
    names = ["rose", "daisy", "tulip"]

    def part(name, numbers, label=lambda n: n % 3):
        labels = [label(n) for n in numbers]
        write(root / f"data/{name}.parquet", map(images, numbers), labels, names=names)

    part("train-00001-of-00002", range(6, 10))
    part("train-00000-of-00002", range(0, 6))
    part("validation-00000-of-00001", range(10, 14))
    part("test-00000-of-00001", range(14, 16), lambda n: -1)
    return root


def test_the_layout_of_the_hub(dataset, tmp_path, images):
    source = resolve(str(dataset))
    assert isinstance(source, Source)
    assert source.classes == ("rose", "daisy", "tulip")
    assert len(source.train) == 10
    assert [tuple(item) for item in source.val] == [
        (f"data/validation-00000-of-00001.parquet/000000{row}", (10 + row) % 3) for row in range(4)
    ]
    assert source.notes == (
        f"{dataset}: ignored 1 files of other splits, such as data/test-00000-of-00001.parquet",
    )
    rows = packed_rows(source, tmp_path / "packed")
    assert len(rows) == 14
    assert rows["data/train-00001-of-00002.parquet/0000001"] == ("daisy", images(7))
    spawned = read_in_spawned(source, tmp_path / "spool")
    assert spawned["data/train-00000-of-00002.parquet/0000005"] == images(5)


@pytest.mark.parametrize("pattern", ["data", "data/*.parquet", "data/{train-0000{0,1},val}*"])
def test_other_ways_to_name_it(dataset, pattern):
    source = resolve(str(dataset / pattern))
    assert isinstance(source, Source)
    assert (len(source.train), len(source.val)) == (10, 4)


def test_one_file_holds_some_out(tmp_path, images):
    path = write(tmp_path / "test-x.pq", map(images, range(20)), [n % 2 for n in range(20)])
    source = resolve(str(path))
    assert isinstance(source, Source)
    assert (source.classes, len(source.train), len(source.val)) == (("0", "1"), 18, 2)
    assert "no validation split: held out 2 of 20" in source.notes[0]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 9, 9, 10], ("9", "10")),
        (["b", "a", "b", "a"], ("a", "b")),
        (pa.array(["b", "a", "b", "a"]).dictionary_encode(), ("a", "b")),
        (pa.array([10, 9, 9, 10], pa.uint8()), ("9", "10")),
    ],
)
@pytest.mark.parametrize("struct", [True, False])
def test_columns_of_other_names_and_types(tmp_path, images, labels, classes, struct):
    path = tmp_path / "x.parquet"
    write(path, map(images, range(4)), labels, image="img", label="fine_label", struct=struct)
    source = resolve(str(path))
    assert isinstance(source, Source)
    assert source.classes == classes
    read = read_all(source, tmp_path / "spool")
    assert {name[-1]: data for name, data in read.items()} == {str(n): images(n) for n in range(4)}


def test_rows_without_label_are_left_out_and_those_without_image_are_bad(tmp_path, images):
    data = [*map(images, range(20)), None]
    labels = [None, -1, *(n % 2 for n in range(2, 20)), 0]
    path = write(tmp_path / "x.parquet", data, labels)
    source = resolve(str(path))
    assert isinstance(source, Source)
    read = read_all(source, tmp_path / "spool")
    assert sorted(int(name[-7:]) for name in read) == list(range(2, 21))
    assert read["x.parquet/0000020"] == b""
    assert "ignored 2 images without a label" in source.notes[0]


def test_labels_are_read_without_the_images(tmp_path, images):
    """The images' pages are damaged, which listing does not notice; reading says it in one line."""
    path = write(tmp_path / "x.parquet", [os.urandom(5000) for _ in range(6)], [0, 1] * 3)
    data = bytearray(path.read_bytes())
    data[4:24] = os.urandom(20)
    path.write_bytes(data)
    source = resolve(str(path))
    assert isinstance(source, Source)
    with pytest.raises(InputError, match=r"x\.parquet is damaged or no Parquet file") as error:
        source.open(tmp_path / "spool")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "spool").iterdir()) == []


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"pixels": [b"x"], "label": [0]}, "has the columns pixels, label, none of images: rename"),
        ({"image": [b"x"], "y": [0]}, r"none of labels: rename that to 'label' \(known: label,"),
        ({"image": ["a.jpg"], "label": [0]}, "column 'image' is string, not encoded images"),
        ({"image": [b"x"], "label": [0.5]}, "column 'label' is double, not one label an image"),
        ({"image": [b"x"], "label": [[1, 2]]}, "not one label an image"),
        ({"image": [b"x"], "label": [0]}, r"has one class \(0\)"),
        ({"image": [b"x"], "label": pa.array([None], pa.int64())}, "has no labelled images"),
    ],
)
def test_refuses_in_one_line(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=message) as error:
        resolve(str(tmp_path / "x.parquet"))
    assert str(tmp_path / "x.parquet") in str(error.value)
    assert "\n" not in str(error.value)


def test_refuses_labels_and_classes_that_do_not_fit(dataset, images):
    write(dataset / "data/train-00000-of-00002.parquet", [images(0)], [3], names=["a", "b"])
    with pytest.raises(InputError, match="declares other classes than"):
        resolve(str(dataset))
    names = ["rose", "daisy", "tulip"]
    write(dataset / "data/train-00000-of-00002.parquet", [images(0)], [3], names=names)
    with pytest.raises(InputError, match="label '3' is not of the declared classes"):
        resolve(str(dataset))


def test_refuses_a_file_that_is_cut_off(tmp_path, images):
    path = write(tmp_path / "x.parquet", map(images, range(4)), [0, 1, 0, 1])
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(InputError, match="is damaged or no Parquet file"):
        resolve(str(path))


KILLED = """
import sys
from pitstop.data.resolve import resolve
from pitstop.data.sources import parquet
from pathlib import Path

images, done = parquet._images, 0
def slowly(path, column):
    for image in images(path, column):
        yield image
        if path.name.startswith("train-00001"):
            print("half", flush=True)
            sys.stdin.read()
parquet._images = slowly
resolve(sys.argv[1]).open(Path(sys.argv[2]))
"""


def test_copying_goes_on_after_a_kill(dataset, tmp_path):
    spool = tmp_path / "spool"
    command = [sys.executable, "-c", KILLED, str(dataset), str(spool)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    left = {file.name: file.stat().st_ino for file in spool.iterdir()}
    assert sorted(Path(name).suffix for name in left) == [".images", ".npy", ".partial"]
    source = resolve(str(dataset))
    assert isinstance(source, Source)
    read = read_all(source, spool)
    assert read == read_all(source, tmp_path / "anew")
    now = {file.name: file.stat().st_ino for file in spool.iterdir()}
    whole = [name for name in left if not name.endswith(".partial")]
    assert [now[name] for name in whole] == [left[name] for name in whole]
    assert len(now) == 6
