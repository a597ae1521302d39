"""Token buckets: never more than the burst and the rate allow, and never forgiven."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.buckets import Buckets, Rate, network_of

RATE = Rate(burst=3, a_second=2)


def test_a_burst_is_had_at_once_and_then_as_much_as_the_rate_brings() -> None:
    buckets: Buckets[str] = Buckets(RATE, 10)
    assert [buckets.take("a", 0.0) for _ in range(5)] == [0, 0, 0, 0.5, 0.5]
    assert buckets.take("a", 0.5) == 0
    assert buckets.take("a", 0.5) == 0.5
    assert [buckets.take("a", 100.0) for _ in range(4)] == [0, 0, 0, 0.5]  # no more than a burst is saved up
    assert buckets.take("b", 0.0) == 0


def test_an_amount_is_drawn_whole_or_not_at_all() -> None:
    buckets: Buckets[str] = Buckets(RATE, 10)
    assert buckets.take("a", 0.0, 2.5) == 0
    assert buckets.take("a", 0.0, 1.0) == 0.25
    assert (buckets.left("a", 0.0), buckets.left("a", 0.25), buckets.left("b", 0.0)) == (0.5, 1.0, 3.0)
    assert buckets.take("a", 0.25, 1.0) == 0


def test_a_clock_that_goes_back_gives_nothing_away() -> None:
    buckets: Buckets[str] = Buckets(RATE, 10)
    for _ in range(3):
        assert buckets.take("a", 10.0) == 0
    assert buckets.take("a", 5.0) == 0.5


def test_beyond_the_table_all_share_one_bucket_and_no_bucket_is_forgotten_before_it_is_full() -> None:
    buckets: Buckets[str] = Buckets(RATE, 2)
    for caller in ("a", "b"):
        for _ in range(3):
            assert buckets.take(caller, 0.0) == 0
    assert [buckets.take(caller, 0.0) for caller in "cdefg"] == [0, 0, 0, 0.5, 0.5]
    assert buckets.left("h", 0.0) == 0
    assert buckets.take("a", 0.0) > 0
    assert len(buckets) == 2
    assert buckets.take("c", 1.5) == 0  # a's is full again: it makes way
    assert buckets.left("c", 1.5) == 2
    assert buckets.left("a", 1.5) == 3  # and shares, where nobody has drawn since


@given(
    st.lists(st.tuples(st.sampled_from("abcde"), st.floats(0, 2), st.sampled_from([0.5, 1.0, 3.0])), max_size=80),
    st.integers(1, 6),
)
def test_nobody_ever_draws_more_than_a_burst_and_the_rate_since_any_moment(
    draws: list[tuple[str, float, float]], most: int
) -> None:
    buckets: Buckets[str] = Buckets(RATE, most)
    now, had = 0.0, list[tuple[str, float, float]]()
    for caller, pause, amount in draws:
        now += pause
        wait_s = buckets.take(caller, now, amount)
        assert wait_s >= 0
        assert len(buckets) <= most
        if wait_s == 0:
            had.append((caller, now, amount))
    shares = 2 if most < 5 else 1  # a caller may have shared the common bucket before it had its own
    for caller in "abcde":
        own = [(at, amount) for who, at, amount in had if who == caller]
        for first, (since, _) in enumerate(own):
            drawn = 0.0
            for at, amount in own[first:]:
                drawn += amount
                assert drawn <= shares * (RATE.burst + (at - since) * RATE.a_second) + 1e-6


@given(st.floats(0, 10), st.integers(0, 20))
def test_after_the_wait_that_was_told_it_is_drawn(began: float, before: int) -> None:
    buckets: Buckets[str] = Buckets(RATE, 10)
    for _ in range(before):
        buckets.take("a", began)
    wait_s = buckets.take("a", began)
    assert wait_s == 0 or buckets.take("a", began + wait_s + 1e-9) == 0


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"), ("::ffff:192.0.2.1", "192.0.2.1"), ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"), ("fe80::1%eth0", "fe80::/64"), ("", ""), ("/run/x", "/run/x"),
    ],
)  # fmt: skip
def test_an_address_counts_for_itself_and_one_of_ipv6_for_its_network(address: str, network: str) -> None:
    assert network_of(address) == network
