"""Workers: join, ask for work, say how it goes, leave."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from common.messages import (
    Heartbeat,
    HeartbeatAnswer,
    PollAnswer,
    PollRequest,
    Registration,
    Welcome,
    WorkerView,
)
from server import views
from server.routes.access import AdminDep, CoordinatorDep, NewcomerDep, ThisWorkerDep, address_of

router = APIRouter(prefix="/v1/workers", tags=["workers"])


@router.post("")
async def register(
    registration: Registration, request: Request, coordinator: CoordinatorDep, caller: NewcomerDep
) -> Welcome:
    """Introduce a worker. POST: a join token makes a new worker; a worker's own credential updates it."""
    welcome = coordinator.register(registration, caller.worker)
    await coordinator.tailnet.joined(welcome.worker_id, address_of(request))
    return welcome


@router.get("")
async def list_workers(coordinator: CoordinatorDep, _: AdminDep) -> list[WorkerView]:
    """All workers that ever joined, by name."""
    await coordinator.tailnet.refresh()
    known = sorted(coordinator.fleet.workers.values(), key=lambda worker: (worker.name, worker.id))
    return [views.worker_view(coordinator, worker) for worker in known]


@router.post("/{worker}/poll", response_model=PollAnswer, responses={204: {"description": "nothing yet"}})
async def poll(body: PollRequest, request: Request, coordinator: CoordinatorDep, worker: ThisWorkerDep) -> Response:
    """Wait for work. POST, because it claims; the same claim_key claims once."""
    answer = await coordinator.poll(worker, body, request.is_disconnected)
    if answer is None:
        return Response(status_code=204)
    protocol = coordinator.worker(worker).registration.protocol
    return Response(views.poll_answer(answer, protocol), media_type="application/json")


@router.post("/{worker}/heartbeat")
async def heartbeat(body: Heartbeat, coordinator: CoordinatorDep, worker: ThisWorkerDep) -> HeartbeatAnswer:
    """Renew the lease of an assignment."""
    return coordinator.heartbeat(worker, body)


@router.post("/{worker}/leave", status_code=204)
async def leave(
    coordinator: CoordinatorDep, worker: ThisWorkerDep, start_id: Annotated[str, Query(max_length=64)]
) -> None:
    """Say goodbye, so that nobody waits."""
    coordinator.leave(worker, start_id)


@router.post("/{worker}/drain")
async def drain(worker: str, coordinator: CoordinatorDep, _: AdminDep) -> WorkerView:
    """Give a worker nothing more; what it does, it finishes."""
    return views.worker_view(coordinator, coordinator.drain(worker))


@router.post("/{worker}/readmit")
async def readmit(worker: str, coordinator: CoordinatorDep, _: AdminDep) -> WorkerView:
    """Give a worker work again that was set aside or drained."""
    return views.worker_view(coordinator, coordinator.readmit(worker))
