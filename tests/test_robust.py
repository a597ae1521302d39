"""The guard in front of the mean."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import BAD_UPDATE_CODES, BadUpdateError
from common.weights import DTYPES, FLOATS, Layout, Notes, TensorInfo
from server.robust import check_finite, check_layout, check_norm, norm_of, not_finite_at, squared_distance


def layout(*tensors: tuple[str, str, tuple[int, ...]]) -> Layout:
    """A layout with these (name, dtype, shape); where they lie is of no matter here."""
    return Layout(tuple(TensorInfo(name, dtype, shape, 0, 0) for name, dtype, shape in tensors), b"", 0, Notes())


BASE = layout(("w", "F32", (2, 3)), ("n", "I64", ()))


# ---------------------------------------------------------------- layout


@given(st.permutations(BASE.tensors))
def test_the_order_of_tensors_in_a_file_never_matters(tensors: list[TensorInfo]) -> None:
    check_layout(Layout(tuple(tensors), b"another header", 1, Notes()), BASE)


@pytest.mark.parametrize(
    ("update", "code", "words"),
    [
        (layout(("w", "F32", (2, 3))), "missing_tensor", ["'n'", "I64 of shape ()"]),
        (layout(("w", "F32", (2, 3)), ("module.n", "I64", ())), "missing_tensor", ["'n'", "has 'module.n'"]),
        (layout(), "missing_tensor", ["'w'", "F32 of shape (2, 3)"]),
        (
            layout(*[("w", "F32", (2, 3)), ("n", "I64", ()), ("v", "F16", (1,))]),
            "extra_tensor",
            ["'v'", "F16 of shape (1,)"],
        ),
        (layout(("w", "BF16", (2, 3)), ("n", "I64", ())), "wrong_dtype", ["'w'", "BF16", "F32"]),
        (layout(("w", "F32", (3, 2)), ("n", "I64", ())), "wrong_shape", ["'w'", "(3, 2)", "(2, 3)"]),
        (layout(("w", "F32", (2, 3)), ("n", "I64", (1,))), "wrong_shape", ["'n'", "(1,)", "()"]),
    ],
)
def test_another_layout_is_refused_naming_the_tensor_and_both_values(
    update: Layout, code: str, words: list[str]
) -> None:
    with pytest.raises(BadUpdateError) as caught:
        check_layout(update, BASE)
    assert caught.value.code == code
    assert all(word in str(caught.value) for word in words)
    assert code in BAD_UPDATE_CODES


# ---------------------------------------------------------------- finite


@pytest.mark.parametrize("code", FLOATS)
@given(data=st.data())
def test_the_first_bad_float_is_found_wherever_it_is(code: str, data: st.DataObject) -> None:
    bad = [
        value for value in (np.nan, -np.nan, np.inf, -np.inf) if not np.isfinite(np.array(value).astype(FLOATS[code]))
    ]
    block = np.ones(data.draw(st.integers(1, 40)), FLOATS[code])
    places = data.draw(st.sets(st.integers(0, len(block) - 1), min_size=1, max_size=3))
    for place in places:
        block[place] = data.draw(st.sampled_from(bad))
    with pytest.raises(BadUpdateError) as caught:
        check_finite("fc.weight", block, first=100)
    assert caught.value.code == "not_finite"
    assert f"'fc.weight' is {float(block[min(places)])} at element {100 + min(places)} " in str(caught.value)


@pytest.mark.parametrize("code", FLOATS)
@given(data=st.data())
def test_a_float_is_refused_exactly_when_it_is_no_number(code: str, data: st.DataObject) -> None:
    dtype = DTYPES[code]
    block = np.frombuffer(data.draw(st.binary(min_size=dtype.itemsize, max_size=dtype.itemsize)), dtype)
    assert (not_finite_at(block) is None) == math.isfinite(float(block[0]))


@pytest.mark.parametrize(
    ("code", "pattern"), [("F64", 0x7FF0 << 48 | 1), ("F32", 0x7F800001), ("F16", 0x7C01), ("BF16", 0x7F81)]
)
def test_a_signalling_nan_is_refused_without_a_warning(code: str, pattern: int) -> None:
    block = np.frombuffer(pattern.to_bytes(DTYPES[code].itemsize, "little"), DTYPES[code])
    with pytest.raises(BadUpdateError, match="'w' is nan at element 0 "):
        check_finite("w", block)


@pytest.mark.parametrize("code", sorted(DTYPES.keys() - FLOATS.keys()))
def test_integers_and_booleans_are_always_finite(code: str) -> None:
    check_finite("n", np.full(8, 0xFF if code != "BOOL" else 1, np.uint8).view(DTYPES[code]))


def test_an_empty_block_is_finite() -> None:
    check_finite("w", np.empty(0, np.float32))


def test_a_buffer_that_holds_infinity_gets_its_own_advice() -> None:
    with pytest.raises(BadUpdateError) as caught:
        check_finite("mask", np.array([0, -np.inf], np.float32), trained=False)
    assert "persistent=False" in caught.value.advice


# ---------------------------------------------------------------- norms


@pytest.mark.parametrize("code", FLOATS)
def test_a_distance_is_taken_in_float64(code: str) -> None:
    update, base = np.array([256, -256], FLOATS[code]), np.array([-256, 256], FLOATS[code])
    assert squared_distance(update, base) == 2 * 512**2  # 512 is beyond F8_E4M3, its square beyond F16


@given(hnp.arrays(np.float32, 6, elements=st.floats(-(2.0**50), 2.0**50, width=32)), st.integers(0, 6))
def test_a_norm_from_blocks_is_the_norm_of_the_whole(update: np.ndarray, cut: int) -> None:
    base, scratch = np.arange(6, dtype=np.float32), np.empty(6)
    squares = [
        squared_distance(update[part], base[part], scratch=scratch[part]) for part in (slice(cut), slice(cut, 6))
    ]
    whole = np.linalg.norm(update.astype(np.float64) - base)
    assert norm_of(squares) == pytest.approx(whole, rel=1e-12)


@given(st.lists(st.floats(0, 1e300), max_size=8), st.randoms(use_true_random=False))
def test_the_order_of_the_blocks_never_changes_a_norm(squares: list[float], chance: random.Random) -> None:
    shuffled = squares.copy()
    chance.shuffle(shuffled)
    assert norm_of(shuffled) == norm_of(squares)


def test_a_distance_to_itself_is_zero() -> None:
    assert norm_of([squared_distance(np.ones(3), np.ones(3))]) == 0


def test_a_norm_beyond_float64_is_infinite_and_no_crash() -> None:
    assert squared_distance(np.array([1e200]), np.array([-1e200])) == math.inf
    assert norm_of([1e308, 1e308]) == math.inf
    assert norm_of([math.inf, 1.0]) == math.inf


@pytest.mark.parametrize("norm", [0.0, 1.999, 2.0])
def test_a_norm_up_to_the_bound_passes(norm: float) -> None:
    check_norm(norm, 2.0)


@pytest.mark.parametrize("norm", [math.nextafter(2.0, 3.0), 1e9, math.inf, math.nan])
def test_a_norm_beyond_the_bound_is_refused_with_both_numbers(norm: float) -> None:
    with pytest.raises(BadUpdateError) as caught:
        check_norm(norm, 2.0)
    assert caught.value.code == "norm_bound"
    assert f"{norm:.6g}" in str(caught.value)
    assert "2 is allowed" in str(caught.value)
