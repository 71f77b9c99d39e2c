"""What each contender is asked to do, and what several of them share."""

import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)

COPIES = 200
"""How often a list of images is repeated: an epoch is longer than a pass."""

Batches = Generator[Any, None, None]
Pipeline = Callable[[], Batches]


@dataclass(frozen=True)
class Task:
    """A pipeline to run."""

    cache: Path
    """Where the images are, and what the contenders make of them."""
    variant: str
    """Which of a contender's ways or files; empty where there is one."""
    cores: int
    resolution: int
    batch_size: int

    @property
    def images(self) -> Path:
        """The original images, in a folder a class."""
        return self.cache / "originals" / "train"


@contextmanager
def made_once(path: Path) -> Iterator[Path | None]:
    """Gives a place to write to, which becomes `path` when all went well; None if it is there."""
    if path.exists():
        yield None
        return
    unfinished = path.with_name(f".{path.name}")
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    unfinished.unlink(missing_ok=True)
    yield unfinished
    unfinished.rename(path)


def labelled(folder: Path) -> list[tuple[Path, int]]:
    """Returns the files of a class folder with their class indices, by name."""
    classes = sorted(path.name for path in folder.iterdir())
    return [(file, label) for label, name in enumerate(classes) for file in _files(folder / name)]


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())
