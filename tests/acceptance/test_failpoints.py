"""Killed at every point where a decision meets the disk: what was summed is summed again, to the same bytes."""

import signal
from typing import Any

import pytest

from server.failpoints import POINTS
from tests.acceptance.kit import PATIENCE_S, LocalFleet, Process, of_type, size, wait_for

pytestmark = pytest.mark.acceptance

JOB = {
    "seed": 3,
    "data": {"shards": 2},
    "train": {"local_steps": 3, "batch_size": 16},
    "round": {"min_workers": 1, "evaluate_every": 0},
}


def test_a_coordinator_killed_at_every_point_of_a_round_gives_the_same_model(crew: LocalFleet) -> None:
    points = [point for point in POINTS for _ in range(size(1, 20))]
    spec = {**JOB, "rounds": len(points) + 2}
    truth = crew.truth(**spec)
    job = ""
    for number, point in enumerate(points):
        assert crew.coordinator is not None
        crew.coordinator.kill()
        crew.coordinator = doomed(crew, number, point)
        job = job or submit_to_doomed(crew, **spec)
        assert crew.coordinator.popen.wait(PATIENCE_S) == -signal.SIGKILL, f"nobody died at {point}"
    crew.start_coordinator()
    view = crew.finish(job)
    assert view.model is not None
    assert view.model.digest == truth
    facts = crew.facts(job)
    accepted = [(a["round"], a["shard"]) for a in of_type(facts, "accepted")]
    assert sorted(accepted) == [(r, s) for r in range(1, len(points) + 3) for s in range(2)]
    trained = [(h["round"], h["shard"]) for h in of_type(facts, "handed_out") if h["kind"] == "train"]
    assert sorted(trained) == sorted(accepted), "a shard was trained twice because its coordinator died"


def doomed(fleet: LocalFleet, number: int, point: str) -> Process:
    """A coordinator that dies at a point: maybe while it starts, since it goes on where the last one stopped."""
    arguments = ["-m", "server", "--host", "127.0.0.1", "--port", str(fleet.port), "--state-dir", str(fleet.state)]
    environment = {**fleet.environment, "LYDIAN_FAILPOINT": point}
    return Process(arguments, fleet.folder / f"doomed-{number}-{point}.log", environment)


def submit_to_doomed(fleet: LocalFleet, **spec: Any) -> str:
    """Submit a job to a coordinator that will die of it: what the job does before a kill is not left to chance."""
    coordinator = fleet.coordinator
    assert coordinator is not None
    wait_for("the doomed coordinator to listen", lambda: f"ready {fleet.url}" in coordinator.said())
    return fleet.submit(**spec)
