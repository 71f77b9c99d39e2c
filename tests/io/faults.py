"""An S3 server that fails on demand: a proxy on loopback before one that works."""

import re
import socket
import struct
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Literal
from urllib.parse import unquote, urlsplit

Kind = Literal["error", "deny", "reset", "lose", "stall", "truncate", "flip"]
"""error: 500. deny: 403. reset: the connection breaks at once. lose: it breaks when all is done.
stall: nothing happens until the server is healed; then all goes its way. truncate: half of what is
put arrives. flip: one bit of what is put, or got, is another one."""


@dataclass
class Fault:
    """What is to happen to requests."""

    kind: Kind
    pattern: re.Pattern[str]
    times: int | None


class FaultyS3(ThreadingHTTPServer):
    """Passes requests on, but for those with a fault.

    Args:
        upstream: the URL of the server that works. Of its conditional writes (`If-None-Match`) one
            is done at a time: moto's are not atomic.
    """

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream)
        self.asked: list[str] = []
        """`METHOD key` of each request, in the order in which they came."""
        self.stalled = Event()
        """Set when a request stalls."""
        self.healed = Event()
        self.conditional = Lock()
        self._faults: list[Fault] = []
        self._lock = Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def inject(self, kind: Kind, pattern: str, times: int | None = None) -> None:
        """Has requests fail.

        Args:
            pattern: a regular expression for what `asked` has of them.
            times: so many of them; None is all, until the server is healed.
        """
        self.healed.clear()
        self.stalled.clear()
        with self._lock:
            self._faults.append(Fault(kind, re.compile(pattern), times))

    def heal(self) -> None:
        """Ends all faults."""
        with self._lock:
            self._faults.clear()
        self.healed.set()

    def fault_of(self, request: str) -> Kind | None:
        """Notes a request and returns what is to happen to it."""
        with self._lock:
            self.asked.append(request)
            for fault in self._faults:
                if fault.pattern.search(request) and fault.times != 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault.kind
        return None

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is gone is no error."""


@contextmanager
def faulty_s3(upstream: str) -> Generator[FaultyS3]:
    """Runs a proxy before an S3 server."""
    with FaultyS3(upstream) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.heal()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultyS3

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def _handle(self) -> None:
        key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")[2]
        fault = self.server.fault_of(f"{self.command} {key}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault == "reset":
            self._break()
        elif fault == "error":
            self._answer(500, {}, b"<Error><Code>InternalError</Code></Error>")
        elif fault == "deny":
            who = b"<Message>AKIAEXAMPLE may not</Message>"
            self._answer(403, {}, b"<Error><Code>AccessDenied</Code>" + who + b"</Error>")
        else:
            self._pass_on(body, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815 - http.server's names

    def _pass_on(self, body: bytes, fault: Kind | None) -> None:
        if fault == "stall":
            self.server.stalled.set()
            self.server.healed.wait()
        if fault == "truncate":
            body = body[: len(body) // 2]
        if fault == "flip":
            body = _flipped(body)
        if self.headers.get("If-None-Match"):
            with self.server.conditional:
                response, content = self._ask(body)
        else:
            response, content = self._ask(body)
        if fault == "lose":
            self._break()
        else:
            content = _flipped(content) if fault == "flip" else content
            self._answer(response.status, dict(response.getheaders()), content)

    def _ask(self, body: bytes) -> tuple[HTTPResponse, bytes]:
        where = self.server.upstream
        connection = HTTPConnection(where.hostname or "", where.port)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _OF_ONE_HOP}
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        length = {k.lower(): v for k, v in headers.items()}.get("content-length")
        for name, value in headers.items():
            if name.lower() not in _OF_ONE_HOP:
                self.send_header(name, value)
        of_head = self.command == "HEAD" and length is not None
        self.send_header("Content-Length", str(length if of_head else len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _break(self) -> None:
        """Closes the connection with a reset."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


_OF_ONE_HOP = ("connection", "content-length", "transfer-encoding", "server", "date")


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return (
        content[:middle]
        + bytes(byte ^ 1 for byte in content[middle : middle + 1])
        + content[middle + 1 :]
    )
