"""Jobs with `train.drift`: what shards carry from round to round outlives whoever holds it."""

import shutil
import signal
from typing import Any

import pytest

from tests.acceptance.kit import PATIENCE_S, LocalFleet, closed_rounds, wait_for
from tests.acceptance.test_failpoints import doomed, submit_to_doomed

pytestmark = pytest.mark.acceptance

JOB: dict[str, Any] = {
    "rounds": 5,
    "seed": 9,
    "data": {"shards": 3, "fraction": 0.67},
    "train": {"local_steps": 10, "batch_size": 8, "lr": 0.05, "drift": "scaffold"},
    "round": {"min_workers": 1, "evaluate_every": 0},
}
POINTS = ("accepted-after", "model-written", "closed-before", "closed-after")


def test_a_coordinator_that_is_killed_and_a_worker_that_comes_back_empty_change_no_byte(alone: LocalFleet) -> None:
    fleet, folder = alone, alone.folder / "w1"
    truth = fleet.finish(fleet.submit(**JOB)).model
    plain = fleet.truth(**{**JOB, "train": {**JOB["train"], "drift": "none"}})
    assert truth is not None
    assert truth.digest != plain
    job = ""
    for number, point in enumerate(POINTS):
        assert fleet.coordinator is not None
        fleet.coordinator.kill()
        if point == POINTS[2]:
            fleet.workers["w1"].kill_all()  # or what it started goes on writing there
            wait_for("a slot on the worker's disk", lambda: list(folder.glob("slots/*/*")))
            shutil.rmtree(folder)
            fleet.start_worker("w1")
        fleet.coordinator = doomed(fleet, number, point)
        job = job or submit_to_doomed(fleet, **JOB)
        assert fleet.coordinator.popen.wait(PATIENCE_S) == -signal.SIGKILL, f"nobody died at {point}"
    fleet.start_coordinator()
    ended = fleet.finish(job)
    assert (ended.model, ended.slots) == (truth, 3)
    fresh = [closed["fresh"] for closed in closed_rounds(fleet.facts(job))]
    assert (fresh[0], sum(fresh)) == (2, 3)
    wait_for("slots to go with their job", lambda: not list(folder.glob("slots/*/*")))


def test_feddyn_sends_no_more_bytes_than_fedavg_while_shards_stay_where_they_are(alone: LocalFleet) -> None:
    bytes_of = {}
    for method in ("none", "feddyn", "scaffold"):
        train = {**JOB["train"], "drift": method}
        job = alone.submit(**{**JOB, "rounds": 3, "train": train, "data": {"shards": 2}})
        alone.finish(job)
        later = closed_rounds(alone.facts(job))[1:]  # the first model is the same in all three: it is there already
        bytes_of[method] = [(r["bytes_down"], r["bytes_up"]) for r in later]
        numbers = alone.api.job(job).parameters or 0
    assert bytes_of["feddyn"] == bytes_of["none"]
    assert bytes_of["scaffold"] == [(down + 4 * numbers, up) for down, up in bytes_of["none"]], "the sum, once"
