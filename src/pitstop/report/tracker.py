"""Tells trackers of a run while training goes on: each in a child process, never in its way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from pitstop.core.tracking import Tracking
from pitstop.io.run_directory import RunDirectory
from pitstop.report.plotter import LOWEST_PRIORITY
from pitstop.report.track import State, open_state, read_state

LOOK_SECONDS = 5.0
"""From one look at a child to the next."""

AGAIN_AFTER = 600.0
"""Seconds from a failure to the next try: the network may be back, or somebody has logged in."""

ENDED_SECONDS = 30.0
"""How long a run that ends waits for its trackers."""

INTERRUPTED_SECONDS = 5.0
"""How long an interrupted one does: what is missing is sent when it goes on."""

PROJECT = "pitstop"


class Trackers:
    """The children of a run's trackers.

    None of it raises: what a child has to say, and why one failed, is returned as lines.

    Args:
        run: whose records they follow.
        tracking: which, and what they call it.
    """

    def __init__(
        self,
        run: RunDirectory,
        tracking: Tracking,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._all = [_Tracker(run, tracking, name, clock) for name in tracking.trackers]

    def update(self) -> list[str]:
        """Starts the children, and hears them; returns at once."""
        return [line for tracker in self._all for line in tracker.update()]

    def end(self) -> None:
        """Has them send what they have, and end; returns at once."""
        for tracker in self._all:
            tracker.end()

    def finish(self, *, hurried: bool = False) -> list[str]:
        """Ends them and waits; who takes longer than is waited for is killed."""
        self.end()
        until = self._clock() + (INTERRUPTED_SECONDS if hurried else ENDED_SECONDS)
        return [line for tracker in self._all for line in tracker.finish(until)]


class _Tracker:
    """The child of one tracker."""

    def __init__(
        self, run: RunDirectory, tracking: Tracking, name: str, clock: Callable[[], float]
    ) -> None:
        self._name, self._file = name, run.tracker(name)
        title = tracking.name or run.path.resolve().name
        # No secret is among these: a tracker finds its own in the environment, or the home.
        # -P: a file named like a module, in the user's current directory, must not be imported.
        module = ("-P", "-m", "pitstop.report.track")
        self._arguments = [*module, name, str(run.path), tracking.project or PROJECT, title]
        self._clock = clock
        self._next = -float("inf")
        """When to look at the child, or to start one."""
        self._child: subprocess.Popen[bytes] | None = None
        self._said: set[str] = set()

    def update(self) -> list[str]:
        if self._clock() < self._next:
            return []
        self._next = self._clock() + LOOK_SECONDS
        return self._start() if self._child is None else self._hear(self._child)

    def end(self) -> None:
        if self._child is not None:
            assert self._child.stdin is not None
            self._child.stdin.close()

    def finish(self, until: float) -> list[str]:
        child = self._child
        if child is None:
            return []
        try:
            child.wait(max(0.0, until - self._clock()))
        except subprocess.TimeoutExpired:
            state = self._state(child)
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            self._child = None
            return [*self._located(state), *self._once("took too long and was stopped")]
        return self._hear(child)

    def _start(self) -> list[str]:
        try:
            open_state(self._file)  # the run's id: copies of the run must have it from the start
            self._child = subprocess.Popen(
                [sys.executable, *self._arguments],
                stdin=subprocess.PIPE,  # its end, also when this process is killed, ends the child
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for the training
            )
            os.setpriority(os.PRIO_PROCESS, self._child.pid, LOWEST_PRIORITY)
        except OSError as error:
            return self._failed(str(error))
        return []

    def _hear(self, child: subprocess.Popen[bytes]) -> list[str]:
        code = child.poll()
        state = self._state(child)
        if code is None:
            return self._located(state)
        self.end()
        self._child = None
        if code == 0:
            return self._located(state)
        problem = state.problem if state is not None else None
        return [*self._located(state), *self._failed(problem or f"exit code {code}")]

    def _state(self, child: subprocess.Popen[bytes]) -> State | None:
        """Returns what this child has written; None as long as it has not."""
        state = read_state(self._file)
        return state if state is not None and state.pid == child.pid else None

    def _located(self, state: State | None) -> list[str]:
        return [] if state is None or state.where is None else self._once(state.where)

    def _failed(self, problem: str) -> list[str]:
        self._next = self._clock() + AGAIN_AFTER
        return self._once(f"{problem}; training goes on without it")

    def _once(self, what: str) -> list[str]:
        line = f"{self._name}: {what}"
        if line in self._said:
            return []
        self._said.add(line)
        return [line]
