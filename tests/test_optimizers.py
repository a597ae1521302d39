"""Outer steps."""

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from common.errors import BadJobError
from common.facts import FACT, Submitted
from common.messages import OUTER_KEYS, AggregationSection, JobSpec
from server.optimizers import (
    STEPS,
    DiLoCo,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedNova,
    FedYogi,
    OuterStep,
    outer_step,
)

BLOCKS = hnp.arrays(np.float64, 4, elements=st.floats(-1e300, 1e300))


@given(BLOCKS, BLOCKS)
def test_fedavg_is_the_mean_bit_by_bit_wherever_it_began(base: np.ndarray, mean: np.ndarray) -> None:
    assert FedAvg().apply(base, mean.copy(), ()).tobytes() == mean.tobytes()


def test_every_algorithm_that_a_job_may_name_has_a_step_and_its_keys_are_the_fields_of_it() -> None:
    names = AggregationSection.model_json_schema()["properties"]["algorithm"]["enum"]
    assert names == list(STEPS) == list(OUTER_KEYS)
    steps = {name: outer_step(AggregationSection(algorithm=name)) for name in names}
    assert isinstance(outer_step(AggregationSection()), FedAvg)
    for name, step in steps.items():
        keys = {f"outer_{field.name}" for field in dataclasses.fields(step)}  # type: ignore[arg-type]
        assert keys - {"outer_scale"} == set(OUTER_KEYS[name])  # the scale of fednova is of a round, and no key


def test_the_rates_are_those_of_the_papers_unless_the_job_says_others() -> None:
    found = {name: outer_step(AggregationSection(algorithm=name)) for name in STEPS}
    assert found["fedavgm"] == FedAvgM(lr=1.0, momentum=0.9)
    assert found["fedadagrad"] == FedAdagrad(lr=0.1, beta1=0.0, tau=1e-3)
    assert found["fedadam"] == FedAdam(lr=0.1, beta1=0.9, beta2=0.99, tau=1e-3)
    assert found["fedyogi"] == FedYogi(lr=0.01, beta1=0.9, beta2=0.99, tau=1e-3)
    given = AggregationSection(algorithm="fedyogi", outer_lr=1, outer_beta1=0, outer_beta2=0.5, outer_tau=2)
    assert outer_step(given) == FedYogi(1, 0, 0.5, 2)


@pytest.mark.parametrize("name", OUTER_KEYS)
def test_a_key_that_the_step_has_no_use_for_is_refused_and_the_others_are_taken(name: str) -> None:
    for key in sorted({key for keys in OUTER_KEYS.values() for key in keys}):
        section = {"algorithm": name, key: 0.5}
        if key in OUTER_KEYS[name]:
            assert getattr(AggregationSection.model_validate(section), key) == 0.5
            continue
        with pytest.raises(
            ValidationError, match=f"{key} = 0.5 is of no use to {name}, which .*: leave it out, or set"
        ):
            AggregationSection.model_validate(section)


def test_a_job_of_an_older_journal_that_set_such_a_key_is_read_as_it_was_trained() -> None:
    spec = {"task": "digits", "aggregation": {"outer_lr": 0.7, "outer_momentum": 0.9, "update": "int8"}}
    fact = FACT.validate_json(json.dumps({"type": "submitted", "key": "k", "spec": spec}))
    assert isinstance(fact, Submitted)
    assert fact.spec == JobSpec.model_validate({"task": "digits", "aggregation": {"update": "int8"}})
    assert FACT.validate_json(fact.model_dump_json()) == fact


@pytest.mark.parametrize("name", ["", "fedprox", "FedAvg", "__class__"])
def test_an_unknown_algorithm_is_refused_and_the_known_ones_are_named(name: str) -> None:
    with pytest.raises(BadJobError) as caught:
        outer_step(AggregationSection.model_construct(algorithm=name))
    assert repr(name) in str(caught.value)
    assert "fedavg" in caught.value.advice


def test_diloco_takes_the_rates_of_its_paper_unless_the_job_says_others() -> None:
    assert outer_step(AggregationSection(algorithm="diloco")) == DiLoCo(lr=0.7, momentum=0.9)
    given = AggregationSection(algorithm="diloco", outer_lr=1.0, outer_momentum=0.0)
    assert outer_step(given) == DiLoCo(lr=1.0, momentum=0.0)


def walk(step: OuterStep, changes: list[np.ndarray], x: np.ndarray) -> list[np.ndarray]:
    """The models after each round, in which the workers' mean lies one of `changes` away."""
    states, models = [np.zeros(x.size) for _ in range(step.states)], [x]
    for change in changes:
        base = models[-1]
        models.append(step.apply(base.copy(), base + change, states).copy())
    return models[1:]


