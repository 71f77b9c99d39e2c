import os
from collections import Counter
from pathlib import Path

import pytest

from pitstop.core.errors import InputError
from pitstop.data.sources.base import Item, hold_out
from pitstop.data.sources.folder import folder_source


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def numbered(folder: str, count: int) -> list[str]:
    return [f"{folder}/{index:03}.jpg" for index in range(count)]


@pytest.mark.parametrize("val", ["val", "validation", "test", "Val"])
def test_finds_classes_and_splits(tmp_path, val):
    touch(tmp_path, "train/dog/1.jpg", "train/cat/a/b/2.PNG", f"{val}/dog/3.webp")
    source = folder_source(tmp_path)
    assert source.classes == ("cat", "dog")
    assert source.train == [Item("train/cat/a/b/2.PNG", 0), Item("train/dog/1.jpg", 1)]
    assert source.val == [Item(f"{val}/dog/3.webp", 1)]
    assert source.notes == ()
    assert source.open(tmp_path)("train/dog/1.jpg") == b"x"


def test_prefers_val_to_test(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "test/a/1.jpg")
    assert [item.name for item in folder_source(tmp_path).val] == ["val/a/1.jpg"]


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_holds_out_a_stratified_tenth_and_says_so(tmp_path, prefix):
    touch(tmp_path, *numbered(f"{prefix}a", 40), *numbered(f"{prefix}b", 3), f"{prefix}c/1.jpg")
    source = folder_source(tmp_path)
    assert Counter(item.label for item in source.val) == {0: 4, 1: 1}
    assert Counter(item.label for item in source.train) == {0: 36, 1: 2, 2: 1}
    assert "held out 5 of 44 images" in source.notes[0]
    assert folder_source(tmp_path).val == source.val


def test_hold_out_depends_on_names_only():
    items = [Item(f"{label}/{index}", label) for label in range(3) for index in range(20)]
    kept, held = hold_out(items, 0.1)
    assert sorted(kept + held) == sorted(items)
    assert set(hold_out(items[::-1], 0.1)[1]) == set(held)


def test_ignores_hidden_and_other_files_and_notes_images_beside_classes(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg")
    touch(tmp_path, "train/a/.DS_Store", "train/a/._1.jpg", "train/.cache/1.jpg", "train/a/x.txt")
    touch(tmp_path, "train/loose.jpg")
    source = folder_source(tmp_path)
    assert [item.name for item in source.train] == ["train/a/1.jpg", "train/b/1.jpg"]
    assert source.notes == (f"{tmp_path}/train: ignored 1 images beside the class folders",)


def test_links_in_a_circle_and_dangling_links_do_no_harm(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg")
    (tmp_path / "a/loop").symlink_to(tmp_path / "a")
    (tmp_path / "a/self").symlink_to("self")
    (tmp_path / "a/gone.jpg").symlink_to("nowhere.jpg")
    source = folder_source(tmp_path)
    names = sorted(item.name for item in (*source.train, *source.val))
    assert names == ["a/1.jpg", "a/2.jpg", "a/gone.jpg", "b/1.jpg", "b/2.jpg"]


def test_takes_regular_files_only(tmp_path):
    """Reading a pipe waits for who writes it."""
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg")
    os.mkfifo(tmp_path / "train/a/pipe.jpg")
    (tmp_path / "train/a/link.jpg").symlink_to("pipe.jpg")
    (tmp_path / "train/a/null.jpg").symlink_to(os.devnull)
    (tmp_path / "train/a/self.jpg").symlink_to("self.jpg")
    (tmp_path / "train/a/2.jpg").symlink_to("1.jpg")
    names = [item.name for item in folder_source(tmp_path).train]
    assert names == ["train/a/1.jpg", "train/a/2.jpg", "train/a/self.jpg", "train/b/1.jpg"]


def test_key_changes_with_the_content_only(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg")
    before = folder_source(tmp_path).key
    assert folder_source(tmp_path).key == before
    os.utime(tmp_path / "a/1.jpg", ns=(0, 1))
    edited = folder_source(tmp_path).key
    touch(tmp_path, "a/3.jpg")
    assert len({before, edited, folder_source(tmp_path).key}) == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.jpg", "2.jpg"], "has 2 images but no class folders: put each class's images into"),
        (["notes.txt"], "has no class folders"),
        (["a/1.jpg", "b/x.txt"], "/b has no images (bmp gif jpeg"),
        (["a/1.jpg", "a/2.jpg"], "has one class (a): a classifier needs at least two"),
        (["a/1.jpg", "b/1.jpg"], "one image a class, too few to hold any out"),
        (["train/a/1.jpg", "train/b/1.jpg", "val/c/1.jpg"], "val/c has no counterpart"),
        (["train/a/1.jpg", "train/b/1.jpg", "val/1.jpg"], "val has 1 images but no class folders"),
        (["test/a/1.jpg", "test/b/1.jpg"], "has test/ but no train/"),
        (["training/a/1.jpg", "valid/b/1.jpg"], "has training/ but no train/"),
    ],
)
def test_refuses_in_one_line(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(InputError) as error:
        folder_source(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_refuses_what_is_no_folder(tmp_path):
    touch(tmp_path, "file")
    with pytest.raises(InputError, match="is missing: name a folder"):
        folder_source(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a file: name a folder"):
        folder_source(tmp_path / "file")
