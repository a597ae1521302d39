"""The lookout: looks at the machine from time to time, and tells the agent when to make way and when it may work.

    senses ──Measured──▶ manners.judge ──another act──▶ the agent: hold, put aside, go on
    an operator's order ───────┘

It decides nothing: worker.manners does. A thread, where there is something to look at; judged is also at each order, in
the thread that brings it, so that whoever brought it finds it followed.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from common.messages import Order
from worker.manners import Manner, Measured, Reason, Rules, judge

log = logging.getLogger("lydian.worker")

LOOK_S = 2.0  # between two looks: so long another process waits for the GPU at most, but for the child's end


def local_time() -> datetime:
    """The time on this machine's wall: an owner's hours are meant by it."""
    return datetime.now().astimezone().replace(tzinfo=None)


class Lookout(threading.Thread):
    """One worker's. Any thread may ask it and bring it orders."""

    def __init__(
        self,
        rules: Rules,
        working: Callable[[], bool],
        changed: Callable[[Manner], None],
        wall: Callable[[], datetime] = local_time,
    ) -> None:
        """Looks at nothing yet.

        Args:
            rules: the owner's.
            working: whether an assignment is under way.
            changed: told of each other act, in the thread that found it; must not come back here.
            wall: local time.
        """
        super().__init__(name="lookout", daemon=True)
        self._rules, self._working, self._changed, self._wall = rules, working, changed, wall
        self._measure: Callable[[], Measured] = Measured
        self._measured = Measured()
        self._blind = False
        self._manner = Manner()
        self._order: Order = "work"
        self._judging = threading.RLock()
        self._ended = threading.Event()

    @property
    def manner(self) -> Manner:
        """How the worker behaves, as it was judged last."""
        return self._manner

    @property
    def order(self) -> Order:
        """The operator's order that is known here."""
        return self._order

    def open(self, measure: Callable[[], Measured]) -> None:
        """Look for the first time, and from now on again and again if any rule needs it.

        Args:
            measure: the machine now; called only where a rule asks for it.
        """
        self._measure = measure
        self.look()
        if self._rules.watching:
            self.start()

    def close(self) -> None:
        """Look no more."""
        self._ended.set()

    def obey(self, order: Order) -> None:
        """An operator's order, which may be the one before. It is followed when this returns."""
        self._order = order
        self.judge()

    def look(self) -> Manner:
        """Measure, and judge."""
        with self._judging:
            if self._rules.measuring:
                self._measured = self._measure()
            return self.judge()

    def judge(self) -> Manner:
        """Judge anew by what was measured last, since the time or what is under way is another."""
        with self._judging:
            if not self._blind:
                now, working = time.monotonic(), self._working()
                self._take(
                    judge(self._rules, self._order, self._manner, self._measured, self._wall(), now, working=working)
                )
            return self._manner

    def run(self) -> None:
        """Look until closed."""
        try:
            while not self._ended.wait(LOOK_S):
                self.look()
        except BaseException:
            self._go_blind()
            raise

    def _go_blind(self) -> None:
        """A bug of ours ends the looks: then nothing is known of the others, and they go first."""
        with self._judging:
            self._blind = True
            self._take(replace(self._manner, reason=Reason("rest", "blind", "its lookout failed: see its log")))

    def _take(self, after: Manner) -> None:
        before, self._manner = self._manner, after
        if after.act == before.act:
            return
        match after.act:
            case "work":
                log.info("free to work again")
            case "hold":
                log.info("standing still: %s", after.why)
            case "rest":
                names = after.reason.names
                log.info("out of the way: %s%s", after.why, f": {names}" if names else "")
        self._changed(after)
