import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pitstop.core.errors import InputError
from pitstop.data.resolve import resolve
from pitstop.data.sources.base import Source
from pitstop.data.sources.folder import folder_source
from pitstop.data.sources.tar import ILSVRC_TRAIN, ILSVRC_VAL, tar_source

from .conftest import packed_rows, read_all, read_in_spawned, tar_bytes, write_tar

SAMPLE = Path(__file__).resolve().parents[4] / "shared/data/imagenet-sample.tar"
CIFAR = Path(__file__).resolve().parents[4] / "shared/data/cifar10.tar.gz"


def source_of(*files: Path) -> Source:
    return tar_source(files, str(files[0]))


def unpacked(tmp_path: Path, tree: dict[str, bytes]) -> Path:
    for name, data in tree.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    return tmp_path / "folder"


# Class folders.


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("around", ["", "./", "photos/"])
def test_a_tar_file_is_as_the_folder_that_it_unpacks_to(tmp_path, tree, mode, around):
    path = write_tar(tmp_path / "x.any", {around + n: tree[n] for n in reversed(tree)}, mode)
    source, folder = resolve(str(path)), folder_source(unpacked(tmp_path, tree))
    assert isinstance(source, Source)
    assert (source.classes, source.train, source.val, source.notes) == (
        folder.classes,
        folder.train,
        folder.val,
        (),
    )
    assert read_all(source, tmp_path / "spool") == tree
    assert (tmp_path / "spool").exists() == (mode != "w")


def test_packs_as_the_folder_does(tmp_path, tree):
    source = source_of(write_tar(tmp_path / "x.tgz", tree, "w:gz"))
    rows = packed_rows(source, tmp_path / "packed")
    assert rows == packed_rows(folder_source(unpacked(tmp_path, tree)), tmp_path / "other")


def test_holds_out_where_there_is_no_validation(tmp_path, images):
    names = [f"{kind}/{number}.jpg" for kind in ("a", "b") for number in range(10)]
    path = write_tar(tmp_path / "x.tar", {name: images(0) for name in names})
    source = source_of(path)
    assert (len(source.train), len(source.val)) == (18, 2)
    assert source.notes[0].startswith(f"{path} has no val/")


def test_the_order_in_the_archive_does_not_matter(tmp_path, tree):
    first = source_of(write_tar(tmp_path / "1.tar", tree))
    second = source_of(write_tar(tmp_path / "2.tar", {n: tree[n] for n in reversed(tree)}))
    assert (first.train, first.val) == (second.train, second.val)
    assert read_all(first, tmp_path) == read_all(second, tmp_path)


def test_the_reader_works_in_another_process(tmp_path, tree):
    for mode in ("w", "w:gz"):
        source = source_of(write_tar(tmp_path / "x.tar", tree, mode))
        assert read_in_spawned(source, tmp_path / "spool") == tree


def test_splits_follow_from_the_names_of_several_files(tmp_path, tree):
    for split in ("train", "val"):
        inside = {n.partition("/")[2]: data for n, data in tree.items() if n.startswith(split)}
        write_tar(tmp_path / f"data/{split}.tar", inside)
    write_tar(tmp_path / "data/test.tar", {"cat/9.jpg": b"x"})
    source = resolve(str(tmp_path / "data"))
    assert isinstance(source, Source)
    assert read_all(source, tmp_path / "spool") == tree


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_files_of_another_split_are_left_out_and_the_user_is_told(tmp_path, tree, mode):
    for split in ("train", "val"):
        inside = {n.partition("/")[2]: data for n, data in tree.items() if n.startswith(split)}
        write_tar(tmp_path / f"data/{split}.tar.gz", inside, mode)
    write_tar(tmp_path / "data/test.tar.gz", {"cat/9.jpg": b"x"}, mode)
    source = resolve(str(tmp_path / "data"))
    assert isinstance(source, Source)
    assert read_all(source, tmp_path / "spool") == tree
    told = f"{tmp_path}/data: ignored 1 files of other splits, such as test.tar.gz"
    assert source.notes == (told,)


def test_a_class_as_deep_as_tar_allows(tmp_path, tree):
    deep = {f"train/cat/{'d/' * 1500}9.jpg": b"deep"}
    source = source_of(write_tar(tmp_path / "x.tar", {**tree, **deep}))
    assert read_all(source, tmp_path / "spool") == {**tree, **deep}


