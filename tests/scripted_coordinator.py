"""A coordinator that a test plays by script, over a real socket: what it was asked, and what it answers.

Without a script it behaves: it takes uploads by ranges, and lets a result count once. `script[call]` is a list of what
happens to the next calls of that name instead; a call is the last word of its path, or upload, held, model.
"""

import base64
import hashlib
import json
import socket
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

from common import PROTOCOL
from common.errors import LydianError
from common.messages import Assignment, JobSpec, ModelRef, Range, TaskRef
from tests.fake_child import SAMPLES, model_bytes

MODEL = model_bytes(100_000)
DIGEST = hashlib.sha256(MODEL).hexdigest()


def assignment(number: int = 1, *, attempt: int = 1, **fields: Any) -> Assignment:
    """A shard to train, of a job whose model is MODEL."""
    given = {
        "id": f"job-1.train.{number}.0", "attempt": attempt, "job": "job-1", "kind": "train", "round": number,
        "shards": 1, "samples": Range(start=0, stop=5), "train_samples": SAMPLES, "task": TaskRef(name="digits"),
        "spec": JobSpec(task="digits"), "base": ModelRef(digest=DIGEST, size=len(MODEL)), "ttl_s": 40.0,
        "max_bytes": len(MODEL) + 1_000_000,
    }  # fmt: skip
    return Assignment.model_validate({**given, **fields})


@dataclass
class Call:
    """One call that came."""

    name: str
    body: dict[str, Any]
    path: str
    token: str = ""


@dataclass
class Lose:
    """Do what was asked, and break the line instead of answering."""


@dataclass
class Garble:
    """Do what was asked, and answer with the first byte of the body changed."""


@dataclass
class Hold:
    """Wait, and then break the line without having done anything but kept the first `after` bytes of an upload."""

    after: int = 0
    came: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)


Twist = Lose | Garble | Hold | LydianError | Callable[[], None]
Answer = tuple[Any, ...]  # status, body, headers: as many as there are


