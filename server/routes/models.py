"""Weights and task files, by digest: immutable, so that they can be fetched in pieces and kept for ever."""

from typing import Annotated, ClassVar

from fastapi import APIRouter, Path
from fastapi.responses import FileResponse, Response

from common.errors import NotFoundError
from server.coordinator import Coordinator
from server.routes.access import AnyoneDep, CoordinatorDep

router = APIRouter(tags=["models"])

DigestPath = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]


class BlobResponse(FileResponse):
    """A file in large pieces: at Starlette's 64 KiB each, the loop is busy with hops instead of bytes."""

    chunk_size: ClassVar[int] = 1 << 20  # type: ignore[misc]


def weights_response(coordinator: Coordinator, digest: str) -> Response:
    """A blob with its digest as a strong ETag; Range and If-Range work."""
    path = coordinator.blobs.path(digest)
    headers = {"ETag": f'"{digest}"', "Cache-Control": "private, max-age=31536000, immutable"}
    return BlobResponse(path, media_type="application/octet-stream", headers=headers)


@router.get("/v1/models/{digest}")
async def get_model(digest: DigestPath, coordinator: CoordinatorDep, _: AnyoneDep) -> Response:
    """One version of a model."""
    known = any(digest == model.digest for models in coordinator.models.values() for model in models.values())
    if not known or not coordinator.blobs.has(digest):
        raise NotFoundError(f"the model {digest[:12]}… is not kept here", code="unknown_model", advice="Poll for work.")
    return weights_response(coordinator, digest)


@router.get("/v1/tasks/{digest}")
async def get_task(digest: DigestPath, coordinator: CoordinatorDep, _: AnyoneDep) -> Response:
    """A user's task file."""
    known = any(digest == job.task_digest for job in coordinator.jobs.values())
    if not known or not coordinator.blobs.has(digest):
        raise NotFoundError(f"the task file {digest[:12]}… is not kept here", code="unknown_task")
    return weights_response(coordinator, digest)
