"""The wheel of the pitstop that runs: what a machine far away installs.

Its files are packed as they are, so it works without a network, a build tool or the sources'
repository, and for an editable installation too.
"""

import base64
import csv
import hashlib
import io
import re
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath

import pitstop
from pitstop.core.errors import InputError
from pitstop.io.storage import atomic_write

_WHEEL = """\
Wheel-Version: 1.0
Generator: pitstop
Root-Is-Purelib: true
Tag: py3-none-any
"""

_THEN = (1980, 1, 1, 0, 0, 0)
"""The time of each file: the same files make the same bytes."""


def build_wheel(to: Path) -> Path:
    """Writes the wheel of the running pitstop into the directory `to`; returns its path.

    Raises:
        InputError: pitstop is not installed, so that nothing says what it needs.
    """
    try:
        distribution = metadata.distribution("pitstop")
    except metadata.PackageNotFoundError:
        raise InputError("pitstop is not installed here: pip install it to launch it") from None
    version = re.sub(r"[^\w.+]+", "_", distribution.version)
    info = f"pitstop-{version}.dist-info"
    files = dict(_package()) | {
        f"{info}/{name}": content for name, content in _described(distribution)
    }
    path = to / f"pitstop-{version}-py3-none-any.whl"
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, content in [*files.items(), (f"{info}/RECORD", _record(files, info))]:
            entry = zipfile.ZipInfo(name, _THEN)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return path


def _package() -> Iterator[tuple[str, bytes]]:
    """Yields the files of the package, by their paths in the wheel."""
    root = Path(pitstop.__file__).parent
    for path in sorted(root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
            yield f"{root.name}/{path.relative_to(root).as_posix()}", path.read_bytes()


def _described(distribution: metadata.Distribution) -> Iterator[tuple[str, bytes]]:
    """Yields the files that describe the wheel, by their names in its `.dist-info`."""
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO")
    assert text is not None
    yield "METADATA", text.encode()
    yield "WHEEL", _WHEEL.encode()
    yield "entry_points.txt", b"[console_scripts]\npitstop = pitstop.cli:main\n"
    for file in distribution.files or ():
        folder, *inside = PurePosixPath(file).parts
        if folder.endswith(".dist-info") and inside[:1] == ["licenses"]:
            yield "/".join(inside), Path(str(file.locate())).read_bytes()


def _record(files: dict[str, bytes], info: str) -> bytes:
    """Returns RECORD: path, SHA-256 and bytes of each file; its own line has only the path."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.writerow((name, f"sha256={digest}", len(content)))
    rows.writerow((f"{info}/RECORD", "", ""))
    return text.getvalue().encode()
