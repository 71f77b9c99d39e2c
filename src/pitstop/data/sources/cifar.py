"""CIFAR-10 and CIFAR-100 as they are distributed, in the binary and in the Python version.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
https://www.cs.toronto.edu/~kriz/cifar.html.

An image is 3,072 bytes: 32 x 32 red ones, as many green ones, as many blue ones. It becomes a PNG.
"""

import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from pitstop.core.errors import InputError
from pitstop.data.sources.archive import Member, list_members
from pitstop.data.sources.base import Item, Reader, Source
from pitstop.data.sources.folder import stamp
from pitstop.data.sources.spans import read_at
from pitstop.io.storage import atomic_write

_SIDE = 32
_BYTES = 3 * _SIDE**2


class _Version(NamedTuple):
    """The files of a distribution."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    names: str
    """Has the names of the classes, a line each or in a pickle."""
    names_key: str
    """Where they are in the pickle."""
    labels: str
    """Where the labels are in the other pickles."""
    label_bytes: int
    """Before each image where there are no pickles; the last one counts."""


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_BATCHES_BIN = tuple(f"{name}.bin" for name in _BATCHES)

_VERSIONS = (
    _Version(_BATCHES, ("test_batch",), "batches.meta", "label_names", "labels", 0),
    _Version(_BATCHES_BIN, ("test_batch.bin",), "batches.meta.txt", "", "", 1),
    _Version(("train",), ("test",), "meta", "fine_label_names", "fine_labels", 0),
    _Version(("train.bin",), ("test.bin",), "fine_label_names.txt", "", "", 2),
)


_WANTED = frozenset(
    name for version in _VERSIONS for name in (*version.train, *version.val, version.names)
)

_MOST_BYTES = 2**28
"""Of a file of it; the largest, train of CIFAR-100, has 155 MB."""


class _Batch(NamedTuple):
    pixels: np.ndarray
    """uint8 [N, 3072]."""
    labels: list[int]


def is_cifar(names: Iterable[str]) -> bool:
    """Says whether files of these names, which may have folders, are a distribution of CIFAR."""
    return _version({name.rpartition("/")[2] for name in names}) is not None


def cifar_source(path: Path) -> Source:
    """Returns the images of a distribution: an archive, or the folder that it unpacks to.

    Classes are those of the distribution, in its order; of CIFAR-100 the 100 fine ones.

    Raises:
        InputError: it is damaged, or a pickle in it holds something else.
    """
    files, version = _read_files(path)
    classes = _class_names(path, files, version)
    train, val = (
        _items(path, split, [_batch(path, name, files[name], version) for name in names], classes)
        for split, names in (("train", version.train), ("val", version.val))
    )
    parts = [""] if path.is_file() else sorted(files)
    key = stamp(path, parts)
    return Source(str(path), classes, train, val, key, (), partial(_open, path, key))


def _version(names: set[str]) -> _Version | None:
    return next((v for v in _VERSIONS if {*v.train, *v.val, v.names} <= names), None)


def _read_files(path: Path) -> tuple[dict[str, bytes], _Version]:
    files = _folder_files(path) if path.is_dir() else _archive_files(path)
    version = _version(set(files))
    if version is None:
        raise InputError(f"{path} has not all files of CIFAR: download it again")
    return files, version


def _folder_files(path: Path) -> dict[str, bytes]:
    return {e.name: e.read_bytes() for e in path.iterdir() if e.name in _WANTED and e.is_file()}


def _archive_files(path: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}

    def keep(member: Member, file: IO[bytes]) -> None:
        name = member.name.rpartition("/")[2]
        if name not in _WANTED:
            return
        if member.size > _MOST_BYTES:
            raise _damaged(path, name)
        file.seek(member.offset)
        files[name] = file.read(member.size)

    list_members(path, keep)
    return files


def _class_names(path: Path, files: dict[str, bytes], version: _Version) -> tuple[str, ...]:
    data = files[version.names]
    if version.names_key:
        names = _unpickled(path, version.names, data).get(version.names_key)
    else:
        names = data.decode(errors="replace").split()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _damaged(path, version.names)
    return tuple(names)


def _items(path: Path, split: str, batches: Sequence[_Batch], classes: Sequence[str]) -> list[Item]:
    labels = [label for batch in batches for label in batch.labels]
    if not all(isinstance(label, int) and 0 <= label < len(classes) for label in labels):
        raise _damaged(path, f"a label of {split}")
    return [Item(f"{split}/{row:05}.png", label) for row, label in enumerate(labels)]


def _batch(path: Path, name: str, data: bytes, version: _Version) -> _Batch:
    if not version.names_key:
        return _binary_batch(path, name, data, version.label_bytes)
    content = _unpickled(path, name, data)
    array, labels = content.get("data"), content.get(version.labels)
    if (
        not isinstance(array, _Array)
        or not isinstance(labels, list)
        or array.values.shape != (len(labels), _BYTES)
    ):
        raise _damaged(path, name)
    return _Batch(array.values, labels)


def _binary_batch(path: Path, name: str, data: bytes, label_bytes: int) -> _Batch:
    if not data or len(data) % (label_bytes + _BYTES):
        raise _damaged(path, name)
    rows = np.frombuffer(data, np.uint8).reshape(-1, label_bytes + _BYTES)
    return _Batch(rows[:, label_bytes:], rows[:, label_bytes - 1].tolist())


def _damaged(path: Path, name: str) -> InputError:
    return InputError(f"{path}: {name} is damaged: download it again")


# Pickles: a program that builds objects. Of its calls only those of arrays of bytes are known, and
# what stands for them here keeps bytes only: NumPy's own would take any shape, type and state.
# Each has a __setstate__, without which a pickle may set any attribute of it.


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known


class _Array:
    """Stands for `_reconstruct`, which makes an array that its state fills."""

    values = np.empty(0, np.uint8)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[object, Any, object, object, object]) -> None:
        """Takes (version, shape, dtype, whether in Fortran's order, bytes)."""
        _, shape, dtype, fortran, data = state
        raw = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(dtype, _Uint8) or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("it has an array of other than bytes")
        self.values = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Uint8:
    """Stands for `dtype`. Its state is the order of bytes, of which a value has one."""

    def __init__(self, code: str, *_: object) -> None:
        if code not in ("u1", "|u1", b"u1"):
            raise pickle.UnpicklingError(f"it has an array of {code}")

    def __setstate__(self, state: object) -> None:
        pass


class _Latin1:
    """Stands for `encode`: how Python 3 writes bytes into a pickle for Python 2."""

    def __new__(cls, text: str, encoding: str) -> bytes:
        return text.encode("latin1")

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it has bytes with a state")


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _Uint8,
    ("_codecs", "encode"): _Latin1,
}


