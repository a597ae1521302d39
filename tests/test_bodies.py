"""Bodies in both directions: a slow one is ended, a refused one is not sent to its end, and no connection is held for
nothing. The limits are tried in a time that jumps; the connections are real, on the application itself.
"""

import asyncio
import contextlib
import hashlib
import logging
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import uvicorn
import uvloop
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from common.api import CoordinatorApi
from common.errors import NotFoundError, TooSlowError
from common.messages import Assignment, JobRequest, JobSpec, PollRequest
from server import wire
from server.app import create_app
from server.blobs import Blobs
from server.bodies import MESSAGE_BYTES, WINDOW, BodyLimits
from server.routes.models import BlobResponse
from server.settings import Settings
from server.wire import impatient
from tests.rounds_kit import registration

MIB = 1 << 20
IDLE_S = 10.0  # of the time that jumps
RATE = 1000  # bytes a second
LIMITS = Settings(body_idle_s=IDLE_S, body_min_rate=RATE)

# ---------------------------------------------------------------- one request, in a time that jumps


class _Jumping(selectors.SelectSelector):
    """Nothing to do until a timer: then it is that time already."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "the request waits for ever"
            self.now += timeout
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


@dataclass
class Played:
    """A request whose body comes at given times, and what was answered."""

    chunks: list[tuple[float, bytes]]  # seconds after the one before, what comes then
    ends: bool = True  # else nothing comes after the last one, not even the end
    answer: list[Message] = field(default_factory=list)
    seconds: float = 0.0

    def play(self, app: ASGIApp, *, upload: bool = False, **headers: str) -> "Played":
        scope = {
            "type": "http", "method": "PUT" if upload else "POST", "path": "/v1/updates/a" if upload else "/v1/jobs",
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
            or [(b"transfer-encoding", b"chunked")],
        }  # fmt: skip
        with asyncio.Runner(loop_factory=JumpingLoop) as runner:
            runner.run(self._play(BodyLimits(app, LIMITS), scope))
        return self

    async def _play(self, app: ASGIApp, scope: Scope) -> None:
        left = list(self.chunks)

        async def receive() -> Message:
            if not left and not self.ends:
                await asyncio.Event().wait()
            if not left:
                await asyncio.sleep(WINDOW * IDLE_S * 100)  # after the body, a client waits as long as it likes
                return {"type": "http.disconnect"}
            await asyncio.sleep(left[0][0])
            _, data = left.pop(0)
            return {"type": "http.request", "body": data, "more_body": bool(left) or not self.ends}

        async def send(message: Message) -> None:
            self.answer.append(message)

        await app(scope, receive, send)
        self.seconds = asyncio.get_running_loop().time()

    @property
    def status(self) -> int:
        return int(self.answer[0]["status"])

    @property
    def closes(self) -> bool:
        return (b"connection", b"close") in self.answer[0]["headers"]

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.answer).decode()


def reading(kept: list[bytes] | None = None) -> ASGIApp:
    """An application that reads the body, keeps what comes, and says how much that was."""
    taken: list[bytes] = [] if kept is None else kept

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async for chunk in Request(scope, receive).stream():
            taken.append(chunk)  # noqa: PERF401 - what came before an error counts too
        await PlainTextResponse(f"{len(b''.join(taken))} bytes")(scope, receive, send)

    return app


gaps = st.floats(0, IDLE_S - 0.01)
chunks = st.lists(st.tuples(st.floats(0, 2 * IDLE_S), st.binary(max_size=3).map(lambda b: b * 5000)), max_size=30)


@given(st.lists(gaps, min_size=1, max_size=30))
@hypothesis_settings(deadline=None)
def test_a_body_that_keeps_the_least_rate_is_never_ended(waits: list[float]) -> None:
    bodies = [(wait, bytes(int(wait * RATE) + 1)) for wait in waits]
    played = Played(bodies).play(reading())
    assert (played.status, played.text) == (200, f"{sum(len(data) for _, data in bodies)} bytes")


@given(chunks, st.booleans())
@hypothesis_settings(deadline=None)
def test_no_body_is_waited_for_longer_than_what_it_brings_is_worth(came: list[tuple[float, bytes]], ends: bool) -> None:
    played = Played(came or [(0.0, b"")], ends).play(reading())
    size = sum(len(data) for _, data in came)
    assert played.status in (200, 408)
    assert played.seconds <= size / RATE + (WINDOW + 1) * IDLE_S + 1e-6


def test_a_body_that_stands_still_is_answered_with_408_and_what_came_has_reached_the_application() -> None:
    kept: list[bytes] = []
    played = Played([(1.0, b"abc"), (9.0, b"de")], ends=False).play(reading(kept))
    assert b"".join(kept) == b"abcde"
    assert (played.status, played.closes, played.seconds) == (408, True, 20.0)
    assert '"code":"too_slow","sentence":"no byte of the body came for 10 s, after 5 bytes"' in played.text


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_what_came_while_this_process_stood_still_is_taken_before_its_sender_counts_as_too_slow(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    idle_s = 0.2

    async def play() -> str:
        loop, came, line = asyncio.get_running_loop(), asyncio.Event(), socket.socketpair()
        answer: list[Message] = []

        async def receive() -> Message:
            if not came.is_set():
                loop.call_soon(stand_still)
            await came.wait()
            return {"type": "http.request", "body": b"abc", "more_body": False}

        async def send(message: Message) -> None:
            answer.append(message)

        def stand_still() -> None:
            line[1].send(b"abc")
            time.sleep(2 * idle_s)  # the fault itself

        loop.add_reader(line[0], came.set)
        scope = {"type": "http", "method": "POST", "path": "/v1/jobs", "headers": [(b"transfer-encoding", b"chunked")]}
        try:
            await BodyLimits(reading(), Settings(body_idle_s=idle_s))(scope, receive, send)
        finally:
            loop.remove_reader(line[0])
            for end in line:
                end.close()
        return b"".join(message.get("body", b"") for message in answer).decode()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(play()) == "3 bytes"


def test_a_body_that_drips_is_ended_although_it_never_stands_still() -> None:
    played = Played([(9.0, b"x")] * 100).play(reading())
    assert (played.status, played.seconds) == (408, 45.0)
    assert "the body came at 0 bytes a second, where 1000 are the least" in played.text


def test_a_fast_beginning_buys_no_slow_end() -> None:
    played = Played([(4.0, bytes(10 * MIB))] + [(9.0, b"x")] * 100).play(reading(), upload=True)
    assert (played.status, played.seconds) == (408, 4.0 + 4 * 9.0 + 5 * 9.0)


def test_time_in_which_the_application_does_not_read_is_not_held_against_the_sender() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        async for _ in Request(scope, receive).stream():
            await asyncio.sleep(100 * IDLE_S)  # a disk that is busy
        await PlainTextResponse("read")(scope, receive, send)

    assert Played([(0.1, b"x")] * 10).play(slow).status == 200


def test_waiting_for_an_answer_after_the_body_is_not_limited() -> None:
    async def poll(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        await request.body()
        assert not await request.is_disconnected()
        assert (await receive())["type"] == "http.disconnect"
        await PlainTextResponse("waited")(scope, receive, send)

    played = Played([(0.0, b"{}")]).play(poll)
    assert played.status == 200
    assert played.seconds >= 100 * IDLE_S


def test_a_framework_between_cannot_turn_the_refusal_into_another() -> None:
    async def parsing(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await Request(scope, receive).body()
        except TooSlowError:
            await PlainTextResponse("no JSON", 400)(scope, receive, send)

    played = Played([(0.0, b"{")], ends=False).play(parsing)
    assert (played.status, len(played.answer)) == (408, 2)


def test_an_answer_that_had_begun_is_not_begun_again() -> None:
    async def eager(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with contextlib.suppress(TooSlowError):
            await Request(scope, receive).body()
        await send({"type": "http.response.body", "body": b"all the same"})

    played = Played([(0.0, b"{")], ends=False).play(eager)
    assert [message["type"] for message in played.answer] == ["http.response.start", "http.response.body"]


def test_a_message_that_announces_too_much_is_refused_before_it_is_read() -> None:
    played = Played([(5.0, b"x")]).play(reading(), content_length=str(MESSAGE_BYTES + 1))
    assert (played.status, played.closes, played.seconds) == (413, True, 0.0)
    assert '"code":"too_large"' in played.text


def test_a_message_that_announces_nothing_and_brings_too_much_is_refused_when_it_has() -> None:
    played = Played([(0.0, bytes(MIB))] * 100).play(reading())
    assert (played.status, played.closes) == (413, True)


def test_a_message_of_the_very_limit_and_an_upload_beyond_it_are_read() -> None:
    assert Played([(0.0, bytes(MIB))] * (MESSAGE_BYTES // MIB)).play(reading()).status == 200
    assert Played([(0.0, bytes(MIB))] * 9).play(reading(), upload=True).text == f"{9 * MIB} bytes"


def test_a_refusal_in_mid_body_closes_the_connection_and_one_after_it_does_not() -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("no", 409)(scope, receive, send)

    async def read_and_refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await Request(scope, receive).body()
        await refuse(scope, receive, send)

    body = [(0.0, b"x"), (0.0, b"y")]
    assert Played(body).play(refuse).closes
    assert not Played(body).play(read_and_refuse).closes
    assert not Played([]).play(refuse, content_length="0").closes


def test_an_application_that_cannot_start_says_so_although_its_limits_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LYDIAN_PORT", "none")
    said: list[str] = []

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None:
        said.append(message["type"])

    async def start() -> None:
        await create_app()({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)

    with contextlib.suppress(Exception):  # which it is, is the framework's business
        asyncio.run(start())
    assert said == ["lifespan.startup.failed"]


# ---------------------------------------------------------------- real connections

PATIENCE_S = 30.0  # a bound for a busy machine; nothing is asserted about it
SHORT_S = 1.0
BLOB = bytes(range(256)) * (3 * MIB // 256)
DIGEST = hashlib.sha256(BLOB).hexdigest()


@dataclass
class Running:
    """The application on a real socket, with a few routes more."""

    folder: Path
    port: int
    server: uvicorn.Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)


def wait_for(what: str, look: Callable[[], Any]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not look():
        assert time.monotonic() < until, f"waited for {what}"
        threading.Event().wait(0.01)  # between two looks at a condition


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Running]:
    chosen = Settings(state_dir=folder, body_idle_s=SHORT_S, reserve_bytes=0, stranger_calls_burst=10_000)
    app = create_app(chosen)
    add_routes(app, Blobs(folder / "others", reserve_bytes=0))  # not the coordinator's, which it would sweep
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # as on a slow line: the kernel takes little
        port = listening.getsockname()[1]
        config = uvicorn.Config(
            app,
            http=impatient(SHORT_S),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            wait_for("the server to listen", lambda: server.started or not thread.is_alive())
            yield Running(folder, port, server)
        finally:
            server.should_exit = True
            thread.join()


def add_routes(app: FastAPI, blobs: Blobs) -> None:
    digest = blobs.put_bytes(BLOB, durable=False)
    missing = NotFoundError("the blob is not here", code="unknown_model")

    @app.get("/blob")
    async def blob() -> Response:
        return BlobResponse(blobs, digest, missing)

    @app.get("/gone")
    async def gone() -> Response:
        answer = BlobResponse(blobs, blobs.put_bytes(b"soon gone", durable=False), missing)
        blobs.remove(hashlib.sha256(b"soon gone").hexdigest())
        return answer

    @app.get("/endless")
    async def endless() -> Response:
        async def zeros() -> AsyncIterator[bytes]:
            while True:
                yield bytes(MIB)
                await asyncio.sleep(0)  # as a read from a disk would: the loop must hear that the client is gone

        return StreamingResponse(zeros())

    @app.get("/wait")
    async def wait(request: Request) -> str:
        await asyncio.sleep(3 * SHORT_S)  # as for work
        return "gone" if await request.is_disconnected() else "waited"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("state")) as up:
        yield up


@pytest.fixture(scope="module", params=[HttpToolsProtocol, H11Protocol], ids=["httptools", "h11"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """On each of the two protocols that uvicorn may find installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "Base", request.param)
        with running(tmp_path_factory.mktemp("state")) as up:
            yield up


