"""EC2's metadata service, on loopback."""

import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SPOT, REBALANCE = "spot/instance-action", "events/recommendations/rebalance"
TERMINATE = {"action": "terminate", "time": "2026-01-01T08:22:00Z"}


@dataclass
class Answer:
    status: int
    body: bytes = b""


class Metadata(ThreadingHTTPServer):
    """EC2's metadata service, version 2: a token by PUT, 401 without a good one, 404 if nothing."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), MetadataHandler)
        self.now = 0.0
        self.way = 0.0
        """The seconds that a question and an answer are on their way."""
        self.ttl = 21_600
        self.tokens: dict[str, float] = {}
        """Until when each is good."""
        self.items: dict[str, object] = {}
        """What is served as JSON, or an answer of another kind."""
        self.instead: dict[str, Answer | bytes] = {}
        """What is answered in place of a PUT or a GET."""
        self.answered: list[tuple[str, int]] = []
        self.asked, self.released = threading.Event(), threading.Event()
        self.released.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, method: str, path: str, headers: Message) -> Answer | bytes:
        self.now += self.way
        try:
            return self.answer_at_once(method, path, headers)
        finally:
            self.now += self.way

    def answer_at_once(self, method: str, path: str, headers: Message) -> Answer | bytes:
        if (instead := self.instead.get(method)) is not None:
            return instead
        if method == "PUT" and path == "/latest/api/token":
            assert headers["X-aws-ec2-metadata-token-ttl-seconds"] == "21600"
            token = f"AQAEA{len(self.tokens)}-_=="
            self.tokens[token] = self.now + self.ttl
            return Answer(200, token.encode())
        if self.tokens.get(headers["X-aws-ec2-metadata-token"], 0) <= self.now:
            return Answer(401)
        item = self.items.get(path.removeprefix("/latest/meta-data/"), Answer(404))
        return item if isinstance(item, Answer | bytes) else Answer(200, json.dumps(item).encode())


class MetadataHandler(BaseHTTPRequestHandler):
    server: Metadata  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.server.asked.set()
        self.server.released.wait()
        answer = self.server.answer(self.command, self.path, self.headers)
        if isinstance(answer, bytes):  # is no HTTP
            self.server.answered.append((self.command, 0))
            self.wfile.write(answer)
            return
        self.server.answered.append((self.command, answer.status))
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(answer.body)))
        if self.command == "PUT":
            self.send_header("X-aws-ec2-metadata-token-ttl-seconds", str(self.server.ttl))
        if answer.status == 302:
            self.send_header("Location", answer.body.decode())
        self.end_headers()
        self.wfile.write(answer.body)

    do_PUT = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def serving() -> Generator[Metadata]:
    with Metadata() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
