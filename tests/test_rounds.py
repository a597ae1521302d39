"""The round machine, by calls of pure functions alone."""

import math
import os
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.errors import BadUpdateError, ConflictError, JobOverError, LateError, NotFoundError, SupersededError
from common.facts import (
    Absent,
    Accepted,
    EvaluationGivenUp,
    Extended,
    Frozen,
    HandedBack,
    Late,
    Opened,
    RoundClosed,
    Shard,
    StateChanged,
)
from common.messages import ModelRef, Submission
from server import rounds
from server.cutting import Place
from server.deadlines import Due
from server.rounds import (
    Aggregating,
    Cancelled,
    Evaluating,
    Failed,
    Finished,
    Initialising,
    Paused,
    Queued,
    StateOf,
    Step,
    Task,
    Training,
    Tries,
)
from tests.rounds_kit import LIMITS, Play, at, digest, spec, submission, training

# ---------------------------------------------------------------- the queue


def test_a_job_waits_until_min_workers_are_spare() -> None:
    play = Play(spec(round={"min_workers": 2}))
    step = play.do(rounds.begin(play.job, ["a", "b", "c"], spare=1))
    assert step.facts == ()
    assert "waiting for 2 workers: 3 can serve it, 2 of them with older jobs" in step.reason
    assert isinstance(play.job.phase, Queued)


def test_a_job_begins_when_min_workers_are_spare() -> None:
    play = Play(spec(round={"min_workers": 2}))
    play.begin("a", "b")
    assert isinstance(play.job.phase, Initialising)


def test_a_job_that_has_begun_does_not_begin_again() -> None:
    play = training()
    assert play.begin("a").facts == ()


def test_the_wait_in_the_queue_names_why_workers_were_excluded() -> None:
    play = Play(spec())
    play.begin("a")
    play.give(Task("init", 0), "a")
    play.back(Task("init", 0), "no_data")
    assert play.job.excluded == {"a": "no_data happened"}
    waiting = Play(spec())
    waiting.job = rounds.replace(waiting.job, excluded=play.job.excluded)
    assert "no_data happened" in rounds.begin(waiting.job, [], 0).reason


# ---------------------------------------------------------------- initialisation


def test_the_built_model_opens_round_one_with_the_cut_that_came_with_it() -> None:
    play = training()
    assert isinstance(play.job.phase, Training)
    assert [(s.start, s.stop) for s in play.job.phase.shards.values()] == [(0, 10), (10, 20)]
    assert play.job.phase.round == 1


@pytest.mark.parametrize("bounds", [(0, 10), (0, 10, 19), (1, 10, 20), (0, 10, 10, 20), (), (0, 12, 10, 20)])
def test_a_cut_that_loses_samples_or_has_another_number_of_shards_is_refused(bounds: tuple[int, ...]) -> None:
    play = Play(spec())
    play.begin("a", "b")
    play.give(Task("init", 0), "a")
    with pytest.raises(BadUpdateError, match="no cut into 2 shards"):
        rounds.take_init(play.job, play.made("a", bounds=bounds), at("a"), 0.0)


def test_a_second_initialisation_is_superseded() -> None:
    play = training()
    with pytest.raises(SupersededError):
        rounds.take_init(play.job, play.made("a"), at("a"), 0.0)


def test_an_initialisation_by_a_worker_that_never_got_it_is_unknown() -> None:
    play = Play(spec())
    play.begin("a", "b")
    play.give(Task("init", 0), "a")
    with pytest.raises(NotFoundError):
        rounds.take_init(play.job, play.made("b"), at("a"), 0.0)


def test_auto_shards_follow_the_number_of_places() -> None:
    play = Play(spec(data={"shards": "auto"}))
    play.begin("a", "b")
    play.init(places=("a", "b", "c"))
    assert isinstance(play.job.phase, Training)
    assert len(play.job.phase.shards) == 3
    for shard in range(3):
        play.train(shard, "a", samples=6)
    play.close_if_due("a")
    play.close(places=("a",))
    assert len(play.job.phase.shards) == 1


def test_auto_shards_never_outnumber_the_samples() -> None:
    play = Play(spec(data={"shards": "auto"}))
    play.begin("a")
    play.init(places=("a", "b", "c"), total=2)
    assert isinstance(play.job.phase, Training)
    assert len(play.job.phase.shards) == 2


def test_a_fraction_of_the_shards_is_drawn_and_differs_between_rounds() -> None:
    play = Play(spec(rounds=9, data={"shards": 10, "fraction": 0.3}))
    play.begin("a")
    play.init(total=100)
    drawn = [tuple(play.job.phase.shards)]
    while play.job.closed < 8:
        play.whole_round("a")
        drawn.append(tuple(play.job.phase.shards))
    assert {len(shards) for shards in drawn} == {3}
    assert len(set(drawn)) > 1


def test_private_data_makes_one_shard_a_worker_that_only_it_may_train() -> None:
    play = Play(spec(data={"partition": "local"}))
    play.begin("a", "b")
    play.init(places=("b", "a"), bounds=())
    assert isinstance(play.job.phase, Training)
    assert [(s.shard, s.worker) for s in play.job.phase.shards.values()] == [(0, "a"), (1, "b")]
    assert rounds.next_task(play.job, "b", rounds.Held()) == Task("train", 1, 1)
    assert rounds.next_task(play.job, "c", rounds.Held()) is None


def test_private_data_with_no_worker_opens_an_empty_round_that_says_so() -> None:
    play = Play(spec(data={"partition": "local"}))
    play.begin("a")
    play.init(places=(), bounds=())
    assert "no live worker offers data" in play.close_if_due("a").reason


# ---------------------------------------------------------------- handing out


def test_a_shard_that_is_held_is_not_handed_out_twice() -> None:
    play = training()
    first = rounds.next_task(play.job, "a", rounds.Held())
    assert first == Task("train", 1, 0)
    assert rounds.next_task(play.job, "b", rounds.Held({first})) == Task("train", 1, 1)
    assert rounds.next_task(play.job, "b", rounds.Held({first, Task("train", 1, 1)})) is None


def test_the_initialisation_is_handed_out_to_one_worker() -> None:
    play = Play(spec())
    assert rounds.next_task(play.job, "a", rounds.Held()) is None
    play.begin("a", "b")
    task = rounds.next_task(play.job, "a", rounds.Held())
    assert task == Task("init", 0)
    assert rounds.next_task(play.job, "b", rounds.Held({task})) is None


def test_an_excluded_worker_gets_nothing() -> None:
    play = training()
    task = Task("train", 1, 0)
    play.give(task, "a")
    play.back(task, "not_trusted")
    assert rounds.next_task(play.job, "a", rounds.Held()) is None
    assert rounds.next_task(play.job, "b", rounds.Held()) == task


def test_training_goes_before_an_evaluation_unless_it_lags_two_rounds() -> None:
    play = training(rounds=5)
    play.whole_round("a", "b")
    assert rounds.next_task(play.job, "a", rounds.Held()) == Task("train", 2, 0)
    held = rounds.Held({Task("train", 2, 0), Task("train", 2, 1)})
    assert rounds.next_task(play.job, "a", held) == Task("evaluate", 1)
    play.whole_round("a", "b")
    assert rounds.next_task(play.job, "a", rounds.Held()) == Task("evaluate", 1)
    assert rounds.next_task(play.job, "a", rounds.Held({Task("evaluate", 1)})) == Task("train", 3, 0)


def test_an_evaluation_is_handed_out_while_a_round_is_averaged() -> None:
    play = training(rounds=3)
    play.whole_round("a", "b")
    play.train(0, "a")
    play.train(1, "b")
    play.close_if_due("a", "b")
    assert isinstance(play.job.phase, Aggregating)
    assert rounds.next_task(play.job, "a", rounds.Held()) == Task("evaluate", 1)


@given(st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=6))
def test_attempts_rise_by_one_whoever_gets_them(workers: list[str]) -> None:
    play = training()
    task = Task("train", 1, 0)
    attempts = [play.give(task, worker).facts[0].attempt for worker in workers]  # type: ignore[union-attr]
    assert attempts == list(range(1, len(workers) + 1))


