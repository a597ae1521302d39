"""Who watches: from the coordinator's decisions to streams of server-sent events.

    coordinator ──publish, touch──▶ Hub ──▶ Subscription, one a stream ──▶ follow ──▶ HTTP

The journal keeps the facts; the hub only says that there are new ones. So a stream that reads too slowly costs a small
queue and loses nothing: when that is full it is emptied, and the stream reads on in the journal after its last id. All
of it runs on the event loop; nothing here waits for a reader.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Self

from server.store import Journal, StoredFact

QUEUE = 100  # facts that wait for one stream
PAGE = 100  # facts a stream takes from the journal before others get their turn
REST = 50  # times as long as finding a situation took, until it is found again: of a large fleet it is long
KEEPALIVE_S = 15.0  # of silence; shorter than proxies and clients wait
KEEPALIVE = b": still here\n\n"

_LINE_BREAKS = {ord(mark): f"\\u{ord(mark):04x}" for mark in "\x85\u2028\u2029"}


@dataclass(frozen=True)
class Touched:
    """The present situation of a job changed: its state, its workers, their progress."""

    job: str


@dataclass(frozen=True)
class Lagged:
    """More facts came than the queue holds: read the journal after the last id that was seen."""


Item = StoredFact | Touched | Lagged


class Subscription:
    """What happened since `Hub.subscribe`: an async iterator, for one reader, that ends when the hub or it is closed.

    Facts come in the order of their ids, and before word that a situation changed; that word comes once, however often
    the situation did change meanwhile. Made by `Hub.subscribe`.
    """

    def __init__(self, job: str | None, queue: int, leave: Callable[["Subscription"], None]) -> None:
        self.job = job  # None: all
        self._queue = queue
        self._leave = leave
        self._facts: deque[StoredFact] = deque()
        self._touched: dict[str, None] = {}  # jobs; a set that keeps its order
        self._lagged = False
        self._closed = False
        self._changed = asyncio.Event()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Item:
        """The next item. Giving up the wait loses nothing."""
        while True:
            if (item := self._next()) is not None:
                return item
            if self._closed:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()

    def situation_or_before(self) -> Item:
        """Word that a situation changed, for who put it off; what goes before that, as long as there is any."""
        return self._next() or Touched(self.job or "")

    def _next(self) -> Item | None:
        if self._lagged:
            self._lagged = False
            return Lagged()
        if self._facts:
            return self._facts.popleft()
        if self._touched:
            job = next(iter(self._touched))
            del self._touched[job]
            return Touched(job)
        return None

    def close(self) -> None:
        """Take nothing more; what has come can still be read. Twice is once."""
        self._closed = True
        self._leave(self)
        self._changed.set()

    def _publish(self, stored: StoredFact) -> None:
        if self.job not in (None, stored.job) or self._lagged:
            return
        if len(self._facts) == self._queue:
            self._facts.clear()
            self._lagged = True
        else:
            self._facts.append(stored)
        self._changed.set()

    def _touch(self, job: str) -> None:
        if self.job in (None, job):
            self._touched[job] = None
            self._changed.set()


class Hub:
    """Passes on what happens to whoever subscribed."""

    def __init__(self, queue: int = QUEUE) -> None:
        """Make a hub whose subscriptions hold at most `queue` facts each."""
        self._queue = queue
        self._subscriptions: set[Subscription] = set()
        self._closed = False

    def publish(self, stored: StoredFact) -> None:
        """Pass on a fact that is in the journal."""
        for subscription in self._subscriptions:
            subscription._publish(stored)

    def touch(self, job: str) -> None:
        """Say that a job's present situation changed."""
        for subscription in self._subscriptions:
            subscription._touch(job)

    def subscribe(self, job: str | None) -> Subscription:
        """Everything from now on, of one job or of all (None). To be closed by the caller."""
        subscription = Subscription(job, self._queue, self._subscriptions.discard)
        self._subscriptions.add(subscription)
        if self._closed:
            subscription.close()
        return subscription

    def close(self) -> None:
        """End every subscription, and those to come at once."""
        self._closed = True
        for subscription in list(self._subscriptions):
            subscription.close()


async def follow(
    hub: Hub, journal: Journal, job: str | None, after: int, situation: Callable[[], str | None]
) -> AsyncIterator[bytes]:
    """A stream of server-sent events: every fact once, those of the past and those to come, and where things stand.

    Args:
        hub: where facts are published after they went into the journal.
        journal: where they are read from, at first and when this stream lags.
        job: None for the facts of all jobs.
        after: id of the last fact that the reader has; 0 for none.
        situation: the present situation as JSON, sent without an id whenever it reads differently than before, but no
            more often than costs a fiftieth of this process; None when nothing more will happen: the stream ends, once
            every fact has been sent.
    """
    shown: str | None = None
    owed, rests_until = False, 0.0  # whether a situation is to be told, and when it may be
    with closing(hub.subscribe(job)) as news:
        item: Item = Lagged()
        while True:
            if isinstance(item, Lagged):
                while page := list(journal.facts(after=after, job=job, limit=PAGE)):
                    for stored in page:
                        yield sse(stored.json(), id=stored.id)
                    after = page[-1].id
                    await asyncio.sleep(0)  # others' turn, should the reader be fast
            elif isinstance(item, StoredFact) and item.id > after:
                yield sse(item.json(), id=item.id)
                after = item.id
            owed = owed or not isinstance(item, StoredFact)
            if not isinstance(item, StoredFact) and (began := time.monotonic()) >= rests_until:
                present = situation()  # now every fact has been sent
                if present is None:
                    return
                owed, ended = False, time.monotonic()
                rests_until = ended + REST * (ended - began)
                if present != shown:
                    yield sse(present)
                    shown = present
            try:
                async with asyncio.timeout(max(rests_until - time.monotonic(), 0.0) if owed else KEEPALIVE_S):
                    item = await anext(news)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if owed:
                    item = news.situation_or_before()
                else:
                    yield KEEPALIVE
                    item = Lagged()


def sse(data: str, event: str | None = None, id: int | None = None) -> bytes:  # noqa: A002 - the field's name
    """One server-sent event.

    Args:
        data: JSON. Characters that only some readers take for the end of a line are escaped.
        event: its type, one line; None: `message`.
        id: what the reader names as Last-Event-ID when it comes back.

    Raises:
        ValueError: the event's type is not one line.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html, section 9.2.6.
    """
    lines = [f"data: {line}" for line in data.translate(_LINE_BREAKS).splitlines() or [""]]
    if event is not None:
        if event.splitlines() != [event]:
            raise ValueError(f"the type of an event is one line, not {event!r}")
        lines.insert(0, f"event: {event}")
    if id is not None:
        lines.insert(0, f"id: {id}")
    return ("\n".join(lines) + "\n\n").encode()
