"""Codecs: what comes back is near what was sent, pieces fit together, and no bytes do harm."""

import itertools
from contextlib import suppress

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.codecs import CODECS, KEPT, PIECE, Bytes, Float32s, codec
from common.errors import BadJobError, BadUpdateError

LARGEST = np.finfo(np.float32).max
FEW = [0, 1, 2, 3, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097, 8192, 8257, PIECE, PIECE + 1, 2 * PIECE + 4096 + 70]
every_codec = pytest.mark.parametrize("name", CODECS)


def values_of(seed: int, count: int) -> Float32s:
    """What deltas look like, and worse: of any size, with zeros, ties, subnormals and the largest of all."""
    chance = np.random.default_rng(seed)
    values = chance.normal(size=count) * 10.0 ** chance.integers(-46, 38)
    kind = chance.integers(6)
    if kind == 1:  # mostly zero, as in the rows of an embedding
        values[chance.random(count) < 0.99] = 0
    elif kind == 2:  # ties everywhere
        values = chance.integers(-2, 3, size=count) * 10.0 ** chance.integers(-46, 38)
    elif kind == 3:
        values = values * 10.0 ** chance.uniform(-30, 0, size=count)
    elif kind == 4:
        values = chance.choice([-1, 1, 0.5, 0], size=count) * float(LARGEST)
    return np.clip(values, -LARGEST, LARGEST).astype(np.float32)


