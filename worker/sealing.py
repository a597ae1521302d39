"""A worker's part in a secure sum: it agrees with its peers beside the training, masks what came out, and opens shares.

    beside the training   keys ─▶ roster ─▶ shares ─▶ group          a thread: it costs the training no wait
    after it              trained − base + masks ─▶ the update       (worker.training)
    when asked            one share of each member ─▶ reveal         once: the first question is the only one answered

Everything that is needed to go on lies in the attempt's folder (worker.spool.Secret) before anybody is told of it.
"""

import logging
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from common.api import CoordinatorApi
from common.errors import BadUpdateError, RefusedError
from common.fixed import Fixed
from common.masked import mask_update
from common.messages import Reveal, Roster, SecureMember, SecureShares, Unmask
from common.secure import ROOT_BYTES, Secrets, check_roster, digest_of
from worker.child import TaskFailure, TaskStopped
from worker.heart import Watch
from worker.spool import Kept, Secret, Spool, Untrained

log = logging.getLogger("lydian.worker")

LOOK_S = 0.2  # between two looks whether the work is to be dropped, while the peers are waited for

T = TypeVar("T")
Fetch = Callable[[Callable[[], int], Watch], int]


@dataclass(frozen=True)
class Sealed:
    """What was agreed on."""

    secrets: Secrets
    roster: Roster
    group: tuple[int, ...]


class Sealing(threading.Thread):
    """Agrees on masks with the peers of one attempt."""

    def __init__(
        self, api: CoordinatorApi, spool: Spool, begun: Untrained, fetch: Fetch, watch: Watch, worker: str
    ) -> None:
        """Starts nothing yet.

        Args:
            api: the coordinator.
            spool: where secrets are kept.
            begun: the attempt.
            fetch: makes a call until it is answered.
            watch: of the attempt.
            worker: this worker's id.
        """
        super().__init__(name="sealing", daemon=True)
        self._api, self._spool, self._begun, self._fetch, self._watch = api, spool, begun, fetch, watch
        self._worker = worker
        self._agreed: Future[Sealed] = Future()
        self._done = threading.Event()

    def run(self) -> None:
        """Agree."""
        try:
            self._agreed.set_result(self._agree())
        except BaseException as error:  # noqa: BLE001 - handed to who waits for it
            self._agreed.set_exception(error)
        self._done.set()

    def result(self) -> Sealed:
        """What was agreed on; waits for it.

        Raises:
            TaskStopped: the work is to be dropped.
            TaskFailure: the coordinator asked for what would not protect this worker.
            Exception: whatever `fetch` raises.
        """
        while not self._done.wait(LOOK_S):
            if self._watch.ordered.is_set():
                raise TaskStopped(self._watch.order_reason or self._watch.aside or "the work is to be dropped")
        return self._agreed.result()

    def _agree(self) -> Sealed:
        place, attempt = self._begun.place, self._begun.place.attempt
        kept = self._spool.secret(place)
        if kept is None:
            kept = Secret(root=secrets.token_hex(ROOT_BYTES))
            self._spool.keep_secret(place, kept)
        own = Secrets(bytes.fromhex(kept.root))
        keys = own.keys(attempt)
        roster = kept.roster or self._until_there(lambda: self._api.announce(place.assignment, keys))
        try:
            check_roster(roster, SecureMember(shard=place.shard, worker=self._worker, **keys.model_dump()))
            sealed = own.shares(roster, place.shard)
        except RefusedError as error:
            raise TaskFailure("worker_error", f"no masked update was sent: {error}", "") from error
        if kept.roster is None:  # from here on this attempt cuts shares for no other roster
            kept = kept.model_copy(update={"roster": roster})
            self._spool.keep_secret(place, kept)
        shares = SecureShares(attempt=attempt, roster=digest_of(roster), sealed=sealed)
        group = kept.group or self._until_there(lambda: self._api.cut(place.assignment, shares)).shards
        self._spool.keep_secret(place, kept.model_copy(update={"group": group}))
        log.info("%s: summed with %d others under roster %s", place.assignment, len(group) - 1, shares.roster[:12])
        return Sealed(own, roster, group)

    def _until_there(self, ask: Callable[[], T | None]) -> T:
        """Ask until it is decided."""
        found: T | None = None

        def call() -> int:
            nonlocal found
            found = ask()
            return 0

        while found is None:
            if self._watch.ordered.is_set():
                raise TaskStopped(self._watch.order_reason or self._watch.aside or "the work is to be dropped")
            self._fetch(call, self._watch)
        return found


def mask(begun: Untrained, base: str, samples: int, sealed: Sealed) -> str:
    """Write the masked update of what was trained. Returns its digest.

    Raises:
        TaskFailure: what was trained cannot be masked.
    """
    place, section = begun.place, begun.assignment.spec.secure
    fixed = Fixed(section.clip, section.bits)
    most = fixed.heaviest // len(sealed.group)
    if samples > most:
        sentence = (
            f"the shard has {samples} samples, and beside {section.bits} bits there is room for {most} of each of "
        )
        raise TaskFailure("bad_task", f"{sentence}{len(sealed.group)} workers: lower secure.bits", "")
    masks = sealed.secrets.masks(sealed.roster, place.shard, sealed.group)
    try:
        done = mask_update(Path(base), place.trained, place.update, fixed, samples, masks)
    except BadUpdateError as error:
        raise TaskFailure("task_failed", f"{error} {error.advice}", "") from error
    place.trained.unlink()
    if done.cut:
        log.warning("%s: %d numbers had changed by more than secure.clip = %g, and were cut to it",
                    place.assignment, done.cut, section.clip)  # fmt: skip
    return done.digest


def opened(spool: Spool, held: Kept, asked: Unmask) -> Reveal:
    """The shares that the coordinator asks for. The first question of an attempt is the only one that is answered.

    Raises:
        RefusedError: what it asks for would show more than a sum, or is not of what this attempt agreed on.
    """
    place, kept = held.place, spool.secret(held.place)
    if kept is None or kept.roster is None or kept.group is None or digest_of(kept.roster) != asked.roster:
        raise RefusedError(f"{place.assignment} is in no sum under roster {asked.roster[:12]}", code="insecure")
    survivors = tuple(sorted(asked.survivors))
    if kept.survivors is not None and kept.survivors != survivors:
        sentence = (
            f"shares were opened for the sum of {list(kept.survivors)}, and are asked for that of {list(survivors)}"
        )
        raise RefusedError(
            f"{place.assignment}: {sentence}: both shares of one worker are never opened", code="insecure"
        )
    own = Secrets(bytes.fromhex(kept.root))
    reveal = own.reveal(place.attempt, kept.roster, place.shard, kept.group, survivors, asked.sealed)
    spool.keep_secret(place, kept.model_copy(update={"survivors": survivors}), durable=True)
    return reveal
