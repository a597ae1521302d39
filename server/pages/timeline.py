"""A round as bars: for each worker when it fetched, trained, sent, and how long it then waited for the others. Pure.

    round opens ─┬─ (no work yet) ─┬─ fetch ─┬─ train ─┬─ send ─┬─ wait ─┬─ the set is decided

What a worker spends between hand-out and hand-in beside training is known only as a whole. It is split by the worker's
measured line: what its bytes need to be sent is `send`, all else `fetch`. Without a measured line all of it is `fetch`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.messages import Link
from server.pages import words
from server.pages.history import Attempt, Detail

WIDE = 1000.0  # the units of a row
LEAST = 2.0  # units: what happened is seen, however short it was
SHOWN = 40  # rows; the slowest are among them


@dataclass(frozen=True)
class Bar:
    """A stretch of a row."""

    kind: str  # fetch, train, send, wait, work (under way), back (given back)
    x: float
    width: float
    text: str


@dataclass
class Line:
    """A worker's row."""

    name: str
    last: bool = False  # the one that the others waited for
    bars: list[Bar] = field(default_factory=list)
    fetch: float = 0.0  # seconds
    train: float = 0.0
    send: float = 0.0
    wait: float = 0.0
    samples: int = 0
    ended: float = 0.0
    under_way: bool = False
    back: str = ""  # why it gave back

    @property
    def words(self) -> str:
        """The row for those who do not see it."""
        parts = [("fetch", self.fetch), ("train", self.train), ("send", self.send), ("wait", self.wait)]
        return ", ".join(f"{name} {words.duration(value)}" for name, value in parts if value)


@dataclass(frozen=True)
class Picture:
    """A round, drawn."""

    round: int
    seconds: float  # that the row's width stands for
    open: bool
    lines: tuple[Line, ...]
    more: int  # rows that are not shown
    averaging: float | None  # seconds from the decided set to the model


def draw(detail: Detail, names: Mapping[str, str], links: Mapping[str, Link | None], now: float) -> Picture:
    """One round.

    Args:
        detail: what is known of it.
        names: worker id -> its name.
        links: worker id -> its line, as it measured it.
        now: seconds since 1970.
    """
    decided = detail.frozen or detail.closed
    ends = [made.ended for made in detail.attempts.values() if made.ended is not None]
    stop = decided or max([now, *ends])
    whole = max(stop - detail.opened, 1e-3)
    lines: dict[str, Line] = {}
    for made in sorted(detail.attempts.values(), key=lambda one: one.began):
        name = made.result.worker_name if made.result else names.get(made.worker, made.worker)
        line = lines.setdefault(made.worker, Line(name))
        _add(line, made, detail.opened, stop, whole, links.get(made.worker))
    for line in lines.values():
        if not line.under_way and line.ended:
            line.wait = max(0.0, stop - line.ended)
            _bar(line, "wait", line.ended - detail.opened, stop - detail.opened, whole, "waits for the others")
    ordered = sorted(lines.values(), key=lambda line: (not line.under_way, -line.ended, line.name))
    if len(ordered) > 1 and not ordered[1].under_way:  # one alone is the last, or the only one that is not in yet
        ordered[0].last = True
    averaging = detail.closed - detail.frozen if detail.closed and detail.frozen else None
    return Picture(
        detail.round, whole, decided is None, tuple(ordered[:SHOWN]), max(0, len(ordered) - SHOWN), averaging
    )


def _add(line: Line, made: Attempt, opened: float, stop: float, whole: float, link: Link | None) -> None:
    began = max(made.began, opened)
    if made.ended is None:
        line.under_way, line.ended = True, stop
        _bar(line, "work", began - opened, stop - opened, whole, "under way")
        return
    ended = max(min(made.ended, stop), began)
    line.ended = max(line.ended, ended)
    if made.result is None:
        line.back = made.back.sentence if made.back else ""
        _bar(line, "back", began - opened, ended - opened, whole, "gave it back")
        return
    train = min(made.result.seconds, ended - began)
    beside = ended - began - train
    send = min(beside, made.result.bytes_up / link.up + link.latency_s) if link else 0.0
    fetch = beside - send
    line.fetch, line.train, line.send = line.fetch + fetch, line.train + train, line.send + send
    line.samples += made.result.samples
    at = began - opened
    for kind, length in (("fetch", fetch), ("train", train), ("send", send)):
        _bar(line, kind, at, at + length, whole, f"{kind} {words.duration(length)}")
        at += length


def _bar(line: Line, kind: str, start: float, stop: float, whole: float, text: str) -> None:
    if stop - start <= 0:
        return
    x = min(WIDE * start / whole, WIDE - LEAST)
    width = min(max(WIDE * (stop - start) / whole, LEAST), WIDE - x)
    line.bars.append(Bar(kind, round(x, 1), round(width, 1), text))