def _unpickled(path: Path, name: str, data: bytes) -> dict[str, Any]:
    try:
        content = _Unpickler(BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: the pickle {name} is not one of CIFAR ({reason}): download it again"
        ) from None
    if not isinstance(content, dict):
        raise _damaged(path, name)
    return content


# The images.


@dataclass(frozen=True)
class _Pixels:
    """Reads images by "SPLIT/ROW.png"."""

    files: dict[str, Path]
    """Of the pixels of each split."""

    def __call__(self, name: str) -> bytes:
        """Uncompressed, so that the bytes do not depend on the version of zlib."""
        split, _, row = name.partition("/")
        data = read_at(self.files[split], int(row.removesuffix(".png")) * _BYTES, _BYTES)
        pixels = np.frombuffer(data, np.uint8).reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)
        out = BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(out, "PNG", compress_level=0)
        return out.getvalue()


def _open(path: Path, key: str, folder: Path) -> Reader:
    targets = {split: folder / f"{key[:16]}-{split}.pixels" for split in ("train", "val")}
    if not all(target.exists() for target in targets.values()):
        files, version = _read_files(path)
        for split, names in (("train", version.train), ("val", version.val)):
            with atomic_write(targets[split]) as out:
                for name in names:
                    out.write(_batch(path, name, files[name], version).pixels.tobytes())
    return _Pixels(targets)
