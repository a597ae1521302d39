"""The arithmetic of a round, against whole-array arithmetic and against what the rules promise."""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import BadUpdateError
from common.weights import DTYPES, FLOATS, Array, Notes, TensorInfo
from server.averaging import Rule, cast, majority, maximum, pooled_variance, rule_of, weighted_mean


def tensor(dtype: str, name: str = "w") -> TensorInfo:
    return TensorInfo(name, dtype, (1,), 0, DTYPES[dtype].itemsize)


def in_one_buffer(blocks: Sequence[Array]) -> Iterator[Array]:
    """The blocks as the coordinator reads them: each over the one before."""
    buffer = np.empty_like(blocks[0])
    for block in blocks:
        buffer[:] = block
        yield buffer


def finite(code: str) -> st.SearchStrategy[np.generic]:
    """Any finite number of a dtype; of float64 those that samples do not push over the edge."""
    dtype = FLOATS[code]
    if code == "F64":
        return st.floats(-1e300, 1e300).map(np.float64)
    patterns = st.binary(min_size=dtype.itemsize, max_size=dtype.itemsize)
    return patterns.map(lambda raw: np.frombuffer(raw, dtype)[0]).filter(lambda value: math.isfinite(float(value)))


SAMPLES = st.integers(1, 100_000)


@st.composite
def float_rounds(draw: st.DrawFn) -> tuple[str, list[Array], list[int]]:
    """(dtype, K finite blocks of that dtype, K sample counts)."""
    code = draw(st.sampled_from(sorted(FLOATS)))
    length, workers = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    values = draw(st.lists(finite(code), min_size=length * workers, max_size=length * workers))
    blocks = np.array(values, FLOATS[code]).reshape(workers, length)
    return code, list(blocks), draw(st.lists(SAMPLES, min_size=workers, max_size=workers))


# ---------------------------------------------------------------- the rule of a tensor


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_decides_the_rule(dtype: str) -> None:
    expected = Rule.MEAN if dtype in FLOATS else Rule.MAJORITY if dtype == "BOOL" else Rule.MAXIMUM
    assert rule_of(tensor(dtype), Notes()) is expected


def test_a_batch_norm_variance_is_pooled_and_its_mean_is_a_mean() -> None:
    notes = Notes(variances={"var": "mean"}, buffers=("mean", "var"))
    assert rule_of(tensor("F32", "var"), notes) is Rule.VARIANCE
    assert rule_of(tensor("F32", "mean"), notes) is Rule.MEAN


# ---------------------------------------------------------------- the weighted mean


@given(float_rounds())
def test_the_mean_is_the_exact_mean_up_to_float64_rounding(given_round: tuple[str, list[Array], list[int]]) -> None:
    _, blocks, samples = given_round
    found = weighted_mean(in_one_buffer(blocks), samples)
    assert found.dtype == np.float64
    for index, value in enumerate(found):
        products = [Fraction(float(block[index])) * count for block, count in zip(blocks, samples, strict=True)]
        exact = sum(products, Fraction()) / sum(samples)
        # Every product, partial sum and the quotient may round by half a unit in the last place of what it is.
        size = sum((abs(product) for product in products), Fraction()) / sum(samples)
        assert abs(Fraction(float(value)) - exact) <= size * Fraction(len(blocks) * 2 + 1, 2**52) + Fraction(1, 2**1070)


@given(float_rounds())
def test_the_mean_has_the_bytes_of_the_formula_on_whole_arrays(given_round: tuple[str, list[Array], list[int]]) -> None:
    _, blocks, samples = given_round
    total = blocks[0].astype(np.float64) * samples[0]
    for block, count in zip(blocks[1:], samples[1:], strict=True):
        total = total + block.astype(np.float64) * count
    found = weighted_mean(blocks, samples, out=np.empty(len(total)), scratch=np.empty(len(total)))
    assert found.tobytes() == (total / sum(samples)).tobytes()


def test_the_given_memory_is_used() -> None:
    out, scratch = np.empty(2), np.empty(2)
    found = weighted_mean([np.ones(2, np.float32), np.zeros(2, np.float32)], [1, 3], out=out, scratch=scratch)
    assert found is out
    assert found.tolist() == [0.25, 0.25]


@pytest.mark.parametrize("code", sorted(FLOATS.keys() - {"F64"}))
@given(data=st.data())
def test_what_all_workers_agree_on_never_changes(code: str, data: st.DataObject) -> None:
    block = np.array(data.draw(st.lists(finite(code), min_size=1, max_size=4)), FLOATS[code])
    samples = data.draw(st.lists(SAMPLES, min_size=1, max_size=6))
    assert cast(weighted_mean([block] * len(samples), samples), tensor(code)).tobytes() == block.tobytes()


