"""The HTTP protocol of uvicorn, less patient: no connection is held for ever by a client that does nothing.

    nothing sent, or no whole head of a request ──▶ idle_s ──▶ closed
    an answer that is not read                  ──▶ idle_s ──▶ cut; the rest can be fetched with Range

Uvicorn waits without limit for both. What lies between them, the body of a request, is limited in server.bodies, and a
connection that rests between two requests by uvicorn itself.
"""

import asyncio

from uvicorn.protocols.http.auto import AutoHTTPProtocol

Base: type[asyncio.Protocol] = AutoHTTPProtocol


def impatient(idle_s: float) -> type[asyncio.Protocol]:
    """Uvicorn's protocol, as it is installed here, that ends a connection whose client does nothing.

    Args:
        idle_s: seconds.
    """

    class Impatient(Base):  # type: ignore[misc,valid-type] # which of two classes it is depends on what is installed
        _until_head: asyncio.TimerHandle | None = None
        _until_read: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._await_head()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._until_read = asyncio.get_running_loop().call_later(idle_s, self.transport.abort)

        def resume_writing(self) -> None:
            self._until_read = _ended(self._until_read)
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._until_head, self._until_read = _ended(self._until_head), _ended(self._until_read)
            super().connection_lost(exc)

        def _await_head(self) -> None:
            """Bytes that come do not lengthen the time for a head: one byte now and then is as bad as none."""
            if self._is_answering():
                self._until_head = _ended(self._until_head)
            elif self._until_head is None:
                self._until_head = asyncio.get_running_loop().call_later(idle_s, self._end_silence)

        def _end_silence(self) -> None:
            self._until_head = None
            if not self._is_answering():
                self.transport.close()

        def _is_answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

    return Impatient


def _ended(timer: asyncio.TimerHandle | None) -> None:
    """Stop a timer that runs."""
    if timer is not None:
        timer.cancel()
