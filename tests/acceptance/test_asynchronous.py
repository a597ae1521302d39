"""Versions that wait for nobody: one worker is five times slower, and the coordinator dies in the middle."""

import math
import re
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.messages import ModelFacts
from common.weights import load
from tests.acceptance.kit import PATIENCE_S, LocalFleet, Process, closed_rounds, of_type, wait_for
from tests.acceptance.played import MODEL, Played, sha, update

pytestmark = pytest.mark.acceptance

TASK = Path(__file__).parents[2] / "bench" / "paced.py"
SPEEDS = {"fast1": 0.5, "fast2": 0.5, "slow": 0.1}
VERSIONS = 10
JOB: dict[str, Any] = {
    "rounds": VERSIONS,
    "data": {"shards": "auto"},
    "train": {"batch_size": 10, "lr": 0.1},
    "round": {"mode": "async", "min_workers": 3, "buffer": 2, "evaluate_every": 5},
    "config": {"samples": 100, "rate": 60},  # a shard of 20 samples: two thirds of a second, or five times that
}


def doomed(fleet: LocalFleet) -> Process:
    """A coordinator that dies when it has made two versions, before the second of them is a fact."""
    arguments = ["-m", "server", "--host", "127.0.0.1", "--port", str(fleet.port), "--state-dir", str(fleet.state)]
    environment = {**fleet.environment, "LYDIAN_FAILPOINT": "closed-before:2"}
    return Process(arguments, fleet.folder / "doomed.log", environment)


def versions_made(fleet: LocalFleet) -> int:
    """As the journal of a dead coordinator has it."""
    with closing(sqlite3.connect(f"{(fleet.state / 'journal.sqlite').as_uri()}?mode=ro", uri=True)) as journal:
        return int(journal.execute("SELECT count(*) FROM facts WHERE type = 'round'").fetchone()[0])


def is_said_to_be_behind(event: dict[str, Any]) -> bool:
    words = r"\d+ of 2 updates for version \d+.*; slow is \d+ versions? behind"
    return event["type"] == "now" and re.search(words, event["reason"]) is not None


def comes_late(name: str) -> Callable[[dict[str, Any]], bool]:
    """Tells, event by event from the first, whether this worker's update of an older version than the newest is in."""
    newest = 0

    def look(event: dict[str, Any]) -> bool:
        nonlocal newest
        if event["type"] == "opened":
            newest = event["round"]
        return event["type"] == "accepted" and event["worker_name"] == name and event["round"] < newest

    return look


def test_no_version_waits_for_the_slow_worker_and_a_killed_coordinator_makes_the_same_one_again(tmp_path: Path) -> None:
    with LocalFleet(tmp_path) as fleet:
        for name, speed in SPEEDS.items():
            (tmp_path / f"{name}.speed").write_text(str(speed))
            fleet.start_worker(name, "--trust", "any", "--data", f"speed={tmp_path / name}.speed")
        fleet.await_workers(3)
        job = fleet.submit(TASK, **JOB)
        fleet.await_event(job, is_said_to_be_behind, "the slow worker was said to be behind")
        assert fleet.coordinator is not None
        fleet.coordinator.kill()
        fleet.coordinator = doomed(fleet)
        assert fleet.coordinator.popen.wait(PATIENCE_S) == -signal.SIGKILL
        made, there = versions_made(fleet), {path.name for path in (fleet.state / "blobs").glob("??/*")}
        fleet.start_coordinator()
        fleet.api.pause(job)  # or the fast ones make what is left before the slow one has come back
        fleet.await_event(job, comes_late("slow"), "an update of the slow worker came late")
        fleet.api.resume(job)
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
    assert closed[made + 1]["digest"] in there, "the version that was made before the kill came to other bytes after it"
    without = [version for version in frozen if all(one["worker_name"] != "slow" for one in frozen[version])]
    assert len(without) >= 3, "versions waited for the slow worker"
    late = [one for fact in closed.values() for one in fact["late"] if one["worker_name"] == "slow"]
    assert late, "nothing of the slow worker was used"
    assert all(one["factor"] == 1 / math.sqrt(1 + one["staleness"]) for one in late)
    assert sorted(fact["round"] for fact in of_type(facts, "evaluation")) == [5, 10]


def test_an_update_of_a_version_long_gone_counts_as_a_change_since_its_own_base_also_after_a_restart(
    tmp_path: Path,
) -> None:
    spec = {"rounds": 8, "data": {"shards": 2}, "round": {"mode": "async", "buffer": 1, "min_workers": 2}}
    with LocalFleet(tmp_path) as fleet, Played(fleet, "fast") as fast, Played(fleet, "slow") as slow:
        job = fleet.submit(**spec)
        begin(fast, slow)
        old = slow.poll()
        for version in range(1, 8):
            work = fast.poll()
            assert (work.round, work.shard) == (version, 1)
            fast.hand_in(work, update(version))
        wait_for("version 7", lambda: fleet.api.job(job).round == 7)
        assert fleet.coordinator is not None
        fleet.coordinator.kill()
        fleet.start_coordinator()
        assert old.base is not None
        slow.api.download_model(old.base.digest, tmp_path / "old")
        assert sha(tmp_path / "old") == old.base.digest
        slow.hand_in(old, update(-2.5))
        assert fleet.finish(job).round == 8
        facts, model = fleet.facts(job), load(fleet.pull(job))
    (last,) = [fact for fact in closed_rounds(facts) if fact["round"] == 8]
    assert [(one["round"], one["staleness"]) for one in last["late"]] == [(1, 7)]
    for name, first in MODEL.items():
        change = update(-2.5)[name].astype(np.float64) - first.astype(np.float64)
        newest = update(7)[name].astype(np.float64)
        expected = (change * last["late"][0]["factor"] * 5 / 5 + newest).astype(np.float32)
        assert model[name].tobytes() == expected.tobytes()


def begin(fast: Played, slow: Played) -> None:
    """Both wait for work before there is any, so that the job begins with both; whoever is asked builds the model."""
    for worker in (fast, slow):
        answer = worker.ask(0.0)
        assert answer is None or answer.assignment is None or answer.assignment.kind == "init"
        if answer is not None and answer.assignment is not None:
            facts = ModelFacts(parameters=8, train_samples=10, test_samples=0, bounds=(0, 5, 10))
            worker.hand_in(answer.assignment, MODEL, facts=facts)
            return
    raise AssertionError("nobody was asked to build the model")
