"""A folder of classes.

The layouts that are understood, ROOT being what the user names:

    ROOT/train/<class>/...  with  ROOT/val/<class>/...  (or validation/, or test/)
    ROOT/train/<class>/...  or  ROOT/<class>/...        (10% is held out for validation)
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from pitstop.core.errors import InputError
from pitstop.data.sources.base import HELD_OUT, Item, Source, constant_reader, hold_out

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""The file names that count as images, in any case."""

VAL_FOLDERS = ("val", "validation", "test")
"""The names of a validation folder; the first that is there is taken."""

_MISNAMED = ("training", "valid", "testing", *VAL_FOLDERS)


class _File(NamedTuple):
    """A file's path relative to the root, with what tells whether it was edited."""

    name: str
    size: int
    mtime_ns: int


def folder_source(root: Path) -> Source:
    """Returns the images of a class folder (layouts above).

    Hidden files and files of other extensions are ignored; folders inside a class are allowed.

    Raises:
        InputError: `root` is missing, no class folder, or has an empty, single or unknown class.
    """
    if not root.is_dir():
        raise InputError(f"{root} is {'a file' if root.exists() else 'missing'}: name a folder")
    train_folder, val_folder = _split_folders(root)
    train_files, notes = _class_files(root, train_folder)
    classes = tuple(train_files)
    if len(classes) == 1:
        raise InputError(f"{root} has one class ({classes[0]}): a classifier needs at least two")
    if val_folder is None:
        val_files = {}
        train, val = hold_out(_items(train_files, classes), HELD_OUT)
        notes += _held_out_note(root, val, train)
    else:
        val_files, more_notes = _class_files(root, val_folder)
        notes += more_notes
        _check_subset(root, val_folder, val_files, train_folder, classes)
        train, val = _items(train_files, classes), _items(val_files, classes)
    if not val:
        raise InputError(f"{root} has one image a class, too few to hold any out: add images")
    key = _key(root, (*train_files.values(), *val_files.values()))
    return Source(str(root), classes, train, val, key, notes, constant_reader(partial(_read, root)))


def _split_folders(root: Path) -> tuple[str, str | None]:
    """Returns, relative to root, the folder of the training classes and that of the validation."""
    folders = {name.lower(): name for name in _listing(root, "")[0]}
    val = next((folders[name] for name in VAL_FOLDERS if name in folders), None)
    if "train" in folders:
        return folders["train"], val
    misnamed = next((folders[name] for name in _MISNAMED if name in folders), None)
    if misnamed is not None:
        raise InputError(
            f"{root} has {misnamed}/ but no train/: put the training images into "
            f"{root}/train/<class>/ and those for validation into {root}/val/<class>/"
        )
    return "", None


def _class_files(root: Path, folder: str) -> tuple[dict[str, list[_File]], tuple[str, ...]]:
    """Returns the image files of each class in a folder, and a note if some lie beside them."""
    classes, beside = _listing(root, folder)
    place = root / folder
    if not classes:
        found = f"{len(beside):,} images but no class folders" if beside else "no class folders"
        raise InputError(f"{place} has {found}: put each class's images into {place}/<class>/")
    files = {name: _image_files(root, _join(folder, name)) for name in classes}
    empty = next((name for name, found in files.items() if not found), None)
    if empty is not None:
        accepted = " ".join(extension[1:] for extension in EXTENSIONS)
        raise InputError(f"{place / empty} has no images ({accepted}): add some or remove it")
    note = f"{place}: ignored {len(beside):,} images beside the class folders"
    return files, (note,) if beside else ()


def _image_files(root: Path, folder: str) -> list[_File]:
    """Returns the images at any depth in a folder, by name; each real folder is entered once."""
    found: list[_File] = []
    entered: set[tuple[int, int]] = set()
    pending = [folder]
    while pending:
        here = pending.pop()
        status = (root / here).stat()
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        folders, images = _listing(root, here)
        pending += [_join(here, name) for name in reversed(folders)]
        found += [_file(root, _join(here, name)) for name in images]
    return sorted(found)


def _file(root: Path, name: str) -> _File:
    try:
        status = (root / name).stat()
    except OSError:  # a dangling link: reading it fails when packing, which reports it by name
        return _File(name, -1, -1)
    return _File(name, status.st_size, status.st_mtime_ns)


def _listing(root: Path, folder: str) -> tuple[list[str], list[str]]:
    """Returns the names of the folders and of the images in a folder, sorted."""
    try:
        with os.scandir(root / folder) as entries:
            shown = [(e.name, _is_dir(e)) for e in entries if not e.name.startswith(".")]
    except OSError as error:
        reason = f"cannot be listed ({error.strerror})"
        raise InputError(f"{root / folder} {reason}: check its permissions") from error
    folders = [name for name, is_folder in shown if is_folder]
    images = [name for name, is_folder in shown if not is_folder and _is_image(name)]
    return sorted(folders), sorted(images)


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _items(files: Mapping[str, Iterable[_File]], classes: Sequence[str]) -> list[Item]:
    labels = {name: label for label, name in enumerate(classes)}
    return sorted(Item(file.name, labels[name]) for name, found in files.items() for file in found)


def _check_subset(
    root: Path, val: str, val_classes: Iterable[str], train: str, classes: Sequence[str]
) -> None:
    unknown = sorted(set(val_classes) - set(classes))
    if unknown:
        place, counterpart = root / val / unknown[0], root / train / unknown[0]
        raise InputError(f"{place} has no counterpart {counterpart}: add or remove a folder")


def _held_out_note(root: Path, held: Sequence[Item], kept: Sequence[Item]) -> tuple[str, ...]:
    return (
        f"{root} has no val/, validation/ or test/: held out {len(held):,} of "
        f"{len(held) + len(kept):,} images ({HELD_OUT:.0%} of each class, always the same)",
    )


def _key(root: Path, classes: Iterable[Iterable[_File]]) -> str:
    """The root is part of it: archives unpacked with fixed times may list alike and differ."""
    digest = blake2b(os.fsencode(root.resolve()), digest_size=32)
    for files in classes:
        for name, size, mtime_ns in files:
            digest.update(b"\0%b\0%d\0%d" % (os.fsencode(name), size, mtime_ns))
    return digest.hexdigest()


def _read(root: Path, name: str) -> bytes:
    return (root / name).read_bytes()