def test_outstanding_names_the_newest_attempt_of_every_task_that_is_out() -> None:
    play = training(rounds=3)
    play.whole_round("a", "b")
    play.give(Task("train", 2, 0), "a")
    play.do(rounds.hand_out(play.job, Task("train", 2, 0), "b", "k2"))
    play.give(Task("evaluate", 1), "a")
    assert rounds.outstanding(play.job) == [(Task("train", 2, 0), 2, "b", "k2"), (Task("evaluate", 1), 1, "a", "")]
    play.do(rounds.cancel(play.job, "me"))
    assert rounds.outstanding(play.job) == []


def test_outstanding_names_an_evaluation_while_a_round_is_averaged() -> None:
    play = training(rounds=3)
    play.whole_round("a", "b")
    play.give(Task("evaluate", 1), "a")
    play.train(0, "a")
    play.train(1, "b")
    play.close_if_due("a", "b")
    assert rounds.outstanding(play.job) == [(Task("evaluate", 1), 1, "a", "")]


def test_nothing_is_open_in_an_ended_job() -> None:
    play = training()
    play.do(rounds.cancel(play.job, "me"))
    assert not rounds.is_open(play.job, Task("train", 1, 0))


def test_outstanding_names_the_initialisation() -> None:
    play = Play(spec())
    play.begin("a")
    assert rounds.outstanding(play.job) == []
    play.give(Task("init", 0), "a")
    assert rounds.outstanding(play.job) == [(Task("init", 0), 1, "a", "")]


# ---------------------------------------------------------------- results


def test_the_same_update_again_is_a_repeat() -> None:
    play = training()
    play.train(0, "a")
    update = play.update(0, "a")
    assert rounds.judge(play.job, Task("train", 1, 0), submission(update), "a") == update


def test_another_attempt_after_one_counts_is_superseded() -> None:
    play = training()
    task = Task("train", 1, 0)
    play.give(task, "a")
    play.give(task, "b")
    play.do(rounds.take_update(play.job, play.update(0, "b", attempt=2)))
    with pytest.raises(SupersededError, match="attempt 2 by b counts"):
        rounds.judge(play.job, task, submission(play.update(0, "a", number=5)), "a")


def test_an_older_attempt_counts_while_the_shard_is_open() -> None:
    play = training()
    task = Task("train", 1, 0)
    play.give(task, "a")
    play.give(task, "b")
    assert rounds.judge(play.job, task, submission(play.update(0, "a")), "a") is None


@pytest.mark.parametrize("attempt", [2, 9])
def test_an_attempt_that_was_never_given_is_unknown(attempt: int) -> None:
    play = training()
    play.give(Task("train", 1, 0), "a")
    with pytest.raises(NotFoundError):
        rounds.judge(play.job, Task("train", 1, 0), submission(play.update(0, "a", attempt=attempt)), "a")


def test_another_workers_attempt_is_unknown() -> None:
    play = training()
    play.give(Task("train", 1, 0), "a")
    with pytest.raises(NotFoundError):
        rounds.judge(play.job, Task("train", 1, 0), submission(play.update(0, "b")), "b")


def test_an_update_after_the_round_closed_is_late() -> None:
    play = training(round={"quorum": 1})
    play.give(Task("train", 1, 1), "b")
    late = play.update(1, "b")
    play.train(0, "a")
    play.now = 100.0
    play.close_if_due("a", "b")
    with pytest.raises(LateError):
        rounds.judge(play.job, Task("train", 1, 1), submission(late), "b")
    assert rounds.judge(play.job, Task("train", 1, 0), submission(play.update(0, "a")), "a") is not None
    play.close()
    with pytest.raises(LateError):
        rounds.judge(play.job, Task("train", 1, 1), submission(late), "b")
    with pytest.raises(LateError):
        rounds.take_update(play.job, late)
    before = play.job
    play.do(rounds.late(Task("train", 1, 1), 1, "b"))
    assert isinstance(play.facts[-1], Late)
    assert play.job == before


def test_a_result_for_a_cancelled_job_is_answered_with_job_over() -> None:
    play = training()
    play.give(Task("train", 1, 0), "a")
    update = play.update(0, "a")
    play.do(rounds.cancel(play.job, "me"))
    with pytest.raises(JobOverError, match="cancelled by me after 0 of 2 rounds"):
        rounds.judge(play.job, Task("train", 1, 0), submission(update), "a")


@pytest.mark.parametrize("samples", [0, 11, 2**53 - 1])
def test_more_or_fewer_samples_than_the_shard_has_are_refused(samples: int) -> None:
    play = training()
    play.give(Task("train", 1, 0), "a")
    with pytest.raises(BadUpdateError, match=f"claims {samples} samples, where 1 to 10"):
        rounds.judge(play.job, Task("train", 1, 0), submission(play.update(0, "a", samples=samples)), "a")


def test_private_data_may_have_any_number_of_samples_but_none() -> None:
    play = Play(spec(data={"partition": "local"}))
    play.begin("a", "b")
    play.init(bounds=())
    play.give(Task("train", 1, 0), "a")
    assert rounds.judge(play.job, Task("train", 1, 0), submission(play.update(0, "a", samples=123456)), "a") is None
    with pytest.raises(BadUpdateError, match="at least 1"):
        rounds.judge(play.job, Task("train", 1, 0), submission(play.update(0, "a", samples=0)), "a")


def test_an_evaluation_that_was_handed_out_may_count() -> None:
    play = training()
    play.whole_round("a", "b")
    play.give(Task("evaluate", 1), "a")
    assert rounds.judge(play.job, Task("evaluate", 1), Submission(attempt=1), "a") is None
    with pytest.raises(NotFoundError):
        rounds.judge(play.job, Task("evaluate", 1), Submission(attempt=1), "b")


def test_a_shard_is_never_accepted_twice_even_by_a_replay() -> None:
    play = training()
    play.train(0, "a")
    with pytest.raises(ConflictError, match="accepted twice"):
        rounds.evolve(play.job, play.update(0, "a"), 0.0)


# ---------------------------------------------------------------- giving back


def test_five_failures_of_a_task_fail_the_job_with_the_last_sentence() -> None:
    play = training()
    task = Task("train", 1, 0)
    for _ in range(LIMITS.failures):
        assert not play.job.over
        play.give(task, "a")
        play.back(task, "task_failed")
    assert isinstance(play.job.phase, Failed)
    assert "given up after 5 failures" in play.job.reason
    assert "task_failed happened" in play.job.reason


def test_an_attempt_that_is_said_to_have_failed_again_and_again_failed_once() -> None:
    play = training()
    task = Task("train", 1, 0)
    play.give(task, "a")
    for _ in range(2 * LIMITS.failures):
        play.back(task, "bad_samples")
    assert not play.job.over
    assert rounds.tries_of(play.job, task).failures == 1
    play.give(task, "b")
    play.back(task, "bad_samples")
    assert rounds.tries_of(play.job, task).failures == 2


def test_lost_leases_count_apart_from_failures() -> None:
    play = training()
    task = Task("train", 1, 0)
    for _ in range(LIMITS.failures + 1):
        play.give(task, "a")
        play.back(task, "expired")
    assert not play.job.over
    for _ in range(LIMITS.expiries - LIMITS.failures - 1):
        play.give(task, "a")
        play.back(task, "expired")
    assert isinstance(play.job.phase, Failed)


@given(st.lists(st.just("released"), max_size=40))
def test_released_work_never_fails_a_job(codes: list[str]) -> None:
    play = training()
    for code in codes:
        play.give(Task("train", 1, 0), "a")
        play.back(Task("train", 1, 0), code)
    assert not play.job.over


def test_a_bad_task_fails_the_job_at_once() -> None:
    play = Play(spec())
    play.begin("a")
    play.give(Task("init", 0), "a")
    play.back(Task("init", 0), "bad_task")
    assert isinstance(play.job.phase, Failed)
    assert play.job.reason == "initialisation on a: bad_task happened"


def test_an_evaluation_that_keeps_failing_is_given_up_and_the_job_goes_on() -> None:
    play = training()
    play.whole_round("a", "b")
    for _ in range(LIMITS.evaluation_failures):
        play.give(Task("evaluate", 1), "a")
        play.back(Task("evaluate", 1), "task_failed")
    assert not play.job.over
    assert play.job.evaluations == {}
    assert any(isinstance(fact, EvaluationGivenUp) for fact in play.facts)


