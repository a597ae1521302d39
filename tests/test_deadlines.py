"""When updates are expected, and how that is said: pure calls."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.pace import Took
from server.deadlines import Due, expected_s

LATE = Due("w1", "gpu2", since=100.0, within=40.0)


def test_without_a_history_nothing_is_expected() -> None:
    assert expected_s((), 10) is None
    assert expected_s((Took(10, 1.0, None),), 10) is None


def test_training_scales_with_the_samples_and_transfers_do_not() -> None:
    assert expected_s((Took(100, 10.0, 2.0),), 200) == pytest.approx(22.0 * 1.3)
    assert expected_s((Took(100, 10.0, 2.0),), None) == pytest.approx(12.0 * 1.3)


def test_a_worker_whose_times_spread_is_given_more_time() -> None:
    steady = [Took(10, seconds, 0.0) for seconds in (10.0, 10.0, 10.0, 10.0, 90.0)]
    spread = [Took(10, seconds, 0.0) for seconds in (4.0, 7.0, 10.0, 13.0, 90.0)]
    assert expected_s(steady, 10) == pytest.approx(13.0)
    assert expected_s(spread, 10) == pytest.approx(10.0 + 3 * 3.0)


@given(st.lists(st.floats(0.01, 1e5), min_size=1, max_size=20), st.integers(1, 10**9))
def test_most_of_the_history_was_within_what_is_expected(seconds: list[float], samples: int) -> None:
    expected = expected_s([Took(samples, each, 0.0) for each in seconds], samples)
    assert expected is not None
    assert sum(each <= expected * (1 + 1e-9) for each in seconds) * 2 >= len(seconds)


def test_what_is_expected_and_what_is_overdue_is_said_in_words() -> None:
    assert LATE.words(100.0) == "gpu2, expected in 40 s"
    assert LATE.words(139.5) == "gpu2, expected in 1 s"
    assert LATE.words(162.0) == "gpu2 falls behind: 62 s, expected within 40 s"
    assert (LATE.is_behind(140.0), LATE.is_behind(140.1)) == (False, True)
    unknown = Due("w1", "gpu2", since=100.0, within=None)
    assert unknown.words(103.0) == "gpu2, 3 s so far"
    assert not unknown.is_behind(1e9)


def test_the_record_of_a_round_says_why_an_update_is_not_in_it() -> None:
    behind = LATE.absent(3, 162.0)
    assert (behind.worker, behind.worker_name, behind.shard) == ("w1", "gpu2", 3)
    assert behind.why == "fell behind: 62 s, expected within 40 s"
    assert LATE.absent(3, 112.0).why == "was not done after 12 s, when the quorum was in and the grace over"