COUNTS = st.sampled_from(FEW) | st.integers(0, 9000)
VALUES = st.builds(values_of, st.integers(0, 10_000), COUNTS)
ODD = hnp.arrays(np.float32, st.integers(0, 200), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


def there_and_back(name: str, values: Float32s) -> Float32s:
    return codec(name).decode(codec(name).encode(values), values.size)


def blocks_of(name: str, values: Float32s) -> list[Float32s]:
    return [values[first : first + codec(name).block] for first in range(0, values.size, codec(name).block)]


def refusal(name: str, data: Bytes, count: int) -> str:
    with pytest.raises(BadUpdateError) as caught:
        codec(name).decode(data, count)
    assert caught.value.code == "bad_encoding"
    return str(caught.value)


# ---------------------------------------------------------------- sizes and pieces


def test_an_unknown_codec_is_a_mistake_in_the_job() -> None:
    with pytest.raises(BadJobError, match=r"^there is no codec 'gzip'; known are bf16, int8, int4, topk$"):
        codec("gzip")


def test_each_codec_is_found_by_its_name() -> None:
    assert tuple(codec(name).name for name in CODECS) == CODECS == ("bf16", "int8", "int4", "topk")
    assert [name for name in CODECS if codec(name).feedback] == ["topk"]


@every_codec
def test_a_piece_is_whole_blocks(name: str) -> None:
    assert PIECE % codec(name).block == 0


@pytest.mark.parametrize(
    ("name", "count", "size"),
    [
        ("bf16", 0, 0), ("bf16", 5, 10),
        ("int8", 0, 0), ("int8", 1, 5), ("int8", 4096, 4100), ("int8", 4097, 4105),
        ("int4", 0, 0), ("int4", 1, 3), ("int4", 2, 3), ("int4", 64, 34), ("int4", 67, 38),
        ("topk", 0, 0), ("topk", 1, 2), ("topk", 64, 128), ("topk", 65, 128), ("topk", 4096, 128), ("topk", 4100, 136),
    ],
)  # fmt: skip
def test_the_size_is_known_beforehand(name: str, count: int, size: int) -> None:
    assert codec(name).size(count) == size


@every_codec
@given(values=VALUES | ODD)
@example(values=np.empty(0, np.float32))
def test_what_is_encoded_has_its_size_and_decodes(name: str, values: Float32s) -> None:
    data = codec(name).encode(values)
    assert (data.dtype, data.shape) == (np.uint8, (codec(name).size(values.size),))
    found = codec(name).decode(data, values.size)
    assert (found.dtype, found.shape) == (np.float32, values.shape)
    assert np.isfinite(found).all()


@every_codec
@given(seed=st.integers(0, 1000), count=COUNTS, data=st.data())
def test_runs_of_whole_blocks_are_encoded_and_decoded_alone(
    name: str, seed: int, count: int, data: st.DataObject
) -> None:
    chosen, values = codec(name), values_of(seed, count)
    cut = chosen.block * data.draw(st.integers(0, count // chosen.block))
    whole, parts = chosen.encode(values), (chosen.encode(values[:cut]), chosen.encode(values[cut:]))
    assert whole.tobytes() == parts[0].tobytes() + parts[1].tobytes()
    start = chosen.size(cut)
    decoded = [chosen.decode(whole[:start], cut), chosen.decode(whole[start:], count - cut)]
    assert np.concatenate(decoded).tobytes() == chosen.decode(whole, count).tobytes()


@every_codec
@given(values=VALUES)
def test_the_same_values_give_the_same_bytes_wherever_they_lie(name: str, values: Float32s) -> None:
    strided, unaligned = np.repeat(values, 2)[::2], np.zeros(values.nbytes + 1, np.uint8)[1:].view(np.float32)
    unaligned[:] = values
    before, data = values.tobytes(), codec(name).encode(values)
    assert codec(name).encode(strided).tobytes() == codec(name).encode(unaligned).tobytes() == data.tobytes()
    assert values.tobytes() == before


@every_codec
@given(values=VALUES)
def test_the_same_bytes_give_the_same_values_wherever_they_lie(name: str, values: Float32s) -> None:
    data = codec(name).encode(values)
    shifted = np.concatenate([np.zeros(1, np.uint8), data])[1:]
    out = np.full(values.shape, np.nan, np.float32)
    assert codec(name).decode(np.repeat(data, 2)[::2], values.size, out=out) is out
    assert out.tobytes() == codec(name).decode(shifted, values.size).tobytes() == there_and_back(name, values).tobytes()


@every_codec
def test_a_result_goes_only_where_it_fits(name: str) -> None:
    data = codec(name).encode(np.ones(6, np.float32))
    for out in (np.empty(7, np.float32), np.empty(6), np.empty((2, 3), np.float32), np.empty(12, np.float32)[::2]):
        with pytest.raises(ValueError, match=r"^6 elements cannot be decoded into float"):
            codec(name).decode(data, 6, out=out)


@every_codec
@pytest.mark.parametrize("values", [np.ones(3), np.ones((2, 2), np.float32), np.float32(1)])
def test_only_flat_float32_is_encoded(name: str, values: Float32s) -> None:
    with pytest.raises(ValueError, match=r"^float32 of one dimension can be encoded, and not float"):
        codec(name).encode(np.asarray(values))


@every_codec
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("count", "at"), [(1, 0), (64, 63), (5000, 4999), (5000, 17), (PIECE + 9, PIECE + 2)])
def test_what_is_not_finite_is_not_encoded(name: str, value: float, count: int, at: int) -> None:
    values = np.ones(count, np.float32)
    values[at] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        codec(name).encode(values)


# ---------------------------------------------------------------- how near


@given(VALUES | ODD)
def test_bf16_is_the_nearest_bfloat16_and_never_infinite(values: Float32s) -> None:
    edge = np.float32(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    nearest = np.clip(values, -edge, edge).astype(ml_dtypes.bfloat16)
    assert there_and_back("bf16", values).tobytes() == nearest.astype(np.float32).tobytes()


@pytest.mark.parametrize(("name", "steps"), [("int8", 127), ("int4", 7)])
@given(values=VALUES | ODD)
def test_a_value_is_off_by_half_a_scale_at_most(name: str, steps: int, values: Float32s) -> None:
    for block in blocks_of(name, values):
        data = codec(name).encode(block)
        kind = np.float32 if name == "int8" else ml_dtypes.bfloat16
        scale = float(data[: 4 if name == "int8" else 2].view(kind)[0])
        largest = float(np.abs(block).max())
        found = codec(name).decode(data, block.size).astype(np.float64)
        if largest / steps < 0.99 * np.finfo(np.float32).tiny:
            assert scale == 0
            assert not found.any()
        elif scale:
            assert scale == pytest.approx(largest / steps, rel=0.008)  # bfloat16 has 8 bits
            # Half a scale, and what float32 rounds away in x / scale and in q × scale.
            assert np.abs(found - block).max() <= scale / 2 + largest * 2.0**-22


@pytest.mark.parametrize("name", ["bf16", "int4"])
@given(values=VALUES | ODD)
def test_what_has_been_through_once_comes_back_unchanged(name: str, values: Float32s) -> None:
    once = there_and_back(name, values)
    np.testing.assert_array_equal(there_and_back(name, once), once)


@given(VALUES)
def test_int8_is_off_by_one_rounding_at_most_the_second_time(values: Float32s) -> None:
    once = there_and_back("int8", values)
    np.testing.assert_allclose(there_and_back("int8", once), once, rtol=2.0**-22, atol=0)


@given(VALUES)
def test_topk_keeps_the_largest_and_of_equals_the_first(values: Float32s) -> None:
    for block in blocks_of("topk", values):
        data, found = codec("topk").encode(block), there_and_back("topk", block)
        if block.size <= KEPT:
            assert data.tobytes() == codec("bf16").encode(block).tobytes()
            continue
        kept = sorted(np.lexsort((np.arange(block.size), -np.abs(block.astype(np.float64))))[:KEPT].tolist())
        assert indices_in(data) == kept
        assert not np.delete(found, kept).any()
        for sign in (-1, 1):  # no value changes its sign, nor leaves the values of its sign
            of_sign = [at for at in kept if np.sign(block[at]) == sign]
            if of_sign:
                magnitudes = np.abs(block[of_sign])
                assert (np.sign(found[of_sign]) == sign).all() or not found[of_sign].all()
                assert (np.abs(found[of_sign]) <= magnitudes.max()).all()


def test_topk_sends_the_means_of_four_bins() -> None:
    values = np.zeros(4096, np.float32)
    values[10:74:2], values[11:75:2] = 1, -1
    values[10], values[11], values[12] = 9, -5, 7
    found = there_and_back("topk", values)
    assert (found[10], found[12], found[11], found[13], found[14]) == (8, 8, -5, -1, 1)
    assert np.count_nonzero(found) == KEPT


def indices_in(data: Bytes) -> list[int]:
    """The indices of one topk block, read bit by bit."""
    bits = "".join(f"{byte:08b}" for byte in reversed(data[32:128].tolist()))
    return [int(bits[at : at + 12], 2) for at in range(0, len(bits), 12)][::-1]


@every_codec
@pytest.mark.parametrize("count", [0, 1, 64, 65, 5000])
def test_zeros_stay_zeros(name: str, count: int) -> None:
    assert not there_and_back(name, np.zeros(count, np.float32)).any()


@pytest.mark.parametrize(("name", "error"), [("bf16", 0.002), ("int8", 0.01), ("int4", 0.12), ("topk", 0.95)])
def test_the_relative_error_is_what_the_codec_is_chosen_for(name: str, error: float) -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32) * np.float32(1e-6)
    assert np.linalg.norm(there_and_back(name, values) - values) < error * np.linalg.norm(values)


@pytest.mark.parametrize(("name", "rest"), [("bf16", 0.0), ("int8", 0.0), ("int4", 0.001), ("topk", 0.5)])
def test_with_its_error_fed_back_every_codec_brings_everything(name: str, rest: float) -> None:
    chance = np.random.default_rng(1)
    direction = chance.normal(size=9000).astype(np.float32)
    sent, kept = np.zeros(9000), np.zeros(9000, np.float32)
    for _ in range(64):
        kept = kept + direction
        decoded = there_and_back(name, kept)
        sent, kept = sent + decoded, kept - decoded
    wanted = 64.0 * direction
    np.testing.assert_allclose(sent + kept, wanted, atol=1e-3)
    assert np.linalg.norm(sent - wanted) <= (rest + 0.001) * np.linalg.norm(wanted)


# ---------------------------------------------------------------- hostile bytes


@every_codec
@given(count=COUNTS, more=st.integers(-5, 5).filter(bool))
def test_a_wrong_length_is_refused(name: str, count: int, more: int) -> None:
    size = max(codec(name).size(count) + more, 0)
    if size != codec(name).size(count):
        assert f"{codec(name).size(count)} bytes as {name}, and {size} came" in refusal(
            name, np.zeros(size, np.uint8), count
        )


@every_codec
@given(count=st.integers(0, 300) | st.sampled_from([4096, 4100, 4170]), data=st.data())
def test_no_bytes_do_more_than_be_refused(name: str, count: int, data: st.DataObject) -> None:
    size = codec(name).size(count)
    seed = data.draw(st.integers(0, 10_000))
    raw = codec(name).encode(values_of(seed, count))
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, max(size - 1, 0)), st.integers(0, 255)), max_size=6)):
        raw[at : at + 1] = byte
    if data.draw(st.booleans()):
        raw = np.random.default_rng(seed).integers(0, 256, size=size, dtype=np.uint8)
    guard = np.full(count + 128, 7, np.float32)
    with suppress(BadUpdateError):
        codec(name).decode(raw, count, out=guard[64 : 64 + count])
    assert np.isfinite(guard).all()
    assert (guard[:64] == 7).all()
    assert (guard[64 + count :] == 7).all()


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF])
@pytest.mark.parametrize("name", ["bf16", "topk"])
def test_bfloat16_that_is_not_finite_is_refused(name: str, bits: int) -> None:
    data = codec(name).encode(np.ones(9, np.float32))
    data[16:] = np.array([bits], "<u2").view(np.uint8)
    assert refusal(name, data, 9).endswith("a value is NaN or infinite")


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0, -0.0, float(LARGEST), float(LARGEST) / 126])
@pytest.mark.parametrize("count", [10, 4100])
def test_a_scale_of_int8_that_an_encoder_never_writes_is_refused(scale: float, count: int) -> None:
    data = codec("int8").encode(np.ones(count, np.float32))
    start = count // 4096 * 4100
    data[start : start + 4] = np.array([scale], "<f4").view(np.uint8)
    assert "a scale is outside 0 … 2.67" in refusal("int8", data, count)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0, -0.0, 3e38, 5e37])
