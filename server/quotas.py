"""What one caller may have: calls a second, things at once, bytes in the journal. Refused is what goes beyond.

    every call ──server.gate──▶ Quotas.call ──▶ 429, with the seconds after which one more call is possible
    some calls ──their routes──▶ uploading, streaming, admit_job, admit_worker ──▶ 429
    reports ──▶ cut, may_have_work: what a worker writes into the journal without having trained anything

Kept in memory and by this process's clock alone: after a restart everybody begins anew, but for what lies on the disk,
which is counted again. Each table is bounded. What is refused is counted by its reason for /metrics, and logged: the
first time of a caller, then at most once a minute.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

from common.errors import TooLargeError, TooManyError
from common.messages import Registration, Submitter
from common.streams import STREAMS
from server.buckets import Buckets, Rate, network_of
from server.settings import Settings
from server.tokens import Principal
from server.uploads import Key

Reason = Literal[
    "host", "origin", "calls", "stranger_calls", "connections", "uploads", "streams", "jobs", "workers", "reports",
    "hand_backs",
]  # fmt: skip
REASONS: tuple[Reason, ...] = get_args(Reason)

TOKENS = 65_536  # that have a bucket of their own
STRANGERS = 4_096  # networks, likewise
TOLD = 256  # callers whose refusals are logged each by itself
TOLD_EVERY_S = 60.0
STREAMS_A_WORKER = 2 * STREAMS  # of one upload: those of a line that broke hang for a while beside the new ones
HOUR_S = 3_600.0
REGISTRATION = 256 << 10  # bytes of JSON that a worker is described in
CUT_TO = 1_000  # characters that are left of a report where a worker has written too much
HAND_BACKS = Rate(burst=200, a_second=1.0)  # attempts of one worker that end without a result
AGAIN_S = 1.0  # when to ask again for what is had by turns

log = logging.getLogger("lydian.limits")


class Refusals:
    """What was refused: how often, for /metrics, and a line in the log now and then."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.counts: dict[Reason, int] = dict.fromkeys(REASONS, 0)
        self._clock = clock
        self._lines: Buckets[tuple[Reason, str]] = Buckets(Rate(1, 1 / TOLD_EVERY_S), TOLD)
        self._unsaid: Counter[Reason] = Counter()

    def note(self, reason: Reason, caller: str, why: object) -> None:
        """Count a refusal; log it, unless the same was said of this caller within a minute."""
        self.counts[reason] += 1
        if self._lines.take((reason, caller), self._clock()) > 0:
            self._unsaid[reason] += 1
            return
        unsaid = self._unsaid.pop(reason, 0)
        log.warning("%s: %s%s", caller, why, f" (and {unsaid} times more of this kind)" if unsaid else "")


