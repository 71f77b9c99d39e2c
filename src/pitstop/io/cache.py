"""Where pitstop keeps what it can make again: packed datasets, downloads, what it has measured."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """Returns $PITSTOP_CACHE, else $XDG_CACHE_HOME/pitstop, else ~/.cache/pitstop."""
    if place := os.environ.get("PITSTOP_CACHE"):
        return Path(place).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "pitstop"
