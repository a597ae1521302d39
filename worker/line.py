"""The line to the coordinator: when this worker measures it, and what came out last.

Only while there is no work: before the first poll, and again in a pause when the last measurement is old. It is told by
every poll, so a coordinator that was started anew knows it too. A line that cannot be measured now is measured later,
and never keeps a worker from working.
"""

import logging
import time
from collections.abc import Callable

from common.api import CoordinatorApi
from common.errors import LydianError
from common.messages import Link

OLD_S = 3600.0  # between two measurements that worked
AGAIN_S = 60.0  # after one that did not

log = logging.getLogger("lydian.worker")


class Line:
    """One worker's line."""

    def __init__(self, api: CoordinatorApi, clock: Callable[[], float] = time.monotonic) -> None:
        """Measures nothing yet. A clock gives monotonic seconds."""
        self.link: Link | None = None
        self._api, self._clock = api, clock
        self._due_at = clock()

    @property
    def is_due(self) -> bool:
        """Whether it is time to measure, if there is nothing else to do."""
        return self._clock() >= self._due_at

    def measure(self) -> None:
        """Measure the line for about two seconds. What it was before stays known where that fails."""
        try:
            self.link = link = self._api.measure_link()
        except LydianError as error:
            log.info("the line to the coordinator is not measured now: %s", error)
            self._due_at = self._clock() + AGAIN_S
            return
        self._due_at = self._clock() + OLD_S
        log.info(
            "the line to the coordinator: %.1f Mbit/s down, %.1f Mbit/s up, %.1f ms",
            link.down * 8e-6,
            link.up * 8e-6,
            link.latency_s * 1e3,
        )
