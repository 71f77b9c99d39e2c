"""Tar files of images, read in place; compressed ones are decompressed first.

What is understood, of one tar file or of several:

    class folders       train/<class>/..., val/<class>/... or <class>/...; a folder around them
                        is fine, and train.tar and val.tar may hold their classes
    ILSVRC              ILSVRC2012_img_train.tar (a tar file a class), and beside it
                        ILSVRC2012_img_val.tar with the labels of its images, or val/<class>/...
    WebDataset          KEY.jpg with KEY.cls (or .json with "label", or .txt); KEY.seg.png and
                        the like are no images of it
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

from pitstop.core.errors import InputError
from pitstop.data.sources.archive import Member, compression, decompress, list_members
from pitstop.data.sources.base import Reader, Source
from pitstop.data.sources.folder import FolderListing, stamp
from pitstop.data.sources.layout import (
    VAL_FOLDERS,
    Layout,
    PathListing,
    class_folders,
    files_by_split,
    is_hidden,
    is_image,
    split_of,
    tabular,
)
from pitstop.data.sources.spans import Span, Spans, index_spans

ILSVRC_TRAIN = "ILSVRC2012_img_train.tar"
ILSVRC_VAL = "ILSVRC2012_img_val.tar"

VAL_LABELS = (
    "LOC_val_solution.csv",
    "val.txt",
    "imagenet_2012_validation_synset_labels.txt",
    "ILSVRC2012_validation_ground_truth.txt",
)
"""Files with the labels of flat validation images; the first that lies beside them is taken.

