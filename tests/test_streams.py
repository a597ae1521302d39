"""How a transfer is cut and how many streams it gets: each byte once, one stream on a good path, more on a bad one."""

from hypothesis import given, settings
from hypothesis import strategies as st

from common.ranges import with_range
from common.streams import FIRST, LEAST, MOST, SMALL, STREAMS, Streams

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