def test_the_last_evaluation_given_up_finishes_the_job() -> None:
    play = training(rounds=1)
    play.whole_round("a", "b")
    assert isinstance(play.job.phase, Evaluating)
    for _ in range(LIMITS.evaluation_failures):
        play.give(Task("evaluate", 1), "a")
        play.back(Task("evaluate", 1), "task_failed")
    assert isinstance(play.job.phase, Finished)
    assert "given up" in play.job.reason


def test_giving_back_what_is_settled_changes_nothing() -> None:
    play = training()
    task = Task("train", 1, 0)
    play.give(task, "a")
    play.give(task, "b")
    play.do(rounds.take_update(play.job, play.update(0, "b", attempt=2)))
    before = play.job
    play.back(task, "task_failed", attempt=1)
    assert play.job == before


def test_a_stale_attempt_given_back_leaves_the_newest_one_out() -> None:
    play = training()
    task = Task("train", 1, 0)
    play.give(task, "a")
    play.give(task, "b")
    play.back(task, "expired", attempt=1)
    assert rounds.tries_of(play.job, task).out
    play.back(task, "expired", attempt=2)
    assert not rounds.tries_of(play.job, task).out


def test_a_lost_update_opens_its_shard_again() -> None:
    play = training()
    play.train(0, "a")
    back = HandedBack(
        kind="train", round=1, shard=0, attempt=1, worker="a", worker_name="a", code="lost", sentence="gone"
    )
    play.do(Step((back,)))
    assert rounds.next_task(play.job, "a", rounds.Held()) == Task("train", 1, 0)


def test_a_job_fails_when_every_live_worker_has_said_that_it_cannot() -> None:
    play = Play(spec())
    play.begin("a", "b")
    for worker in ("a", "b"):
        assert rounds.fail_if_nobody_can(play.job, ["a", "b"]).facts == ()
        play.give(Task("init", 0), worker)
        play.back(Task("init", 0), "no_data", worker=worker)
    assert rounds.fail_if_nobody_can(play.job, []).facts == ()
    assert rounds.fail_if_nobody_can(play.job, ["a", "b", "c"]).facts == ()
    play.do(rounds.fail_if_nobody_can(play.job, ["a", "b"]))
    assert isinstance(play.job.phase, Failed)
    assert play.job.reason == "none of the 2 live workers can do this job: no_data happened"


# ---------------------------------------------------------------- closing


def test_a_round_closes_when_every_shard_is_in() -> None:
    play = training()
    play.train(1, "b")
    step = play.close_if_due("a", "b")
    assert step.facts == ()
    assert "1 of 2 updates" in step.reason
    assert "awaiting shard 0" in step.reason
    play.train(0, "a")
    play.close_if_due("a", "b")
    assert isinstance(play.job.phase, Aggregating)
    assert [update.shard for update in play.job.phase.accepted] == [0, 1]


def test_the_quorum_gives_stragglers_a_tenth_of_its_time() -> None:
    play = training(round={"quorum": 1})
    play.now = 10.0
    play.train(0, "a")
    assert play.close_if_due("a", "b").look_again_at == 11.0
    play.now = 10.9
    assert play.close_if_due("a", "b").facts == ()
    play.now = 11.0
    play.close_if_due("a", "b")
    assert isinstance(play.job.phase, Aggregating)
    assert play.job.phase.left_out == 1


def test_a_quorum_reached_because_a_worker_vanished_starts_its_grace_now() -> None:
    play = Play(spec(data={"partition": "local"}, round={"quorum": 0.6}))
    play.begin("a", "b", "c")
    play.init(places=("a", "b", "c"), bounds=())
    play.now = 10.0
    play.train(0, "a")
    assert play.close_if_due("a", "b", "c").look_again_at is None
    assert play.close_if_due("a", "b").facts == ()


def test_a_deadline_with_no_update_extends_once_and_then_fails_naming_what_is_missing() -> None:
    play = training(round={"deadline": 60.0})
    assert play.close_if_due("a").look_again_at == 60.0
    play.now = 60.0
    play.close_if_due("a")
    assert isinstance(play.facts[-1], Extended)
    assert play.close_if_due("a").look_again_at == 120.0
    play.train(0, "a")
    play.now = 120.0
    play.close_if_due("a")
    assert isinstance(play.job.phase, Failed)
    assert "missed its quorum of 2 twice: 1 of 2 updates" in play.job.reason
    assert "missing: shard 1" in play.job.reason


def test_private_data_of_a_worker_that_is_gone_is_not_waited_for_once_another_is_in() -> None:
    play = Play(spec(data={"partition": "local"}))
    play.begin("a", "b")
    play.init(bounds=())
    assert play.close_if_due("a").facts == ()
    play.train(0, "a")
    assert play.close_if_due("a", "b").facts == ()
    play.close_if_due("a")
    assert isinstance(play.job.phase, Aggregating)


def test_closing_a_job_that_is_not_training_is_nothing() -> None:
    play = Play(spec())
    assert play.close_if_due("a").facts == ()


@pytest.mark.parametrize(
    ("quorum", "total", "needed"),
    [("all", 4, 4), ("all", 0, 1), (3, 4, 3), (3, 2, 2), (0.5, 3, 2), (0.01, 3, 1), (0.75, 4, 3)],
)
def test_quorum_is_all_a_count_or_a_share_rounded_up(quorum: object, total: int, needed: int) -> None:
    assert rounds.quorum_of(spec(round={"quorum": quorum}), total) == needed


def test_a_closed_round_counts_what_it_used_and_opens_the_next() -> None:
    play = training()
    step = play.whole_round("a", "b")
    closed, opened = step.facts
    assert isinstance(closed, RoundClosed)
    assert isinstance(opened, Opened)
    assert (closed.samples, closed.workers, closed.shards, closed.left_out) == (20, 2, 2, 0)
    assert (closed.bytes_down, closed.bytes_up) == (14, 18)
    assert closed.metrics == {"train_loss": 2.0}
    assert opened.round == 2
    assert opened.base == closed.digest == digest(77)


def test_closing_twice_is_refused() -> None:
    play = training()
    play.whole_round("a", "b")
    with pytest.raises(ConflictError, match="not being averaged"):
        rounds.close(play.job, ModelRef(digest=digest(1), size=1), seconds=1, places=(), now=0.0)


def test_after_the_last_round_the_last_evaluation_finishes_the_job() -> None:
    play = training()
    play.whole_round("a", "b")
    play.evaluate(1)
    play.whole_round("a", "b")
    assert isinstance(play.job.phase, Evaluating)
    assert rounds.next_task(play.job, "a", rounds.Held()) == Task("evaluate", 2)
    play.evaluate(2, accuracy=(95.0, 100.0))
    assert isinstance(play.job.phase, Finished)
    assert play.job.reason == "2 rounds done; accuracy 0.9500 at round 2"


def test_evaluations_out_of_order_finish_with_the_last_one_and_keep_the_newest() -> None:
    play = training()
    play.whole_round("a", "b")
    play.whole_round("a", "b")
    play.evaluate(2, accuracy=(5.0, 10.0))
    assert not play.job.over
    play.evaluate(1, accuracy=(7.0, 10.0))
    assert isinstance(play.job.phase, Finished)
    assert (play.job.metrics_round, play.job.metrics) == (2, {"accuracy": 0.5})
    assert (play.job.best_round, play.job.best_value) == (1, 0.7)


def test_a_job_without_a_test_split_finishes_after_its_last_round() -> None:
    play = Play(spec(rounds=1))
    play.begin("a", "b")
    play.init(test_samples=0)
    play.whole_round("a", "b")
    assert isinstance(play.job.phase, Finished)


