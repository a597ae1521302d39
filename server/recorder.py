"""What goes into the audit record as often as somebody likes: refused calls, fetched models, workers that return.

Nobody waits for such a row: it goes with the next transaction of the journal, or in one of its own some seconds later,
and after a power cut or `kill -9` those seconds may lack. A flood cannot fill the disk (server.tally).
"""

import logging
from collections.abc import Callable
from dataclasses import replace

from common.errors import DiskFullError, LydianError
from server.audit import CALLER, Event
from server.auth import redact
from server.store import Journal
from server.tally import Tally

SOON_S = 5.0  # that a row waits for a transaction at most
SHOWN = 200  # characters of a path
WORKERS = 1_024  # that are told apart when they return within one window

log = logging.getLogger("lydian.audit")


class Recorder:
    """Feeds the record of one journal. To be used on the event loop, and to be ticked about once a second."""

    def __init__(self, journal: Journal, clock: Callable[[], float]) -> None:
        self._journal, self._clock = journal, clock
        self._tallies = {name: Tally[Event]() for name in ("call.refused", "model.pulled")}
        self._tallies["worker.returned"] = Tally[Event](most=WORKERS)
        self._since: float | None = None  # when the oldest row began to wait

    def refused(self, method: str, route: str, path: str, error: LydianError) -> None:
        """A call was refused: 401 or 403.

        Args:
            method: of the call.
            route: the path of its rule, such as /v1/jobs/{job}: calls that differ in the rest are of one kind.
            path: that was called.
            error: the answer.
        """
        result, caller = f"{error.status} {error.code}", CALLER.get()
        event = Event(caller, "call.refused", redact(f"{method} {path[:SHOWN]}"), result, redact(str(error)))
        self._count((method, route, result, caller), event)

    def pulled(self, job: str, which: str, digest: str) -> None:
        """A person fetched a model, or a range of it."""
        caller = CALLER.get()
        self._count((job, digest, caller), Event(caller, "model.pulled", job, "ok", f"{which}: {digest}"))

    def returned(self, worker: str) -> bool:
        """A worker introduces itself again. Whether that is to be written down at once; else it is counted."""
        event = Event(CALLER.get(), "worker.returned", worker)
        return self._tallies[event.action].add(worker, event, self._clock())

    def _count(self, kind: tuple[object, ...], event: Event) -> None:
        if self._tallies[event.action].add(kind, event, self._clock()):
            self._soon(event)

    def _soon(self, event: Event) -> None:
        if not self._journal.record_soon(event):
            log.warning("not in the audit record, which cannot be written: %s %s", event.action, event.object)
        self._since = self._clock() if self._since is None else self._since

    def tick(self) -> None:
        """Write down what is due.

        Raises:
            LydianError: the journal cannot be written, for another reason than a full disk: then it waits on.
        """
        now = self._clock()
        for tally in self._tallies.values():
            if tally.due(now):
                self._end(tally)
        if self._since is not None and now - self._since >= SOON_S:
            self._write()

    def close(self) -> None:
        """Write down everything."""
        for tally in self._tallies.values():
            self._end(tally)
        try:
            self._write()
        except LydianError as error:
            log.warning("the last rows of the audit record are not in it: %s", error)

    def _end(self, tally: Tally[Event]) -> None:
        for event, more, others in tally.end():
            calls = "returns" if event.action == "worker.returned" else "calls"
            what = f"more {calls} that were not told apart" if others else f"more such {calls}"
            self._soon(replace(event, object="others" if others else event.object, detail=f"{more} {what}"))

    def _write(self) -> None:
        try:
            self._journal.record_waiting()
        except DiskFullError:
            return
        self._since = None