def test_half_precision_does_not_overflow_on_the_way() -> None:
    large = np.full(3, 60_000, np.float16)
    found = cast(weighted_mean([large] * 50, [1000] * 50), tensor("F16"))
    assert found.tolist() == [60_000] * 3


def test_a_small_update_survives_many_large_ones() -> None:
    blocks = [np.full(1, 2.0**24, np.float32)] * 4 + [np.ones(1, np.float32)]
    assert weighted_mean(blocks, [1] * 5)[0] == (4 * 2.0**24 + 1) / 5


@pytest.mark.parametrize("samples", [[], [0], [1, 0], [1, -1]])
def test_a_count_below_one_is_a_mistake_of_the_caller(samples: list[int]) -> None:
    blocks = [np.ones(1)] * len(samples)
    with pytest.raises(ValueError, match="at least one sample"):
        weighted_mean(blocks, samples)
    with pytest.raises(ValueError, match="at least one sample"):
        pooled_variance(blocks, blocks, samples)
    with pytest.raises(ValueError, match="at least one sample"):
        majority([np.ones(1, bool)] * len(samples), samples)


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_blocks_and_counts_that_do_not_pair_are_a_mistake_of_the_caller(blocks: int) -> None:
    values, flags, samples = [np.ones(1)] * blocks, [np.ones(1, bool)] * blocks, [1, 1]
    for average in (
        lambda: weighted_mean(values, samples),
        lambda: pooled_variance(values, [np.ones(1)] * 2, samples),
        lambda: majority(flags, samples),
    ):
        with pytest.raises(ValueError, match=r"zip\(\)"):
            average()


# ---------------------------------------------------------------- BatchNorm


WORKERS_DATA = st.lists(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8), min_size=1, max_size=5)


@given(WORKERS_DATA, st.sampled_from([0.0, 1e6, -1e6]))
def test_the_pooled_variance_is_the_variance_of_the_pooled_data(data: list[list[float]], far: float) -> None:
    shards = [np.array(shard) + far for shard in data]
    variances = [np.array([shard.var()]) for shard in shards]
    means = [np.array([shard.mean()]) for shard in shards]
    found = pooled_variance(in_one_buffer(variances), in_one_buffer(means), [len(shard) for shard in shards])
    everything = np.concatenate(data)
    assert found[0] == pytest.approx(everything.var(), rel=1e-9, abs=1e-5 if far else 1e-9)


@pytest.mark.parametrize("mean", [0.0, 1e6, -3e38])
def test_one_workers_variance_comes_back_bit_by_bit_beside_any_mean(mean: float) -> None:
    variance = np.array([1e-6, 0.3, 7e30], np.float32)
    found = pooled_variance([variance], [np.full(3, mean, np.float32)], [777])
    assert found.astype(np.float32).tobytes() == variance.tobytes()


def test_the_spread_of_the_means_counts() -> None:
    assert pooled_variance([np.zeros(1)] * 2, [np.array([-1.0]), np.array([3.0])], [1, 1])[0] == 4


@given(st.lists(st.tuples(st.floats(-(2.0**100), 2.0**100, width=32), SAMPLES), min_size=1, max_size=6))
def test_a_pooled_variance_is_never_negative(workers: list[tuple[float, int]]) -> None:
    means = [np.array([mean], np.float32) for mean, _ in workers]
    found = pooled_variance([np.zeros(1, np.float32)] * len(workers), means, [count for _, count in workers])
    assert found[0] >= 0


def test_a_pooled_variance_that_rounding_would_push_below_zero_is_zero() -> None:
    means = [np.zeros(1, np.float32), np.array([-1.1215996742248535], np.float32)]
    assert pooled_variance([np.zeros(1, np.float32)] * 2, means, [1, 8879252337175462])[0] == 0  # else -2.2e-16


def test_a_pooled_variance_works_in_half_precision() -> None:
    bfloat16 = ml_dtypes.bfloat16
    variances, means = (
        [np.array([1], bfloat16), np.array([3], bfloat16)],
        [np.array([0], bfloat16), np.array([2], bfloat16)],
    )
    assert pooled_variance(variances, means, [1, 1])[0] == 3


# ---------------------------------------------------------------- integers and booleans


