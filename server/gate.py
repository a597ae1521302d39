"""What stands before every call, of whatever method and path, known or not: nothing of its body is read before.

    names (Host, Origin) ──▶ number of calls, by token or by address ──▶ the application ──▶ headers of the answer
            400, 403                     429, Retry-After

Both questions need no rule of a path, so a path that is spelt oddly is asked them like any other. Who may call what is
asked by the routes, as before. A connection whose body was not read is closed after the refusal.
"""

import math
from collections.abc import Iterable
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from common.errors import LydianError, TooManyError, UnauthenticatedError, UnavailableError
from common.tailscale import TailscaleStatus
from server import hosts
from server.auth import Principal
from server.bodies import CLOSES
from server.coordinator import Coordinator
from server.headers import secured
from server.quotas import Reason

_REASONS: dict[str, Reason] = {"origin_not_allowed": "origin"}  # of a refusal by names; every other is the host's


class Gate:
    """ASGI middleware, the outermost."""

    def __init__(self, app: ASGIApp, names: Iterable[str] = ()) -> None:
        """Take the names that are this coordinator's for as long as it runs; those that change it asks for itself."""
        self._app, self._given = app, tuple(names)
        self._names = hosts.names_of(self._given)
        self._of: Coordinator | None = None  # whose they are
        self._status: TailscaleStatus | None = None  # the last that there was

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call that is refused here, or pass it on."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # there is none here
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = secured(send)
        coordinator: Coordinator = scope["app"].state.coordinator
        error = self._by_name(scope, coordinator) or _by_number(scope, coordinator)
        if error is None:
            await self._app(scope, receive, send)
        else:
            await _refuse(error, scope, receive, send)

    def _by_name(self, scope: Scope, coordinator: Coordinator) -> LydianError | None:
        said: dict[bytes, list[str]] = {b"host": [], b"origin": []}
        for name, value in scope["headers"]:
            if name in said:
                said[name].append(value.decode("latin-1"))
        server = scope.get("server") or ("", None)
        error = hosts.refusal(
            said[b"host"],
            said[b"origin"],
            scheme=scope["scheme"],
            listening=str(server[0]),
            names=self._known(coordinator),
        )
        if error is not None:
            address = _address(scope)
            coordinator.quotas.refusals.note(_REASONS.get(error.code, "host"), address, error)
        return error

    def _known(self, coordinator: Coordinator) -> frozenset[str]:
        """Our names. Those of the tailnet stay as they were last known while tailscaled cannot be asked."""
        status = coordinator.tailnet.status
        if coordinator is not self._of or (status is not None and status is not self._status):
            here = (*self._given, *coordinator.settings.allow_host)
            there = (*status.addresses, *hosts.with_short(status.name)) if status is not None else ()
            self._of, self._status, self._names = coordinator, status, hosts.names_of((*here, *there))
        return self._names


def _by_number(scope: Scope, coordinator: Coordinator) -> TooManyError | None:
    caller: Principal | None = None
    for name, value in scope["headers"]:
        if name == b"authorization":
            with suppress(UnauthenticatedError):  # the route says so
                caller = coordinator.tokens.check(value.decode("latin-1"))
            break
    return coordinator.quotas.call(caller, _address(scope))


def _address(scope: Scope) -> str:
    """Where a call comes from; empty: there is no telling, as on a Unix socket."""
    return str(scope["client"][0]) if scope.get("client") else ""


async def _refuse(error: LydianError, scope: Scope, receive: Receive, send: Send) -> None:
    headers = Headers(scope=scope)
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    answer = JSONResponse(error.answer(), error.status, headers=CLOSES if has_body else {})
    answer.headers.update(retry_after(error))
    await answer(scope, receive, send)


def retry_after(error: LydianError) -> dict[str, str]:
    """The header that says after how many seconds the same call may be answered, where that is so."""
    match error:
        case TooManyError(retry_after_s=wait_s):
            return {"Retry-After": str(math.ceil(wait_s))} if wait_s > 0 else {}
        case UnavailableError():
            return {"Retry-After": "1"}
        case _:
            return {}
