"""Received and settled: an acknowledged update whose bytes a power cut took comes back from its worker's copy.

The cut is played exactly: the coordinator is killed, and the file of the update is left as a disk leaves one that was
renamed and never synced, with its name and no bytes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import LateError, SupersededError, UnavailableError
from common.messages import Assignment, Heartbeat, Holding, Progress, Submission
from common.weights import load
from tests.acceptance.kit import LocalFleet, of_type
from tests.acceptance.played import MODEL, Played, sha, update

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def _coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path_factory.mktemp("fleet")) as running:
        yield running


@pytest.fixture
def fleet(_coordinator: LocalFleet) -> Iterator[LocalFleet]:
    """A coordinator without workers, and without a job that is open."""
    _coordinator.environment.pop("LYDIAN_FAILPOINT", None)
    with _coordinator.mended(()) as fleet:
        yield fleet


@pytest.fixture
def worker(fleet: LocalFleet) -> Iterator[Played]:
    with Played(fleet, "w") as played:
        yield played


def cut_power(fleet: LocalFleet, digest: str) -> None:
    """Kill the coordinator, take the bytes of one file, start it again."""
    assert fleet.coordinator is not None
    fleet.coordinator.kill()
    (fleet.state / "blobs" / digest[:2] / digest).write_bytes(b"")
    fleet.start_coordinator()


def first_of_two(fleet: LocalFleet, worker: Played, **spec: Any) -> tuple[str, Assignment]:
    """A job with one update of two in its first round."""
    job = fleet.submit(rounds=1, data={"shards": 2}, **spec)
    worker.init()
    work = worker.poll()
    worker.hand_in(work, update(1))
    return job, work


def first_is_lost(fleet: LocalFleet, worker: Played, **spec: Any) -> tuple[str, Assignment, Holding]:
    """The same, and a power cut took its bytes: the job, the work, and the worker's copy."""
    job, work = first_of_two(fleet, worker, **spec)
    copy = worker.holding(work, update(1))
    assert copy.digest is not None
    cut_power(fleet, copy.digest)
    return job, work, copy


def finish_the_other(fleet: LocalFleet, worker: Played, job: str, **poll: Any) -> None:
    """Train the second shard, and look at the mean of 1 and 3."""
    other = worker.poll(**poll)
    worker.hand_in(other, update(3))
    fleet.finish(job)
    assert np.array_equal(load(fleet.pull(job))["w"], MODEL["w"] + 2)


def test_a_lost_update_is_asked_for_and_counts_without_being_trained_again(fleet: LocalFleet, worker: Played) -> None:
    job, work, copy = first_is_lost(fleet, worker)
    assert "awaited again: shard 0 from w" in fleet.api.job(job).reason
    answer = worker.ask(holding=[copy])
    assert answer is not None
    assert (answer.wanted, answer.assignment) == ((copy,), None)
    assert worker.hand_in(work, update(1)).repeat
    finish_the_other(fleet, worker, job, holding=[copy])
    facts = fleet.facts(job)
    assert [fact["type"] for fact in facts if fact["type"] in ("lost", "restored")] == ["lost", "restored"]
    assert len([fact for fact in of_type(facts, "handed_out") if fact["kind"] == "train"]) == 2


def test_a_second_cut_while_a_lost_update_came_back_leaves_no_file_of_its_name(
    fleet: LocalFleet, worker: Played
) -> None:
    job, work, copy = first_is_lost(fleet, worker)
    digest = copy.digest or ""
    cut_power(fleet, digest)  # its name was there again, and neither its bytes nor the fact
    assert not (fleet.state / "blobs" / digest[:2] / digest).exists()
    assert worker.hand_in(work, update(1)).repeat
    finish_the_other(fleet, worker, job, holding=[copy])


def test_other_bytes_than_those_that_counted_do_not_replace_a_lost_update(fleet: LocalFleet, worker: Played) -> None:
    job, work, copy = first_is_lost(fleet, worker)
    with pytest.raises(SupersededError, match="only those bytes are wanted again"):
        worker.hand_in(work, update(50))
    assert worker.hand_in(work, update(1)).repeat
    finish_the_other(fleet, worker, job, holding=[copy])


def test_a_lost_update_that_its_worker_lost_too_is_trained_again_at_once(fleet: LocalFleet, worker: Played) -> None:
    job, work, _ = first_is_lost(fleet, worker)
    again = worker.poll()
    assert (again.id, again.attempt) == (work.id, 2)
    worker.hand_in(again, update(1))
    finish_the_other(fleet, worker, job)
    (back,) = of_type(fleet.facts(job), "handed_back")
    assert back["code"] == "lost"
    assert "w has no copy of it" in back["sentence"]


def test_a_lost_update_whose_worker_never_returns_is_trained_by_another_after_one_lease_time(
    tmp_path: Path,
) -> None:
    # Its own: to the other tests a lease time is longer than anything that may hold them up.
    with LocalFleet(tmp_path, ttl_s=2.0) as fleet, Played(fleet, "w") as worker, Played(fleet, "other") as other:
        job, work = first_of_two(fleet, worker)
        copy = worker.holding(work, update(1))
        assert copy.digest is not None
        cut_power(fleet, copy.digest)
        taken = [other.poll()]
        other.hand_in(taken[0], update(1 if taken[0].shard == 0 else 3))
        taken.append(other.poll())
        other.hand_in(taken[1], update(1 if taken[1].shard == 0 else 3))
        assert sorted((work.shard, work.attempt) for work in taken) == [(0, 2), (1, 1)]
        fleet.finish(job)
        assert np.array_equal(load(fleet.pull(job))["w"], MODEL["w"] + 2)


