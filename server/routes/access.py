"""Who calls, and what they may. Every router states its rule by one of these dependencies."""

from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from common.errors import BadRequestError, ForbiddenError, NotFoundError
from server.audit import CALLER, Caller
from server.auth import READERS, SUBMITTERS, require, require_own
from server.coordinator import Coordinator
from server.tokens import Principal


async def get_coordinator(request: Request) -> Coordinator:
    """The one coordinator of this process."""
    coordinator: Coordinator = request.app.state.coordinator
    return coordinator


STRANGER = "nobody"  # in the audit record: who calls without a token that counts

CoordinatorDep = Annotated[Coordinator, Depends(get_coordinator)]

OWN = "own"  # in a path, in place of a token's id: the caller's


class TokenFirst(APIRoute):
    """A route that looks for a token that counts before a byte of the body is read; its rule is asked afterwards.

    FastAPI reads and parses a body before it asks any dependency: a stranger could have megabytes of JSON parsed.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, behind that look."""
        answer, known = super().get_route_handler(), sorted(_parameters(self.dependant))

        async def answer_known(request: Request) -> Response:
            await _caller(request, await get_coordinator(request))
            if unknown := sorted(set(request.query_params) - {*known}):
                takes = f"takes {', '.join(known)}" if known else "takes none"
                raise BadRequestError(f"{unknown[0][:80]!r} is no parameter of this call, which {takes}")
            return await answer(request)

        return answer_known


def _parameters(dependant: Dependant) -> Iterator[str]:
    """The names that may stand behind the question mark: FastAPI lets any other pass, and a typing error with it."""
    yield from (field.alias for field in dependant.query_params)
    for below in dependant.dependencies:
        yield from _parameters(below)


async def get_principal(request: Request) -> Principal:
    """Whoever holds the token that came with the call."""
    coordinator = await get_coordinator(request)
    principal = await _caller(request, coordinator, noted=True)
    if principal.worker is not None:
        await coordinator.tailnet.admit(principal.worker, address_of(request))
        CALLER.set(replace(CALLER.get(), node=coordinator.tailnet.node_of(principal.worker)))
    return principal


async def _caller(request: Request, coordinator: Coordinator, *, noted: bool = False) -> Principal:
    """The holder of the call's token; without any, who may read without one, where that is switched on.

    Whoever it is goes into the audit record.

    Raises:
        UnauthenticatedError: neither.
    """
    header, address = request.headers.get("Authorization"), address_of(request)
    CALLER.set(Caller(STRANGER, peer=address[0]))
    principal = None
    if header is None:
        status = coordinator.tailnet.status
        name = status.name if status is not None else None
        principal = await coordinator.logins.principal(request.method, request.headers, address, name)
    if principal is None:
        principal = coordinator.tokens.check(header, address[0] if noted else "")
    CALLER.set(Caller(f"{principal.scope}:{principal.token_id}", principal.worker or "", address[0]))
    return principal


def address_of(request: Request) -> tuple[str, int]:
    """The caller's end of the connection: address and port; empty where there is none, as on a Unix socket."""
    return (request.client.host, request.client.port) if request.client else ("", 0)


PrincipalDep = Annotated[Principal, Depends(get_principal)]


async def get_admin(principal: PrincipalDep) -> Principal:
    """A person or script with a token of scope admin."""
    require(principal, "admin")
    return principal


async def get_worker(request: Request) -> str:
    """The id of the worker that calls."""
    principal = await get_principal(request)
    require(principal, "work")
    assert principal.worker is not None  # noqa: S101 - a work token is issued to a worker
    return principal.worker


async def get_this_worker(worker: str, request: Request) -> str:
    """The worker that the path names, which must be the one that calls."""
    caller = await get_worker(request)
    if worker != caller:
        raise ForbiddenError(f"{caller} may not call as {worker[:80]!r}", code="not_yours")
    return caller


async def get_newcomer(principal: PrincipalDep) -> Principal:
    """A worker that joins, by a join token, or comes back, by its own."""
    require(principal, "join", "work")
    return principal


async def get_reader(principal: PrincipalDep) -> Principal:
    """A person or script that may look."""
    require(principal, *READERS)
    return principal


async def get_submitter(principal: PrincipalDep) -> Principal:
    """A person or script that may submit jobs."""
    require(principal, *SUBMITTERS)
    return principal


async def get_job_owner(
    job: str, coordinator: CoordinatorDep, caller: Annotated[Principal, Depends(get_submitter)]
) -> Principal:
    """Whoever submitted the job that the path names, or an admin."""
    known = coordinator.job(job).id
    require_own(caller, known, coordinator.submitted_by[known])
    return caller


async def get_token_owner(token: str, coordinator: CoordinatorDep, caller: PrincipalDep) -> str:
    """The id of the token that the path names, which is the caller's own, or any for an admin.

    Who is no admin sees no token but its own: another's is not there.
    """
    require(caller, *READERS)
    if token == OWN:
        return caller.token_id
    if caller.scope != "admin":
        if token in (caller.token_id, caller.name):
            return caller.token_id
        raise NotFoundError(f"there is no token {token[:40]!r} for this caller", code="unknown_token")
    return coordinator.tokens.find(token).id


async def get_anyone(principal: PrincipalDep) -> Principal:
    """Anyone but a worker that has not joined yet."""
    require(principal, *READERS, "work")
    return principal


async def get_trainer(principal: PrincipalDep) -> Principal:
    """Anyone with an admin token or a worker's: who may read the code that is trained with."""
    require(principal, "admin", "work")
    return principal


AdminDep = Annotated[Principal, Depends(get_admin)]
WorkerDep = Annotated[str, Depends(get_worker)]
ThisWorkerDep = Annotated[str, Depends(get_this_worker)]
NewcomerDep = Annotated[Principal, Depends(get_newcomer)]
ReaderDep = Annotated[Principal, Depends(get_reader)]
SubmitterDep = Annotated[Principal, Depends(get_submitter)]
JobOwnerDep = Annotated[Principal, Depends(get_job_owner)]
TokenOwnerDep = Annotated[str, Depends(get_token_owner)]
AnyoneDep = Annotated[Principal, Depends(get_anyone)]
TrainerDep = Annotated[Principal, Depends(get_trainer)]
