"""What a coordinator said of one job, as it said it: every fact, when it was seen, and what is awaited now.

Follows the job in a thread of its own, over every death of the coordinator. What it has seen was acknowledged: the end
of the run is compared with it.
"""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from client.watching import Event
from common.api import CoordinatorApi
from common.errors import LydianError
from common.messages import OVER

PROGRESS = frozenset({"initialised", "accepted", "round", "evaluation", "job"})
"""Types of facts by which a job moves; handing out and giving back are none."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One fact, and when it was seen, in monotonic seconds."""

    event: Event
    at: float


class Ledger:
    """The facts of one job, from the first one on."""

    def __init__(self, api: CoordinatorApi, job: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts to follow. The api is closed at the end; it must be nobody else's."""
        self.job = job
        self.began_at = clock()
        self.awaited = ""  # in the coordinator's words
        self.accepted = 0
        self.ending = ""  # the state that the job ended in
        self._api, self._clock = api, clock
        self._seen: list[Seen] = []
        self._progress_at = self.began_at
        self._error: LydianError | None = None
        self._thread = threading.Thread(target=self._follow, name=f"ledger of {job}", daemon=True)
        self._thread.start()

    @property
    def seen(self) -> list[Seen]:
        """Every fact so far."""
        return list(self._seen)

    @property
    def progress_at(self) -> float:
        """When the job moved last."""
        return self._progress_at

    def check(self) -> None:
        """Make sure that the job is still followed.

        Raises:
            LydianError: what the coordinator answered, where it will not answer otherwise again.
        """
        if self._error is not None:
            raise self._error
        if not self._thread.is_alive() and not self.ending:
            raise LydianError(
                f"{self.job} can be followed no more", code="not_followed", advice="The traceback above says why."
            )

    def _follow(self) -> None:
        try:
            self._take_all(self._api.events(self.job))
        except LydianError as error:
            self._error = error
        finally:
            self._api.close()

    def _take_all(self, events: Iterable[dict[str, Any]]) -> None:
        for event in events:
            if "id" not in event:
                self.awaited = str(event.get("reason", ""))
                continue
            now = self._clock()
            self._seen.append(Seen(event, now))
            self.accepted += event["type"] == "accepted"
            if event["type"] in PROGRESS:
                self._progress_at = now
            if event["type"] == "job" and event["state"] in OVER:
                self.ending = str(event["state"])


def read_facts(api: CoordinatorApi, job: str) -> list[Event]:
    """Every fact that the journal has of a job now."""
    facts: list[Event] = []
    for event in api.events(job):
        if "id" not in event:
            break  # where the job stands is said after all that has happened
        facts.append(event)
    return facts
