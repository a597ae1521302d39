"""How far outer steps go, when that is said, and what else of a job is told to whoever submits it."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.cautions import DILOCO_MOMENTUM, cautions
from common.facts import Opened, RoundClosed
from common.messages import ModelRef
from server import amplification, rounds
from server.optimizers import DiLoCo
from tests.rounds_kit import Play, at, digest, spec, training

NUMBERS = st.lists(st.one_of(st.none(), st.floats(0, 100)), max_size=8)


# ---------------------------------------------------------------- the number


def test_the_number_is_the_way_in_lengths_of_the_mean_change() -> None:
    assert amplification.amplification(3.0, 2.0) == 1.5
    assert amplification.amplification(0.0, 2.0) == 0
    for moved, change in ((0.0, 0.0), (1.0, 0.0), (math.inf, 1.0), (1.0, math.nan), (math.inf, math.inf)):
        assert amplification.amplification(moved, change) is None


@given(NUMBERS)
def test_it_is_said_to_grow_only_after_three_rises_to_twice_as_much(history: list[float | None]) -> None:
    last: list[Any] = history[-4:]
    grows = len(last) == 4 and None not in last and last[0] < last[1] < last[2] < last[3] and last[3] >= 2 * last[0]
    assert bool(amplification.growth(history)) == grows


def test_what_is_said_has_both_numbers() -> None:
    assert "2.8 times as far as the workers' mean change, 1.4 times 3 rounds before" in amplification.growth(
        [9, 1.4, 2, 2.4, 2.8]
    )


def test_growth_is_looked_for_in_the_last_rounds_alone() -> None:
    kept: tuple[float | None, ...] = ()
    for number in range(10):
        kept = amplification.keep(kept, float(number))
    assert kept == (6, 7, 8, 9)


# ---------------------------------------------------------------- in a job


def close(play: Play, amplified: float | None, number: int) -> list[Any]:
    """Train and close a round of two shards whose outer step went so far."""
    for shard, worker in enumerate("ab"):
        play.train(shard, worker)
    play.close_if_due("a", "b")
    model = ModelRef(digest=digest(number), size=100)
    facts = play.do(
        rounds.close(play.job, model, amplified=amplified, seconds=1.0, places=at("a", "b"), now=play.now)
    ).facts
    return list(facts)


def test_a_round_carries_the_number_and_a_growing_one_a_warning_which_the_job_repeats() -> None:
    play = training(rounds=9, aggregation={"algorithm": "fedavgm"})
    for number, amplified in enumerate([1.0, 1.5, 1.9], start=1):
        closed = close(play, amplified, number)[0]
        assert (closed.amplification, closed.warning) == (amplified, "")
    assert play.replayed() == play.job
    closed, opened = close(play, 2.0, 4)
    assert isinstance(closed, RoundClosed)
    assert isinstance(opened, Opened)
    assert "moved the model 2 times" in closed.warning
    assert opened.reason.endswith(f"in round 4 {closed.warning}")
    assert play.job.reason == opened.reason
    assert play.replayed() == play.job
    assert close(play, 1.9, 5)[0].warning == ""


# ---------------------------------------------------------------- cautions

FEW = {"local_steps": 49}


@pytest.mark.parametrize(
    ("train", "aggregation", "said"),
    [
        (FEW, {"algorithm": "diloco"}, True),
        (FEW, {"algorithm": "diloco", "outer_momentum": 0.5}, True),
        (FEW, {"algorithm": "diloco", "outer_momentum": 0.0}, False),
        (FEW, {"algorithm": "fedavgm"}, False),
        ({"local_steps": 50}, {"algorithm": "diloco"}, False),
        ({"local_epochs": 1}, {"algorithm": "diloco"}, False),
    ],
)
def test_diloco_with_momentum_and_few_steps_is_taken_with_a_caution(
    train: dict[str, Any], aggregation: dict[str, Any], said: bool
) -> None:
    found = cautions(spec(train=train, aggregation=aggregation))
    assert bool(found) == said
    play = Play(spec(train=train, aggregation=aggregation))
    play.begin("a")
    assert ("caution: diloco" in play.job.reason) == said


@pytest.mark.parametrize(
    ("aggregation", "said"),
    [
        ({"algorithm": "diloco", "update": "topk"}, True),
        ({"algorithm": "diloco", "update": "topk", "feedback": True}, True),
        ({"algorithm": "diloco", "update": "topk", "feedback": False}, False),
        ({"algorithm": "diloco", "update": "topk", "outer_momentum": 0.0}, False),
        ({"algorithm": "diloco", "update": "int4"}, False),
        ({"update": "topk"}, False),
    ],
)
def test_topk_with_feedback_is_taken_with_a_caution_under_an_outer_momentum(
    aggregation: dict[str, Any], said: bool
) -> None:
    found = cautions(spec(train={"local_steps": 500}, aggregation=aggregation))
    assert any("topk with feedback" in sentence for sentence in found) == said
    assert len(found) == said


def test_the_momentum_in_the_caution_is_the_one_that_diloco_has() -> None:
    assert DiLoCo().momentum == DILOCO_MOMENTUM
    assert (
        "outer_momentum = 0.9 is meant for 50 local steps a round and more, and here it is 49"
        in (cautions(spec(train=FEW, aggregation={"algorithm": "diloco"}))[0])
    )


@pytest.mark.parametrize(("train", "said"), [({"local_epochs": 1}, True), (FEW, False)])
def test_where_the_steps_are_not_known_at_first_the_first_round_says_it_once(train: dict[str, Any], said: bool) -> None:
    play = training(rounds=3, train=train, aggregation={"algorithm": "diloco"})
    assert ("and here it is 1" in close(play, 1.3, 1)[0].warning) == said
    assert close(play, 1.3, 2)[0].warning == ""
