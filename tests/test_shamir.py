"""Secrets in shares: any t of them give the secret back, and fewer do not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.shamir import PRIME, reconstruct, share

FIELD = st.integers(0, PRIME - 1)


def test_a_share_is_the_value_of_the_polynomial_at_its_point() -> None:
    # 1234 + 166 x + 94 x²
    assert share(1234, [1, 2, 3], [166, 94]) == {1: 1494, 2: 1942, 3: 2578}


def test_three_points_of_a_parabola_give_its_value_at_zero() -> None:
    assert reconstruct({2: 1942, 4: 3402, 5: 4414}, 3) == 1234


def test_the_prime_is_the_mersenne_prime_of_521_bits() -> None:
    assert PRIME.bit_length() == 521
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in (2, 3, 5, 7))


@settings(max_examples=30)
@given(FIELD, st.data())
def test_any_set_of_as_many_shares_as_the_threshold_gives_the_secret_back(secret: int, data: st.DataObject) -> None:
    points = data.draw(st.lists(st.integers(1, 1000), min_size=1, max_size=8, unique=True))
    threshold = data.draw(st.integers(1, len(points)))
    coefficients = data.draw(st.lists(FIELD, min_size=threshold - 1, max_size=threshold - 1))
    shares = share(secret, points, coefficients)
    chosen = data.draw(st.permutations(points))[: data.draw(st.integers(threshold, len(points)))]
    assert reconstruct({point: shares[point] for point in chosen}, threshold) == secret


@settings(max_examples=30)
@given(FIELD, FIELD, FIELD)
def test_two_of_three_shares_fit_every_secret(one: int, two: int, other_secret: int) -> None:
    """Whatever the secret might be, there is a polynomial through the two shares that are known."""
    shares = {1: one, 2: two}
    third = (3 * two - 3 * one + other_secret) % PRIME
    assert reconstruct({**shares, 3: third}, 3) == other_secret


def test_fewer_shares_than_the_threshold_are_refused() -> None:
    with pytest.raises(ValueError, match="2 shares are here, and 3 are needed"):
        reconstruct({1: 5, 2: 6}, 3)


@pytest.mark.parametrize(
    ("secret", "points", "coefficients", "said"),
    [
        (PRIME, [1, 2], [1], "not in the field"),
        (1, [1, 2], [PRIME], "not in the field"),
        (1, [0, 2], [1], "different numbers"),
        (1, [2, 2], [1], "different numbers"),
        (1, [1, 2], [1, 1], "2 shares were to be cut, of which 3"),
    ],
)
def test_shares_that_could_not_work_are_not_cut(
    secret: int, points: list[int], coefficients: list[int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        share(secret, points, coefficients)
