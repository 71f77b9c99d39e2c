"""Preemption: the news that the process must end soon. It only sets flags.

It comes as a signal, or from what a machine that may be taken away offers: EC2's instance metadata,
a file that appears, a command that says so.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol
from urllib.parse import urlsplit

from pitstop.core.errors import InputError

SIGNALS = (signal.SIGTERM, signal.SIGINT)

POLL_SECONDS = 5.0
"""How often to look for a notice; what AWS recommends for its two minutes."""

ANSWER_SECONDS = 1.0
"""How long the metadata service may take; on an instance it takes milliseconds."""

LEAVE_SECONDS = 0.5
"""How long the end of the watch may take: as long as it takes to kill a command."""

ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
TOKEN = "X-aws-ec2-metadata-token"
TOKEN_TTL = "X-aws-ec2-metadata-token-ttl-seconds"
TOKEN_SECONDS = 21_600
LONGEST_ANSWER = 512
"""In bytes; tokens and notices have less than 100."""

NOT_STARTED = (126, 127)
"""The shell's exit codes for a command that may not be run, and for one that is not there."""


@dataclass(frozen=True)
class Notice:
    """News from a machine: it will be taken away, or (`at_risk`) it may be before long."""

    text: str
    at_risk: bool = False


class NoticeSource(Protocol):
    """Where notices come from."""

    def watch(self, ended: threading.Event) -> Iterator[Notice | None]:
        """Looks once for each item, and yields what is new; ends when nothing can come from it.

        Runs in a thread. Whatever takes long ends when `ended` is set.
        """
        ...


def notice_sources(
    file: Path | None = None,
    command: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> list[NoticeSource]:
    """Returns what there is to watch on this machine besides signals.

    Args:
        file: its appearance is a notice (`--preemption-file`).
        command: for the shell; its exit code 0 is a notice (`--preemption-command`).
        environment: AWS_EC2_METADATA_DISABLED=true, AWS_EC2_METADATA_SERVICE_ENDPOINT.

    Raises:
        InputError: the command is empty, or the endpoint no URL.
    """
    sources: list[NoticeSource] = []
    if environment.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true":
        sources.append(Ec2(environment.get(ENDPOINT) or "http://169.254.169.254"))
    if file is not None:
        sources.append(FileHook(file))
    if command is not None:
        sources.append(CommandHook(command))
    return sources


class Preemption:
    """Watches, while it is entered, for SIGTERM, SIGINT, and notices.

    The first signal, or a notice, asks for a stop at the next step; a second SIGINT (Ctrl-C twice)
    interrupts at once. Whoever loops polls `requested`, and saves where it is `at_risk`.

    Args:
        notices: what to watch besides signals, in a thread; see `notice_sources`. One process of a
            machine is enough.
        poll_seconds: how often.
    """

    def __init__(
        self, notices: Sequence[NoticeSource] = (), *, poll_seconds: float = POLL_SECONDS
    ) -> None:
        self.reason: str | None = None
        self.at_risk = False
        """Whether the machine may be taken away before long, and nothing was saved since."""
        self._notices, self._poll_seconds = notices, poll_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)

    @property
    def requested(self) -> bool:
        """Whether a stop has been asked for."""
        return self.reason is not None

    def saved(self) -> None:
        """Notes that the state was saved: it is at risk no more, until the next notice."""
        self.at_risk = False

    def __enter__(self) -> "Preemption":
        self._before = {number: signal.signal(number, self._notice) for number in SIGNALS}
        if self._notices:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._notices:
            self._thread.join(LEAVE_SECONDS)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    # In the thread

    def _watch(self) -> None:
        watches = [source.watch(self._ended) for source in self._notices]
        while True:
            watches = [watch for watch in watches if self._looked(watch)]
            if not watches or self.requested or self._ended.wait(self._poll_seconds):
                return

    def _looked(self, watch: Iterator[Notice | None]) -> bool:
        """Notes what is new; returns whether to look there again."""
        try:
            notice = next(watch)
        except StopIteration:
            return False
        except Exception as error:
            _say(f"a watch for preemption has failed and ends: {error!r}")
            return False
        if notice is not None and notice.at_risk:
            self.at_risk = True
        elif notice is not None:
            self.reason = self.reason or notice.text
        return True


