"""Signals to a real process: they set a flag, and end nothing."""

import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest

from pitstop.runtime.preemption import SIGNALS, Preemption

pytestmark = pytest.mark.timeout(60)

Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts Python on a script, after the imports; ends what is left of it."""
    running: list[subprocess.Popen[str]] = []

    def start(script: str) -> subprocess.Popen[str]:
        head = "import signal, sys\nfrom pitstop.runtime.preemption import Preemption\n"
        running.append(
            subprocess.Popen(
                [sys.executable, "-u", "-c", head + textwrap.dedent(script)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


WAITS_FOR_A_STOP = """
    with Preemption() as preemption:
        print(preemption.requested, preemption.reason)
        while not preemption.requested:
            pass
        print(preemption.reason)
    print("went on")
"""

WAITS_FOR_MORE = """
    with Preemption() as preemption:
        print("ready")
        before = None
        while True:
            if preemption.reason != before:
                before = preemption.reason
                print(before)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_the_process_goes_on(start, number):
    process = start(WAITS_FOR_A_STOP)
    assert line(process) == "False None"
    process.send_signal(number)
    assert line(process) == number.name
    assert line(process) == "went on"
    assert process.wait() == 0


def test_a_second_ctrl_c_interrupts_at_once(start):
    process = start(WAITS_FOR_MORE)
    assert line(process) == "ready"
    process.send_signal(signal.SIGINT)
    assert line(process) == "SIGINT"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT


def test_sigterm_as_often_as_it_comes_ends_nothing(start):
    """Clouds repeat themselves; a SIGTERM after a Ctrl-C, or before one, is a notice too."""
    process = start(WAITS_FOR_MORE)
    assert line(process) == "ready"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        assert line(process) == number.name
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait() == -signal.SIGINT


def test_a_system_call_that_waits_is_taken_up_again(start):
    """A signal in the middle of reading a file or a pipe is no error there."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-u",
            "-c",
            "import sys\n"
            "from pitstop.runtime.preemption import Preemption\n"
            "with Preemption() as p:\n"
            "    print('ready')\n"
            "    print(sys.stdin.readline().strip(), p.reason)\n",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert line(process) == "ready"
        process.send_signal(signal.SIGTERM)
        assert process.communicate("whole\n")[0].strip() == "whole SIGTERM"
    finally:
        process.kill()
        process.wait()


def test_after_the_block_sigterm_ends_the_process_again(start):
    process = start("""
        with Preemption():
            pass
        print("ready")
        signal.pause()
    """)
    assert line(process) == "ready"
    process.send_signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM


@pytest.mark.parametrize("number", SIGNALS)
def test_the_handlers_are_those_of_before_on_any_exit(number):
    def own(*_: object) -> None: ...

    default = signal.signal(number, own)
    try:
        with Preemption() as preemption:
            assert signal.getsignal(number) is not own
            signal.raise_signal(number)
        assert preemption.requested
        assert signal.getsignal(number) is own
        with pytest.raises(ZeroDivisionError), Preemption():
            raise ZeroDivisionError
        assert signal.getsignal(number) is own
    finally:
        signal.signal(number, default)


def test_each_watch_begins_anew():
    with Preemption() as first:
        signal.raise_signal(signal.SIGTERM)
        assert first.requested
    with Preemption() as second:
        assert not second.requested
