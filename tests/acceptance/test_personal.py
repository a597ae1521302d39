"""Two workers that share a body and keep a head each, over rounds and over the end of one of them."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.acceptance.kit import LocalFleet, closed_rounds

pytestmark = pytest.mark.acceptance

TASK = Path(__file__).with_name("personal_task.py")
JOB: dict[str, Any] = {
    "rounds": 10_000,
    "data": {"partition": "local"},
    "train": {"local_steps": 5, "personal": ["head.*"], "proximal": 0.01},
    "round": {"min_workers": 2},
}


def test_heads_stay_with_their_workers_and_differ_while_the_body_is_one_and_the_same(tmp_path: Path) -> None:
    with LocalFleet(tmp_path) as fleet:
        for turned, name in enumerate(("w1", "w2")):
            start(fleet, name, turned)
        fleet.await_workers(2)
        job = fleet.submit(TASK, **JOB)
        fleet.await_event(job, lambda event: event["type"] == "round" and event["round"] == 2, "its second round")
        fleet.api.pause(job)
        fleet.await_workers(2)  # who wait for work have put aside what they trained
        assert load_file(fleet.pull(job)).keys() == {"body.0.weight", "body.0.bias"}
        for path in tmp_path.glob(f"w?/work/{job}.train.*/update.safetensors"):
            with contextlib.suppress(FileNotFoundError):  # one that has counted goes while the test looks
                assert "head.weight" not in load_file(path)
        heads = {name: newest_head(tmp_path / name, job) for name in ("w1", "w2")}
        assert not (heads["w1"]["model.head.weight"] == heads["w2"]["model.head.weight"]).all()

        fleet.workers["w1"].kill_all()
        start(fleet, "w1", 0)
        fleet.await_workers(2)
        before = fleet.api.resume(job).round
        fleet.await_event(
            job, lambda event: event["type"] == "round" and event["round"] == before + 2, "two rounds after the start"
        )
        fleet.api.cancel(job)
        facts = fleet.facts(job)
        fresh = [closed["metrics"]["fresh_personal"] for closed in closed_rounds(facts)]
        assert fresh[0] == 1.0
        assert not any(fresh[1:]), "a head was lost"
        assert len({(fact["shard"], fact["worker"]) for fact in facts if fact["type"] == "accepted"}) == 2
        measured = [fact["metrics"] for fact in facts if fact["type"] == "evaluation"]
        assert measured
        assert all(metrics["fresh_personal"] == 0.0 for metrics in measured)


def start(fleet: LocalFleet, name: str, turned: int) -> None:
    """Start a worker whose data calls the classes by other names than another one's."""
    data = fleet.folder / f"data-{name}"
    data.mkdir(exist_ok=True)
    (data / "turned").write_text(str(turned))
    fleet.start_worker(name, "--trust", "any", "--data", f"personal_task={data}")


def newest_head(worker: Path, job: str) -> dict[str, Any]:
    """The head that a worker keeps of its newest round."""
    (path, *_) = sorted(worker.glob(f"personal/*/{job}.*"), key=lambda path: -int(path.suffix[1:]))
    return load_file(path)
