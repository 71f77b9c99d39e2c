"""Real signals, notices of a real server: they set a flag, and end nothing."""

import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from pitstop.core.errors import InputError
from pitstop.runtime import preemption as preemption_module
from pitstop.runtime.preemption import (
    SIGNALS,
    CommandHook,
    Ec2,
    FileHook,
    Notice,
    NoticeSource,
    Preemption,
    notice_sources,
)

from .metadata import REBALANCE, SPOT, TERMINATE, Answer, Metadata, serving

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


# Notices of the machine


class Scripted:
    """Gives these notices, one at each look, and then no more; `told` is set after the last."""

    def __init__(self, *notices: Notice | None) -> None:
        self.notices = notices
        self.told = threading.Event()

    def watch(self, ended: threading.Event) -> Iterator[Notice | None]:
        yield from self.notices
        self.told.set()


class Endless:
    """Never has news; `looked` is set at each look."""

    def __init__(self) -> None:
        self.looked = threading.Event()

    def watch(self, ended: threading.Event) -> Iterator[Notice | None]:
        while True:
            self.looked.set()
            yield None


class Broken:
    def watch(self, ended: threading.Event) -> Iterator[Notice | None]:
        yield None
        raise RuntimeError("a bug")


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "preemption"]


def await_(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def looking(source: NoticeSource) -> Iterator[Notice | None]:
    return source.watch(threading.Event())


def ends(source: NoticeSource) -> bool:
    """Whether it is not looked at even once."""
    return next(looking(source), "nothing") == "nothing"


def test_a_notice_asks_for_a_stop_and_gives_its_reason():
    sources = [Endless(), Scripted(None, Notice("soon gone"))]
    with Preemption(sources, poll_seconds=0.01) as preemption:
        await_(lambda: preemption.requested)
    assert (preemption.reason, preemption.at_risk) == ("soon gone", False)


def test_a_risk_asks_for_a_save_only_until_it_was_saved():
    """Two notices are two saves."""
    first, second = Scripted(Notice("perhaps", at_risk=True)), threading.Event()

    class Later:
        def watch(self, ended: threading.Event) -> Iterator[Notice | None]:
            while not second.is_set():
                yield None
            yield Notice("again", at_risk=True)

    with Preemption([first, Later()], poll_seconds=0.01) as preemption:
        assert first.told.wait(30)
        assert (preemption.at_risk, preemption.requested) == (True, False)
        preemption.saved()
        assert not preemption.at_risk
        second.set()
        await_(lambda: preemption.at_risk)
    assert not preemption.requested


def test_a_signal_after_a_notice_is_a_notice_too():
    with Preemption([Scripted(Notice("soon gone"))]) as preemption:
        await_(lambda: preemption.requested)
        signal.raise_signal(signal.SIGTERM)
        assert preemption.reason == "SIGTERM"


def test_a_signal_is_not_forgotten_for_a_notice_that_comes_after_it():
    signalled = threading.Event()

    class AfterTheSignal:
        def watch(self, ended: threading.Event) -> Iterator[Notice | None]:
            signalled.wait()
            yield Notice("soon gone")

    with Preemption([AfterTheSignal()]) as preemption:
        signal.raise_signal(signal.SIGTERM)
        signalled.set()
        await_(lambda: not watchers())
    assert preemption.reason == "SIGTERM"


def test_without_anything_to_watch_there_is_no_thread(monkeypatch):
    nothing = notice_sources(environment={"AWS_EC2_METADATA_DISABLED": "true"})
    for sources in ((), nothing):
        with monkeypatch.context() as patch:
            start = Mock()
            patch.setattr(threading.Thread, "start", start)
            with Preemption(sources):
                start.assert_not_called()


def test_the_watch_ends_when_nothing_can_come_any_more():
    with Preemption([Scripted(), Scripted(None)], poll_seconds=0.01) as preemption:
        await_(lambda: not watchers())
    assert not preemption.requested


def test_the_watch_ends_with_the_block():
    """However long it is until it would look again."""
    endless = Endless()
    with Preemption([endless], poll_seconds=1000):
        assert endless.looked.wait(30)
        assert len(watchers()) == 1
    assert watchers() == []


def test_a_watch_that_fails_is_told_and_the_others_go_on(capsys):
    scripted = Scripted(*[None] * 5, Notice("soon gone"))
    with Preemption([Broken(), scripted], poll_seconds=0.01) as preemption:
        await_(lambda: preemption.requested)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pitstop: ")
    assert "RuntimeError('a bug')" in line


def test_a_watch_that_hangs_keeps_no_process_alive(start):
    process = start("""
        import threading
        hangs = threading.Event()
        class Hangs:
            def watch(self, ended):
                hangs.set()
                threading.Event().wait()
                yield None
        Preemption([Hangs()]).__enter__()
        hangs.wait()
        print("ends")
    """)
    assert line(process) == "ends"
    assert process.wait() == 0


# A file


def test_a_file_that_appears_is_a_notice(tmp_path):
    watch = looking(FileHook(tmp_path / "gone soon"))
    assert next(watch) is None
    (tmp_path / "gone soon").touch()
    assert next(watch) == Notice(f"{tmp_path / 'gone soon'} exists")


def test_a_place_where_one_cannot_look_holds_no_notice(tmp_path):
    watch = looking(FileHook(tmp_path / ("x" * 300)))
    assert [next(watch), next(watch)] == [None, None]


# A command


def test_a_command_says_so_by_its_exit_code(tmp_path, capfd):
    """It is the shell's: this one has a pipe. Whatever it prints is not for the user."""
    command = f"cat {tmp_path}/state | grep TRUE"
    watch = looking(CommandHook(command))
    assert next(watch) is None
    (tmp_path / "state").write_text("FALSE\n")
    assert next(watch) is None
    (tmp_path / "state").write_text("TRUE\n")
    assert next(watch) == Notice(f"{command!r} says so")
    assert capfd.readouterr() == ("", "")


def test_a_command_reads_nothing_of_what_is_for_pitstop():
    assert next(looking(CommandHook("cat"))) is not None


@pytest.fixture
def held_open(tmp_path) -> Iterator[int]:
    """A pipe by the name of `pipe`, which ends when nobody has it open for writing any more."""
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reading, True)
    yield reading
    os.close(reading)


