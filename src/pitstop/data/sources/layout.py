"""What the places of images say: which split they are of, and of which class.

Class folders, ROOT being a folder, an archive or a prefix in a bucket:

    ROOT/train/<class>/...  with  ROOT/val/<class>/...  (or validation/, or test/)
    ROOT/train/<class>/...  or  ROOT/<class>/...        (10% is held out for validation)
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from pitstop.core.errors import InputError
from pitstop.data.sources.base import HELD_OUT, Item, hold_out

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""The file names that count as images, in any case."""

VAL_FOLDERS = ("val", "validation", "test")
"""The names of a validation folder; the first that is there is taken."""

_MISNAMED = ("training", "valid", "testing", *VAL_FOLDERS)

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}

T = TypeVar("T")


class Listing(Protocol):
    """A tree of files. Folders are named relative to its root, '/'-separated; "" is the root."""

    @property
    def root(self) -> str:
        """What the user calls it."""
        ...

    def entries(self, folder: str) -> tuple[list[str], list[str]]:
        """Returns the names of the folders and of the images in a folder, sorted, none hidden."""
        ...

    def images(self, folder: str) -> list[str]:
        """Returns the paths of the images at any depth in a folder, sorted."""
        ...


class PathListing:
    """The tree that a list of paths describes, in any order; hidden ones are left out."""

    def __init__(self, root: str, paths: Iterable[str]) -> None:
        self.root = root
        self._folders: defaultdict[str, set[str]] = defaultdict(set)
        self._images: defaultdict[str, list[str]] = defaultdict(list)
        for path in paths:
            if not is_hidden(path):
                self._add(path)

    def entries(self, folder: str) -> tuple[list[str], list[str]]:
        return sorted(self._folders.get(folder, ())), sorted(self._images.get(folder, ()))

    def images(self, folder: str) -> list[str]:
        found: list[str] = []
        pending = [folder]
        while pending:
            here = pending.pop()
            found += [join(here, name) for name in self._images.get(here, ())]
            pending += [join(here, name) for name in self._folders.get(here, ())]
        return sorted(found)

    def _add(self, path: str) -> None:
        folder, _, name = path.rpartition("/")
        if is_image(name):
            self._images[folder].append(name)
        while folder:
            parent, _, name = folder.rpartition("/")
            if name in self._folders[parent]:
                break
            self._folders[parent].add(name)
            folder = parent


@dataclass(frozen=True)
class Layout:
    """Labelled items of both splits, each in the order of names."""

    classes: tuple[str, ...]
    train: list[Item]
    val: list[Item]
    notes: tuple[str, ...]


def class_folders(listing: Listing) -> Layout:
    """Returns the images of class folders (see the top of this file).

    Hidden files and files of other extensions are ignored; folders inside a class are allowed.

    Raises:
        InputError: there is no class folder, or an empty, single or unknown class.
    """
    root = listing.root
    train_folder, val_folder = _split_folders(listing)
    train_images, notes = _class_images(listing, train_folder)
    classes = tuple(train_images)
    check_classes(root, classes)
    items = _items(train_images, classes)
    if val_folder is None:
        return _held_out(root, classes, items, "no val/, validation/ or test/", notes)
    val_images, more_notes = _class_images(listing, val_folder)
    _check_subset(root, val_folder, val_images, train_folder, classes)
    return Layout(classes, items, _items(val_images, classes), notes + more_notes)


def tabular(
    origin: str,
    train: Mapping[str, int | str],
    val: Mapping[str, int | str],
    declared: Sequence[str] | None = None,
) -> Layout:
    """Returns images whose labels are written down, by name; without `val`, some are held out.

    Args:
        declared: the classes' names, which the labels index; otherwise the labels name them, in
            the order of numbers if all are numbers, else in that of names.

    Raises:
        InputError: a label of `val` or an index of `declared` is unknown; or too few classes.
    """
    labels = {label for split in (train, val) for label in split.values()}
    if declared is None:
        known = set(train.values())
        numbers = all(isinstance(label, int) for label in labels)
        order = sorted(known) if numbers else sorted(map(str, known))
        classes, index = tuple(map(str, order)), {str(label): n for n, label in enumerate(order)}
    else:
        classes, index = tuple(declared), {str(number): number for number in range(len(declared))}
    check_classes(origin, classes)
    unknown = min((str(label) for label in labels if str(label) not in index), default=None)
    if unknown is not None:
        known_as = "is not of the declared classes" if declared else "has no training image"
        raise InputError(f"{origin}: label {unknown!r} {known_as}: remove or correct its images")
    train_items, val_items = (
        sorted(Item(name, index[str(label)]) for name, label in split.items())
        for split in (train, val)
    )
    if val_items:
        return Layout(classes, train_items, val_items, ())
    return _held_out(origin, classes, train_items, "no validation split", ())