@pytest.mark.parametrize(("every", "measured"), [(0, [5]), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_evaluate_every_names_the_rounds_that_are_measured(every: int, measured: list[int]) -> None:
    play = training(rounds=5, round={"evaluate_every": every})
    assert [r for r in range(1, 6) if rounds.evaluates(play.job, r)] == measured


@pytest.mark.parametrize(
    ("metric", "target", "value", "reached"),
    [
        ("accuracy", 0.9, 0.9, True),
        ("accuracy", 0.9, 0.95, True),
        ("accuracy", 0.9, 0.89, False),
        ("loss", 0.5, 0.4, True),
        ("loss", 0.5, 0.6, False),
        ("perplexity", 9.0, math.nan, False),
        ("other", 0.5, None, False),
    ],
)
def test_the_job_ends_when_the_target_is_reached(
    metric: str, target: float, value: float | None, reached: bool
) -> None:
    play = training(target=target, target_metric=metric)
    play.whole_round("a", "b")
    metrics = {"accuracy": (1.0, 10.0)} if value is None else {metric: (value, 1.0)}
    play.evaluate(1, **metrics)
    assert isinstance(play.job.phase, Finished) == reached
    if reached:
        assert f"reached the target {target} at round 1" in play.job.reason


def test_a_nan_is_never_the_best() -> None:
    play = training()
    play.whole_round("a", "b")
    play.evaluate(1, accuracy=(math.nan, 1.0))
    assert play.job.best_round is None


def test_a_metric_with_no_count_says_nothing() -> None:
    assert rounds.means([{"a": (0.0, 0.0), "b": (1.0, 2.0)}, {"b": (2.0, 2.0)}]) == {"b": 0.75}


# ---------------------------------------------------------------- pausing and ending


def test_a_paused_job_hands_out_nothing_but_takes_what_comes_in() -> None:
    play = training()
    play.give(Task("train", 1, 0), "a")
    play.do(rounds.pause(play.job, "me"))
    assert isinstance(play.job.phase, Paused)
    assert rounds.next_task(play.job, "b", rounds.Held()) is None
    play.do(rounds.take_update(play.job, play.update(0, "a")))
    assert rounds.pause(play.job, "me").facts == ()
    play.do(rounds.resume(play.job, "me"))
    assert isinstance(play.job.phase, Training)
    assert set(play.job.phase.accepted) == {0}
    assert rounds.resume(play.job, "me").facts == ()


def test_a_round_frozen_under_a_pause_is_averaged_and_the_job_stays_paused() -> None:
    play = training()
    play.train(0, "a")
    play.give(Task("train", 1, 1), "b")
    play.do(rounds.pause(play.job, "me"))
    play.do(rounds.take_update(play.job, play.update(1, "b")))
    play.close_if_due("a", "b")
    play.close()
    assert isinstance(play.job.phase, Paused)
    assert isinstance(play.job.inner, Training)
    play.do(rounds.resume(play.job, "me"))
    assert play.job.phase.state == "training"


def test_the_last_round_closed_under_a_pause_waits_for_its_evaluation_under_the_pause() -> None:
    play = training(rounds=1)
    play.train(0, "a")
    play.train(1, "b")
    play.close_if_due("a", "b")
    play.do(rounds.pause(play.job, "me"))
    play.close()
    assert isinstance(play.job.phase, Paused)
    assert isinstance(play.job.inner, Evaluating)
    play.do(rounds.resume(play.job, "me"))
    play.evaluate(1)
    assert isinstance(play.job.phase, Finished)


@pytest.mark.parametrize("decide", [rounds.pause, rounds.resume])
def test_an_ended_job_cannot_be_paused_or_resumed(decide: object) -> None:
    play = training()
    play.do(rounds.fail(play.job, "why"))
    with pytest.raises(JobOverError):
        decide(play.job, "me")  # type: ignore[operator]
    with pytest.raises(JobOverError):
        rounds.cancel(play.job, "me")


def test_a_pause_stops_the_deadline_and_resuming_starts_it_anew() -> None:
    play = training(round={"deadline": 60.0})
    play.do(rounds.pause(play.job, "me"))
    play.now = 1000.0
    assert play.close_if_due("a").facts == ()
    play.do(rounds.resume(play.job, "me"))
    assert play.close_if_due("a").look_again_at == 1060.0


def test_a_pause_after_the_quorum_starts_the_grace_anew() -> None:
    play = training(round={"quorum": 1})
    play.now = 10.0
    play.train(0, "a")
    play.do(rounds.pause(play.job, "me"))
    play.now = 50.0
    play.do(rounds.resume(play.job, "me"))
    play.close_if_due("a", "b")
    assert isinstance(play.job.phase, Aggregating)


def test_cancelling_twice_is_cancelling() -> None:
    play = training()
    play.do(rounds.cancel(play.job, "me"))
    assert isinstance(play.job.phase, Cancelled)
    assert rounds.cancel(play.job, "you").facts == ()


def test_a_fact_that_does_not_fit_the_state_is_refused_by_the_replay() -> None:
    play = Play(spec())
    with pytest.raises(ConflictError, match="cannot become training"):
        rounds.evolve(play.job, StateChanged(state="training", reason=""), 0.0)
    with pytest.raises(ConflictError, match="not training"):
        rounds.evolve(play.job, Frozen(round=1, shards=(), reason=""), 0.0)


def test_tries_of_a_task_that_is_not_open_are_none() -> None:
    play = training()
    assert rounds.tries_of(play.job, Task("init", 0)) == Tries()
    assert rounds.tries_of(play.job, Task("evaluate", 9)) == Tries()
    assert not rounds.is_open(play.job, Task("init", 0))
    assert not rounds.is_open(play.job, Task("train", 1, 99))
    assert [str(Task("init", 0)), str(Task("train", 1, 2)), str(Task("evaluate", 3))] == [
        "initialisation",
        "round 1, shard 2",
        "evaluation of round 3",
    ]


def test_a_fact_about_a_task_that_is_gone_changes_no_tries() -> None:
    play = training()
    play.whole_round("a", "b")
    before = play.job
    play.give(Task("train", 1, 0), "a")
    assert play.job == before


# ---------------------------------------------------------------- a power cut


def whole_round_in(play: Play) -> tuple[Accepted, ...]:
    play.train(0, "a")
    play.train(1, "b")
    return rounds.accepted_of(play.job)


def test_a_round_that_lacks_the_bytes_of_an_update_is_not_frozen_and_says_whom_it_waits_for() -> None:
    play = training()
    first, _ = whole_round_in(play)
    play.do(rounds.lost(first))
    step = play.close_if_due("a", "b")
    assert not step.facts
    assert step.reason == "round 1: updates that a power cut took are awaited again: shard 0 from a"
    play.do(rounds.restored(first))
    assert isinstance(play.close_if_due("a", "b").facts[0], Frozen)


def test_an_update_lost_while_it_was_being_averaged_is_found_again_and_stays_in_the_frozen_set() -> None:
    play = training()
    updates = whole_round_in(play)
    play.close_if_due("a", "b")
    play.do(rounds.lost(updates[1]))
    assert rounds.lost_of(play.job) == (updates[1],)
    assert isinstance(play.job.inner, Aggregating)
    play.do(rounds.restored(updates[1]))
    assert rounds.lost_of(play.job) == ()
    assert rounds.accepted_of(play.job) == updates


def test_a_frozen_round_is_open_again_for_the_one_shard_that_is_lost_for_good() -> None:
    play = training()
    updates = whole_round_in(play)
    play.close_if_due("a", "b")
    play.do(rounds.lost(updates[1]))
    task = Task("train", 1, 1)
    play.back(task, "lost", worker="b", attempt=1)
    assert rounds.accepted_of(play.job) == updates[:1]
    assert rounds.next_task(play.job, "a", rounds.Held()) == task
    play.give(task, "a")
    assert rounds.tries_of(play.job, task).attempt == 2


def test_nothing_is_lost_of_a_job_that_is_not_in_a_round() -> None:
    play = Play(spec())
    assert rounds.accepted_of(play.job) == rounds.lost_of(play.job) == ()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_lost_update_of_another_round_is_refused(frozen: bool) -> None:
    play = training()
    update = whole_round_in(play)[0]
    if frozen:
        play.close_if_due("a", "b")
    with pytest.raises(ConflictError, match="no update of round 7 can be lost or found"):
        play.do(rounds.lost(update.model_copy(update={"round": 7})))


# ---------------------------------------------------------------- a full disk


def test_a_job_paused_for_room_knows_how_much_and_resumes_like_any_other() -> None:
    play = training()
    play.do(rounds.pause(play.job, "the coordinator until there is room", room=500))
    assert isinstance(play.job.phase, Paused)
    assert play.job.phase.room == 500
    assert not play.do(rounds.pause(play.job, "the coordinator again", room=900)).facts
    play.do(rounds.resume(play.job, "the coordinator"))
    assert play.job.phase.state == "training"


def test_a_persons_pause_outlasts_that_of_a_full_disk() -> None:
    play = training()
    play.do(rounds.pause(play.job, "the coordinator until there is room", room=500))
    play.do(rounds.pause(play.job, "a user"))
    assert isinstance(play.job.phase, Paused)
    assert play.job.phase.room == 0
    assert not play.do(rounds.pause(play.job, "the coordinator", room=5)).facts


# ---------------------------------------------------------------- a shard that was cut for a worker


def by_speed(*, rates: dict[str, float], total: int = 1_360_000, **keys: Any) -> Play:
    """A job in its first round, cut by speeds that an earlier job has taught."""
    play = Play(spec(rounds=3, data={"shards": "auto"}, **keys))
    play.begin(*rates)
    play.give(Task("init", 0), "a")
    places = [Place(worker, worker, rate=rate) for worker, rate in rates.items()]
    play.do(rounds.take_init(play.job, play.made("a", total=total), places, play.now))
    return play


THREE = {"a": 1.0, "b": 0.2, "c": 0.16}
ALL_FREE = {"a": True, "b": True, "c": True}


def shard_for(play: Play, worker: str, coming: dict[str, bool], *held: int) -> int | None:
    assert isinstance(play.job.inner, Training)
    tasks = rounds.Held(Task("train", play.job.inner.round, shard) for shard in held)
    task = rounds.next_task(play.job, worker, tasks, coming)
    return None if task is None or task.kind != "train" else task.shard


def test_every_worker_gets_the_shard_that_was_cut_for_it_in_whatever_order_they_ask() -> None:
    play = by_speed(rates=THREE)
    assert [shard_for(play, worker, ALL_FREE) for worker in "cab"] == [2, 0, 1]
    assert shard_for(play, "newcomer", ALL_FREE) is None
    assert shard_for(play, "b", ALL_FREE, 1) is None


@pytest.mark.parametrize("coming", [{"b": True, "c": True}, {}])
def test_the_shard_of_a_worker_that_is_gone_goes_to_whoever_asks(coming: dict[str, bool]) -> None:
    play = by_speed(rates=THREE)
    assert shard_for(play, "newcomer", coming) == 0
    assert shard_for(play, "b", coming) == 1
    assert shard_for(play, "b", coming, 1) == 0


def test_a_shard_that_was_given_back_goes_to_whoever_asks() -> None:
    play = by_speed(rates=THREE)
    play.give(Task("train", 1, 0), "a")
    play.back(Task("train", 1, 0), "task_failed")
    assert shard_for(play, "newcomer", ALL_FREE) == 0
    assert shard_for(play, "b", ALL_FREE) == 1


def test_the_shard_of_a_worker_that_is_busy_goes_to_one_that_has_handed_in_its_own() -> None:
    play = by_speed(rates=THREE)
    busy = {**ALL_FREE, "a": False}
    assert shard_for(play, "newcomer", busy) is None
    play.train(1, "b", samples=1)
    assert shard_for(play, "b", busy) == 0
    assert shard_for(play, "b", ALL_FREE) is None


SIX = range(6)
SOME = st.sets(st.sampled_from(SIX))


@given(
    bound=st.booleans(),
    meant=st.lists(st.sampled_from(["a", "b", "c", None]), min_size=6, max_size=6),
    accepted=st.dictionaries(st.sampled_from(SIX), st.sampled_from("abc")),
    held=SOME,
    tried=SOME,
    states=st.dictionaries(st.sampled_from(SIX), st.sampled_from("abc")),
    coming=st.dictionaries(st.sampled_from("abc"), st.booleans()),
    evaluates=st.booleans(),
)
def test_a_worker_gets_the_best_of_the_shards_that_it_may_have(
    bound: bool,
    meant: list[str | None],
    accepted: dict[int, str],
    held: set[int],
    tried: set[int],
    states: dict[int, str],
    coming: dict[str, bool],
    evaluates: bool,
) -> None:
    play = training()
    owners = [("b" if bound else None, None if bound else whose) for whose in meant]
    cut = [Shard(shard=n, start=n, stop=n + 1, worker=own, meant=whose) for n, (own, whose) in enumerate(owners)]
    job = rounds.evolve(play.job, Opened(round=1, base=digest(0), shards=tuple(reversed(cut)), reason=""), 0.0)
    assert isinstance(job.inner, Training)
    phase = replace(
        job.inner,
        accepted={n: play.update(n, worker) for n, worker in accepted.items()},
        tries={n: Tries(workers=("x",)) for n in tried},
        evaluators=(Absent(worker="a", worker_name="a", why="is too slow"),) if evaluates else (),
    )
    job = replace(job, phase=phase, states={n: StateOf(1, worker, n) for n, worker in states.items()})

    def may_have(shard: Shard) -> bool:
        if shard.shard in accepted.keys() | held or shard.worker not in (None, "a"):
            return False
        if shard.meant != "a" and evaluates and any(other.meant in coming for other in cut):
            return False  # one of those trains
        if shard.meant in (None, "a") or shard.meant not in coming or shard.shard in tried:
            return True
        return not coming[shard.meant] and "a" in accepted.values()

    def rank(shard: Shard) -> tuple[bool, int, int]:
        whose = states.get(shard.shard)
        return shard.meant != "a", 1 if whose is None else 0 if whose == "a" else 2, shard.shard

    best = min(filter(may_have, cut), key=rank, default=None)
    given_out = rounds.next_task(job, "a", rounds.Held(Task("train", 1, n) for n in held), coming)
    assert given_out == (None if best is None else Task("train", 1, best.shard))


TASKS = st.builds(Task, st.sampled_from(["init", "train", "evaluate"]), st.integers(0, 2), st.integers(0, 3))


@given(st.lists(st.tuples(st.booleans(), TASKS)), st.sampled_from(["train", "evaluate"]), st.integers(0, 2))
def test_the_tasks_that_are_held_are_those_that_were_taken_and_not_freed(
    steps: list[tuple[bool, Task]], kind: Any, index: int
) -> None:
    held, known = rounds.Held(), set[Task]()
    for taken, task in steps:
        (held.add if taken else held.discard)(task)
        (known.add if taken else known.discard)(task)
    assert (held, len(held), rounds.Held(known)) == (known, len(known), held)
    assert held.shards(kind, index) == {task.shard for task in known if (task.kind, task.round) == (kind, index)}


def test_an_update_stands_while_a_round_has_it_and_only_that_very_one_does() -> None:
    play = training()
    task = Task("train", 1, 0)
    play.train(0, "a")
    counted = rounds.accepted_of(play.job)[0]
    assert rounds.stands_on(play.job, task, counted.attempt, counted.digest)
    assert not rounds.stands_on(play.job, task, counted.attempt + 1, counted.digest)
    assert not rounds.stands_on(play.job, task, counted.attempt, digest(99))
    assert not rounds.stands_on(play.job, Task("train", 1, 1), counted.attempt, counted.digest)
    play.train(1, "b")
    play.close_if_due("a", "b")
    assert isinstance(play.job.inner, Aggregating)
    assert rounds.stands_on(play.job, task, counted.attempt, counted.digest)
    play.close()
    assert not rounds.stands_on(play.job, task, counted.attempt, counted.digest)


def test_an_evaluator_evaluates_and_trains_only_when_no_trainer_is_there() -> None:
    play = by_speed(rates={**THREE, "cpu": 0.015})
    everybody = {**ALL_FREE, "cpu": True}
    assert isinstance(play.job.inner, Training)
    assert [one.worker for one in play.job.inner.evaluators] == ["cpu"]
    assert shard_for(play, "cpu", {**everybody, "a": False}) is None
    assert shard_for(play, "cpu", {"cpu": True}) == 0
    for shard, worker in enumerate("abc"):
        play.train(shard, worker, samples=1)
    play.close_if_due("a", "b", "c", "cpu")
    play.close(places=("a", "b", "c", "cpu"))
    closed = play.facts[-2]
    assert isinstance(closed, RoundClosed)
    assert [(one.worker_name, one.shard, one.why) for one in closed.absent] == [
        ("cpu", None, "evaluates only: its share would be 1.1%, under 3%")
    ]
    assert play.replayed() == play.job


# ---------------------------------------------------------------- who is expected when


DUE = {1: Due("b", "gpu2", since=0.0, within=40.0)}


def test_what_is_awaited_names_who_has_it_and_when_it_is_expected() -> None:
    play = training()
    play.train(0, "a")
    play.now = 10.0
    assert "awaiting shard 1 (gpu2, expected in 30 s)" in rounds.close_if_due(play.job, "ab", 10.0, DUE).reason
    step = rounds.close_if_due(play.job, "ab", 62.0, DUE)
    assert step.facts == ()
    assert "awaiting shard 1 (gpu2 falls behind: 62 s, expected within 40 s)" in step.reason


@pytest.mark.parametrize(
    ("deadline", "within", "until"),
    [("auto", 15.0, 15.0), ("auto", 21.0, 11.0), ("auto", None, 11.0), (50.0, 15.0, 11.0)],
)
def test_a_learned_deadline_gives_those_more_grace_that_are_expected_soon(
    deadline: object, within: float | None, until: float
) -> None:
    play = training(round={"quorum": 1, "deadline": deadline})
    play.now = 10.0
    play.train(0, "a")
    play.give(Task("train", 1, 1), "b")
    dues = {1: Due("b", "gpu2", since=0.0, within=within)}
    assert rounds.close_if_due(play.job, "ab", 10.0, dues).look_again_at == until
    frozen = rounds.close_if_due(play.job, "ab", until, dues).facts[0]
    assert isinstance(frozen, Frozen)
    assert [(one.worker_name, one.shard) for one in frozen.absent] == [("gpu2", 1)]
    assert "when the quorum was in" in frozen.absent[0].why


def test_a_learned_deadline_never_ends_a_job() -> None:
    play = training(round={"deadline": "auto"})
    play.train(0, "a")
    step = rounds.close_if_due(play.job, "ab", 1e9, DUE)
    assert (step.facts, step.look_again_at) == ((), None)


def test_a_closed_round_says_why_it_went_without_a_shard_that_nobody_had() -> None:
    play = training(round={"quorum": 1})
    play.train(0, "a")
    play.give(Task("train", 1, 1), "b")
    play.back(Task("train", 1, 1), "expired", worker="b")
    play.now = 1e9
    play.close_if_due("a")
    play.close()
    closed = next(fact for fact in play.facts if isinstance(fact, RoundClosed))
    assert (closed.left_out, [one.why for one in closed.absent]) == (1, ["nobody had it at the end; given out once"])


def test_a_closed_round_says_whose_private_data_it_went_without() -> None:
    play = Play(spec(data={"partition": "local"}))
    play.begin("a")
    play.init(places=("a", "b", "c"), bounds=())
    play.train(0, "a", samples=1)
    play.train(1, "b", samples=1)
    play.close_if_due("a", "b")
    assert isinstance(play.job.phase, Aggregating)
    assert [(one.worker, one.shard, one.why) for one in play.job.phase.absent] == [
        ("c", 2, "the worker whose data it is was gone")
    ]


# ---------------------------------------------------------------- late updates


def closing_without(late: str = "use", **keys: Any) -> Play:
    """A job whose first round closed with the update of a, while b trains on shard 1."""
    play = training(rounds=5, round={"quorum": 1, "late": late}, aggregation={"update": "int8"}, **keys)
    play.train(0, "a")
    play.give(Task("train", 1, 1), "b")
    play.now = 1e9
    play.close_if_due("a", "b")
    play.close()
    return play


def round_of(play: Play, number: int) -> None:
    """The next round, with the update of a alone."""
    play.train(0, "a")
    play.now += 1e9
    play.close_if_due("a", "b")
    play.close(number)


LATE_TASK = Task("train", 1, 1)


def late_update(play: Play) -> Accepted:
    return play.update(1, "b").model_copy(update={"round": 1})


def hand_in_late(play: Play) -> Step:
    update = late_update(play)
    assert rounds.judge(play.job, LATE_TASK, submission(update), "b") is None
    return play.do(rounds.take_update(play.job, update))


@pytest.mark.parametrize(("between", "factor"), [(0, 1 / math.sqrt(2)), (1, 1 / math.sqrt(3))])
def test_a_late_update_joins_a_later_round_and_weighs_less_the_staler_it_is(between: int, factor: float) -> None:
    play = closing_without()
    for number in range(between):
        round_of(play, 80 + number)
    assert "came late" in hand_in_late(play).reason
    assert rounds.judge(play.job, LATE_TASK, submission(late_update(play)), "b") == late_update(play)
    play.train(0, "a")
    play.now += 1e9
    play.close_if_due("a", "b")
    assert isinstance(play.job.inner, Aggregating)
    assert play.job.inner.late == rounds.waiting_late(play.job) == (late_update(play),)
    play.close(90)
    closed = next(fact for fact in reversed(play.facts) if isinstance(fact, RoundClosed))
    (member,) = closed.late
    assert (member.worker_name, member.round, member.shard, member.staleness) == ("b", 1, 1, 1 + between)
    assert member.factor == pytest.approx(factor)
    assert (closed.samples, closed.workers, closed.left_out) == (10, 1, 1)
    assert rounds.waiting_late(play.job) == ()
    assert play.replayed() == rounds.replace(play.job, phase=play.replayed().phase)
    with pytest.raises(LateError):
        rounds.judge(play.job, LATE_TASK, submission(late_update(play)), "b")


def test_an_update_that_is_staler_than_two_versions_is_refused() -> None:
    play = closing_without()
    round_of(play, 80)
    assert rounds.is_open(play.job, LATE_TASK)
    round_of(play, 81)
    assert not rounds.is_open(play.job, LATE_TASK)
    with pytest.raises(LateError):
        rounds.judge(play.job, LATE_TASK, submission(late_update(play)), "b")
    with pytest.raises(LateError):
        rounds.take_update(play.job, late_update(play))


def test_without_the_rule_a_late_update_is_refused() -> None:
    play = closing_without(late="refuse")
    assert play.job.past == {}
    with pytest.raises(LateError):
        rounds.judge(play.job, LATE_TASK, submission(late_update(play)), "b")


def test_a_late_update_may_come_while_a_round_is_averaged_and_waits_for_the_next() -> None:
    play = closing_without()
    play.train(0, "a")
    play.now += 1e9
    play.close_if_due("a", "b")
    hand_in_late(play)
    assert isinstance(play.job.inner, Aggregating)
    assert (play.job.inner.late, rounds.waiting_late(play.job)) == ((), (late_update(play),))
    play.close(80)
    play.train(0, "a")
    play.now += 1e9
    play.close_if_due("a", "b")
    assert isinstance(play.job.inner, Aggregating)
    assert [one.staleness for one in play.job.inner.members] == [2]


def test_a_late_attempt_is_never_handed_out_again_and_its_failures_end_nothing() -> None:
    play = closing_without()
    assert [out[0] for out in rounds.outstanding(play.job)] == [LATE_TASK]
    base, shard = rounds.subject_of(play.job, LATE_TASK)
    assert (base.digest, shard.shard) == (digest(0), 1)
    for _ in range(9):
        play.back(LATE_TASK, "task_failed", worker="b", attempt=1)
    assert not play.job.over
    assert rounds.next_task(play.job, "b", rounds.Held({Task("train", 2, 0), Task("train", 2, 1)})) == Task(
        "evaluate", 1
    )
    with pytest.raises(BadUpdateError):
        rounds.judge(play.job, LATE_TASK, submission(late_update(play).model_copy(update={"samples": 11})), "b")
    with pytest.raises(NotFoundError):
        rounds.judge(play.job, LATE_TASK, submission(late_update(play)), "a")


@pytest.mark.parametrize("frozen", [False, True])
def test_a_late_update_that_a_power_cut_took_is_not_used(frozen: bool) -> None:
    play = closing_without()
    hand_in_late(play)
    if frozen:
        play.train(0, "a")
        play.now += 1e9
        play.close_if_due("a", "b")
    play.do(rounds.late(LATE_TASK, 1, "b"))
    assert rounds.waiting_late(play.job) == ()
    assert play.replayed().late == {}


def test_a_frozen_round_that_is_opened_again_keeps_its_late_updates() -> None:
    play = closing_without()
    hand_in_late(play)
    play.train(0, "a")
    play.now += 1e9
    play.close_if_due("a", "b")
    in_time = rounds.accepted_of(play.job)[0]
    play.do(rounds.lost(in_time))
    play.back(Task("train", 2, 0), "lost", worker="a", attempt=1)
    assert isinstance(play.job.inner, Training)
    assert rounds.waiting_late(play.job) == (late_update(play),)


def test_after_the_last_round_nothing_late_is_taken() -> None:
    play = training(rounds=1, round={"quorum": 1, "late": "use"}, aggregation={"update": "int8"})
    play.train(0, "a")
    play.give(LATE_TASK, "b")
    play.now = 1e9
    play.close_if_due("a", "b")
    assert not rounds.is_open(play.job, LATE_TASK)
    play.close()
    assert not rounds.is_open(play.job, LATE_TASK)
    play.evaluate(1)
    assert (play.job.past, play.job.late) == ({}, {})


# ---------------------------------------------------------------- any history


class AnyHistory(RuleBasedStateMachine):
    """Random workers do random things, in any order; P1 to P4 must hold at every moment."""

    @initialize(
        quorum=st.sampled_from(["all", 1, 0.5]),
        deadline=st.sampled_from([None, 30.0, "auto"]),
        fraction=st.sampled_from([1.0, 0.5]),
        shards=st.sampled_from([4, "auto"]),
        late=st.sampled_from(["refuse", "use"]),
    )
    def begin(self, quorum: object, deadline: object, fraction: float, shards: object, late: str) -> None:
        sections = {
            "round": {"quorum": quorum, "deadline": deadline, "late": late},
            "data": {"shards": shards, "fraction": fraction},
            "aggregation": {"update": "int8"},
        }
        self.play = Play(spec(rounds=3, **sections))
        self.out: list[tuple[Task, int, str]] = []
        self.counted: dict[tuple[int, int], str] = {}
        self.averaged: set[tuple[int, int]] = set()
        self.play.begin("a", "b")
        self.play.init()

    def running(self) -> bool:
        return not self.play.job.over

    @rule(worker=st.sampled_from("abc"))
    def ask(self, worker: str) -> None:
        held = rounds.Held(task for task, _, holder in self.out if holder != worker)
        task = rounds.next_task(self.play.job, worker, held, self.coming() | {worker: True})
        if task is not None:
            assert task not in held
            fact = self.play.give(task, worker).facts[0]
            self.out = [o for o in self.out if o[2] != worker]
            self.out.append((task, fact.attempt, worker))  # type: ignore[union-attr]

    def coming(self) -> dict[str, bool]:
        """Nobody is gone; who has nothing to do is free."""
        busy = {holder for _, _, holder in self.out}
        return {worker: worker not in busy for worker in "abc"}

    @precondition(lambda self: self.out)
    @rule(data=st.data(), twice=st.booleans(), keep=st.booleans())
    def hand_in(self, data: st.DataObject, twice: bool, keep: bool) -> None:
        piece = data.draw(st.sampled_from(self.out))
        task, attempt, worker = piece
        if not keep:
            self.out.remove(piece)
        for _ in range(2 if twice else 1):
            self._hand_in(task, attempt, worker)

    def _hand_in(self, task: Task, attempt: int, worker: str) -> None:
        job = self.play.job
        content = digest(attempt * 7919 + task.shard * 31 + task.round)
        given = Submission(attempt=attempt, digest=content, samples=1, metrics={"accuracy": (1.0, 2.0)})
        key = (task.round, task.shard)
        try:
            repeat = rounds.judge(job, task, given, worker)
        except (SupersededError, LateError, JobOverError):
            assert not rounds.is_open(job, task)
            return
        if repeat is not None:
            assert self.counted[key] == content
            return
        if task.kind == "evaluate":
            self.play.do(rounds.take_evaluation(job, task.round, given, worker))
            return
        assert key not in self.counted
        self.counted[key] = content
        is_late = not isinstance(job.inner, Training) or job.inner.round != task.round
        assert not is_late or job.spec.round.late == "use"
        update = self.play.update(task.shard, worker, attempt=attempt, samples=1)
        given_in = {"digest": content, "round": task.round}
        self.play.do(rounds.take_update(job, update.model_copy(update=given_in)))
        assert is_late == (self.play.job.late.get(key) is not None)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), code=st.sampled_from(["task_failed", "expired", "released", "not_finite", "no_data"]))
    def give_back(self, data: st.DataObject, code: str) -> None:
        task, attempt, worker = data.draw(st.sampled_from(self.out))
        self.out.remove((task, attempt, worker))
        self.play.back(task, code, worker=worker, attempt=attempt)

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds: float) -> None:
        self.play.now += seconds
        before = self.play.job
        dues = {task.shard: Due(worker, worker, 0.0, 50.0) for task, _, worker in self.out if task.kind == "train"}
        step = self.play.do(rounds.close_if_due(self.play.job, "abc", self.play.now, dues))
        assert step.reason
        if rounds.lost_of(before):
            assert self.play.job == before, "a round went on without bytes that it needs"
        if isinstance(self.play.job.inner, Aggregating) and isinstance(before.inner, Training):
            assert self.play.job.inner.accepted
            shards = [u.shard for u in self.play.job.inner.accepted]
            assert shards == sorted(before.inner.accepted)

    @precondition(lambda self: rounds.accepted_of(self.play.job))
    @rule(data=st.data())
    def power_cut_takes_an_update(self, data: st.DataObject) -> None:
        update = data.draw(st.sampled_from(rounds.accepted_of(self.play.job)))
        if update not in rounds.lost_of(self.play.job):
            self.play.do(rounds.lost(update))
            assert update in rounds.lost_of(self.play.job)

    @precondition(lambda self: rounds.lost_of(self.play.job))
    @rule(data=st.data(), again=st.booleans())
    def lost_update_is_found_or_given_up(self, data: st.DataObject, again: bool) -> None:
        update = data.draw(st.sampled_from(rounds.lost_of(self.play.job)))
        key = (update.round, update.shard)
        if again:
            self.play.do(rounds.restored(update))
            assert update in rounds.accepted_of(self.play.job)
            return
        task = Task("train", *key)
        self.play.back(task, "lost", worker=update.worker, attempt=update.attempt)
        assert self.counted.pop(key) == update.digest
        assert rounds.is_open(self.play.job, task) or self.play.job.over

    @rule()
    def coordinator_is_killed(self) -> None:
        self.play.job = self.play.replayed()
        self.out = [o for o in self.out if (o[0], o[1], o[2], "") in rounds.outstanding(self.play.job)]

    @rule(rates=st.lists(st.sampled_from([None, 0.01, 1.0, 5.0]), min_size=3, max_size=3))
    def average(self, rates: list[float | None]) -> None:
        if isinstance(self.play.job.inner, Aggregating) and not rounds.lost_of(self.play.job):
            updates = [(u.round, u.shard) for u in self.play.job.inner.accepted]
            assert len(set(updates)) == len(updates)
            assert all(self.counted[key] for key in updates)
            late = [(u.round, u.shard) for u in self.play.job.inner.late]
            assert all(self.counted[key] and 1 <= self.play.job.inner.round - key[0] <= 2 for key in late)
            assert not self.averaged & {*updates, *late}, "an update counts twice"
            assert len(set(late)) == len(late)
            self.averaged |= {*updates, *late}
            places = [Place(w, w, rate=rate) for w, rate in zip("abc", rates, strict=True)]
            model = ModelRef(digest=digest(self.play.job.closed + 1), size=100)
            self.play.do(rounds.close(self.play.job, model, seconds=1.0, places=places, now=self.play.now))

    @rule(decide=st.sampled_from([rounds.pause, rounds.resume]))
    def person(self, decide: object) -> None:
        if not self.play.job.over:
            self.play.do(decide(self.play.job, "me"))  # type: ignore[operator]

    @invariant()
    def with_everybody_free_somebody_gets_every_open_shard(self) -> None:
        job = getattr(getattr(self, "play", None), "job", None)
        if job is None or not isinstance(job.phase, Training) or self.out:
            return
        able = {worker: True for worker in "abc" if worker not in job.excluded}
        given: set[int] = set()
        for _ in job.phase.shards:
            held = rounds.Held(Task("train", job.phase.round, shard) for shard in given)
            tasks = [rounds.next_task(replace(job, evaluations={}), worker, held, able) for worker in able]
            given |= {task.shard for task in tasks[:1] if task} or {task.shard for task in tasks if task}
        assert not able or given == job.phase.shards.keys() - job.phase.accepted.keys()

    @invariant()
    def replaying_the_facts_gives_the_same_state(self) -> None:
        if hasattr(self, "play"):
            live, replayed = self.play.job, self.play.replayed()
            assert _timeless(live) == _timeless(replayed)

    @invariant()
    def every_state_has_a_reason(self) -> None:
        if hasattr(self, "play"):
            assert self.play.job.reason

    @invariant()
    def closed_rounds_never_go_back(self) -> None:
        closed = getattr(self, "seen_closed", 0)
        if hasattr(self, "play"):
            assert self.play.job.closed >= closed
            self.seen_closed = self.play.job.closed