@pytest.mark.parametrize("count", [10, 70])
def test_a_scale_of_int4_that_an_encoder_never_writes_is_refused(scale: float, count: int) -> None:
    data = codec("int4").encode(np.ones(count, np.float32))
    start = count // 64 * 34
    data[start : start + 2] = np.array([scale], ml_dtypes.bfloat16).view(np.uint8)
    assert "a scale is outside 0 … 4.8" in refusal("int4", data, count)


@pytest.mark.parametrize(("count", "at"), [(1, 4), (4096, 4099), (4097, 4104), (4097, 7)])
def test_the_code_minus_128_is_refused(count: int, at: int) -> None:
    data = codec("int8").encode(np.ones(count, np.float32))
    data[at] = 0x80
    assert "-128" in refusal("int8", data, count)


@pytest.mark.parametrize("byte", [0x08, 0x80, 0x88])
@pytest.mark.parametrize(("count", "at"), [(2, 2), (64, 33), (66, 36)])
def test_the_code_minus_8_is_refused(count: int, at: int, byte: int) -> None:
    data = codec("int4").encode(np.ones(count, np.float32))
    data[at] = byte
    assert "-8" in refusal("int4", data, count)


@pytest.mark.parametrize("count", [1, 3, 65])
def test_padding_that_is_not_zero_is_refused(count: int) -> None:
    data = codec("int4").encode(np.ones(count, np.float32))
    data[-1] |= 0x10
    assert refusal("int4", data, count).endswith("the half byte after the last element is not 0")