def read_all(line: socket.socket) -> bytes:
    answer = b""
    while piece := line.recv(65536):
        answer += piece
    return answer


def read_answer(line: socket.socket) -> bytes:
    """One answer of /healthz, which may come in parts."""
    answer = b""
    while not answer.endswith(b"}"):
        answer += line.recv(65536)
    return answer


HALF_HEAD = b"GET /healthz HTTP/1.1\r\nHost"
HEAD = b"GET /healthz HTTP/1.1\r\nHost: [::1]\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", HALF_HEAD], ids=["nothing", "half a head"])
def test_a_connection_without_a_request_is_closed(either: Running, sent: bytes) -> None:
    with either.connect() as line:
        line.sendall(sent)
        assert read_all(line) == b""
    wait_for("the connection to be forgotten", lambda: either.connections == 0)


def test_a_head_that_drips_is_not_waited_for_longer_than_one_that_stands_still(either: Running) -> None:
    with either.connect() as line, contextlib.suppress(ConnectionError):
        for byte in b"GET /healthz HTTP/1.1\r\nHost: " + b"x" * 1000:
            line.sendall(bytes([byte]))
            line.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                assert line.recv(1) == b""
                break
        else:
            raise AssertionError("it dripped for 50 s")
    wait_for("the connection to be forgotten", lambda: either.connections == 0)


