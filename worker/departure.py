"""Leaving: the signals, the grace, and the moments at which a signal may end a wait. Knows nothing of the work.

    first signal ──idle──▶ Leaving, at once
         └──busy──▶ the grace runs ──over──▶ the work is let go; what failed to be handed in has one more try
                                                └── LAST_TRY_S later ──▶ uploads are broken off
    second signal ──▶ Leaving, wherever the agent is

A signal's handler runs in the main thread between any two of its steps, so it takes no lock that this thread may hold:
it raises, or it wakes the usher, a thread that says what is waited for and ends it.
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from worker.waiting import Waiting

log = logging.getLogger("lydian.worker")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAST_TRY_S = 10.0  # for an upload under way when the grace is over; what it brought is kept by the coordinator
TICK_S = 1.0  # between two looks at what is being finished, to say so when it changes


class Leaving(BaseException):
    """A signal asked the agent to go, at a moment when it can. Not an Exception: no handler of errors may stop it."""


class Departure:
    """One agent's way out."""

    def __init__(self, grace_s: float, doing: Callable[[], str], let_go: Callable[[], None]) -> None:
        """Catches nothing yet.

        Args:
            grace_s: seconds to finish what is under way after the first signal.
            doing: what is under way, in words; empty: nothing. Called from another thread.
            let_go: ends the work under way, once the grace is over. Called from another thread.
        """
        self.time_is_up = threading.Event()  # the grace is over: whatever fails from now on is not tried once more
        self.uploads_end = threading.Event()
        self._grace_s, self._doing, self._let_go = grace_s, doing, let_go
        self._signals = 0
        self._interruptible = False
        self._leaving = False  # it was raised: a further signal must not disturb the way out
        self._told = threading.Event()  # set in the handler, so this thread must never wait for it or set it
        self._gone = threading.Event()

    @property
    def told(self) -> bool:
        """Whether the agent was told to go."""
        return self._signals > 0

    @property
    def at_once(self) -> bool:
        """Whether it was told twice."""
        return self._signals > 1

    def catch_signals(self) -> None:
        """From now on, signals are handled here. To be called in the main thread."""
        threading.Thread(target=self._usher_out, name="usher", daemon=True).start()
        for number in SIGNALS:
            signal.signal(number, self._caught)

    def _caught(self, _: int, __: FrameType | None) -> None:
        self._signals += 1
        if self._interruptible or (self._signals > 1 and not self._leaving):
            self._interruptible, self._leaving = False, True
            raise Leaving
        if not self._leaving:
            self._told.set()

    @contextlib.contextmanager
    def may_leave(self) -> Iterator[None]:
        """Inside, a first signal ends the wait at once, since nothing would be lost.

        Raises:
            Leaving: the signal has come, or comes.
        """
        self._interruptible = True
        try:
            if self.told:
                raise Leaving
            yield
        finally:
            self._interruptible = False

    def last_words(self, say: Callable[[], None]) -> None:
        """Say goodbye; one more signal ends that. After it, a signal kills, as if nobody had caught it."""
        try:
            self._gone.set()
            self._interruptible = True
            say()
        except Leaving:
            log.info("left without a goodbye")
        finally:
            self._interruptible = False
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)

    def _usher_out(self) -> None:
        """Once told to go: say what is waited for, and end it when the grace is over."""
        self._told.wait()
        waiting, until = Waiting(), time.monotonic() + self._grace_s
        while (left := until - time.monotonic()) > 0:
            doing = self._doing() or "what is under way"
            waiting.say(f"told to go: finishing {doing}, at most {self._grace_s:g} s; once more stops at once")
            if self._gone.wait(min(left, TICK_S)):
                return
        log.info("told to go: the work is let go, %g s are over", self._grace_s)
        self.time_is_up.set()
        self._let_go()
        if not self._gone.wait(LAST_TRY_S):
            self.uploads_end.set()
