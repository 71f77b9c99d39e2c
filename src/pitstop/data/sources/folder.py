"""A folder of classes; `layout` has the layouts that are understood."""

import os
from collections.abc import Iterable
from functools import partial
from hashlib import blake2b
from pathlib import Path

from pitstop.core.errors import InputError
from pitstop.data.sources.base import Source, constant_reader
from pitstop.data.sources.layout import class_folders, is_image, join


def folder_source(root: Path) -> Source:
    """Returns the images of a class folder.

    Hidden files and files of other extensions are ignored; folders inside a class are allowed.

    Raises:
        InputError: `root` is missing, no class folder, or has an empty, single or unknown class.
    """
    if not root.is_dir():
        raise InputError(f"{root} is {'a file' if root.exists() else 'missing'}: name a folder")
    found = class_folders(FolderListing(root))
    return Source(
        origin=str(root),
        classes=found.classes,
        train=found.train,
        val=found.val,
        key=stamp(root, sorted(item.name for item in (*found.train, *found.val))),
        notes=found.notes,
        open=constant_reader(partial(read_file, root)),
    )


class FolderListing:
    """The tree below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self._path = root

    def entries(self, folder: str) -> tuple[list[str], list[str]]:
        place = self._path / folder
        try:
            with os.scandir(place) as entries:
                shown = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            reason = f"cannot be listed ({error.strerror})"
            raise InputError(f"{place} {reason}: check its permissions") from error
        folders = [entry.name for entry in shown if _is_dir(entry)]
        images = [entry.name for entry in shown if is_image(entry.name) and _is_file(entry)]
        return sorted(folders), sorted(images)

    def images(self, folder: str) -> list[str]:
        """Each real folder is entered once: links may lead in a circle."""
        found: list[str] = []
        entered: set[tuple[int, int]] = set()
        pending = [folder]
        while pending:
            here = pending.pop()
            status = (self._path / here).stat()
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            folders, images = self.entries(here)
            pending += [join(here, name) for name in reversed(folders)]
            found += [join(here, name) for name in images]
        return sorted(found)


def stamp(root: Path, names: Iterable[str]) -> str:
    """Returns a hex digest that changes when a file below `root` is added, removed or edited.

    The root is part of it: archives unpacked with fixed times may list alike and differ.
    """
    digest = blake2b(os.fsencode(root.resolve()), digest_size=32)
    for name in names:
        size, mtime_ns = _size_and_time(root / name)
        digest.update(b"\0%b\0%d\0%d" % (os.fsencode(name), size, mtime_ns))
    return digest.hexdigest()


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:  # a dangling link: reading it fails when packing, which reports it by name
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Says whether it is a regular file, or a link that leads nowhere (see `_size_and_time`).

    Pipes, sockets and devices are not: reading one may never end.
    """
    try:
        return entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists())
    except OSError:  # a link to itself
        return True


def read_file(root: Path, name: str) -> bytes:
    """Returns a file below a folder; raises OSError."""
    return (root / name).read_bytes()