def test_half_a_head_after_a_whole_request_is_not_waited_for_either(either: Running) -> None:
    with either.connect() as line:
        line.sendall(HEAD)
        first = line.recv(65536)
        assert first.startswith(b"HTTP/1.1 200 ")
        line.sendall(HALF_HEAD)
        assert b"HTTP/1.1" not in read_all(line)


def test_a_connection_that_rests_between_two_requests_is_kept(served: Running) -> None:
    with served.connect() as line:
        line.sendall(HEAD)
        assert read_answer(line).startswith(b"HTTP/1.1 200 ")
        line.settimeout(3 * SHORT_S)
        with pytest.raises(TimeoutError):
            line.recv(1)
        line.settimeout(PATIENCE_S)
        line.sendall(HEAD)
        assert line.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_request_that_waits_for_its_answer_is_not_cut(served: Running) -> None:
    assert httpx2.get(f"{served.url}/wait", timeout=PATIENCE_S).text == '"waited"'


def test_a_client_that_reads_nothing_is_cut(either: Running) -> None:
    with either.connect() as line:
        line.sendall(b"GET /endless HTTP/1.1\r\nHost: [::1]\r\n\r\n")
        wait_for("the download to begin", lambda: either.connections == 1)
        wait_for("the download to be given up", lambda: either.connections == 0)