A line is "FILE CLASS" with a comma or spaces between (as Kaggle's, or as Caffe's, where the class
is its number by name), or is the class of the next file by name (as TensorFlow's).
"""

LABEL_ENDINGS = ("cls", "json", "txt")
"""Where a WebDataset has the label of KEY.jpg; the first that is there is taken."""

_JSON_LABELS = ("label", "cls", "class")


def tar_source(files: Sequence[Path], origin: str) -> Source:
    """Returns the images of tar files, by what they hold (see the top of this file).

    Args:
        files: the splits of several follow from their names.
        origin: what the user calls them.

    Raises:
        InputError: one is damaged, or they are of no known layout.
    """
    root = Path(os.path.commonpath([file.parent for file in files]))
    tars = [_read(file, str(file.relative_to(root))) for file in sorted(files)]
    if any(tar.labels for tar in tars):
        return _webdataset(root, tars, origin)
    if len(tars) == 1 and tars[0].nested:
        return _nested(tars[0], origin)
    images = _Images()
    taken = _with_splits(tars, origin)
    for tar, split in taken:
        images.add(tar.path, {split + name: m for name, m in _unwrapped(tar, split).items()})
    layout = class_folders(PathListing(origin, images.spans))
    used = [tar for tar, _ in taken]
    ignored = sorted({tar.name for tar in tars} - {tar.name for tar in used})
    layout = replace(layout, notes=(*_other_splits(origin, ignored), *layout.notes))
    return _source(root, images, layout, origin, used)


def ilsvrc_source(folder: Path) -> Source:
    """Returns the images of a folder that holds ILSVRC's tar files.

    Raises:
        InputError: a tar file is damaged, or the labels of the validation images are missing.
    """
    return _nested(_read(folder / ILSVRC_TRAIN, ILSVRC_TRAIN), str(folder))


@dataclass(frozen=True)
class _Tar:
    path: Path
    name: str
    """Relative to the folder of all."""
    images: list[Member]
    labels: dict[str, int | str]
    """Of a WebDataset, by key."""
    nested: bool
    """It is a tar file of tar files."""
    notes: tuple[str, ...]


class _Images:
    """Collects where images lie, under the names that the layout is read from."""

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.spans: dict[str, Span] = {}

    def add(self, file: Path, members: Mapping[str, Member]) -> None:
        for name, member in members.items():
            if name in self.spans:
                other = self.files[self.spans[name].file]
                raise InputError(f"{name} is in {other} and in {file}: remove one of them")
            self.spans[name] = Span(name, len(self.files), member.offset, member.size)
        self.files.append(file)


def _read(path: Path, name: str) -> _Tar:
    """Lists a tar file, and reads what may be labels as they pass."""
    texts: defaultdict[str, dict[str, bytes]] = defaultdict(dict)

    def keep(member: Member, file: IO[bytes]) -> None:
        if is_image(member.name):
            return
        key, ending = _key_and_ending(member.name)
        if ending in LABEL_ENDINGS and member.size < 2**16:
            file.seek(member.offset)
            texts[key][ending] = file.read(member.size)

    contents = list_members(path, keep)
    images = [m for m in contents.members if is_image(m.name) and not is_hidden(m.name)]
    if not images:
        raise InputError(f"{path} has no images: name a tar file of images")
    keys = {_key_and_ending(member.name)[0] for member in images} if texts else ()
    labels = {key: _label(path, key, found) for key, found in texts.items() if key in keys}
    return _Tar(path, name, images, labels, contents.nested, contents.notes)


def _source(
    root: Path,
    images: _Images,
    layout: Layout,
    origin: str,
    tars: Sequence[_Tar],
    labelled_by: Path | None = None,
) -> Source:
    spans = index_spans(
        images.files, [images.spans[item.name] for item in (*layout.train, *layout.val)]
    )
    stamped = [*images.files, *([labelled_by] if labelled_by else [])]
    key = stamp(root, [str(file.relative_to(root)) for file in stamped])
    archives = {tar.path for tar in tars}
    compressed = tuple(
        index
        for index, file in enumerate(images.files)
        if file in archives and compression(file) is not None
    )
    return Source(
        origin=origin,
        classes=layout.classes,
        train=layout.train,
        val=layout.val,
        key=key,
        notes=(*(note for tar in tars for note in tar.notes), *layout.notes),
        open=partial(_open, spans, compressed, key),
    )


def _open(spans: Spans, compressed: Sequence[int], key: str, folder: Path) -> Reader:
    files = list(spans.files)
    for index in compressed:
        files[index] = folder / f"{key[:16]}-{index:05}.tar"
        decompress(spans.files[index], files[index])
    return replace(spans, files=tuple(files))


def _other_splits(origin: str, ignored: Sequence[str]) -> Iterable[str]:
    if ignored:
        yield f"{origin}: ignored {len(ignored):,} files of other splits, such as {ignored[0]}"


# Class folders.


def _with_splits(tars: Sequence[_Tar], origin: str) -> list[tuple[_Tar, str]]:
    """Returns tar files with the folder that their names tell, such as "train/"."""
    if len(tars) == 1 or all(split_of(tar.name) is None for tar in tars):
        return [(tar, "") for tar in tars]
    splits = files_by_split(origin, [tar.name for tar in tars])
    folders = dict.fromkeys(splits.train, "train/") | dict.fromkeys(splits.val, "val/")
    return [(tar, folders[tar.name]) for tar in tars if tar.name in folders]


def _unwrapped(tar: _Tar, split: str) -> dict[str, Member]:
    """Returns images by path, without folders around the class folders or splits.

    Where the name of the tar file tells the split, a folder of that kind is one around them.
    """
    depth = 0
    parts = [member.name.split("/") for member in tar.images]
    while True:
        around = {path[depth] for path in parts}
        deep = all(len(path) > depth + 2 for path in parts)
        if not deep or len(around) > 1 or (not split and split_of(around.pop()) is not None):
            break
        depth += 1
    return {"/".join(p[depth:]): member for p, member in zip(parts, tar.images, strict=True)}


# ILSVRC.


def _nested(train: _Tar, origin: str) -> Source:
    """Returns the images of a tar file of a tar file a class, with what lies beside it."""
    root = train.path.parent
    names = {member.name: member for member in train.images}
    images = _Images()
    if any(split_of(name.partition("/")[0]) is not None for name in names):
        images.add(train.path, names)
        return _source(root, images, class_folders(PathListing(origin, names)), origin, [train])
    classes = sorted({name.partition("/")[0] for name in names})
    images.add(train.path, {f"train/{name}": member for name, member in names.items()})
    tars, labelled_by = [train], None
    if (root / ILSVRC_VAL).exists():
        val = _read(root / ILSVRC_VAL, ILSVRC_VAL)
        tars.append(val)
        found, labelled_by = _in_class_folders(root, _unwrapped(val, "val"), val.path, classes)
        images.add(val.path, found)
    elif (folder := _val_folder(root)) is not None:
        members = {name: _whole(folder / name) for name in FolderListing(folder).images("")}
        found, labelled_by = _in_class_folders(root, members, folder, classes)
        for name, member in found.items():
            images.add(folder / member.name, {name: member})
    layout = class_folders(PathListing(origin, images.spans))
    return _source(root, images, layout, origin, tars, labelled_by)


def _val_folder(root: Path) -> Path | None:
    return next((root / name for name in VAL_FOLDERS if (root / name).is_dir()), None)


def _whole(file: Path) -> Member:
    return Member(str(file), 0, file.stat().st_size, False)


def _in_class_folders(
    root: Path, members: Mapping[str, Member], place: Path, classes: Sequence[str]
) -> tuple[dict[str, Member], Path | None]:
    """Returns validation images by "val/<class>/<name>", and the file that told their classes."""
    if all("/" in name for name in members):
        return {f"val/{name}": member for name, member in members.items()}, None
    file = next((root / name for name in VAL_LABELS if (root / name).exists()), None)
    if file is None:
        raise InputError(
            f"{place} does not tell the classes of its images: put {VAL_LABELS[0]} (of Kaggle) "
            f"or {VAL_LABELS[1]} (lines of FILE CLASS) into {root}"
        )
    labels = _val_labels(file, sorted(members), classes)
    return {f"val/{labels[name]}/{name}": member for name, member in members.items()}, file


def _val_labels(file: Path, names: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """Returns the class of each validation image."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text: renew it") from None
    rows = [re.split(r"[,\s]+", line.strip()) for line in lines if line.strip()]
    if not rows:
        raise InputError(f"{file} is empty: renew it")
    if all(len(row) == 1 for row in rows):
        if all(row[0].isdecimal() for row in rows):
            fix = f"only meta.mat explains: use {VAL_LABELS[0]} of Kaggle instead"
            raise InputError(f"{file} has the numbers of ILSVRC's development kit, which {fix}")
        if len(rows) != len(names):
            raise InputError(
                f"{file} has {len(rows):,} classes for {len(names):,} images: renew it"
            )
        told = {Path(name).stem: row[0] for name, row in zip(names, rows, strict=True)}
    else:
        told = {Path(row[0]).stem: row[1] for row in rows if len(row) > 1}
    return {name: _known_class(file, name, told.get(Path(name).stem), classes) for name in names}


