import gc
import json
import os
import re
import resource
import shutil
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pitstop.core.errors import InputError
from pitstop.data.decode import decode
from pitstop.data.inspect import describe_packed
from pitstop.data.manifest import STAGING, STAGING_LOCK, read_manifest
from pitstop.data.pack import pack
from pitstop.data.packed import INDEX_SCHEMA, PackedDataset
from pitstop.data.sources.folder import folder_source
from pitstop.data.sources.packed import packed_source
from pitstop.io.storage import locked


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    """A packed dataset of 12 + 4 images in shards of about two."""
    pack(folder_source(folder), tmp_path / "packed", workers=2, shard_bytes=2000)
    return tmp_path / "packed"


def test_reads_what_was_packed(folder, packed):
    dataset = PackedDataset.open(packed)
    assert dataset.classes == ("cat", "dog")
    assert (len(dataset.train), len(dataset.val)) == (12, 4)
    assert len(list(packed.glob("train-*.arrow"))) > 2
    assert dataset.train.labels.dtype == np.int32
    assert dataset.train.sizes.dtype == np.uint16
    for split in (dataset.train, dataset.val):
        split.prefetch(np.arange(len(split)))
        for row in range(len(split)):
            data, name = split.read(row), split.name(row)
            assert data == (folder / name).read_bytes()
            assert decode(data).shape == (*split.sizes[row], 3)
            assert dataset.classes[split.labels[row]] == name.split("/")[1]
    names = [dataset.val.name(row) for row in range(4)]
    assert names == sorted(names)


def test_any_arrow_tool_opens_a_shard_and_the_manifest_tells_the_truth(packed):
    manifest = json.loads((packed / "manifest.json").read_text())
    for split in manifest["splits"].values():
        assert split["rows"] == sum(shard["rows"] for shard in split["shards"])
        for shard in split["shards"]:
            data = (packed / shard["file"]).read_bytes()
            assert (shard["bytes"], shard["sha256"]) == (len(data), sha256(data).hexdigest())
            reader = pa.ipc.open_file(data)
            assert reader.num_record_batches == 1
            table = reader.read_all()
            assert table.num_rows == shard["rows"]
            assert table.column_names == ["image", "label", "height", "width", "name"]
            table.validate(full=True)


def test_reading_survives_that_the_dataset_is_replaced_or_deleted(packed):
    dataset = PackedDataset.open(packed)
    first = dataset.train.read(0)
    shutil.rmtree(packed)
    assert dataset.train.read(0) == first


def test_files_are_closed_with_the_dataset(packed):
    inodes = {path.stat().st_ino for path in packed.rglob("*")}

    def is_of_the_dataset(descriptor: int) -> bool:
        try:
            return os.fstat(descriptor).st_ino in inodes
        except OSError:  # of the listing itself
            return False

    def open_files() -> int:
        """Of the dataset: threads of tests before may close theirs meanwhile."""
        return sum(is_of_the_dataset(int(path.name)) for path in Path("/dev/fd").iterdir())

    dataset = PackedDataset.open(packed)
    assert open_files() > 0
    del dataset
    gc.collect()
    assert open_files() == 0


