"""Tokens: make, show, rotate and revoke them."""

import logging

from fastapi import APIRouter

from common.messages import RotateAnswer, RotateRequest, TokenAnswer, TokenRequest, TokenView
from server.routes.access import AdminDep, CoordinatorDep, TokenFirst, TokenOwnerDep

router = APIRouter(prefix="/v1/tokens", tags=["tokens"], route_class=TokenFirst)

log = logging.getLogger("lydian.tokens")


@router.post("", status_code=201)
async def create_token(request: TokenRequest, coordinator: CoordinatorDep, caller: AdminDep) -> TokenAnswer:
    """Make a token. POST, because each call makes another one; it is shown this once."""
    token = coordinator.tokens.issue(
        request.scope, name=request.name, ttl_s=request.ttl_s, uses=request.uses, labels=request.labels
    )
    token_id = token.split("_")[2]
    log.info("lyd_%s_%s_… was made with lyd_admin_%s_…", request.scope, token_id, caller.token_id)
    pinned, url = coordinator.tailnet.pinned(token), coordinator.url if request.scope == "join" else ""
    return TokenAnswer(token=pinned, id=token_id, url=url)


@router.get("")
async def list_tokens(coordinator: CoordinatorDep, _: AdminDep) -> list[TokenView]:
    """All tokens that were ever made, oldest first; no secret."""
    return coordinator.tokens.views()


@router.post("/{token}/rotate")
async def rotate_token(request: RotateRequest, coordinator: CoordinatorDep, token_id: TokenOwnerDep) -> RotateAnswer:
    """Give a token a second secret, which takes the first one's place. POST, because each call makes another one."""
    token = coordinator.tokens.find(token_id)
    made = coordinator.tokens.rotate(token, request.overlap_s)
    if made is None:
        coordinator.tokens_changed()
        return RotateAnswer(token=None, id=token.id, reason=f"{token.name or token.worker} fetches a new credential")
    reason = f"the first secret counts for {request.overlap_s:g} s more, or until the second is used"
    log.info("lyd_%s_%s_… has a second secret: %s", token.scope, token.id, reason)
    return RotateAnswer(token=coordinator.tailnet.pinned(made), id=token.id, reason=reason)


@router.post("/{token}/revoke")
async def revoke_token(token: str, coordinator: CoordinatorDep, caller: AdminDep) -> TokenView:
    """Let a token count no more, from the next call on; what a worker held by it goes to others. Twice is once."""
    found = coordinator.tokens.find(token)
    coordinator.tokens.revoke(found.id)
    log.info("lyd_%s_%s_… was revoked with lyd_admin_%s_…", found.scope, found.id, caller.token_id)
    if found.worker is not None:
        coordinator.cut_off(found.worker)
    coordinator.tokens_changed()
    return coordinator.tokens.view(found.id)
