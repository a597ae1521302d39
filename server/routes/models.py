"""Weights and task files, by digest: immutable, so that they can be fetched in pieces and kept for ever."""

import asyncio
import logging
import os
import re
from http import HTTPStatus
from typing import Annotated, ClassVar

from fastapi import APIRouter, Path, Request
from fastapi.responses import FileResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from common.errors import NotFoundError
from common.ranges import content_range, format_ranges
from server.blobs import Blobs, parse_content_range
from server.coordinator import Coordinator
from server.routes.access import AnyoneDep, CoordinatorDep, SubmitterDep, TokenFirst, TrainerDep
from server.routes.updates import body_of

router = APIRouter(tags=["models"], route_class=TokenFirst)

log = logging.getLogger("lydian.models")

_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{1,18})?")

DigestPath = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]


class BlobResponse(FileResponse):
    """A blob, or a range of it, with its digest as a strong ETag; If-Range works.

    The whole and a single range are sent from here, by pieces that many answers share (server.reading); anything else
    that a Range may ask for is the framework's: several ranges come as one multipart answer, and more than a hundred as
    the whole. The head waits for the first bytes, so that a file that is deleted between the two is still answered as
    one that is not here.
    """

    chunk_size: ClassVar[int] = 1 << 18  # type: ignore[misc] # of several ranges

    def __init__(self, blobs: Blobs, digest: str, missing: NotFoundError) -> None:
        """Find the file.

        Args:
            blobs: where it is.
            digest: its name.
            missing: what to answer when it is not there, or not any more.
        """
        path = blobs.path(digest)
        try:
            about = path.stat()
        except FileNotFoundError:
            raise missing from None
        headers = {"ETag": f'"{digest}"', "Cache-Control": "private, max-age=31536000, immutable"}
        super().__init__(path, headers=headers, media_type="application/octet-stream", stat_result=about)
        self._reading, self._digest, self._size, self._missing = blobs.reading, digest, about.st_size, missing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer.

        Raises:
            NotFoundError: the file is gone.
            HTTPException: the range is malformed, or lies beyond the file.
        """
        asked = Headers(scope=scope)
        wanted, of = asked.get("range"), asked.get("if-range")
        whole = wanted is None or (of is not None and of != self.headers["etag"])
        span = (0, self._size) if wanted is None or whole else self._span(wanted)
        try:
            if self._size == 0 or span is None:
                await self._answer_otherwise(scope, receive, send)
            else:
                await self._answer(self._head(*span, whole=whole), *span, receive, send)
        except FileNotFoundError:
            raise self._missing from None

    def _span(self, wanted: str) -> tuple[int, int] | None:
        """The bytes [start, stop) that are asked for; None: not one range of the file that is here."""
        found = _RANGE.fullmatch(wanted)
        start, last = (int(found[1]), int(found[2] or self._size - 1)) if found else (0, -1)
        return (start, min(last + 1, self._size)) if start <= last and start < self._size else None

    def _head(self, start: int, stop: int, *, whole: bool) -> Message:
        if whole:
            return {"type": "http.response.start", "status": HTTPStatus.OK, "headers": self.raw_headers}
        headers = MutableHeaders(raw=list(self.raw_headers))
        headers["content-range"] = content_range(start, stop, self._size)
        headers["content-length"] = str(stop - start)
        return {"type": "http.response.start", "status": HTTPStatus.PARTIAL_CONTENT, "headers": headers.raw}

    async def _answer(self, head: Message, at: int, stop: int, receive: Receive, send: Send) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)  # whoever has it open reads on, should it be deleted
        leaving: asyncio.Task[None] | None = None
        try:
            with self._reading.answering():
                data = await self._reading.piece(self._digest, descriptor, at, stop)
                await send(head)
                while at + len(data) < stop:
                    leaving = leaving or asyncio.create_task(_left(receive))
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    if leaving.done():
                        return
                    at += len(data)
                    data = await self._reading.piece(self._digest, descriptor, at, stop)
                await send({"type": "http.response.body", "body": data})
        finally:
            os.close(descriptor)
            if leaving is not None:
                leaving.cancel()

    async def _answer_otherwise(self, scope: Scope, receive: Receive, send: Send) -> None:
        head: Message | None = None

        async def late(message: Message) -> None:
            nonlocal head
            if message["type"] == "http.response.start":
                head = message
                return
            if head is not None:
                _check_range(head)
                await send(head)
                head = None
            await send(message)

        await super().__call__(scope, receive, late)


async def _left(receive: Receive) -> None:
    """Return when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_range(head: Message) -> None:
    """Let the application word what is wrong with a range, as it words everything."""
    if head["status"] >= HTTPStatus.BAD_REQUEST:
        headers = {name.decode(): value.decode() for name, value in head["headers"] if name == b"content-range"}
        raise HTTPException(head["status"], "the Range is malformed, or lies beyond the file", headers)


def weights_response(coordinator: Coordinator, digest: str) -> Response:
    """A model's file."""
    return BlobResponse(coordinator.blobs, digest, _no_model(digest))


def _no_model(digest: str) -> NotFoundError:
    return NotFoundError(f"the model {digest[:12]}… is not kept here", code="unknown_model", advice="Poll for work.")


@router.get("/v1/models/{digest}")
async def get_model(digest: DigestPath, coordinator: CoordinatorDep, _: AnyoneDep) -> Response:
    """One version of a model, or a step from one to the next."""
    if not coordinator.keeps(digest):
        raise _no_model(digest)
    return weights_response(coordinator, digest)


@router.head("/v1/models/{digest}")
async def held_of_model(digest: DigestPath, coordinator: CoordinatorDep, caller: SubmitterDep) -> Response:
    """Which bytes of a file for a job to begin with are here, in the header Lydian-Ranges; of a kept model all are."""
    kept = coordinator.model_called(digest)
    ranges = ((0, kept.size),) if kept is not None else coordinator.given.held(caller.token_id, digest)
    return Response(headers={"Lydian-Ranges": format_ranges(ranges)})


@router.put("/v1/models/{digest}", status_code=204)
async def put_model(
    digest: DigestPath, request: Request, coordinator: CoordinatorDep, caller: SubmitterDep
) -> Response:
    """Take bytes of a file for a job to begin with. PUT with Content-Range: sending a range twice changes nothing."""
    length = request.headers.get("Content-Length")
    span = parse_content_range(request.headers.get("Content-Range"), int(length) if length else None)
    try:
        await coordinator.receive_model(caller.token_id, digest, span, body_of(request))
    except ClientDisconnect:
        log.info("lyd_%s_%s_… broke off sending %s…; what came is kept", caller.scope, caller.token_id, digest[:12])
    return Response(status_code=204)


@router.get("/v1/tasks/{digest}")
async def get_task(digest: DigestPath, coordinator: CoordinatorDep, _: TrainerDep) -> Response:
    """A user's task file."""
    missing = NotFoundError(
        f"the task file {digest[:12]}… is not kept here",
        code="unknown_task",
        advice="That of a job which ended without a model was deleted with it.",
    )
    if not any(digest == job.task_digest for job in coordinator.jobs.values()):
        raise missing
    return BlobResponse(coordinator.blobs, digest, missing)
