"""What `lydian simulate` and its processes decide: pure."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.simulate import Wish, job_of, workers_each
from common.errors import LydianError
from common.messages import Assignment, JobSpec, ModelRef, TaskRef
from common.sharding import cohort
from worker.simulation.claims import Claim, groups


def claim(worker: int, shard: int, *, round_index: int = 1, kind: str = "train", job: str = "j") -> Claim:
    assignment = Assignment.model_validate(
        {
            "id": f"{job}.{kind}.{round_index}.{shard}",
            "attempt": 1,
            "job": job,
            "kind": kind,
            "round": round_index,
            "shard": shard,
            "shards": 10,
            "task": TaskRef(name="digits"),
            "spec": JobSpec(task="digits"),
            "base": ModelRef(digest="0" * 64, size=1),
            "ttl_s": 40.0,
            "max_bytes": 10,
        }
    )
    return Claim(worker, assignment)


def wish(what: str = "digits", *settings: str, clients: int = 50, fraction: float | None = None) -> Wish:
    return Wish(
        what=what, clients=clients, fraction=fraction, rounds=None, seed=None, settings=settings, processes=2,
        at_once=64, device="cpu", threads=1, stack="auto", data=(), lease_s=20, state_dir=None, output=None,
    )  # fmt: skip


def test_shards_of_a_round_go_together_by_number_and_before_an_evaluation() -> None:
    claims = [claim(0, 0, kind="evaluate"), claim(1, 7), claim(2, 3), claim(3, 5, round_index=2), claim(4, 1, job="k")]
    found = [[one.assignment.id for one in group] for group in groups(claims)]
    assert found == [["j.train.1.3", "j.train.1.7"], ["j.train.2.5"], ["k.train.1.1"], ["j.evaluate.1.0"]]


@given(st.permutations(range(6)))
def test_the_same_shards_make_the_same_group_whoever_holds_them(shards: list[int]) -> None:
    found = groups([claim(worker, shard) for worker, shard in enumerate(shards)])
    assert [[one.assignment.shard for one in group] for group in found] == [list(range(6))]


@given(st.integers(1, 5000), st.floats(0.001, 1.0), st.integers(1, 16))
def test_the_processes_together_can_take_a_whole_round(clients: int, fraction: float, processes: int) -> None:
    each = workers_each(clients, fraction, processes, most=10_000)
    chosen = len(cohort(clients, fraction, seed=0, round_index=1))
    assert each * processes >= chosen > (each - 1) * processes


def test_clients_are_the_shards_and_a_tenth_of_them_trains_unless_it_is_said() -> None:
    assert (job_of(wish()).spec.data.shards, job_of(wish()).spec.data.fraction) == (50, 0.1)
    assert job_of(wish(fraction=0.5)).spec.data.fraction == 0.5
    assert job_of(wish("digits", "data.fraction=0.2")).spec.data.fraction == 0.2


@pytest.mark.parametrize("setting", ["data.partition=local", "data.shards=3"])
def test_a_simulation_of_other_clients_than_it_was_told_is_refused(setting: str) -> None:
    with pytest.raises(LydianError, match="clients are shards"):
        job_of(wish("digits", setting))


def test_a_simulation_has_no_test_data_of_each_worker() -> None:
    with pytest.raises(LydianError, match="no test data of their own"):
        job_of(wish("digits", "evaluation.scope=workers"))