def ends_of(pipe: int) -> bytes:
    """Returns what was written until all writers were gone."""
    with open(pipe, "rb", closefd=False) as file:
        return file.read()


HANGS = "(echo up; exec sleep 50) > {} & wait"


def test_a_command_that_hangs_is_killed_with_its_children_and_tried_again(tmp_path, held_open):
    hook = CommandHook(HANGS.format(tmp_path / "pipe"), seconds=0.5)
    watch = looking(hook)
    assert [next(watch), next(watch)] == [None, None]
    assert ends_of(held_open) == b"up\n" * 2


def test_a_command_that_runs_is_killed_with_its_children_at_the_end(tmp_path, held_open):
    hook = CommandHook(HANGS.format(tmp_path / "pipe"), seconds=1000)
    with Preemption([hook]):
        await_(lambda: select.select([held_open], [], [], 0)[0] != [])
        assert os.read(held_open, 3) == b"up\n"
    assert ends_of(held_open) == b""


def test_a_command_that_cannot_be_started_is_told_once(capsys):
    assert ends(CommandHook("/nowhere/at-all --now"))
    said = "pitstop: --preemption-command '/nowhere/at-all --now': cannot be started"
    assert capsys.readouterr().err.startswith(said)


def test_a_machine_that_can_start_no_process_now_may_do_so_later(monkeypatch):
    watch = looking(CommandHook("true"))
    with monkeypatch.context() as patch:
        full = BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        patch.setattr(subprocess, "Popen", Mock(side_effect=full))
        assert next(watch) is None
    assert next(watch) is not None


@pytest.mark.parametrize("command", ["", "  "])
def test_an_empty_command_is_bad_input(command):
    with pytest.raises(InputError, match=r"--preemption-command: is empty: give"):
        notice_sources(command=command)