def test_tar_files_beside_class_folders_are_not_taken(tmp_path, tree):
    folder = unpacked(tmp_path, tree)
    write_tar(folder / "photos.tgz", {"a/1.jpg": b"x"}, "w:gz")
    source = resolve(str(folder))
    assert isinstance(source, Source)
    assert len(source.train) == 6


def test_key_changes_with_the_content_only(tmp_path, tree):
    path = write_tar(tmp_path / "x.tar", tree)
    before = source_of(path).key
    assert source_of(path).key == before
    os.utime(path, ns=(0, 1))
    assert source_of(path).key != before


def test_members_of_odd_kinds_and_names(tmp_path, tree):
    """Long names (GNU and pax), names that are not UTF-8, hidden files, folders."""
    long = f"train/cat/{'x' * 150}.jpg"
    odd = {long: b"long", "train/cat/\udcff.jpg": b"not UTF-8", "train/dog/ä.jpg": b"umlaut"}
    hidden = {"train/cat/._1.jpg": b"", "train/.cache/2.jpg": b"", "train/cat/notes.txt": b""}
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{format}.tar"
        with tarfile.open(path, "w", format=format, errors="surrogateescape") as archive:
            archive.addfile(_kind("train/cat", tarfile.DIRTYPE))
            for name, data in {**tree, **odd, **hidden}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        source = source_of(path)
        assert read_all(source, tmp_path / "spool") == {**tree, **odd}
        assert source.notes == ()


# Hostile and broken archives.


