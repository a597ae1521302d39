"""What the agent waits for, said: once when it changes, and then once a minute. Decides and does nothing."""

import logging
import time
from collections.abc import Callable

SAID_EVERY_S = 60.0

log = logging.getLogger("lydian.worker")


class Waiting:
    """One thing at a time that is waited for. Each thread that waits has its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """A clock gives monotonic seconds."""
        self._clock = clock
        self._what = ""
        self._since = self._said_at = 0.0

    def say(self, what: str, *, level: int = logging.INFO) -> None:
        """Say what is waited for, if that is news or was last said a minute ago. To be called at every try.

        Args:
            what: a sentence without a full stop; as long as it stays the same, it is one wait.
            level: of the log.
        """
        now = self._clock()
        if what != self._what:
            self._what, self._since = what, now
            log.log(level, "%s", what)
        elif now - self._said_at >= SAID_EVERY_S:
            log.log(level, "%s (for %.0f s now)", what, now - self._since)
        else:
            return
        self._said_at = now

    def over(self) -> None:
        """Nothing is waited for any more: the next wait is news, even for the same thing."""
        self._what = ""
