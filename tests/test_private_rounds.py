"""Private rounds on real files and through the round machine: what comes out, and that it comes out again."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.codecs import Codec, codec
from common.deltas import encode_update
from common.errors import BadUpdateError
from common.facts import Accepted
from common.messages import JobSpec, ModelRef, PrivacySpent, PrivateRun, PrivateSteps
from common.weights import Array, Notes, file_digest, load, save
from server import accounting, folding, privacy, rounds, versions
from server.accounting import Spent
from server.folding import Rules, Targets
from server.inspection import inspect
from server.optimizers import DiLoCo, FedAvg
from server.privacy import PIECE, Noisy
from tests.rounds_kit import Play, at, digest, spec, training

NOTES = Notes(buffers=("positions",))
SEED = bytes(range(32))
PRIVATE = {"level": "worker", "clip": 2.0, "noise": 1.0, "delta": 1e-3}
BLOCK = 4096


def model(seed: int, scale: float = 1.0) -> dict[str, Array]:
    chance = np.random.default_rng(seed)
    return {
        "w": (scale * chance.normal(size=PIECE + 100)).astype(np.float32),
        "b": (scale * chance.normal(size=7)).astype(np.float16),
        "positions": chance.normal(size=5).astype(np.float32),
        "n": np.array(seed, np.int64),
    }


def write(path: Path, arrays: dict[str, Array]) -> Path:
    save(path, arrays, NOTES)
    return path


def files(folder: Path, count: int = 3) -> tuple[Path, list[tuple[Path, int]]]:
    base = write(folder / "base", model(0))
    return base, [(write(folder / f"u{k}", model(k)), 10 * k) for k in range(1, count + 1)]


def measure(update: Path, base: Path, codec: Codec | None = None) -> float:
    """The norm of an update's change, as it is measured when the update comes."""
    found = inspect(update, base, digest=file_digest(update), norm_bound=None, measured=True, codec=codec)
    assert found.norm is not None
    return found.norm


def noisy_of(base: Path, updates: list[tuple[Path, int]], clip: float = 2.0, **keys: Any) -> Noisy:
    job = JobSpec.model_validate({"task": "digits", "data": {"shards": 4}, "privacy": {**PRIVATE, "clip": clip}})
    norms = [measure(path, base) for path, _ in updates]
    return dataclasses.replace(privacy.noisy(job, clip, norms, SEED, 1), **keys)


# ---------------------------------------------------------------- files


def test_a_private_model_is_the_one_computed_by_hand(tmp_path: Path) -> None:
    base, updates = files(tmp_path)
    noisy = noisy_of(base, updates)
    folding.average(base, updates, Targets(tmp_path / "next"), rules=Rules(FedAvg(), noisy=noisy))
    old, new = load(base), load(tmp_path / "next")
    trained = ("w", "b")
    total = dict.fromkeys(trained, 0.0)
    for path, _ in updates:
        change = {name: load(path)[name].astype(np.float64) - old[name].astype(np.float64) for name in trained}
        norm = np.sqrt(sum(float(np.square(part).sum()) for part in change.values()))
        assert norm > 2.0
        total = {name: total[name] + change[name] * (2.0 / norm) for name in trained}
    for name in trained:
        noise = privacy.gaussian(SEED, 1, name, 0, old[name].size)
        wanted = old[name].astype(np.float64) + (total[name] + 2.0 * noise) / 4.0
        assert np.allclose(new[name], wanted, rtol=2e-3 if name == "b" else 1e-6, atol=1e-6)


def test_what_is_not_trained_stays_as_it_was_built(tmp_path: Path) -> None:
    base, updates = files(tmp_path)
    folding.average(base, updates, Targets(tmp_path / "next"), rules=Rules(FedAvg(), noisy=noisy_of(base, updates)))
    for name in ("positions", "n"):
        assert np.array_equal(load(tmp_path / "next")[name], load(base)[name])


def test_samples_weigh_nothing(tmp_path: Path) -> None:
    base, updates = files(tmp_path)
    rules = Rules(FedAvg(), noisy=noisy_of(base, updates))
    made = folding.average(base, updates, Targets(tmp_path / "a"), rules=rules)
    others = [(path, 1) for path, _ in updates]
    assert folding.average(base, others, Targets(tmp_path / "b"), rules=rules) == made


@pytest.mark.parametrize("step", [FedAvg(), DiLoCo()])
def test_the_bytes_depend_on_no_block_size_and_no_number_of_threads(tmp_path: Path, step: Any) -> None:
    base, updates = files(tmp_path)
    rules = Rules(step, noisy=noisy_of(base, updates))
    states = (tmp_path / "state",) if step.states else ()
    made = {
        folding.average(
            base, updates, Targets(tmp_path / "next", states), rules=rules, block_elements=block, threads=threads
        ).model
        for block, threads in ((1 << 16, 1), (1 << 16, 4), (1000, 3), (70_000, 2))
    }
    assert len(made) == 1


