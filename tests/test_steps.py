"""Whole jobs of every algorithm on real files: in any order of arrival, encoded or not, broken off or not."""

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.codecs import codec
from common.deltas import encode_update
from common.errors import BadUpdateError
from common.facts import RoundClosed
from common.weights import Array, Notes, file_digest, load, save
from server import folding, rounds, versions
from server.blobs import Blobs
from server.folding import Memory, Rules, Targets
from server.optimizers import STEPS, FedAvgM, FedYogi, outer_step
from server.rounds import Aggregating, Task
from server.versions import Version
from tests.rounds_kit import Play, at, spec

SHARDS = 5
NOTES = Notes(buffers=("mean", "var", "mask"), variances={"var": "mean"})
every_algorithm = pytest.mark.parametrize("algorithm", STEPS)


def model(seed: int) -> dict[str, Array]:
    """Trained tensors of two dtypes, and buffers of every kind."""
    chance = np.random.default_rng(seed)
    return {
        "w": chance.normal(size=(7, 3)).astype(np.float32),
        "half": chance.normal(size=11).astype(ml_dtypes.bfloat16),
        "mean": chance.normal(size=5).astype(np.float32),
        "var": chance.uniform(0.5, 2, size=5).astype(np.float32),
        "n": np.array(seed, np.int64),
        "mask": chance.integers(0, 2, size=4).astype(np.bool_),
    }


class Course:
    """A job with real files: rounds of five updates that arrive in a given order, averaged as the coordinator does."""

    def __init__(self, folder: Path, **aggregation: Any) -> None:
        self.blobs, self.folder = Blobs(folder / "state", reserve_bytes=0), folder
        keys = {"rounds": 9, "data": {"shards": SHARDS}, "train": {"momentum": 0.5}, "aggregation": aggregation}
        self.play = Play(spec(**keys))
        self.play.begin("a")
        self.play.give(Task("init", 0), "a")
        save(folder / "first", model(0), NOTES)
        size = (folder / "first").stat().st_size
        made = self.play.made("a", total=50).model_copy(update={"digest": self._keep(folder / "first"), "size": size})
        self.play.do(rounds.take_init(self.play.job, made, at("a"), 0.0))

    def _keep(self, file: Path) -> str:
        digest = file_digest(file)
        self.blobs.adopt(file, digest, durable=False)
        return digest

    def _update(self, shard: int) -> str:
        """What training on a shard gives: of the round, the shard and the model alone."""
        job, trained = self.play.job, self.folder / "trained"
        assert job.model is not None
        base = self.blobs.path(job.model.digest)
        old, drift = load(base), model(100 * job.closed + shard + 1)
        near = {name: (old[name] + 0.1 * drift[name]).astype(old[name].dtype) for name in ("w", "half")}
        save(trained, {**drift, **near}, NOTES)
        if job.spec.aggregation.update == "fp32":
            return self._keep(trained)
        encode_update(base, trained, self.folder / "encoded", codec(job.spec.aggregation.update))
        return self._keep(self.folder / "encoded")

    def arrive(self, order: Sequence[int]) -> Aggregating:
        """Every shard's update comes, in this order, and the round is frozen."""
        for shard in order:
            update = self.play.update(shard, "a", samples=shard + 3)
            given = {"digest": self._update(shard), "steps": 2 * shard + 1}
            self.play.do(rounds.take_update(self.play.job, update.model_copy(update=given)))
        self.play.close_if_due("a")
        assert isinstance(self.play.job.phase, Aggregating)
        return self.play.job.phase

    def make(self) -> Version:
        assert isinstance(self.play.job.phase, Aggregating)
        return versions.make(self.play.job, self.play.job.phase, self.blobs, lambda: False)

    def close(self, made: Version) -> None:
        step = rounds.close(
            self.play.job, made.model, step=made.step, memory=made.memory, amplified=made.amplification,
            seconds=1.0, places=at("a"), now=0.0,
        )  # fmt: skip
        self.play.do(step)

    def run(self, *orders: Sequence[int]) -> list[Version]:
        found = []
        for order in orders:
            self.arrive(order)
            found.append(self.make())
            self.close(found[-1])
        return found


@contextmanager
def course(**aggregation: Any) -> Iterator[Course]:
    with TemporaryDirectory() as name:
        yield Course(Path(name), **aggregation)


IN_ORDER = range(SHARDS)


