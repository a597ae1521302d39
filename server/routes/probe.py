"""Measuring the line between a caller and the coordinator: bytes out, bytes in."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.requests import ClientDisconnect

from common.errors import TooSlowError
from common.link import LARGEST
from common.messages import Probed
from server.probe import TAKES_S, ProbeResponse
from server.routes.access import CoordinatorDep, PrincipalDep, TokenFirst

router = APIRouter(prefix="/v1/probe", tags=["probe"], route_class=TokenFirst)


@router.get("")
async def send_bytes(
    coordinator: CoordinatorDep, caller: PrincipalDep, size: Annotated[int, Query(alias="bytes", ge=0, le=LARGEST)]
) -> Response:
    """So many bytes, for a token of any scope."""
    return ProbeResponse(coordinator.probes, caller.token_id, size)


@router.put("")
async def take_bytes(request: Request, coordinator: CoordinatorDep, caller: PrincipalDep) -> Probed:
    """Read a body and forget it. PUT, because twice is once: nothing stays."""
    came = 0
    with coordinator.probes.turn(caller.token_id):
        try:
            async with asyncio.timeout(TAKES_S):
                async for piece in request.stream():
                    came += len(piece)
        except TimeoutError:
            raise TooSlowError(
                f"the probe's body was not here after {TAKES_S:g} s: {came} bytes came", advice="Send a smaller one."
            ) from None
        except ClientDisconnect:
            pass  # there is nobody to be answered
    return Probed(bytes=came)