def _timeless(job: rounds.Job) -> rounds.Job:
    """The job without the monotonic times, which a replay cannot know."""
    inner = job.inner
    if isinstance(inner, Training):
        inner = rounds.replace(inner, opened_at=0.0, quorum_at=None)
    if isinstance(inner, Aggregating):
        before = rounds.replace(inner.before, opened_at=0.0, quorum_at=None)
        inner = rounds.replace(inner, opened_at=0.0, before=before)
    phase = Paused(inner, job.phase.room) if isinstance(job.phase, Paused) else inner  # type: ignore[arg-type]
    return rounds.replace(job, phase=phase)


TestAnyHistory = AnyHistory.TestCase
# 100,000 steps in the long profile: LYDIAN_FAULTS=full
FULL = os.environ.get("LYDIAN_FAULTS") == "full"
TestAnyHistory.settings = settings(
    deadline=None, max_examples=1000 if FULL else 60, stateful_step_count=100 if FULL else 60
)


# ---------------------------------------------------------------- optimiser state


KEPT = {"keep_optimizer": True}


def going_on_from(play: Play, shard: int, worker: str) -> int:
    """The round whose state the worker is told to go on from; 0: none."""
    state = rounds.state_to_go_on_from(play.job, shard, worker)
    return 0 if state is None else state.round


