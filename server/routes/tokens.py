"""Tokens for workers that are to join."""

from fastapi import APIRouter

from common.messages import TokenAnswer, TokenRequest
from server.routes.access import AdminDep, CoordinatorDep, TokenFirst

router = APIRouter(prefix="/v1/tokens", tags=["tokens"], route_class=TokenFirst)


@router.post("", status_code=201)
async def create_token(request: TokenRequest, coordinator: CoordinatorDep, _: AdminDep) -> TokenAnswer:
    """Make a token. POST, because each call makes another one; it is shown this once."""
    return TokenAnswer(token=coordinator.tailnet.pinned(coordinator.tokens.issue(request.scope)))
