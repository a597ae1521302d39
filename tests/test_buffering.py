"""Asynchronous rounds, by calls of pure functions; what a version is made of, byte by byte, is in test_folding.py."""

import os
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pydantic import ValidationError

from common.errors import ConflictError, JobOverError, LateError, NotFoundError, SupersededError
from common.facts import Absent, Accepted, Frozen, Opened, RoundClosed, StateChanged
from common.messages import ModelRef, Submission
from server import buffering, rounds
from server.buffering import Buffering, size_of
from server.deadlines import Due
from server.fleet import workers_needed
from server.lateness import factor_of
from server.rounds import Evaluating, Failed, Finished, Job, Paused, Task
from tests.rounds_kit import LIMITS, Play, at, digest, spec, submission, training

# ---------------------------------------------------------------- a stage with workers


class Stage(Play):
    """A play of asynchronous rounds in which workers hold leases."""

    def __init__(self, *workers: str, rounds: int = 9, total: int = 40, data: Any = None, **section: Any) -> None:
        given = {"mode": "async", "evaluate_every": 0, "buffer": 2, **section}
        super().__init__(spec(rounds=rounds, round=given, data={"shards": "auto"} if data is None else data))
        self.workers = workers
        self.held: dict[str, tuple[Task, int]] = {}
        self.begin(*(workers or ("a",)))
        self.init(places=workers, total=total, test_samples=10 if given["evaluate_every"] else 0)

    @property
    def phase(self) -> Buffering[Any]:
        assert isinstance(self.job.inner, Buffering)
        return self.job.inner

    def ask(self, worker: str) -> Task | None:
        """Poll: the worker gets what there is for it."""
        task = rounds.next_task(self.job, worker, rounds.Held(task for task, _ in self.held.values()))
        if task is not None:
            self.give(task, worker)
            self.held[worker] = (task, rounds.tries_of(self.job, task).attempt)
        return task

    def lease_ends(self, worker: str, code: str = "expired") -> None:
        task, attempt = self.held.pop(worker)
        self.back(task, code, worker=worker, attempt=attempt)

    def hand_in(self, worker: str, *, task: Task | None = None, attempt: int = 1) -> Accepted:
        """What the worker holds, or what it held, and whatever follows from it."""
        if task is None:
            task, attempt = self.held.pop(worker)
        number = 7919 * attempt + 31 * task.round + task.shard
        named = {"round": task.round, "attempt": attempt}
        update = self.update(task.shard, worker, number=number, samples=1).model_copy(update=named)
        standing = rounds.judge(self.job, task, submission(update), worker)
        if standing is not None:
            return standing
        self.do(rounds.take_update(self.job, update))
        self.look()
        return update

    def look(self) -> str:
        dues = {task.shard: Due(w, w.upper(), 0.0, None) for w, (task, _) in self.held.items() if task.kind == "train"}
        return self.do(rounds.close_if_due(self.job, self.workers, self.now, dues)).reason

    def work(self, *workers: str) -> None:
        """Each gets a task, unless it has one, and hands it in."""
        for worker in workers:
            assert worker in self.held or self.ask(worker)
            self.hand_in(worker)

    def averaged(self) -> None:
        number = self.job.closed + 1
        self.close(number, places=self.workers)

    def of(self, kind: type[Any]) -> list[Any]:
        return [fact for fact in self.facts if isinstance(fact, kind)]


# ---------------------------------------------------------------- what is awaited, and from whom


@pytest.mark.parametrize(
    ("workers", "keys", "size"),
    [
        (0, {}, 1),
        (1, {}, 1),
        (5, {}, 2),
        (40, {}, 10),
        (3, {"round": {"mode": "async", "buffer": 7}}, 7),
    ],
)
def test_a_version_is_made_of_half_as_many_updates_as_workers_unless_the_job_says_so(
    workers: int, keys: Any, size: int
) -> None:
    assert size_of(spec(**{"data": {"shards": "auto"}, "round": {"mode": "async"}, **keys}), workers) == size


def test_the_size_is_in_the_journal_and_does_not_follow_workers_that_join() -> None:
    stage = Stage("a", "b")
    stage.workers = ("a", "b", "c")
    stage.work("a", "a")
    stage.averaged()
    assert [(fact.buffer, len(fact.shards)) for fact in stage.of(Opened)] == [(2, 4), (2, 5)]
    assert stage.phase.size == 2