def test_an_update_lost_out_of_the_frozen_set_is_awaited_before_the_sum(fleet: LocalFleet, worker: Played) -> None:
    job, work = first_of_two(fleet, worker)
    copy = worker.holding(work, update(1))
    assert copy.digest is not None
    fleet.environment["LYDIAN_FAILPOINT"] = "frozen-after"
    assert fleet.coordinator is not None
    fleet.coordinator.kill()
    fleet.start_coordinator()
    other = worker.poll(holding=[copy])
    file = worker.file(other, update(3))
    worker.api.upload(other.id, other.attempt, file)
    given = Submission(attempt=other.attempt, digest=sha(file), samples=5)
    with pytest.raises(UnavailableError):  # it dies when the last update closes the round, before it answers
        worker.api.submit(other.id, given)
    assert fleet.coordinator.popen.wait() == -9
    del fleet.environment["LYDIAN_FAILPOINT"]
    cut_power(fleet, copy.digest)
    assert fleet.api.job(job).state == "aggregating"
    answer = worker.ask(holding=[copy])
    assert answer is not None
    assert answer.wanted == (copy,)
    assert worker.hand_in(work, update(1)).repeat
    assert worker.api.submit(other.id, given).repeat
    fleet.finish(job)
    assert np.array_equal(load(fleet.pull(job))["w"], MODEL["w"] + 2)


def test_a_copy_is_settled_when_its_round_is_closed_and_not_before(fleet: LocalFleet, worker: Played) -> None:
    job = fleet.submit(rounds=2, data={"shards": 2})
    worker.init()
    first = worker.poll()
    worker.hand_in(first, update(1))
    copy = worker.holding(first, update(1))
    answer = worker.ask(holding=[copy])
    assert answer is not None
    assert answer.settled == ()
    assert answer.assignment is not None
    worker.hand_in(answer.assignment, update(3))
    answer = worker.ask(holding=[copy])
    assert answer is not None
    assert answer.settled == (copy,)
    fleet.api.cancel(job)


@pytest.mark.parametrize("name", ["not-one", "no-such.train.1.0"])
def test_a_copy_of_something_unknown_is_settled(fleet: LocalFleet, worker: Played, name: str) -> None:
    strange = {"assignment": name, "attempt": 1, "digest": "0" * 64}
    answer = worker.ask(wait_s=0.0, holding=[strange])
    assert answer is not None
    assert [held.assignment for held in answer.settled] == [name]


# ---------------------------------------------------------------- a worker that was started anew


def test_a_reborn_worker_that_has_its_work_keeps_its_lease(fleet: LocalFleet, worker: Played) -> None:
    job = fleet.submit(rounds=1, data={"shards": 2})
    worker.init()
    work = worker.poll()
    begun = worker.holding(work, None)
    with Played(fleet, "w", worker.token, start_id="s2", holding=[begun.model_dump()]) as reborn:
        beat = Heartbeat(start_id="s2", assignment=work.id, attempt=work.attempt, progress=Progress(doing="training"))
        assert reborn.api.heartbeat(reborn.id, beat).order == "continue"
        reborn.hand_in(work, update(1))
        finish_the_other(fleet, reborn, job)
    assert not list(of_type(fleet.facts(job), "handed_back"))


def test_a_reborn_worker_without_its_work_loses_the_lease_at_once(fleet: LocalFleet, worker: Played) -> None:
    job = fleet.submit(rounds=1, data={"shards": 2})
    worker.init()
    work = worker.poll()
    with Played(fleet, "w", worker.token, start_id="s2") as reborn:
        again = reborn.poll()
        assert (again.id, again.attempt) == (work.id, 2)
        reborn.hand_in(again, update(1))
        finish_the_other(fleet, reborn, job)
    (back,) = of_type(fleet.facts(job), "handed_back")
    assert "was started anew" in back["sentence"]


def test_a_late_result_is_recorded_and_harms_no_later_round(fleet: LocalFleet, worker: Played) -> None:
    job = fleet.submit(rounds=2, data={"shards": 2}, round={"quorum": 1})
    worker.init()
    with Played(fleet, "slow") as slow:
        late = slow.poll()
        beat = Heartbeat(start_id="s1", assignment=late.id, attempt=1, progress=Progress(doing="training"))
        worker.hand_in(worker.poll(), update(1))
        fleet.await_event(job, lambda e: e["type"] == "round", "round 1")
        assert slow.api.heartbeat(slow.id, beat).order == "superseded"
        with pytest.raises(LateError, match="takes no more results"):
            slow.hand_in(late, update(99))
        file = slow.file(late, update(99))
        with pytest.raises(LateError):
            slow.api.submit(late.id, Submission(attempt=1, digest=sha(file), samples=5))
        worker.hand_in(worker.poll(), update(2))
        fleet.finish(job)
    assert np.array_equal(load(fleet.pull(job))["w"], MODEL["w"] + 2)
    assert [fact["round"] for fact in of_type(fleet.facts(job), "late")] == [1]
