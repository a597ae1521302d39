"""Whose an attempt was, and whether it is known how it ended, by the facts alone."""

from typing import Any

import pytest

from common.facts import Fact, HandedBack, HandedOut, Late
from server.attempts import came_back, was_given, was_late


def out(attempt: int = 1, worker: str = "a") -> HandedOut:
    return HandedOut(kind="train", round=1, shard=0, attempt=attempt, worker=worker)


def back(code: str, attempt: int = 1, worker: str = "a") -> HandedBack:
    where: dict[str, Any] = {"kind": "train", "round": 1, "shard": 0}
    return HandedBack(**where, attempt=attempt, worker=worker, worker_name=worker, code=code, sentence="x")


def late(attempt: int = 1, worker: str = "a") -> Late:
    return Late(round=1, shard=0, attempt=attempt, worker=worker)


@pytest.mark.parametrize(
    ("facts", "given", "ended", "came_late"),
    [([], False, False, False), ([out()], True, False, False), ([out(2)], False, False, False),
     ([out(worker="b")], False, False, False), ([out(), back("released")], True, True, False),
     ([out(), back("expired")], True, False, False), ([out(), back("expired"), back("no_data")], True, True, False),
     ([out(), back("released"), out()], True, False, False), ([out(), back("released", 2)], True, False, False),
     ([out(), back("not_finite", worker="b")], True, False, False), ([out(), late()], True, False, True),
     ([out(), late(2), late(worker="b")], True, False, False)],
)  # fmt: skip
def test_the_facts_of_a_task_tell_what_became_of_one_attempt(
    facts: list[Fact], given: bool, ended: bool, came_late: bool
) -> None:
    assert (was_given(facts, 1, "a"), came_back(facts, 1, "a"), was_late(facts, 1, "a")) == (given, ended, came_late)