def test_a_version_is_never_made_of_more_updates_than_there_are_shards() -> None:
    assert Stage("a", "b", "c", "d", "e", "f", data={"shards": 2}, buffer=None).phase.size == 2
    assert Stage("a", "b", total=2, buffer=9).phase.size == 2


def test_whoever_is_done_gets_other_work_at_once_on_the_newest_version_also_while_one_is_averaged() -> None:
    stage = Stage("a", "b")
    given = [stage.ask("b")]
    stage.work("a", "a")
    assert stage.phase.frozen is not None
    given.append(stage.ask("a"))
    stage.averaged()
    stage.hand_in("a")
    given.append(stage.ask("a"))
    assert given == [Task("train", 1, 0), Task("train", 1, 3), Task("train", 2, 1)]
    assert rounds.subject_of(stage.job, Task("train", 1, 0))[0].digest == digest(0)
    assert rounds.subject_of(stage.job, Task("train", 2, 1))[0].digest == digest(1)


def test_the_shard_that_has_counted_least_goes_first_and_one_that_is_held_goes_to_nobody_else() -> None:
    stage = Stage("a", "b", total=4)
    slow = stage.ask("b")
    for _ in range(4):
        stage.work("a", "a")
        stage.averaged()
    assert slow == Task("train", 1, 0)
    assert stage.phase.served == {1: 3, 2: 3, 3: 2}
    stage.hand_in("b")
    assert stage.ask("a") == Task("train", 5, 0)


def test_a_shard_counts_once_from_the_same_version() -> None:
    stage = Stage("a", data={"shards": 2}, buffer=2)
    stage.work("a", "a")
    assert stage.phase.frozen is not None
    assert stage.ask("a") is None
    stage.averaged()
    assert stage.ask("a") == Task("train", 2, 0)


def test_a_shard_whose_worker_is_gone_goes_out_anew_on_the_newest_version_and_only_that_update_counts() -> None:
    stage = Stage("a", "b")
    old = stage.ask("b")
    assert old is not None
    stage.work("a", "a")
    stage.averaged()
    stage.lease_ends("b")
    assert rounds.is_open(stage.job, old)
    assert stage.ask("a") == Task("train", 2, 0)
    assert not rounds.is_open(stage.job, old)
    with pytest.raises(LateError, match="shard 0 was handed out anew, on the model of version 1"):
        stage.hand_in("b", task=old)
    stage.hand_in("a")


def test_a_worker_that_was_away_may_still_hand_in_what_nobody_else_got() -> None:
    stage = Stage("a", "b")
    old = stage.ask("b")
    assert old is not None
    stage.lease_ends("b")
    stage.hand_in("b", task=old)
    assert [update.worker for update in stage.phase.buffer] == ["b"]
    with pytest.raises(SupersededError, match="attempt 1 by b counts"):
        rounds.judge(stage.job, old, Submission(attempt=2, digest=digest(5), samples=1), "a")


def test_a_worker_with_data_of_its_own_trains_that_alone_and_keeps_its_number() -> None:
    stage = Stage("b", "d", data={"partition": "local"}, buffer=1)
    assert [shard.worker for shard in stage.phase.shards.values()] == ["b", "d"]
    stage.work("d")
    stage.workers = ("a", "d")
    stage.averaged()
    assert {number: shard.worker for number, shard in stage.phase.shards.items()} == {0: "b", 1: "d", 2: "a"}
    assert stage.ask("a") == Task("train", 2, 2)
    assert stage.ask("d") == Task("train", 2, 1)
    assert stage.ask("c") is None
    assert rounds.private_parts(stage.job, Task("train", 2, 1), workers=1) == 3


# ---------------------------------------------------------------- when a version is made


