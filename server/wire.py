"""The HTTP protocol of uvicorn, less patient: no connection is held for ever by a client that does nothing.

    nothing sent, or no whole head of a request ──▶ idle_s ──▶ closed
    an answer that is not read                  ──▶ idle_s ──▶ cut; the rest can be fetched with Range

Uvicorn waits without limit for both. What lies between them, the body of a request, is limited in server.bodies, and a
connection that rests between two requests by uvicorn itself.

    a connection more than its address may have ──▶ closed at once

Of what an address is counted as, see server.buckets. Uvicorn's own limit counts all connections together, and answers
everybody with 503 once one caller has taken them: so it is not used.

A target that names a host (`GET http://name/path`, as to a proxy) counts as one more Host header, which server.gate
refuses: RFC 9112 has such a name go before the header, and uvicorn drops it.

Bytes come by one buffer that all connections share, of which each gets less the more of all bodies waits for the
application: uvloop reads 250 kB of each connection before the first of them is looked at, which of a thousand uploads
is a quarter of a gigabyte.
With TLS the bytes are those that were encrypted, and the handshake has a limit of its own (server.__main__).
A piece of a body is passed on as the parser cut it, where uvicorn copies it twice more.
"""

import asyncio
import contextlib
import socket
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from server.buckets import network_of

Base: type[asyncio.Protocol] = AutoHTTPProtocol

MOST, LEAST = 1 << 18, 1 << 15  # bytes that are read of a connection at once
_BYTES_ACKED, _TCP_INFO_BYTES = 120, 128
WAITING = 16 << 20  # bytes of bodies that wait for the application; beyond them LEAST is read of a connection


def impatient(
    idle_s: float, most: int = 1 << 20, on_refused: Callable[[str], None] = lambda _: None
) -> type[asyncio.Protocol]:
    """Uvicorn's protocol, as it is installed here, that ends a connection whose client does nothing.

    Args:
        idle_s: seconds.
        most: connections of one address at once.
        on_refused: told the address of each connection that is closed because there are too many.
    """

    open_of = Counter[str]()  # connections by what their address is counted as
    unread = set["Impatient"]()  # connections with a piece of a body that the application may not have taken
    waiting: int | None = None  # bytes of those, and of what came since; None: the application had its turn, look again

    def look_again() -> None:
        nonlocal waiting
        waiting = None

    def room() -> int:
        """Bytes that may come before too many wait. Looked at once a turn: what was read wakes the application."""
        nonlocal waiting
        if waiting is None:
            unread.intersection_update([each for each in unread if each.cycle.body])
            waiting = sum(len(each.cycle.body) for each in unread)
            asyncio.get_running_loop().call_soon(look_again)
        return WAITING - waiting

    class Impatient(Base):  # type: ignore[misc,valid-type] # which of two classes it is depends on what is installed
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self._for_head, self._for_reader = _Patience(idle_s), _Patience(idle_s)
            self._unread = self._taken = 0  # bytes of an answer: that wait for the client, and that it took, at a look
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes | memoryview) -> None:
            super().data_received(data)
            self._await_head()
            if self.cycle is not None and self.cycle.body:
                unread.add(self)

        def on_headers_complete(self) -> None:
            """Called by the parser of httptools; to the other one such a target is a path that is not there."""
            if not self.url.startswith((b"/", b"*")):
                self.headers.append((b"host", self.url.partition(b"://")[2].partition(b"/")[0]))
            super().on_headers_complete()

        def _unsupported_upgrade_warning(self) -> None:
            """Whoever asks for a WebSocket is answered as if it had not, and writes nothing into the log."""

        def on_body(self, body: bytes) -> None:
            """Called by the parser of httptools; the other protocol has a way of its own."""
            cycle = self.cycle
            if cycle.body or cycle.response_complete or self.parser.should_upgrade():
                super().on_body(body)  # joins the pieces
                return
            cycle.body = body
            self.flow.pause_reading()  # until the application asks for more
            cycle.message_event.set()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._await_reader()

        def resume_writing(self) -> None:
            self._for_reader.stop()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._for_head.stop()
            self._for_reader.stop()
            unread.discard(self)
            super().connection_lost(exc)

        def _await_head(self) -> None:
            """Bytes that come do not lengthen the time for a head: one now and then is as bad as none."""
            if self._is_answering():
                self._for_head.stop()
            else:
                self._for_head.start(self._end_silence)

        def _end_silence(self) -> None:
            self._for_head.stop()
            if not self._is_answering():
                self.transport.close()

        def _await_reader(self) -> None:
            self._unread, self._taken = self.transport.get_write_buffer_size(), _taken(self.transport)
            self._for_reader.start(self._end_deafness)

        def _end_deafness(self) -> None:
            """Cut the connection, unless some was read: on a slow line, what uvicorn wrote at once takes its time."""
            self._for_reader.stop()
            if self.transport.get_write_buffer_size() < self._unread or _taken(self.transport) > self._taken:
                self._await_reader()
            else:
                self.transport.abort()

        def _is_answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

    class Shared(asyncio.BufferedProtocol):
        """Reads for one connection, into the buffer of all of them: what is in it is taken at once."""

        def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 - whatever uvicorn says
            self._inner = Impatient(*arguments, **options)

            self._network = ""  # that it is counted for
            self._refused = False

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            address = _address(transport)
            self._network = network_of(address)
            open_of[self._network] += 1
            if open_of[self._network] > most:
                self._refused = True
                cast("asyncio.Transport", transport).abort()
                on_refused(address)
                return
            self._inner.connection_made(transport)

        def connection_lost(self, exc: Exception | None) -> None:
            open_of[self._network] -= 1
            if not open_of[self._network]:
                del open_of[self._network]
            if not self._refused:
                self._inner.connection_lost(exc)

        def pause_writing(self) -> None:
            self._inner.pause_writing()

        def resume_writing(self) -> None:
            self._inner.resume_writing()

        def eof_received(self) -> bool | None:
            self._inner.eof_received()
            return None  # close

        def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
            return buffer[: min(max(room(), LEAST), MOST)]

        def buffer_updated(self, nbytes: int) -> None:
            nonlocal waiting
            waiting = (waiting or 0) + nbytes
            self._inner.data_received(buffer[:nbytes])

    buffer = memoryview(bytearray(MOST))
    # Uvicorn only passes it on, and asyncio takes either kind.
    return cast("type[asyncio.Protocol]", Shared)


def _address(transport: asyncio.BaseTransport) -> str:
    """Where a connection comes from; empty: there is no telling, as on a Unix socket."""
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) and peer else ""


def _taken(transport: asyncio.Transport) -> int:
    """Bytes that the client's system has taken of this connection so far, as Linux counts them; 0 elsewhere.

    With TLS the buffer alone does not tell: what was encrypted lies below it, and none of it shrinks for a while.
    Source: linux/tcp.h, struct tcp_info, tcpi_bytes_acked.
    """
    line = transport.get_extra_info("socket")
    if line is None or sys.platform != "linux":
        return 0
    with contextlib.suppress(OSError):
        told = line.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        return int.from_bytes(told[_BYTES_ACKED:_TCP_INFO_BYTES], sys.byteorder)
    return 0


class _Patience:
    """A timer that runs or does not. Starting one that runs, and stopping one that does not, changes nothing."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._runs: asyncio.TimerHandle | None = None

    def start(self, at_its_end: Callable[[], None]) -> None:
        if self._runs is None:
            self._runs = asyncio.get_running_loop().call_later(self._seconds, at_its_end)

    def stop(self) -> None:
        if self._runs is not None:
            self._runs.cancel()
            self._runs = None
