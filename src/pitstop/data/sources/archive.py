"""Reading tar files: their members are listed and read in place, and never written by name.

What is compressed can only be read in sequence: it is decompressed into a tar file first.
"""

import bz2
import errno
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

from pitstop.core.errors import InputError
from pitstop.io.storage import atomic_write

_BLOCK = 512

_MAGIC_AT = 257
"""Where the header of a tar file says "ustar"."""

_LONG_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
"""Members with long names and the like, which tarfile reads into memory."""

_MOST_HEADER_BYTES = 2**20

_MOST_SIZE = 2**62
"""Of a member: no file that can be sought in is as large."""

_COMPRESSIONS = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)
"""The first bytes of a file, and what has compressed it."""


_DAMAGED = (
    tarfile.TarError,
    OSError,
    EOFError,
    RecursionError,
    zlib.error,
    lzma.LZMAError,
)
"""What reading a damaged tar file raises."""


class Member(NamedTuple):
    """A regular file in a tar file."""

    name: str
    offset: int
    """Of its content, in the decompressed tar file."""
    size: int
    nested: bool
    """It lies in a tar file in the tar file."""


class Contents(NamedTuple):
    """What a tar file has."""

    members: list[Member]
    """In the order of their names, each name once."""
    nested: bool
    """Some lie in tar files in the tar file."""
    notes: tuple[str, ...]
    """Lines to tell the user: what was left out."""


def compression(path: Path) -> str | None:
    """Returns what a file is compressed with, by its first bytes, or None."""
    with path.open("rb") as file:
        start = file.read(8)
    return next((name for magic, name in _COMPRESSIONS if start.startswith(magic)), None)


def is_tar(path: Path) -> bool:
    """Says whether a file is a tar file, compressed or not, by its content.

    Raises:
        InputError: it is compressed with zstd, and this Python cannot read that.
    """
    try:
        with _decompressed(path) as file:
            return file.read(_BLOCK)[_MAGIC_AT:].startswith(b"ustar")
    except (OSError, EOFError, zlib.error, lzma.LZMAError):
        return False


def first_names(path: Path, number: int = 16) -> list[str]:
    """Returns the names of the regular files among the first members that a tar file has.

    Raises:
        InputError: as `list_members`.
    """
    with opened(path) as file:
        return [info.name for info in islice(_headers(file, path), number) if info.isreg()]


def list_members(
    path: Path, wanted: Callable[[Member, IO[bytes]], object] | None = None
) -> Contents:
    """Returns the regular files in a tar file and, one level deep, in the tar files in it.

    A member `n01440764.tar` gives `n01440764/...`. Of equal names the last counts, as when
    unpacking. Links, devices, and names that lead out of the folder are left out, with a note.

    Args:
        wanted: called with each member as it is passed, and with the file to read it from.

    Raises:
        InputError: the file is damaged, cut off, or no tar file.
    """
    found: dict[str, Member] = {}
    odd: list[str] = []
    again: list[str] = []
    with opened(path) as file:
        for member in _members(file, path, odd):
            if member.name in found:
                again.append(member.name)
            found[member.name] = member
            if wanted is not None:
                wanted(member, file)
    notes = (
        _note(path, odd, "ignored", "that are links, devices, or lead out of the folder"),
        _note(path, again, "took the last of", "that occur again"),
    )
    nested = any(member.nested for member in found.values())
    return Contents(sorted(found.values()), nested, tuple(note for note in notes if note))


@contextmanager
def opened(path: Path) -> Generator[IO[bytes]]:
    """Opens the decompressed content of a tar file; what is wrong with it is an InputError."""
    try:
        with _decompressed(path) as file:
            yield file
    except InputError:
        raise
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            reason = f"cannot be read ({error.strerror})"
            raise InputError(f"{path} {reason}: check its permissions") from None
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(
            f"{path} is damaged, cut off, or no tar file ({reason}): download it again"
        ) from None


