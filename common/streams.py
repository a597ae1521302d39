"""How many streams a transfer gets and how large their pieces are: one where one will do, more where the path is bad.

Pure: no network, disk or clock; the caller passes `now` in monotonic seconds, and has a lock if several threads ask.

    first piece ──fast──▶ one stream takes all the rest in one request
         └─slow──▶ 2 streams, then 4, 8, 16, doubled while that brings a fifth more; back by half when it does not

One TCP stream over a path of 80 ms with 1 % loss gives 1.7 of 20 Mbit/s: it takes every lost packet for a full line.
Several lose one packet at a time.
"""

from dataclasses import dataclass, field

from common.ranges import Ranges

SMALL = 1 << 20  # bytes that go in one request, unmeasured
FIRST = 512 << 10  # bytes of the piece that measures
ENOUGH_S = 2.0  # a rest that one stream brings in less is left to it
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
    _growing: bool = field(default=False, init=False)
    _since: float = field(default=0.0, init=False)  # monotonic seconds; the measurement under way began then
    _brought: int = field(default=0, init=False)  # bytes, since then
    _pieces: int = field(default=0, init=False)  # since then

    @property
    def left(self) -> int:
        """Bytes not handed out yet."""
        return sum(stop - start for start, stop in self.gaps[self._at :]) - self._cut

    def take(self, now: float) -> Piece | None:
        """The next piece for a stream that is free; None: nothing is left, or this stream is one too many, or must wait
        for the first measurement."""
        if self.left == 0 or (self._out > 0 and self._out >= self.wanted):
            return None
        if self._out == 0 and self.rate is None:
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
        if self.wanted == 1 and not self._growing:
            return self.left
        each = self.rate / self.wanted
        return int(min(max(each * PIECE_S, LEAST), MOST))

    def done(self, piece: Piece, now: float) -> None:
        """A stream has brought its piece."""
        self._out -= 1
        self._brought += piece[1] - piece[0]
        self._pieces += 1
        if self.rate is None:
            self.rate = self._measured(now)
            self._growing = self.wanted < STREAMS and self.left > self.rate * ENOUGH_S
            self._begin(now, self.wanted * 2 if self._growing else self.wanted)
        elif self._growing and self._pieces >= 2 * self.wanted:  # the first of each stream found it starting up
            self._grow(now)

    def _grow(self, now: float) -> None:
        before, self.rate = self.rate or 0.0, self._measured(now)
        if self.rate < before * GAIN:
            self._growing = False
            self._begin(now, max(self.wanted // 2, 1))
        elif self.wanted >= STREAMS:
            self._growing = False
        else:
            self._begin(now, self.wanted * 2)

    def _measured(self, now: float) -> float:
        return self._brought / max(now - self._since, 1e-6)

    def _begin(self, now: float, wanted: int) -> None:
        self.wanted, self._since, self._brought, self._pieces = wanted, now, 0, 0
