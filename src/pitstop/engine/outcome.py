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

NOT_DURABLE = Outcome("not durable", exit_codes.INTERNAL)
BUDGET_SPENT = Outcome("budget spent", exit_codes.BUDGET_SPENT)

OUTCOMES = (FINISHED, TARGET_MET, INTERRUPTED, BUDGET_SPENT, NOT_DURABLE, DIVERGED)
