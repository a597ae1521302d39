"""Measuring by each worker on its own data, and stopping early: on the round machine alone."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.facts import Evaluated, EvaluationGivenUp, Measured, RoundClosed
from common.messages import JobSpec, Submission
from server import evaluation, fleet, rounds
from server.evaluation import NO_DATA, is_better, is_repeat, stale_after
from server.rounds import Evaluating, Failed, Finished, Task, Training
from tests.rounds_kit import LIMITS, Play, at, spec, training

OWN = {"evaluation": {"scope": "workers"}}


def part(play: Play, shard: int, worker: str, *, round_index: int = 1, samples: int = 10, **metrics: Any) -> None:
    """Hand a part of an evaluation out, and take what was measured."""
    task = Task("evaluate", round_index, shard)
    play.give(task, worker)
    given = Submission(attempt=rounds.tries_of(play.job, task).attempt, samples=samples, metrics=metrics, seconds=0.5)
    play.do(rounds.take_evaluation(play.job, round_index, given, worker, part=shard, worker_name=worker.upper()))


def newest(play: Play, kind: type[Any]) -> Any:
    return next(fact for fact in reversed(play.facts) if isinstance(fact, kind))


# ---------------------------------------------------------------- by each worker


def test_each_worker_that_was_there_measures_the_model_and_the_mean_is_over_their_samples() -> None:
    play = training(**OWN)
    play.whole_round("a", "b")
    assert newest(play, RoundClosed).measured_by == ("a", "b")
    part(play, 0, "a", samples=30, accuracy=(27.0, 30.0), loss=(6.0, 30.0))
    assert play.job.metrics == {}
    part(play, 1, "b", samples=10, accuracy=(5.0, 10.0))
    fact = newest(play, Evaluated)
    assert fact.metrics == {"accuracy": 0.8, "loss": 0.2}
    assert [(one.worker_name, one.metrics, one.samples) for one in fact.workers] == [
        ("A", {"accuracy": 0.9, "loss": 0.2}, 30), ("B", {"accuracy": 0.5}, 10),
    ]  # fmt: skip
    assert (fact.samples, fact.best, play.job.best_round, play.job.best_value) == (40, True, 1, 0.8)
    assert play.job.evaluations == {}
    assert play.replayed() == play.job


@given(order=st.permutations([0, 1, 2]), silent=st.sets(st.integers(0, 2), max_size=2))
def test_the_mean_is_the_same_in_any_order_and_whoever_has_no_data(order: list[int], silent: set[int]) -> None:
    play = Play(spec(**OWN))
    play.begin("a", "b")
    play.init()
    for shard, worker in enumerate("ab"):
        play.train(shard, worker)
    play.close_if_due("a", "b")
    play.close(places=("a", "b", "c"))
    values = {number: (0.1 * (number + 1), 1.0 + number) for number in range(3) if number not in silent}
    for number in order:
        numbers = {"accuracy": values[number]} if number in values else {}
        part(play, number, "abc"[number], samples=10 if numbers else 0, **numbers)
    fact = newest(play, Evaluated)
    wanted = sum(total for total, _ in values.values()) / sum(count for _, count in values.values())
    assert fact.metrics == {"accuracy": pytest.approx(wanted, abs=1e-15)}
    assert [one.why for one in fact.workers] == [NO_DATA if number in silent else "" for number in range(3)]


def test_nobody_else_is_given_a_workers_part() -> None:
    play = training(**OWN)
    play.whole_round("a", "b")
    assert rounds.next_task(play.job, "c", rounds.Held()) == Task("train", 2, 0)  # not bound: anybody's
    busy = rounds.Held({Task("train", 2, 0), Task("train", 2, 1)})
    assert rounds.next_task(play.job, "c", busy) is None
    assert rounds.next_task(play.job, "b", busy) == Task("evaluate", 1, 1)
    part(play, 1, "b", accuracy=(1.0, 2.0))
    assert rounds.next_task(play.job, "b", busy) is None
    assert not rounds.is_open(play.job, Task("evaluate", 1, 1))
    assert rounds.is_open(play.job, Task("evaluate", 1, 0))
    assert fleet.workers_needed(play.job, 5) == 2


def test_the_job_waits_for_every_part_of_its_last_evaluation() -> None:
    play = training(rounds=1, **OWN)
    play.whole_round("a", "b")
    assert isinstance(play.job.phase, Evaluating)
    assert fleet.workers_needed(play.job, 5) == 2
    part(play, 1, "b", accuracy=(1.0, 2.0))
    assert isinstance(play.job.phase, Evaluating)
    part(play, 0, "a", accuracy=(2.0, 2.0))
    assert isinstance(play.job.phase, Finished)
    assert play.job.reason == "1 rounds done; accuracy 0.7500 at round 1"


def test_parts_that_are_out_are_known_after_a_restart() -> None:
    play = training(**OWN)
    play.whole_round("a", "b")
    play.give(Task("evaluate", 1, 1), "b")
    assert (Task("evaluate", 1, 1), 1, "b", "") in rounds.outstanding(play.replayed())


def test_a_worker_that_is_gone_or_rests_is_not_waited_for_unless_it_measures_just_now() -> None:
    play = training(rounds=1, **OWN)
    play.whole_round("a", "b")
    play.give(Task("evaluate", 1, 0), "a")
    held = rounds.Held({Task("evaluate", 1, 0)})
    assert play.do(rounds.give_up_absent(play.job, ["a", "b"], rounds.Held(), 0.0)).facts == ()
    play.do(rounds.give_up_absent(play.job, [], held, 0.0))
    assert [fact.worker for fact in play.facts if isinstance(fact, Measured)] == ["b"]
    part_of_a = Submission(attempt=1, samples=4, metrics={"accuracy": (1.0, 4.0)})
    play.do(rounds.take_evaluation(play.job, 1, part_of_a, "a"))
    assert isinstance(play.job.phase, Finished)
    assert newest(play, Evaluated).metrics == {"accuracy": 0.25}
    assert newest(play, Evaluated).workers[1].why == "it was gone, or took no work, before it had measured"


def test_when_all_are_gone_the_evaluation_is_given_up_and_the_job_ends_with_the_reason() -> None:
    play = training(rounds=1, **OWN)
    play.whole_round("a", "b")
    play.do(rounds.give_up_absent(play.job, [], rounds.Held(), 0.0))
    assert isinstance(play.job.phase, Finished)
    assert "evaluation of round 1 given up, since no worker has numbers: a: it was gone" in play.job.reason
    assert play.replayed() == play.job


def test_a_part_that_keeps_failing_or_is_refused_is_left_out_and_its_worker_trains_on() -> None:
    play = training(**OWN)
    play.whole_round("a", "b")
    for _ in range(LIMITS.evaluation_failures):
        play.give(Task("evaluate", 1, 0), "a")
        play.back(Task("evaluate", 1, 0), "task_failed")
    play.give(Task("evaluate", 1, 1), "b")
    play.back(Task("evaluate", 1, 1), "no_data", worker="b")
    assert isinstance(newest(play, EvaluationGivenUp), EvaluationGivenUp)
    assert play.job.excluded == {}
    assert [fact.why for fact in play.facts if isinstance(fact, Measured)] == [
        "task_failed happened",
        "no_data happened",
    ]
    assert isinstance(play.job.phase, Training)


def test_a_part_whose_worker_dies_of_it_each_time_is_left_out() -> None:
    play = training(**OWN)
    play.whole_round("a", "b")
    for _ in range(LIMITS.expiries):
        assert not any(isinstance(fact, Measured) for fact in play.facts)
        play.give(Task("evaluate", 1, 0), "a")
        play.back(Task("evaluate", 1, 0), "expired")
    assert newest(play, Measured).worker == "a"
    assert not play.job.over


def test_an_excluded_worker_is_not_waited_for() -> None:
    play = training(**OWN)
    play.whole_round("a", "b")
    play.give(Task("train", 2, 0), "a")
    play.back(Task("train", 2, 0), "no_data", worker="a")
    play.do(rounds.give_up_absent(play.job, ["a", "b"], rounds.Held(), 0.0))
    assert newest(play, Measured).why == "no_data happened"


def test_a_round_that_closes_while_nobody_is_there_is_not_measured() -> None:
    play = training(rounds=1, **OWN)
    for shard, worker in enumerate("ab"):
        play.train(shard, worker)
    play.close_if_due("a", "b")
    play.close(places=())
    assert (
        newest(play, EvaluationGivenUp).reason == "no worker was there to measure the model of round 1 on its own data"
    )
    assert isinstance(play.job.phase, Finished)


def test_a_target_is_reached_by_the_mean_over_the_workers() -> None:
    play = training(target=0.75, **OWN)
    play.whole_round("a", "b")
    part(play, 0, "a", accuracy=(10.0, 10.0))
    assert not play.job.over
    part(play, 1, "b", accuracy=(5.0, 10.0))
    assert play.job.reason == "accuracy 0.7500 reached the target 0.75 at round 1"


def test_a_worker_whose_numbers_are_none_is_not_said_to_have_no_data() -> None:
    play = training(**OWN)
    play.whole_round("a", "b")
    part(play, 0, "a", samples=10)
    part(play, 1, "b", samples=10)
    assert newest(play, EvaluationGivenUp).reason == (
        "evaluation of round 1 given up, since no worker has numbers: A: what it measured is no finite number; "
        "B: what it measured is no finite number"
    )


def test_what_was_handed_in_before_is_a_repeat_and_what_was_given_up_is_not() -> None:
    done = Measured(round=1, shard=0, attempt=2, worker="a", worker_name="a")
    missing = Measured(round=1, shard=1, attempt=1, worker="b", worker_name="b", why="gone")
    assert is_repeat([missing, done], 2, "a")
    assert is_repeat([done.model_copy(update={"why": NO_DATA})], 2, "a")
    assert not is_repeat([missing, done], 1, "a")
    assert not is_repeat([missing, done], 1, "b")


# ---------------------------------------------------------------- stopping early


def evaluated(play: Play, *values: float) -> None:
    """Rounds, each with an evaluation of this accuracy, as long as the job goes on."""
    for value in values:
        if play.job.over:
            return
        play.whole_round("a", "b")
        play.evaluate(play.job.closed, accuracy=(value, 1.0))


def test_a_job_whose_accuracy_rises_no_more_stops_and_names_its_best_round() -> None:
    play = training(rounds=20, evaluation={"patience": 3, "min_delta": 0.01})
    evaluated(play, 0.5, 0.8, 0.805, 0.79, 0.8099)
    assert isinstance(play.job.phase, Finished)
    assert play.job.reason == (
        "stopped early at round 5: accuracy was not better than 0.8000 by more than 0.01 in 3 evaluations; "
        "the best model is that of round 5"
    )
    assert play.job.best_round == 5
    assert play.replayed() == play.job


def test_every_better_value_begins_the_patience_anew() -> None:
    play = training(rounds=20, evaluation={"patience": 2})
    evaluated(play, 0.5, 0.4, 0.6, 0.6, 0.7, 0.1)
    assert not play.job.over
    evaluated(play, 0.2)
    assert play.job.reason == (
        "stopped early at round 7: accuracy was not better than 0.7000 in 2 evaluations; "
        "the best model is that of round 5"
    )


def test_a_loss_is_better_when_it_is_lower() -> None:
    play = training(rounds=20, target_metric="loss", evaluation={"patience": 1})
    for value in (3.0, 2.0, 2.0):
        play.whole_round("a", "b")
        play.evaluate(play.job.closed, loss=(value, 1.0))
    assert "loss was not better than 2.0000 in 1 evaluation;" in play.job.reason


def test_a_metric_that_is_never_measured_stops_the_job_with_the_names_of_those_that_are() -> None:
    play = training(rounds=20, target_metric="f1", evaluation={"patience": 2})
    evaluated(play, 0.5, 0.6, 0.7)
    assert play.job.reason == "stopped early at round 2: 2 evaluations without f1; measured was accuracy"


def test_without_patience_nothing_stops_a_job() -> None:
    play = training(rounds=6)
    evaluated(play, *[0.5] * 5)
    assert not play.job.over


def test_a_job_with_patience_and_nothing_to_measure_on_fails_before_its_first_round() -> None:
    play = Play(spec(evaluation={"patience": 2}))
    play.begin("a")
    play.init(test_samples=0)
    assert isinstance(play.job.phase, Failed)
    assert play.job.reason == (
        "evaluation.patience counts evaluations, and there are none: dataset(config, 'test') has no samples"
    )


@given(
    values=st.lists(st.none() | st.floats(0, 1), max_size=12), patience=st.integers(1, 4),
    min_delta=st.sampled_from([0.0, 0.1, 0.3]),
)  # fmt: skip
def test_the_count_is_that_of_evaluations_since_the_last_better_one(
    values: list[float | None], patience: int, min_delta: float
) -> None:
    job = JobSpec.model_validate({"task": "d", "evaluation": {"patience": patience, "min_delta": min_delta}})
    stale, reference = 0, None
    for value in values:
        stale = stale_after(job, stale, reference, value)
        if stale == 0:
            assert value is not None
            assert reference is None or value > reference + min_delta - 1e-12
            reference = value
    since = len(values)
    best = None
    for number, value in enumerate(values):
        if value is not None and (best is None or value - best > min_delta):
            best, since = value, len(values) - number - 1
    assert stale == since


def test_nan_is_better_than_nothing_to_nobody() -> None:
    assert not is_better("accuracy", float("nan"), None)
    assert not is_better("loss", float("nan"), 1.0)
    assert is_better("val_error", 0.1, 0.2)
    assert evaluation.why_stop(JobSpec(task="d"), 3, 9, None, None, []) == ""
    patient = JobSpec.model_validate({"task": "d", "evaluation": {"patience": 1}})
    assert evaluation.why_stop(patient, 3, 1, None, None, []).endswith(
        "1 evaluation without accuracy; measured was nothing"
    )
    assert at("a")[0].here
