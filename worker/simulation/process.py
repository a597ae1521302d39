"""A simulating process: many virtual workers, one spool, one child.

    all register ─▶ the first polls until there is work ─▶ the others ask too ─▶ child trains all ─▶ each hands in ─┐
                        └──────────────────────────────────────────────────────────────────────────────────────────┘

Each virtual worker is one to the coordinator: it has an id, a credential and at most one assignment. What it has not is
a life of its own: its credential is in memory alone, and an update is deleted once it was accepted. A process that
is killed loses what it held; the coordinator gives that to others when the leases have run out.
"""

import logging
import random
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from common import PROTOCOL, __version__
from common.api import CoordinatorApi
from common.errors import ConflictError, LydianError
from common.messages import TOGETHER, Abandon, Hardware, Order, PollAnswer, PollRequest, Registration, Welcome
from common.transfers import TransferStopped
from worker import hardware, plan
from worker.child import TaskFailure, TaskStopped
from worker.fitting import fit_device
from worker.heart import Heart, Watch
from worker.options import Options
from worker.simulation.claims import Claim, groups
from worker.simulation.heart import Held, SharedHeart
from worker.simulation.training import ManyTrainer
from worker.spool import Spool, Trained, Untrained
from worker.training import NoRoom

log = logging.getLogger("lydian.worker")

CALLS = 8  # at once
LONGEST_POLL_S = 25.0
SENTENCE_LIMIT, DETAIL_LIMIT = 2_000, 200_000  # characters, as messages.Abandon takes them

T = TypeVar("T")


@dataclass
class Virtual:
    """One virtual worker."""

    name: str
    api: CoordinatorApi
    start_id: str
    id: str = ""
    order: Order = "work"  # an operator's, as it last heard


