import shutil
import subprocess
import sys

import pytest

from pitstop.core.errors import InputError
from pitstop.data.open import open_dataset
from pitstop.data.pack import PackingStoppedError, pack
from pitstop.data.sources.folder import folder_source


def opened(spec, cache, said=None):
    lines = [] if said is None else said
    return open_dataset(str(spec), cache=cache, workers=2, say=lines.append)


def test_packs_a_class_folder_once(folder, tmp_path):
    said, done = [], []
    first = open_dataset(
        str(folder),
        cache=tmp_path / "cache",
        workers=2,
        progress=lambda *counts: done.append(counts),
        say=said.append,
    )
    assert said == [f"packed 16 images (4 for validation) into {first.path}"]
    assert done == [(count, 16) for count in range(1, 17)]
    assert first.path.parent == tmp_path / "cache"
    assert first.path.name.startswith("photos-")
    said.clear()
    second = opened(folder, tmp_path / "cache", said)
    assert (second.path, second.digest, said) == (first.path, first.digest, [])


def test_packs_again_when_the_folder_changes(folder, tmp_path, photo):
    before = opened(folder, tmp_path / "cache")
    photo(30, 30, 99).save(folder / "train/cat/new.jpg")
    after = opened(folder, tmp_path / "cache")
    assert len(after.train) == len(before.train) + 1
    assert after.path != before.path
    assert after.digest != before.digest


def test_mends_a_damaged_cache(folder, tmp_path):
    before = opened(folder, tmp_path / "cache")
    (before.path / "train-00000.arrow").write_bytes(b"")
    said = []
    after = opened(folder, tmp_path / "cache", said)
    assert after.digest == before.digest
    assert "train-00000.arrow is damaged" in said[0]
    assert said[1].startswith("packed 16 images")


def test_says_what_was_held_out_converted_and_skipped(folder, tmp_path):
    shutil.rmtree(folder / "val")
    (folder / "train/cat/empty.jpg").write_bytes(b"")
    said = []
    dataset = opened(folder, tmp_path / "cache", said)
    assert "held out 2 of 13 images" in said[0]
    assert said[1:] == [
        f"packed 12 images ({len(dataset.val)} for validation) into {dataset.path}",
        f"skipped 1 bad images: see {dataset.path}/remarks.csv",
    ]


def test_opens_the_digits(tmp_path):
    dataset = opened("digits", tmp_path)
    assert (len(dataset.train), len(dataset.val)) == (1438, 359)
    assert opened("digits", tmp_path).digest == dataset.digest


def test_opens_a_packed_directory(folder, tmp_path):
    pack(folder_source(folder), tmp_path / "packed", workers=1)
    assert opened(tmp_path / "packed", tmp_path / "cache").path == tmp_path / "packed"
    assert not (tmp_path / "cache").exists()


def test_a_class_folder_may_hold_a_manifest_of_its_own(folder, tmp_path):
    (folder / "manifest.json").write_text("{}")
    assert len(opened(folder, tmp_path / "cache").train) == 12


def test_says_that_a_packed_directory_is_unfinished(folder, tmp_path):
    pack(folder_source(folder), tmp_path / "packed", workers=1)
    (tmp_path / "packed/manifest.json").unlink()
    with pytest.raises(InputError, match="packing did not finish: pack again"):
        opened(tmp_path / "packed", tmp_path)


def test_refuses_in_one_line_what_it_cannot_open(folder, tmp_path):
    (tmp_path / "photos.tar").write_bytes(b"")
    for spec, message in (
        ("ftp://x/photos", "is a URL that is not read: download it, then name a packed dataset"),
        (str(tmp_path / "photos.tar"), "is a file of no known kind: name a packed dataset"),
        ("digit", "digit does not exist; did you mean 'digits'?"),
        (str(tmp_path / "photo"), f"does not exist; did you mean '{folder}'?"),
        (
            str(tmp_path / "quite/elsewhere"),
            "does not exist: name a packed dataset, a class folder",
        ),
    ):
        with pytest.raises(InputError) as error:
            opened(spec, tmp_path)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_stops_when_asked(folder, tmp_path):
    with pytest.raises(PackingStoppedError):
        open_dataset(
            str(folder), cache=tmp_path, workers=2, should_stop=lambda: True, say=lambda _: None
        )


def test_refuses_a_cache_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .*PITSTOP_CACHE"):
        opened(folder, tmp_path / "cache")


OPEN = """
import sys
from pathlib import Path
from pitstop.data.open import open_dataset
dataset = open_dataset("digits", cache=Path(sys.argv[1]), workers=1, say=print)
print(len(dataset.train), "rows")
"""


def test_of_several_processes_one_packs(tmp_path):
    command = [sys.executable, "-c", OPEN, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert said.count("packed 1,797 images") == 1
    assert said.count("1438 rows") == 2
