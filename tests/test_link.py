"""Measuring a line: pure, on lines of which everything is known."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from common.link import BUDGET_S, LARGEST, SMALLEST, measure
from common.messages import Link


@dataclass
class Road:
    """A line with a rate each way, in bytes a second, in a time of its own."""

    down: float
    up: float
    latency_s: float
    now: float = 0.0
    sizes: list[int] = field(default_factory=list)
    hiccups: list[float] = field(default_factory=list)  # seconds that the next calls take longer

    def carry(self, size: int, rate: float) -> None:
        self.sizes.append(size)
        self.now += self.latency_s + size / rate + (self.hiccups.pop(0) if self.hiccups else 0.0)

    def measured(self) -> Link:
        return measure(
            lambda size: self.carry(size, self.down), lambda size: self.carry(size, self.up), lambda: self.now
        )


rates = st.floats(1e4, 2e9)
latencies = st.floats(0.0, 0.4)


@given(rates, rates, latencies)
def test_a_steady_line_is_measured_as_it_is(down: float, up: float, latency_s: float) -> None:
    link = Road(down, up, latency_s).measured()
    assert abs(link.latency_s - latency_s) < 1e-6
    for measured, true in ((link.down, down), (link.up, up)):
        lost_in_latency = latency_s > 20 * SMALLEST / true  # too fast to be seen behind so much of it
        assert measured <= true * 1.01
        assert measured >= true * 0.5 or lost_in_latency


@given(rates, rates, latencies)
def test_no_measurement_takes_long_or_sends_more_than_a_probe_may_have(
    down: float, up: float, latency_s: float
) -> None:
    road = Road(down, up, latency_s)
    road.measured()
    empty = 6 * latency_s
    slowest = 2 * latency_s + SMALLEST / down + SMALLEST / up  # at least one body each way
    assert road.now <= empty + slowest + 2 * (BUDGET_S + 6 * latency_s)
    assert max(road.sizes) <= LARGEST


def test_one_slow_call_of_several_is_no_latency() -> None:
    assert Road(1e6, 1e6, 0.01, hiccups=[0.0, 0.0, 3.0]).measured().latency_s < 0.011


def test_a_fast_line_is_measured_with_the_largest_body() -> None:
    road = Road(125e6, 125e6, 0.0)  # 1 Gbit/s
    road.measured()
    assert max(road.sizes) == LARGEST


def test_a_clock_that_stands_still_is_no_division_by_zero() -> None:
    link = measure(lambda _: None, lambda _: None, lambda: 7.0)
    assert link.latency_s == 0.0
    assert link.down > 0
