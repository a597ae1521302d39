"""Connections at once from one address, and what only the server sees of a request: real sockets, no coordinator."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import uvicorn

from server.wire import LEAST, WAITING, impatient
from tests.acceptance.kit import wait_for

MOST = 2


async def hosts(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the hosts that a request names."""
    said = b" ".join(value for name, value in scope["headers"] if name == b"host")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(said))]})
    await send({"type": "http.response.body", "body": said})


class Served:
    def __init__(self, app: Any = hosts, most: int = MOST) -> None:
        self.refused = list[str]()
        config = uvicorn.Config(
            app, http=impatient(60.0, most, self.refused.append), ws="none", lifespan="off", log_config=None
        )
        self.server = uvicorn.Server(config)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.server.run, args=([self.listening],))

    def __enter__(self) -> "Served":
        self.thread.start()
        wait_for("the server to listen", lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.listening.close()

    def connect(self, address: str = "127.0.0.1") -> socket.socket:
        to = self.listening.getsockname()[:2]
        return socket.create_connection(to, timeout=60, source_address=(address, 0))

    def ask(self, line: socket.socket, target: str = "/", more: str = "") -> bytes:
        """What a connection answers; nothing where it is closed."""
        try:
            line.sendall(f"GET {target} HTTP/1.1\r\nHost: a.example\r\n{more}\r\n".encode())
            return line.recv(1 << 16)
        except ConnectionError:
            return b""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served() as running:
        yield running


def test_a_connection_beyond_those_of_an_address_is_closed_and_those_of_others_are_not(served: Served) -> None:
    first, second = served.connect(), served.connect()
    with first, second:
        assert b"a.example" in served.ask(first)
        assert b"a.example" in served.ask(second)
        with served.connect() as third:
            assert served.ask(third) == b""
        assert served.refused == ["127.0.0.1"]
        with served.connect("127.0.0.2") as another:
            assert b"a.example" in served.ask(another)
        assert b"a.example" in served.ask(first)

    def answered() -> bool:
        with served.connect() as again:
            return b"a.example" in served.ask(again)

    wait_for("a place that was given up to be free", answered)
    for _ in range(10):  # each gives its place back, the refused ones too
        wait_for("another", answered)


def test_a_target_that_names_a_host_names_one_more(served: Served) -> None:
    targets = {
        "/": b"a.example",
        "*": b"a.example",
        "http://b.example/x": b"a.example b.example",
        "HTTP://a.example:80": b"a.example a.example:80",
        "http:///x": b"a.example ",
        "//b.example/x": b"a.example",
    }
    for target, said in targets.items():
        with served.connect() as line:
            answer = served.ask(line, target)
        body = answer.partition(b"\r\n\r\n")[2]
        assert answer.startswith(b"HTTP/1.1 400 ") or body == said, target
        assert target != "http://b.example/x" or body == said


def test_whoever_asks_for_a_web_socket_is_answered_as_if_it_had_not(served: Served) -> None:
    more = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA\r\n"
    with served.connect() as line:
        assert served.ask(line, more=more).startswith(b"HTTP/1.1 200 ")


def test_bodies_that_wait_for_the_application_are_bounded_whenever_they_came() -> None:
    pieces, began, gate = list[int](), list[asyncio.AbstractEventLoop](), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        began.append(asyncio.get_running_loop())
        await gate.wait()  # as for somebody who tells whose the call is
        pieces.append(len((await receive())["body"]))

    lines, size = 200, 1 << 18
    with Served(slow, most=lines) as served, ExitStack() as stack:
        for number in range(1, lines + 1):  # one after the other: the loop has its turns in between
            line = stack.enter_context(served.connect())
            line.setblocking(False)
            line.send(b"PUT / HTTP/1.1\r\nHost: a.example\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
            wait_for("the application to be called", lambda wanted=number: len(began) == wanted)
        began[0].call_soon_threadsafe(gate.set)
        wait_for("every piece to be taken", lambda: len(pieces) == lines)
    assert max(pieces) > 2 * LEAST, "the first get more, or this would show nothing"
    assert sum(pieces) <= WAITING + lines * LEAST