def test_updates_are_frozen_in_the_order_in_which_they_came_with_their_factors() -> None:
    stage = Stage("a", "b", "c", buffer=2)
    stage.ask("c")
    stage.work("a", "b")
    stage.averaged()
    stage.work("b")
    stage.hand_in("c")
    (_, frozen) = stage.of(Frozen)
    assert [(one.worker, one.round, one.staleness, one.factor) for one in frozen.members] == [
        ("b", 2, 0, 1.0),
        ("c", 1, 1, 1 / 2**0.5),
    ]
    batch = rounds.frozen_of(stage.job)
    assert isinstance(batch, buffering.Batch)
    assert [update.worker for update in batch.accepted] == ["b", "c"]
    assert [model.digest for model in batch.bases] == [digest(1), digest(0)]
    assert batch.base.digest == digest(1)
    stage.averaged()
    closed = stage.of(RoundClosed)[-1]
    assert [(one.worker, one.staleness) for one in closed.late] == [("c", 1)]
    assert (closed.workers, closed.shards, closed.samples, closed.left_out) == (2, 2, 2, 0)


def test_updates_that_come_faster_than_they_are_averaged_all_go_into_the_next_version() -> None:
    stage = Stage("a", "b", data={"shards": 8}, buffer=2)
    stage.work("a", "a", "a", "b", "b")
    assert len(stage.phase.buffer) == 3
    assert "3 of 2 updates for version 2; version 1 is being averaged" in stage.look()
    stage.averaged()
    stage.look()
    assert [len(fact.members) for fact in stage.of(Frozen)] == [2, 3]


def test_a_buffer_that_nothing_can_come_to_any_more_is_averaged_as_it_is() -> None:
    stage = Stage("a", "b", data={"partition": "local"}, buffer=9)
    stage.work("a")
    assert "1 of 9 updates for version 1" in stage.look()
    assert stage.phase.frozen is None
    stage.work("b")
    assert "2 of 9 updates for version 1, and nothing more can come before it" in stage.of(Frozen)[0].reason


def test_nobody_waits_for_private_data_whose_worker_is_gone_or_cannot() -> None:
    stage = Stage("a", "b", "c", data={"partition": "local"}, buffer=9)
    stage.ask("b")
    stage.lease_ends("b", "no_data")
    stage.workers = ("a", "b")
    stage.work("a")
    assert len(stage.of(Frozen)) == 1


def test_a_job_whose_workers_offer_no_data_says_so() -> None:
    stage = Stage(data={"partition": "local"})
    assert stage.look() == "version 1: no live worker offers data for it"


def test_who_is_behind_is_said_the_oldest_first() -> None:
    stage = Stage("a", "b", "c", buffer=1)
    stage.ask("b")
    stage.work("a")
    stage.averaged()
    stage.ask("c")
    stage.work("a")
    stage.averaged()
    stage.ask("a")
    assert stage.look() == "0 of 1 update for version 3; B is 2 versions behind; C is 1 version behind"


def test_work_that_is_too_old_counts_no_more_and_the_version_says_whose() -> None:
    stage = Stage("a", "b", buffer=1, max_staleness=1)
    old = stage.ask("b")
    assert old is not None
    stage.work("a")
    stage.averaged()
    assert rounds.is_open(stage.job, old)
    stage.work("a")
    assert not rounds.is_open(stage.job, old)
    with pytest.raises(LateError, match=r"it is 2 versions behind, and at most 1 are used \(round.max_staleness\)"):
        stage.hand_in("b")
    stage.averaged()
    why = "2 versions behind, and at most 1 are used"
    assert stage.of(RoundClosed)[-1].absent == (Absent(worker="b", worker_name="B", shard=0, why=why),)
    assert 1 not in stage.phase.bases
    stage.work("a")
    assert stage.of(Frozen)[-1].absent == ()


def test_a_base_is_kept_as_long_as_anything_stands_on_it() -> None:
    stage = Stage("a", "b", buffer=1)
    stage.ask("b")
    for version in range(1, 4):
        stage.work("a")
        stage.averaged()
        assert stage.phase.bases.keys() == {1, version + 1}
    assert rounds.bases_of(stage.job) == {digest(0), digest(3)}
    stage.hand_in("b")
    assert 1 in stage.phase.bases
    assert rounds.base_of(stage.job, Task("train", 1, 0)) == ModelRef(digest=digest(0), size=100)
    stage.averaged()
    assert stage.phase.bases.keys() == {5}
    assert rounds.base_of(stage.job, Task("train", 1, 0)) == stage.job.model


# ---------------------------------------------------------------- the end, and the ways there


