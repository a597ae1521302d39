"""How long a request's body may take, and how large it may be. Uvicorn waits for a body as long as it takes.

    receive ──▶ idle limit, least rate, size ──▶ the application, which sees TooSlowError or TooLargeError

Only bodies are limited: a long poll or an event stream waits for its answer, after its body has come. What an upload
brought before it became too slow is kept, so being cut costs a worker on a bad line one more request. A request that is
refused while its body still comes is answered and its connection closed: else the rest would be sent for nothing.
"""

import asyncio
import logging
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.errors import LydianError, TooLargeError, TooSlowError
from common.link import LARGEST as PROBE_BYTES
from server.settings import Settings

MESSAGE_BYTES = 8 << 20  # of a body that is no upload: a task file and a traceback have far less
WINDOW = 4  # the rate is looked at each time that so many idle limits were spent on waiting
UPLOADS = ("/v1/updates/", "/v1/models/")
PROBE = "/v1/probe"
CLOSES = {"Connection": "close"}

log = logging.getLogger("lydian.bodies")


class BodyLimits:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, settings: Settings | None = None) -> None:
        """Take the limits of the settings; None reads them from the environment, once the application has started."""
        self._app, self._given = app, settings

    @cached_property
    def _settings(self) -> Settings:
        """Not read before: uvicorn takes a fault of a middleware at the start for an application without a start."""
        return self._given or Settings.from_environment()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or end its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
            await self._app(scope, receive, send)
            return
        body = _Body(receive, self._settings.body_idle_s, self._settings.body_min_rate, _most(scope))
        answer = _Answer(send, body)
        try:
            body.check_announced(headers.get("content-length"))
            await self._app(scope, body.receive, answer.send)
        except LydianError:
            if body.ended_by is None:
                raise
        if body.ended_by is not None and not answer.began:
            log.info("%s %s: %s", scope["method"], scope["path"], body.ended_by)
            refusal = JSONResponse(body.ended_by.answer(), body.ended_by.status, headers=CLOSES)
            await refusal(scope, receive, send)


def _most(scope: Scope) -> int | None:
    """The bytes that a request's body may have; None: whoever reads it knows."""
    if scope["method"] == "PUT" and scope["path"].startswith(UPLOADS):
        return None
    return PROBE_BYTES if scope["path"] == PROBE else MESSAGE_BYTES


@dataclass
class _Body:
    """One request's body as it comes."""

    source: Receive
    idle_s: float
    min_rate: int
    most: int | None  # bytes; None: whoever reads it knows
    ended_by: LydianError | None = None
    size: int = 0
    complete: bool = False  # nothing more of it will come, or is wanted
    _waited_s: float = 0.0  # in this window: only what was spent waiting for the sender counts
    _came: int = 0  # bytes, in this window
    _clock: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def check_announced(self, length: str | None) -> None:
        """Refuse a body by its Content-Length, before a byte of it is read."""
        if self.most is not None and length is not None and length.isdecimal() and int(length) > self.most:
            self._end(TooLargeError(f"a body of {length} bytes was announced, where at most {self.most} are possible"))

    async def receive(self) -> Message:
        """The next message; in place of `source` for the application."""
        if self.complete:
            return await self.source()
        began = self._clock.time()
        try:
            async with asyncio.timeout(None) as limit:
                half = self._clock.call_later(self.idle_s / 2, self._await_rest, limit)
                try:
                    message = await self.source()
                finally:
                    half.cancel()
        except TimeoutError:
            self._end(TooSlowError(f"no byte of the body came for {self.idle_s:g} s, after {self.size} bytes"))
        if message["type"] != "http.request":
            self.complete = True
            return message
        self.complete = not message.get("more_body", False)
        self._count(len(message.get("body", b"")), self._clock.time() - began)
        return message

    def _await_rest(self, limit: asyncio.Timeout) -> None:
        """Let the second half of the limit begin now: should this process have stood still, it ends the first alone."""
        limit.reschedule(self._clock.time() + self.idle_s / 2)

    def _count(self, came: int, waited_s: float) -> None:
        self.size += came
        self._came += came
        self._waited_s += waited_s
        if self.most is not None and self.size > self.most:
            self._end(TooLargeError(f"the body has more than the {self.most} bytes that are possible"))
        if self.complete or self._waited_s < WINDOW * self.idle_s:
            return
        rate = self._came / self._waited_s
        if rate < self.min_rate:
            self._end(TooSlowError(f"the body came at {rate:.0f} bytes a second, where {self.min_rate} are the least"))
        self._waited_s, self._came = 0.0, 0

    def _end(self, error: LydianError) -> None:
        """Remember why, since a framework in between may turn the error into one of its own."""
        self.ended_by = error
        self.complete = True
        raise error


@dataclass
class _Answer:
    """What the application answers; nothing of it is sent once the body was ended, unless it had begun before."""

    sink: Send
    body: _Body
    began: bool = False

    async def send(self, message: Message) -> None:
        """In place of `sink` for the application."""
        if self.body.ended_by is not None and not self.began:
            return
        self.began = True
        if message["type"] == "http.response.start" and message["status"] >= HTTPStatus.BAD_REQUEST:
            message = message if self.body.complete else _closing(message)
        await self.sink(message)


def _closing(start: Message) -> Message:
    """The head of an answer after which the connection is closed."""
    headers = MutableHeaders(raw=list(start["headers"]))
    headers.update(CLOSES)
    return {**start, "headers": headers.raw}