class FileHook:
    """A file whose appearance is a notice."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def watch(self, ended: threading.Event) -> Iterator[Notice | None]:
        """Looks whether the file is there; where one may not look, there is none."""
        while True:
            there = False
            with suppress(OSError):
                there = self._path.exists()
            yield Notice(f"{self._path} exists") if there else None


class CommandHook:
    """A command of the shell whose exit code 0 is a notice.

    It reads nothing, and what it prints is thrown away. One that takes longer than `seconds` is
    killed with all it started.

    Raises:
        InputError: it is empty.
    """

    def __init__(self, command: str, *, seconds: float = POLL_SECONDS) -> None:
        if not command.strip():
            raise InputError("--preemption-command: is empty: give a command, or leave it out")
        self._command, self._seconds = command, seconds

    def watch(self, ended: threading.Event) -> Iterator[Notice | None]:
        """Runs the command; one that cannot be started is told, and not tried again."""
        while (code := self._exit_code(ended)) not in NOT_STARTED:
            yield Notice(f"{self._command!r} says so") if code == 0 else None
        _say(f"--preemption-command {self._command!r}: cannot be started (exit code {code})")

    def _exit_code(self, ended: threading.Event) -> int | None:
        """Returns the command's exit code, None where there is none in time."""
        try:
            process = subprocess.Popen(
                self._command,
                shell=True,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except OSError:  # no memory, no processes left: perhaps the next time
            return None
        until = time.monotonic() + self._seconds
        while process.poll() is None:
            if time.monotonic() > until or ended.wait(0.02):
                with suppress(ProcessLookupError, PermissionError):  # as macOS says it
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return None
        return process.returncode


class Ec2:
    """Spot interruption notices and rebalance recommendations, of EC2's metadata service.

    By IMDSv2 only, and never by a proxy: "Use the Instance Metadata Service", "Spot Instance
    interruption notices" and "EC2 instance rebalance recommendations" in the EC2 user guide.

    Args:
        endpoint: the service's URL.

    Raises:
        InputError: it is no URL.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            parts = urlsplit(endpoint)
            self._host, self._port = parts.hostname or "", parts.port or 80
        except ValueError:
            self._host = ""
        if not self._host or not endpoint.startswith("http://"):
            raise InputError(f"{ENDPOINT}={endpoint}: is no URL: write it as http://HOST[:PORT]")
        self._token = ""
        self._renew_at = 0.0

    def watch(self, ended: threading.Event) -> Iterator[Notice | None]:
        """Looks for a notice, if the service is there at all; its errors are those of the moment.

        A recommendation stays where it is for good, and is yielded once.
        """
        if not self._is_there():
            return
        told = None
        while True:
            action = self._read("spot/instance-action")
            advice = self._read("events/recommendations/rebalance")
            if "action" in action:
                yield Notice(f"EC2 spot notice: {action['action']} at {action.get('time')}")
            elif "noticeTime" in advice and advice != told:
                told = advice
                yield Notice("EC2 rebalance recommendation", at_risk=True)
            else:
                yield None

    def _is_there(self) -> bool:
        """Tells whether somebody gives tokens here, though not perhaps at this moment."""
        try:
            self._renew()
        except NoTokenError as error:
            return error.status >= 500
        except (HTTPException, ValueError):
            return True
        except OSError:
            return False
        return True

    def _read(self, item: str) -> dict[str, Any]:
        """Returns the JSON mapping of an item; an empty one while there is none to be had."""
        try:
            if time.monotonic() >= self._renew_at:
                self._renew()
            status, body = self._get(item)
            if status == 401:
                self._renew()
                status, body = self._get(item)
            value = json.loads(body) if status == 200 else None
        except (OSError, HTTPException, ValueError):
            value = None
        return value if isinstance(value, dict) else {}

    def _get(self, item: str) -> tuple[int, bytes]:
        return self._ask("GET", f"/latest/meta-data/{item}", {TOKEN: self._token})[:2]

    def _renew(self) -> None:
        """Takes a new token, to be renewed long before it expires.

        Raises:
            NoTokenError: with the status of the answer.
            ValueError: what the answer holds is no token.
            OSError, HTTPException: nobody answers, or not as HTTP.
        """
        asked = {TOKEN_TTL: str(TOKEN_SECONDS)}
        status, body, seconds = self._ask("PUT", "/latest/api/token", asked)
        if status != 200:
            raise NoTokenError(status)
        if not re.fullmatch(rb"[!-~]+", body):
            raise ValueError("no token")
        self._token = body.decode()
        self._renew_at = time.monotonic() + int(seconds or TOKEN_SECONDS) / 2

    def _ask(
        self, method: str, path: str, headers: dict[str, str]
    ) -> tuple[int, bytes, str | None]:
        """Returns the answer's status, its body, and for how long a token in it is good."""
        connection = HTTPConnection(self._host, self._port, timeout=ANSWER_SECONDS)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read(LONGEST_ANSWER), answer.getheader(TOKEN_TTL)
        finally:
            connection.close()


class NoTokenError(HTTPException):
    """The metadata service gives no token."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def _say(line: str) -> None:
    """Prints a line for the user."""
    print(f"pitstop: {line}", file=sys.stderr, flush=True)
