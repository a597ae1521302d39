"""The optimiser's state stays with the worker from round to round, also when that worker is killed on the way."""

from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.kit import LocalFleet, of_type, wait_for

pytestmark = pytest.mark.acceptance

TASK = Path(__file__).with_name("drill_task.py")
JOB: dict[str, Any] = {
    "rounds": 3,
    "seed": 9,
    "data": {"shards": 2},
    "train": {
        "local_steps": 600, "batch_size": 8, "optimizer": "adamw", "lr": 0.003, "clip": 1.0, "schedule": "cosine",
        "warmup_steps": 50, "keep_optimizer": True,
    },
    "round": {"min_workers": 2, "evaluate_every": 0},
}  # fmt: skip
MEETING = """

def loss(model, batch, config):
    import os, pathlib, time
    meet = pathlib.Path(config["meet"])
    (meet / str(os.getppid())).touch()
    while len(list(meet.iterdir())) < 2:
        time.sleep(0.02)
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""  # or one worker may get both shards while the other is still loading torch


def test_shards_keep_their_worker_and_a_killed_one_goes_on_to_the_same_bytes(crew: LocalFleet, tmp_path: Path) -> None:
    task, meet = tmp_path / "meeting.py", tmp_path / "meet"
    task.write_text(TASK.read_text() + MEETING)
    meet.mkdir()
    spec = {**JOB, "config": {"meet": str(meet)}}
    truth = crew.truth(task, **spec)
    for met in meet.iterdir():
        met.unlink()
    job = crew.submit(task, **spec)
    victim = wait_for("a worker in its second round", lambda: in_second_round(crew, job))
    crew.workers[victim].kill()
    assert crew.api.job(job).round < 3
    crew.start_worker(victim)
    view = crew.finish(job)
    assert view.model is not None
    assert view.model.digest == truth
    facts = crew.facts(job)
    fresh = [closed["metrics"]["fresh_optimizer"] for closed in of_type(facts, "round")]
    assert fresh == [1.0, 0.0, 0.0]
    assert len({(a["shard"], a["worker"]) for a in of_type(facts, "accepted")}) == 2
    states = list(crew.folder.glob("*/optimizers/*/*"))
    assert {path.name.rsplit(".", 2)[0] for path in states} <= {job}, "a state outlived its job"


def in_second_round(fleet: LocalFleet, job: str) -> str | None:
    """The worker that has a checkpoint of a shard of round 2."""
    found = next(iter(fleet.folder.glob(f"*/work/{job}.train.2.*/checkpoint")), None)
    return found.relative_to(fleet.folder).parts[0] if found else None