def check_classes(origin: str, classes: Sequence[str]) -> None:
    """Raises InputError if there are fewer than two classes."""
    if len(classes) < 2:
        found = f"one class ({classes[0]})" if classes else "no labelled images"
        raise InputError(f"{origin} has {found}: a classifier needs at least two")


def split_of(path: str) -> str | None:
    """Returns "train", "val" or "test", whichever word is last in a path, or None."""
    words = re.findall("[a-z]+", path.lower())
    return next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), None)


class Splits(NamedTuple):
    """Files by the split that their names tell."""

    train: list[str]
    val: list[str]
    ignored: list[str]


def files_by_split(origin: str, files: Iterable[str]) -> Splits:
    """Sorts out files by the words in their paths: train, val or validation, else test.

    Those without such a word are for training, unless others say that they are. So is one alone.

    Raises:
        InputError: none is for training.
    """
    found: defaultdict[str | None, list[str]] = defaultdict(list)
    names = sorted(files)
    for file in names:
        found[split_of(file) if len(names) > 1 else "train"].append(file)
    train = found["train"] or found[None]
    if not train:
        raise InputError(f"{origin} has no training files: name them train-*")
    val = found["val"] or found["test"]
    taken = {*train, *val}
    return Splits(train, val, [file for file in names if file not in taken])


def is_image(name: str) -> bool:
    """Says whether a file name is that of an image."""
    return name.lower().endswith(EXTENSIONS)


def is_hidden(path: str) -> bool:
    """Says whether a file or a folder that it lies in begins with a dot."""
    return path.startswith(".") or "/." in path


def join(folder: str, name: str) -> str:
    """Returns the path of what is called `name` in a folder; "" is the root."""
    return f"{folder}/{name}" if folder else name


def _split_folders(listing: Listing) -> tuple[str, str | None]:
    """Returns the folder of the training classes and that of the validation."""
    folders = {name.lower(): name for name in listing.entries("")[0]}
    val = next((folders[name] for name in VAL_FOLDERS if name in folders), None)
    if "train" in folders:
        return folders["train"], val
    misnamed = next((folders[name] for name in _MISNAMED if name in folders), None)
    if misnamed is not None:
        root = listing.root
        raise InputError(
            f"{root} has {misnamed}/ but no train/: put the training images into "
            f"{root}/train/<class>/ and those for validation into {root}/val/<class>/"
        )
    return "", None


def _class_images(listing: Listing, folder: str) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Returns the images of each class in a folder, and a note if some lie beside them."""
    classes, beside = listing.entries(folder)
    place = join(listing.root, folder) if folder else listing.root
    if not classes:
        found = f"{len(beside):,} images but no class folders" if beside else "no class folders"
        raise InputError(f"{place} has {found}: put each class's images into {place}/<class>/")
    images = {name: listing.images(join(folder, name)) for name in classes}
    empty = next((name for name, found in images.items() if not found), None)
    if empty is not None:
        accepted = " ".join(extension[1:] for extension in EXTENSIONS)
        raise InputError(f"{place}/{empty} has no images ({accepted}): add some or remove it")
    note = f"{place}: ignored {len(beside):,} images beside the class folders"
    return images, (note,) if beside else ()


def _items(images: Mapping[str, Iterable[str]], classes: Sequence[str]) -> list[Item]:
    labels = {name: label for label, name in enumerate(classes)}
    return sorted(Item(path, labels[name]) for name, paths in images.items() for path in paths)


def _check_subset(
    root: str, val: str, val_classes: Iterable[str], train: str, classes: Sequence[str]
) -> None:
    unknown = sorted(set(val_classes) - set(classes))
    if unknown:
        place, counterpart = (join(join(root, folder), unknown[0]) for folder in (val, train))
        raise InputError(f"{place} has no counterpart {counterpart}: add or remove a folder")


def _held_out(
    origin: str,
    classes: tuple[str, ...],
    items: Sequence[Item],
    lack: str,
    notes: tuple[str, ...],
) -> Layout:
    train, val = hold_out(items, HELD_OUT)
    if not val:
        raise InputError(f"{origin} has one image a class, too few to hold any out: add images")
    note = (
        f"{origin} has {lack}: held out {len(val):,} of {len(items):,} images "
        f"({HELD_OUT:.0%} of each class, always the same)"
    )
    return Layout(classes, train, val, (*notes, note))
