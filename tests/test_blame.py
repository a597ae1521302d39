"""Whose fault it is that attempts fail: one worker ends nobody's job, and a task that fails everywhere is given up."""

from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.facts import HandedBack
from common.messages import Submission
from server import rounds
from server.blame import ATTEMPTS_EACH, FAILURES_EACH, WITNESSES, has_had_its_turns, is_proven, leaves_to_others
from server.fleet import Fleet, Timing
from server.rounds import Aggregating, Failed, Finished, Initialising, Job, Task, Training
from tests.rounds_kit import LIMITS, Play, at, digest, registration, spec, submission, training

FAILING = ("task_failed", "task_exited", "out_of_memory", "bad_task", "non_finite", "expired", "worker_error")
KINDS: dict[str, dict[str, Any]] = {
    "fixed shards": {"data": {"shards": 2}},
    "a shard for each worker": {"data": {"shards": "auto"}},
    "asynchronous": {"data": {"shards": 3}, "round": {"mode": "async", "buffer": 1}},
    "data of their own": {"data": {"shards": "auto", "partition": "local"}},
    "measured by workers": {"data": {"shards": "auto", "partition": "local"}, "evaluation": {"scope": "workers"}},
}


# ---------------------------------------------------------------- the rule


def test_one_worker_proves_nothing_while_another_is_able_and_everything_where_there_is_none() -> None:
    assert not is_proven(["a"], ["a", "b"])
    assert not is_proven(["a"], ["b"])
    assert is_proven(["a"], ["a"])
    assert is_proven(["a"], [])
    assert is_proven(["a", "b"], ["a", "b"])


def test_three_workers_are_believed_however_many_there_are() -> None:
    able = [f"w{number}" for number in range(100)]
    assert not is_proven(able[: WITNESSES - 1], able)
    assert is_proven(able[:WITNESSES], able)


def test_a_worker_steps_back_after_two_failures_or_ten_attempts_until_the_others_have_had_theirs() -> None:
    assert not leaves_to_others("a", ["a"], ["a"], ["a", "b"])
    assert leaves_to_others("a", ["a"] * 2, ["a"] * FAILURES_EACH, ["a", "b"])
    assert leaves_to_others("a", ["a"] * ATTEMPTS_EACH, [], ["a", "b"])
    assert not leaves_to_others("a", ["a"] * 2, ["a"] * FAILURES_EACH, ["a"])
    assert not leaves_to_others("a", ["a", "a", "b", "b"], ["a", "a", "b", "b"], ["a", "b"])


@given(st.lists(st.sampled_from("abc")), st.sets(st.sampled_from("abc"), min_size=1))
def test_somebody_able_may_always_try_a_task(failed_on: list[str], able: set[str]) -> None:
    assert any(not leaves_to_others(one, failed_on, failed_on, able) for one in able)
    fresh = {one for one in able if not has_had_its_turns(one, failed_on, failed_on)}
    assert not fresh or any(not leaves_to_others(one, failed_on, failed_on, able) for one in fresh)


# ---------------------------------------------------------------- a whole job


