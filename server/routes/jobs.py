"""Jobs: submit, look, pause, resume, cancel, follow, and fetch the model."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from typing import Annotated

from fastapi import APIRouter, Header, Query
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from common.messages import JobRequest, JobView, LogEntry, Output, Submitter
from server import rounds, views
from server.events import follow
from server.logins import ASKED_EVERY_S, PREFIX
from server.rounds import Job, Step
from server.routes.access import CoordinatorDep, JobOwnerDep, ReaderDep, SubmitterDep, TokenFirst
from server.routes.models import weights_response
from server.tokens import Principal

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=TokenFirst)


@router.post("", status_code=201)
async def submit_job(request: JobRequest, coordinator: CoordinatorDep, caller: SubmitterDep) -> JobView:
    """Take a job. Idempotent by the request's key, so that a lost answer costs nothing."""
    by = Submitter(token=caller.token_id, name=caller.name)
    return views.job_view(coordinator, await coordinator.take_job(request, by))


@router.get("")
async def list_jobs(coordinator: CoordinatorDep, _: ReaderDep) -> list[JobView]:
    """All jobs, oldest first."""
    return [views.job_view(coordinator, job) for job in coordinator.jobs.values()]


@router.get("/{job}")
async def get_job(job: str, coordinator: CoordinatorDep, _: ReaderDep) -> JobView:
    """One job."""
    return views.job_view(coordinator, coordinator.job(job))


@router.post("/{job}/cancel")
async def cancel_job(job: str, coordinator: CoordinatorDep, caller: JobOwnerDep) -> JobView:
    """End a job. POST, because it acts; twice is once."""
    return _command(coordinator, job, rounds.cancel, caller)


@router.post("/{job}/pause")
async def pause_job(job: str, coordinator: CoordinatorDep, caller: JobOwnerDep) -> JobView:
    """Hand out no more work of a job."""
    return _command(coordinator, job, rounds.pause, caller)


@router.post("/{job}/resume")
async def resume_job(job: str, coordinator: CoordinatorDep, caller: JobOwnerDep) -> JobView:
    """Go on with a paused job."""
    return _command(coordinator, job, rounds.resume, caller)


def _command(coordinator: CoordinatorDep, job: str, decide: Callable[[Job, str], Step], caller: Principal) -> JobView:
    who = caller.name if caller.scope == "submit" and caller.name else "a user"
    return views.job_view(coordinator, coordinator.command(job, decide, who))


@router.get("/{job}/logs")
async def get_logs(
    job: str, coordinator: CoordinatorDep, _: ReaderDep, after: Annotated[int, Query(ge=0, lt=2**63)] = 0
) -> list[LogEntry]:
    """Every trouble of a job after fact `after`, with its traceback."""
    return list(views.log_entries(coordinator, coordinator.job(job), after))


@router.get("/{job}/output")
async def get_output(job: str, coordinator: CoordinatorDep, _: ReaderDep) -> list[Output]:
    """What the task wrote last, on each worker that is at work for a job."""
    return views.outputs(coordinator, coordinator.job(job))


@router.get("/{job}/model")
async def get_model(
    job: str, coordinator: CoordinatorDep, _: ReaderDep, which: Annotated[str, Query(max_length=20)] = "newest"
) -> Response:
    """The job's model as safetensors: `newest`, `best`, or a round's number. Tied weights are in it once."""
    digest = coordinator.model(job, which).digest
    coordinator.audit.pulled(job, which, digest)
    return weights_response(coordinator, digest)


@router.get("/{job}/events")
async def get_events(
    job: str,
    coordinator: CoordinatorDep,
    caller: ReaderDep,
    last_event_id: Annotated[int, Header(ge=0, lt=2**63)] = 0,
) -> StreamingResponse:
    """Server-sent events: every fact after Last-Event-ID, then new ones as they happen, with `now` between them."""
    known, ends_at = coordinator.job(job).id, coordinator.clock() + ASKED_EVERY_S

    def counts() -> bool:
        """A token is looked up; who came without one is looked at anew when the stream is asked for again."""
        if caller.token_id.startswith(PREFIX):
            return coordinator.clock() < ends_at
        return coordinator.tokens.counts(caller.token_id)

    def situation() -> str | None:
        current = coordinator.jobs[known]
        return None if current.over or not counts() else views.now_of(coordinator, current).model_dump_json()

    stream: AsyncIterator[bytes] = follow(coordinator.hub, coordinator.journal, known, last_event_id, situation)
    return EventsResponse(stream, coordinator.quotas.streaming(caller))


class EventsResponse(StreamingResponse):
    """An event stream, which counts as one of its caller's from its first byte to its last."""

    def __init__(self, stream: AsyncIterator[bytes], turn: AbstractContextManager[None]) -> None:
        super().__init__(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._turn = turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it.

        Raises:
            TooManyError: its caller has too many.
        """
        with self._turn:
            await super().__call__(scope, receive, send)
