"""What `--data` names, without packing or decoding anything: no torch, no pyarrow."""

from collections.abc import Callable
from pathlib import Path

from pitstop.core.errors import InputError
from pitstop.core.strict import did_you_mean
from pitstop.data.manifest import is_packed, read_manifest
from pitstop.data.sources.base import Source
from pitstop.data.sources.digits import digits_source
from pitstop.data.sources.folder import folder_source

DIGITS = "digits"
ACCEPTED = f"a packed dataset, a class folder, or {DIGITS!r}"


def resolve(spec: str) -> Path | Source:
    """Returns the packed dataset's directory, or the source that is to be packed.

    Raises:
        InputError: `spec` is neither, with the fix.
    """
    if spec == DIGITS:
        return digits_source()
    path = Path(spec).expanduser()
    _check_folder(spec, path)
    return path if is_packed(path) else folder_source(path)


def count_training_images(spec: str, say: Callable[[str], None]) -> int:
    """Returns the training images of `--data`; of a class folder, the bad ones included.

    `say` is told what is odd about a folder.
    """
    named = resolve(spec)
    if isinstance(named, Path):
        return sum(shard["rows"] for shard in read_manifest(named)["splits"]["train"]["shards"])
    for note in named.notes:
        say(note)
    return len(named.train)


def _check_folder(spec: str, path: Path) -> None:
    if "://" in spec:
        raise InputError(f"{spec} is a URL: download it, then name {ACCEPTED}")
    if path.is_file():
        raise InputError(f"{spec} is a file: unpack it if it is an archive, then name {ACCEPTED}")
    if not path.is_dir():
        meant = did_you_mean(spec, [DIGITS]) or _sibling(path)
        raise InputError(f"{spec} does not exist{meant or f': name {ACCEPTED}'}")


def _sibling(path: Path) -> str:
    """Returns "; did you mean ...?" for a folder of nearly the same name at the same place."""
    if not path.parent.is_dir():
        return ""
    folders = [str(entry) for entry in path.parent.iterdir() if entry.is_dir()]
    return did_you_mean(str(path), folders)
