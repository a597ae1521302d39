"""Results of assignments: bytes by ranges, then one call that lets them count."""

import logging
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from starlette.requests import ClientDisconnect

from common.errors import BadRequestError, LateError
from common.messages import Abandon, Group, Receipt, Reveal, Roster, SecureKeys, SecureShares, Submission
from common.ranges import format_ranges
from common.together import HEADER_CHARACTERS, SUBMISSION, read_submission
from server.blobs import parse_content_range
from server.routes.access import CoordinatorDep, TokenFirst, WorkerDep

router = APIRouter(prefix="/v1/updates", tags=["updates"], route_class=TokenFirst)

log = logging.getLogger("lydian.updates")

Attempt = Annotated[int, Query(ge=1, lt=2**31)]


@router.head("/{assignment}")
async def held_ranges(assignment: str, attempt: Attempt, coordinator: CoordinatorDep, worker: WorkerDep) -> Response:
    """Which bytes of an upload are here, in the header Lydian-Ranges."""
    ranges = coordinator.held_ranges(worker, assignment, attempt)
    return Response(headers={"Lydian-Ranges": format_ranges(ranges)})


@router.put("/{assignment}", status_code=204, responses={200: {"model": Receipt}})
async def upload(
    assignment: str,
    attempt: Attempt,
    request: Request,
    coordinator: CoordinatorDep,
    worker: WorkerDep,
    submission: Annotated[str | None, Header(alias=SUBMISSION, max_length=HEADER_CHARACTERS)] = None,
) -> Response:
    """Take bytes of an update. PUT with Content-Range, because sending a range twice changes nothing.

    With its submission in a header, a small update is handed in by this one call.
    """
    length = request.headers.get("Content-Length")
    span = parse_content_range(request.headers.get("Content-Range"), int(length) if length else None)
    result = None if submission is None else _whole(submission, attempt, span)
    try:
        with coordinator.quotas.uploading(worker, (assignment, attempt)):
            handed_in = result is not None
            await coordinator.receive(worker, assignment, attempt, span, body_of(request), handed_in=handed_in)
    except ClientDisconnect:
        log.info("%s broke off an upload for %s; what came is kept", worker, assignment)
        return Response(status_code=204)
    except LateError:
        if result is None:
            raise  # else it may have counted before: what becomes of it is said below, as to any submission
    if result is None:
        return Response(status_code=204)
    receipt = await coordinator.take(worker, assignment, result)
    return Response(receipt.model_dump_json(), media_type="application/json")


def _whole(header: str, attempt: int, span: tuple[int, int, int]) -> Submission:
    """The submission that comes with an update.

    Raises:
        BadRequestError: it does not read, is another attempt's, or comes with less than the whole.
    """
    submission, (start, stop, total) = read_submission(header), span
    if submission.attempt != attempt:
        raise BadRequestError(f"the call is of attempt {attempt}, its submission of attempt {submission.attempt}")
    if (start, stop) != (0, total):
        raise BadRequestError(f"a submission came with bytes {start} to {stop} of {total}: it comes with all or none")
    return submission


async def body_of(request: Request) -> AsyncIterator[bytes]:
    """The body as it comes. Starlette's own stream holds each piece until the next is there: much, of many uploads.

    Raises:
        ClientDisconnect: its sender is gone.
    """
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        more = message.get("more_body", False)
        yield message.pop("body", b"")


@router.post("/{assignment}/submit")
async def submit(assignment: str, submission: Submission, coordinator: CoordinatorDep, worker: WorkerDep) -> Receipt:
    """Let a result count. Twice is once, and gets the same answer."""
    return await coordinator.take(worker, assignment, submission)


@router.post("/{assignment}/abandon", status_code=204)
async def abandon(assignment: str, reason: Abandon, coordinator: CoordinatorDep, worker: WorkerDep) -> None:
    """Give an assignment back, saying why."""
    coordinator.abandon(worker, assignment, reason)


@router.post("/{assignment}/keys", response_model=Roster, responses={204: {"description": "not decided yet"}})
async def announce(assignment: str, keys: SecureKeys, coordinator: CoordinatorDep, worker: WorkerDep) -> Response:
    """Announce a masked update, and wait for who sums together. Twice is once, and waits on."""
    return _or_nothing(await coordinator.announce(worker, assignment, keys))


@router.post("/{assignment}/shares", response_model=Group, responses={204: {"description": "not decided yet"}})
async def cut(assignment: str, shares: SecureShares, coordinator: CoordinatorDep, worker: WorkerDep) -> Response:
    """Hand shares to one's peers, and wait for whose masks go into the updates. Twice is once, and waits on."""
    return _or_nothing(await coordinator.cut(worker, assignment, shares))


@router.post("/{assignment}/reveal", status_code=204)
async def reveal(assignment: str, opened: Reveal, coordinator: CoordinatorDep, worker: WorkerDep) -> None:
    """Open one share of each member. Twice is once."""
    coordinator.reveal(worker, assignment, opened)


def _or_nothing(answer: Roster | Group | None) -> Response:
    if answer is None:
        return Response(status_code=204)
    return Response(answer.model_dump_json(), media_type="application/json")
