"""Exit codes, and how a rank leaves its own to whoever started it."""

FINISHED = 0
BAD_INPUT = 2
INTERNAL = 70
INTERRUPTED = 75
DIVERGED = 76
KILLED = 130
"""Interrupted twice."""

DECIDED = (FINISHED, BAD_INPUT, INTERRUPTED, DIVERGED, KILLED)
"""Those that a run comes to by its own decision: nobody should start its ranks again."""

OUTCOME = "PITSTOP_OUTCOME"
"""Names, in the environment of a rank, the file for its machine's exit code."""
