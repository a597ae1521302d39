"""Versions that wait for nobody: one worker is five times slower, and the coordinator dies in the middle."""

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.kit import LocalFleet, Process, closed_rounds, of_type

pytestmark = pytest.mark.acceptance

TASK = Path(__file__).parents[2] / "bench" / "paced.py"
SPEEDS = {"fast1": 1.0, "fast2": 1.0, "slow": 0.2}
VERSIONS = 10
JOB: dict[str, Any] = {
    "rounds": VERSIONS,
    "data": {"shards": "auto"},
    "train": {"batch_size": 10, "lr": 0.1},
    "round": {"mode": "async", "min_workers": 3, "buffer": 2, "evaluate_every": 5},
    "config": {"samples": 100, "rate": 40},  # a shard of 20 samples: half a second, or two and a half
}


def doomed(fleet: LocalFleet) -> Process:
    """A coordinator that dies when it has made two versions, before the second of them is a fact."""
    arguments = ["-m", "server", "--host", "127.0.0.1", "--port", str(fleet.port), "--state-dir", str(fleet.state)]
    environment = {**fleet.environment, "LYDIAN_FAILPOINT": "closed-before:2"}
    return Process(arguments, fleet.folder / "doomed.log", environment)


def test_no_version_waits_for_the_slow_worker_and_a_killed_coordinator_makes_the_same_one_again(tmp_path: Path) -> None:
    with LocalFleet(tmp_path) as fleet:
        for name, speed in SPEEDS.items():
            (tmp_path / f"{name}.speed").write_text(str(speed))
            fleet.start_worker(name, "--trust", "any", "--data", f"speed={tmp_path / name}.speed")
        fleet.await_workers(3)
        job = fleet.submit(TASK, **JOB)
        fleet.await_event(job, lambda e: e["type"] == "round" and e["round"] == 2, "version 2")
        assert fleet.coordinator is not None
        fleet.coordinator.kill()
        fleet.coordinator = doomed(fleet)
        assert fleet.coordinator.popen.wait(60) == -signal.SIGKILL
        there = {path.name for path in (fleet.state / "blobs").glob("??/*")}
        fleet.start_coordinator()
        fleet.finish(job)
        facts = fleet.facts(job)

    accepted = [(fact["round"], fact["shard"]) for fact in of_type(facts, "accepted")]
    assert len(set(accepted)) == len(accepted), "a task counted twice"
    frozen = {fact["round"]: fact["members"] for fact in of_type(facts, "frozen")}
    used = [(one["round"], one["shard"]) for version in sorted(frozen) for one in frozen[version]]
    assert used == accepted[: len(used)], "updates are not added in the order in which they came"
    assert all(len(members) >= 2 for members in frozen.values())
    assert all(one["staleness"] == version - one["round"] for version in frozen for one in frozen[version])

    closed = {fact["round"]: fact for fact in closed_rounds(facts)}
    assert list(closed) == list(range(1, VERSIONS + 1))
    assert sum(closed[version]["digest"] in there for version in range(4, 7)) >= 1, "it was averaged to other bytes"
    without = [version for version in frozen if all(one["worker_name"] != "slow" for one in frozen[version])]
    assert len(without) >= VERSIONS / 2, "versions waited for the slow worker"
    late = [one["staleness"] for members in frozen.values() for one in members if one["worker_name"] == "slow"]
    assert all(staleness >= 1 for staleness in late[1:]), "the slow worker set the pace"
    assert [fact["round"] for fact in of_type(facts, "evaluation")] == [5, 10]