def test_an_empty_sample_is_noise_alone(tmp_path: Path) -> None:
    base, _ = files(tmp_path, 0)
    folding.average(base, [], Targets(tmp_path / "next"), rules=Rules(FedAvg(), noisy=noisy_of(base, [])))
    change = load(tmp_path / "next")["w"].astype(np.float64) - load(base)["w"]
    assert np.allclose(change, privacy.gaussian(SEED, 1, "w", 0, change.size) * 2.0 / 4.0, atol=1e-6)
    with pytest.raises(ValueError, match="0 updates"):
        folding.average(base, [], Targets(tmp_path / "other"), rules=Rules(FedAvg()))


def test_encoded_updates_are_clipped_as_they_are_decoded(tmp_path: Path) -> None:
    base, updates = files(tmp_path, 2)
    int8 = codec("int8")
    encoded = [(tmp_path / f"e{number}", samples) for number, (_, samples) in enumerate(updates)]
    for (whole, _), (target, _) in zip(updates, encoded, strict=True):
        encode_update(base, whole, target, int8)
    norms = [measure(path, base, int8) for path, _ in encoded]
    noisy = Noisy(tuple(1.0 / norm for norm in norms), 0.0, 1.0, SEED, 1)
    step, residual = tmp_path / "step", tmp_path / "residual"
    rules, targets = Rules(FedAvg(), int8, int8, noisy=noisy), Targets(tmp_path / "next", (), step, residual)
    made = folding.average(base, encoded, targets, rules=rules)
    assert folding.average(base, encoded, targets, rules=rules, block_elements=2 * BLOCK, threads=3) == made
    old, new = load(base), load(tmp_path / "next")
    moved = np.sqrt(sum(float(np.square(new[n].astype(np.float64) - old[n]).sum()) for n in ("w", "b")))
    assert abs(moved - 3**0.5) < 0.03  # both of length 1, away from one base to unrelated places: at 60°


# ---------------------------------------------------------------- the machine


def everybody(round_index: int, member: str) -> bool:
    return True


def nobody(round_index: int, member: str) -> bool:
    return False


def told(round_index: int, **keys: Any) -> PrivacySpent:
    fields = {"level": "worker", "epsilon": round_index / 10, "delta": 1e-3, "clip": 2.0, **keys}
    return PrivacySpent.model_validate(fields)


def private(sampled: Any = everybody, *, affordable: int | None = None, **keys: Any) -> Play:
    """A private job whose first round is open."""
    play = Play(spec(**{"privacy": PRIVATE, **keys}))
    play.first = play.first.model_copy(update={"affordable": affordable})
    play.job = rounds.new_job("job-1", play.first)
    play.begin("a", "b")
    play.give(rounds.Task("init", 0), "a")
    play.do(rounds.take_init(play.job, play.made("a"), at("a", "b"), play.now, sampled))
    return play


def close(play: Play, sampled: Any = everybody, number: int = 77, spent: PrivacySpent | None = None) -> rounds.Step:
    model = ModelRef(digest=digest(number), size=100)
    spent = spent or told(play.job.closed + 1)
    return play.do(
        rounds.close(play.job, model, seconds=1.0, places=at("a", "b"), now=play.now, privacy=spent, sampled=sampled)
    )


def train_all(play: Play) -> None:
    phase = play.job.inner
    assert isinstance(phase, rounds.Training)
    for shard in phase.shards:
        play.train(shard, "a")
    play.close_if_due("a", "b")


def test_a_round_has_those_who_were_sampled() -> None:
    play = private(lambda round_index, member: (round_index, member) in {(1, "shard 1"), (2, "shard 0")})
    assert isinstance(play.job.inner, rounds.Training)
    assert list(play.job.inner.shards) == [1]
    assert play.job.reason == "round 1: 1 of 2 shards, sampled at random"
    train_all(play)
    close(play, lambda round_index, member: member == "shard 0")
    assert isinstance(play.job.inner, rounds.Training)
    assert list(play.job.inner.shards) == [0]
    assert play.job == play.replayed()


def test_private_data_are_sampled_by_their_workers() -> None:
    play = private(
        lambda round_index, member: member == "b",
        data={"partition": "local"},
        privacy={**PRIVATE, "population": 2},
    )
    assert isinstance(play.job.inner, rounds.Training)
    assert [shard.worker for shard in play.job.inner.shards.values()] == ["b"]


def test_a_round_of_nobody_is_a_round() -> None:
    play = private(nobody, round={"evaluate_every": 0})
    step = play.close_if_due("a", "b")
    assert "none of 2 was sampled" in step.reason
    assert isinstance(play.job.inner, rounds.Aggregating)
    close(play, nobody)
    closed = next(fact for fact in play.facts if fact.type == "round")
    assert (closed.workers, closed.shards, closed.samples, closed.metrics) == (0, 0, 0, {})
    assert play.job.closed == 1
    assert play.job == play.replayed()


