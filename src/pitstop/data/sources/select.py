"""Sources made of other sources: some of the classes and images, or a new division of them.

What is taken follows from the names (and the seed) alone, so it is the same on every machine and
does not change when another image is added. Nothing is read here.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b

from pitstop.core.errors import InputError
from pitstop.core.strict import did_you_mean
from pitstop.data.sources.base import HELD_OUT, Item, Source, hold_out, name_hash


def split_source(source: Source, fraction: float, *, seed: int = 0, every: bool = False) -> Source:
    """Returns a source whose validation images are a part of the training images of another.

    Images that were only held out because the source has none for validation count as training
    images.

    Args:
        fraction: of each class, 0 < fraction < 1. A class of two images or more gives at least
            one and keeps at least one; a class of one keeps it.
        seed: another one takes others.
        every: whether the source's own validation images are divided too; otherwise they are left
            out.

    Raises:
        InputError: no class has two images.
    """
    assert 0 < fraction < 1
    images = sorted([*source.train, *source.val])
    held_out = (list(source.train), list(source.val)) == hold_out(images, HELD_OUT)
    pool = images if every or held_out else source.train
    taken: set[Item] = set()
    for items in _shuffled_classes(pool, b"split %d" % seed).values():
        most = len(items) - 1
        taken.update(items[: min(most, max(1, round(fraction * len(items))))])
    if not taken:
        raise InputError(f"{source.origin} has one image a class, too few to split: add images")
    count = f"{source.origin}: its {len(source.val):,} validation images are"
    note = f"{count} {'divided too' if pool is images else 'left out (--all divides them too)'}"
    return replace(
        source,
        origin=f"{source.origin}, {fraction:.3g} split off, seed {seed}",
        train=[item for item in pool if item not in taken],
        val=[item for item in pool if item in taken],
        key=_key(source, "split", fraction, seed, pool is images),
        notes=(*source.notes, note),
    )


def subset_source(
    source: Source, classes: Sequence[str], *, train: int | None = None, val: int | None = None
) -> Source:
    """Returns some classes of a source, in its order, and some images of each.

    A larger subset of the same classes holds all images of a smaller one.

    Args:
        classes: names.
        train, val: images a class, all if None. A class that has fewer gives all.

    Raises:
        InputError: a class is unknown, fewer than two are named, or they have no validation image.
    """
    wanted = set(classes)
    _refuse_unknown(source, wanted)
    if len(wanted) < 2:
        raise InputError(f"a classifier needs at least two classes: name more of {source.origin}'s")
    chosen = tuple(name for name in source.classes if name in wanted)
    old_labels = (label for label, name in enumerate(source.classes) if name in wanted)
    labels = {old: new for new, old in enumerate(old_labels)}
    taken_train, few_train = _some(source.train, labels, train)
    taken_val, few_val = _some(source.val, labels, val)
    if not taken_val:
        raise InputError(
            f"{source.origin} has no validation images of these classes: `pitstop data split` "
            "takes some from the training images"
        )
    notes = [
        f"{few} of {len(chosen)} classes have fewer than {count} {what} images: all are taken"
        for few, count, what in ((few_train, train, "training"), (few_val, val, "validation"))
        if few
    ]
    return replace(
        source,
        origin=f"{source.origin}, {len(chosen)} of {len(source.classes)} classes",
        classes=chosen,
        train=taken_train,
        val=taken_val,
        key=_key(source, "subset", chosen, train, val),
        notes=(*source.notes, *notes),
    )


def _refuse_unknown(source: Source, classes: set[str]) -> None:
    for name in sorted(classes.difference(source.classes)):
        meant = did_you_mean(name, source.classes) or "; `pitstop data info --json` lists them"
        raise InputError(f"{source.origin} has no class {name}{meant}")


def _some(
    items: Sequence[Item], labels: dict[int, int], count: int | None
) -> tuple[list[Item], int]:
    """Returns the items of the classes under their new labels, and how many classes had too few.

    Args:
        labels: old to new.
        count: items a class, all if None.
    """
    of_class = _shuffled_classes((item for item in items if item.label in labels), b"subset")
    taken = [
        Item(item.name, new)
        for label, new in labels.items()
        for item in of_class.get(label, [])[:count]
    ]
    few = sum(len(of_class.get(label, [])) < (count or 0) for label in labels)
    return sorted(taken), few


def _shuffled_classes(items: Iterable[Item], purpose: bytes) -> dict[int, list[Item]]:
    """Returns the items of each label in an order that depends on their names only."""
    of_class: defaultdict[int, list[tuple[int, Item]]] = defaultdict(list)
    for item in items:
        of_class[item.label].append((name_hash(item.name, purpose), item))
    return {label: [item for _, item in sorted(hashed)] for label, hashed in of_class.items()}


def _key(source: Source, *how: object) -> str:
    return blake2b(repr((source.key, *how)).encode(), digest_size=32).hexdigest()