def test_a_shard_goes_to_the_worker_that_has_its_state_and_one_with_anothers_goes_last() -> None:
    play = training(data={"shards": 3}, train=KEPT, rounds=3)
    for shard, worker in enumerate("abc"):
        play.train(shard, worker, samples=5)
    play.close_if_due("a", "b", "c")
    play.close()
    chosen = [rounds.next_task(play.job, worker, rounds.Held()) for worker in ("a", "b", "c", "d")]
    assert [task and task.shard for task in chosen] == [0, 1, 2, 0]
    assert rounds.next_task(play.job, "a", rounds.Held({Task("train", 2, 0)})) == Task("train", 2, 1)
    assert play.replayed() == play.job


def test_a_worker_is_told_to_go_on_from_the_newest_state_of_a_shard_and_from_no_older_one() -> None:
    play = training(train=KEPT, rounds=4)
    told = lambda shard, worker: going_on_from(play, shard, worker)  # noqa: E731
    assert told(0, "a") == 0
    play.train(0, "a")
    assert told(0, "a") == 0  # the round may still lose it
    play.train(1, "b")
    play.close_if_due("a", "b")
    play.close(77)
    assert (told(0, "a"), told(1, "b"), told(0, "b")) == (1, 1, 0)
    play.whole_round("b", "b", number=78)
    assert (told(0, "a"), told(0, "b"), told(1, "b")) == (0, 2, 2)


