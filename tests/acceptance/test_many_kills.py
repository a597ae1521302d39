"""Coordinators and workers killed at random moments, again and again: nothing lost, nothing doubled, the same bytes."""

import random
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.acceptance.kit import LocalFleet, of_type, size, wait_for

pytestmark = pytest.mark.acceptance

TASK = Path(__file__).with_name("drill_task.py")
ROUNDS, SHARDS = size(5, 10), 4
TRAIN = {"batch_size": 8, "lr": 0.05, "momentum": 0.9}
JOB: dict[str, Any] = {  # of a built-in task: after any other one a worker starts its child anew
    "rounds": ROUNDS,
    "seed": 9,
    "data": {"shards": SHARDS},
    "train": {**TRAIN, "local_steps": 50},
    "round": {"min_workers": 1, "evaluate_every": 0},
}
DRAWN_JOB = {**JOB, "train": {**TRAIN, "local_steps": 500}}  # of TASK, whose net draws numbers; found in the middle
CHECKPOINTS = ("--trust", "any", "--checkpoint-every", "0.1")


HELD = """
import time
from pathlib import Path


def loss(model, batch, config):
    if Path("@GATE@").exists():
        time.sleep(0.05)  # thousands of such steps are longer than anybody takes to kill it
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""


def check(fleet: LocalFleet, job: str, truth: str, rounds: int = ROUNDS, shards: int = SHARDS) -> tuple[int, int]:
    """Each shard counted once, and the bytes are those of the undisturbed run. Returns (retrained, resumed) shards."""
    view = fleet.finish(job)
    assert view.model is not None
    assert view.model.digest == truth
    facts = fleet.facts(job)
    accepted = [(a["round"], a["shard"]) for a in of_type(facts, "accepted")]
    assert sorted(accepted) == [(r, s) for r in range(1, rounds + 1) for s in range(shards)]
    trained = [h for h in of_type(facts, "handed_out") if h["kind"] == "train"]
    resumed = [a for a in of_type(facts, "accepted") if a["resumed_at"] > 0]
    return len(trained) - len(accepted), len(resumed)


def at_work(fleet: LocalFleet, job: str, chance: random.Random) -> str | None:
    """A worker that is alive and trains, as it said a moment ago; `nobody` when the job is done."""
    if fleet.api.job(job).state == "finished":
        return "nobody"
    told = [worker for worker in fleet.api.workers() if worker.progress is not None and worker.last_seen_s < 1.0]
    training = sorted(worker.name for worker in told if worker.progress and worker.progress.doing == "training")
    return chance.choice(training) if training else None


def moment(chance: random.Random, most_s: float) -> None:
    """Let a random time pass: the moment of the fault is what is drawn."""
    threading.Event().wait(chance.uniform(0.0, most_s))


def test_a_coordinator_killed_at_random_moments_loses_nothing_and_has_nothing_trained_again(crew: LocalFleet) -> None:
    chance, kills = random.Random(3), size(6, 100)
    truth = crew.truth(**JOB)
    done, jobs = 0, 0
    while done < kills:
        job, jobs = crew.submit(**JOB), jobs + 1
        while done < kills and crew.api.job(job).state != "finished":
            moment(chance, 1.0)
            assert crew.coordinator is not None
            crew.coordinator.kill()
            done += 1
            crew.start_coordinator()
        retrained, _ = check(crew, job, truth)
        assert retrained == 0, "a shard was trained twice because its coordinator died"
    print(f"\n{done} coordinator kills in {jobs} jobs of {ROUNDS * SHARDS} updates: 0 lost, 0 doubled, 0 retrained")


@pytest.mark.skipif(
    size(0, 1) == 0, reason="minutes of starting torch: with LYDIAN_FAULTS=full; a slice of it is below"
)
def test_workers_killed_at_random_moments_lose_nothing_and_go_on_where_they_were(tmp_path: Path) -> None:
    chance, kills = random.Random(4), size(5, 100)
    with LocalFleet(tmp_path, ttl_s=3.0) as fleet:
        fleet.start_workers(3, *CHECKPOINTS)
        truth = fleet.truth(TASK, **DRAWN_JOB)
        done, jobs, retrained, resumed = 0, 0, 0, 0
        while done < kills:
            job, jobs = fleet.submit(TASK, **DRAWN_JOB), jobs + 1
            while done < kills and fleet.api.job(job).state != "finished":
                name = wait_for("a worker at work, or the end", lambda job=job: at_work(fleet, job, chance))
                if name == "nobody":
                    break
                moment(chance, 0.3)
                fleet.workers[name].kill()
                done += 1
                fleet.start_worker(name, *CHECKPOINTS)
            again, went_on = check(fleet, job, truth)
            retrained, resumed = retrained + again, resumed + went_on
        updates = jobs * ROUNDS * SHARDS
        print(f"\n{done} worker kills in {jobs} jobs, {updates} updates: 0 lost, 0 doubled")
        print(f"{retrained} shards were handed out again, {resumed} went on from a checkpoint")


def test_a_killed_worker_goes_on_from_its_checkpoint_and_its_shard_is_not_handed_out_again(
    crew: LocalFleet, tmp_path: Path
) -> None:
    task, gate = tmp_path / "held_task.py", tmp_path / "gate"
    task.write_text(TASK.read_text() + HELD.replace("@GATE@", str(gate)))
    slow = {**DRAWN_JOB, "rounds": 1, "data": {"shards": 1}, "train": {**TRAIN, "local_steps": 4000}}
    truth = crew.truth(task, **slow)
    gate.touch()
    job = crew.submit(task, **slow)
    victim = wait_for("a checkpoint", lambda: next(crew.folder.glob(f"*/work/{job}.*/checkpoint"), None)).parts[-4]
    crew.workers[victim].kill()
    gate.unlink()
    crew.start_worker(victim)
    view = crew.finish(job)
    assert view.model is not None
    assert view.model.digest == truth
    facts = crew.facts(job)
    (accepted,) = of_type(facts, "accepted")
    assert accepted["worker_name"] == victim, "the other one waited for work all the while"
    assert 0 < accepted["resumed_at"] < 4000
    assert accepted["attempt"] == 1
    assert not list(of_type(facts, "handed_back"))


def test_a_frozen_worker_is_told_on_waking_that_its_work_went_to_another(tmp_path: Path) -> None:
    times = size(1, 100)
    with LocalFleet(tmp_path, ttl_s=1.5) as fleet:
        fleet.start_workers(2, *CHECKPOINTS)
        truth = fleet.truth(**JOB)
        for _ in range(times):
            job = fleet.submit(**JOB)
            fleet.await_event(job, lambda e: e["type"] == "handed_out" and e["kind"] == "train", "work was handed out")
            agent = psutil.Process(fleet.workers["w1"].popen.pid)
            frozen = [agent, *agent.children(recursive=True)]
            for process in frozen:
                process.send_signal(signal.SIGSTOP)
            try:
                threading.Event().wait(3 * 1.5)  # the fault itself: three lease times
            finally:
                for process in frozen:
                    process.send_signal(signal.SIGCONT)
            check(fleet, job, truth)
