"""How a run, or this part of it, ends."""

from dataclasses import dataclass

from pitstop.core import exit_codes


@dataclass(frozen=True)
class Outcome:
    """A status for run.json and an exit code."""

    status: str
    exit_code: int


FINISHED = Outcome("finished", exit_codes.FINISHED)
TARGET_MET = Outcome("target met", exit_codes.FINISHED)
INTERRUPTED = Outcome("interrupted", exit_codes.INTERRUPTED)
DIVERGED = Outcome("diverged", exit_codes.DIVERGED)

OUTCOMES = (FINISHED, TARGET_MET, INTERRUPTED, DIVERGED)
