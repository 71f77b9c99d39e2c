import tarfile
from pathlib import Path

import pytest

from pitstop.core.errors import InputError
from pitstop.data.pack import pack
from pitstop.data.resolve import count_training_images, resolve
from pitstop.data.sources.folder import folder_source


def test_a_packed_directory_is_itself(folder, tmp_path):
    pack(folder_source(folder), tmp_path / "packed", workers=1)
    assert resolve(str(tmp_path / "packed")) == tmp_path / "packed"


def test_counts_training_images_and_says_what_is_odd(folder, tmp_path):
    said = []
    assert count_training_images(str(folder), said.append) == 12
    assert said == []
    (folder / "train/loose.jpg").write_bytes(b"x")
    assert count_training_images(str(folder), said.append) == 12
    assert said == [f"{folder}/train: ignored 1 images beside the class folders"]
    assert count_training_images("digits", said.append) == 1438


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ftp://x/photos", "is a URL that is not read: download it, then name a packed dataset"),
        ("file", "file is a file of no known kind: name a packed dataset, a class folder"),
        ("fill", "fill does not exist; did you mean 'file'?"),
        ("cifar10", "cifar10 does not exist: pitstop data get cifar10 DIR makes it"),
        ("quite/elsewhere", "does not exist: name a packed dataset, a class folder, tar or Parq"),
        ("*.tar", r"there is no file \*\.tar: correct the pattern"),
        ("x-{1..2}.tar", r"there is no file x-1\.tar: correct the pattern x-\{1\.\.2\}\.tar"),
        ("x-{5..1}.tar", r"\{5\.\.1\} is not a range of 1 to 1,000,000 numbers, counted upwards"),
        ("x-{0000..9999999999}.tar", r"\{0000\.\.9999999999\} is not a range of 1 to 1,000,000"),
        ("x-{0..999999}{0..999999}{0..999999}.tar", r"there is no file x-000\.tar"),
        ("x/**.tar", r"there is no file x/\*\*\.tar"),
        ("/proc/self/mem", r"/proc/self/mem cannot be read \(.*\): check its permissions"),
    ],
)
def test_refuses_in_one_line(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(b"x")
    with pytest.raises(InputError, match=message) as error:
        resolve(spec)
    assert "\n" not in str(error.value)


def test_a_pattern_reaches_into_folders(tmp_path, folder):
    for name in ("a/1.tar", "a/b/2.tar"):
        (tmp_path / "tars" / name).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(tmp_path / "tars" / name, "w") as archive:
            for image in sorted((folder / "train").rglob("*.*")):
                inside = image.relative_to(folder / "train").with_stem(f"{image.stem}-{name[-5]}")
                archive.add(image, str(inside))
    counts = [
        count_training_images(str(tmp_path / "tars" / pattern), lambda _: None)
        for pattern in ("a/*.tar", "a/**.tar", "**/*.tar")
    ]
    assert counts[0] == counts[1] > 0
    assert counts[2] > counts[1]


def test_class_folders_beside_a_folder_called_meta_are_not_cifar(tmp_path, folder):
    (folder / "meta").mkdir()
    (folder / "val").rename(folder / "test")
    assert count_training_images(str(folder), [].append) == 12
