"""What `--data` names, by its content. A kind's packages are imported when it is met."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path

from pitstop.core.errors import InputError
from pitstop.core.strict import did_you_mean
from pitstop.data.manifest import is_packed, read_manifest
from pitstop.data.sources.archive import first_names, is_tar
from pitstop.data.sources.base import Source
from pitstop.data.sources.cifar import cifar_source, is_cifar
from pitstop.data.sources.digits import digits_source
from pitstop.data.sources.download import DATASETS
from pitstop.data.sources.folder import folder_source
from pitstop.data.sources.layout import split_of
from pitstop.data.sources.tar import ILSVRC_TRAIN, ilsvrc_source, tar_source

DIGITS = "digits"
ACCEPTED = (
    "a packed dataset, a class folder, tar or Parquet files, s3://..., gs://..., az://..., "
    f"hf://OWNER/NAME, or {DIGITS!r}"
)

BUCKETS = ("s3", "gs", "az")

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_PARQUET = (".parquet",)

_MOST_FILES = 1_000_000
"""That braces may name: more is a slip."""


def resolve(spec: str) -> Path | Source:
    """Returns the packed dataset's directory, or the source that is to be packed.

    Files of a dataset of the hub are downloaded; other sources are listed only.

    Raises:
        InputError: `spec` is neither, with the fix.
    """
    if spec == DIGITS:
        return digits_source()
    if "://" in spec:
        return _remote(spec)
    try:
        return _local(spec, Path(spec).expanduser())
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        raise InputError(f"{error.filename or spec} {reason}: check its permissions") from None


def count_training_images(spec: str, say: Callable[[str], None]) -> int:
    """Returns the training images of `--data`; of what is not packed, the bad ones included.

    `say` is told what is odd about a source.
    """
    named = resolve(spec)
    if isinstance(named, Path):
        return sum(shard["rows"] for shard in read_manifest(named)["splits"]["train"]["shards"])
    for note in named.notes:
        say(note)
    return len(named.train)


def _local(spec: str, path: Path) -> Path | Source:
    if path.is_file():
        return _file(path)
    if path.is_dir():
        return path if is_packed(path) else _folder(path)
    if has_magic(spec) or "{" in spec:
        return _files(_matches(spec), spec)
    raise InputError(f"{spec} does not exist{_meant(spec, path)}")


def _remote(url: str) -> Source:
    scheme = url.partition("://")[0]
    if scheme == "hf":
        from pitstop.data.sources.hub import hub_source

        return hub_source(url)
    if scheme in BUCKETS:
        from pitstop.data.sources.bucket import bucket_source

        return bucket_source(url)
    raise InputError(f"{url} is a URL that is not read: download it, then name {ACCEPTED}")


def _file(path: Path) -> Source:
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PAR1":
        return _parquet(path.parent, [path.name], str(path))
    if start == b"PK\x03\x04":
        raise InputError(f"{path} is a zip file, of which nothing is read in place: unzip it")
    if is_tar(path):
        return cifar_source(path) if is_cifar(first_names(path)) else tar_source([path], str(path))
    raise InputError(f"{path} is a file of no known kind: name {ACCEPTED}")


def _folder(path: Path) -> Source:
    names = {entry.name for entry in path.iterdir()}
    if ILSVRC_TRAIN in names and "train" not in names:
        return ilsvrc_source(path)
    if is_cifar(entry.name for entry in path.iterdir() if entry.is_file()):
        return cifar_source(path)
    if parquet := _data_files(path, _PARQUET):
        return _parquet(path, parquet, str(path))
    if tars := _data_files(path, _TARS):
        return tar_source([path / name for name in tars], str(path))
    return folder_source(path)


def _files(files: Sequence[Path], spec: str) -> Source:
    """Returns the source that several files are, of which the first one tells the kind."""
    with files[0].open("rb") as file:
        if file.read(4) != b"PAR1":
            return tar_source(files, spec)
    root = Path(os.path.commonpath([file.parent for file in files]))
    return _parquet(root, [str(file.relative_to(root)) for file in files], spec)


def _parquet(root: Path, files: Sequence[str], origin: str) -> Source:
    from pitstop.data.sources.parquet import parquet_source

    return parquet_source(root, files, origin)


def _data_files(root: Path, endings: tuple[str, ...]) -> list[str]:
    """Returns the files of these endings in a folder, in its data/, and in those of its splits.

    There are none if other folders are there, or some of these have none: it has class folders.
    """
    shown = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
    found = [entry for entry in shown if entry.name.lower().endswith(endings)]
    for folder in (entry for entry in shown if entry.is_dir()):
        if folder.name != "data" and split_of(folder.name) is None:
            return []
        inside = [entry for entry in folder.iterdir() if entry.name.lower().endswith(endings)]
        if not inside:
            return []
        found += inside
    return sorted(str(file.relative_to(root)) for file in found if file.is_file())


def _matches(pattern: str) -> list[Path]:
    """Returns the files of a pattern with *, ?, [...], {0000..0123} or {a,b}.

    Raises:
        InputError: there are none, one that the braces name is missing, or the braces go
            backwards or name too many.
    """
    files: list[Path] = []
    for one in _expanded(str(Path(pattern).expanduser())):
        # Path.glob refuses "**.tar"
        named = glob(one, recursive=True)  # noqa: PTH207
        found = [file for file in map(Path, named) if file.is_file()]
        if not found:
            raise InputError(f"there is no file {one}: correct the pattern {pattern}")
        files += found
    return sorted(set(files))


def _expanded(pattern: str) -> Iterator[str]:
    """Yields the patterns that braces stand for."""
    match = re.search(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        yield pattern
        return
    first, last, words = match.groups()
    if words is not None:
        inside = words.split(",")
    else:
        numbers = range(int(first), int(last) + 1)
        if not 0 < len(numbers) <= _MOST_FILES:
            allowed = f"1 to {_MOST_FILES:,} numbers, counted upwards"
            raise InputError(f"{match[0]} is not a range of {allowed}: correct the pattern")
        inside = (f"{number:0{len(first)}}" for number in numbers)
    before, after = pattern[: match.start()], pattern[match.end() :]
    for word in inside:
        yield from _expanded(f"{before}{word}{after}")


def _meant(spec: str, path: Path) -> str:
    if spec in DATASETS:
        return f": pitstop data get {spec} DIR makes it"
    return did_you_mean(spec, [DIGITS]) or _sibling(path) or f": name {ACCEPTED}"


def _sibling(path: Path) -> str:
    """Returns "; did you mean ...?" for what has nearly the same name at the same place."""
    if not path.parent.is_dir():
        return ""
    return did_you_mean(str(path), [str(entry) for entry in path.parent.iterdir()])