def test_the_last_version_ends_the_job_and_work_for_another_one_is_late() -> None:
    stage = Stage("a", "b", rounds=1, buffer=1)
    stage.ask("b")
    stage.work("a")
    assert stage.ask("a") is None
    assert stage.look() == "the last version, 1, is being averaged"
    with pytest.raises(LateError, match="the last version, 1, has its updates"):
        stage.hand_in("b")
    stage.averaged()
    assert isinstance(stage.job.phase, Finished)


def test_an_evaluation_goes_before_training_and_the_last_one_is_awaited() -> None:
    stage = Stage("a", "b", rounds=4, buffer=1, evaluate_every=2)
    for _ in range(2):
        stage.work("a")
        stage.averaged()
    assert (stage.ask("a"), stage.ask("b")) == (Task("evaluate", 2), Task("train", 3, 2))
    stage.hand_in("b")
    stage.averaged()
    stage.work("b")
    assert stage.ask("b") is None, "the last version is being averaged"
    stage.averaged()
    assert isinstance(stage.job.phase, Evaluating)
    assert stage.ask("b") == Task("evaluate", 4)


def test_a_paused_job_takes_what_is_out_and_averages_it_but_hands_nothing_out() -> None:
    stage = Stage("a", "b", buffer=1)
    stage.ask("a")
    stage.do(rounds.pause(stage.job, "me"))
    assert stage.ask("b") is None
    stage.hand_in("a")
    stage.averaged()
    assert isinstance(stage.job.phase, Paused)
    assert stage.phase.newest == 2
    stage.now = 50.0
    stage.do(rounds.resume(stage.job, "me"))
    assert stage.phase.opened_at == 50.0
    assert stage.ask("b") is not None


def test_failures_of_a_shard_are_counted_from_version_to_version_until_it_counts() -> None:
    stage = Stage("a", "b", buffer=1)
    for _ in range(LIMITS.failures - 1):
        task = stage.ask("b")
        assert task is not None
        assert task.shard == 0
        assert rounds.tries_of(stage.job, task).attempt == 1
        stage.lease_ends("b", "task_failed")
        stage.held["nobody"] = (task, 0)
        stage.work("a")
        stage.averaged()
        del stage.held["nobody"]
    assert stage.ask("b") is not None
    stage.lease_ends("b", "task_failed")
    assert isinstance(stage.job.phase, Failed)
    assert "given up after 5 failures" in stage.job.reason


def test_a_result_that_nobody_was_given_or_of_an_ended_job_is_refused() -> None:
    stage = Stage("a", "b")
    task = stage.ask("a")
    assert task is not None
    with pytest.raises(NotFoundError, match="was not given to this worker"):
        stage.hand_in("b", task=task)
    with pytest.raises(LateError, match="version 1 is being made"):
        stage.hand_in("b", task=Task("train", 1, 3))
    stage.do(rounds.cancel(stage.job, "me"))
    with pytest.raises(JobOverError):
        stage.hand_in("a")


def test_the_same_update_again_is_a_repeat_and_counting_it_twice_is_a_mistake_of_the_caller() -> None:
    stage = Stage("a", "b", "c")
    task = stage.ask("a")
    update = stage.hand_in("a")
    assert stage.hand_in("a", task=task) == update
    with pytest.raises(ConflictError, match="accepted twice"):
        rounds.evolve(stage.job, update, 0.0)
    with pytest.raises(ConflictError, match="is not being averaged"):
        stage.averaged()


def test_a_restarted_coordinator_knows_what_is_out_of_which_version() -> None:
    stage = Stage("a", "b", buffer=1)
    stage.ask("b")
    stage.work("a")
    stage.averaged()
    stage.ask("a")
    assert [(task, attempt, worker) for task, attempt, worker, _ in rounds.outstanding(stage.replayed())] == [
        (Task("train", 1, 0), 1, "b"),
        (Task("train", 2, 2), 1, "a"),
    ]


# ---------------------------------------------------------------- updates that a power cut took


def lost(stage: Stage, update: Accepted) -> None:
    stage.do(rounds.lost(update))


def given_up(stage: Stage, update: Accepted) -> None:
    task = Task("train", update.round, update.shard)
    stage.back(task, "lost", worker=update.worker, attempt=update.attempt)