def test_a_shard_that_a_round_left_out_goes_on_from_the_round_before() -> None:
    play = training(train=KEPT, rounds=4, round={"quorum": 1})
    play.whole_round("a", "b")
    play.train(0, "a")
    play.now = 1e9
    play.close_if_due("a", "b")
    play.close(78)
    assert going_on_from(play, 1, "b") == 1
    assert going_on_from(play, 0, "a") == 2


def test_what_a_worker_left_of_its_own_data_is_its_whatever_number_its_shard_has_next() -> None:
    play = Play(spec(rounds=4, data={"partition": "local"}, train={"personal": ["head.*"]}))
    play.begin("b", "c")
    play.init(places=("b", "c"), bounds=())
    for shard, worker in enumerate("bc"):
        play.train(shard, worker, samples=5)
    play.close_if_due("a", "b", "c")
    play.close()
    state = rounds.state_to_go_on_from(play.job, 1, "b")  # which is 1 now, since a has come
    assert state == rounds.StateOf(round=1, worker="b", shard=0)
    assert rounds.state_to_go_on_from(play.job, 0, "a") is None
    assert play.replayed() == play.job


def test_a_late_update_that_is_used_leaves_the_newest_state_of_its_shard() -> None:
    play = closing_without(train={"personal": "batchnorm"})
    assert going_on_from(play, 1, "b") == 0
    hand_in_late(play)
    assert (going_on_from(play, 1, "b"), going_on_from(play, 0, "a")) == (1, 1)
    assert play.replayed() == play.job