def test_raises_the_limit_of_open_files(packed):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
        dataset = PackedDataset.open(packed)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
        assert dataset.train.read(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("error", [OSError, ValueError])
def test_a_system_that_allows_no_more_open_files_is_told_in_one_line(packed, monkeypatch, error):
    def refuse(which: int, limits: tuple[int, int]) -> None:
        raise error("no")

    monkeypatch.setattr(resource, "getrlimit", lambda which: (200, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(
        InputError, match=r"and 200 files may be open: raise the limit \(ulimit -n "
    ):
        PackedDataset.open(packed)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def garble(file: Path) -> None:
    file.write_bytes(b"\0" * file.stat().st_size)


def set_version(file: Path) -> None:
    file.write_text(file.read_text().replace('"version": 2', '"version": 99'))


def forget_a_class(file: Path) -> None:
    file.write_text(file.read_text().replace('"dog"', '"x"').replace('"cat",', ""))


def change_rows(file: Path) -> None:
    manifest = json.loads(file.read_text())
    manifest["splits"]["val"]["shards"][0]["rows"] += 1
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train-00001.arrow", Path.unlink, "No such file or directory"),
        ("train-00001.arrow", truncate, "is damaged"),
        ("train.index.arrow", Path.unlink, "No such file or directory"),
        ("train.index.arrow", truncate, "is damaged"),
        ("train.index.arrow", garble, "is damaged (not an Arrow file)"),
        ("manifest.json", Path.unlink, "packing did not finish"),
        ("manifest.json", truncate, "is damaged (not JSON)"),
        ("manifest.json", set_version, "has version 99, this pitstop reads 2"),
        ("manifest.json", forget_a_class, "a label beyond its classes"),
        ("manifest.json", change_rows, "val.index.arrow is damaged"),
    ],
)
def test_refuses_a_damaged_dataset_in_one_line(packed, file, damage, message):
    damage(packed / file)
    with pytest.raises(InputError) as error:
        PackedDataset.open(packed)
    text = str(error.value)
    assert message in text
    assert text.startswith(str(packed))
    assert text.endswith("pack again")
    assert "\n" not in text


def test_refuses_another_manifest(tmp_path):
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(InputError, match="not of a packed dataset"):
        PackedDataset.open(tmp_path)


def columns_of_index(rows: int) -> dict[str, pa.Array]:
    sides = pa.array(np.full(2 * rows, 50, np.uint16))
    size = pa.FixedSizeListArray.from_arrays(sides, type=INDEX_SCHEMA.field("size").type)
    others = {
        "label": np.zeros(rows, np.int32),
        "start": np.zeros(rows, np.int64),
        "length": np.ones(rows, np.uint32),
    }
    return {"size": size} | {name: pa.array(values) for name, values in others.items()}


def write_index(packed: Path, columns: dict[str, pa.Array], states_rows: int | None = None) -> None:
    """Replaces the index of train, of one shard, by one that may state more rows than it has."""
    file = packed / "train.index.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        arrays = [columns[name] for name in INDEX_SCHEMA.names]
        writer.write_batch(pa.record_batch(arrays, schema=INDEX_SCHEMA))
    rows = len(columns["label"])
    if states_rows is not None:
        content = file.read_bytes()
        for has, states in ((rows, states_rows), (2 * rows, 2 * states_rows)):
            content = content.replace(struct.pack("<q", has), struct.pack("<q", states))
        file.write_bytes(content)
    manifest = read_manifest(packed)
    train = manifest["splits"]["train"]
    train["shards"] = [{**train["shards"][0], "rows": states_rows or rows}]
    train["index"]["bytes"] = file.stat().st_size
    (packed / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("look", [PackedDataset.open, describe_packed, packed_source])
def test_an_index_that_states_more_rows_than_it_has_is_not_believed(packed, look):
    write_index(packed, columns_of_index(1237), states_rows=50_000_000)
    with pytest.raises(InputError, match=r"train\.index\.arrow is damaged \(not an Arrow file\)"):
        look(packed)


def test_an_index_of_missing_values_is_refused(packed):
    columns = columns_of_index(3) | {"start": pa.array([1, None, 1], pa.int64())}
    write_index(packed, columns)
    with pytest.raises(InputError, match=r"train\.index\.arrow is damaged \(other columns than"):
        PackedDataset.open(packed)


def test_an_index_beyond_its_shard_is_found_when_it_is_read(packed):
    starts = pa.array([2**40, 0, 0], pa.int64())
    lengths = pa.array([10, 2**32 - 1, 1], pa.uint32())
    write_index(packed, columns_of_index(3) | {"start": starts, "length": lengths})
    train = PackedDataset.open(packed).train
    train.prefetch(np.arange(3))
    for row in (0, 1):
        with pytest.raises(InputError, match=r"train-00000\.arrow"):
            train.read(row)


def test_names_that_lie_beyond_their_shard_are_refused(packed):
    file = packed / "train-00000.arrow"
    content = bytearray(file.read_bytes())
    batch = pa.ipc.open_file(bytes(content)).get_batch(0)
    assert batch.num_rows == 2
    ends = bytes(batch.column("name").buffers()[1])[: 8 * (batch.num_rows + 1)]
    second = content.index(ends) + 8
    content[second : second + 8] = struct.pack("<q", 2**45)
    file.write_bytes(content)
    dataset = PackedDataset.open(packed)
    with pytest.raises(InputError, match=r"train-00000\.arrow is damaged \(its names\)"):
        dataset.train.name(0)
    assert "row 0 of" in dataset.train.place(0)
    with pytest.raises(InputError, match=r"train-00000\.arrow is damaged \(its names\)"):
        packed_source(packed)


def test_a_shard_of_other_rows_than_listed_has_no_names(packed):
    dataset = PackedDataset.open(packed)
    file = packed / "train-00000.arrow"
    batch = pa.ipc.open_file(file.read_bytes()).get_batch(0)
    with pa.ipc.new_file(str(file), batch.schema) as writer:
        writer.write_batch(batch.slice(1))
    with pytest.raises(InputError, match=r"train-00000\.arrow is damaged \(other rows than listed"):
        dataset.train.name(0)


def test_says_that_a_shard_was_cut_while_in_use(packed):
    dataset = PackedDataset.open(packed)
    os.truncate(packed / "train-00000.arrow", 100)
    with pytest.raises(InputError, match=r"train-00000.arrow was cut short while in use"):
        dataset.train.read(0)


def test_refuses_a_row_outside(packed):
    dataset = PackedDataset.open(packed)
    for row in (-1, 12):
        with pytest.raises(AssertionError):
            dataset.train.read(row)


def test_an_image_larger_than_a_shard_gets_its_own(tmp_path, photo):
    for index, name in enumerate("abab"):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        photo(200, 300, index).save(tmp_path / "photos" / name / f"{index}.png")
    pack(folder_source(tmp_path / "photos"), tmp_path / "packed", workers=1, shard_bytes=1)
    dataset = PackedDataset.open(tmp_path / "packed")
    assert len(list((tmp_path / "packed").glob("*-*.arrow"))) == 4
    assert [decode(dataset.train.read(row)).shape for row in range(2)] == [(200, 300, 3)] * 2


def take_away(packed: Path, name: str) -> Path:
    """Makes the dataset one that is still being staged, a shard of which is missing yet."""
    (packed / STAGING).write_text("{}")
    return (packed / name).rename(packed.parent / name)


def rows_of_shard(packed: Path, shard: int) -> range:
    rows = [s["rows"] for s in read_manifest(packed)["splits"]["train"]["shards"]]
    return range(sum(rows[:shard]), sum(rows[: shard + 1]))


@pytest.mark.timeout(60)
def test_a_shard_that_is_being_copied_here_is_waited_for(packed):
    row = rows_of_shard(packed, 1)[0]
    expected = PackedDataset.open(packed).train.read(row)
    elsewhere = take_away(packed, "train-00001.arrow")
    dataset = PackedDataset.open(packed)
    dataset.train.prefetch(np.arange(len(dataset.train)))
    assert dataset.train.read(0)
    with locked(packed / STAGING_LOCK, "busy"), ThreadPoolExecutor() as pool:
        reading = [pool.submit(dataset.train.read, row) for _ in range(3)]
        elsewhere.rename(packed / "train-00001.arrow")
        assert [future.result() for future in reading] == [expected] * 3


def test_a_shard_that_nobody_copies_here_any_more_is_said(packed):
    row = rows_of_shard(packed, 1)[0]
    take_away(packed, "train-00001.arrow")
    dataset = PackedDataset.open(packed)
    with pytest.raises(InputError, match=r"train-00001.arrow is missing.*pitstop data stage"):
        dataset.train.read(row)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_million_images_open_without_memory_of_their_own(packed):
    """The index grows; the shards stay, so only the columns can be read."""
    rows = 2_000_000
    file = packed / "train.index.arrow"
    column = pa.array(np.zeros(2 * rows, np.uint16))
    size = pa.FixedSizeListArray.from_arrays(column, type=INDEX_SCHEMA.field("size").type)
    others = [np.arange(rows) % 2, np.arange(rows), np.full(rows, 50_000)]
    types = [INDEX_SCHEMA.field(name).type for name in ("label", "start", "length")]
    label, start, length = (pa.array(c, t) for c, t in zip(others, types, strict=True))
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        writer.write_batch(pa.record_batch([label, size, start, length], schema=INDEX_SCHEMA))
    del column, size, others, label, start, length
    manifest = json.loads((packed / "manifest.json").read_text())
    train = manifest["splits"]["train"]
    train["shards"] = [{**train["shards"][0], "rows": rows}]
    train["index"]["bytes"] = file.stat().st_size
    (packed / "manifest.json").write_text(json.dumps(manifest))

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024

    gc.collect()
    before = anonymous()
    dataset = PackedDataset.open(packed)
    assert len(dataset.train) == rows
    assert dataset.train.labels[-3:].tolist() == [1, 0, 1]
    assert anonymous() - before < 2**20
