"""What can be packed: labelled images with names."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

HELD_OUT = 0.1
"""The part of each class that is held out where a source has no validation images."""

Reader = Callable[[str], bytes]
"""Returns the encoded image of an item's name; raises OSError. It can be pickled and called by
several threads and processes at once."""


class Item(NamedTuple):
    """A labelled image: a name (path relative to the source, '/'-separated) and a class index."""

    name: str
    label: int


@dataclass(frozen=True)
class Source:
    """Labelled images to pack; the items of a split are in the order of their names."""

    origin: str
    """Where it comes from, to tell the user: a path, or the name of an embedded dataset."""
    classes: tuple[str, ...]
    train: Sequence[Item]
    val: Sequence[Item]
    key: str
    """Hex digest of the content's listing: it changes when an image is added, removed or edited."""
    notes: tuple[str, ...]
    """Lines to tell the user, such as what was held out."""
    open: Callable[[Path], Reader]
    """Makes the images readable. What can only be read in sequence is unpacked into the folder
    given, which may then hold some of it from an earlier try; other sources leave it alone."""


def constant_reader(reader: Reader) -> Callable[[Path], Reader]:
    """Returns the `open` of a source whose images can be read where they are."""
    return partial(_ignore_folder, reader)


def _ignore_folder(reader: Reader, folder: Path) -> Reader:
    return reader


def name_hash(name: str, purpose: bytes = b"") -> int:
    """Returns 64 bits that depend on the name only, other bits for each purpose (<= 16 bytes)."""
    digest = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8, person=purpose)
    return int.from_bytes(digest.digest(), "big")


def hold_out(items: Sequence[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """Splits items into (kept, held out), the same way each time, with `fraction` of each class.

    A class of two images or more gives at least one, a class of one gives none.
    """
    counts = Counter(item.label for item in items)
    owed = {label: max(1, round(fraction * n)) if n > 1 else 0 for label, n in counts.items()}
    held: set[Item] = set()
    for item in sorted(items, key=lambda item: (name_hash(item.name, b"hold out"), item.name)):
        if owed[item.label] > 0:
            owed[item.label] -= 1
            held.add(item)
    return [item for item in items if item not in held], [item for item in items if item in held]