def decompress(path: Path, target: Path) -> None:
    """Writes the decompressed content of a tar file, whole or not; does nothing if it is there."""
    if not target.exists():
        with atomic_write(target) as out:
            for chunk in _chunks(path):
                out.write(chunk)


def _chunks(path: Path) -> Iterator[bytes]:
    with opened(path) as file:
        while chunk := file.read(2**20):
            yield chunk


def _note(path: Path, names: list[str], what: str, why: str) -> str:
    if not names:
        return ""
    return f"{path}: {what} {len(names):,} members {why}, such as {names[0]!r}"


def _members(file: IO[bytes], path: Path, odd: list[str]) -> Iterator[Member]:
    """Yields the regular members; puts the names of those that are neither that nor folders
    into `odd`."""
    for info in _headers(file, path):
        name = _relative(info.name)
        if name is None or not (info.isdir() or (info.isreg() and not info.issparse())):
            odd.append(info.name)
        elif info.isreg() and name.lower().endswith(".tar"):
            file.seek(info.offset_data)
            for inner in _headers(file, path, info.offset_data + info.size):
                below = _relative(inner.name)
                if below is None or not (inner.isdir() or inner.isreg()):
                    odd.append(f"{info.name}/{inner.name}")
                elif inner.isreg():
                    yield Member(f"{name[:-4]}/{below}", inner.offset_data, inner.size, True)
        elif info.isreg():
            yield Member(name, info.offset_data, info.size, False)


def _headers(file: IO[bytes], path: Path, end: int | None = None) -> Iterator[tarfile.TarInfo]:
    """Yields the headers of the tar file that begins where `file` is."""
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as archive:
        while (info := archive.next()) is not None:
            if not 0 <= info.size < (_MOST_SIZE if end is None else end - info.offset_data + 1):
                raise tarfile.ReadError(f"{info.name} leads out of the archive that it is in")
            yield info
            # each would take a kilobyte
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
        file.seek(archive.offset)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError(f"no end at byte {archive.offset:,}")


class _Header(tarfile.TarInfo):
    """A header; of one of a plain file, owners and times are not read.

    100,000 members are listed at 60,000 a second, and with tarfile's own at 28,000 (medians of 3).
    """

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        size, checksum = buf[124:135], buf[148:154]
        plain = buf[156:157] == tarfile.REGTYPE and not (size + checksum).strip(b"01234567")
        if not plain or int(checksum, 8) != sum(buf) - sum(buf[148:156]) + 8 * ord(" "):
            return _checked(super().frombuf(buf, encoding, errors))
        name, prefix = buf[:100].partition(b"\0")[0], buf[345:500].partition(b"\0")[0]
        header = cls((prefix + b"/" + name if prefix else name).decode(encoding, errors))
        header.size = int(size, 8)
        return header


def _checked(header: tarfile.TarInfo) -> tarfile.TarInfo:
    if header.type in _LONG_HEADERS and not 0 <= header.size <= _MOST_HEADER_BYTES:
        raise tarfile.ReadError(f"a header of {header.size:,} bytes")
    return header


def _relative(name: str) -> str | None:
    """Returns a member's path without "./" and "//", or None if it leads out of the folder."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return None if name.startswith("/") or ".." in parts else "/".join(parts)


def _decompressed(path: Path) -> IO[bytes]:
    match compression(path):
        case "gzip":
            return gzip.open(path)  # pyright: ignore[reportReturnType]
        case "bzip2":
            return bz2.open(path)
        case "xz":
            return lzma.open(path)
        case "zstd":
            return _zstd(path)
    return path.open("rb")


def _zstd(path: Path) -> IO[bytes]:
    try:
        return import_module("compression.zstd").open(path)
    except ImportError:
        raise InputError(
            f"{path} is compressed with zstd, which needs Python 3.14: unpack it (zstd -d)"
        ) from None
