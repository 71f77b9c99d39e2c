import pickle
import subprocess
import tarfile
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from pitstop.core.errors import InputError
from pitstop.data.resolve import resolve
from pitstop.data.sources.base import Source

from .conftest import packed_rows, read_all, read_in_spawned, write_tar

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def pixels(seed: int, count: int = 10) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


LABELS = list(range(10))


def python_pickle(content: object) -> bytes:
    return pickle.dumps(content, protocol=2)


def ten_python() -> dict[str, bytes]:
    files = {
        f"cifar-10-batches-py/{name}": python_pickle(
            {"batch_label": name, "labels": LABELS, "data": pixels(seed), "filenames": ["x"] * 10}
        )
        for seed, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"])
    }
    meta = {"num_cases_per_batch": 10, "label_names": TEN, "num_vis": 3072}
    return {
        "cifar-10-batches-py/batches.meta": python_pickle(meta),
        "cifar-10-batches-py/readme.html": b"<p>",
        **files,
    }


def ten_binary() -> dict[str, bytes]:
    labels = np.array(LABELS, np.uint8)[:, None]
    files = {
        f"cifar-10-batches-bin/{name}.bin": np.hstack([labels, pixels(seed)]).tobytes()
        for seed, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"])
    }
    return {"cifar-10-batches-bin/batches.meta.txt": "\n".join([*TEN, "", ""]).encode(), **files}


FINE = [f"fine{n:02}" for n in range(100)]


