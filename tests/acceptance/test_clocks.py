"""Clocks that jump decide nothing: nobody's lease ends, nothing is trained again, no token dies."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from client.chaos.clocks import Clock, find_library
from tests.acceptance.kit import LocalFleet, closed_rounds, of_type, size
from tests.acceptance.test_many_kills import JOB, check

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(find_library() is None, reason="needs libfaketime (Debian: apt install libfaketime)"),
]

HOUR, DAY = 3600.0, 86_400.0


def test_clocks_of_coordinator_and_worker_that_jump_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = find_library()
    assert library is not None
    clocks = {name: Clock(library, tmp_path / f"{name}.clock") for name in ("coordinator", "workers")}
    for clock in clocks.values():
        clock.set(0)
    with monkeypatch.context() as patch:
        fleet = LocalFleet(tmp_path)
        fleet.environment |= clocks["coordinator"].environment()
        with fleet:
            for name, value in clocks["workers"].environment().items():
                patch.setenv(name, value)
            fleet.start_workers(2)
            for name in clocks["workers"].environment():
                patch.delenv(name)
            truth = fleet.truth(**JOB)
            for times in range(size(1, 4)):
                job = fleet.submit(**JOB)
                for number, jump in enumerate((HOUR, -HOUR, 10 * DAY, -10 * DAY, 0.0), start=1):
                    fleet.await_event(job, partial(is_round, number), f"round {number}")
                    clocks["coordinator" if (number + times) % 2 else "workers"].set(jump)
                assert check(fleet, job, truth)[0] == 0
                facts = fleet.facts(job)
                assert not list(of_type(facts, "handed_back", "late"))
                assert all(0 < closed["seconds"] < HOUR / 2 for closed in closed_rounds(facts)), "a round took a jump"
            again = fleet.submit(**JOB)  # with clocks ten days apart
            clocks["coordinator"].set(10 * DAY)
            assert check(fleet, again, truth)[0] == 0


def is_round(number: int, event: dict[str, Any]) -> bool:
    """Whether this event is the end of the round of this number, or of one after it."""
    return event["type"] == "round" and int(event["round"]) >= number
