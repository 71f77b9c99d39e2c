import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pitstop.core.errors import InputError
from pitstop.data.pack import pack
from pitstop.data.packed import PackedDataset
from pitstop.data.sources.folder import folder_source
from pitstop.data.sources.packed import packed_source


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    """12 + 4 images at short side 50, in several shards."""
    out = tmp_path / "packed"
    pack(folder_source(folder), out, short_side=50, workers=1, shard_bytes=3000)
    return out


def test_has_the_names_labels_and_bytes_of_what_was_packed(folder, packed):
    source, original = packed_source(packed), folder_source(folder)
    assert source.classes == original.classes
    assert (list(source.train), list(source.val)) == (original.train, original.val)
    read, dataset = source.open(packed / "unused"), PackedDataset.open(packed)
    for split in (dataset.train, dataset.val):
        for row in range(len(split)):
            assert read(split.name(row)) == split.read(row)
    assert not (packed / "unused").exists()


def test_packed_again_it_is_the_same(packed, tmp_path):
    again = pack(packed_source(packed), tmp_path / "again", short_side=50, workers=2)
    assert again.digest == PackedDataset.open(packed).digest
    assert again.converted == ()


def test_the_reader_travels_small_and_serves_threads(packed):
    source = packed_source(packed)
    read = source.open(packed)
    assert read(source.val[0].name)
    travelled = pickle.dumps(read)
    assert len(travelled) < 1000
    names = [item.name for item in (*source.train, *source.val)] * 3
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(pickle.loads(travelled), names)) == [read(name) for name in names]


def test_an_unknown_name_is_an_os_error(packed):
    with pytest.raises(FileNotFoundError, match=r"has no image train/cat/99\.jpg"):
        packed_source(packed).open(packed)("train/cat/99.jpg")


def test_names_that_are_not_ascii_are_found(folder, tmp_path):
    for name in ("é.jpg", "z.jpg", "日本.jpg", "😀.jpg"):
        (folder / "train/cat" / name).write_bytes((folder / "train/cat/0.jpg").read_bytes())
    pack(folder_source(folder), tmp_path / "out", workers=1)
    source = packed_source(tmp_path / "out")
    read = source.open(tmp_path)
    assert list(source.train) == sorted(source.train)
    for name in ("é.jpg", "z.jpg", "日本.jpg", "😀.jpg"):
        assert read(f"train/cat/{name}") == (folder / "train/cat/0.jpg").read_bytes()


def test_a_damaged_shard_is_named(packed):
    shard = packed / "train-00001.arrow"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(InputError, match=r"train-00001\.arrow is damaged"):
        packed_source(packed)
