"""Workers: join, ask for work, say how it goes, leave."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.types import Receive, Scope, Send

from common.messages import (
    Heartbeat,
    HeartbeatAnswer,
    PollAnswer,
    PollRequest,
    Registration,
    Welcome,
    WorkerView,
)
from common.together import WITH_MODEL
from server import views
from server.routes.access import (
    AdminDep,
    CoordinatorDep,
    NewcomerDep,
    ReaderDep,
    ThisWorkerDep,
    TokenFirst,
    address_of,
)

router = APIRouter(prefix="/v1/workers", tags=["workers"], route_class=TokenFirst)


class _WithModel(Response):
    """An answer and the model that goes along, one after the other: a thousand answers hold the model once."""

    def __init__(self, text: str, model: bytes) -> None:
        head = text.encode() + b"\n"
        size = {"Content-Length": str(len(head) + len(model))}
        super().__init__(head, media_type=WITH_MODEL, headers=size)
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - Starlette's
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        await send({"type": "http.response.body", "body": self._model})


@router.post("")
async def register(
    registration: Registration, request: Request, coordinator: CoordinatorDep, caller: NewcomerDep
) -> Welcome:
    """Introduce a worker. POST: a join token makes a new worker; a worker's own credential updates it."""
    joining = caller if caller.scope == "join" else None
    welcome = coordinator.register(registration, caller.worker, joining)
    await coordinator.tailnet.joined(welcome.worker_id, address_of(request))
    return welcome


@router.get("")
async def list_workers(coordinator: CoordinatorDep, _: ReaderDep) -> list[WorkerView]:
    """All workers that ever joined, by name."""
    await coordinator.tailnet.refresh()
    known = sorted(coordinator.fleet.workers.values(), key=lambda worker: (worker.name, worker.id))
    return views.worker_views(coordinator, known)


@router.post("/{worker}/poll", response_model=PollAnswer, responses={204: {"description": "nothing yet"}})
async def poll(body: PollRequest, request: Request, coordinator: CoordinatorDep, worker: ThisWorkerDep) -> Response:
    """Wait for work. POST, because it claims; the same claim_key claims once."""
    answer = await coordinator.poll(worker, body, request.is_disconnected)
    if answer is None:
        return Response(status_code=204)
    text = views.poll_answer(answer, coordinator.worker(worker).registration.protocol)
    model = await coordinator.model_along(answer, body)
    if model is None:
        return Response(text, media_type="application/json")
    return _WithModel(text, model)


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
    """Give a worker nothing more until it is resumed; what it does, it finishes. By id or name, like the others."""
    return views.worker_view(coordinator, coordinator.give_order(worker, "drain"))


@router.post("/{worker}/pause")
async def pause(worker: str, coordinator: CoordinatorDep, _: AdminDep) -> WorkerView:
    """Have a worker out of the way at once, until it is resumed; what it does, it gives back."""
    return views.worker_view(coordinator, coordinator.give_order(worker, "pause"))


@router.post("/{worker}/resume")
async def resume(worker: str, coordinator: CoordinatorDep, _: AdminDep) -> WorkerView:
    """Give a worker work again that was drained or paused. POST, like its opposites: twice is once."""
    return views.worker_view(coordinator, coordinator.give_order(worker, "work"))


@router.post("/{worker}/readmit")
async def readmit(worker: str, coordinator: CoordinatorDep, _: AdminDep) -> WorkerView:
    """Give a worker work again that was set aside, drained or paused."""
    return views.worker_view(coordinator, coordinator.readmit(worker))
