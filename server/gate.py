"""What stands before every call, of whatever method and path, known or not: nothing of its body is read before.

    names (Host, Origin) ──▶ number of calls, by token or by address ──▶ the application ──▶ headers of the answer
            400, 403                     429, Retry-After

Both questions need no rule of a path, so a path that is spelt oddly is asked them like any other. Who may call what is
asked by the routes, as before. A connection whose body was not read is closed after the refusal.
"""

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Self

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from common.errors import LydianError, TooManyError, UnauthenticatedError, UnavailableError
from common.tailscale import TailscaleStatus
from server import hosts
from server.bodies import CLOSES
from server.coordinator import Coordinator
from server.headers import secured
from server.quotas import Reason
from server.tokens import Principal

LET_IN = 1_024  # spellings that need no second look

_REASONS: dict[str, Reason] = {"origin_not_allowed": "origin"}  # of a refusal by names; every other is the host's


class Gate:
    """ASGI middleware, the outermost."""

    def __init__(self, app: ASGIApp, names: Iterable[str] = ()) -> None:
        """Take the names that are this coordinator's for as long as it runs; those that change it asks for itself."""
        self._app, self._given = app, tuple(names)
        self._names = hosts.names_of(self._given)
        self._of: Coordinator | None = None  # whose they are
        self._status: TailscaleStatus | None = None  # the last that there was
        self._let_in: set[tuple[str, ...]] = set()  # the Host of calls that were, and the address that they came to

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
        said = _Said.of(scope)
        error = self._by_name(scope, said, coordinator) or _by_number(scope, said, coordinator)
        if error is None:
            await self._app(scope, receive, send)
        else:
            await _refuse(error, scope, receive, send)

    def _by_name(self, scope: Scope, said: "_Said", coordinator: Coordinator) -> LydianError | None:
        names, listening = self._known(coordinator), str((scope.get("server") or ("", None))[0])
        plain = (*said.hosts, listening)
        if not said.origins and plain in self._let_in:
            return None
        error = hosts.refusal(said.hosts, said.origins, scheme=scope["scheme"], listening=listening, names=names)
        if error is not None:
            coordinator.quotas.refusals.note(_REASONS.get(error.code, "host"), _address(scope) or "a caller", error)
            if error.status == HTTPStatus.FORBIDDEN:
                coordinator.audit.refused(scope["method"], error.code, scope["path"], error)
        else:
            if len(self._let_in) >= LET_IN:
                self._let_in.clear()
            self._let_in.add(plain)  # right without an Origin in any case
        return error

    def _known(self, coordinator: Coordinator) -> frozenset[str]:
        """Our names. Those of the tailnet stay as they were last known while tailscaled cannot be asked."""
        status = coordinator.tailnet.status
        if coordinator is not self._of or (status is not None and status is not self._status):
            here = (*self._given, *coordinator.settings.allow_host)
            there = (*status.addresses, *hosts.with_short(status.name)) if status is not None else ()
            self._of, self._status, self._names = coordinator, status, hosts.names_of((*here, *there))
            self._let_in.clear()
        return self._names


@dataclass
class _Said:
    """What the headers of a call say that is looked at here."""

    hosts: list[str]
    origins: list[str]
    authorization: str | None

    @classmethod
    def of(cls, scope: Scope) -> Self:
        said = cls([], [], None)
        for name, value in scope["headers"]:
            match name:
                case b"host":
                    said.hosts.append(value.decode("latin-1"))
                case b"origin":
                    said.origins.append(value.decode("latin-1"))
                case b"authorization" if said.authorization is None:
                    said.authorization = value.decode("latin-1")
        return said


def _by_number(scope: Scope, said: _Said, coordinator: Coordinator) -> TooManyError | None:
    caller: Principal | None = None
    if said.authorization is not None:
        with suppress(UnauthenticatedError):  # the route says so
            caller = coordinator.tokens.check(said.authorization)
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
