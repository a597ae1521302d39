"""Tokens: make, show, rotate and revoke them."""

import logging
from typing import Annotated

from fastapi import APIRouter, Query

from common.messages import RevokeAnswer, RotateAnswer, RotateRequest, TokenAnswer, TokenRequest, TokenView
from server import rounds
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
        until = f"by {coordinator.tokens.first_until(token.id)}, when the old one ends; else it has to join anew"
        reason = f"{token.name or token.worker} is to fetch a new credential {until}"
        log.info("lyd_work_%s_…: %s", token.id, reason)
        return RotateAnswer(token=None, id=token.id, reason=reason)
    reason = f"the first secret counts until {coordinator.tokens.first_until(token.id)}, or until the second is used"
    log.info("lyd_%s_%s_… has a second secret: %s", token.scope, token.id, reason)
    return RotateAnswer(token=coordinator.tailnet.pinned(made), id=token.id, reason=reason)


@router.post("/{token}/revoke")
async def revoke_token(
    token: str, coordinator: CoordinatorDep, caller: AdminDep, cancel_jobs: Annotated[bool, Query()] = False
) -> RevokeAnswer:
    """Let a token count no more, from the next call on; what a worker held by it goes to others. Twice is once.

    The jobs that it submitted go on, unless they are to end with it.
    """
    found = coordinator.tokens.find(token)
    coordinator.tokens.revoke(found.id)
    log.info("lyd_%s_%s_… was revoked with lyd_admin_%s_…", found.scope, found.id, caller.token_id)
    if found.worker is not None:
        coordinator.cut_off(found.worker)
    coordinator.tokens_changed()
    open_jobs = coordinator.open_jobs_of(found.id)
    if cancel_jobs:
        who = f"{caller.name or caller.scope}, who revoked the token {found.name or found.id} that submitted it,"
        for job in open_jobs:
            coordinator.command(job, rounds.cancel, who)
    view = coordinator.tokens.view(found.id)
    jobs = {"ended_jobs" if cancel_jobs else "open_jobs": open_jobs}
    return RevokeAnswer(**view.model_dump(), **jobs)
