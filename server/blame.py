"""Whose fault it is that attempts fail: the task's, or that of the worker which had them.

Pure. No worker ends a job by itself while others are able to do its work: it takes three that have failed, or all that
there are. So that others come to it, a worker which has failed at a task twice leaves that to them, until they have
fared no better. A task that fails wherever it is tried is given up after as many attempts as ever.

    one of several fails, and fails again ──▶ the task is left to the others ──▶ done by one of them
                                                                            └──▶ theirs failed too: the task's fault
"""

from collections.abc import Collection, Sequence

WITNESSES = 3  # workers whose word is enough, however many there are
FAILURES_EACH = 2  # of one worker at one task, before others go first
ATTEMPTS_EACH = 10  # of one worker at one task, however they ended, likewise


def is_proven(said: Collection[str], able: Collection[str]) -> bool:
    """Whether enough workers say that a task cannot be done.

    Args:
        said: ids of those that say so, once or more often.
        able: ids of the live workers that could do it, those among them.
    """
    workers = set(said)
    return len(workers) >= WITNESSES or workers >= set(able)


def has_had_its_turns(worker: str, given: Sequence[str], failed_on: Sequence[str]) -> bool:
    """Whether a worker has been tried often enough at a task.

    Args:
        worker: its id.
        given: ids of the workers that were given the task, once for each attempt.
        failed_on: of those that failed at it, once for each failure.
    """
    return failed_on.count(worker) >= FAILURES_EACH or given.count(worker) >= ATTEMPTS_EACH


def leaves_to_others(worker: str, given: Sequence[str], failed_on: Sequence[str], able: Collection[str]) -> bool:
    """Whether a worker gets a task no more for now: it has had its turns, and another that could do it has not.

    Args:
        worker: its id.
        given: as `has_had_its_turns` takes it; so is `failed_on`.
        failed_on: see there.
        able: ids of the live workers that could do it.
    """
    if not has_had_its_turns(worker, given, failed_on):
        return False
    return any(not has_had_its_turns(other, given, failed_on) for other in able if other != worker)
