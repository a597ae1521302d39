"""What a shell completes: ids of jobs and names of workers, asked of the coordinator while a person waits for a Tab.

So it is quick or silent: a coordinator that is away, slow or refuses completes nothing, and says nothing.
"""

import os

from client import shown

PATIENCE_S = 1.0  # for an answer, and for a connection before it
WORDS = 60  # characters of what stands beside a suggestion


def complete_jobs(incomplete: str) -> list[tuple[str, str]]:
    """Ids of jobs that begin so, the newest first, each with what it does."""
    return [(job, said) for job, said in reversed(_asked("jobs")) if job.startswith(incomplete)]


def complete_workers(incomplete: str) -> list[tuple[str, str]]:
    """Names of workers that begin so, each with what it does."""
    return [(worker, said) for worker, said in _asked("workers") if worker.startswith(incomplete)]


def _asked(what: str) -> list[tuple[str, str]]:
    """Names with a few words each; none where nobody answers in time."""
    import typer

    from client.calling import DEFAULT_URL, local_admin_token, whole_url
    from common.api import CoordinatorApi
    from common.errors import LydianError

    try:
        url = whole_url(os.environ.get("LYDIAN_URL", DEFAULT_URL))
        token = os.environ.get("LYDIAN_TOKEN") or local_admin_token(url)
        with CoordinatorApi(url, token, timeout_s=PATIENCE_S, connect_s=PATIENCE_S) as api:
            if what == "jobs":
                return [(job.id, _words(f"{job.state}, {job.reason}")) for job in api.jobs()]
            return [(worker.name, _words(f"{worker.state}, {worker.reason}")) for worker in api.workers()]
    except (LydianError, typer.BadParameter, OSError):
        return []


def _words(text: str) -> str:
    return shown.one_line(text)[:WORDS]