class Simulator:
    """Virtual workers that work as one. `run` ends by an exception alone: a signal's, or a final refusal."""

    def __init__(self, url: str, number: int, options: Options, folder: Path, *, stack: str) -> None:
        """Starts nothing yet.

        Args:
            url: of the coordinator.
            number: virtual workers.
            options: of all of them; `name` is followed by each one's number.
            folder: for the spool and the child's log; its own.
            stack: as the child takes it.
        """
        self._url, self._options = url.rstrip("/"), options
        self._spool = Spool.open(folder)
        self._workers = [
            Virtual(f"{options.name}-{at}", CoordinatorApi(url, options.join_token), secrets.token_hex(8))
            for at in range(1, number + 1)
        ]
        self._calls = ThreadPoolExecutor(CALLS, thread_name_prefix="calls")
        self._keeping = threading.Lock()
        self._trainer = ManyTrainer(self._workers[0].api, self._spool, options, folder, self._fetch)
        self._trainer.stack = stack
        self._heartbeat_s, self._ttl_s = 10.0, 40.0  # until the coordinator says otherwise
        self._leaving = threading.Event()

    def run(self) -> None:
        """Work for ever.

        Raises:
            LydianError: the coordinator takes nothing from here, or the disk takes nothing.
        """
        found = hardware.inventory()
        fitted = fit_device(self._trainer, self._options.device, found)
        machine = hardware.describe(fitted.build, found, fitted.reason)
        self._each(lambda worker: self._register(worker, machine), self._workers)
        log.info("%d virtual workers at %s", len(self._workers), self._url)
        while True:
            turns = [[self._held(claim) for claim in claims] for claims in groups(self._claim())]
            for at, held in enumerate(turns):
                self._do(held, waiting=[other for later in turns[at + 1 :] for other in later])

    def close(self) -> None:
        """End the child, and say goodbye for all: what they hold goes to others at once."""
        self._leaving.set()
        self._trainer.close()
        list(self._calls.map(self._say_goodbye, self._workers))
        self._calls.shutdown()
        self._spool.close()

    def _say_goodbye(self, worker: Virtual) -> None:
        with worker.api:
            try:
                if worker.id:
                    worker.api.leave(worker.id, worker.start_id)
            except LydianError as error:
                log.debug("%s left without a goodbye: %s", worker.name, error)

    # ------------------------------------------------------------ calls

    def _each(self, call: Callable[[Virtual], T], workers: Sequence[Virtual]) -> list[T]:
        """Make a call for each of these, some at once. In their order."""
        return list(self._calls.map(call, workers))

    def _insist(self, call: Callable[[], T]) -> T:
        """Make a call until it is answered.

        Raises:
            LydianError: an answer that is final.
        """
        failures = 0
        while True:
            try:
                return call()
            except LydianError as error:
                if self._leaving.is_set() or plan.after(error, resends=failures).action in ("stop", "drop"):
                    raise
                failures += 1
                log.debug("%s; trying again", error)
                waited = plan.wait_s(failures, random.random(), ttl_s=self._ttl_s, error=error)
            self._leaving.wait(waited)  # with jitter

    def _fetch(self, call: Callable[[], int], heart: Watch) -> int:
        """Make a call that downloads until it has."""
        try:
            return self._insist(call)
        except TransferStopped as stopped:
            raise TaskStopped(heart.order_reason or str(stopped)) from stopped

    def _register(self, worker: Virtual, machine: Hardware) -> None:
        registration = Registration(
            no_masks="simulated workers live in one process, so a mask would hide nothing",
            name=worker.name,
            protocol=PROTOCOL,
            version=__version__,
            start_id=worker.start_id,
            hardware=machine,
            data=tuple(sorted(self._options.data)),
            trust=self._options.trust,
            trusted=self._options.trusted,
        )
        welcome: Welcome = self._insist(lambda: worker.api.register(registration))
        if welcome.credential is not None:
            worker.api.use_token(welcome.credential)
        worker.id = welcome.worker_id
        self._heartbeat_s, self._ttl_s = welcome.heartbeat_s, welcome.ttl_s

    # ------------------------------------------------------------ asking for work

    def _claim(self) -> list[Claim]:
        """Wait until one worker has work, and then ask for the others, as long as there is more."""
        patience_s = min(LONGEST_POLL_S, self._ttl_s / 2)
        first = self._poll(self._workers[0], patience_s)
        claims = [Claim(0, first.assignment)] if first is not None and first.assignment is not None else []
        others = list(enumerate(self._workers))[1:]
        for start in range(0, len(others), CALLS):
            some = others[start : start + CALLS]
            answers = self._each(lambda worker: self._poll(worker, 0.0), [worker for _, worker in some])
            found = [
                Claim(at, answer.assignment)
                for (at, _), answer in zip(some, answers, strict=True)
                if answer is not None and answer.assignment is not None
            ]
            claims += found
            if claims and not found:  # nothing is left; without any claim, all of them show that they live
                break
        return claims

    def _poll(self, worker: Virtual, patience_s: float) -> PollAnswer | None:
        request = PollRequest(
            start_id=worker.start_id,
            claim_key=secrets.token_hex(8),
            wait_s=patience_s,
            loaded=self._trainer.loaded,
            obeys=worker.order,
        )
        together = request.model_copy(update={"together": TOGETHER, "models": self._spool.models})
        answer = self._insist(lambda: worker.api.poll(worker.id, together, keep=self._keep_model))
        if answer is not None:
            worker.order = answer.order
        if answer is not None and answer.forget:
            log.info("%s: over", ", ".join(answer.forget))
            with self._keeping:
                for job in answer.forget:
                    self._spool.drop_job(job, self._url)
        return answer

    def _keep_model(self, digest: str, data: memoryview) -> None:
        with self._keeping:  # calls are made in threads, and the same model comes with many of them
            self._trainer.take_model(digest, data)

    # ------------------------------------------------------------ doing it

    def _do(self, held: list[Held], waiting: list[Held]) -> None:
        """Carry out a group of claims. Whatever becomes of it, the process goes on, unless its disk does not.

        Args:
            held: the group.
            waiting: what comes after it.
        """
        begun: list[Untrained] = []
        try:
            with SharedHeart(held, waiting, self._heartbeat_s) as heart:
                self._trainer.check_trust(held[0].assignment.task)
                begun += [self._spool.begin(one.assignment, self._url) for one in held]
                outcomes = self._carry_out(begun, heart)
                self._hand_in_all(held, outcomes)
        except TaskFailure as failure:
            log.warning("%s", failure.sentence)
            for one in held:
                self._abandon(one, failure)
        except TaskStopped as stopped:
            log.info("dropped: %s", stopped)
        except (NoRoom, OSError) as error:
            raise LydianError(
                f"{self._spool.folder} cannot be used: {error}",
                code="folder_unusable",
                advice="Make room, or name another folder with --state-dir.",
            ) from error
        finally:
            for place in begun:
                if (left := self._spool.find(place.place.assignment, place.place.attempt)) is not None:
                    self._spool.drop(left)

    def _held(self, claim: Claim) -> Held:
        worker = self._workers[claim.worker]
        return Held(worker.api, worker.id, worker.start_id, claim.assignment)

    def _carry_out(self, begun: list[Untrained], heart: Heart) -> list[Trained | TaskFailure]:
        first = begun[0].assignment
        # What a stack of models can do.
        if first.kind == "train" and not first.spec.train.new_keys and first.spec.privacy.level != "example":
            return self._trainer.carry_out_many(begun, heart)
        return [self._carry_out_one(one, heart) for one in begun]

    def _carry_out_one(self, begun: Untrained, heart: Heart) -> Trained | TaskFailure:
        try:
            return self._trainer.carry_out(begun, self._spool.durability(begun), heart)
        except TaskFailure as failure:
            return failure

    def _hand_in_all(self, held: list[Held], outcomes: list[Trained | TaskFailure]) -> None:
        """Upload and submit every result; what failed is given back."""

        def hand_in(one: Held, outcome: Trained | TaskFailure) -> None:
            if isinstance(outcome, TaskFailure):
                log.warning("%s: %s", one.assignment.id, outcome.sentence)
                self._abandon(one, outcome)
            else:
                self._hand_in(one, outcome)

        list(self._calls.map(hand_in, held, outcomes))

    def _hand_in(self, held: Held, trained: Trained) -> None:
        assignment = held.assignment

        def offer() -> None:
            if trained.submission.digest is not None:
                small = trained.place.update.stat().st_size <= assignment.together
                if small and held.api.hand_in(assignment.id, trained.place.update, trained.submission):
                    return
                held.api.upload(assignment.id, assignment.attempt, trained.place.update)
            held.api.submit(assignment.id, trained.submission)

        def submit_or_offer() -> None:
            try:
                held.api.submit(assignment.id, trained.submission)
            except ConflictError as error:
                if error.code != "incomplete":
                    raise
                offer()

        maybe_there = False  # once it counts, its bytes are refused: after a failure it is submitted first

        def hand_in() -> None:
            nonlocal maybe_there
            call, maybe_there = (submit_or_offer if maybe_there else offer), True
            call()

        try:
            self._insist(hand_in)
        except LydianError as error:
            if plan.after(error).action == "stop":
                raise
            log.info("%s is not used: %s", assignment.id, error)
        else:
            self._spool.commit(trained)
            self._spool.keep_states(trained.place)

    def _abandon(self, held: Held, failure: TaskFailure) -> None:
        reason = Abandon.model_validate(
            {
                "attempt": held.assignment.attempt,
                "code": failure.code,
                "sentence": failure.sentence[:SENTENCE_LIMIT],
                "detail": failure.detail[-DETAIL_LIMIT:],
                "scene": failure.scene,
            }
        )
        try:
            self._insist(lambda: held.api.abandon(held.assignment.id, reason))
        except LydianError as error:
            log.info("%s: %s", held.assignment.id, error)
