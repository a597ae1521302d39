"""The audit record, page by page: whoever reads it checks it (common.audit)."""

from typing import Annotated

from fastapi import APIRouter, Query

from common.audit import AuditPage, Shown, shown
from server.routes.access import AdminDep, CoordinatorDep, TokenFirst

router = APIRouter(prefix="/v1/audit", tags=["audit"], route_class=TokenFirst)

MOST = 500  # rows that are looked at for one page: the loop has other calls to answer

Filter = Annotated[str | None, Query(max_length=200)]


@router.get("")
async def get_audit(
    coordinator: CoordinatorDep,
    _: AdminDep,
    after: Annotated[int, Query(ge=0, lt=2**63)] = 0,
    limit: Annotated[int, Query(ge=1, le=MOST)] = MOST,
    job: Filter = None,
    worker: Filter = None,
    action: Filter = None,
) -> AuditPage:
    """The rows after row `after` that the filters let through; a page may have none of them and not be the last.

    `action` is a whole one, `update.accepted`, or what comes before the dot, `update`.
    """
    rows, head = coordinator.journal.audit_page(after, limit)
    following = rows[-1].seq if rows and rows[-1].seq < head.seq else None
    if (job, worker, action) != (None, None, None):
        rows = [row for row in rows if _fits(shown(row), job, worker, action)]
    return AuditPage(entries=tuple(rows), next=following, head=head)


def _fits(row: Shown, job: str | None, worker: str | None, action: str | None) -> bool:
    return (
        job in (None, row.job)
        and worker in (None, row.worker)
        and action in (None, row.action, row.action.partition(".")[0])
    )
