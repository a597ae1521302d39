"""The guard of a round: who is refused for the length of its change, in what words, and what becomes of the round."""

from collections.abc import Iterable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from common.facts import Accepted, Frozen, HandedBack
from common.messages import ModelFacts
from server import rounds
from server.cutting import Place, open_round
from server.outliers import guard
from server.rounds import Aggregating, Failed, Task, Training
from tests.rounds_kit import LIMITS, Play, digest, spec, submission


def update(shard: int, norm: float | None, *, round_index: int = 1, worker: str = "w") -> Accepted:
    return Accepted(
        round=round_index, shard=shard, attempt=1, worker=worker, worker_name=worker, digest=digest(shard), samples=1,
        steps=1, seconds=1.0, metrics={}, bytes_down=0, bytes_up=0, norm=norm,
    )  # fmt: skip


def updates(*norms: float | None) -> list[Accepted]:
    return [update(shard, norm) for shard, norm in enumerate(norms)]


def refused(*norms: float | None, factor: float | None = 10, least: int = 1, late: Iterable[Accepted] = ()) -> set[int]:
    return {shard for _, shard in guard(updates(*norms), late, factor, least).refused}


# ---------------------------------------------------------------- who is refused


def test_a_change_beyond_its_multiple_of_the_median_is_refused_and_one_at_it_is_not() -> None:
    assert refused(1.0, 2.0, 20.0, 1.5, 2.0) == set()
    assert refused(1.0, 2.0, 20.1, 1.5, 2.0) == {2}


def test_the_words_have_every_number() -> None:
    (why,) = guard(updates(1.0, 2.0, 3.0, 400.0), (), 10, 1).refused.values()
    assert why == "its change has the norm 400, and 10 times the median 2.5 of the round's 4 updates is allowed"


def test_without_a_factor_nothing_is_refused() -> None:
    assert refused(1.0, 1.0, 1e9, factor=None) == set()


def test_two_updates_have_no_majority() -> None:
    assert refused(1.0, 1e9, factor=1.5) == set()


def test_what_was_not_measured_is_not_compared() -> None:
    assert refused(None, 1.0, 1.0, 1e9, None) == {3}
    assert refused(None, None, 1.0, 1e9) == set()


def test_an_infinite_norm_is_refused_and_so_is_any_change_where_most_changed_nothing() -> None:
    assert refused(1.0, 1.0, float("inf")) == {2}
    assert refused(0.0, 0.0, 1e-9) == {2}


def test_a_late_update_is_measured_by_the_round_and_moves_not_its_median() -> None:
    late = [update(7, 100.0, round_index=0), update(8, 1.0, round_index=0), update(9, None, round_index=0)]
    assert refused(1.0, 1.0, 1.0, late=late) == {7}


def test_a_robust_rule_is_left_the_updates_that_it_needs_the_nearest_first() -> None:
    found = guard(updates(1.0, 1.0, 1.0, 1.0, 50.0, 90.0, 70.0), (), 10, 5)
    assert {shard for _, shard in found.refused} == {5, 6}
    kept = "; shard 4 is kept, though beyond 10 times the median 1 of the round's 7 updates: the rule needs 5"
    assert found.spared == kept
    assert refused(1.0, 1.0, 1.0, 1.0, 99.0, least=5) == set()


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.floats(1.01, 20), st.randoms(use_true_random=False))
def test_who_is_refused_is_the_same_in_any_order_and_never_the_half(
    norms: list[float], factor: float, chance: Any
) -> None:
    given_, shuffled = updates(*norms), updates(*norms)
    chance.shuffle(shuffled)
    found = guard(given_, (), factor, 1)
    assert found == guard(shuffled, (), factor, 1)
    assert 2 * len(found.refused) <= len(norms)


# ---------------------------------------------------------------- what becomes of the round

FIVE = ("a", "b", "c", "d", "e")


def opened(**aggregation: Any) -> Play:
    """Five shards for five workers; the first round is open."""
    job = spec(data={"shards": 5}, aggregation={"norm_outlier": 10, **aggregation}, round={"min_workers": 5})
    play = Play(job)
    play.begin(*FIVE)
    play.init(places=FIVE, total=50)
    return play


def train(play: Play, *norms: float | None) -> None:
    """Shard k by worker k, with this norm."""
    for shard, norm in enumerate(norms):
        task = Task("train", 1, shard)
        play.give(task, FIVE[shard])
        made = play.update(shard, FIVE[shard]).model_copy(update={"norm": norm})
        rounds.judge(play.job, task, submission(made), FIVE[shard])
        play.do(rounds.take_update(play.job, made))


def test_a_round_closes_without_what_it_refuses_and_names_it() -> None:
    play = opened()
    train(play, 1.0, 1.0, 500.0, 1.0, 1.0)
    step = play.close_if_due(*FIVE)
    back, frozen = step.facts
    assert isinstance(back, HandedBack)
    assert (back.code, back.worker, back.shard) == ("norm_outlier", "c", 2)
    assert isinstance(frozen, Frozen)
    assert frozen.shards == (0, 1, 3, 4)
    assert [(one.worker, one.shard) for one in frozen.absent] == [("c", 2)]
    assert frozen.absent[0].why.startswith("refused: its change has the norm 500, and 10 times the median 1 of")
    assert "shard 2 of c refused" in step.reason
    assert isinstance(play.job.inner, Aggregating)
    assert play.job.inner.left_out == 1
    assert play.replayed() == play.job
    closed = play.close(places=FIVE).facts[0]
    assert closed.absent == frozen.absent  # type: ignore[union-attr]