@given(first=st.integers(0, 255), second=st.integers(0, 255), byte=st.integers(0, 255))
@example(first=0x81, second=0x7F, byte=0)  # a signalling NaN as bfloat16
@pytest.mark.parametrize("name", CODECS)
def test_the_first_bytes_are_refused_without_a_warning_or_give_finite_values(
    name: str, first: int, second: int, byte: int
) -> None:
    data = codec(name).encode(np.ones(4096, np.float32))
    # Of the two little-endian bytes that matter most of a bfloat16, or of a float32.
    data[:4] = (first, second, byte, byte) if name in {"bf16", "int4"} else (byte, byte, first, second)
    with suppress(BadUpdateError):
        assert np.isfinite(codec(name).decode(data, 4096)).all()


def with_indices(indices: list[int]) -> Bytes:
    data = np.zeros(128, np.uint8)
    number = sum(index << 12 * at for at, index in enumerate(indices))
    data[32:] = np.frombuffer(number.to_bytes(96, "little"), np.uint8)
    return data


@pytest.mark.parametrize(("at", "value"), [(1, 0), (5, 4), (5, 3), (63, 62), (62, 63)])
def test_indices_that_repeat_or_fall_are_refused(at: int, value: int) -> None:
    indices = list(range(KEPT))
    indices[at] = value
    assert refusal("topk", with_indices(indices), 100).endswith("indices do not ascend")


