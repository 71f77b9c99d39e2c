"""The wheel is installed by pip, without a network, into an empty folder."""

import base64
import csv
import hashlib
import io
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest

import pitstop
from pitstop.core.errors import InputError
from pitstop.launch.wheel import build_wheel

PACKAGE = Path(pitstop.__file__).parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def files(folder: Path) -> Mapping[str, bytes]:
    """The files of a package, but for compiled ones."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_what_pip_installs_is_what_runs_here(wheel: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile"]
    quiet = ["--quiet", "--disable-pip-version-check", "--target", str(tmp_path)]
    subprocess.run([*pip, *quiet, str(wheel)], check=True)
    assert files(tmp_path / "pitstop") == files(PACKAGE)
    assert (tmp_path / "bin" / "pitstop").is_file()
    asked = "import pitstop, importlib.metadata as m; print(pitstop.__file__, m.version('pitstop'))"
    said = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {asked}"],
        check=True,
        capture_output=True,
        text=True,
    )
    path, version = said.stdout.split()
    assert Path(path).is_relative_to(tmp_path)
    assert version == metadata.version("pitstop")


def test_the_record_is_true(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = next(name for name in names if name.endswith("/RECORD"))
        rows = list(csv.reader(io.StringIO(archive.read(record).decode())))
        assert {name for name, _, _ in rows} == names
        for name, digest, size in rows:
            if name == record:
                assert (digest, size) == ("", "")
                continue
            content = archive.read(name)
            sha256 = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
            assert (digest, size) == (f"sha256={sha256.rstrip('=')}", str(len(content)))


def test_it_says_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        text = archive.read(name).decode()
        licences = [name for name in archive.namelist() if "/licenses/" in name]
    assert "\nRequires-Dist: torch" in text
    assert "\nProvides-Extra: aws" in text
    assert licences


def test_the_same_files_make_the_same_bytes(wheel: Path, tmp_path: Path) -> None:
    assert build_wheel(tmp_path).read_bytes() == wheel.read_bytes()


def test_sources_that_are_not_installed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata.Distribution, "discover", lambda **_: iter(()))
    with pytest.raises(InputError, match="pip install"):
        build_wheel(tmp_path)
    assert not list(tmp_path.iterdir())