def _known_class(file: Path, name: str, told: str | None, classes: Sequence[str]) -> str:
    if told is None:
        raise InputError(f"{file} has no line for {name}: add it")
    if told in classes:
        return told
    if told.isdecimal() and int(told) < len(classes):
        return classes[int(told)]
    raise InputError(f"{file}: {name} is of class {told}, of which there is no training image")


# WebDataset.


def _webdataset(root: Path, tars: Sequence[_Tar], origin: str) -> Source:
    splits = files_by_split(origin, [tar.name for tar in tars])
    by_name = {tar.name: tar for tar in tars}
    images = _Images()
    labels: dict[str, dict[str, int | str]] = {"train": {}, "val": {}}
    unlabelled = 0
    others: list[str] = []
    taken = [("train", by_name[name]) for name in splits.train]
    taken += [("val", by_name[name]) for name in splits.val]
    for split, tar in taken:
        members, further = _key_images(tar)
        others += further
        keys = {name: _key_and_ending(member.name)[0] for name, member in members.items()}
        known = {name: tar.labels[key] for name, key in keys.items() if key in tar.labels}
        unlabelled += len(members) - len(known)
        images.add(tar.path, {name: members[name] for name in known})
        labels[split] |= known
    layout = tabular(origin, labels["train"], labels["val"])
    notes = _webdataset_notes(origin, unlabelled, others)
    ignored = _other_splits(origin, splits.ignored)
    layout = replace(layout, notes=(*notes, *ignored, *layout.notes))
    return _source(root, images, layout, origin, [tar for _, tar in taken])


def _key_images(tar: _Tar) -> tuple[dict[str, Member], list[str]]:
    """Returns the images KEY.jpg by name, and the names of others, such as KEY.seg.png.

    Raises:
        InputError: a key has two images.
    """
    members: dict[str, Member] = {}
    others: list[str] = []
    by_key: dict[str, str] = {}
    for member in tar.images:
        key, ending = _key_and_ending(member.name)
        if "." in ending:
            others.append(f"{tar.name}/{member.name}")
            continue
        other = by_key.setdefault(key, member.name)
        if other != member.name:
            raise InputError(
                f"{tar.path}: {other} and {member.name} are images of one key: remove one of them"
            )
        members[f"{tar.name}/{member.name}"] = member
    return members, others


def _webdataset_notes(origin: str, unlabelled: int, others: Sequence[str]) -> Iterable[str]:
    if unlabelled:
        endings = ", ".join(f".{ending}" for ending in LABEL_ENDINGS)
        yield f"{origin}: ignored {unlabelled:,} images without a label ({endings})"
    if others:
        what = f"{len(others):,} images that are not KEY.jpg or the like"
        yield f"{origin}: ignored {what}, such as {others[0]}"


def _key_and_ending(name: str) -> tuple[str, str]:
    """Splits a name at the first dot of its last part, as WebDataset does."""
    folder, slash, last = name.rpartition("/")
    key, _, ending = last.partition(".")
    return folder + slash + key, ending.lower()


def _label(path: Path, key: str, texts: Mapping[str, bytes]) -> int | str:
    """Returns a label: a number if it is one, else a name."""
    ending = next(ending for ending in LABEL_ENDINGS if ending in texts)
    try:
        text = texts[ending].decode().strip()
        value = _json_label(text) if ending == "json" else text
        return int(value) if re.fullmatch(r"-?\d{1,9}", str(value)) else str(value)
    except (ValueError, LookupError, TypeError):
        raise InputError(f"{path}: {key}.{ending} has no label: correct it") from None


def _json_label(text: str) -> int | str:
    value = json.loads(text)
    label = value[next((name for name in _JSON_LABELS if name in value), _JSON_LABELS[0])]
    if not isinstance(label, int | str):
        raise TypeError
    return label
