"""The HTTP protocol of uvicorn, less patient: no connection is held for ever by a client that does nothing.

    nothing sent, or no whole head of a request ──▶ idle_s ──▶ closed
    an answer that is not read                  ──▶ idle_s ──▶ cut; the rest can be fetched with Range

Uvicorn waits without limit for both. What lies between them, the body of a request, is limited in server.bodies, and a
connection that rests between two requests by uvicorn itself.

It is quicker as well: a large piece of a body is passed on as it came, where uvicorn copies it twice more.
"""

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.auto import AutoHTTPProtocol

Base: type[asyncio.Protocol] = AutoHTTPProtocol

LARGE = 1 << 16  # bytes of a piece that the application is to take before the next is read


def impatient(idle_s: float) -> type[asyncio.Protocol]:
    """Uvicorn's protocol, as it is installed here, that ends a connection whose client does nothing.

    Args:
        idle_s: seconds.
    """

    class Impatient(Base):  # type: ignore[misc,valid-type] # which of two classes it is depends on what is installed
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self._for_head, self._for_reader = _Patience(idle_s), _Patience(idle_s)
            self._unread = 0  # bytes of an answer that wait for the client, when last looked at
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._await_head()

        def on_body(self, body: bytes) -> None:
            """Called by the parser of httptools; the other protocol has a way of its own."""
            cycle = self.cycle
            if cycle.body or cycle.response_complete or self.parser.should_upgrade():
                super().on_body(body)  # joins the pieces
                return
            cycle.body = body
            if len(body) > LARGE:
                self.flow.pause_reading()
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
            self._unread = self.transport.get_write_buffer_size()
            self._for_reader.start(self._end_deafness)

        def _end_deafness(self) -> None:
            """Cut the connection, unless some was read: on a slow line, what uvicorn wrote at once takes its time."""
            self._for_reader.stop()
            if self.transport.get_write_buffer_size() < self._unread:
                self._await_reader()
            else:
                self.transport.abort()

        def _is_answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

    return Impatient


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
