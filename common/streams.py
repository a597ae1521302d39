"""How many streams a transfer gets and how large their pieces are: one where one will do, more where the path is bad.

Pure: no network, disk or clock; the caller passes `now` in monotonic seconds, and has a lock if several threads ask.

    first piece ──fast, or little is left──▶ one stream takes all the rest in one request
         └─slow──▶ 2 streams, then 4, 8, 16, doubled while that brings a fifth more; back by half when it does not

One TCP stream over a path of 80 ms with 1 % loss gives 1.7 of 20 Mbit/s: it takes every lost packet for a full line.
Several lose one packet at a time. On such a path a measurement is often lucky, so no judgement is the last one: the
rate is measured on, and where it turns out to be a fifth less than it was taken for, more streams are tried again.

A near path needs no second stream, however large the file: what makes it slow is the work of whoever shares the
machine, and streams would only be taken from them. While a connection gathers speed, the first piece takes some six
round trips: one that comes at `FAST` has a round trip of 9 ms at most.
"""

from dataclasses import dataclass, field

from common.ranges import Ranges

SMALL = 1 << 20  # bytes that go in one request, unmeasured
FIRST = 512 << 10  # bytes that measure; of one piece where a gap has as many
ENOUGH_S = 2.0  # a rest that one stream brings in less is left to it
FAST = 10e6  # bytes a second: a first piece that comes so fast comes from near, where one stream will do
PIECE_S = 3.0  # what a piece of a slow path is to take
LEAST, MOST = 256 << 10, 8 << 20  # bytes of such a piece
STREAMS = 16  # at most
GAIN = 1.2  # a doubling must bring so much more

Piece = tuple[int, int]
"""Bytes [start, stop)."""


@dataclass
class Streams:
    """The pieces of one transfer, handed to whichever stream asks; each byte of the gaps is handed out once."""

    gaps: Ranges
    wanted: int = 1  # streams
    rate: float | None = None  # bytes a second over all streams, as last measured
    _at: int = field(default=0, init=False)  # the gap that pieces are cut from
    _cut: int = field(default=0, init=False)  # bytes of it that were handed out
    _out: int = field(default=0, init=False)  # pieces under way
    _slow: bool = field(default=False, init=False)  # too slow for the rest to be left to one stream
    _growing: bool = field(default=False, init=False)  # the streams were doubled; whether it helped is being measured
    _ending: int = field(default=0, init=False)  # pieces of the time before there were fewer streams
    _since: float = field(default=0.0, init=False)  # monotonic seconds; the measurement under way began then
    _brought: int = field(default=0, init=False)  # bytes, since then
    _pieces: int = field(default=0, init=False)  # since then

    def __post_init__(self) -> None:
        # The largest first: a small piece measures how far it is, and not how wide.
        self.gaps = tuple(sorted(self.gaps, key=lambda gap: gap[0] - gap[1]))

    @property
    def left(self) -> int:
        """Bytes not handed out yet."""
        return sum(stop - start for start, stop in self.gaps[self._at :]) - self._cut

    def take(self, now: float) -> Piece | None:
        """The next piece for a stream that is free; None: nothing is left, or this stream is one too many, or must wait
        for the first measurement."""
        if self.left == 0 or self._out >= self.wanted:
            return None
        if self.rate is None and self._brought == 0:
            self._since = now
        start, stop = self.gaps[self._at]
        start += self._cut
        size = min(self._size(), stop - start)
        self._out += 1
        self._cut += size
        if start + size == stop:
            self._at, self._cut = self._at + 1, 0
        return start, start + size

    def _size(self) -> int:
        if self.rate is None:
            return SMALL if self.left <= SMALL else FIRST
        if not self._slow:
            return self.left
        # Towards the end smaller ones, so that the streams end together.
        size = min(self.rate * PIECE_S, self.left) / self.wanted
        return int(min(max(size, LEAST), MOST))

    def done(self, piece: Piece, now: float) -> None:
        """A stream has brought its piece."""
        self._out -= 1
        if self._ending > 0:
            self._ending -= 1
            self._begin(now)
            return
        self._brought += piece[1] - piece[0]
        self._pieces += 1
        if self.rate is None:
            if self._brought >= FIRST:
                rate = self._measure(now)
                self._slow = self._growing = rate < FAST and self.left > rate * ENOUGH_S
                self.wanted = 2 if self._slow else 1
        elif self._slow and self._pieces >= 2 * self.wanted:  # the first of each stream found it starting up
            self._judge(self.rate, self._measure(now))

    def _judge(self, before: float, rate: float) -> None:
        """More streams, fewer, or as many as there are."""
        worse = rate < before / GAIN  # than it was taken for: more streams alone do not make a path slower
        if self._growing and not worse and rate < before * GAIN:
            self._growing, self.wanted, self._ending = False, self.wanted // 2, self._out
        elif (self._growing or worse) and self.wanted < STREAMS:
            self._growing, self.wanted = True, self.wanted * 2
        else:
            self._growing = False

    def _measure(self, now: float) -> float:
        """The rate since the last measurement; the next one begins."""
        self.rate = self._brought / max(now - self._since, 1e-6)
        self._begin(now)
        return self.rate

    def _begin(self, now: float) -> None:
        self._since, self._brought, self._pieces = now, 0, 0
