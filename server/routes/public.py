"""What this coordinator is: two calls that need no token, its metrics, and the document of everything else."""

from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from common import PROTOCOL, __version__
from common.messages import VersionView
from server.document import described
from server.metrics import exposition
from server.routes.access import AnyoneDep, CoordinatorDep, ReaderDep

router = APIRouter(tags=["about"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Alive, with its state loaded."""
    return {"status": "ok"}


@router.get("/version")
async def version(request: Request, response: Response) -> VersionView:
    """What this coordinator is and speaks; in the header `Lydian-Line`, how: `plain`, `tls` or `insecure`.

    In a header, since a worker of the version before refuses a field that it does not know.
    """
    response.headers["Lydian-Line"] = request.app.state.line.word
    return VersionView(version=__version__, protocol=PROTOCOL)


@router.get("/metrics")
async def metrics(request: Request, coordinator: CoordinatorDep, _: ReaderDep) -> Response:
    """Workers, jobs and rounds for Prometheus, which sends the token as `authorization: credentials_file`."""
    return Response(exposition(coordinator, request.app.state.line.certificate), media_type=CONTENT_TYPE_LATEST)


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request, _: AnyoneDep) -> dict[str, Any]:
    """The OpenAPI document."""
    return described(request.app)
