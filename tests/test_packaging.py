"""What is shipped: an sdist, a wheel built from it, and the demo from the wheel alone."""

import json
import subprocess
import sys
import sysconfig
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "src")


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel in it, and an empty folder to be in."""

    bin: Path
    place: Path

    def run(self, *command: str) -> str:
        """Runs a program of the environment; returns what it printed."""
        ended = subprocess.run(
            [self.bin / command[0], *command[1:]],
            cwd=self.place,
            env={"PATH": "/usr/bin:/bin", "HOME": str(self.place), "NO_COLOR": "1"},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout


def build(kind: str, source: Path, to: Path) -> Path:
    """Builds an `sdist` or a `wheel` as pip does, in a process of its own; returns its path."""
    code = f"from setuptools import build_meta as b; print(b.build_{kind}({str(to)!r}))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return to / ended.stdout.split()[-1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel of the sdist of these sources, with this environment's packages but not pitstop.

    A line of a .pth file adds a folder to the path, but the .pth files in that folder, by which an
    editable pitstop is found, are not read.
    """
    folder = tmp_path_factory.mktemp("packaging")
    copy = folder / "copy"
    copy.mkdir()
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *SOURCES]
    for name in subprocess.run(
        git, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    sdist = build("sdist", copy, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    wheel = build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder)
    home = folder / "environment"
    venv.create(home, symlinks=True)
    python = home / "bin/python"
    pip = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *pip], check=True, capture_output=True)
    purelib = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
    (Path(purelib) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    place = folder / "place"
    place.mkdir()
    return Installed(home / "bin", place)


def test_the_wheel_is_what_runs(installed: Installed):
    code = "import pitstop, pathlib; print(pathlib.Path(pitstop.__file__).parent)"
    package = Path(installed.run("python", "-c", code).strip())
    assert package.is_relative_to(installed.bin.parent)
    assert (package / "py.typed").is_file()
    assert (package / "__init__.pyi").is_file()


def test_every_file_of_the_package_is_in_the_wheel(installed: Installed):
    code = "import pitstop, pathlib; print(pathlib.Path(pitstop.__file__).parent)"
    package = Path(installed.run("python", "-c", code).strip())
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", "src/pitstop"]
    listed = subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = [name.removeprefix("src/pitstop/") for name in listed.splitlines()]
    assert [name for name in names if not (package / name).is_file()] == []


def test_the_wheel_describes_itself(installed: Installed):
    code = "import json, importlib.metadata as m; print(json.dumps(m.metadata('pitstop').json))"
    described = json.loads(installed.run("python", "-c", code))
    version = installed.run("pitstop", "--version").strip()
    assert (described["name"], described["version"]) == ("pitstop", version)
    assert described["requires_python"] == ">=3.11"
    assert described["license_expression"] == "MIT"
    assert {"aws", "track", "export", "docs", "dev"} == set(described["provides_extra"])


def test_the_demo_trains_from_the_wheel_by_command_and_in_python(installed: Installed):
    installed.run("pitstop", "train", "demo", "--epochs", "2")
    stated = json.loads((installed.place / "runs/demo/run.json").read_text())
    assert stated["status"] == "finished"
    three_lines = (
        "from pitstop import train; run = train('demo', epochs=2); print(run.metrics.top1)"
    )
    said = installed.run("python", "-c", three_lines)
    assert float(said.split()[-1]) == stated["metrics"]["top1"]