def _kind(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_nothing_leaves_the_folder(tmp_path, tree, mode):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    files = {**tree, "/etc/cat/evil.jpg": b"evil", "../cat/evil.jpg": b"evil"}
    files["train/cat/../../../evil.jpg"] = b"evil"
    path = tmp_path / "in/x.tar"
    write_tar(path, {})
    with tarfile.open(path, mode) as archive:
        archive.addfile(_kind("train/cat/link.jpg", tarfile.SYMTYPE, "../../../../secret.jpg"))
        archive.addfile(_kind("train/cat/hard.jpg", tarfile.LNKTYPE, "/etc/passwd"))
        archive.addfile(_kind("train/cat/device.jpg", tarfile.CHRTYPE))
        archive.addfile(_kind("train/cat/pipe.jpg", tarfile.FIFOTYPE))
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    source = source_of(path)
    assert read_all(source, tmp_path / "spool") == tree
    assert source.notes == (
        f"{path}: ignored 7 members that are links, devices, or lead out of the folder, such as "
        "'train/cat/link.jpg'",
    )
    there = {file.relative_to(tmp_path).parts[0] for file in tmp_path.rglob("*")}
    assert there <= {"secret.jpg", "in", "spool"}


def test_of_equal_names_the_last_counts(tmp_path, tree):
    path = write_tar(tmp_path / "x.tar", tree)
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("./train/cat/0.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"new"))
    source = source_of(path)
    assert read_all(source, tmp_path)["train/cat/0.jpg"] == b"new"
    assert source.notes == (
        f"{path}: took the last of 1 members that occur again, such as 'train/cat/0.jpg'",
    )


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_an_archive_that_is_cut_off_is_refused_in_one_line(tmp_path, tree, mode):
    whole = write_tar(tmp_path / "whole.tar", tree, mode).read_bytes()
    cut = tmp_path / "cut.tar"
    end = len(whole) if mode != "w" else len(whole.rstrip(b"\0"))
    for part in (0.2, 0.5, 0.9, 0.99):
        cut.write_bytes(whole[: int(end * part)])
        with pytest.raises(InputError, match=r"cut\.tar is damaged, cut off, or no tar") as error:
            source_of(cut)
        assert "\n" not in str(error.value)


def test_an_archive_that_ends_after_a_whole_member_is_cut_off_too(tmp_path, tree):
    path = write_tar(tmp_path / "x.tar", tree)
    with tarfile.open(path) as archive:
        third = archive.getmembers()[3].offset
    os.truncate(path, third)
    with pytest.raises(InputError, match="no end at byte"):
        source_of(path)


def test_a_damaged_header_is_refused(tmp_path, tree):
    path = write_tar(tmp_path / "x.tar", tree)
    with tarfile.open(path) as archive:
        third = archive.getmembers()[3].offset
    with path.open("r+b") as file:
        file.seek(third + 130)
        file.write(b"\xff\xff\xff")
    with pytest.raises(InputError, match="damaged"):
        source_of(path)


@pytest.mark.parametrize(
    "kind",
    [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE],
)
def test_a_long_header_is_not_read_into_memory(tmp_path, tree, kind):
    """The size is only claimed: who reads that many bytes finds the end of the file instead."""
    long = _kind("././@LongLink", kind)
    long.size = 3 * 2**30
    path = write_tar(tmp_path / "x.tar", tree)
    path.write_bytes(long.tobuf(tarfile.GNU_FORMAT) + path.read_bytes())
    with pytest.raises(InputError, match=r"is damaged.*a header of 3,221,225,472 bytes"):
        source_of(path)


def test_headers_of_headers_and_a_size_beyond_any_file_are_damage(tmp_path, tree):
    path, huge = write_tar(tmp_path / "x.tar", tree), _kind("a/1.jpg", tarfile.REGTYPE)
    huge.size = 2**80
    chain = _kind("././@LongLink", tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT) * 5000
    whole = path.read_bytes()
    for before in (chain, huge.tobuf(tarfile.GNU_FORMAT)):
        path.write_bytes(before + whole)
        with pytest.raises(InputError, match="is damaged") as error:
            source_of(path)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_must_not_be_read_is_not_called_damaged(tmp_path, tree):
    write_tar(tmp_path / "data/train.tar", tree).chmod(0)
    with pytest.raises(InputError, match=r"train\.tar cannot be read \(Permission denied\)"):
        resolve(str(tmp_path / "data"))


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path):
    with pytest.raises(InputError, match=r"gone\.tar cannot be read \(No such file"):
        source_of(tmp_path / "gone.tar")


def test_a_nested_archive_cannot_claim_what_lies_behind_it(tmp_path):
    inner = tar_bytes({"1.jpg": b"x" * 600})
    lying = bytearray(inner)
    lying[124:136] = b"00000777777\0"
    lying[148:156] = b"%06o\0 " % sum(lying[:148] + b" " * 8 + lying[156:512])
    path = write_tar(tmp_path / "x.tar", {"a.tar": bytes(lying), "b.tar": inner})
    with pytest.raises(InputError, match="leads out of the archive"):
        source_of(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tar", b"", "is a file of no known kind"),
        ("x.tar", b"not a tar file" * 100, "is a file of no known kind"),
        ("x.zip", b"PK\x03\x04", "is a zip file, of which nothing is read in place: unzip it"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        resolve(str(tmp_path / name))


def test_zstd_says_what_it_needs(tmp_path):
    if sys.version_info >= (3, 14):
        pytest.skip("this Python reads zstd")
    (tmp_path / "x.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd rest")
    with pytest.raises(InputError, match=r"needs Python 3\.14: unpack it \(zstd -d\)"):
        resolve(str(tmp_path / "x.tar.zst"))


# Decompressing.


def test_what_is_decompressed_already_is_not_done_again(tmp_path, images, monkeypatch):
    for split, count in (("train", 4), ("val", 2)):
        files = {f"{n}.jpg": images(n) for n in range(count)}
        labels = {f"{n}.cls": b"%d" % (n % 2) for n in range(count)}
        write_tar(tmp_path / f"{split}.tar.gz", {**files, **labels}, "w:gz")
    source = source_of(tmp_path / "train.tar.gz", tmp_path / "val.tar.gz")
    once = read_all(source, tmp_path / "spool")
    first, second = sorted((tmp_path / "spool").iterdir())
    inode = first.stat().st_ino
    second.rename(second.with_name(second.name + ".partial"))  # as a kill leaves it
    assert read_all(source, tmp_path / "spool") == once
    assert first.stat().st_ino == inode
    assert sorted((tmp_path / "spool").iterdir()) == [first, second]


KILLED = """
import sys
from pathlib import Path
from pitstop.data.sources import archive
from pitstop.data.sources.tar import tar_source

chunks = archive._chunks
def slowly(path):
    yield next(chunks(path))[:1000]
    print("half", flush=True)
    sys.stdin.read()
    yield b"never"
archive._chunks = slowly
tar_source([Path(sys.argv[1])], "x").open(Path(sys.argv[2]))
"""


def test_decompressing_goes_on_after_a_kill(tmp_path, tree):
    path = write_tar(tmp_path / "x.tgz", tree, "w:gz")
    command = [sys.executable, "-c", KILLED, str(path), str(tmp_path / "spool")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert [file.suffix for file in (tmp_path / "spool").iterdir()] == [".partial"]
    assert read_all(source_of(path), tmp_path / "spool") == tree
    assert [file.suffix for file in (tmp_path / "spool").iterdir()] == [".tar"]


def test_a_changed_archive_is_not_read_from_what_was_decompressed_before(tmp_path, tree):
    path = write_tar(tmp_path / "x.tgz", tree, "w:gz")
    read_all(source_of(path), tmp_path / "spool")
    swapped = dict(zip(tree, reversed(tree.values()), strict=True))
    write_tar(path, swapped, "w:gz")
    assert read_all(source_of(path), tmp_path / "spool") == swapped


# ILSVRC.


@pytest.fixture
def ilsvrc(tmp_path, images) -> Path:
    """A folder with the train tar of 2 classes of 3, and the flat tar of 4 validation images."""
    folder = tmp_path / "imagenet"
    inner = {
        f"n0{number}.tar": tar_bytes(
            {f"n0{number}_{k}.JPEG": images(10 * number + k) for k in range(3)}
        )
        for number in (2, 1)
    }
    write_tar(folder / ILSVRC_TRAIN, inner)
    val = {f"ILSVRC2012_val_{n:08}.JPEG": images(100 + n) for n in (3, 1, 2, 4)}
    write_tar(folder / ILSVRC_VAL, val)
    return folder


LABELS = {
    "LOC_val_solution.csv": "ImageId,PredictionString\n"
    + "".join(f"ILSVRC2012_val_{n:08},n0{1 + n % 2} 85 1 499 272 \n" for n in (4, 2, 3, 1)),
    "val.txt": "".join(f"ILSVRC2012_val_{n:08}.JPEG {n % 2}\n" for n in (1, 2, 3, 4)),
    "imagenet_2012_validation_synset_labels.txt": "n02\nn01\nn02\nn01\n",
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("named", ["", ILSVRC_TRAIN])
def test_ilsvrc(ilsvrc, tmp_path, images, labels, named):
    (ilsvrc / labels).write_text(LABELS[labels])
    source = resolve(str(ilsvrc / named))
    assert isinstance(source, Source)
    assert source.classes == ("n01", "n02")
    assert [tuple(item) for item in source.val] == [
        ("val/n01/ILSVRC2012_val_00000002.JPEG", 0),
        ("val/n01/ILSVRC2012_val_00000004.JPEG", 0),
        ("val/n02/ILSVRC2012_val_00000001.JPEG", 1),
        ("val/n02/ILSVRC2012_val_00000003.JPEG", 1),
    ]
    read = read_all(source, tmp_path)
    assert len(read) == 10
    assert read["train/n02/n02_1.JPEG"] == images(21)
    assert read["val/n01/ILSVRC2012_val_00000004.JPEG"] == images(104)
    before = source.key
    os.utime(ilsvrc / labels, ns=(0, 1))
    assert resolve(str(ilsvrc)).key != before


def test_ilsvrc_is_packed(ilsvrc, tmp_path, images):
    (ilsvrc / "val.txt").write_text(LABELS["val.txt"])
    source = resolve(str(ilsvrc))
    assert isinstance(source, Source)
    rows = packed_rows(source, tmp_path / "packed")
    assert len(rows) == 10
    assert rows["train/n02/n02_1.JPEG"] == ("n02", images(21))
    assert rows["val/n01/ILSVRC2012_val_00000004.JPEG"] == ("n01", images(104))


def test_ilsvrc_with_validation_images_in_folders(ilsvrc, tmp_path, images):
    (ilsvrc / ILSVRC_VAL).unlink()
    for number in (1, 2):
        (ilsvrc / f"val/n0{number}").mkdir(parents=True)
        (ilsvrc / f"val/n0{number}/x.JPEG").write_bytes(images(number))
    source = resolve(str(ilsvrc))
    assert isinstance(source, Source)
    assert [item.name for item in source.val] == ["val/n01/x.JPEG", "val/n02/x.JPEG"]
    assert read_all(source, tmp_path)["val/n02/x.JPEG"] == images(2)


def test_ilsvrc_with_flat_validation_images_in_a_folder(ilsvrc, tmp_path, images):
    (ilsvrc / ILSVRC_VAL).unlink()
    (ilsvrc / "val").mkdir()
    for number in (1, 2, 3, 4):
        (ilsvrc / f"val/ILSVRC2012_val_{number:08}.JPEG").write_bytes(images(100 + number))
    (ilsvrc / "val.txt").write_text(LABELS["val.txt"])
    source = resolve(str(ilsvrc))
    assert isinstance(source, Source)
    assert len(source.val) == 4
    assert read_all(source, tmp_path)["val/n02/ILSVRC2012_val_00000003.JPEG"] == images(103)


def test_tar_files_of_splits_in_a_tar_file(tmp_path, tree):
    splits = {
        split: {n.partition("/")[2]: data for n, data in tree.items() if n.startswith(split)}
        for split in ("train", "val")
    }
    path = write_tar(tmp_path / "x.tar", {f"{s}.tar": tar_bytes(f) for s, f in splits.items()})
    assert read_all(source_of(path), tmp_path) == tree


def test_ilsvrc_with_class_folders_in_the_validation_tar(ilsvrc, images):
    write_tar(ilsvrc / ILSVRC_VAL, {f"val/n0{n}/x.JPEG": images(n) for n in (1, 2)})
    assert [item.name for item in resolve(str(ilsvrc)).val] == ["val/n01/x.JPEG", "val/n02/x.JPEG"]


def test_ilsvrc_without_validation_images_holds_some_out(ilsvrc):
    (ilsvrc / ILSVRC_VAL).unlink()
    source = resolve(str(ilsvrc))
    assert len(source.val) == 2
    assert "held out 2 of 6 images" in source.notes[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (None, "", r"put LOC_val_solution\.csv \(of Kaggle\) or val\.txt .* into"),
        ("val.txt", "ILSVRC2012_val_00000001.JPEG 0\n", "has no line for ILSVRC2012_val_00000002"),
        ("val.txt", LABELS["val.txt"].replace(" 1", " n07"), "is of class n07, of which there is"),
        ("val.txt", "", r"val\.txt is empty: renew it"),
        ("val.txt", " \n\n", r"val\.txt is empty: renew it"),
        ("val.txt", "\udcff 0\n", r"val\.txt is not UTF-8 text: renew it"),
        ("imagenet_2012_validation_synset_labels.txt", "n01\n", "has 1 classes for 4 images"),
        (
            "ILSVRC2012_validation_ground_truth.txt",
            "490\n361\n171\n822\n",
            "only meta.mat explains",
        ),
    ],
)
def test_ilsvrc_says_what_labels_it_wants(ilsvrc, name, text, message):
    if name is not None:
        (ilsvrc / name).write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match=message) as error:
        resolve(str(ilsvrc))
    assert str(ilsvrc) in str(error.value)


# WebDataset.


def shard(images, numbers, ending="cls", label=lambda n: b"%d" % (n % 2)) -> dict[str, bytes]:
    return {
        name: data
        for n in numbers
        for name, data in ((f"{n:04}.jpg", images(n)), (f"{n:04}.{ending}", label(n)))
    }


@pytest.fixture
def shards(tmp_path, images) -> Path:
    folder = tmp_path / "wds"
    write_tar(folder / "imagenet1k-train-0000.tar", shard(images, range(0, 4)))
    write_tar(folder / "imagenet1k-train-0001.tar", shard(images, range(4, 6)))
    write_tar(folder / "imagenet1k-validation-00.tar", shard(images, range(6, 8)))
    return folder


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "*.tar",
        "imagenet1k-{train-{0000..0001},validation-00}.tar",
    ],
)
def test_webdataset(shards, tmp_path, images, pattern):
    source = resolve(str(shards / pattern))
    assert isinstance(source, Source)
    assert source.classes == ("0", "1")
    assert len(source.train) == 6
    assert [item.name for item in source.val] == [
        f"imagenet1k-validation-00.tar/{n:04}.jpg" for n in (6, 7)
    ]
    read = read_all(source, tmp_path)
    assert read["imagenet1k-train-0001.tar/0005.jpg"] == images(5)
    assert len(read) == 8


def test_webdataset_is_packed(shards, tmp_path, images):
    source = resolve(str(shards))
    assert isinstance(source, Source)
    rows = packed_rows(source, tmp_path / "packed")
    assert rows["imagenet1k-train-0001.tar/0005.jpg"] == ("1", images(5))
    assert len(rows) == 8


@pytest.mark.parametrize(
    ("ending", "label", "classes"),
    [
        ("json", lambda n: json.dumps({"label": n % 2, "x": 1}).encode(), ("0", "1")),
        ("json", lambda n: json.dumps({"label": "ba"[n % 2]}).encode(), ("a", "b")),
        ("txt", lambda n: [b"dog\n", b"cat\n"][n % 2], ("cat", "dog")),
        ("cls", lambda n: b"%d" % (n % 11), tuple(map(str, range(11)))),
    ],
)
def test_webdataset_labels(tmp_path, images, ending, label, classes):
    path = write_tar(tmp_path / "x-train.tar", shard(images, range(22), ending, label))
    assert source_of(path).classes == classes


def test_webdataset_in_one_file_holds_some_out(tmp_path, images):
    path = write_tar(tmp_path / "anything.tar", shard(images, range(20)))
    assert len(source_of(path).val) == 2


def test_webdataset_ignores_images_without_labels_and_says_so(tmp_path, images):
    files = {**shard(images, range(20)), "more.jpg": images(0), "more.caption": b"x"}
    source = source_of(write_tar(tmp_path / "x.tar", files))
    assert len(source.train) + len(source.val) == 20
    assert "ignored 1 images without a label (.cls, .json, .txt)" in source.notes[0]


def test_webdataset_takes_one_image_of_a_key(tmp_path, images):
    """KEY.seg.png is another part of the sample, such as a mask."""
    masks = {f"{n:04}.seg.png": b"mask" for n in range(20)}
    path = write_tar(tmp_path / "x.tar", {**shard(images, range(20)), **masks})
    source = source_of(path)
    assert read_all(source, tmp_path) == {f"x.tar/{n:04}.jpg": images(n) for n in range(20)}
    what = "20 images that are not KEY.jpg or the like, such as x.tar/0000.seg.png"
    assert source.notes[0] == f"{path}: ignored {what}"


def test_webdataset_refuses_two_images_of_a_key(tmp_path, images):
    files = {**shard(images, range(20)), "0007.png": images(7)}
    with pytest.raises(InputError, match=r"0007\.jpg and 0007\.png are images of one key: remove"):
        source_of(write_tar(tmp_path / "x.tar", files))


@pytest.mark.parametrize(
    ("label", "message"),
    [(b"[]", "0000.json has no label"), (b'{"a": 1}', "has no label"), (b"\xff", "has no label")],
)
def test_webdataset_refuses_what_is_no_label(tmp_path, images, label, message):
    path = write_tar(tmp_path / "x.tar", shard(images, range(4), "json", lambda n: label))
    with pytest.raises(InputError, match=message):
        source_of(path)


def test_webdataset_refuses_a_label_that_training_lacks(shards, images):
    write_tar(shards / "imagenet1k-validation-00.tar", shard(images, [1], label=lambda n: b"7"))
    with pytest.raises(InputError, match="label '7' has no training image"):
        resolve(str(shards))


def test_a_pattern_names_what_is_missing(shards):
    with pytest.raises(InputError, match=r"there is no file .*train-0002\.tar"):
        resolve(str(shards / "imagenet1k-train-{0000..0002}.tar"))
    with pytest.raises(InputError, match="there is no file"):
        resolve(str(shards / "*.tgz"))


# Real data.


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"needs {SAMPLE}")
def test_the_sample_of_imagenet_has_too_few_images_to_hold_out():
    with pytest.raises(InputError, match="one image a class, too few to hold any out"):
        resolve(str(SAMPLE))


@pytest.mark.skipif(not CIFAR.exists(), reason=f"needs {CIFAR}")
def test_cifar_in_class_folders(tmp_path):
    source = resolve(str(CIFAR))
    assert isinstance(source, Source)
    assert (len(source.classes), len(source.train), len(source.val)) == (10, 50000, 10000)
    reader = source.open(tmp_path)
    with tarfile.open(CIFAR) as archive:
        for _ in range(300):
            info = archive.next()
            assert info is not None
            if info.isreg():
                data = archive.extractfile(info)
                assert data is not None
                assert reader(info.name.partition("/")[2]) == data.read()
