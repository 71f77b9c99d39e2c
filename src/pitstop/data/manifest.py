"""The manifest of a packed dataset: written last, so that without it the dataset is not ready."""

import json
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
        InputError: it is missing, not JSON, or of another format or version.
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
        InputError: it is not JSON, or of another format or version.
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
    return manifest
