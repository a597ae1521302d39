"""A coordinator that somebody has taken over: it welcomes any worker, and then answers its polls with evil.

It speaks HTTP over a real socket, and remembers every call with its headers, so that a test can say what a worker did.
"""

import json
import threading
from collections import deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from common import PROTOCOL

PIECE = b" " * (1 << 20)


@dataclass
class Call:
    """One call that came."""

    method: str
    path: str
    token: str
    body: bytes

    @property
    def said(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    """What is answered. `pieces` of a megabyte follow the body, as long as anybody takes them."""

    status: int = 200
    body: Any = b""
    headers: tuple[tuple[str, str], ...] = ()
    pieces: int = 0


class HostileCoordinator:
    """A context manager. `answers` are given to the polls in turn; `files` to whoever asks for their path."""

    def __init__(self) -> None:
        self.answers: deque[Answer] = deque()
        self.files: dict[str, Answer] = {}
        self.calls: list[Call] = []
        self.sent = 0  # pieces
        self.welcome = "welcome"
        self._changed = threading.Condition()
        plays = self

        class Handler(_Handler):
            coordinator = plays

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """The worker hung up: some answers deserve it."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def heard(self, call: Call) -> None:
        with self._changed:
            self.calls.append(call)
            self._changed.notify_all()

    def next_poll(self, wait_s: float) -> Answer:
        with self._changed:
            self._changed.wait_for(lambda: bool(self.answers), wait_s)
            return self.answers.popleft() if self.answers else Answer(204)

    def abandoned(self) -> list[dict[str, Any]]:
        """What the worker has given back, and why."""
        with self._changed:
            return [call.said for call in self.calls if call.path.endswith("/abandon")]

    def asked_for(self, path: str) -> bool:
        with self._changed:
            return any(call.path == path for call in self.calls)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    coordinator: HostileCoordinator

    def log_message(self, *_: object) -> None:
        """The test says what it wants to know."""

    def _take(self) -> None:
        plays = self.coordinator
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        plays.heard(Call(self.command, self.path, self.headers.get("Authorization", ""), body))
        if self.path == "/version":
            self._answer(Answer(body={"version": "0.0.9", "protocol": PROTOCOL}))
        elif self.path == "/v1/workers":
            welcome = {"worker_id": "w-1", "credential": "lyd_work_secret", "protocol": PROTOCOL, "heartbeat_s": 5.0}
            self._answer(Answer(body={**welcome, "ttl_s": 40.0, "reason": plays.welcome}))
        elif self.path.endswith("/poll"):
            self._answer(plays.next_poll(0.2))
        elif self.path.endswith("/heartbeat"):
            self._answer(Answer(body={"order": "continue", "reason": "go on"}))
        elif self.path in plays.files:
            self._answer(self._ranged(plays.files[self.path]))
        elif self.path.partition("?")[0].endswith(("/abandon", "/leave")):
            self._answer(Answer(204))
        else:
            self._answer(Answer(404, {"code": "unknown", "sentence": "there is nothing", "advice": ""}))

    do_GET = do_POST = do_PUT = do_HEAD = _take

    def _ranged(self, file: Answer) -> Answer:
        """A file as a real coordinator gives it: the range that was asked for."""
        wanted = self.headers.get("Range", "")
        if file.status != 200 or not wanted.startswith("bytes="):
            return file
        start, _sign, stop = wanted.removeprefix("bytes=").partition("-")
        told = ("Content-Range", f"bytes {start}-{stop}/{len(file.body)}")
        return Answer(206, file.body[int(start) : int(stop) + 1], (*file.headers, told))

    def _answer(self, answer: Answer) -> None:
        raw = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        if answer.status != 204 and not any(name == "Content-Length" for name, _ in answer.headers):
            self.send_header("Content-Length", str(len(raw) + answer.pieces * len(PIECE)))
        self.end_headers()
        self.wfile.write(raw)
        for _ in range(answer.pieces):
            self.wfile.write(PIECE)
            self.coordinator.sent += 1
