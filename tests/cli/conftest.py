"""The command line in this process, on 287 digits of 12 and 16 pixels: a run takes half a second.

Importing the engine takes seconds, so few tests start a process.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pitstop import cli

Command = Callable[..., "Said"]


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str


class NoPlotter:
    """Stands for the child process that draws."""

    def __init__(self, run: object) -> None: ...

    def update(self) -> None: ...

    def finish(self) -> None: ...


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def place(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder of its own, one thread, a common cache, no plots."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PITSTOP_CACHE", str(cache))
    monkeypatch.setattr("pitstop.engine.journal.Plotter", NoPlotter)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(before)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line in this process."""

    def command(*arguments: object) -> Said:
        capfd.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        return Said(code, *capfd.readouterr())

    return command


@pytest.fixture
def refused(command: Command) -> Callable[..., str]:
    """Runs a command that must be refused, with one line and nothing else; returns the line."""

    def refused(*arguments: object) -> str:
        said = command(*arguments)
        assert said.code == 2, said
        assert said.err.startswith("pitstop: "), said.err
        assert said.err.count("\n") == 1, said.err
        return said.err.removeprefix("pitstop: ").rstrip("\n")

    return refused


TINY = (
    *("--epochs", "2"),
    *("--set", "model.kwargs={layers: [1, 1, 0, 0], channels: [8, 16, 16, 16]}"),
    "--set",
    "phases=[{name: a, duration: 50%, resolution: 12, data_fraction: 0.2},"
    " {name: b, resolution: 16, data_fraction: 0.2}]",
)
"""The demo recipe in two phases of nine steps, with an evaluation and a checkpoint after each."""

TRAIN = ("train", "demo", *TINY, "--workers", "2")


@pytest.fixture
def settings() -> tuple[str, ...]:
    """What makes the demo recipe tiny."""
    return TINY


@pytest.fixture
def tiny() -> tuple[str, ...]:
    """The command that trains it, but for its --out."""
    return TRAIN


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PITSTOP_CACHE", str(cache))
        patch.setattr("pitstop.engine.journal.Plotter", NoPlotter)
        assert cli.run([*TRAIN, "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(trained: Path, place: Path) -> Path:
    """A finished run: `run` in the current directory."""
    shutil.copytree(trained, place / "run")
    return Path("run")


@pytest.fixture
def content() -> Callable[[Path], dict[str, tuple[int, bytes]]]:
    """Returns what is in a folder: bytes and times, so that a file written anew is seen too."""

    def content(folder: Path) -> dict[str, tuple[int, bytes]]:
        return {
            str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".lock"
        }

    return content
