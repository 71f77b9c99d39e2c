"""Draws the plots while training goes on: in a child process, now and then, never in its way."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO

from pitstop.io.run_directory import RunDirectory

HANGS_AFTER = 120.0
"""Seconds after which a child is given up."""

LOWEST_PRIORITY = 19
"""Of a process, to the system's scheduler (nice)."""


class Plotter:
    """Draws a run's plots in a child process.

    A plot that fails never raises: `update` and `finish` return a line to say, once per failure
    that is new, and None when all is well.

    Args:
        run: whose plots.
        every_seconds: at least this from one start to the next.
    """

    def __init__(
        self,
        run: RunDirectory,
        every_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._every = every_seconds
        self._clock = clock
        self._started = -float("inf")
        self._child: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._said: str | None = None

    def update(self) -> str | None:
        """Starts drawing if it is time and the last child is done; returns at once."""
        problem = self._collect(wait_seconds=0.0)
        if self._child is None and self._clock() - self._started >= self._every:
            problem = self._start() or problem
        return self._once(problem)

    def finish(self, timeout_seconds: float = 60.0) -> str | None:
        """Waits for a running child, draws once more and waits; each at most `timeout_seconds`."""
        self._collect(timeout_seconds, give_up=True)
        problem = self._start() or self._collect(timeout_seconds, give_up=True)
        return self._once(problem)

    def _start(self) -> str | None:
        self._started = self._clock()
        # -P: a file named like a module, in the user's current directory, must not be imported.
        command = [sys.executable, "-P", "-m", "pitstop.report.plots", str(self._run.path)]
        try:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                # Ctrl-C is for the training. A session of its own would keep it away too, but Linux
                # shares the processor between sessions first (sched(7), autogroup).
                process_group=0,
            )
            os.setpriority(os.PRIO_PROCESS, self._child.pid, LOWEST_PRIORITY)  # imports included
        except OSError as error:
            if self._errors is not None:
                self._errors.close()
            return str(error)
        return None

    def _collect(self, wait_seconds: float, *, give_up: bool = False) -> str | None:
        """Lets go of a child that is done or given up; returns what was wrong with it."""
        if self._child is None:
            return None
        give_up = give_up or self._clock() - self._started > HANGS_AFTER
        try:
            code = self._child.wait(wait_seconds)
        except subprocess.TimeoutExpired:
            if not give_up:
                return None
            self._child.kill()
            self._child.wait()
            code = None
        said = self._last_line()
        self._child = None
        if code is None:
            return "took too long and was stopped"
        return (said or f"exit code {code}") if code else None

    def _last_line(self) -> str:
        assert self._errors is not None
        with self._errors as file:
            file.seek(0)
            lines = file.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _once(self, problem: str | None) -> str | None:
        if problem is None or problem == self._said:
            return None
        self._said = problem
        return f"plots were not drawn: {problem}"
