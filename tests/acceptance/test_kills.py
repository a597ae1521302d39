"""Killed processes: the job ends with the same bytes as if nothing had happened."""

import random
import signal
import time
from collections.abc import Iterator

import pytest

from tests.acceptance.kit import LocalFleet, closed_rounds, of_type, wait_for

pytestmark = pytest.mark.acceptance

JOB = {
    "rounds": 6,
    "seed": 5,
    "data": {"shards": 4},
    "train": {"local_epochs": 2, "batch_size": 16, "lr": 0.05},
    "round": {"min_workers": 2, "evaluate_every": 0},
}
TTL_S = 4.0  # longer than a healthy worker is silent on a machine that is busy


@pytest.fixture(scope="module")
def _impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path_factory.mktemp("impatient"), ttl_s=TTL_S) as fleet:
        yield fleet


@pytest.fixture
def impatient(_impatient: LocalFleet) -> Iterator[LocalFleet]:
    """A fleet of two workers whose leases last a few seconds."""
    with _impatient.mended(("w1", "w2")) as fleet:
        yield fleet


def test_a_coordinator_killed_again_and_again_ends_with_the_same_model_and_trains_nothing_twice(
    crew: LocalFleet,
) -> None:
    chance = random.Random(1)
    truth = crew.truth(**JOB)
    job = crew.submit(**JOB)
    for _ in range(5):
        kind = chance.choice(["accepted", "handed_out", "round", "frozen"])
        before = crew.api.job(job).round
        if before == JOB["rounds"]:
            break
        crew.await_event(
            job, lambda e, kind=kind, before=before: e["type"] == kind and e["round"] > before, f"a {kind}"
        )
        assert crew.coordinator is not None
        crew.coordinator.kill()
        crew.start_coordinator()
    view = crew.finish(job)
    assert view.model is not None
    assert view.model.digest == truth
    facts = crew.facts(job)
    accepted = [(a["round"], a["shard"]) for a in of_type(facts, "accepted")]
    assert sorted(accepted) == [(r, s) for r in range(1, 7) for s in range(4)]
    handed_out = [(h["round"], h["shard"]) for h in of_type(facts, "handed_out") if h["kind"] == "train"]
    assert sorted(handed_out) == sorted(accepted), "a shard was trained twice because its coordinator died"
    ids = [fact["id"] for fact in facts]
    assert ids == sorted(set(ids))


def test_a_killed_workers_shard_goes_to_another_and_the_model_is_the_same(impatient: LocalFleet) -> None:
    fleet = impatient
    truth = fleet.truth(**JOB)
    job = fleet.submit(**JOB)
    doomed = _has_work(fleet, job, 3)
    fleet.workers[doomed].kill()
    view = fleet.finish(job)
    assert view.model is not None
    assert view.model.digest == truth
    facts = fleet.facts(job)
    back = list(of_type(facts, "handed_back"))
    assert all(b["code"] == "expired" and b["worker_name"] == doomed for b in back)
    assert len(closed_rounds(facts)) == 6


def _has_work(fleet: LocalFleet, job: str, number: int) -> str:
    """The name of the worker that gets the first shard of a round, once it was handed out."""
    handed_out = fleet.await_event(
        job,
        lambda e: e["type"] == "handed_out" and e["kind"] == "train" and e["round"] == number,
        f"a shard of round {number} was handed out",
    )
    (name,) = [worker.name for worker in fleet.api.workers() if worker.id == handed_out["worker"]]
    return name


def test_a_killed_worker_that_comes_back_is_the_same_worker_and_works_on(crew: LocalFleet) -> None:
    truth = crew.truth(**JOB)
    job = crew.submit(**JOB)  # a lease of 40 s: only the new start can free the shard in time
    ids = {worker.id for worker in crew.api.workers()}
    name = _has_work(crew, job, 2)
    crew.workers[name].kill()
    crew.start_worker(name)
    view = crew.finish(job)
    assert view.model is not None
    assert view.model.digest == truth
    assert {worker.id for worker in crew.api.workers()} == ids
    backs = list(of_type(crew.facts(job), "handed_back"))
    assert [back["sentence"] for back in backs if "was started anew" not in back["sentence"]] == []


def test_a_coordinator_that_stands_still_longer_than_a_lease_expires_nobody(impatient: LocalFleet) -> None:
    fleet = impatient
    job = fleet.submit(**{**JOB, "train": {"local_seconds": 1.5}, "rounds": 3})
    fleet.await_event(job, lambda e: e["type"] == "round", "round 1")
    coordinator = fleet.coordinator
    assert coordinator is not None
    coordinator.popen.send_signal(signal.SIGSTOP)
    time.sleep(1.5 * TTL_S)  # the fault itself: a frozen machine, for longer than a lease
    coordinator.popen.send_signal(signal.SIGCONT)
    fleet.finish(job)
    assert not list(of_type(fleet.facts(job), "handed_back"))
    wait_for("it to notice", lambda: "stood still" in coordinator.said())


def test_a_worker_keeps_its_result_while_the_coordinator_is_away(crew: LocalFleet) -> None:
    job = crew.submit(rounds=1, data={"shards": 1}, train={"local_seconds": 3.0})
    name = _has_work(crew, job, 1)
    worker, place = crew.workers[name], crew.folder / name / "work"
    wait_for("it to have all that it trains from", lambda: list(place.glob(f"{job}.train.1.*/indices.npy")))
    before = len(worker.said())
    assert crew.coordinator is not None
    crew.coordinator.kill()
    wait_for("its result", lambda: list(place.glob(f"{job}.train.1.*/update*")))
    wait_for("it to want to hand it in", lambda: "; trying again" in worker.said()[before:])
    crew.start_coordinator()
    crew.finish(job)
    handed = [h for h in of_type(crew.facts(job), "handed_out") if h["kind"] == "train"]
    assert len(handed) == 1
