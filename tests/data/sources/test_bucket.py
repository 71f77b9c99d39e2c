import pickle
from pathlib import Path

import pytest

from pitstop.core.errors import InputError
from pitstop.data.resolve import resolve
from pitstop.data.sources.base import Source
from pitstop.data.sources.bucket import bucket_source
from pitstop.data.sources.folder import folder_source
from pitstop.io.objects import open_store

from .conftest import packed_rows, read_all, read_in_spawned


@pytest.fixture
def root(tmp_path, tree) -> Path:
    """A folder that stands for a bucket: obstore reads both."""
    root = tmp_path / "bucket" / "photos"
    for name, data in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_class_folders_in_a_bucket_are_as_those_on_disk(root, tmp_path, tree):
    for name in ("train/cat/.hidden.jpg", "train/cat/notes.txt", "train/._cat/1.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    source, folder = bucket_source(f"file://{root}"), folder_source(root)
    assert (source.classes, source.train, source.val, source.notes) == (
        folder.classes,
        folder.train,
        folder.val,
        (),
    )
    assert read_in_spawned(source, tmp_path / "spool") == tree
    assert read_all(source, tmp_path / "spool") == tree
    rows = packed_rows(source, tmp_path / "packed")
    assert {name: data for name, (_, data) in rows.items()} == tree


def test_key_changes_with_the_content_only(root):
    before = bucket_source(f"file://{root}/").key
    assert bucket_source(f"file://{root}").key == before
    (root / "train/cat/0.jpg").write_bytes(b"edited")
    edited = bucket_source(f"file://{root}").key
    (root / "train/cat/9.jpg").write_bytes(b"added")
    assert len({before, edited, bucket_source(f"file://{root}").key}) == 3


def test_says_what_to_do_with_what_is_not_read_in_a_bucket(root, tmp_path):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/train-00000.arrow").write_bytes(b"")
    for url, message in (
        (
            f"file://{tmp_path}/packed",
            "is a packed dataset in a bucket: pitstop data stage file://",
        ),
        (f"file://{root}", "has train/x.tar, which is not read in a bucket: download it"),
    ):
        (root / "train/x.tar").write_bytes(b"")
        with pytest.raises(InputError, match=message):
            bucket_source(url)


def test_refuses_in_one_line(root, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no objects: check the name"):
        bucket_source(f"file://{tmp_path}/empty")
    (root / "val/bird").mkdir()
    (root / "val/bird/1.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match=r"val/bird has no counterpart file://.*train/bird"):
        bucket_source(f"file://{root}")


def test_s3(bucket, tmp_path, tree):
    store = open_store(bucket)
    for name, data in tree.items():
        store.put(f"photos/{name}", data)
    source = resolve(f"{bucket}/photos/")
    assert isinstance(source, Source)
    rows = packed_rows(source, tmp_path / "packed")
    assert {name: data for name, (_, data) in rows.items()} == tree
    before = source.key
    store.put("photos/train/cat/0.jpg", tree["train/cat/1.jpg"])
    assert resolve(f"{bucket}/photos").key != before


def test_a_bucket_that_cannot_be_reached_is_not_a_bad_image(bucket, tmp_path, tree, aws):
    """Bad images are skipped; an InputError ends packing."""
    store = open_store(bucket)
    for name, data in tree.items():
        store.put(name, data)
    source = resolve(bucket)
    assert isinstance(source, Source)
    aws.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    reader = pickle.loads(pickle.dumps(source.open(tmp_path)))
    with pytest.raises(InputError, match="was not reached"):
        reader(source.train[0].name)