class ScriptedCoordinator:
    """Plays a coordinator on loopback. A context manager."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.script: defaultdict[str, list[Twist]] = defaultdict(list)
        self.polls: list[dict[str, Any]] = []  # what the next polls are answered with
        self.orders: dict[str, str] = {}  # assignment -> order; else continue
        self.uploads: defaultdict[str, dict[int, bytes]] = defaultdict(dict)  # assignment -> offset -> bytes
        self.accepted: dict[str, dict[str, Any]] = {}  # assignment -> submission
        self.received = 0  # bytes of uploads
        self.lost: set[str] = set()  # assignments whose accepted bytes are lost here
        self.holds: list[Hold] = []
        self.protocol = PROTOCOL
        self.renewed: str | None = None  # what a worker that comes with its own credential is given
        self.along: bytes | None = None  # what comes with the work of a poll that would take a model
        self._changed = threading.Condition()
        coordinator = self

        class Handler(_Handler):
            plays = coordinator

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """A line that broke: tests break them."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the holds as well."""
        for hold in self.holds:
            hold.go.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def hand_out(self, *work: Assignment, **answer: Any) -> None:
        """Answer the next polls with these; `answer` goes with each of them."""
        for one in work:
            self.answer_poll(assignment=one.model_dump(mode="json"), **answer)

    def answer_poll(self, **answer: Any) -> None:
        with self._changed:
            self.polls.append(answer)
            self._changed.notify_all()

    def of(self, name: str) -> list[Call]:
        return [call for call in self.calls if call.name == name]

    def wait_for(self, what: str, true: Callable[[], bool], patience_s: float = 120.0) -> None:
        """Wait until something that a call brings about is true."""
        with self._changed:
            assert self._changed.wait_for(true, patience_s), f"waited {patience_s:g} s for {what}: {self.names}"

    def wait_call(self, name: str, number: int = 1) -> Call:
        self.wait_for(f"call {number} of {name}", lambda: len(self.of(name)) >= number)
        return self.of(name)[number - 1]

    @property
    def names(self) -> list[str]:
        return [call.name for call in self.calls]

    def changed(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def heard(self, call: Call) -> None:
        with self._changed:
            self.calls.append(call)
            self._changed.notify_all()

    def next_poll(self, wait_s: float) -> dict[str, Any] | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self.polls), wait_s)
            return self.polls.pop(0) if self.polls else None

    def bytes_of(self, assignment: str) -> bytes:
        pieces = self.uploads[assignment]
        return b"".join(pieces[at] for at in sorted(pieces))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    plays: ScriptedCoordinator

    def log_message(self, *_: object) -> None:
        """The test says what it wants to know."""

    def do_GET(self) -> None:
        if self.path.startswith("/v1/probe"):  # no part of any script
            self._answer(200, bytes(int(self.path.partition("=")[2])))
            return
        self._handle("version" if self.path == "/version" else "model")

    def do_HEAD(self) -> None:
        self._handle("held")

    def do_PUT(self) -> None:
        if self.path == "/v1/probe":
            self._answer(200, {"bytes": len(self.rfile.read(int(self.headers["Content-Length"])))})
            return
        self._handle("upload")

    def do_POST(self) -> None:
        name = urlsplit(self.path).path.rpartition("/")[2]
        self._handle("register" if name == "workers" else name)

    def _handle(self, name: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        twists = self.plays.script[name]
        twist = twists.pop(0) if twists else None
        if isinstance(twist, Hold):
            self.plays.holds.append(twist)
            if twist.after:
                self._take(self.rfile.read(twist.after))
            self.plays.heard(Call(name, {}, self.path))
            twist.came.set()
            twist.go.wait()
            raise ConnectionAbortedError
        raw = self.rfile.read(length)
        body = self._submission() if name == "upload" else json.loads(raw) if raw else {}
        self.plays.heard(Call(name, body, self.path, self.headers.get("Authorization", "")))
        if isinstance(twist, LydianError):
            self._answer(twist.status, twist.answer())
            return
        if callable(twist):
            twist()
        answer = self._upload(raw, body) if name == "upload" else getattr(self, f"_{name}")(body)
        self.plays.changed()
        if isinstance(twist, Lose):
            self.connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        if isinstance(twist, Garble):
            status, said, *headers = answer
            answer = (status, b"\xff" + json.dumps(said).encode()[1:], *headers)
        self._answer(*answer)

    def _answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        for header, value in (headers or {}).items():
            self.send_header(header, value)
        if status != 204:
            self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    @property
    def _assignment(self) -> str:
        return urlsplit(self.path).path.split("/")[3]

    # ------------------------------------------------------------ the calls

    def _version(self, _: dict[str, Any]) -> Answer:
        return 200, {"version": "0.0.9", "protocol": self.plays.protocol}

    def _register(self, _: dict[str, Any]) -> Answer:
        credential = self.plays.renewed if "lyd_work" in self.headers["Authorization"] else "lyd_work_x"
        welcome = {"worker_id": "w-1", "credential": credential, "protocol": PROTOCOL, "heartbeat_s": 0.05}
        return 200, {**welcome, "ttl_s": 40.0, "reason": "welcome"}

    def _poll(self, body: dict[str, Any]) -> Answer:
        answer = self.plays.next_poll(min(body["wait_s"], 0.3))
        if answer is not None and self.plays.along is not None and body["together"]:
            kind = {"Content-Type": "application/vnd.lydian.work-with-model"}
            return 200, json.dumps(answer).encode() + b"\n" + self.plays.along, kind
        return (204,) if answer is None else (200, answer)

    def _heartbeat(self, body: dict[str, Any]) -> Answer:
        return 200, {"order": self.plays.orders.get(body["assignment"], "continue"), "reason": "as the script says"}

    def _held(self, _: dict[str, Any]) -> Answer:
        pieces = self.plays.uploads[self._assignment]
        ranges = ",".join(f"{at}-{at + len(pieces[at]) - 1}" for at in sorted(pieces))
        return 200, None, {"Lydian-Ranges": ranges}

    def _submission(self) -> dict[str, Any]:
        """What comes with the bytes of an upload; nothing, where they come alone."""
        header = self.headers.get("Lydian-Submission")
        return dict(json.loads(base64.b64decode(header))) if header else {}

    def _upload(self, raw: bytes, submission: dict[str, Any]) -> Answer:
        self._take(raw)
        return self._submit(submission) if submission else (204,)

    def _take(self, raw: bytes) -> None:
        if not raw:  # the line broke before anything came
            return
        start = int(self.headers["Content-Range"].removeprefix("bytes ").partition("-")[0])
        self.plays.uploads[self._assignment][start] = raw
        self.plays.received += len(raw)

    def _submit(self, body: dict[str, Any]) -> Answer:
        known = self.plays.accepted.get(self._assignment)
        if known is not None and known["digest"] == body["digest"] and self._assignment not in self.plays.lost:
            return 200, {"repeat": True, "reason": "again"}
        here = hashlib.sha256(self.plays.bytes_of(self._assignment)).hexdigest()
        if body["digest"] is not None and here != body["digest"]:
            return 409, {"code": "incomplete", "sentence": "bytes are missing", "advice": ""}
        self.plays.accepted[self._assignment] = body
        self.plays.lost.discard(self._assignment)
        self.plays.uploads.pop(self._assignment, None)
        return 200, {"repeat": known is not None, "reason": "taken"}

    def _abandon(self, _: dict[str, Any]) -> Answer:
        return (204,)

    def _leave(self, _: dict[str, Any]) -> Answer:
        return (204,)

    def _model(self, _: dict[str, Any]) -> Answer:
        start, _sign, stop = self.headers["Range"].removeprefix("bytes=").partition("-")
        headers = {"ETag": f'"{DIGEST}"', "Content-Range": f"bytes {start}-{stop}/{len(MODEL)}"}
        return 206, MODEL[int(start) : int(stop) + 1], headers