@pytest.mark.parametrize("dtype", [code for code in DTYPES if DTYPES[code].kind in "iu"])
def test_the_maximum_stays_in_its_dtype(dtype: str) -> None:
    top = np.iinfo(DTYPES[dtype]).max
    blocks = [np.array(values, DTYPES[dtype]) for values in ([1, top - 1], [2, top], [0, top - 2])]
    found = maximum(in_one_buffer(blocks))
    assert found.dtype == DTYPES[dtype]
    assert found.tolist() == [2, top]  # of 64 bits, float64 would round top - 1 to top + 1


def test_the_maximum_leaves_its_input_alone() -> None:
    blocks = [np.array([1]), np.array([2])]
    maximum(blocks)
    assert [block.tolist() for block in blocks] == [[1], [2]]


def test_nothing_has_no_maximum() -> None:
    with pytest.raises(ValueError, match="no block"):
        maximum([])


VOTES = st.lists(st.tuples(st.booleans(), SAMPLES), min_size=1, max_size=6)


@given(VOTES)
def test_the_majority_is_by_samples_and_a_tie_goes_to_the_first(votes: list[tuple[bool, int]]) -> None:
    samples = [count for _, count in votes]
    found = majority(in_one_buffer([np.array([vote]) for vote, _ in votes]), samples)
    balance = sum(count if vote else -count for vote, count in votes)
    assert found.dtype == np.bool_
    assert found.tolist() == [votes[0][0] if balance == 0 else balance > 0]


def test_a_tie_goes_to_the_first() -> None:
    assert majority([np.array([True, False]), np.array([False, True])], [5, 5]).tolist() == [True, False]


def test_a_boolean_of_another_byte_than_one_is_true() -> None:
    odd = np.array([2, 0, 255], np.uint8).view(np.bool_)
    assert majority([odd], [1]).view(np.uint8).tolist() == [1, 0, 1]
    assert majority([odd, ~odd], [1, 1]).view(np.uint8).tolist() == [1, 0, 1]


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("code", FLOATS)
@given(data=st.data())
def test_a_cast_of_what_the_dtype_holds_changes_nothing(code: str, data: st.DataObject) -> None:
    block = np.array(data.draw(st.lists(finite(code), min_size=1, max_size=4)), FLOATS[code])
    found = cast(block.astype(np.float64), tensor(code))
    assert (found.dtype, found.tobytes()) == (FLOATS[code], block.tobytes())


@given(st.lists(st.floats(-60_000, 60_000), min_size=1, max_size=4), st.sampled_from(["F16", "BF16"]))
def test_half_precision_is_rounded_from_float32(values: list[float], code: str) -> None:
    found = cast(np.array(values), tensor(code))
    assert found.tobytes() == np.array(values).astype(np.float32).astype(FLOATS[code]).tobytes()


def test_half_precision_is_rounded_twice_on_every_machine() -> None:
    just_above_the_middle = np.array([1 + 2**-11 + 2**-30])  # in float32 it is the middle, which goes to the even side
    assert cast(just_above_the_middle, tensor("F16"))[0] == 1


def test_a_cast_fills_the_memory_that_is_given() -> None:
    out = np.empty(2, np.float32)
    assert cast(np.array([0.5, 1e-50]), tensor("F32"), out=out) is out
    assert out.tolist() == [0.5, 0]


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("F64", np.inf),
        ("F32", 4e38),
        ("F16", 65_520.0),
        ("BF16", 3.4e38),
        ("F8_E4M3", 500.0),
        ("F8_E5M2", 7e4),
        ("F32", np.nan),
    ],
)
def test_what_a_dtype_cannot_hold_is_refused_by_name(code: str, value: float) -> None:
    with pytest.raises(BadUpdateError) as caught:
        cast(np.array([1.0, value]), tensor(code, "fc.weight"), first=40)
    assert caught.value.code == "not_finite"
    assert f"'fc.weight' at element 41 is {value:.6g}, which {code} cannot hold" in str(caught.value)


def test_a_float64_mean_that_overflows_is_refused_and_not_returned() -> None:
    mean = weighted_mean([np.array([1e308]), np.array([-1e308])], [100, 100])
    with pytest.raises(BadUpdateError, match="F64 cannot hold"):
        cast(mean, tensor("F64"))


def test_variances_that_overflow_are_refused_and_not_returned() -> None:
    spread = pooled_variance([np.zeros(1)] * 2, [np.array([1e200]), np.array([-1e200])], [1, 1])
    with pytest.raises(BadUpdateError, match="F64 cannot hold"):
        cast(spread, tensor("F64"))
