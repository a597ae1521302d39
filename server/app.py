"""The coordinator as an ASGI application: `uvicorn server.app:app`, or `lydian serve`.

One process, one event loop. The state is loaded before the first connection is accepted, and the folder is locked, so
that a second coordinator on it ends at once.
"""

import asyncio
import logging
import platform
import signal
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from http import HTTPStatus
from types import FrameType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from common import __version__
from common.errors import BadRequestError, LydianError
from common.pins import Pins
from server.auth import guard_logs, token_file
from server.bodies import BodyLimits
from server.coordinator import Coordinator
from server.gate import Gate, retry_after
from server.headers import EVERYWHERE
from server.hosts import with_short
from server.line import Line
from server.routes import audit, jobs, models, pages, probe, public, tokens, updates, workers
from server.settings import Settings
from server.store import Journal, lock_folder
from server.tokens import Scope, Tokens

log = logging.getLogger("lydian.app")


def create_app(
    settings: Settings | None = None, *, pin: str | None = None, line: Line | None = None, names: Iterable[str] = ()
) -> FastAPI:
    """The application. Nothing is read or written before it starts.

    Args:
        settings: where and how to run; None reads LYDIAN_* from the environment when the application starts.
        pin: this machine's StableID, where workers reach it over a tailnet: they are told it with each join token.
        names: names and addresses by which calls may come, beside this machine's own name, its addresses, its names in
            the tailnet, and those of the settings.
        line: how the coordinator is spoken to; None: in plain words, where nobody else listens.
    """
    line = line or Line()

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            try:
                coordinator = await _start(settings or Settings.from_environment(), line, stack)
            except (LydianError, OSError) as error:
                app.state.failed_start = error
                raise
            coordinator.tailnet.pin = pin
            app.state.coordinator, app.state.line = coordinator, line
            with _answering_waits_on_sigterm(coordinator):
                yield

    app = FastAPI(
        title="LydianAI distributed training",
        version=__version__,
        lifespan=life,
        openapi_url=None,  # served behind a token, by routes.public
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(BodyLimits, settings=settings)
    app.add_middleware(Gate, names=(*with_short(platform.node()), *names))  # added last, so asked first
    for module in (public, jobs, workers, updates, models, probe, tokens, audit, pages):
        app.include_router(module.router)
    app.add_exception_handler(LydianError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_bug)
    return app


async def _start(settings: Settings, line: Line, stack: AsyncExitStack) -> Coordinator:
    """A coordinator that runs; leaving the stack stops it and gives its folder back."""
    guard_logs()
    if settings.tls and not line.encrypted:
        raise LydianError(
            f"LYDIAN_TLS={settings.tls} asks for TLS, and this process was not started by `lydian serve`, which has it",
            code="bad_setting",
            advice="Start it by `lydian serve`, or unset LYDIAN_TLS and let whoever listens encrypt.",
        )
    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    stack.enter_context(lock_folder(settings.state_dir))
    journal = Journal.open(settings.state_dir / "journal.sqlite", ballast_bytes=settings.reserve_bytes)
    stack.callback(journal.close)
    known = Tokens(journal)
    stack.callback(known.keep_seen)
    scopes: tuple[Scope, ...] = ("admin", "join")
    for scope in scopes:
        token_file(settings.state_dir, f"{scope}.token", scope, known, Pins(certificate=line.pin))
    coordinator = Coordinator.open(settings, journal, known)
    coordinator.tailnet.certificate = line.pin
    stack.push_async_callback(coordinator.stop)
    await coordinator.start()
    return coordinator


def failed_start(app: FastAPI) -> LydianError | None:
    """Why the application could not start, in a sentence; None if it has, or has not tried."""
    error = getattr(app.state, "failed_start", None)
    if isinstance(error, OSError):
        return LydianError(
            f"the state folder cannot be used: {error}",
            code="folder_unusable",
            advice="Give this user the right to write there, or start with another --state-dir.",
        )
    return error


@contextmanager
def _answering_waits_on_sigterm(coordinator: Coordinator) -> Iterator[None]:
    """End long polls and event streams when the process is told to stop.

    The server waits for open connections before it ends the application; without this it would wait for ever.
    """
    loop = asyncio.get_running_loop()
    before: dict[signal.Signals, Any] = {}

    def caught(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(coordinator.end_waits)
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, caught)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    """One shape for every error: code, sentence, what to do."""
    assert isinstance(error, LydianError)  # noqa: S101 - registered for it
    called = {name: value for name, value in request.path_params.items() if name in ("job", "worker", "assignment")}
    log.info("%s %s: %d %s: %s", request.method, request.url.path, error.status, error.code, error, extra=called)
    if error.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        route = getattr(request.scope.get("route"), "path", request.url.path)
        request.app.state.coordinator.audit.refused(request.method, route, request.url.path, error)
    headers = retry_after(error)
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.answer(), status_code=error.status, headers=headers)


async def _answer_invalid(request: Request, error: Exception) -> JSONResponse:
    """A body or a parameter that is not of the call's shape: every fault in one sentence."""
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for it
    faults = [f"{'.'.join(str(part) for part in e['loc'][1:]) or 'body'}: {e['msg']}" for e in error.errors()]
    return await _answer_error(request, BadRequestError("; ".join(faults)[:2000]))


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    """What the framework refuses by itself: no such path, no such method, a body or a range that cannot be read."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
    sentence = f"{request.method} {request.url.path}: {error.detail}"
    if error.status_code in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        refusal = BadRequestError(sentence, code="no_such_call", advice="docs/protocol.md lists the calls.")
    else:
        refusal = BadRequestError(sentence)
    log.info("%s: %d %s", sentence, error.status_code, refusal.code)
    return JSONResponse(refusal.answer(), status_code=error.status_code, headers=error.headers)


async def _answer_bug(request: Request, error: Exception) -> JSONResponse:
    """What nobody has thought of. It is logged with its traceback, and says nothing of itself to the caller.

    Made outside of everything that is added to the application, so it brings its own headers.
    """
    refusal = LydianError(f"{request.method} {request.url.path}: {type(error).__name__}, which should not happen")
    headers = {name.decode(): value.decode() for name, value in EVERYWHERE}
    return JSONResponse(refusal.answer(), status_code=refusal.status, headers=headers)


app = create_app()
