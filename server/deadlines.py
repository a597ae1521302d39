"""When a worker's update is expected, from what its own updates took before; and how it is said.

Pure. Nobody guesses a timeout: the time comes from the worker's own history at this job, scaled to its shard, transfers
and waiting included. It ends no lease and no work: a worker that overruns it *falls behind*, is told so, and a round
that has its quorum does not wait for it.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from common.facts import Absent
from common.pace import Took

DEVIATIONS = 3.0  # median absolute deviations above the median that are still expected
LEAST_SPREAD = 0.1  # share of the median that the deviation is taken for at least: a few equal times are no certainty


@dataclass(frozen=True)
class Due:
    """A shard that a worker has, and when its update is expected."""

    worker: str  # its id
    name: str
    since: float  # monotonic seconds of the hand-out
    within: float | None  # seconds; None: nothing is known yet

    @property
    def at(self) -> float | None:
        """Monotonic seconds until which the update is expected."""
        return None if self.within is None else self.since + self.within

    def is_behind(self, now: float) -> bool:
        """Whether the worker has overrun its own time."""
        return self.at is not None and now > self.at

    def words(self, now: float) -> str:
        """How it stands, for people."""
        if self.within is None:
            return f"{self.name}, {now - self.since:.0f} s so far"
        left = self.since + self.within - now
        if left >= 0:
            return f"{self.name}, expected in {math.ceil(left)} s"
        return f"{self.name} falls behind: {now - self.since:.0f} s, expected within {math.ceil(self.within)} s"

    def absent(self, shard: int, now: float) -> Absent:
        """For the record of a round that closed without the update."""
        passed = f"{now - self.since:.0f} s"
        if self.is_behind(now):
            why = f"fell behind: {passed}, expected within {math.ceil(self.within or 0.0)} s"
        else:
            why = f"was not done after {passed}, when the quorum was in and the grace over"
        return Absent(worker=self.worker, worker_name=self.name, shard=shard, why=why)


def expected_s(updates: Sequence[Took], samples: int | None) -> float | None:
    """Seconds from hand-out to hand-in within which a worker's update is expected: median + k MAD of its history.

    Each earlier time is scaled to the work at hand: its training by the samples, its transfers and waiting not.

    Args:
        updates: what its last updates took; those of which the coordinator did not see both ends say nothing.
        samples: it will go through, every pass counted; None: its time does not follow from that, or it is not known.

    Returns:
        None when there is no such update.

    Source: Leys et al. 2013, Detecting outliers: do not use standard deviation around the mean, use absolute deviation
    around the median; without its factor 1.4826, which is that of normal times.
    """
    scaled = [
        took.overhead_s + took.training_s * (1.0 if samples is None else samples / took.samples)
        for took in updates
        if took.overhead_s is not None
    ]
    if not scaled:
        return None
    median = statistics.median(scaled)
    spread = statistics.median(abs(each - median) for each in scaled)
    return median + DEVIATIONS * max(spread, LEAST_SPREAD * median)
