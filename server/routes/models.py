"""Weights and task files, by digest: immutable, so that they can be fetched in pieces and kept for ever."""

from http import HTTPStatus
from typing import Annotated, ClassVar

from fastapi import APIRouter, Path
from fastapi.responses import FileResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from common.errors import NotFoundError
from server.blobs import Blobs
from server.coordinator import Coordinator
from server.routes.access import AnyoneDep, CoordinatorDep

router = APIRouter(tags=["models"])

DigestPath = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]


class BlobResponse(FileResponse):
    """A blob, or a range of it, with its digest as a strong ETag; If-Range works.

    In large pieces: at Starlette's 64 KiB each, the loop is busy with hops instead of bytes. Several ranges come as one
    multipart answer, and more than a hundred as the whole. The head waits for the first bytes, so that a file that is
    deleted between the two is still answered as one that is not here.
    """

    chunk_size: ClassVar[int] = 1 << 20  # type: ignore[misc]

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
        self._missing = missing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer.

        Raises:
            NotFoundError: the file is gone.
            HTTPException: the range is malformed, or lies beyond the file.
        """
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

        try:
            await super().__call__(scope, receive, late)
        except FileNotFoundError:
            raise self._missing from None


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


@router.get("/v1/tasks/{digest}")
async def get_task(digest: DigestPath, coordinator: CoordinatorDep, _: AnyoneDep) -> Response:
    """A user's task file."""
    missing = NotFoundError(f"the task file {digest[:12]}… is not kept here", code="unknown_task")
    if not any(digest == job.task_digest for job in coordinator.jobs.values()):
        raise missing
    return BlobResponse(coordinator.blobs, digest, missing)
