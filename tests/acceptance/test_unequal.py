"""Unlike machines in one job: sizes are counted here, times are measured by `python -m bench.unequal`."""

from pathlib import Path
from typing import Any

from tests.acceptance.kit import LocalFleet, closed_rounds, of_type, wait_for

ROOT = Path(__file__).parents[2]
TASK = ROOT / "bench" / "paced.py"
SPEEDS = {"fast": 1.0, "old": 0.25, "cpu": 0.03}
JOB: dict[str, Any] = {
    "data": {"shards": "auto"},
    "train": {"batch_size": 10, "lr": 0.1},
    "round": {"min_workers": 3},
    "config": {"samples": 120, "rate": 100},
}


HELD = """

paced = train


def train(model, loader, context):
    while context.round > 2 and Path(context.config["data"]["speed"]).with_suffix(".held").exists():
        time.sleep(0.02)
    paced(model, loader, context)
"""


def start(fleet: LocalFleet, speeds: dict[str, float]) -> None:
    for name, speed in speeds.items():
        (fleet.folder / f"{name}.speed").write_text(str(speed))
        fleet.start_worker(name, "--trust", "any", "--data", f"speed={fleet.folder / name}.speed")
    fleet.await_workers(len(speeds))


def cuts(fleet: LocalFleet, facts: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Name of the worker -> samples cut for it, round by round."""
    names = {worker.id: worker.name for worker in fleet.api.workers()}
    return [
        {names[shard["meant"]]: shard["stop"] - shard["start"] for shard in fact["shards"]}
        for fact in of_type(facts, "opened")
    ]


def test_shards_follow_measured_speeds_and_the_slowest_worker_evaluates_also_after_a_restart(tmp_path: Path) -> None:
    with LocalFleet(tmp_path) as fleet:
        start(fleet, SPEEDS)
        facts = fleet.facts(fleet.submit(TASK, rounds=3, **JOB))
        first, *later = cuts(fleet, facts)
        assert first == {"fast": 40, "old": 40, "cpu": 40}
        for cut in later:
            assert cut.keys() == {"fast", "old"}
            assert cut["fast"] > 1.5 * cut["old"]
            assert sum(cut.values()) == 120
        ids = {worker.name: worker.id for worker in fleet.api.workers()}
        trained = [(fact["round"], fact["worker_name"]) for fact in of_type(facts, "accepted")]
        assert sorted(trained) == [
            (1, "cpu"),
            (1, "fast"),
            (1, "old"),
            (2, "fast"),
            (2, "old"),
            (3, "fast"),
            (3, "old"),
        ]
        assert ids["cpu"] in [fact["worker"] for fact in of_type(facts, "evaluation")]
        for closed in closed_rounds(facts)[1:]:
            assert (closed["samples"], closed["left_out"]) == (120, 0)
            assert [one["worker_name"] for one in closed["absent"]] == ["cpu"]
            assert "evaluates only" in closed["absent"][0]["why"]

        assert fleet.coordinator is not None
        fleet.coordinator.kill()
        fleet.start_coordinator()
        fleet.await_workers(3)
        again = fleet.submit(TASK, rounds=2, **JOB)
        fleet.await_event(again, lambda event: event["type"] == "opened", "its first round")
        wait_for("the worker to be shown as an evaluator", lambda: "evaluates only" in reason(fleet, "cpu"))
        known = cuts(fleet, fleet.facts(again))[0]
        assert known.keys() == {"fast", "old"}
        assert known["fast"] > 1.5 * known["old"]


def reason(fleet: LocalFleet, name: str) -> str:
    return next(worker.reason for worker in fleet.api.workers() if worker.name == name)


def test_the_shard_of_a_killed_worker_is_trained_by_the_others_and_a_lone_evaluator_trains(tmp_path: Path) -> None:
    with LocalFleet(tmp_path, ttl_s=6.0) as fleet:
        start(fleet, {"fast": 1.0, "cpu": 0.07})
        spec = {**JOB, "round": {"min_workers": 2}, "config": {"samples": 30, "rate": 100}}
        task = tmp_path / "held.py"
        task.write_text(TASK.read_text() + HELD)
        (fleet.folder / "fast.held").touch()  # its third shard is under way until it is killed
        job = fleet.submit(task, rounds=4, **spec)
        third = fleet.await_event(job, lambda event: event["type"] == "opened" and event["round"] == 3, "round 3")
        assert [one["worker_name"] for one in third["evaluators"]] == ["cpu"]
        fleet.workers["fast"].kill_all()
        facts = fleet.facts(job)
        assert facts[-1]["state"] == "finished"
        assert [fact["worker_name"] for fact in of_type(facts, "accepted")][-1] == "cpu"
        assert all(closed["samples"] == 30 for closed in closed_rounds(facts))


def test_a_late_update_is_used_in_a_later_round_if_the_job_says_so(tmp_path: Path) -> None:
    spec = {
        "data": {"shards": 2},
        "train": {"batch_size": 10},
        "round": {"min_workers": 2, "quorum": 1, "late": "use"},
        "aggregation": {"update": "int8"},
        "config": {"samples": 80, "rate": 80},
    }
    with LocalFleet(tmp_path) as fleet:
        start(fleet, {"fast": 1.0, "slow": 0.5})
        facts = fleet.facts(fleet.submit(TASK, rounds=8, **spec))
    late = [(one["worker_name"], one["round"], fact["round"]) for fact in closed_rounds(facts) for one in fact["late"]]
    assert late
    assert all(1 <= used - trained <= 2 for _, trained, used in late)
    counted = [(fact["round"], fact["shard"]) for fact in of_type(facts, "accepted")]
    assert len(set(counted)) == len(counted)
