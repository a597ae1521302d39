"""Token buckets: so much at once, and so much a second from then on, for each caller.

Pure: the caller passes `now` in monotonic seconds. A full bucket is as good as none, so only those that somebody drew
from lately are kept. Where more callers draw than the table holds, those that came last share one bucket: forgetting a
bucket that is not full would forgive whoever emptied it.
"""

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K")

IPV6_NET = 64  # bits: what one household or one rented machine has at least


@dataclass(frozen=True)
class Rate:
    """What one caller may draw."""

    burst: float  # at once, from a full bucket; above 0
    a_second: float  # that a bucket is filled by; above 0


@dataclass
class Buckets(Generic[K]):
    """The buckets of many callers. To be used on one thread."""

    rate: Rate
    most: int  # callers with a bucket of their own
    _drawn: OrderedDict[K, tuple[float, float]] = field(default_factory=OrderedDict)  # level and when, the oldest first
    _shared: tuple[float, float] | None = None  # of all others

    def take(self, caller: K, now: float, amount: float = 1.0) -> float:
        """Draw from a caller's bucket, if so much is in it.

        Args:
            caller: whose.
            now: monotonic seconds.
            amount: at most `rate.burst`, or it can never be had.

        Returns:
            0.0: drawn. Else nothing was, and in so many seconds it will be in it, if nobody draws meanwhile.
        """
        own = self._makes_room_for(caller, now)
        before = self._drawn.get(caller) if own else self._shared
        level = self._level(before, now)
        if level < amount:
            return (amount - level) / self.rate.a_second
        after = (level - amount, now)
        if own:
            self._drawn[caller] = after
            self._drawn.move_to_end(caller)
        else:
            self._shared = after
        return 0.0

    def left(self, caller: K, now: float) -> float:
        """What a caller could draw now. Draws nothing."""
        return self._level(self._drawn.get(caller) if self._has_own(caller) else self._shared, now)

    def __len__(self) -> int:
        return len(self._drawn)

    def _has_own(self, caller: K) -> bool:
        return caller in self._drawn or len(self._drawn) < self.most

    def _makes_room_for(self, caller: K, now: float) -> bool:
        """Whether this caller has a bucket of its own; the oldest that are full again make way for it."""
        while caller not in self._drawn and len(self._drawn) >= self.most:
            oldest = next(iter(self._drawn))
            if self._level(self._drawn[oldest], now) < self.rate.burst:
                return False
            del self._drawn[oldest]
        return True

    def _level(self, drawn: tuple[float, float] | None, now: float) -> float:
        if drawn is None:
            return self.rate.burst
        level, at = drawn
        return min(self.rate.burst, level + max(now - at, 0.0) * self.rate.a_second)


def network_of(address: str) -> str:
    """What an address is counted as: itself, or with IPv6 its /64, in which one machine has as many as it likes.

    What is no address, as on a Unix socket, is counted as the text that it is.
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, IPV6_NET), strict=False))