class Shop:
    """A job and its fleet: workers ask, and succeed or fail. Data of their own: a worker for each shard."""

    def __init__(self, keys: dict[str, Any], *workers: str) -> None:
        self.play, self.workers = Play(spec(**{"rounds": 3, **keys})), workers
        self.fleet = Fleet(Timing(ttl_s=1e9))
        for name in workers:
            self.fleet.register(name, registration(name, data=("digits",)), now=0.0)
        self.given = self.asked = 0
        self.play.begin(*workers)

    def turn(self, worker: str, code: str | None) -> None:
        """A worker asks, and what it is given ends with this code; None: it succeeds."""
        choice = self.fleet.choose(worker, [self.play.job], 0.0)
        if choice is not None:
            self.given += 1
            task = choice[1]
            self.play.give(task, worker)
            if code is None:
                self._succeed(task, worker)
            else:
                self._fail(task, worker, code)
        self._go_on()

    def _fail(self, task: Task, worker: str, code: str) -> None:
        back = HandedBack(
            kind=task.kind, round=task.round, shard=task.shard, attempt=self._attempt(task), worker=worker,
            worker_name=worker, code=code, sentence=f"{code} happened",
        )  # fmt: skip
        job = self.play.job
        self.play.do(rounds.hand_back(job, back, LIMITS, partial(self._serving, job)))
        live = self.fleet.live(0.0)
        if not self.play.job.over:
            self.play.do(rounds.fail_if_nobody_can(self.play.job, live))

    def _serving(self, job: Job) -> list[str]:
        self.asked += 1
        return self.fleet.serving(job, 0.0)

    def _succeed(self, task: Task, worker: str) -> None:
        play, attempt = self.play, self._attempt(task)
        if task.kind == "init":
            made = play.made(worker, attempt=attempt)
            play.do(rounds.take_init(play.job, made, self._places(), 0.0))
        elif task.kind == "evaluate":
            found = Submission(attempt=attempt, metrics={"accuracy": (9.0, 10.0)}, samples=10, seconds=0.1)
            play.do(rounds.take_evaluation(play.job, task.round, found, worker, part=task.shard))
        else:
            number = 1000 * task.round + self.given
            update = play.update(task.shard, worker, attempt=attempt, samples=5, number=number)
            update = update.model_copy(update={"round": task.round})
            rounds.judge(play.job, task, submission(update), worker)
            play.do(rounds.take_update(play.job, update))

    def _go_on(self) -> None:
        job = self.play.job
        if not job.over and job.evaluations:
            self.play.do(rounds.give_up_absent(job, self.workers, rounds.Held(), 0.0))
        if not self.play.job.over:
            self.play.close_if_due(*self.workers)
        if rounds.frozen_of(self.play.job) is not None:
            self.play.close(5000 + self.given, places=tuple(place.worker for place in self._places()))

    def _places(self) -> list[Any]:
        return at(*self.fleet.places(self.play.job, 0.0))

    def _attempt(self, task: Task) -> int:
        return rounds.tries_of(self.play.job, task).attempt

    @property
    def story(self) -> str:
        return f"{self.play.job.phase} {self.play.job.reason}"


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(
    turns=st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(FAILING)), max_size=60),
    first=st.booleans(),
)
def test_one_worker_that_always_fails_never_ends_a_job_that_another_can_do(
    kind: str, turns: list[tuple[str, str]], first: bool
) -> None:
    shop = Shop(KINDS[kind], "a", "b", "c", "d")

    def bad(times: int) -> None:
        for at_turn in range(times):
            shop.turn("a", FAILING[at_turn % len(FAILING)])

    bad(30 if first else 0)
    for worker, code in turns:
        shop.turn(worker, code if worker == "a" else None)
        assert not isinstance(shop.play.job.phase, Failed), shop.story
    while not shop.play.job.over:
        given_before = shop.given
        bad(2)
        for worker in "bcd":
            shop.turn(worker, None)
        assert shop.given > given_before, shop.story
    assert isinstance(shop.play.job.phase, Finished), shop.story
    assert shop.play.replayed() == shop.play.job


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(
    workers=st.integers(1, 5),
    order=st.lists(st.tuples(st.integers(0, 4), st.sampled_from(FAILING)), max_size=60),
    built=st.booleans(),
)
def test_a_task_that_fails_wherever_it_is_tried_is_given_up(
    kind: str, workers: int, order: list[tuple[int, str]], built: bool
) -> None:
    names = tuple("abcde"[:workers])
    shop = Shop(KINDS[kind], *names)
    if built:
        shop.turn("a", None)
        assert not isinstance(shop.play.job.phase, Initialising)
    fair = [(number, FAILING[(lap + number) % len(FAILING)]) for lap in range(150) for number in range(workers)]
    for number, code in [*order, *fair]:
        if shop.play.job.over:
            break
        shop.turn(names[number % workers], code)
    assert isinstance(shop.play.job.phase, Failed), shop.story
    assert "happened" in shop.play.job.reason
    assert shop.given <= 2 * LIMITS.expiries * workers + LIMITS.failures
    assert shop.play.replayed() == shop.play.job


# ---------------------------------------------------------------- one thing after another


def test_a_task_that_three_workers_call_unusable_ends_the_job_with_the_last_ones_words() -> None:
    shop = Shop(KINDS["fixed shards"], "a", "b", "c", "d")
    for worker in "ab":
        shop.turn(worker, "bad_task")
        assert not shop.play.job.over
    assert shop.play.job.excluded == {"a": "bad_task happened", "b": "bad_task happened"}
    shop.turn("c", "bad_task")
    said = "initialisation on c: bad_task happened; 3 workers say that it cannot be used"
    assert shop.play.job.reason == said


def test_a_worker_that_failed_twice_gets_the_task_only_after_the_others_have_failed_as_often() -> None:
    shop = Shop(KINDS["fixed shards"], "a", "b")
    for _ in range(5):
        shop.turn("a", "task_failed")
    assert shop.given == FAILURES_EACH
    shop.turn("b", "task_failed")
    shop.turn("b", "task_failed")
    assert not shop.play.job.over
    shop.turn("a", "task_failed")
    assert isinstance(shop.play.job.phase, Failed)
    assert "given up after 5 failures" in shop.play.job.reason


def test_who_else_could_do_it_is_not_asked_where_nothing_depends_on_it() -> None:
    shop = Shop(KINDS["fixed shards"], *"abcd")
    for worker in "abcd":
        shop.turn(worker, "expired")
    assert (shop.given, shop.asked) == (4, 0)
    shop.turn("a", "bad_task")
    assert (shop.given, shop.asked) == (5, 1)


def test_what_one_worker_leaves_is_taken_by_one_that_was_too_slow_for_a_shard() -> None:
    play = training(data={"shards": "auto"})
    phase = play.job.inner
    assert isinstance(phase, Training)
    slow = rounds.Absent(worker="slow", why="too slow for a shard")
    play.job = rounds.replace(play.job, phase=rounds.replace(phase, evaluators=(slow,)))
    coming, task = {"a": True, "b": True}, Task("train", 1, 0)

    def given() -> Task | None:
        return rounds.next_task(play.job, "slow", rounds.Held({Task("train", 1, 1)}), coming)

    assert given() is None
    for worker in "aabb":
        assert given() is None
        play.give(task, worker)
        play.back(task, "task_failed", worker=worker)
    assert given() == task


def test_a_worker_that_cannot_train_its_own_data_is_left_out_and_the_round_closes_without_it() -> None:
    shop = Shop(KINDS["data of their own"], "a", "b")
    shop.turn("b", None)
    for _ in range(LIMITS.failures):
        assert "a" not in shop.play.job.excluded
        shop.turn("a", "task_failed")
    assert shop.play.job.excluded == {"a": "task_failed happened"}
    shop.turn("b", None)
    assert shop.play.job.closed == 1
    assert not isinstance(shop.play.job.inner, Aggregating)
    assert digest(0) != shop.play.job.model
