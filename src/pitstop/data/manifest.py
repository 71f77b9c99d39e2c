"""The manifest of a packed dataset: written last, so that without it the dataset is not ready."""

import json
import re
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from pitstop.core.errors import InputError

FORMAT = "pitstop packed images"
VERSION = 2
MANIFEST = "manifest.json"

REMARKS = "remarks.csv"
"""Which images were skipped or converted, and why: columns split, name, action, why."""

STAGING = "staging.json"
"""There while shards are still being copied here (see `stage`); a lock is held as long."""

STAGING_LOCK = ".staging.lock"


_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.arrow")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_packed(path: Path) -> bool:
    """Says whether a directory is a packed dataset, be it unfinished or damaged."""
    if (path / "train-00000.arrow").exists():
        return True
    try:
        with (path / MANIFEST).open("rb") as file:
            return FORMAT.encode() in file.read(100)
    except OSError:
        return False


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest of a packed dataset.

    Raises:
        InputError: it is missing, damaged, or of another format or version.
    """
    file = path / MANIFEST
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"{path} has no {MANIFEST}, so packing did not finish: pack again"
        ) from None
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({error.strerror}): name a packed dataset"
        ) from None
    return parse_manifest(content, str(file))


def parse_manifest(content: bytes, where: str) -> dict[str, Any]:
    """Returns the manifest in the bytes of a file.

    Args:
        where: the file's path or URL, to name it.

    Raises:
        InputError: it is damaged, or of another format or version.
    """
    try:
        manifest = json.loads(content)
    except ValueError:
        raise InputError(f"{where} is damaged (not JSON): pack again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{where} is not of a packed dataset: name one, or a class folder")
    if manifest.get("version") != VERSION:
        found = f"has version {manifest.get('version')}, this pitstop reads {VERSION}"
        raise InputError(f"{where} {found}: pack again")
    if (wrong := next(_wrong(manifest), None)) is not None:
        raise InputError(f"{where} is damaged ({wrong} is missing or wrong): pack again")
    return manifest


def digest_of(classes: Sequence[str], splits: dict[str, dict[str, Any]]) -> str:
    """Returns the `digest` of a manifest.

    It depends on what training sees only, not on how Arrow lays it out or where shards end.
    """
    content = {
        split: [
            entry["rows"],
            entry["content"],
            {side: level["content"] for side, level in entry.get("levels", {}).items()},
        ]
        for split, entry in splits.items()
    }
    return sha256(json.dumps([classes, content]).encode()).hexdigest()


# What a manifest must state. Each function yields what is missing or wrong, and is asked for the
# first only: what comes behind a `yield` relies on what stands before it.


def _wrong(manifest: dict[str, Any]) -> Iterator[str]:
    if not _is_text(manifest.get("digest"), _SHA256):
        yield "digest"
    if not _is_list(manifest.get("classes"), str):
        yield "classes"
    if not _is_count(manifest.get("skipped")):
        yield "skipped"
    if not isinstance(manifest.get("converted"), dict):
        yield "converted"
    yield from _wrong_in_made(manifest.get("made"))
    splits: Any = manifest.get("splits")
    if not isinstance(splits, dict) or splits.keys() != {"train", "val"}:
        yield "splits"
    for split in ("train", "val"):
        yield from _wrong_in_split(f"splits.{split}", splits[split])


def _wrong_in_made(made: Any) -> Iterator[str]:
    if not isinstance(made, dict):
        yield "made"
    for key in ("pitstop", "source", "key"):
        if not isinstance(made.get(key), str):
            yield f"made.{key}"
    if "short_side" not in made or not (
        made["short_side"] is None or _is_count(made["short_side"])
    ):
        yield "made.short_side"
    if not _is_count(made.get("quality")):
        yield "made.quality"
    levels = made.get("levels")
    if not isinstance(levels, list) or not all(map(_is_count, levels)):
        yield "made.levels"


def _wrong_in_split(where: str, entry: Any) -> Iterator[str]:
    yield from _wrong_in_files(where, entry)
    if not _is_count(entry.get("rows")):
        yield f"{where}.rows"
    levels = entry.get("levels", {})
    if not isinstance(levels, dict) or not all(map(str.isdecimal, levels)):
        yield f"{where}.levels"
    for side, level in levels.items():
        yield from _wrong_in_files(f"{where}.levels.{side}", level)
        if sum(s["rows"] for s in level["shards"]) != sum(s["rows"] for s in entry["shards"]):
            yield f"{where}.levels.{side}: a shard"


def _wrong_in_files(where: str, entry: Any) -> Iterator[str]:
    """As the others, of what a split and a level have: shards, their index, their content."""
    if not isinstance(entry, dict):
        yield where
    if not _is_text(entry.get("content"), _SHA256):
        yield f"{where}.content"
    if not _is_list(entry.get("shards"), object):
        yield f"{where}.shards"
    for place, file in enumerate(entry["shards"]):
        yield from _wrong_in_file(f"{where}.shards[{place}]", file)
        if not _is_count(file.get("rows")) or not file["rows"]:
            yield f"{where}.shards[{place}].rows"
    yield from _wrong_in_file(f"{where}.index", entry.get("index"))


def _wrong_in_file(where: str, file: Any) -> Iterator[str]:
    if not isinstance(file, dict):
        yield where
    if not _is_text(file.get("file"), _FILE):
        yield f"{where}.file"
    if not _is_count(file.get("bytes")) or not file["bytes"]:
        yield f"{where}.bytes"
    if not _is_text(file.get("sha256"), _SHA256):
        yield f"{where}.sha256"


def _is_text(value: Any, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_list(value: Any, kind: type) -> bool:
    """Says whether it is a list of some of that kind."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, kind) for v in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0  # True is an int, too