def test_nothing_is_frozen_while_an_update_is_lost_and_it_is_awaited_by_name() -> None:
    stage = Stage("a", "b", buffer=2)
    stage.ask("a")
    update = stage.hand_in("a")
    lost(stage, update)
    assert rounds.lost_of(stage.job) == (update,)
    stage.work("b")
    words = "2 of 2 updates for version 1; updates that a power cut took are awaited again: round 1, shard 0 from a"
    assert stage.look() == words
    stage.do(rounds.restored(update))
    stage.look()
    assert len(stage.of(Frozen)) == 1


def test_a_version_is_made_without_an_update_that_is_lost_for_good_and_its_shard_is_trained_again() -> None:
    stage = Stage("a", "b", buffer=2)
    first, second = (stage.ask("a"), stage.hand_in("a"))[1], (stage.ask("b"), stage.hand_in("b"))[1]
    lost(stage, first)
    given_up(stage, first)
    batch = rounds.frozen_of(stage.job)
    assert batch is not None
    assert (batch.accepted, [one.worker for one in batch.members]) == ((second,), ["b"])
    assert rounds.lost_of(stage.job) == ()
    assert stage.ask("a") == Task("train", 1, 0)
    assert stage.held["a"][1] == 2, "the attempt that is gone would count as this one"


def test_a_version_of_which_nothing_is_left_is_made_of_what_comes() -> None:
    stage = Stage("a", "b", buffer=1)
    stage.ask("a")
    update = stage.hand_in("a")
    stage.work("b")
    lost(stage, update)
    given_up(stage, update)
    assert (stage.phase.round, stage.phase.frozen) == (1, None)
    stage.look()
    assert [(fact.round, [one.worker for one in fact.members]) for fact in stage.of(Frozen)] == [(1, ["a"]), (1, ["b"])]


def test_an_update_that_is_lost_while_it_waits_leaves_the_others_in_their_order() -> None:
    stage = Stage("a", "b", "c", buffer=3)
    stage.ask("a")
    update = stage.hand_in("a")
    stage.work("b")
    lost(stage, update)
    given_up(stage, update)
    assert [one.worker for one in stage.phase.buffer] == ["b"]


def test_an_older_update_of_a_shard_that_is_lost_leaves_the_newer_one_alone() -> None:
    stage = Stage("a", data={"shards": 2}, buffer=2)
    stage.work("a", "a")
    stage.averaged()
    stage.work("a")
    newer = stage.phase.turns[0]
    older = stage.phase.buffer[0]
    stage.job = rounds.replace(stage.job, phase=replace(stage.phase, buffer=(older.model_copy(update={"round": 1}),)))
    after = buffering.without(stage.phase, 1, 0)
    assert (after.buffer, after.turns[0]) == ((), newer)


# ---------------------------------------------------------------- any history


