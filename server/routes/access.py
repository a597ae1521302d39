"""Who calls, and what they may. Every router states its rule by one of these dependencies."""

from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute

from common.errors import ForbiddenError
from server.audit import CALLER, Caller
from server.auth import Principal, require
from server.coordinator import Coordinator


async def get_coordinator(request: Request) -> Coordinator:
    """The one coordinator of this process."""
    coordinator: Coordinator = request.app.state.coordinator
    return coordinator


STRANGER = "nobody"  # in the audit record: who calls without a token that counts

CoordinatorDep = Annotated[Coordinator, Depends(get_coordinator)]


class TokenFirst(APIRoute):
    """A route that looks for a token that counts before a byte of the body is read; its rule is asked afterwards.

    FastAPI reads and parses a body before it asks any dependency: a stranger could have megabytes of JSON parsed.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, behind that look."""
        answer = super().get_route_handler()

        async def answer_known(request: Request) -> Response:
            coordinator = await get_coordinator(request)
            CALLER.set(Caller(STRANGER, peer=address_of(request)[0]))
            coordinator.tokens.check(request.headers.get("Authorization"))
            return await answer(request)

        return answer_known


async def get_principal(request: Request, coordinator: CoordinatorDep) -> Principal:
    """Whoever holds the token that came with the call."""
    peer = address_of(request)[0]
    CALLER.set(Caller(STRANGER, peer=peer))
    principal = coordinator.tokens.check(request.headers.get("Authorization"))
    caller = Caller(f"{principal.scope}:{principal.token_id}", principal.worker or "", peer)
    CALLER.set(caller)
    if principal.worker is not None:
        await coordinator.tailnet.admit(principal.worker, address_of(request))
        CALLER.set(replace(caller, node=coordinator.tailnet.node_of(principal.worker)))
    return principal


def address_of(request: Request) -> tuple[str, int]:
    """The caller's end of the connection: address and port; empty where there is none, as on a Unix socket."""
    return (request.client.host, request.client.port) if request.client else ("", 0)


PrincipalDep = Annotated[Principal, Depends(get_principal)]


async def get_admin(principal: PrincipalDep) -> Principal:
    """A person or script with the admin token."""
    require(principal, "admin")
    return principal


async def get_worker(principal: PrincipalDep) -> str:
    """The id of the worker that calls."""
    require(principal, "work")
    assert principal.worker is not None  # noqa: S101 - a work token is issued to a worker
    return principal.worker


async def get_this_worker(worker: str, caller: Annotated[str, Depends(get_worker)]) -> str:
    """The worker that the path names, which must be the one that calls."""
    if worker != caller:
        raise ForbiddenError(f"{caller} may not call as {worker[:80]!r}", code="not_yours")
    return caller


async def get_newcomer(principal: PrincipalDep) -> Principal:
    """A worker that joins, by a join token, or comes back, by its own."""
    require(principal, "join", "work")
    return principal


async def get_anyone(principal: PrincipalDep) -> Principal:
    """Anyone with the admin token or a worker's."""
    require(principal, "admin", "work")
    return principal


AdminDep = Annotated[Principal, Depends(get_admin)]
WorkerDep = Annotated[str, Depends(get_worker)]
ThisWorkerDep = Annotated[str, Depends(get_this_worker)]
NewcomerDep = Annotated[Principal, Depends(get_newcomer)]
AnyoneDep = Annotated[Principal, Depends(get_anyone)]
