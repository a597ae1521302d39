"""What time it is, for tokens that count until a day: a clock that was set wrong makes none of them end.

Pure: both clocks come in.

    running    what was reached before + the time that this process runs       never too late
    since      the machine's clock when this process began + the same           not moved by a clock that is set
    now        max(running, min(machine's clock, since))

A clock that leaps ahead while the coordinator runs is not followed, and what it says is never kept: set right, or once
the coordinator was started anew, everything is as before. A clock that is set back brings nothing to life again; it
lets a token count longer by no more than the coordinator has stood still since the token was made.
"""

from collections.abc import Callable
from datetime import UTC, datetime


class Calendar:
    """Seconds since 1970, as far as they can be relied on."""

    def __init__(self, wall: Callable[[], float], clock: Callable[[], float], reached: float | None) -> None:
        """Begin.

        Args:
            wall: the machine's clock, in seconds since 1970; may leap.
            clock: monotonic seconds.
            reached: what `reached` said last, perhaps in an earlier process; None: nobody asked yet.
        """
        self._wall, self._clock = wall, clock
        self._began = clock()
        self._since = wall()
        self._reached = self._since if reached is None else reached

    def now(self) -> float:
        """The time."""
        ran = self._clock() - self._began
        return max(self._reached + ran, min(self._wall(), self._since + ran))

    def reached(self) -> float:
        """A time that has passed for certain, to be kept for the next process."""
        return self._reached + self._clock() - self._began


def shown(seconds: float) -> str:
    """A time in ISO 8601, UTC, to the second."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