class Quotas:
    """The limits of one coordinator, and what its callers have of them now. To be used on the event loop."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self._settings, self._clock = settings, clock
        self.refusals = Refusals(clock)
        known = Rate(settings.calls_burst, settings.calls_per_s)
        unknown = Rate(settings.stranger_calls_burst, settings.stranger_calls_per_s)
        self._known: Buckets[str] = Buckets(known, TOKENS)
        self._unknown: Buckets[str] = Buckets(unknown, STRANGERS)
        self._uploading: dict[str, Counter[Key]] = {}  # worker -> attempt -> its streams
        self._staged: dict[str, deque[Key]] = {}  # worker -> attempts with bytes here, perhaps; the oldest first
        self._streams: Counter[str] = Counter()  # token id -> event streams
        written = Rate(settings.report_bytes, settings.report_bytes / HOUR_S)
        self._written: Buckets[str] = Buckets(written, TOKENS)
        self._hand_backs: Buckets[str] = Buckets(HAND_BACKS, TOKENS)

    # ------------------------------------------------------------ calls

    def call(self, caller: Principal | None, address: str) -> TooManyError | None:
        """Count one call. A long poll is one call, however long it waits.

        Args:
            caller: whose token came with it; None: none that counts.
            address: where it came from.

        Returns:
            Why it is not answered; None: it is.
        """
        if caller is not None:
            who, wait_s = name_of(caller), self._known.take(caller.token_id, self._clock())
            most, burst = self._settings.calls_per_s, self._settings.calls_burst
        else:
            network = network_of(address)
            who, wait_s = network, self._unknown.take(network, self._clock())
            most, burst = self._settings.stranger_calls_per_s, self._settings.stranger_calls_burst
        if wait_s <= 0:
            return None
        kind = "" if caller is not None else " without a token that counts"
        error = TooManyError(
            f"{who} makes too many calls{kind}: {most:g} a second are answered, and {burst:g} at once",
            retry_after_s=wait_s,
        )
        self.refusals.note("calls" if caller is not None else "stranger_calls", who, error)
        return error

    # ------------------------------------------------------------ at once

    @contextmanager
    def uploading(self, worker: str, key: Key) -> Iterator[None]:
        """Inside, one stream of an upload is under way.

        Raises:
            TooManyError: the worker has other uploads under way, or too many streams of this one (`too_many_uploads`).
        """
        under_way = self._uploading.setdefault(worker, Counter())
        try:
            if key not in under_way and len(under_way) >= self._settings.uploads:
                raise self._uploads_refused(worker, f"{len(under_way)} other uploads")
            if under_way[key] >= STREAMS_A_WORKER:
                raise self._uploads_refused(worker, f"{under_way[key]} streams of {key[0]}")
            under_way[key] += 1
            try:
                yield
            finally:
                under_way[key] -= 1
        finally:
            under_way += Counter()  # forgets what counts nothing
            if not under_way:
                self._uploading.pop(worker, None)

    def _uploads_refused(self, worker: str, what: str) -> TooManyError:
        most = self._settings.uploads
        sentence = f"{worker} has {what} under way, and {most} uploads at once are all that it may have"
        return self._refused("uploads", worker, sentence, code="too_many_uploads", retry_after_s=AGAIN_S)

    def make_way(self, worker: str, key: Key, is_here: Callable[[Key], bool]) -> set[Key]:
        """A worker begins an upload. Which of its half-sent ones are dropped for it: the oldest.

        So a worker holds room for as many updates as it may upload at once, whatever attempts it has collected.

        Args:
            worker: its id.
            key: the new upload.
            is_here: whether there are bytes of an upload.
        """
        own = self._staged.setdefault(worker, deque())
        kept = deque(one for one in own if is_here(one) and one != key)
        dropped = {kept.popleft() for _ in range(len(kept) - self._settings.uploads + 1)}
        kept.append(key)
        self._staged[worker] = kept
        return dropped

    def found_staged(self, worker: str, key: Key) -> None:
        """Something of an upload lies here from before a restart; the oldest are told first."""
        self._staged.setdefault(worker, deque()).append(key)

    @contextmanager
    def streaming(self, caller: Principal) -> Iterator[None]:
        """Inside, a caller has an event stream.

        Raises:
            TooManyError: it has too many (`too_many_streams`).
        """
        if self._streams[caller.token_id] >= self._settings.streams:
            sentence = (
                f"{name_of(caller)} follows {self._settings.streams} event streams, which is all that a token may"
            )
            raise self._refused("streams", name_of(caller), sentence, code="too_many_streams", retry_after_s=AGAIN_S)
        self._streams[caller.token_id] += 1
        try:
            yield
        finally:
            self._streams[caller.token_id] -= 1
            if not self._streams[caller.token_id]:
                del self._streams[caller.token_id]

    def connection_refused(self, address: str, most: int) -> None:
        """A connection was closed: its address has as many as it may."""
        self.refusals.note("connections", network_of(address), f"a connection beyond {most} at once was closed")

    # ------------------------------------------------------------ jobs and workers

    def admit_job(self, caller: Submitter | None, submitters: Sequence[str | None]) -> None:
        """Let a new job be taken.

        Args:
            caller: who submits it; None: nobody whose jobs are counted.
            submitters: of every job that is not over, the id of the token that submitted it; None: it is not known.

        Raises:
            TooManyError: too many are open (`too_many_jobs`).
        """
        who = f"the token {caller.token}" if caller is not None else "nobody"
        own = submitters.count(caller.token) if caller is not None else 0
        if len(submitters) >= self._settings.jobs:
            sentence = f"{len(submitters)} jobs are open, and {self._settings.jobs} are all that this coordinator takes"
        elif own >= self._settings.jobs_each:
            sentence = f"{who} has {own} open jobs, and {self._settings.jobs_each} are all that a token may"
        else:
            return
        advice = "Wait until some have ended, cancel some, or raise LYDIAN_JOBS or LYDIAN_JOBS_EACH."
        raise self._refused("jobs", who, sentence, code="too_many_jobs", advice=advice)

    def admit_worker(self, registration: Registration, joined: int) -> None:
        """Let a worker register.

        Args:
            registration: what it says of itself, which is kept as long as the journal is.
            joined: workers that have joined before; 0 for one that comes back.

        Raises:
            TooLargeError: it says too much.
            TooManyError: too many have joined (`too_many_workers`).
        """
        size = len(registration.model_dump_json(exclude={"holding"}))
        if size > REGISTRATION:
            raise TooLargeError(
                f"{registration.name} describes itself in {size} bytes, where at most {REGISTRATION} are kept",
                advice="Does --allow list more task files than it needs?",
            )
        if joined >= self._settings.workers:
            sentence = f"{joined} workers have joined, which are all that this coordinator knows at once"
            advice = "Raise LYDIAN_WORKERS, or let a worker that joined before come back with its own state folder."
            raise self._refused("workers", "a new worker", sentence, code="too_many_workers", advice=advice)

    # ------------------------------------------------------------ the journal

    def may_have_work(self, worker: str) -> bool:
        """Whether a worker is given work: not while it hands back too much, since the journal has each attempt."""
        return self._hand_backs.left(worker, self._clock()) >= 1

    def note_hand_back(self, worker: str) -> None:
        """An attempt of a worker ended without a result."""
        if self._hand_backs.take(worker, self._clock()) > 0:
            most, pace = HAND_BACKS.burst, HAND_BACKS.a_second
            why = f"it ended more than {most:g} attempts without a result: it is given {pace:g} a second from now on"
            self.refusals.note("hand_backs", worker, why)

    def cut(self, worker: str, report: str) -> str:
        """A worker's report as the journal keeps it: whole, or where it has written too much this hour, its end."""
        if not report or self._written.take(worker, self._clock(), len(report.encode())) <= 0:
            return report
        self.refusals.note("reports", worker, f"its reports of an hour have {self._settings.report_bytes} bytes: cut")
        if len(report) <= CUT_TO:
            return report
        return f"… (cut: the reports of this worker reached {self._settings.report_bytes} bytes) …\n{report[-CUT_TO:]}"

    # ------------------------------------------------------------

    def _refused(self, reason: Reason, who: str, sentence: str, **more: object) -> TooManyError:
        error = TooManyError(sentence, **more)  # type: ignore[arg-type]
        self.refusals.note(reason, who, error)
        return error


def name_of(caller: Principal) -> str:
    """A caller for a sentence or a log: the public part of its token, or the worker that it is of."""
    return caller.worker or f"lyd_{caller.scope}_{caller.token_id}_…"