def hundred_python() -> dict[str, bytes]:
    fine, coarse = list(range(100)), [n // 5 for n in range(100)]
    files = {
        f"cifar-100-python/{name}": python_pickle(
            {"fine_labels": fine, "coarse_labels": coarse, "data": pixels(seed, 100)}
        )
        for seed, name in enumerate(["train", "test"])
    }
    names = {"fine_label_names": FINE, "coarse_label_names": [f"coarse{n}" for n in range(20)]}
    return {"cifar-100-python/meta": python_pickle(names), **files}


def hundred_binary() -> dict[str, bytes]:
    labels = np.array([[n // 5, n] for n in range(100)], np.uint8)
    files = {
        f"cifar-100-binary/{name}.bin": np.hstack([labels, pixels(seed, 100)]).tobytes()
        for seed, name in enumerate(["train", "test"])
    }
    return {"cifar-100-binary/fine_label_names.txt": "\n".join(FINE).encode(), **files}


def rgb(data: bytes) -> np.ndarray:
    image = Image.open(BytesIO(data))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
    return np.asarray(image)


@pytest.mark.parametrize("files", [ten_python, ten_binary])
def test_cifar10(tmp_path, files):
    source = resolve(str(write_tar(tmp_path / "x.tar.gz", files(), "w:gz")))
    assert isinstance(source, Source)
    assert source.classes == tuple(TEN)
    assert (len(source.train), len(source.val), source.notes) == (50, 10, ())
    rows = packed_rows(source, tmp_path / "packed")
    for number in (0, 17, 49):
        name, data = rows[f"train/{number:05}.png"]
        assert name == TEN[number % 10]
        expected = pixels(number // 10)[number % 10].reshape(3, 32, 32).transpose(1, 2, 0)
        assert (rgb(data) == expected).all()
    assert (rgb(rows["val/00003.png"][1])[0, :, 2] == pixels(5)[3][2048:2080]).all()
    assert read_in_spawned(source, tmp_path / "spool") == {n: data for n, (_, data) in rows.items()}


@pytest.mark.parametrize("files", [hundred_python, hundred_binary])
def test_cifar100_has_the_fine_classes(tmp_path, files):
    source = resolve(str(write_tar(tmp_path / "x.tar.gz", files(), "w:gz")))
    assert isinstance(source, Source)
    assert source.classes == tuple(FINE)
    assert [item.label for item in source.val] == list(range(100))
    read = read_all(source, tmp_path / "spool")
    assert (rgb(read["train/00042.png"])[..., 0].ravel() == pixels(0, 100)[42][:1024]).all()


def test_both_versions_are_the_same_and_so_is_the_folder(tmp_path):
    paths = [
        write_tar(tmp_path / "py.tgz", ten_python(), "w:gz"),
        write_tar(tmp_path / "bin.tar", ten_binary()),
        tmp_path / "cifar-10-batches-py",
    ]
    subprocess.run(["tar", "-xzf", paths[0], "-C", tmp_path], check=True)
    sources = [resolve(str(path)) for path in paths]
    first, *others = (read_all(source, tmp_path / source.key) for source in sources)
    assert all(other == first for other in others)
    assert len({tuple(source.train) for source in sources}) == 1


def test_what_is_unpacked_already_is_not_done_again(tmp_path):
    source = resolve(str(write_tar(tmp_path / "x.tgz", ten_python(), "w:gz")))
    assert isinstance(source, Source)
    once = read_all(source, tmp_path / "spool")
    left = {file: file.stat().st_ino for file in (tmp_path / "spool").iterdir()}
    assert read_all(source, tmp_path / "spool") == once
    assert {file: file.stat().st_ino for file in (tmp_path / "spool").iterdir()} == left


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("evil", "named"),
    [
        (lambda mark: Evil(eval, f"open({mark!r}, 'w')"), "__builtin__.eval"),
        (
            lambda mark: Evil(subprocess.call, ["touch", mark]),
            "commands.call",
        ),  # as Python 2 knew it
        (lambda mark: Evil(getattr, np.ndarray, "dump"), "__builtin__.getattr"),
        (lambda mark: Evil(np.load, mark), "numpy.load"),
        (lambda mark: np.array([object()], dtype=object), "an array of O8"),
        (lambda mark: np.zeros(3), "an array of f8"),
        (lambda mark: Evil(np.ndarray, (2**40,)), "not callable"),
        (lambda mark: np.array(["a"]), "an array of U1"),
    ],
)
def test_a_hostile_pickle_is_refused_by_name(tmp_path, evil, named):
    mark = tmp_path / "mark"
    for victim in ("data_batch_2", "batches.meta"):
        files = ten_python()
        content = {"data": evil(str(mark)), "labels": LABELS, "label_names": TEN}
        files[f"cifar-10-batches-py/{victim}"] = python_pickle(content)
        path = write_tar(tmp_path / "x.tgz", files, "w:gz")
        with pytest.raises(InputError) as error:
            resolve(str(path))
        assert named in str(error.value)
        assert f"the pickle {victim} is not one of CIFAR" in str(error.value)
        assert "\n" not in str(error.value)
    assert not mark.exists()


def test_a_pickle_cannot_change_the_types_of_numpy(tmp_path):
    """dtype("u1") is one object for all; a state given to it is that of every array of bytes."""
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    state = b"(K\x03U\x01|NU\x01xNM\xff\x7fJ\xff\xff\xff\xffK\x00tb"
    files = ten_python()
    files["cifar-10-batches-py/data_batch_3"] = b"\x80\x02}U\x04data" + dtype + state + b"s."
    with pytest.raises(InputError, match="data_batch_3 is damaged"):
        resolve(str(write_tar(tmp_path / "x.tar", files)))
    assert (np.dtype("u1").itemsize, np.dtype("u1").names) == (1, None)


@pytest.mark.parametrize("called", ["numpy\ndtype", "_codecs\nencode", "numpy\nndarray"])
def test_a_pickle_cannot_set_attributes(tmp_path, called):
    """A state of (None, {name: value}) sets attributes of what does not refuse it."""
    files = ten_python()
    state = b"(N}U\x03newK\x01stb"
    evil = b"\x80\x02}U\x04datac" + called.encode() + b"\n" + state + b"s."
    files["cifar-10-batches-py/data_batch_3"] = evil
    with pytest.raises(InputError, match="the pickle data_batch_3 is not one of CIFAR"):
        resolve(str(write_tar(tmp_path / "x.tar", files)))
    resolve(str(write_tar(tmp_path / "y.tar", ten_python())))


def test_an_array_in_the_order_of_fortran(tmp_path):
    files = ten_python()
    content = {"data": np.asfortranarray(pixels(0)), "labels": LABELS}
    files["cifar-10-batches-py/data_batch_1"] = python_pickle(content)
    sources = [
        resolve(str(write_tar(tmp_path / name, content)))
        for name, content in (("f.tar", files), ("c.tar", ten_python()))
    ]
    first, second = (read_all(source, tmp_path / source.key) for source in sources)
    assert first == second


def test_what_is_too_large_for_cifar_is_not_read(tmp_path):
    """A sparse file: 1 GiB of nothing where 30 MB are expected."""
    path = write_tar(tmp_path / "x.tar", {**ten_python(), "one-block": b"x"})
    big = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    big.size = 2**30
    with path.open("r+b") as file:
        with tarfile.open(path) as archive:
            end = archive.getmembers()[-1].offset_data + 512
        file.seek(end)
        file.write(big.tobuf())
        file.truncate(end + 512 + big.size + 1024)
    with pytest.raises(InputError, match="data_batch_1 is damaged"):
        resolve(str(path))


@pytest.mark.parametrize(
    "content",
    [
        {"data": pixels(0, 9), "labels": LABELS},
        {"data": pixels(0), "labels": [10] * 10},
        {"data": pixels(0), "labels": ["a"] * 10},
        {"labels": LABELS},
        {"data": b"x", "labels": LABELS},
        [1],
    ],
)
def test_damaged_content_is_refused(tmp_path, content):
    files = ten_python()
    files["cifar-10-batches-py/data_batch_3"] = python_pickle(content)
    with pytest.raises(InputError, match="is damaged: download it again"):
        resolve(str(write_tar(tmp_path / "x.tar", files)))


def test_damaged_binaries_and_archives_are_refused(tmp_path):
    files = ten_binary()
    files["cifar-10-batches-bin/test_batch.bin"] += b"x"
    with pytest.raises(InputError, match=r"test_batch\.bin is damaged"):
        resolve(str(write_tar(tmp_path / "x.tar", files)))
    whole = write_tar(tmp_path / "x.tgz", ten_python(), "w:gz").read_bytes()
    (tmp_path / "x.tgz").write_bytes(whole[:-2000])
    with pytest.raises(InputError, match="damaged, cut off"):
        resolve(str(tmp_path / "x.tgz"))


def test_pickles_as_python_2_wrote_them(tmp_path):
    """The distribution's are of Python 2: byte strings for keys, names and the array's state."""
    raw = pixels(0, 1)
    python2 = b"".join(
        [
            b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n",
            b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01M\x00\x0c\x86",
            b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff",
            b"J\xff\xff\xff\xffK\x00tb\x89T" + (3072).to_bytes(4, "little") + raw.tobytes() + b"tb",
            b"U\x06labels]K\x03au.",
        ]
    )
    assert (pickle.loads(python2, encoding="latin1")["data"] == raw).all()
    files = ten_python()
    for number in range(1, 6):
        files[f"cifar-10-batches-py/data_batch_{number}"] = python2
    source = resolve(str(write_tar(tmp_path / "x.tar", files)))
    assert isinstance(source, Source)
    assert [item.label for item in source.train] == [3] * 5
    assert (
        rgb(read_all(source, tmp_path)["train/00004.png"])[..., 1].ravel() == raw[0, 1024:2048]
    ).all()
