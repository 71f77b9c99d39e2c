"""Exit codes, and what a launcher and its ranks tell each other in the environment."""

FINISHED = 0
BAD_INPUT = 2
INTERNAL = 70
INTERRUPTED = 75
DIVERGED = 76
BUDGET_SPENT = 77
KILLED = 130
"""Interrupted twice."""

DECIDED = (FINISHED, BAD_INPUT, INTERRUPTED, DIVERGED, BUDGET_SPENT, KILLED)
"""Those that a run comes to by its own decision: nobody should start its ranks again."""

OUTCOME = "PITSTOP_OUTCOME"
"""Names, in the environment of a rank, the file for its machine's exit code."""

LAUNCHER = "PITSTOP_LAUNCHER"
"""Holds the launcher's process id: ranks do not outlive it."""

RESTARTED = "PITSTOP_RESTARTED"
"""Is set where the launcher has started ranks before."""
