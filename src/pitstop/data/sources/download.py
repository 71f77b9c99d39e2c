"""Datasets that torchvision knows where to download, and whose checksums it knows.

CIFAR's archives are read as they are (`cifar`). The others are downloaded and unpacked by
torchvision; its dataset object then says which file has which label, and no image is decoded.
"""

import contextlib
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pitstop.core.errors import InputError
from pitstop.core.strict import did_you_mean
from pitstop.data.sources.base import Source, constant_reader
from pitstop.data.sources.cifar import cifar_source
from pitstop.data.sources.folder import read_file, stamp
from pitstop.data.sources.layout import tabular
from pitstop.io.storage import locked


@dataclass(frozen=True)
class _Known:
    """How torchvision calls a dataset."""

    name: str
    options: tuple[dict[str, Any], ...]
    """Of the training and of the validation split; of the first only, if it has no splits."""
    labelled: tuple[str, ...]
    """The attributes with the files and the labels, or with pairs of these."""
    needs: str | None = None
    """A package that it cannot do without."""


_FILES = ("_image_files", "_labels")
_SAMPLES = ("_samples",)
_TRAIN_VAL = ({"split": "train"}, {"split": "val"})
_TRAIN_TEST = ({"split": "train"}, {"split": "test"})

_CIFAR = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}

_KNOWN = {
    "dtd": _Known("DTD", _TRAIN_VAL, _FILES),
    "eurosat": _Known("EuroSAT", ({},), ("samples",)),
    "flowers102": _Known("Flowers102", _TRAIN_VAL, _FILES, needs="scipy"),
    "food101": _Known("Food101", _TRAIN_TEST, _FILES),
    "imagenette": _Known("Imagenette", _TRAIN_VAL, _SAMPLES),
    "imagenette-160": _Known(
        "Imagenette", tuple({**split, "size": "160px"} for split in _TRAIN_VAL), _SAMPLES
    ),
    "imagenette-320": _Known(
        "Imagenette", tuple({**split, "size": "320px"} for split in _TRAIN_VAL), _SAMPLES
    ),
    "pets": _Known(
        "OxfordIIITPet", ({"split": "trainval"}, {"split": "test"}), ("_images", "_labels")
    ),
}

DATASETS = tuple(sorted({*_CIFAR, *_KNOWN}))
"""What can be downloaded."""

_ARCHIVES = (".tgz", ".tar.gz", ".zip", ".mat")
"""What an interrupted download leaves that is of use: torchvision checks these by their MD5."""


def downloaded(name: str, root: Path) -> Source:
    """Returns the images of a dataset by name, downloaded into `root` if they are not there.

    A download that was interrupted is not taken for whole; archives that are whole are kept.

    Raises:
        InputError: the name is unknown, the download fails, or a package is missing.
    """
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS) or f": known are {', '.join(DATASETS)}"
        raise InputError(f"there is no dataset {name!r} to get{hint}")
    known = _KNOWN.get(name)
    if known is not None and known.needs is not None and find_spec(known.needs) is None:
        raise InputError(f"{name} comes with labels that {known.needs} reads: pip install scipy")
    busy = f"another process is downloading {name} into {root}: wait for it"
    with locked(root / f".{name}.lock", busy), contextlib.redirect_stdout(sys.stderr):
        return _cifar(name, root) if known is None else _torchvision(name, known, root)


def _cifar(name: str, root: Path) -> Source:
    from torchvision import datasets

    kind = getattr(datasets, _CIFAR[name])
    with _explained(name):
        datasets.utils.download_url(kind.url, str(root), kind.filename, kind.tgz_md5)
    return cifar_source(root / kind.filename)


def _torchvision(name: str, known: _Known, root: Path) -> Source:
    from torchvision import datasets

    kind = getattr(datasets, known.name)
    place = root / name
    if not place.exists():
        partial_place = root / f".{name}.partial"
        _keep_archives(partial_place)
        with _explained(name):
            for options in known.options:
                kind(str(partial_place), download=True, **options)
        partial_place.rename(place)
    with _explained(name):
        splits = [kind(str(place), **options) for options in known.options]
    return _source(name, known, place, splits)


def _keep_archives(folder: Path) -> None:
    """Removes what an interrupted try has unpacked: its folders would pass for whole."""
    if folder.exists():
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):  # an archive is in it
                    path.rmdir()
            elif not path.name.endswith(_ARCHIVES):
                path.unlink()


def _source(name: str, known: _Known, place: Path, splits: Sequence[Any]) -> Source:
    labelled = [_labelled(split, known, place) for split in splits]
    classes = [given if isinstance(given, str) else given[0] for given in splits[0].classes]
    layout = tabular(name, labelled[0], labelled[1] if len(labelled) > 1 else {}, classes)
    names = sorted(item.name for item in (*layout.train, *layout.val))
    return Source(
        origin=name,
        classes=layout.classes,
        train=layout.train,
        val=layout.val,
        key=stamp(place, names),
        notes=layout.notes,
        open=constant_reader(partial(read_file, place)),
    )


def _labelled(split: Any, known: _Known, place: Path) -> dict[str, int]:
    """Returns labels by the path of the image, relative to `place`."""
    columns = [getattr(split, attribute) for attribute in known.labelled]
    pairs = columns[0] if len(columns) == 1 else zip(*columns, strict=True)
    return {Path(file).relative_to(place).as_posix(): int(label) for file, label in pairs}


@contextlib.contextmanager
def _explained(name: str) -> Generator[None]:
    """Turns what torchvision raises into an InputError."""
    try:
        yield
    except (OSError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{name} was not downloaded ({reason}): check the network and the disk, and try again"
        ) from None
