"""FedNova: what steps add up to, what an update weighs, and what is refused."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.codecs import CODECS, codec
from common.deltas import apply_step, encode_update
from common.errors import BadUpdateError
from common.messages import JobSpec, TrainSection
from common.tasks import BUILTIN
from common.weights import Notes, load, save
from server import folding, nova, rounds
from server.folding import Rules, Targets
from server.optimizers import FedAvg, FedNova
from server.rounds import Task
from tests.rounds_kit import submission, training

TRAINED = st.one_of(
    st.just(TrainSection()),
    st.floats(0.01, 0.99).map(lambda momentum: TrainSection(momentum=momentum)),
    st.floats(0.001, 0.99).map(lambda proximal: TrainSection(lr=1.0, proximal=proximal)),
)
UPDATES = st.lists(st.tuples(st.integers(1, 10_000), st.integers(1, 500)), min_size=1, max_size=6)


def descended(train: TrainSection, steps: int) -> float:
    """How far SGD goes by gradients that are all 1, in learning rates: the sum of what each of them counts."""
    alpha, gone, velocity = train.lr * getattr(train, "proximal", 0.0), 0.0, 0.0
    for _ in range(steps):
        velocity = train.momentum * velocity + 1 - alpha * gone
        gone += velocity
    return gone


# ---------------------------------------------------------------- what an update weighs


@given(TRAINED, st.integers(1, 200))
def test_steps_add_up_to_how_far_they_go_by_equal_gradients(train: TrainSection, steps: int) -> None:
    assert nova.steps_of(train, steps) == pytest.approx(descended(train, steps), rel=1e-9)


def test_the_formulas_of_the_paper_by_hand() -> None:
    assert nova.steps_of(TrainSection(), 7) == 7
    assert nova.steps_of(TrainSection(momentum=0.5), 3) == pytest.approx((3 - 0.5 * 0.875 / 0.5) / 0.5)
    assert nova.steps_of(TrainSection(lr=0.1, proximal=5.0), 2) == pytest.approx((1 - 0.25) / 0.5)
    assert nova.steps_of(TrainSection(lr=0.1, proximal=1e-12), 1000) == pytest.approx(1000)


@given(TRAINED, UPDATES, st.integers(1, 500))
def test_updates_of_equal_steps_weigh_their_samples_exactly(
    train: TrainSection, updates: list[tuple[int, int]], steps: int
) -> None:
    found = nova.weigh(train, [(samples, steps) for samples, _ in updates])
    assert found == nova.Weighing(tuple(float(samples) for samples, _ in updates), 1.0)


@given(TRAINED, UPDATES, st.integers(0, 1000))
def test_mean_and_scale_are_the_papers_sum_of_normalised_changes(
    train: TrainSection, updates: list[tuple[int, int]], seed: int
) -> None:
    changes = np.random.default_rng(seed).normal(size=len(updates))
    found = nova.weigh(train, updates)
    lengths = [nova.steps_of(train, steps) for _, steps in updates]
    total = sum(samples for samples, _ in updates)
    shares = [samples / total for samples, _ in updates]
    effective = sum(share * length for share, length in zip(shares, lengths, strict=True))
    wanted = effective * sum(
        share * change / length for share, change, length in zip(shares, changes, lengths, strict=True)
    )
    mean = sum(weight * change for weight, change in zip(found.weights, changes, strict=True)) / sum(found.weights)
    assert found.scale * mean == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert found.scale >= 1 - 1e-12


# ---------------------------------------------------------------- in the average


@pytest.fixture
def base(tmp_path: Path) -> Path:
    arrays = {"w": np.zeros(9, np.float32), "mean": np.zeros(2, np.float32), "n": np.array(0)}
    save(tmp_path / "base", arrays, Notes(buffers=("mean",)))
    return tmp_path / "base"


def trained(base: Path, name: str, change: float) -> Path:
    arrays = {"w": np.full(9, change, np.float32), "mean": np.full(2, change, np.float32), "n": np.array(3)}
    save(base.parent / name, arrays, Notes(buffers=("mean",)))
    return base.parent / name


def test_the_next_model_is_that_of_the_paper_and_buffers_are_joined_by_samples(base: Path, tmp_path: Path) -> None:
    """One worker of 3 samples goes 1 in one step, one of 1 sample goes 8 in four: the change is 1.75 · 1.25."""
    updates = [(trained(base, "a", 1.0), 3), (trained(base, "b", 8.0), 1)]
    found = nova.weigh(TrainSection(), [(3, 1), (1, 4)])
    rules = Rules(FedNova(found.scale))
    made = folding.average(base, updates, Targets(tmp_path / "next"), rules=rules, weights=found.weights)
    next_model = load(tmp_path / "next")
    assert np.allclose(next_model["w"], 1.75 * (0.75 * 1 + 0.25 * 8 / 4), rtol=1e-6)
    assert np.allclose(next_model["mean"], (3 * 1 + 8) / 4)
    assert next_model["n"] == 3
    assert made.amplification == pytest.approx(found.scale)


@pytest.mark.parametrize("name", CODECS)
def test_encoded_and_late_updates_are_weighed_alike(base: Path, tmp_path: Path, name: str) -> None:
    files = []
    for number, change in enumerate([1.0, 8.0, 4.0]):
        encode_update(base, trained(base, f"t{number}", change), tmp_path / f"u{number}", codec(name))
        files.append(tmp_path / f"u{number}")
    found = nova.weigh(TrainSection(), [(3, 1), (1, 4), (2, 2)])
    rules = Rules(FedNova(found.scale), codec(name))
    late = [(files[2], 2, 0.5)]
    folding.average(
        base, [(files[0], 3), (files[1], 1)], Targets(tmp_path / "n"), rules=rules, late=late, weights=found.weights
    )
    said = []
    for file in files:
        apply_step(base, file, tmp_path / "whole", codec(name))
        said.append(load(tmp_path / "whole")["w"].astype(np.float64))
    tau = (3 * 1 + 1 * 4 + 2 * 2) / 6
    wanted = tau * (3 * said[0] / 1 + 1 * said[1] / 4 + 2 * 0.5 * said[2] / 2) / 6
    assert np.allclose(load(tmp_path / "n")["w"], wanted, rtol=1e-6)


def test_equal_steps_give_the_bytes_of_fedavg(base: Path, tmp_path: Path) -> None:
    updates = [(trained(base, "a", 0.1), 3), (trained(base, "b", 0.7), 5)]
    found = nova.weigh(TrainSection(momentum=0.9), [(3, 6), (5, 6)])
    rules = Rules(FedNova(found.scale))
    one = folding.average(base, updates, Targets(tmp_path / "nova"), rules=rules, weights=found.weights)
    assert one == folding.average(base, updates, Targets(tmp_path / "avg"), rules=Rules(FedAvg()))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"optimizer": "adamw"}, "train.optimizer = adamw divides"),
        ({"batch_size": "auto"}, "train.batch_size = auto gives"),
        ({"keep_optimizer": True, "momentum": 0.9}, "train.keep_optimizer begins"),
    ],
)
def test_a_job_whose_steps_do_not_add_up_is_refused_for_fednova_alone(keys: dict[str, Any], why: str) -> None:
    JobSpec.model_validate({"task": "digits", "train": keys})
    with pytest.raises(ValidationError, match=f"fednova weighs updates by .* {why}.*or use fedavg"):
        JobSpec.model_validate({"task": "digits", "train": keys, "aggregation": {"algorithm": "fednova"}})


def test_what_adds_up_is_taken() -> None:
    for keys in ({"momentum": 0.9, "weight_decay": 0.1}, {"keep_optimizer": True}, {"clip": 1.0}):
        JobSpec.model_validate({"task": "digits", "train": keys, "aggregation": {"algorithm": "fednova"}})


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 3), st.booleans())
def test_a_number_of_steps_that_a_worker_takes_is_never_refused(n: int, batch: int, passes: int, joins: bool) -> None:
    ends = [*range(batch, n, batch), n]  # as worker/task_host.py has it
    if joins and len(ends) > 1 and ends[-1] - ends[-2] == 1 and batch > 1:
        del ends[-2]
    nova.check_steps(TrainSection(local_epochs=passes, batch_size=batch), n, passes * len(ends))


@pytest.mark.parametrize(
    ("train", "steps", "possible"),
    [
        ({"local_steps": 20}, 19, "20"),
        ({"local_steps": 20}, 21, "20"),
        ({"batch_size": 32}, 1, "3 to 4"),
        ({"batch_size": 32, "local_epochs": 2}, 9, "6 to 8"),
        ({"batch_size": 50}, 1, "2"),
        ({"local_seconds": 3.0}, 0, "at least 1"),
        ({}, 0, "3 to 4"),
    ],
)
def test_steps_that_cannot_have_been_are_refused(train: dict[str, Any], steps: int, possible: str) -> None:
    with pytest.raises(BadUpdateError, match=f"{steps} steps on 100 samples, where {possible} are possible") as caught:
        nova.check_steps(TrainSection.model_validate(train), 100, steps)
    assert caught.value.code == "bad_steps"


def test_any_number_of_seconds_has_any_number_of_steps() -> None:
    nova.check_steps(TrainSection(local_seconds=1.0), 100, 10**9)


@pytest.mark.parametrize(("algorithm", "refused"), [("fednova", True), ("fedavg", False)])
def test_claimed_steps_are_judged_where_they_weigh(algorithm: str, refused: bool) -> None:
    play = training(aggregation={"algorithm": algorithm}, train={"local_steps": 2})
    task = Task("train", 1, 0)
    play.give(task, "a")
    claimed = submission(play.update(0, "a")).model_copy(update={"steps": 1})
    if refused:
        with pytest.raises(BadUpdateError, match="1 steps"):
            rounds.judge(play.job, task, claimed, "a")
    else:
        assert rounds.judge(play.job, task, claimed, "a") is None


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def model(config): ...\ndef optimizer(model, config): ...", "optimizer"),
        ("async  def train(model): ...", "train"),
        ("optimizer = sgd", "optimizer"),
        ("class A:\n    def train(self): ...", ""),
        ("def optimizers(): ...\ntraining = 1\ntrain == 2", ""),
    ],
)
def test_a_loop_or_optimiser_of_the_tasks_own_is_seen_in_its_text(source: str, name: str) -> None:
    spec = JobSpec.model_validate({"task": "mine", "aggregation": {"algorithm": "fednova"}})
    found = nova.why_not(spec, lambda: source)
    assert (f"the task mine has {name}() of its own" in found) if name else found == ""
    assert nova.why_not(JobSpec(task="mine"), lambda: source) == ""


def test_of_the_built_in_tasks_the_text_model_alone_has_an_optimiser_of_its_own() -> None:
    spec = JobSpec.model_validate({"task": "any", "aggregation": {"algorithm": "fednova"}})
    refused = [name for name, task in BUILTIN.items() if nova.why_not(spec, partial(task.file.read_text, "utf-8"))]
    assert refused == ["char-lm"]


def test_a_proximal_term_is_refused_beside_momentum_and_where_it_overshoots() -> None:
    def job(**train: float) -> JobSpec:
        return JobSpec.model_validate({"task": "digits", "train": train, "aggregation": {"algorithm": "fednova"}})

    for train, why in (({"momentum": 0.5, "proximal": 0.1}, "no such sum"), ({"lr": 0.5, "proximal": 2}, "= 2 is so")):
        with pytest.raises(ValidationError, match=why):
            job(**train)
    assert not math.isnan(nova.steps_of(job(lr=0.5, proximal=0.1).train, 10))
