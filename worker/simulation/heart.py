"""One heart for all the claims of a process: it beats for each of them in turn."""

import logging
from dataclasses import dataclass

from common.api import CoordinatorApi
from common.errors import LydianError
from common.messages import Assignment, Heartbeat
from worker import plan
from worker.heart import Heart

log = logging.getLogger("lydian.worker")


@dataclass(frozen=True)
class Held:
    """One claim, as its virtual worker tells the coordinator of it."""

    api: CoordinatorApi
    worker_id: str
    start_id: str
    assignment: Assignment


class SharedHeart(Heart):
    """Beats while a group of claims is under way; stops the child when none of them is wanted any more."""

    def __init__(self, held: list[Held], waiting: list[Held], period_s: float) -> None:
        """Beats every `period_s` seconds, the first time after one period.

        Args:
            held: the claims that are being worked on.
            waiting: those whose turn comes later; only their leases are kept.
            period_s: between two beats of one claim.
        """
        first = held[0]
        super().__init__(
            first.api, first.worker_id, first.start_id, first.assignment.id, first.assignment.attempt, period_s
        )
        self._held, self._waiting, self._every_s = held, waiting, period_s

    def run(self) -> None:
        """Beat until the work is over, or all of it is ordered to be dropped."""
        wanted = list(self._held)
        while not self._ended.wait(self._every_s):
            orders = [(held, self._tell(held)) for held in wanted]
            for held in self._waiting:
                self._tell(held)
            dropped = [order for _, order in orders if order is not None]
            wanted = [held for held, order in orders if order is None]
            if dropped:
                log.info("%d of %d shards are wanted no more: %s", len(dropped), len(orders), dropped[0][1])
            if not wanted:
                self._obey(*dropped[0])
                return

    def _tell(self, held: Held) -> tuple[str, str] | None:
        """One beat. Returns an order to drop the work, and why; None: it goes on."""
        if self._ended.is_set():
            return None
        beat = Heartbeat(
            start_id=held.start_id,
            assignment=held.assignment.id,
            attempt=held.assignment.attempt,
            progress=self.progress,
        )
        try:
            answer = held.api.heartbeat(held.worker_id, beat)
        except LydianError as error:
            gone = plan.is_rival(error) or plan.after(error).action in ("drop", "stop")
            return ("superseded", str(error)) if gone else None
        dropped = answer.order in ("pause", "superseded", "cancelled")
        return (answer.order, answer.reason) if dropped else None