# EC2


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with serving() as server:
        yield server


GONE = Notice("EC2 spot notice: terminate at 2026-01-01T08:22:00Z")
RISK = Notice("EC2 rebalance recommendation", at_risk=True)


def test_a_spot_notice_asks_for_a_stop(metadata):
    (source,) = notice_sources(environment={"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url})
    with Preemption([source], poll_seconds=0.01) as preemption:
        await_(lambda: metadata.answered.count(("GET", 404)) > 4)
        assert not preemption.requested
        metadata.items[SPOT] = TERMINATE
        await_(lambda: preemption.requested)
    assert (preemption.reason, preemption.at_risk) == (GONE.text, False)


def test_a_rebalance_recommendation_is_told_once(metadata):
    """It stays there for good; a save at each look would be all that is done from then on."""
    watch = looking(Ec2(metadata.url))
    assert next(watch) is None
    metadata.items[REBALANCE] = {"noticeTime": "2026-01-01T08:00:00Z"}
    assert [next(watch) for _ in range(3)] == [RISK, None, None]
    metadata.items[REBALANCE] = {"noticeTime": "2026-01-01T09:00:00Z"}
    assert [next(watch) for _ in range(2)] == [RISK, None]
    metadata.items[SPOT] = TERMINATE
    assert next(watch) == GONE


def test_a_token_is_renewed_before_it_expires(metadata, monkeypatch):
    """None is ever refused, though each is older than its receiver thinks."""
    monkeypatch.setattr(preemption_module, "time", SimpleNamespace(monotonic=lambda: metadata.now))
    metadata.ttl, metadata.way = 60, 2
    watch = looking(Ec2(metadata.url))
    for _ in range(40):
        assert next(watch) is None
        metadata.now += 1
    assert 401 not in {status for _, status in metadata.answered}
    assert 6 < len(metadata.tokens) < 20


def test_a_token_that_is_refused_is_renewed_and_nothing_missed(metadata):
    watch = looking(Ec2(metadata.url))
    assert next(watch) is None
    metadata.tokens.clear()
    metadata.items[SPOT] = TERMINATE
    assert next(watch) == GONE
    assert metadata.answered.count(("GET", 401)) == 1


NO_NOTICE = [
    Answer(500),
    Answer(503, json.dumps(TERMINATE).encode()),
    Answer(401),
    Answer(200),
    Answer(200, b"<html>log in here</html>"),
    Answer(200, b"\xff\xfe\x00"),
    Answer(200, b"[" * 5000),
    Answer(200, b'["action"]'),
    Answer(200, b'"action"'),
    Answer(200, b'{"other": "action"}'),
    b"SSH-2.0-OpenSSH\r\n",
    b"",
]


@pytest.mark.parametrize("item", [SPOT, REBALANCE])
@pytest.mark.parametrize("answer", NO_NOTICE)
def test_what_is_no_notice_is_none_and_the_watch_goes_on(metadata, item, answer):
    metadata.items[item] = answer
    watch = looking(Ec2(metadata.url))
    assert [next(watch), next(watch)] == [None, None]
    metadata.items[item] = {SPOT: TERMINATE, REBALANCE: {"noticeTime": "now"}}[item]
    assert next(watch) == {SPOT: GONE, REBALANCE: RISK}[item]


NO_TOKEN = [Answer(500), Answer(503), Answer(200), Answer(200, b"a\r\nb"), b"hello\r\n"]


@pytest.mark.parametrize("answer", NO_TOKEN)
@pytest.mark.parametrize("late", [False, True])
def test_a_service_that_gives_no_token_now_may_do_so_later(metadata, answer, late):
    watch = looking(Ec2(metadata.url))
    if late:
        assert next(watch) is None
        metadata.tokens.clear()
    metadata.items[SPOT] = TERMINATE
    metadata.instead["PUT"] = answer
    assert [next(watch), next(watch)] == [None, None]
    del metadata.instead["PUT"]
    assert next(watch) == GONE


@pytest.mark.parametrize("status", [400, 403, 404, 405])
def test_a_service_without_tokens_is_not_asked_for_anything(metadata, status):
    """One of version 1, or another cloud's, at the same address."""
    metadata.instead["PUT"] = Answer(status)
    metadata.instead["GET"] = Answer(200, json.dumps(TERMINATE).encode())
    assert ends(Ec2(metadata.url))
    assert metadata.answered == [("PUT", status)]


def test_version_1_is_not_used_either_when_version_2_has_gone(metadata):
    watch = looking(Ec2(metadata.url))
    metadata.instead["PUT"] = Answer(500)
    assert next(watch) is None
    metadata.instead = {"PUT": Answer(404), "GET": Answer(200, json.dumps(TERMINATE).encode())}
    assert next(watch) is None


def test_where_nobody_is_the_watch_ends(metadata):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = taken.getsockname()[1]
        assert ends(Ec2(f"http://127.0.0.1:{port}"))


def test_where_nobody_answers_in_time_the_watch_ends(metadata, monkeypatch):
    monkeypatch.setattr(preemption_module, "ANSWER_SECONDS", 0.1)
    metadata.released.clear()
    assert ends(Ec2(metadata.url))


def test_a_service_that_falls_silent_is_asked_again(metadata, monkeypatch):
    watch = looking(Ec2(metadata.url))
    assert next(watch) is None
    with monkeypatch.context() as patch:
        patch.setattr(preemption_module, "ANSWER_SECONDS", 0.1)
        metadata.released.clear()
        assert next(watch) is None
    metadata.released.set()
    metadata.items[SPOT] = TERMINATE
    assert next(watch) == GONE


def test_nobody_waits_for_the_metadata_service(metadata, monkeypatch):
    """Neither at the beginning nor at the end: it answers long after."""
    monkeypatch.setattr(preemption_module, "ANSWER_SECONDS", 1000)
    metadata.released.clear()
    with Preemption([Ec2(metadata.url)]) as preemption:
        assert metadata.asked.wait(30)
    assert not metadata.released.is_set()
    metadata.released.set()
    await_(lambda: not watchers())
    assert not preemption.requested


def test_neither_proxies_nor_redirects_are_followed(metadata, monkeypatch):
    """A token is for the metadata service alone."""
    with serving() as other:
        monkeypatch.setenv("http_proxy", other.url)
        monkeypatch.setenv("no_proxy", "")
        watch = looking(Ec2(metadata.url))
        metadata.items[REBALANCE] = Answer(302, f"{other.url}/elsewhere".encode())
        assert next(watch) is None
        metadata.items[SPOT] = TERMINATE
        assert next(watch) == GONE
        assert other.answered == []


@pytest.mark.parametrize("word", ["true", "TRUE"])
def test_what_aws_itself_lets_one_disable_is_disabled(metadata, word):
    environment = {
        "AWS_EC2_METADATA_DISABLED": word,
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url,
    }
    assert notice_sources(environment=environment) == []
    environment["AWS_EC2_METADATA_DISABLED"] = "false"
    assert len(notice_sources(environment=environment)) == 1


def test_by_default_the_service_is_where_ec2_has_it(monkeypatch):
    connect = Mock(side_effect=ConnectionRefusedError)
    monkeypatch.setattr(preemption_module, "HTTPConnection", connect)
    (source,) = notice_sources(environment={})
    assert ends(source)
    assert connect.call_args.args == ("169.254.169.254", 80)


@pytest.mark.parametrize(
    "url", ["169.254.169.254", "https://127.0.0.1", "http://", "http://[::1", "http://a:port"]
)
def test_an_endpoint_that_is_no_url_is_bad_input(url):
    with pytest.raises(InputError, match=r"^AWS_EC2_METADATA_SERVICE_ENDPOINT=.*write it as"):
        notice_sources(environment={"AWS_EC2_METADATA_SERVICE_ENDPOINT": url})


def test_all_that_is_named_is_watched(tmp_path):
    sources = notice_sources(tmp_path / "file", "true", environment={})
    assert [type(source) for source in sources] == [Ec2, FileHook, CommandHook]
