"""Names that the coordinator makes: of jobs, workers and assignments. Pure but for the random part of new ids."""

import re
import secrets
from typing import get_args

from common.errors import NotFoundError
from common.messages import Kind
from server.rounds import Task

# One spelling a number, as each spelling would be an upload of its own: 01 is not 1, nor is a digit of another script.
_NUMBER = r"(0|[1-9][0-9]{0,8})"
_ASSIGNMENT = re.compile(rf"([a-z0-9-]{{1,40}})\.(init|train|evaluate)\.{_NUMBER}\.{_NUMBER}")


def new_id(name: str) -> str:
    """An id that says what it is: the name, cut to letters, digits and dashes, and 8 random hex digits."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:24] or "x"
    return f"{slug}-{secrets.token_hex(4)}"


def assignment_id(job: str, task: Task) -> str:
    """The name of a job's task in URLs, the same for every attempt."""
    return f"{job}.{task.kind}.{task.round}.{task.shard}"


def parse_assignment(name: str) -> tuple[str, Task]:
    """(job id, task) of an assignment's name.

    Raises:
        NotFoundError: it is no name of an assignment.
    """
    found = _ASSIGNMENT.fullmatch(name)
    if found is None:
        raise NotFoundError(f"{name[:80]!r} is no assignment", code="unknown_assignment", advice="Poll for work.")
    job, kind, round_index, shard = found.groups()
    return job, Task(next(k for k in get_args(Kind) if k == kind), int(round_index), int(shard))
