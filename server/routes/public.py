"""What needs no token, and the document of everything that does."""

from typing import Any

from fastapi import APIRouter, Request

from common import PROTOCOL, __version__
from common.messages import VersionView
from server.routes.access import AnyoneDep

router = APIRouter(tags=["about"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Alive, with its state loaded."""
    return {"status": "ok"}


@router.get("/version")
async def version() -> VersionView:
    """What this coordinator is and speaks."""
    return VersionView(version=__version__, protocol=PROTOCOL)


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request, _: AnyoneDep) -> dict[str, Any]:
    """The OpenAPI document."""
    document: dict[str, Any] = request.app.openapi()
    return document
