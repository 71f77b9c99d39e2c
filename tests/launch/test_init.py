"""Process 1: real namespaces, real signals, real orphans."""

import os
import pty
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(sys.platform != "linux", reason="process 1 of Linux"),
]

HEAD = """
import os, signal, subprocess, sys, time
from pitstop.launch.init import leave_process_1, run_under_init

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def wait_for_signals(count, *numbers):
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    say("ready")
    for _ in range(count):
        say(signal.Signals(signal.sigwait(numbers)).name)
"""

NAMESPACE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
NAMESPACE += ["--kill-child"]

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python on a script, behind a command; ends what is left of it."""
    running: list[subprocess.Popen[str]] = []

    def start(script: str, *before: str, **options) -> subprocess.Popen[str]:
        command = [*before, sys.executable, "-c", HEAD + textwrap.dedent(script)]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        running.append(subprocess.Popen(command, text=True, **{**streams, **options}))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def start_as_1(start) -> Callable[[str], subprocess.Popen[str]]:
    """Starts Python on a script, as process 1 of a namespace of its own."""
    try:
        tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if tried.returncode != 0:
        pytest.skip(f"no namespaces here: {tried.stderr.strip()}")
    return lambda script: start(script, *NAMESPACE)


def lines(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(count)]


def process_1(unshare: subprocess.Popen[str]) -> int:
    """The process under `unshare` that is process 1 of its namespace."""
    with open(f"/proc/{unshare.pid}/task/{unshare.pid}/children") as file:  # noqa: PTH123
        return int(file.read())


def test_a_process_other_than_1_stays_what_it_is(start):
    process = start("""
        before = os.getpid()
        leave_process_1()
        say(os.getpid() == before, signal.pthread_sigmask(signal.SIG_BLOCK, []))
    """)
    assert lines(process, 1) == ["True set()"]
    assert process.wait() == 0


def test_process_1_goes_on_in_a_child_whose_exit_code_is_its_own(start_as_1):
    process = start_as_1("""
        say(os.getpid())
        leave_process_1()
        say(os.getpid() > 1, os.getppid(), signal.pthread_sigmask(signal.SIG_BLOCK, []))
        sys.exit(75)
    """)
    assert lines(process, 2) == ["1", "True 1 set()"]
    assert process.wait() == 75


def test_sigterm_to_process_1_reaches_the_child(start_as_1):
    """Process 1 has no handler for it: without its help, the kernel would drop it."""
    process = start_as_1("""
        leave_process_1()
        wait_for_signals(1, signal.SIGTERM)
        sys.exit(75)
    """)
    assert lines(process, 1) == ["ready"]
    os.kill(process_1(process), signal.SIGTERM)
    assert lines(process, 1) == ["SIGTERM"]
    assert process.wait() == 75


def test_a_child_that_a_signal_ends_gives_128_and_its_number(start_as_1):
    process = start_as_1("""
        leave_process_1()
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert process.wait() == 128 + signal.SIGKILL


def test_orphans_are_collected(start_as_1):
    """A zombie would stay in /proc: the orphan's end is awaited on its pipe, then its going."""
    process = start_as_1("""
        leave_process_1()
        reading, writing = os.pipe()
        orphan = "import os; os.write(1, str(os.getpid()).encode()); os.read(0, 1)"
        parent = f'import subprocess, sys; subprocess.Popen([sys.executable, "-c", "{orphan}"])'
        gate, opened = os.pipe()
        subprocess.run([sys.executable, "-c", parent], stdin=gate, stdout=writing)
        pid = int(os.read(reading, 100))
        with open(f"/proc/{pid}/stat") as file:
            say("its parent is", file.read().split()[3])
        os.write(opened, b"x")
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0.01)
        say("gone")
    """)
    assert lines(process, 2) == ["its parent is 1", "gone"]
    assert process.wait() == 0


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT"])
def test_the_signals_that_mean_something_are_passed_on(start, number):
    process = start(f"""
        run_under_init()
        wait_for_signals(1, signal.{number})
        sys.exit(3)
    """)
    assert lines(process, 1) == ["ready"]
    process.send_signal(signal.Signals[number])
    assert lines(process, 1) == [number]
    assert process.wait() == 3


def test_ctrl_c_in_a_terminal_is_one_sigint(start):
    """The terminal sends it to both; passed on, it would be the second, which ends a run at once.

    The init is held while the child gets its own, so that a second one could not be merged with it.
    """
    master, terminal = pty.openpty()
    try:
        process = start(
            """
            os.close(os.open(os.ttyname(0), os.O_RDWR))  # is its own from now on
            run_under_init()
            wait_for_signals(2, signal.SIGINT, signal.SIGUSR1)
            """,
            stdin=terminal,
            start_new_session=True,
        )
        assert lines(process, 1) == ["ready"]
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        os.write(master, b"\x03")
        assert lines(process, 1) == ["SIGINT"]
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGCONT)
        assert lines(process, 1) == ["SIGUSR1"]
        assert process.wait() == 0
    finally:
        os.close(master)
        os.close(terminal)


def test_a_terminal_that_goes_away_is_told_to_the_child(start):
    """The kernel tells the first process of the session only."""
    master, terminal = pty.openpty()
    with os.fdopen(terminal, "rb"):
        process = start(
            """
            os.close(os.open(os.ttyname(0), os.O_RDWR))  # is its own from now on
            run_under_init()
            wait_for_signals(1, signal.SIGHUP)
            """,
            stdin=terminal,
            start_new_session=True,
        )
        assert lines(process, 1) == ["ready"]
        os.close(master)
        assert lines(process, 1) == ["SIGHUP"]
        assert process.wait() == 0