def test_a_client_that_reads_slowly_is_not_cut(served: Running) -> None:
    """It takes several times as long for one piece as nothing may be read at all."""
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
        line.settimeout(PATIENCE_S)
        line.connect(("127.0.0.1", served.port))
        line.sendall(b"GET /blob HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\n\r\n")
        came, began = b"", time.monotonic()
        while time.monotonic() - began < 5 * SHORT_S:
            came += line.recv(20_000)
            threading.Event().wait(0.02)  # a slow line
        came += read_all(line)
    assert came.endswith(BLOB)


def test_a_message_that_stands_still_is_answered_and_its_connection_ends(either: Running) -> None:
    token = (either.folder / "admin.token").read_text().strip()
    with either.connect() as line:
        head = f"POST /v1/jobs HTTP/1.1\r\nHost: [::1]\r\nAuthorization: Bearer {token}\r\nContent-Length: 100\r\n\r\n"
        line.sendall(f"{head}{{".encode())
        answer = read_all(line)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"too_slow"' in answer
    wait_for("the connection to be forgotten", lambda: either.connections == 0)


def test_a_refused_upload_is_not_sent_to_its_end_and_its_sender_reads_why(either: Running) -> None:
    """Nobody without a token may upload: that is known before the body, as is a full disk."""
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(64):
            sent += MIB
            yield bytes(MIB)

    for _ in range(10):
        sent = 0
        refused = httpx2.put(
            f"{either.url}/v1/updates/a?attempt=1",
            content=body(),
            headers={"Content-Length": str(64 * MIB)},
            timeout=PATIENCE_S,
        )
        assert (refused.status_code, refused.json()["code"]) == (401, "no_token")
        assert sent < 64 * MIB


