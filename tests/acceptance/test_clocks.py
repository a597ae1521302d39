"""Clocks that jump decide nothing: nobody's lease ends, nothing is trained again, no token dies."""

from pathlib import Path

import pytest

from client.chaos.clocks import Clock, find_library
from tests.acceptance.kit import LocalFleet, of_type, size
from tests.acceptance.test_many_kills import JOB, TASK, check, truth_of

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
            fleet.start_workers(2, "--trust", "any")
            for name in clocks["workers"].environment():
                patch.delenv(name)
            truth = truth_of(fleet)
            job = fleet.submit(TASK, **JOB)
            jumps = [HOUR, -HOUR, 10 * DAY, -10 * DAY, 0.0][: size(5, 5)]
            for number, jump in enumerate(jumps, start=1):
                wanted = min(number, JOB["rounds"] - 1)
                fleet.await_event(
                    job, lambda e, wanted=wanted: e["type"] == "round" and e["round"] >= wanted, f"round {wanted}"
                )
                clocks["coordinator" if number % 2 else "workers"].set(jump)
            retrained, _ = check(fleet, job, truth)
            assert retrained == 0
            assert not list(of_type(fleet.facts(job), "handed_back"))
            again = fleet.submit(TASK, **JOB)  # with clocks ten days apart
            clocks["coordinator"].set(10 * DAY)
            assert check(fleet, again, truth)[0] == 0