@pytest.mark.parametrize(
    ("step", "changes", "models"),
    [
        # m = 1, 0.5, -1.75
        (FedAvgM(1.0, 0.5), [1, 0, -2], [1, 1.5, -0.25]),
        (FedAvgM(0.5, 0.5), [1, 0, -2], [0.5, 0.75, -0.125]),
        # v = 9, 25, 25; m = 3, 4, 0
        (FedAdagrad(1.0, 0.0, 1.0), [3, 4, 0], [3 / 4, 3 / 4 + 4 / 6, 3 / 4 + 4 / 6]),
        # m = 1.5, 2.75, 1.375
        (FedAdagrad(1.0, 0.5, 1.0), [3, 4, 0], [1.5 / 4, 1.5 / 4 + 2.75 / 6, 1.5 / 4 + 4.125 / 6]),
        # m = 1, 0.5, -0.75; v = 1, 0.75, 1.5625
        (FedAdam(1.0, 0.5, 0.75, 1.0), [2, 0, -2], [0.5, 0.7679491924, 0.4346158591]),
        # v = 1, 1 (the change is 0), 1 (v is its square, and sign(0) is 0), 0.9375; m = 1, 0.5, 0.75, 0.625
        (FedYogi(1.0, 0.5, 0.75, 1.0), [2, 0, 1, 0.5], [0.5, 0.75, 1.125, 1.125 + 0.625 / (1 + 0.9375**0.5)]),
        # b = 1, 0.5, -1.75, as changes
        (DiLoCo(1.0, 0.5), [1, 0, -2], [1.5, 1.75, -1.125]),
        (FedNova(1.5), [1, 0, -2], [1.5, 1.5, -1.5]),
    ],
)
def test_every_rule_comes_to_what_was_computed_by_hand(
    step: OuterStep, changes: list[float], models: list[float]
) -> None:
    found = walk(step, [np.array([change], np.float64) for change in changes], np.zeros(1))
    assert np.allclose(np.concatenate(found), models, rtol=0, atol=1e-9)


RATES = st.floats(0.01, 2)
MOMENTA = st.floats(0, 0.99)


@given(st.integers(0, 10_000), RATES, MOMENTA, st.integers(1, 6), st.booleans())
def test_momentum_of_both_kinds_is_torchs_over_the_pseudo_gradient(
    seed: int, lr: float, momentum: float, n: int, nesterov: bool
) -> None:
    chance = np.random.default_rng(seed)
    begin, changes = chance.normal(size=7), [chance.normal(size=7) for _ in range(n)]
    parameter = torch.nn.Parameter(torch.tensor(begin))
    nesterov = nesterov and momentum > 0  # torch has no other
    theirs = torch.optim.SGD([parameter], lr=lr, momentum=momentum, nesterov=nesterov)
    for change, model in zip(
        changes, walk((DiLoCo if nesterov else FedAvgM)(lr, momentum), changes, begin), strict=True
    ):
        parameter.grad = torch.tensor(-change)
        theirs.step()
        assert np.allclose(model, parameter.detach().numpy(), rtol=1e-9, atol=1e-9)


@given(BLOCKS, st.floats(1e-6, 1e3))
def test_the_first_step_of_fedadam_is_not_corrected_for_its_empty_past(begin: np.ndarray, change: float) -> None:
    begin = begin / 1e300
    (found,) = walk(FedAdam(0.1, 0.9, 0.99, 1e-3), [np.full(4, change)], begin)
    true = (begin + change) - begin  # what is left of it beside the model
    assert np.allclose(found - begin, 0.1 * 0.1 * true / (0.1 * np.abs(true) + 1e-3), rtol=1e-6, atol=1e-12)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.floats(0, 0.999))
def test_what_fedyogi_remembers_of_squares_never_falls_below_zero(changes: list[float], beta2: float) -> None:
    step, states = FedYogi(beta2=beta2), [np.zeros(1), np.zeros(1)]
    for change in changes:
        step.apply(np.zeros(1), np.array([change]), states)
        states = [state.astype(np.float32).astype(np.float64) for state in states]  # as it is kept
        assert states[1][0] >= 0


@given(BLOCKS, BLOCKS)
def test_fednova_of_equal_steps_is_fedavg_bit_by_bit(base: np.ndarray, mean: np.ndarray) -> None:
    assert not FedNova().wants_base
    assert FedNova().apply(base, mean.copy(), ()).tobytes() == mean.tobytes()


def test_the_example_of_a_step_of_ones_own_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).parents[1] / "examples" / "extending" / "sign_momentum.py"
    step = runpy.run_path(str(file))["SignMomentum"](lr=0.5, momentum=0.5)
    changes = [np.array([2.0, -1.0, 0.0]), np.array([-1.0, -1.0, 0.0]), np.array([-1.0, 9.0, 0.0])]
    found = walk(step, changes, np.zeros(3))  # m = (1, -0.5), (0, -0.75), (-0.5, 4.125)
    assert np.array_equal(found, [[0.5, -0.5, 0], [0.5, -1, 0], [0, -0.5, 0]])
    runpy.run_path(str(file), run_name="__main__")
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["fedavg", "sign momentum"]


def test_diloco_without_momentum_and_with_rate_one_is_fedavg() -> None:
    chance = np.random.default_rng(0)
    base, mean = chance.normal(size=9), chance.normal(size=9)
    assert np.allclose(DiLoCo(1.0, 0.0).apply(base.copy(), mean.copy(), (np.zeros(9),)), mean, atol=1e-15)
