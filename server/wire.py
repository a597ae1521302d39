"""The HTTP protocol of uvicorn, less patient: a client that stops reading an answer does not hold it for ever.

Uvicorn waits without limit for a full socket to be read. Here the connection is cut when nothing was read for as long
as a body may stand still; whoever was cut fetches the rest with Range.
"""

import asyncio

from uvicorn.protocols.http.auto import AutoHTTPProtocol

Base: type[asyncio.Protocol] = AutoHTTPProtocol


def impatient(idle_s: float) -> type[asyncio.Protocol]:
    """Uvicorn's protocol, as it is installed here, that cuts a connection whose client reads nothing.

    Args:
        idle_s: seconds.
    """

    class Impatient(Base):  # type: ignore[misc,valid-type] # which of two classes it is depends on what is installed
        _patience: asyncio.TimerHandle | None = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._patience = asyncio.get_running_loop().call_later(idle_s, self.transport.abort)

        def resume_writing(self) -> None:
            self._end_patience()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_patience()
            super().connection_lost(exc)

        def _end_patience(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

    return Impatient
