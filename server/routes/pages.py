"""The dashboard. A page itself holds nothing of anyone's and is served to whoever asks; what it shows wants the token.

    GET /, /jobs/{job}, /submit, /static/{file}   the shell: markup, style, scripts
    GET /ui/…                                     fragments and numbers, for who may read

What a page changes it changes by the calls of /v1, like every other client.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import closing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse

from common.errors import NotFoundError
from server.events import sse
from server.pages import form
from server.pages.board import Board, Part, Rendering
from server.pages.markup import SECURITY, render, static_files
from server.pages.workers import MARKS, SORTS
from server.routes.access import CoordinatorDep, ReaderDep, TokenFirst

router = APIRouter(tags=["dashboard"], include_in_schema=False)
parts = APIRouter(prefix="/ui", tags=["dashboard"], route_class=TokenFirst, include_in_schema=False)


PACE_S = 1.0  # between two looks at what changed, for one open page
KEEPALIVE = b": still here\n\n"
BEATS = 15  # looks without news after which something is sent, so that a client that is gone is noticed

JobPath = Annotated[str, Path(pattern=r"^[A-Za-z0-9._-]{1,100}$")]
Page = Annotated[int, Query(ge=1, le=1_000_000)]
KnownVersion = Annotated[str, Header(alias="If-None-Match", max_length=200)]


# ---------------------------------------------------------------- the shell


def _page(template: str, **values: object) -> HTMLResponse:
    headers = {**SECURITY, "Cache-Control": "no-cache"}
    return HTMLResponse(render(template, **values), headers=headers)


@router.get("/")
async def overview() -> HTMLResponse:
    """Fleet and jobs."""
    return _page("overview.html", states=MARKS, sorts=SORTS)


@router.get("/jobs/{job}")
async def job_page(job: JobPath) -> HTMLResponse:
    """One job. The shell is the same whether there is such a job or not."""
    return _page("job.html", job=job)


@router.get("/submit")
async def submit_page() -> HTMLResponse:
    """The form of a job."""
    return _page("submit.html", sections=form.sections(), tasks=form.tasks())


@router.get("/static/{file}")
async def static(file: str, known: KnownVersion = "") -> Response:
    """A file of the shell."""
    found = static_files().get(file)
    if found is None:
        raise NotFoundError(f"there is no file {file[:80]!r}", code="unknown_file", advice="The pages name theirs.")
    headers = {**SECURITY, "ETag": f'"{found.version}"', "Cache-Control": "no-cache"}
    if known == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(found.data, media_type=found.media_type, headers=headers)


# ---------------------------------------------------------------- what it shows


async def get_board(request: Request, coordinator: CoordinatorDep) -> Board:
    """The board of this coordinator, made when it is first asked for."""
    board: Board | None = getattr(request.app.state, "board", None)
    if board is None or board.coordinator is not coordinator:
        board = request.app.state.board = Board(coordinator)
    return board


BoardDep = Annotated[Board, Depends(get_board)]
PRIVATE = {**SECURITY, "Cache-Control": "no-store"}


def _fragment(made: Rendering, known: str) -> Response:
    """A part, unless the page has it already. Never kept on the browser's disk."""
    headers = {**PRIVATE, "ETag": f'"{made.version}"'}
    if known == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return HTMLResponse(made.body, headers=headers)


@parts.get("/fleet")
async def fleet_part(
    board: BoardDep,
    _: ReaderDep,
    find: Annotated[str, Query(max_length=200)] = "",
    state: Annotated[str, Query(max_length=20)] = "",
    sort: Literal["name", "state", "device", "memory", "path", "speed"] = "state",
    page: Page = 1,
    known: KnownVersion = "",
) -> Response:
    """The table of workers."""
    return _fragment(board.fleet(find, state, sort, page), known)


@parts.get("/jobs")
async def jobs_part(board: BoardDep, _: ReaderDep, page: Page = 1, known: KnownVersion = "") -> Response:
    """The table of jobs."""
    return _fragment(board.jobs(page), known)


@parts.get("/jobs/{job}/series")
async def series(
    job: str, board: BoardDep, _: ReaderDep, after: Annotated[int, Query(ge=0, le=1_000_000)] = 0
) -> Response:
    """The curves from a round on, thinned out where there are many."""
    past = await board.past(board.coordinator.job(job).id)
    return Response(json.dumps(past.series(after)), media_type="application/json", headers=PRIVATE)


@parts.get("/jobs/{job}/{part}")
async def job_part(
    job: str,
    part: Part,
    board: BoardDep,
    _: ReaderDep,
    round_index: Annotated[int | None, Query(alias="round", ge=1, le=1_000_000)] = None,
    known: KnownVersion = "",
) -> Response:
    """A part of a job's page."""
    return _fragment(await board.part(board.coordinator.job(job), part, round_index), known)


@parts.get("/live")
async def live(
    board: BoardDep, _: ReaderDep, job: Annotated[str | None, Query(max_length=100)] = None
) -> StreamingResponse:
    """Server-sent events: which parts of a page read differently now, at most once a second."""
    known = board.coordinator.job(job).id if job is not None else None
    headers = {**PRIVATE, "X-Accel-Buffering": "no"}
    return StreamingResponse(_changes(board, known), media_type="text/event-stream", headers=headers)


async def _changes(board: Board, job: str | None) -> AsyncIterator[bytes]:
    sent: dict[str, Any] = {}
    quiet = 0
    with closing(board.coordinator.hub.subscribe(job)) as news:  # it ends when the coordinator stops
        while True:
            versions = await board.versions(job)
            if versions != sent:
                yield sse(json.dumps(versions))
                sent, quiet = versions, 0
            else:
                quiet += 1
                if quiet % BEATS == 0:
                    yield KEEPALIVE
            try:
                async with asyncio.timeout(PACE_S):
                    while True:
                        await anext(news)
            except TimeoutError:
                continue
            except StopAsyncIteration:
                return


router.include_router(parts)
