"""Outer steps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import BadJobError
from common.messages import AggregationSection
from server.optimizers import DiLoCo, FedAvg, outer_step

BLOCKS = hnp.arrays(np.float64, 4, elements=st.floats(-1e300, 1e300))


@given(BLOCKS, BLOCKS)
def test_fedavg_is_the_mean_bit_by_bit_wherever_it_began(base: np.ndarray, mean: np.ndarray) -> None:
    assert FedAvg().apply(base, mean.copy(), ()).tobytes() == mean.tobytes()


def test_every_algorithm_that_a_job_may_name_has_a_step() -> None:
    names = AggregationSection.model_json_schema()["properties"]["algorithm"]["enum"]
    steps = [outer_step(AggregationSection(algorithm=name)) for name in names]
    assert [type(step) for step in steps] == [FedAvg, DiLoCo]
    assert isinstance(outer_step(AggregationSection()), FedAvg)


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


@given(st.integers(0, 10_000), st.floats(0.01, 2), st.floats(0, 0.99), st.integers(1, 6))
def test_diloco_is_pytorchs_nesterov_over_the_pseudo_gradient(seed: int, lr: float, momentum: float, n: int) -> None:
    """Written out as torch.optim.SGD documents it: the buffer begins as the first gradient."""
    chance = np.random.default_rng(seed)
    x = chance.normal(size=7)
    step, ours, velocity, buffer = DiLoCo(lr, momentum), x.copy(), np.zeros(7), None
    for _ in range(n):
        gradient = chance.normal(size=7)
        buffer = gradient.copy() if buffer is None else momentum * buffer + gradient
        x = x - lr * (gradient + momentum * buffer)
        ours = step.apply(ours.copy(), ours - gradient, (velocity,)).copy()
    assert np.allclose(ours, x, rtol=1e-9, atol=1e-9)
    assert np.allclose(velocity, buffer, rtol=1e-9, atol=1e-9)


def test_diloco_without_momentum_and_with_rate_one_is_fedavg() -> None:
    chance = np.random.default_rng(0)
    base, mean = chance.normal(size=9), chance.normal(size=9)
    assert np.allclose(DiLoCo(1.0, 0.0).apply(base.copy(), mean.copy(), (np.zeros(9),)), mean, atol=1e-15)