class AnyHistory(RuleBasedStateMachine):
    """Random workers do random things, in any order; what the module promises must hold at every moment."""

    @initialize(
        data=st.sampled_from([{"shards": "auto"}, {"shards": 4}, {"partition": "local"}]),
        buffer=st.sampled_from([None, 1, 3]),
        most=st.sampled_from([1, 2, 20]),
    )
    def begin(self, data: Any, buffer: int | None, most: int) -> None:
        self.stage = Stage("a", "b", "c", rounds=4, data=data, buffer=buffer, max_staleness=most, evaluate_every=2)
        self.gone: list[tuple[str, Task, int]] = []  # leases that ran out: their workers may come back
        self.counted: dict[tuple[int, int], str] = {}
        self.used: list[tuple[int, int]] = []

    @property
    def job(self) -> Job:
        return self.stage.job

    @rule(worker=st.sampled_from("abc"))
    def ask(self, worker: str) -> None:
        if worker in self.stage.held:
            return
        held = {task for task, _ in self.stage.held.values()}
        task = self.stage.ask(worker)
        if task is not None and task.kind == "train":
            assert all(other.shard != task.shard for other in held if other.kind == "train")
            assert (task.round, task.shard) not in self.counted

    @precondition(lambda self: self.stage.held)
    @rule(data=st.data(), twice=st.booleans())
    def hand_in(self, data: st.DataObject, twice: bool) -> None:
        worker = data.draw(st.sampled_from(sorted(self.stage.held)))
        task, attempt = self.stage.held.pop(worker)
        for _ in range(2 if twice else 1):
            self._hand_in(worker, task, attempt)

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def hand_in_after_all(self, data: st.DataObject) -> None:
        self._hand_in(*data.draw(st.sampled_from(self.gone)))

    def _hand_in(self, worker: str, task: Task, attempt: int) -> None:
        if task.kind == "evaluate":
            if rounds.is_open(self.job, task):
                given = Submission(attempt=attempt, metrics={"accuracy": (1.0, 2.0)})
                self.stage.do(rounds.take_evaluation(self.job, task.round, given, worker))
            return
        key, was_open = (task.round, task.shard), rounds.is_open(self.job, task)
        behind = buffering.staleness_of(self.job.inner, task.round) if isinstance(self.job.inner, Buffering) else 0
        try:
            update = self.stage.hand_in(worker, task=task, attempt=attempt)
        except (SupersededError, LateError, JobOverError):
            assert not was_open
            return
        assert self.counted.setdefault(key, update.digest) == update.digest, "a task counts twice"
        assert not was_open or 0 <= behind <= self.job.spec.round.max_staleness

    @precondition(lambda self: self.stage.held)
    @rule(data=st.data(), code=st.sampled_from(["task_failed", "expired", "released", "no_data"]))
    def lease_ends(self, data: st.DataObject, code: str) -> None:
        worker = data.draw(st.sampled_from(sorted(self.stage.held)))
        self.gone.append((worker, *self.stage.held[worker]))
        self.stage.lease_ends(worker, code)

    @rule(workers=st.sets(st.sampled_from("abcd"), min_size=1))
    def averaged(self, workers: set[str]) -> None:
        batch = rounds.frozen_of(self.job)
        if batch is None or rounds.lost_of(self.job) or self.job.over:
            return
        assert isinstance(batch, buffering.Batch)
        order = [(update.round, update.shard) for update in batch.accepted]
        assert order == [(one.round, one.shard) for one in batch.members]
        assert order == [key for key in self.counted if key in order], "not in the order in which they came"
        assert not set(order) & set(self.used), "an update is used twice"
        for one in batch.members:
            assert 0 <= one.staleness <= self.job.spec.round.max_staleness
            assert one.factor == factor_of(one.staleness)
        self.used += order
        self.stage.do(
            rounds.close(
                self.job,
                ModelRef(digest=digest(self.job.closed + 1), size=100),
                seconds=1.0,
                places=at(*sorted(workers)),
                now=0.0,
            )
        )

    @rule()
    def time_passes(self) -> None:
        assert self.stage.look()

    @precondition(lambda self: rounds.accepted_of(self.job))
    @rule(data=st.data(), again=st.booleans())
    def power_cut_takes_an_update(self, data: st.DataObject, again: bool) -> None:
        update = data.draw(st.sampled_from(rounds.accepted_of(self.job)))
        lost(self.stage, update)
        assert rounds.lost_of(self.job) == (update,)
        before = self.job
        assert "awaited again" in self.stage.look()
        assert self.job == before, "a version was frozen without bytes that it needs"
        if again:
            self.stage.do(rounds.restored(update))
            return
        given_up(self.stage, update)
        del self.counted[update.round, update.shard]
        assert update not in rounds.accepted_of(self.job)

    @rule()
    def coordinator_is_killed(self) -> None:
        out = {(task, attempt, worker) for task, attempt, worker, _ in rounds.outstanding(self.job)}
        self.stage.job = self.stage.replayed()
        assert {(task, attempt, worker) for task, attempt, worker, _ in rounds.outstanding(self.job)} == out

    @rule(decide=st.sampled_from([rounds.pause, rounds.resume]))
    def person(self, decide: Any) -> None:
        if not self.job.over:
            self.stage.do(decide(self.job, "me"))

    @invariant()
    def replaying_the_facts_gives_the_same_state(self) -> None:
        if hasattr(self, "stage"):
            assert self.stage.replayed() == self.job

    @invariant()
    def what_is_open_and_what_counts_has_its_base(self) -> None:
        phase = getattr(getattr(self, "stage", None), "job", None) and self.job.inner
        if isinstance(phase, Buffering):
            rounds_needed = {update.round for update in phase.accepted}
            rounds_needed |= {task.round for task, *_ in rounds.outstanding(self.job) if task.kind == "train"}
            assert rounds_needed <= phase.bases.keys()
            assert len(phase.bases) <= len(phase.shards) + len(phase.accepted) + 1

    @invariant()
    def with_everybody_free_somebody_can_go_on(self) -> None:
        job = getattr(getattr(self, "stage", None), "job", None)
        if job is None or self.stage.held or not isinstance(job.phase, Buffering) or rounds.lost_of(job):
            return
        able = [worker for worker in "abc" if worker not in job.excluded]
        there = [shard for shard in job.phase.shards.values() if shard.worker in (None, *able)]
        tasks = [rounds.next_task(job, worker, rounds.Held()) for worker in able]
        moves = any(tasks) or job.phase.frozen is not None or rounds.close_if_due(job, able, 0.0).facts
        assert moves or not able or not there


