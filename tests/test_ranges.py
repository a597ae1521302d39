"""Byte ranges: merging, gaps, and the two ways over the wire."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import BadRequestError
from common.ranges import Ranges, content_range, format_ranges, gaps, parse_ranges, with_range

SIZE = 60
PIECES = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=25)
HELD = st.builds(lambda pieces: hold(pieces), PIECES)


def hold(pieces: list[tuple[int, int]]) -> Ranges:
    held: Ranges = ()
    for start, stop in pieces:
        held = with_range(held, start, stop)
    return held


def members(held: Ranges) -> set[int]:
    return {number for start, stop in held for number in range(start, stop)}


@given(PIECES)
@settings(deadline=None)
def test_ranges_hold_exactly_the_bytes_put_in_whatever_the_order(pieces: list[tuple[int, int]]) -> None:
    assert members(hold(pieces)) == {number for start, stop in pieces for number in range(start, stop)}


@given(PIECES)
@settings(deadline=None)
def test_ranges_always_ascend_with_a_gap_between_any_two(pieces: list[tuple[int, int]]) -> None:
    held = hold(pieces)
    edges = [edge for pair in held for edge in pair]
    assert edges == sorted(set(edges))


@given(HELD)
@settings(deadline=None)
def test_gaps_are_exactly_what_is_not_held(held: Ranges) -> None:
    missing = gaps(held, SIZE)
    assert members(missing) == set(range(SIZE)) - members(held)
    assert gaps(missing, SIZE) == held


@given(HELD)
@settings(deadline=None)
def test_ranges_come_back_from_their_text(held: Ranges) -> None:
    assert parse_ranges(format_ranges(held)) == held


def test_the_text_is_inclusive_at_both_ends() -> None:
    assert format_ranges(((0, 4194304), (8388608, 12582912))) == "0-4194303,8388608-12582911"
    assert format_ranges(()) == ""


def test_blanks_after_a_comma_are_allowed() -> None:
    assert parse_ranges("0-0, 2-3") == ((0, 1), (2, 4))


@pytest.mark.parametrize(
    "text", ["5", "3-2", "0-4,3-9", "0-4,5-9", "8-9,0-4", "0-4,", "-5", "a-b", "0-٣", "1-" + "9" * 19]
)
def test_a_text_that_is_no_list_of_ranges_is_refused(text: str) -> None:
    with pytest.raises(BadRequestError, match="no list of byte ranges"):
        parse_ranges(text)


@given(st.text(alphabet="0123456789-, x", max_size=20))
@settings(deadline=None)
def test_any_text_is_either_refused_or_read_to_ordered_ranges(text: str) -> None:
    try:
        held = parse_ranges(text)
    except BadRequestError:
        return
    edges = [edge for pair in held for edge in pair]
    assert edges == sorted(set(edges))


def test_a_content_range_names_the_last_byte_not_the_one_after() -> None:
    assert content_range(0, 500, 1234) == "bytes 0-499/1234"
