"""What the trackers' stand-ins keep: a line a call in a file of the folder FAKE_SERVER."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ["FAKE_SERVER"])


def trouble(tracker: str) -> str | None:
    """Returns what is wrong with a tracker: the content of a file of the test."""
    file = FOLDER / f"{tracker}.trouble"
    return file.read_text() if file.exists() else None


def imported(tracker: str) -> None:
    """Fails as an import does where the package is missing."""
    if trouble(tracker) == "missing":
        raise ModuleNotFoundError(f"No module named {tracker!r}", name=tracker)


def call(tracker: str, what: str, **values: Any) -> None:
    """Notes a call; hangs or raises where that is the trouble."""
    if trouble(tracker) == f"hangs in {what}":
        signal.pause()
    if (trouble(tracker) or "").startswith(f"raises in {what}: "):
        raise RuntimeError(trouble(tracker).removeprefix(f"raises in {what}: "))
    line = {"what": what, "command": sys.orig_argv, **values}
    with (FOLDER / f"{tracker}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def calls(tracker: str, what: str) -> list[dict[str, Any]]:
    """Returns the calls of a kind so far."""
    file = FOLDER / f"{tracker}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line for line in map(json.loads, lines) if line["what"] == what]