def end_with_reset(line: socket.socket) -> None:
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.close()


def test_a_message_that_breaks_off_leaves_no_traceback(served: Running, caplog: pytest.LogCaptureFixture) -> None:
    token = (served.folder / "admin.token").read_text().strip()
    with served.connect() as line:
        head = f"POST /v1/jobs HTTP/1.1\r\nHost: [::1]\r\nAuthorization: Bearer {token}\r\nContent-Length: 100\r\n\r\n"
        line.sendall(f"{head}{{".encode())
        wait_for("the request to begin", lambda: served.server.server_state.tasks)
        end_with_reset(line)
    wait_for("the request to end", lambda: not served.server.server_state.tasks)
    assert [record for record in caplog.records if record.exc_info] == []


# ---------------------------------------------------------------- uploads whose line breaks

TOTAL = 100_000


@dataclass
class Worker:
    """One that was given work, and uploads its result by hand."""

    at: Running
    token: str
    work: Assignment

    def put(self, data: bytes, start: int = 0) -> socket.socket:
        """Begin to send everything from `start` on, and send `data` of it."""
        line = self.at.connect()
        line.sendall(
            f"PUT /v1/updates/{self.work.id}?attempt={self.work.attempt} HTTP/1.1\r\nHost: [::1]\r\n"
            f"Authorization: Bearer {self.token}\r\nContent-Length: {TOTAL - start}\r\n"
            f"Content-Range: bytes {start}-{TOTAL - 1}/{TOTAL}\r\n\r\n".encode()
            + data
        )
        return line

    def held(self) -> str:
        path = f"/v1/updates/{self.work.id}?attempt={self.work.attempt}"
        head = httpx2.head(self.at.url + path, headers={"Authorization": f"Bearer {self.token}"}, timeout=PATIENCE_S)
        assert head.status_code == 200
        return head.headers["Lydian-Ranges"]


@pytest.fixture
def worker(served: Running) -> Iterator[Worker]:
    tokens = [(served.folder / name).read_text().strip() for name in ("join.token", "admin.token")]
    with CoordinatorApi(served.url, tokens[0]) as api, CoordinatorApi(served.url, tokens[1]) as admin:
        welcome = api.register(registration(secrets.token_hex(4)))
        assert welcome.credential is not None
        api.use_token(welcome.credential)
        job = admin.submit_job(JobRequest(spec=JobSpec(task="digits"), key=secrets.token_hex(4))).id
        answer = api.poll(welcome.worker_id, PollRequest(start_id="s1", claim_key="c", wait_s=PATIENCE_S))
        assert answer is not None
        assert answer.assignment is not None
        yield Worker(served, welcome.credential, answer.assignment)
        admin.cancel(job)