@pytest.mark.parametrize(("count", "last"), [(65, 65), (100, 100), (100, 4095), (4095, 4095)])
def test_an_index_beyond_its_block_is_refused(count: int, last: int) -> None:
    data = with_indices([*range(KEPT - 1), last])
    assert refusal("topk", data, count).endswith(f"an index is beyond a block of {count} elements")
    assert codec("topk").decode(data, 4096).shape == (4096,)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", range(4))
def test_a_codebook_that_is_not_finite_is_refused(value: float, place: int) -> None:
    data = with_indices(list(range(KEPT)))
    data[4 * place : 4 * place + 4] = np.array([value], "<f4").view(np.uint8)
    assert refusal("topk", data, 4096).endswith("a value of a codebook is NaN or infinite")


def test_every_scale_that_is_taken_gives_finite_values() -> None:
    for name, kind, steps in (("int8", np.dtype("<f4"), 127), ("int4", np.dtype(ml_dtypes.bfloat16), 7)):
        data = codec(name).encode(np.full(2, LARGEST, np.float32))
        assert np.isfinite(codec(name).decode(data, 2)).all()
        limit = data[: kind.itemsize].view(kind).astype(np.float64)[0]
        assert limit * steps <= LARGEST < limit * steps * 1.01


def test_a_block_is_read_as_the_drawing_says() -> None:
    assert codec("bf16").encode(np.array([1, -2], np.float32)).tobytes() == b"\x80\x3f\x00\xc0"
    assert codec("int8").encode(np.array([127, -127, 2], np.float32)).tobytes() == b"\x00\x00\x80\x3f\x7f\x81\x02"
    assert codec("int4").encode(np.array([7, -7, 2], np.float32)).tobytes() == b"\x80\x3f\x97\x02"
    ladder = np.concatenate([np.arange(1, 65), np.zeros(36)]).astype(np.float32)
    data = codec("topk").encode(ladder)
    assert data[:16].view("<f4").tolist() == [0, 0, 16.5, 48.5]
    assert data[16:32].tolist() == [0b10101010] * 8 + [0b11111111] * 8
    assert list(itertools.chain(data[32:38])) == [0, 16, 0, 2, 48, 0]
