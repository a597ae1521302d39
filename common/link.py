"""How fast the line to the coordinator is: what one stream carries each way, and how long the smallest call takes.

    latency ◀── the median of a few empty calls
    down, up ◀── bodies that grow until one takes a good part of the time for it, or is the largest possible

Pure: whoever measures passes the two calls that move bytes, and a clock.
"""

import statistics
from collections.abc import Callable

from common.messages import Link

LARGEST = 16 << 20  # bytes that one probe may have: a seventh of a second of a line with 1 Gbit/s
SMALLEST = 64 << 10  # bytes that each measurement begins with: half a second of a line with 1 Mbit/s
GROWTH = 4
EMPTY_CALLS = 5
BUDGET_S = 1.0  # for each direction, about; a line below 0.5 Mbit/s takes the time of the smallest body

Carry = Callable[[int], None]
"""Moves so many bytes one way, with one call, and returns when they are over."""


def measure(down: Carry, up: Carry, clock: Callable[[], float], *, budget_s: float = BUDGET_S) -> Link:
    """Measure a line by using it.

    Args:
        down: from the coordinator.
        up: to the coordinator.
        clock: monotonic seconds.
        budget_s: seconds for each direction, about.
    """
    down(0)  # the connection is made by this
    latency_s = statistics.median(_took(down, 0, clock) for _ in range(EMPTY_CALLS))
    return Link(
        down=_rate(down, clock, latency_s, budget_s), up=_rate(up, clock, latency_s, budget_s), latency_s=latency_s
    )


def _rate(carry: Carry, clock: Callable[[], float], latency_s: float, budget_s: float) -> float:
    """Bytes a second of the last and largest body: the first ones wait for the line's windows to open."""
    size, left = SMALLEST, budget_s
    while True:
        took = max(_took(carry, size, clock), 1e-6)  # a clock may not have moved
        rate = size / max(took - latency_s, took / 2)  # the call itself is no part of it, unless that is all there is
        left -= took
        larger = int(min(size * GROWTH, LARGEST, rate * left))
        if larger < 2 * size:
            return rate
        size = larger


def _took(carry: Carry, size: int, clock: Callable[[], float]) -> float:
    began = clock()
    carry(size)
    return clock() - began