TestAnyHistory = AnyHistory.TestCase
FULL = os.environ.get("LYDIAN_FAULTS") == "full"
TestAnyHistory.settings = settings(
    deadline=None, max_examples=1000 if FULL else 40, stateful_step_count=100 if FULL else 50
)


@given(st.lists(st.sampled_from("abc"), min_size=30, max_size=120))
def test_however_unlike_the_workers_are_a_free_shard_that_counted_less_waits_for_the_next_version_alone(
    finishers: list[str],
) -> None:
    stage = Stage("a", "b", "c", rounds=1000)
    for worker in finishers:
        if worker in stage.held:
            with suppress(LateError):  # it held that for more versions than may lie between
                stage.hand_in(worker)
        phase, out = stage.phase, {task.shard for task, _ in stage.held.values()}
        if (task := stage.ask(worker)) is not None:
            served = {number: phase.served.get(number, 0) for number in phase.shards.keys() - out}
            for number in (number for number, times in served.items() if times < served[task.shard]):
                turn = phase.turns[number]
                assert turn.counted and turn.round == phase.newest  # noqa: PT018 - one thing: it counted from this one
        if stage.phase.frozen is not None:
            stage.averaged()


# ---------------------------------------------------------------- what is refused at submit


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"round": {"buffer": 3}}, "round.buffer is for asynchronous rounds"),
        ({"round": {"max_staleness": 3}}, "round.max_staleness is for asynchronous rounds"),
        ({"round": {"mode": "async", "quorum": 2}}, "has no round.quorum"),
        ({"round": {"mode": "async", "deadline": 5.0}}, "has no round.deadline"),
        ({"round": {"mode": "async", "late": "use"}}, "has no round.late = use"),
        ({"round": {"mode": "async"}, "data": {"shards": 4, "fraction": 0.5}}, "has no data.fraction"),
        ({"round": {"mode": "async"}, "train": {"keep_optimizer": True}}, "has no train.keep_optimizer"),
        ({"round": {"mode": "async"}, "train": {"personal": ["head.*"]}}, "has no train.personal"),
        ({"round": {"mode": "async"}, "aggregation": {"norm_outlier": 10}}, "has no aggregation.norm_outlier"),
        (
            {"round": {"mode": "async", "min_workers": 5}, "aggregation": {"robust": "median"}},
            "has no aggregation.robust",
        ),
        ({"round": {"mode": "async", "buffer": 3}}, "never come together from data.shards = 2"),
    ],
)
def test_a_job_that_makes_no_sense_asynchronously_is_refused_in_a_sentence(keys: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        spec(**keys)


def test_the_last_version_needs_one_worker_and_all_others_are_kept_busy() -> None:
    stage = Stage("a", rounds=1, buffer=1)
    assert workers_needed(stage.job, 5) == 5
    stage.work("a")
    assert workers_needed(stage.job, 5) == 1


def test_a_synchronous_job_stands_on_the_base_of_its_round_and_an_ended_one_on_none() -> None:
    play = training()
    assert rounds.bases_of(play.job) == {digest(0)}
    play.do(rounds.cancel(play.job, "me"))
    assert (rounds.bases_of(play.job), rounds.frozen_of(play.job)) == (frozenset(), None)


def test_an_ended_job_changes_its_state_by_no_version() -> None:
    stage = Stage("a", rounds=1, buffer=1)
    stage.work("a")
    stage.averaged()
    assert stage.of(StateChanged)[-1].state == "finished"
    with pytest.raises(ConflictError):
        stage.averaged()
