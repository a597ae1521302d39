"""Outer steps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import BadJobError
from common.messages import AggregationSection
from server.optimizers import FedAvg, outer_step

BLOCKS = hnp.arrays(np.float64, 4, elements=st.floats(-1e300, 1e300))


@given(BLOCKS, BLOCKS)
def test_fedavg_is_the_mean_bit_by_bit_wherever_it_began(base: np.ndarray, mean: np.ndarray) -> None:
    assert outer_step("fedavg").apply(base, mean.copy()).tobytes() == mean.tobytes()


def test_every_algorithm_that_a_job_may_name_has_a_step() -> None:
    names = AggregationSection.model_json_schema()["properties"]["algorithm"]
    assert all(outer_step(name) for name in names.get("enum", [names.get("const")]))
    assert isinstance(outer_step(AggregationSection().algorithm), FedAvg)


@pytest.mark.parametrize("name", ["", "fedprox", "FedAvg", "__class__"])
def test_an_unknown_algorithm_is_refused_and_the_known_ones_are_named(name: str) -> None:
    with pytest.raises(BadJobError) as caught:
        outer_step(name)
    assert repr(name) in str(caught.value)
    assert "fedavg" in caught.value.advice