@pytest.fixture(scope="module", autouse=True)
def _no_disk_is_waited_for() -> Iterator[None]:
    """What is tested here are bytes: whether they are durable is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@functools.cache
def in_order(algorithm: str, update: str) -> list[Version]:
    with course(algorithm=algorithm, update=update) as one:
        return one.run(IN_ORDER, IN_ORDER)


@every_algorithm
@pytest.mark.parametrize("update", ["fp32", "int8"])
@given(orders=st.lists(st.permutations(IN_ORDER), min_size=2, max_size=2))
@settings(max_examples=5, suppress_health_check=[HealthCheck.differing_executors])
def test_the_order_of_arrival_changes_no_byte_of_model_memory_or_step(
    algorithm: str, update: str, orders: list[list[int]]
) -> None:
    with course(algorithm=algorithm, update=update) as one:
        assert one.run(*orders) == in_order(algorithm, update)


@every_algorithm
@pytest.mark.parametrize("update", ["fp32", "topk"])
def test_a_round_that_is_averaged_again_after_a_crash_gives_the_same_bytes(
    tmp_path: Path, algorithm: str, update: str
) -> None:
    """Files written and not yet in the journal; then the journal is all that is left of the state."""
    some = Course(tmp_path, algorithm=algorithm, update=update)
    (first,) = some.run(IN_ORDER)
    assert len(first.memory) == outer_step(some.play.job.spec.aggregation).states + (update != "fp32")
    some.arrive(IN_ORDER)
    lost = some.make()
    some.play.job = some.play.replayed()
    some.blobs = Blobs(tmp_path / "state", reserve_bytes=0)
    again = some.make()
    assert again == lost
    some.close(again)
    closed = [fact for fact in some.play.facts if isinstance(fact, RoundClosed)]
    assert [(fact.digest, fact.memory) for fact in closed] == [(m.model.digest, m.memory) for m in (first, again)]


@every_algorithm
def test_every_block_and_thread_gives_the_same_bytes_of_model_and_states(tmp_path: Path, algorithm: str) -> None:
    save(tmp_path / "base", model(0), NOTES)
    save(tmp_path / "update", model(1), NOTES)
    step = STEPS[algorithm]()
    found = set()
    for number, (block, threads) in enumerate([(1 << 16, 1), (4, 3), (5, 2)]):
        states = tuple(tmp_path / f"s{number}.{state}" for state in range(step.states))
        made = folding.average(
            tmp_path / "base", [(tmp_path / "update", 1)], Targets(tmp_path / f"n{number}", states),
            rules=Rules(step), block_elements=block, threads=threads,
        )  # fmt: skip
        found.add((made.model, made.states))
    assert len(found) == 1


def test_the_amplification_is_of_trained_tensors_and_counts_every_block(tmp_path: Path) -> None:
    base, update = {**model(0)}, {**model(1)}
    save(tmp_path / "base", base, NOTES)
    save(tmp_path / "update", update, NOTES)

    def made(step: Any, block: int = 4) -> folding.Averaged:
        targets = Targets(tmp_path / "next", tuple(tmp_path / f"s{n}" for n in range(step.states)))
        return folding.average(
            tmp_path / "base", [(tmp_path / "update", 1)], targets, rules=Rules(step), block_elements=block
        )

    assert made(FedAvgM(0.5, 0.9)).amplification == pytest.approx(0.5)
    changes = np.concatenate(
        [(update[k].astype(np.float64) - base[k].astype(np.float64)).ravel() for k in ("w", "half")]
    )
    moved = 0.01 * 0.1 * changes / (np.sqrt(0.01) * np.abs(changes) + 1e-3)
    found = made(FedYogi(), 1 << 16).amplification
    assert found == pytest.approx(float(np.linalg.norm(moved) / np.linalg.norm(changes)))
    save(tmp_path / "update", base, NOTES)
    assert made(FedAvgM()).amplification is None


def test_a_memory_that_float32_cannot_hold_is_refused_by_the_tensors_name(tmp_path: Path) -> None:
    save(tmp_path / "base", {"w": np.zeros(3)}, Notes())
    save(tmp_path / "update", {"w": np.array([1.0, 1e200, 1.0])}, Notes())
    targets = Targets(tmp_path / "next", (tmp_path / "m", tmp_path / "v"))
    with pytest.raises(BadUpdateError, match="remembers of 'w' at element 1 is beyond what float32 can hold") as caught:
        folding.average(tmp_path / "base", [(tmp_path / "update", 1)], targets, rules=Rules(FedYogi()), memory=Memory())
    assert caught.value.code == "not_finite"
    assert not list(tmp_path.glob("[nmv]*"))