def test_where_nobody_is_there_no_round_is_made_of_noise() -> None:
    play = Play(spec(data={"partition": "local"}, privacy={**PRIVATE, "population": 2}))
    play.begin("a")
    play.give(rounds.Task("init", 0), "a")
    play.do(rounds.take_init(play.job, play.made("a"), [], play.now, everybody))
    assert play.close_if_due().facts == ()
    assert "no live worker offers data" in play.close_if_due().reason


def test_a_job_ends_before_the_round_that_would_pass_its_budget() -> None:
    play = private(affordable=1, rounds=5, privacy={**PRIVATE, "budget": 0.15}, round={"evaluate_every": 0})
    train_all(play)
    step = close(play)
    assert play.job.phase.state == "evaluating", "the last model is measured, though no round 5 comes"
    assert step.reason.startswith("1 of 5 rounds done: one more would pass the privacy budget of ε 0.15;")
    play.evaluate(1)
    assert play.job.phase.state == "finished"
    assert "one more would pass the privacy budget" in play.job.reason
    assert play.job.spent == told(1)


def test_a_clip_that_moves_is_that_of_the_round_before() -> None:
    play = private(privacy={**PRIVATE, "adaptive": True, "noise": 0.1, "clip": None})
    assert versions.clip_of(play.job) == 0.1
    train_all(play)
    close(play, spent=told(1, next_clip=0.125))
    assert versions.clip_of(play.job) == 0.125
    said = accounting.worker_level(play.job, Spent(1.0, 2.0), 0.2)
    assert (said.epsilon, said.epsilon_rdp, said.clip, said.next_clip) == (1.0, 2.0, 0.125, 0.2)


# ---------------------------------------------------------------- example level


def run(epsilon: float, rate: float = 0.1, steps: int = 5) -> PrivateRun:
    return PrivateRun(sample_rate=rate, noise=1.0, steps=steps, epsilon=epsilon, delta=1e-5)


def example(*runs: PrivateRun | None) -> Play:
    """A job with example-level privacy whose first round is frozen, with these for its updates."""
    play = training(data={"shards": len(runs)}, privacy={"level": "example", "clip": 1.0, "noise": 1.0, "delta": 1e-5})
    for shard, private_run in enumerate(runs):
        play.give(rounds.Task("train", 1, shard), "a")
        update = play.update(shard, "a").model_copy(update={"private": private_run})
        play.do(rounds.take_update(play.job, update))
    play.close_if_due("a")
    return play


def test_epsilon_is_the_worst_of_the_workers_and_never_falls() -> None:
    play = example(run(1.5), run(2.5))
    assert isinstance(play.job.inner, rounds.Aggregating)
    said = accounting.example_level(play.job, play.job.inner)
    assert said is not None
    assert (said.epsilon, said.delta, said.clip) == (2.5, 1e-5, 1.0)
    later = dataclasses.replace(play.job, spent=told(90))
    again = accounting.example_level(later, play.job.inner)
    assert again is not None
    assert again.epsilon == 9.0


def test_a_round_without_privacy_tells_of_none() -> None:
    play = training()
    for shard in (0, 1):
        play.train(shard, "a")
    play.close_if_due("a")
    assert isinstance(play.job.inner, rounds.Aggregating)
    assert accounting.example_level(play.job, play.job.inner) is None
    assert rounds.private_before(play.job) == ()


def test_the_next_round_counts_on_from_the_worst_off_sample() -> None:
    play = example(run(1.0, rate=0.1, steps=7), run(2.0, rate=0.3, steps=5))
    close(play, None, spent=told(1, level="example"))
    worst = PrivateSteps(sample_rate=0.3, noise=1.0, steps=7)
    assert play.job.private_before == (worst,)
    for shard in (0, 1):
        play.give(rounds.Task("train", 2, shard), "a")
        update = play.update(shard, "a").model_copy(update={"private": run(3.0, rate=0.3, steps=7)})
        play.do(rounds.take_update(play.job, update))
    play.close_if_due("a")
    assert rounds.private_before(play.job) == (worst.model_copy(update={"steps": 14}),)


@given(st.lists(st.tuples(st.floats(0.01, 1), st.integers(1, 9)), min_size=1, max_size=5))
def test_no_sample_was_through_more_than_is_counted(runs: list[tuple[float, int]]) -> None:
    play = example(*(run(1.0, rate, steps) for rate, steps in runs))
    (counted,) = rounds.private_before(play.job)
    assert all(counted.sample_rate >= rate and counted.steps >= steps for rate, steps in runs)


def test_an_update_whose_norm_nobody_measured_joins_no_private_round() -> None:
    update = Accepted.model_construct(shard=3, norm=None)
    with pytest.raises(BadUpdateError, match="shard 3 was taken without its norm being measured"):
        versions.norm_of(update)
    assert versions.norm_of(Accepted.model_construct(shard=3, norm=0.5)) == 0.5


def test_equal_files_have_equal_norms(tmp_path: Path) -> None:
    base, updates = files(tmp_path, 1)
    copy = write(tmp_path / "copy", model(1))
    assert file_digest(copy) == file_digest(updates[0][0])
    assert measure(copy, base) == measure(updates[0][0], base)