@pytest.mark.parametrize("end", [end_with_reset, socket.socket.close], ids=["reset", "close"])
def test_what_a_broken_upload_brought_is_kept_and_a_line_of_the_log_says_so(
    worker: Worker, end: Callable[[socket.socket], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lydian")
    line = worker.put(b"x" * 70_000)
    wait_for("the bytes to arrive", lambda: worker.held() == "0-69999")
    end(line)
    wait_for("the break to be noticed", lambda: "broke off an upload" in caplog.text)
    assert worker.held() == "0-69999"
    assert [record for record in caplog.records if record.exc_info] == []


def test_what_a_stalled_upload_brought_is_kept_and_its_sender_is_told(worker: Worker) -> None:
    with worker.put(b"x" * 5000, start=1000) as line:
        answer = read_all(line)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert f"no byte of the body came for {SHORT_S:g} s, after 5000 bytes".encode() in answer
    assert worker.held() == "1000-5999"


def test_stalled_uploads_leave_no_descriptor_and_no_task_behind(worker: Worker) -> None:
    with worker.put(b"x"):  # opens the upload's file
        wait_for("the first byte to arrive", lambda: worker.held() == "0-0")
    process = psutil.Process()
    wait_for("the first line to be forgotten", lambda: worker.at.connections == 0)
    before = process.num_fds()
    with contextlib.ExitStack() as stack:
        for at in range(20):
            stack.callback(worker.put(b"x", start=at).close)
        wait_for("all of them to begin", lambda: worker.held() == "0-19")
        wait_for("all of them to be ended", lambda: worker.at.connections == 0)
    assert (process.num_fds(), len(worker.at.server.server_state.tasks)) == (before, 0)


# ---------------------------------------------------------------- ranges of a blob


def get(served: Running, path: str = "/blob", **headers: str) -> httpx2.Response:
    return httpx2.get(served.url + path, headers={k.replace("_", "-"): v for k, v in headers.items()}, timeout=30)


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-199", 100, 200),
        (f"bytes={2 * MIB}-", 2 * MIB, len(BLOB)),
        (f"bytes={len(BLOB) - 1}-", len(BLOB) - 1, len(BLOB)),
        ("bytes=-5", len(BLOB) - 5, len(BLOB)),
        (f"bytes=1-{10 * len(BLOB)}", 1, len(BLOB)),
    ],
)
def test_a_range_is_exactly_what_was_asked_for(served: Running, asked: str, start: int, stop: int) -> None:
    answer = get(served, Range=asked, If_Range=f'"{DIGEST}"')
    assert answer.status_code == 206
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(BLOB)}"
    assert answer.headers["ETag"] == f'"{DIGEST}"'
    assert answer.content == BLOB[start:stop]


def test_the_whole_comes_without_a_range_and_when_the_file_is_another(served: Running) -> None:
    for answer in (get(served), get(served, Range="bytes=5-9", If_Range=f'"{"0" * 64}"')):
        assert (answer.status_code, answer.headers["Content-Length"]) == (200, str(len(BLOB)))
        assert hashlib.sha256(answer.content).hexdigest() == DIGEST


def test_streams_at_once_give_the_file(served: Running) -> None:
    pieces: dict[int, bytes] = {}

    def fetch(at: int) -> None:
        pieces[at] = get(served, Range=f"bytes={at}-{at + MIB // 2 - 1}").content

    threads = [threading.Thread(target=fetch, args=(at,)) for at in range(0, len(BLOB), MIB // 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert b"".join(pieces[at] for at in sorted(pieces)) == BLOB


@pytest.mark.parametrize(("asked", "status"), [("bytes=9-5", 400), ("lines=1-2", 400), (f"bytes={len(BLOB)}-", 416)])
def test_a_range_that_cannot_be_is_refused_in_the_shape_of_every_error(
    served: Running, asked: str, status: int
) -> None:
    answer = get(served, Range=asked)
    assert (answer.status_code, answer.json()["code"]) == (status, "bad_request")
    assert "Range is malformed, or lies beyond the file" in answer.json()["sentence"]
    assert answer.headers.get("Content-Range") == (f"bytes */{len(BLOB)}" if status == 416 else None)


def test_a_thousand_ranges_cost_no_more_than_the_file(served: Running) -> None:
    """CVE-2025-62727: merging them took time that grows with the square of their number."""
    asked = ",".join(f"{at}-{at}" for at in range(0, 8000, 2))  # 40 kB; longer heads are refused unread
    answer = get(served, Range=f"bytes={asked}")
    assert answer.status_code == 200
    assert len(answer.content) == len(BLOB)


def test_a_file_that_is_deleted_between_the_look_and_the_open_is_not_found(served: Running) -> None:
    answer = get(served, "/gone")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_model")
    assert get(served, "/gone", Range="bytes=1-2").status_code == 404
