"""How a transfer is cut and how many streams it gets: each byte once, one stream on a good path, more on a bad one."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.ranges import with_range
from common.streams import FAST, FIRST, LEAST, MOST, SMALL, STREAMS, Streams

MIB = 1 << 20

spans = st.lists(st.tuples(st.integers(0, 40 * MIB), st.integers(1, 30 * MIB)), min_size=1, max_size=5)


def gaps_of(pairs: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    held: tuple[tuple[int, int], ...] = ()
    for start, length in pairs:
        held = with_range(held, start, start + length)
    return held


def run(streams: Streams, rate_of: object, most: int = 100_000) -> tuple[list[tuple[int, int]], int]:
    """Play a transfer whose streams have the rate that `rate_of(streams)` says: its pieces, and its most streams."""
    now, out, pieces, peak = 0.0, list[tuple[float, tuple[int, int]]](), list[tuple[int, int]](), 0
    for _ in range(most):
        while (piece := streams.take(now)) is not None:
            pieces.append(piece)
            out.append((now + (piece[1] - piece[0]) / rate_of(len(out) + 1), piece))  # type: ignore[operator]
            peak = max(peak, len(out))
        if not out:
            return pieces, peak
        out.sort()
        now, piece = out.pop(0)
        streams.done(piece, now)
    raise AssertionError("the transfer does not end")


@given(pairs=spans, rate=st.floats(1e4, 1e9), gain=st.floats(0.0, 1.0))
@settings(deadline=None)
def test_the_pieces_tile_the_gaps_whatever_the_path_gives(
    pairs: list[tuple[int, int]], rate: float, gain: float
) -> None:
    gaps = gaps_of(pairs)
    pieces, peak = run(Streams(gaps), lambda out: rate * out**gain / out)
    held: tuple[tuple[int, int], ...] = ()
    for start, stop in sorted(pieces):
        assert not held or start >= held[-1][1], "a byte was handed out twice"
        held = with_range(held, start, stop)
    assert held == gaps
    assert 1 <= peak <= STREAMS


def test_a_small_file_goes_in_one_request() -> None:
    assert run(Streams(((0, SMALL),)), lambda _: 1e3) == ([(0, SMALL)], 1)


def test_a_fast_path_gets_one_piece_that_measures_and_one_with_all_the_rest() -> None:
    size = 100 * MIB
    assert run(Streams(((0, size),)), lambda _: 200e6) == ([(0, FIRST), (FIRST, size)], 1)


def test_however_much_is_left_a_near_path_gets_one_stream() -> None:
    """Workers of one machine share it: each sees the others as a slow path, and streams would be taken from them."""
    size = 10_000 * MIB
    assert run(Streams(((0, size),)), lambda _: FAST) == ([(0, FIRST), (FIRST, size)], 1)
    assert run(Streams(((0, size),)), lambda _: 0.99 * FAST)[1] == STREAMS


def test_a_path_that_gives_each_stream_the_same_gets_all_streams() -> None:
    pieces, peak = run(Streams(((0, 100 * MIB),)), lambda _: 200e3)
    assert peak == STREAMS
    assert all(LEAST <= stop - start <= MOST for start, stop in pieces[1:-1])


def test_a_path_that_is_full_with_one_stream_goes_back_to_one() -> None:
    streams = Streams(((0, 100 * MIB),))
    _, peak = run(streams, lambda out: 1e6 / out)
    assert peak == 2
    assert streams.wanted == 1


def test_a_path_that_is_full_with_four_streams_stays_at_four() -> None:
    streams = Streams(((0, 400 * MIB),))
    _, peak = run(streams, lambda out: min(0.5e6, 2e6 / out))
    assert peak == 8
    assert streams.wanted == 4


def test_nothing_is_handed_out_of_nothing() -> None:
    assert Streams(()).take(0.0) is None


def test_a_second_stream_waits_for_the_first_measurement() -> None:
    streams = Streams(((0, 100 * MIB),))
    assert streams.take(0.0) == (0, FIRST)
    assert streams.take(0.0) is None


@given(pairs=spans, seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_pieces_that_end_in_any_order_or_never_are_never_handed_out_twice(
    pairs: list[tuple[int, int]], seed: int
) -> None:
    gaps, chance = gaps_of(pairs), random.Random(seed)
    streams, now, out, seen = Streams(gaps), 0.0, list[tuple[int, int]](), list[tuple[int, int]]()
    for _ in range(300):
        now += chance.random() * 10
        if chance.random() < 0.5 and (piece := streams.take(now)) is not None:
            assert len(out) < STREAMS
            out.append(piece)
            seen.append(piece)
        elif out:
            streams.done(out.pop(chance.randrange(len(out))), now)
    seen.sort()
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(seen))
    assert all(any(start <= piece[0] < piece[1] <= stop for start, stop in gaps) for piece in seen)
    handed_out = sum(stop - start for start, stop in seen)
    assert handed_out + streams.left == sum(stop - start for start, stop in gaps)


def test_small_gaps_do_not_make_a_near_path_look_slow() -> None:
    gaps = (*((at * 100, at * 100 + 10) for at in range(50)), (MIB, 100 * MIB))
    streams, pieces = Streams(gaps), list[tuple[int, int]]()
    now = 0.0
    while (piece := streams.take(now)) is not None:
        pieces.append(piece)
        now += 0.001 + (piece[1] - piece[0]) / 200e6  # a millisecond for each request, and 200 MB/s
        streams.done(piece, now)
    assert streams.wanted == 1
    assert (MIB + FIRST, 100 * MIB) in pieces


def play_lucky(lucky: int, fast: float, slow: float) -> Streams:
    """A path whose first pieces meet no loss; every stream has the same rate, at first `fast` and then `slow`."""
    streams, now, number = Streams(((0, 400 * MIB),)), 0.0, 0
    out: list[tuple[float, tuple[int, int]]] = []
    while streams.left or out:
        while (piece := streams.take(now)) is not None:
            out.append((now + (piece[1] - piece[0]) / (fast if number < lucky else slow), piece))
            number += 1
        out.sort()
        now, piece = out.pop(0)
        streams.done(piece, now)
    return streams


@pytest.mark.parametrize("lucky", [1, 2, 5, 13, 40])
def test_a_measurement_that_was_lucky_is_not_the_last_word(lucky: int) -> None:
    assert play_lucky(lucky, fast=1.5e6, slow=0.2e6).wanted == STREAMS


def test_the_last_pieces_are_small_so_that_the_streams_end_together() -> None:
    pieces, peak = run(Streams(((0, 200 * MIB),)), lambda _: 1e6)
    assert peak == STREAMS
    assert all(stop - start <= 2 * LEAST for start, stop in pieces[-STREAMS // 2 :])
