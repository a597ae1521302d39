"""What is measured of workers: pure calls."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.facts import Accepted
from common.messages import TrainSection
from common.pace import Took, processed, took_of
from server.speeds import ALPHA, REMEMBERED, Speeds, ahead, counted, work_of
from tests.rounds_kit import digest, spec

JOB = spec(data={"shards": "auto"})


def update(round_index: int = 1, worker: str = "w", **keys: Any) -> Accepted:
    given = {"samples": 100, "steps": 4, "seconds": 10.0, "took_s": 12.0, "metrics": {}, **keys}
    return Accepted(
        round=round_index, shard=0, attempt=1, worker=worker, worker_name=worker, digest=digest(1), bytes_down=0,
        bytes_up=0, **given,
    )  # fmt: skip


def test_a_speed_is_samples_over_training_time_and_moves_a_third_of_the_way() -> None:
    speeds = Speeds()
    speeds.note("j", "digits", JOB, update())
    assert speeds.rate("j", "digits", "w") == 10.0
    speeds.note("j", "digits", JOB, update(2, seconds=5.0, took_s=None))
    measured = speeds.of("j", "w")
    assert measured is not None
    assert measured.rate == pytest.approx(10.0 + ALPHA * 10.0)
    assert (measured.round, measured.updates) == (2, (Took(100, 10.0, 2.0), Took(100, 5.0, None)))


def test_what_was_measured_at_an_ended_job_is_expected_of_the_next_one_of_the_same_work_alone() -> None:
    speeds = Speeds()
    speeds.note("j", "digits", JOB, update())
    speeds.forget("j")
    assert speeds.of("j", "w") is None
    assert speeds.rate("next", "digits", "w") == 10.0
    assert speeds.rate("next", "other", "w") is None
    speeds.note("next", "digits", JOB, update(seconds=5.0))
    assert speeds.rate("next", "digits", "w") == pytest.approx(13.0)


def test_work_is_another_with_another_task_file_batch_size_or_configuration() -> None:
    others = [spec(), spec(train={"batch_size": 7}), spec(config={"width": 3}), spec(task="mnist")]
    assert len({work_of(one, None) for one in others} | {work_of(spec(), "0" * 64)}) == 5
    assert work_of(spec(rounds=9, seed=3, train={"lr": 0.7}), None) == work_of(spec(), None)


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e300, float("nan"), float("inf")])
def test_a_time_that_no_training_takes_says_nothing(seconds: float) -> None:
    speeds = Speeds()
    speeds.note("j", "digits", JOB, update(seconds=seconds, took_s=None))
    assert speeds.of("j", "w") is None


def test_no_training_takes_longer_than_from_hand_out_to_hand_in() -> None:
    assert took_of(JOB.train, update(seconds=99.0)) == Took(100, 12.0, 0.0)


def test_only_the_last_updates_are_kept_one_by_one() -> None:
    speeds = Speeds()
    for number in range(REMEMBERED + 5):
        speeds.note("j", "digits", JOB, update(number))
    measured = speeds.of("j", "w")
    assert measured is not None
    assert len(measured.updates) == REMEMBERED


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0.1, 100.0)), min_size=1, max_size=30))
def test_an_average_stays_between_the_slowest_and_the_fastest_that_was_seen(seen: list[tuple[str, float]]) -> None:
    speeds = Speeds()
    for worker, seconds in seen:
        speeds.note("j", "digits", JOB, update(worker=worker, seconds=seconds, took_s=None))
    for worker in {worker for worker, _ in seen}:
        rates = [100 / seconds for name, seconds in seen if name == worker]
        rate = speeds.rate("j", "digits", worker)
        assert rate is not None
        assert min(rates) * (1 - 1e-9) <= rate <= max(rates) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("train", "steps", "metrics", "samples"),
    [
        ({}, 4, {}, 100),
        ({"local_epochs": 3}, 12, {"train_loss": (1.0, 1.0)}, 300),
        ({"local_steps": 6}, 6, {"train_loss": (1.0, 164.0)}, 164),
        ({"local_steps": 6}, 6, {}, 150),
        ({"local_seconds": 1.0}, 2, {"train_loss": (1.0, float("nan"))}, 50),
        ({"local_seconds": 1.0}, 0, {}, 1),
    ],
)
def test_every_pass_counts(
    train: dict[str, Any], steps: int, metrics: dict[str, tuple[float, float]], samples: int
) -> None:
    assert processed(TrainSection.model_validate(train), 100, steps, metrics) == samples


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({"train": {"local_seconds": 1.0}}, 64),
        ({"train": {"local_seconds": 1.0}, "data": {"partition": "local"}}, 100),
        ({"train": {"local_seconds": 1.0}, "data": {"partition": "labels"}}, 100),
        ({"train": {"local_steps": 2}}, 100),
        ({}, 100),
    ],
)
def test_an_update_weighs_what_was_trained_on_only_where_time_is_set_and_data_is_alike(
    keys: dict[str, Any], weight: int
) -> None:
    assert counted(spec(**keys), 100, 2, {"train_loss": (1.0, 64.0)}) == weight
    assert counted(spec(**keys), 100, 9, {"train_loss": (1.0, 288.0)}) == 100


def test_only_epochs_make_a_time_that_follows_from_the_samples() -> None:
    assert ahead(TrainSection(local_epochs=3), 50) == 150
    assert ahead(TrainSection(), 50) == 50
    assert ahead(TrainSection(local_steps=3), 50) is None
    assert ahead(TrainSection(local_seconds=3), 50) is None
    assert ahead(TrainSection(), None) is None
