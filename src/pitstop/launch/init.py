"""The duties of process 1, which in a container is whatever was started there.

The kernel gives it the orphans to collect, and withholds from it each signal it has no handler for.
"""

import os
import signal

FORWARDED = frozenset(
    {
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGQUIT,
    }
)

SI_KERNEL = 0x80
"""sigaction(2): no process has sent it."""

BY_KEY = (signal.SIGINT, signal.SIGQUIT)
"""What a terminal sends for a key goes to all in its foreground, so the child has it already."""


def leave_process_1() -> None:
    """Goes on in a child, where this is process 1, which stays behind as its init.

    Does nothing in any other process. To be called before there are threads.
    """
    if os.getpid() == 1:
        run_under_init()


def run_under_init() -> None:
    """Forks: the child returns, this process serves it and exits with its exit code (Linux)."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED | {signal.SIGCHLD})
    child = os.fork()
    if child:
        os._exit(_serve(child))
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(child: int) -> int:
    """Passes signals on and collects orphans until the child ends.

    Returns:
        the child's exit code, 128 + n if signal n ended it.
    """
    while True:
        came = signal.sigwaitinfo(FORWARDED | {signal.SIGCHLD})
        if came.si_signo == signal.SIGCHLD:
            code = _collect(child)
            if code is not None:
                return code
        elif came.si_signo not in BY_KEY or came.si_code != SI_KERNEL:
            os.kill(child, came.si_signo)  # until it is collected, it is there


def _collect(child: int) -> int | None:
    """Collects all that has ended; returns the child's exit code if that is among it."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if pid == 0:
            return None