def test_a_late_update_leaves_no_state_that_is_older_than_the_one_there_is() -> None:
    play = closing_without(train=KEPT)
    play.whole_round("a", "a", number=78)
    hand_in_late(play)
    assert (going_on_from(play, 1, "a"), going_on_from(play, 1, "b")) == (2, 0)


def test_without_keep_optimizer_nobody_is_preferred() -> None:
    play = training(rounds=3)
    play.whole_round("a", "b")
    assert play.job.states == {}
    assert rounds.next_task(play.job, "b", rounds.Held()) == Task("train", 2, 0)


# ---------------------------------------------------------------- rounds that are begun anew


def test_a_round_begun_anew_takes_nothing_of_what_was_out_or_in() -> None:
    play = training(rounds=1)
    play.train(0, "a")
    play.give(Task("train", 1, 1), "b")
    old = play.update(1, "b")
    play.do(rounds.open_anew(play.job, at("a", "b"), "too few"))
    phase = play.job.inner
    assert isinstance(phase, rounds.Training)
    assert (phase.round, phase.seal, phase.accepted, play.job.reason) == (1, 1, {}, "too few")
    assert rounds.begun_by(phase) == frozenset()
    assert rounds.outstanding(play.job) == []
    play.give(Task("train", 1, 1), "b")
    assert rounds.tries_of(play.job, Task("train", 1, 1)).attempt == 3  # the second was nobody's
    assert rounds.begun_by(play.job.inner) == {"b"}  # type: ignore[arg-type]
    with pytest.raises(NotFoundError):
        rounds.judge(play.job, Task("train", 1, 1), submission(old).model_copy(update={"attempt": 2}), "b")
    assert play.replayed() == play.job


def test_a_frozen_round_may_be_begun_anew() -> None:
    play = training(rounds=1)
    play.train(0, "a")
    play.train(1, "b")
    play.close_if_due("a", "b")
    assert isinstance(play.job.inner, rounds.Aggregating)
    play.do(rounds.open_anew(play.job, at("a", "b"), "nobody opened shares"))
    assert isinstance(play.job.inner, rounds.Training)
    assert play.job.inner.accepted == {}


def test_a_round_is_frozen_with_the_shards_of_a_sum_alone() -> None:
    play = training(rounds=1)
    play.train(0, "a")
    play.train(1, "b")
    play.do(rounds.freeze(play.job, [1], "one is summed", {}, play.now))
    phase = play.job.inner
    assert isinstance(phase, rounds.Aggregating)
    assert [update.shard for update in phase.accepted] == [1]
    assert [one.shard for one in phase.absent] == [0]


def test_a_job_without_its_shards_may_still_be_evaluated() -> None:
    play = training(rounds=3)
    play.whole_round("a", "b")
    seen = rounds.without_shards(play.job)
    assert rounds.next_task(seen, "a", rounds.Held()) == Task("evaluate", 1)


# ---------------------------------------------------------------- data of the workers' own


@pytest.mark.parametrize(("fraction", "parts"), [(1.0, 2), (0.5, 5)])
def test_private_data_is_in_as_many_parts_as_there_are_workers_whoever_is_drawn(fraction: float, parts: int) -> None:
    play = training(data={"partition": "local", "fraction": fraction})
    shard = next(iter(play.job.inner.shards))  # type: ignore[union-attr]
    assert rounds.private_parts(play.job, Task("train", 1, shard), workers=5) == parts


def test_a_late_task_of_private_data_is_told_the_parts_of_its_own_round() -> None:
    play = closing_without(data={"partition": "local"})
    assert rounds.private_parts(play.job, LATE_TASK, workers=9) == 2
