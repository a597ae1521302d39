"""Changes as whole numbers: what they stand for, what they lose, and that no sum leaves 64 bits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.fixed import LEAST_BITS, MOST, MOST_BITS, Fixed

FIXED = st.builds(Fixed, st.floats(1e-6, 1e6), st.integers(LEAST_BITS, MOST_BITS))


def test_a_number_is_cut_rounded_and_weighed_by_its_samples() -> None:
    fixed = Fixed(clip=2.0, bits=8)  # 2 = 0.5 * 2^2, so five bits after the point
    assert (fixed.fraction, fixed.levels) == (5, 64)
    numbers, cut = fixed.encode(np.array([0.0, 1.0, -1.0, 1 / 32, 1 / 64, 3 / 64, 2.0, 2.5, -1e300]), 3)
    assert numbers.tolist() == [0, 96, -96, 3, 0, 6, 192, 192, -192]  # a half is rounded to the even one
    assert cut == 2


def test_a_sum_is_decoded_to_the_mean_of_the_changes() -> None:
    fixed = Fixed(clip=2.0, bits=8)
    total = fixed.encode(np.array([1.0, -0.5]), 1)[0] + fixed.encode(np.array([0.0, 0.5]), 3)[0]
    assert fixed.decode(total, 4).tolist() == [0.25, 0.25]


@settings(max_examples=30)
@given(FIXED)
def test_the_heaviest_sum_of_the_largest_numbers_stays_within_64_bits(fixed: Fixed) -> None:
    assert fixed.levels * fixed.heaviest <= MOST
    assert fixed.levels * (fixed.heaviest + 1) > MOST
    assert fixed.levels < 2 ** (fixed.bits - 1)
    assert fixed.encode(np.array([1e300, -1e300]), fixed.heaviest)[0].tolist() == [
        fixed.levels * fixed.heaviest,
        -fixed.levels * fixed.heaviest,
    ]


@settings(max_examples=30)
@given(FIXED, st.floats(-1, 1), st.integers(1, 1000))
def test_a_change_within_the_clip_comes_back_to_half_a_step(fixed: Fixed, share: float, samples: int) -> None:
    change = share * fixed.levels * 2.0**-fixed.fraction
    numbers, cut = fixed.encode(np.array([change]), samples)
    step = 2.0**-fixed.fraction
    assert cut == 0
    assert abs(fixed.decode(numbers, samples)[0] - change) <= step / 2 * (1 + 1e-12) + abs(change) * 1e-15


@pytest.mark.parametrize("samples", [0, Fixed(8.0, 32).heaviest + 1])
def test_samples_that_have_no_room_are_refused(samples: int) -> None:
    with pytest.raises(ValueError, match=f"{samples} samples, where 1 to"):
        Fixed(8.0, 32).encode(np.zeros(1), samples)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        Fixed(8.0, 32).encode(np.array([value]), 1)
