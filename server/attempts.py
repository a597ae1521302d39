"""Whose an attempt was, when memory has forgotten it: asked of the journal, which has every hand-out.

Pure: facts come in, answers out. A closed task has no attempts in memory; without this, anybody could say something
about it that is then kept.
"""

from collections.abc import Iterable

from common.facts import Fact, HandedBack, HandedOut, Late


def was_given(facts: Iterable[Fact], attempt: int, worker: str) -> bool:
    """Whether an attempt was handed out to a worker.

    Args:
        facts: what became of the attempts at one task (Journal.attempts).
        attempt: its number.
        worker: the worker's id.
    """
    return any(isinstance(fact, HandedOut) and (fact.attempt, fact.worker) == (attempt, worker) for fact in facts)


def came_back(facts: Iterable[Fact], attempt: int, worker: str) -> bool:
    """Whether it is known already how an attempt ended, so that its worker can add nothing to it.

    A lease that ran out is no such end: its worker may still say what happened. One that was handed out once more,
    under the same number, is open again.

    Args:
        facts: what became of the attempts at one task, in order.
        attempt: its number.
        worker: the worker's id.
    """
    ended = False
    for fact in facts:
        if (getattr(fact, "attempt", None), getattr(fact, "worker", None)) != (attempt, worker):
            continue
        if isinstance(fact, HandedOut):
            ended = False
        elif isinstance(fact, HandedBack) and fact.code != "expired":
            ended = True
    return ended


def was_late(facts: Iterable[Fact], attempt: int, worker: str) -> bool:
    """Whether it is kept already that an attempt's result came too late.

    Args:
        facts: what became of the attempts at one task.
        attempt: its number.
        worker: the worker's id.
    """
    return any(isinstance(fact, Late) and (fact.attempt, fact.worker) == (attempt, worker) for fact in facts)
