"""Bytes that mean nothing, for whoever measures the line: random ones out, any ones in, none of them on a disk.

A caller has one probe at a time, and few callers have one at once: a measurement is to see the line, not the others'.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from common.errors import UnavailableError

AT_ONCE = 4  # callers
BLOCK = 256 << 10  # bytes; repeated, since nothing on the way looks for what is this far apart
TAKES_S = 60.0  # at most, for a body to come: one of the smallest size over the slowest line that makes sense


class Probes:
    """Who has a probe under way."""

    def __init__(self) -> None:
        self._callers: set[str] = set()
        self.block = os.urandom(BLOCK)

    @contextmanager
    def turn(self, caller: str) -> Iterator[None]:
        """Inside, the caller has one.

        Args:
            caller: whoever it is, such as its token's id.

        Raises:
            UnavailableError: it has one already, or too many others have (`probe_busy`).
        """
        if caller in self._callers:
            raise _busy("this token has a probe under way")
        if len(self._callers) >= AT_ONCE:
            raise _busy(f"{AT_ONCE} others measure their lines now")
        self._callers.add(caller)
        try:
            yield
        finally:
            self._callers.remove(caller)


def _busy(why: str) -> UnavailableError:
    return UnavailableError(f"no probe now: {why}", code="probe_busy", advice="Measure again in a few seconds.")


class ProbeResponse(Response):
    """So many bytes that are no help to a compressor."""

    def __init__(self, probes: Probes, caller: str, size: int) -> None:
        super().__init__(media_type="application/octet-stream", headers={"Cache-Control": "no-store"})
        self.headers["Content-Length"] = str(size)
        self._probes, self._caller, self._size = probes, caller, size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's
        """Send them, no faster than they are read.

        Raises:
            UnavailableError: it is not this caller's turn.
        """
        with self._probes.turn(self._caller):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            left = self._size
            while left > BLOCK:
                await send({"type": "http.response.body", "body": self._probes.block, "more_body": True})
                left -= BLOCK
            await send({"type": "http.response.body", "body": self._probes.block[:left]})
