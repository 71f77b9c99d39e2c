"""Images, and archives of them, that the tests of sources share."""

import io
import multiprocessing
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pitstop.data.pack import pack
from pitstop.data.packed import PackedDataset
from pitstop.data.sources.base import Source

Files = Mapping[str, bytes]


def write_tar(path: Path, files: Files, mode: str = "w") -> Path:
    """Writes a tar file in the order of `files`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def tar_bytes(files: Files) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def read_in_spawned(source: Source, folder: Path) -> dict[str, bytes]:
    """Returns all images as another process reads them, which gets the reader pickled."""
    reader = source.open(folder)
    names = [item.name for item in (*source.train, *source.val)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return dict(zip(names, pool.map(reader, names), strict=True))


def read_all(source: Source, folder: Path) -> dict[str, bytes]:
    reader = source.open(folder)
    return {item.name: reader(item.name) for item in (*source.train, *source.val)}


def packed_rows(source: Source, out: Path) -> dict[str, tuple[str, bytes]]:
    """Packs a source; returns class and stored bytes by name."""
    pack(source, out, workers=1)
    dataset = PackedDataset.open(out)
    return {
        split.name(row): (dataset.classes[int(split.labels[row])], bytes(split.read(row)))
        for split in (dataset.train, dataset.val)
        for row in range(len(split))
    }


@pytest.fixture
def images(photo, encode) -> Callable[..., bytes]:
    """Returns a small JPEG, another one for each number."""

    def image(number: int, side: int = 24) -> bytes:
        return encode(photo(side, side + 8, number), "JPEG", quality=90)

    return image


@pytest.fixture
def tree(images) -> dict[str, bytes]:
    """Class folders with validation: cat and dog, 3 + 2 of each."""
    counts = {"train": 3, "val": 2}
    names = [
        f"{split}/{kind}/{number}.jpg"
        for split, count in counts.items()
        for kind in ("cat", "dog")
        for number in range(count)
    ]
    return {name: images(number) for number, name in enumerate(names)}