def test_refusals_never_give_a_task_up() -> None:
    play = opened()
    for _ in range(LIMITS.failures + 1):
        if play.job.closed == 0:
            train(play, 1.0, 1.0, 500.0, 1.0, 1.0)
            play.close_if_due(*FIVE)
            play.close(places=FIVE)
    assert not play.job.over


def test_an_update_that_is_lost_for_good_opens_the_round_without_what_was_refused() -> None:
    play = opened()
    train(play, 1.0, 1.0, 500.0, 1.0, 1.0)
    play.close_if_due(*FIVE)
    play.back(Task("train", 1, 0), "lost", worker="a", attempt=1)
    phase = play.job.inner
    assert isinstance(phase, Training)
    assert sorted(phase.accepted) == [1, 3, 4]


def test_a_late_update_that_is_refused_leaves_the_round_and_is_named() -> None:
    keys = {"round": {"late": "use", "quorum": 3}, "aggregation": {"norm_outlier": 10, "update": "bf16"}}
    play = Play(spec(rounds=3, data={"shards": 4}, **keys))
    play.begin(*FIVE)
    play.init(places=FIVE, total=50)
    play.give(Task("train", 1, 3), "d")
    for shard in range(3):
        play.give(Task("train", 1, shard), FIVE[shard])
        play.do(rounds.take_update(play.job, play.update(shard, FIVE[shard]).model_copy(update={"norm": 1.0})))
    play.now += 1e4
    play.close_if_due(*FIVE)
    play.close(places=FIVE)
    late = play.update(3, "d").model_copy(update={"round": 1, "norm": 99.0})
    play.do(rounds.take_update(play.job, late))
    for shard in range(4):
        play.give(Task("train", 2, shard), FIVE[shard])
        play.do(rounds.take_update(play.job, play.update(shard, FIVE[shard]).model_copy(update={"norm": 1.0})))
    frozen = play.close_if_due(*FIVE).facts[-1]
    assert isinstance(frozen, Frozen)
    assert frozen.late == ()
    assert frozen.absent[0].why.startswith("its update of round 1, which came late, refused: its change has")
    assert not play.job.late


# ---------------------------------------------------------------- rounds of a robust rule


def test_the_quorum_is_never_below_what_the_rule_needs() -> None:
    job = spec(data={"shards": 10}, aggregation={"robust": "krum"}, round={"quorum": 5})
    assert rounds.quorum_of(job, 10) == 5
    assert rounds.quorum_of(job, 3) == 5
    auto = spec(data={"shards": "auto"}, aggregation={"robust": "krum"}, round={"quorum": 0.5, "min_workers": 5})
    assert rounds.quorum_of(auto, 6) == 5


def test_a_round_that_can_have_no_more_updates_fails_in_words() -> None:
    job = spec(data={"partition": "local"}, aggregation={"robust": "median"}, round={"min_workers": 3})
    play = Play(job)
    play.begin("a", "b", "c")
    play.init(places=("a", "b"), bounds=())
    for shard, worker in enumerate("ab"):
        play.train(shard, worker)
    play.close_if_due("a", "b")
    assert isinstance(play.job.phase, Failed)
    assert play.job.reason == (
        "round 1 cannot have more than 2 updates, and robust = median with faulty = 1 needs 3 updates"
    )


def test_a_rule_waits_for_a_worker_whose_own_data_it_needs() -> None:
    job = spec(data={"partition": "local"}, aggregation={"robust": "median"}, round={"min_workers": 3})
    play = Play(job)
    play.begin("a", "b", "c")
    play.init(places=("a", "b", "c"), bounds=())
    play.train(0, "a")
    play.train(1, "b")
    assert "awaiting shard 2" in play.close_if_due("a", "b").reason  # c is gone
    play.train(2, "c")
    assert isinstance(play.close_if_due("a", "b").facts[-1], Frozen)


def test_fewer_workers_than_the_rule_needs_updates_train_two_shards_and_it_is_said() -> None:
    play = Play(spec(data={"shards": "auto"}, aggregation={"robust": "krum"}, round={"min_workers": 5}))
    play.begin(*FIVE)
    play.init(places=("a", "b", "c"), bounds=(0, 20))
    phase = play.job.inner
    assert isinstance(phase, Training)
    assert [shard.samples for shard in phase.shards.values()] == [4] * 5
    assert [shard.meant for shard in phase.shards.values()] == ["a", "b", "c", None, None]
    assert "more than the 3 workers: robust = krum with faulty = 1 needs 5 updates" in play.job.reason


def test_a_worker_that_claims_great_speed_is_never_the_only_voice_of_a_guarded_round() -> None:
    places = [Place("a", "a", rate=1e9), *(Place(name, name, rate=1.0) for name in "bcd")]
    facts = ModelFacts(parameters=1, train_samples=1000, test_samples=0)

    def shards(count: int, **aggregation: float) -> list[tuple[str | None, int | None]]:
        job = spec(data={"shards": "auto"}, aggregation=aggregation)
        made = open_round(job, facts, digest(1), 2, places[:count]).shards
        return [(shard.meant, shard.samples) for shard in made]

    assert shards(4) == [("a", 1000)]
    assert shards(4, norm_outlier=10) == [("a", 250), ("b", 250), ("c", 250), ("d", 250)]
    assert shards(2, norm_outlier=10) == [("a", 500), ("b", 500)]
    assert shards(1, norm_outlier=10) == [("a", 1000)]
