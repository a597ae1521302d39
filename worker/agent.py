"""The agent: asks the coordinator for work, has the child do it, and hands in what came out.

    register ─▶ what the spool has from an earlier life: hand it in, or carry it on
        └─▶ poll ─▶ download ─▶ child trains (heartbeats meanwhile) ─▶ spool ─▶ upload ─▶ submit ─▶ poll …

No torch in this process. The agent outlives a coordinator that is away, a full disk and a task that crashes, but not
its own bugs. It can be killed at any moment: worker.spool has what a new start needs to go on, and what was trained is
on the disk before the coordinator is told of it.

The first SIGTERM lets it finish what it does within the grace and leave; then, or at the second one, work under way is
given back, and what is trained stays in the spool for the next start.
"""

import contextlib
import logging
import random
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from common import PROTOCOL, __version__
from common.api import CoordinatorApi
from common.errors import BadJobError, LydianError, UnauthenticatedError
from common.messages import (
    Abandon,
    Assignment,
    Heartbeat,
    Holding,
    ModelFacts,
    PollAnswer,
    PollRequest,
    Progress,
    Receipt,
    Registration,
    Submission,
    Trust,
    Welcome,
)
from common.sharding import Partition, order_of
from common.tasks import BUILTIN
from common.weights import file_digest
from worker import hardware, plan
from worker.child import Child, TaskFailure, TaskStopped
from worker.heart import Heart
from worker.identity import Identity
from worker.spool import Durability, Kept, Spool, Trained, Untrained
from worker.waiting import Waiting

log = logging.getLogger("lydian.worker")

WHY_LIMIT = 500  # characters, as messages.PollRequest takes them

T = TypeVar("T")


class Leaving(BaseException):
    """A signal asked the agent to go, at a moment when it can. Not an Exception: no handler of errors may stop it."""


class Dropped(Exception):  # noqa: N818 - not an error: the work counts no more
    """The assignment counts no more, or not from here; the agent polls for new work."""


class NoRoom(Exception):  # noqa: N818 - the work goes back, and the worker waits for room
    """The disk has no room for the work."""

    def __init__(self, sentence: str, room: int) -> None:
        super().__init__(sentence)
        self.room = room  # bytes


@dataclass(frozen=True)
class Options:
    """What the worker's owner decided."""

    name: str
    device: str = "auto"
    threads: int = 1
    data: Mapping[str, str] = field(default_factory=dict)  # name -> folder
    trust: Trust = "none"
    trusted: tuple[str, ...] = ()
    stall_s: float = 600.0  # without a sign of life from the child
    join_token: str | None = None  # for the first time, and when the coordinator has forgotten this worker
    checkpoint_every_s: float = 30.0  # 0: never
    grace_s: float = 60.0  # to finish what is under way after the first SIGTERM


@dataclass(frozen=True)
class Degraded:
    """Why the agent can take no work, until that has changed."""

    why: str
    room: int  # bytes that must be free before it is well again
    told: bool = False  # the coordinator has heard of it: only then is it looked whether it is over, so nothing spins


@dataclass
class Agent:
    """One worker: one device, one assignment at a time."""

    api: CoordinatorApi
    identity: Identity
    spool: Spool
    options: Options
    log_folder: Path

    def __post_init__(self) -> None:
        self._child: Child | None = None
        self._opened: str | None = None  # the job whose task the child has loaded
        self._cuts: dict[str, Partition] = {}  # job -> its training set in order, for the job in the child
        self._welcome: Welcome | None = None  # None: not registered, so there is nobody to say goodbye to
        self._heart: Heart | None = None
        self._degraded: Degraded | None = None
        self._waiting = Waiting()
        self._signals = 0
        self._interruptible = False  # nothing would be lost by leaving now
        self._expendable = False  # what would be lost by leaving now can be had again: the grace is worth waiting for
        self._draining = False
        self._told_to_go = threading.Event()  # set in the signal handler: this thread must never wait for it
        self._time_is_up = threading.Event()
        self._gone = threading.Event()

    # ------------------------------------------------------------ life

    def run(self) -> None:
        """Work until told to leave. Returns when the agent has left in good order.

        Raises:
            LydianError: the coordinator will never accept this worker as it is, or its disk is broken; the sentence
                says why.
        """
        self._catch_signals()
        threading.Thread(target=self._usher_out, name="usher", daemon=True).start()
        try:
            self._work()
        except Leaving:
            log.info("stopping at once" if self._signals > 1 else "leaving")
        except LydianError as error:
            if plan.is_rival(error):
                self._welcome = None  # a goodbye would be taken for one more call of a rival
            raise
        finally:
            self._leave()

    def _work(self) -> None:
        self._ready_child()
        self._check_version()
        self._register()
        self._take_up_spool()
        while not self._draining:
            answer = self._poll()
            if answer is not None:
                self._follow(answer)

    def _catch_signals(self) -> None:
        def caught(_: int, __: FrameType | None) -> None:
            self._signals += 1
            self._draining = True
            if self._interruptible or self._signals > 1:
                self._interruptible = False
                raise Leaving
            self._told_to_go.set()

        def time_is_up(_: int, __: FrameType | None) -> None:
            if self._expendable:
                self._expendable = False
                raise Leaving

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, caught)
        signal.signal(signal.SIGALRM, time_is_up)

    def _usher_out(self) -> None:
        """Once told to go: say what is waited for, and end it when the grace is over. A thread of its own."""
        self._told_to_go.wait()
        waiting, grace = Waiting(), self.options.grace_s
        until = time.monotonic() + grace
        while (left := until - time.monotonic()) > 0 and not self._gone.is_set():
            heart = self._heart
            doing = f"{heart.progress.doing}, at most {grace:g} s" if heart else "finishing what is under way"
            waiting.say(f"told to go: {doing}; once more stops at once")
            self._gone.wait(min(left, 1.0))
        if self._gone.is_set():
            return
        self._time_is_up.set()
        if self._heart is not None:
            self._heart.let_go()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    @contextlib.contextmanager
    def _may_leave(self) -> Iterator[None]:
        """Inside, a first signal ends the wait at once, since nothing would be lost."""
        if self._draining:
            raise Leaving
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    @contextlib.contextmanager
    def _may_be_cut_short(self) -> Iterator[None]:
        """Inside, the end of the grace ends the wait at once."""
        self._expendable = True
        try:
            if self._time_is_up.is_set():
                raise Leaving
            yield
        finally:
            self._expendable = False

    def _leave(self) -> None:
        """Say goodbye, so that nobody waits. One more signal leaves without."""
        self._gone.set()
        self._told_to_go.set()
        try:
            if self._child is not None:
                self._child.kill()
            if self._welcome is not None:
                self.api.leave(self._welcome.worker_id, self.identity.start_id)
        except LydianError as error:
            log.info("left without a goodbye: %s", error)
        except Leaving:
            log.info("left without a goodbye")
        finally:
            self.api.close()
            self.spool.close()

    def _check_version(self) -> None:
        """Make sure that the coordinator understands this worker. Where it is the newer one, it will say so itself."""
        try:
            with self._may_leave():
                view = self._insist(self.api.version)
        except ValidationError as error:
            raise LydianError(
                f"{self.api.url} answers, and not as a coordinator does",
                code="no_coordinator",
                advice="Paste the URL that `lydian serve` printed.",
            ) from error
        refusal = plan.version_refusal(view, protocol=PROTOCOL, version=__version__)
        if refusal is not None:
            raise refusal

    def _register(self) -> None:
        child, url = self._ready_child(), self.identity.url
        unsent = [held.holding for held in self.spool.trained(url)]
        unsent += [held.holding for held in self.spool.untrained(url)]
        registration = Registration(
            name=self.options.name,
            protocol=PROTOCOL,
            version=__version__,
            start_id=self.identity.start_id,
            hardware=hardware.describe(child.hello, child.hello.device),
            data=tuple(sorted(self.options.data)),
            trust=self.options.trust,
            trusted=self.options.trusted,
            place=self.identity.place,
            holding=plan.told(unsent, self._kept()),
        )
        if self.identity.credential is not None:
            self.api.use_token(self.identity.credential)
        with self._may_leave():
            welcome = self._insist(lambda: self._introduce(registration))
        if welcome.credential is not None:
            self.identity.remember(welcome.worker_id, welcome.credential)
            self.api.use_token(welcome.credential)
        self._welcome = welcome
        log.info("%s (%s) at %s", welcome.reason, welcome.worker_id, self.api.url)

    def _introduce(self, registration: Registration) -> Welcome:
        try:
            return self.api.register(registration)
        except UnauthenticatedError as error:
            if self.identity.credential is None or self.options.join_token is None:
                raise
            log.warning("%s; joining anew with the join token", error)
            self.identity.forget()
            self.api.use_token(self.options.join_token)
            return self.api.register(registration)

    @property
    def _known_as(self) -> Welcome:
        assert self._welcome is not None  # noqa: S101 - registered before anything else
        return self._welcome

    def _insist(self, call: Callable[[], T]) -> T:
        """Make a call until it is answered; an answer that is final is raised."""
        failures = 0
        while True:
            try:
                answer = call()
            except LydianError as error:
                if plan.after(error).action != "wait":
                    raise
                failures += 1
                self._waiting.say(f"{error}; trying again", level=logging.WARNING)
                time.sleep(plan.wait_s(failures, random.random()))  # between two tries, with jitter
            else:
                if failures:
                    self._waiting.over()
                return answer

    # ------------------------------------------------------------ what an earlier life left

    def _take_up_spool(self) -> None:
        """Hand in what was trained, and carry on what was not, before any new work."""
        for trained in self.spool.trained(self.identity.url):
            with self._beating(trained.place.assignment, trained.place.attempt) as heart:
                heart.progress = Progress(doing="uploading", samples=trained.submission.samples)
                log.info("%s was trained before this start; handing it in", trained.place.assignment)
                with self._outcome(trained):
                    durability = self.spool.durability(trained)
                    durability.begin()
                    self._hand_in(trained, durability, before=True)
        for untrained in self.spool.untrained(self.identity.url):
            if self._draining:
                return
            self._carry_on(untrained)

    def _carry_on(self, held: Untrained) -> None:
        """Go on with an attempt that the last life left unfinished, if it is still wanted from here."""
        place = held.place
        beat = Heartbeat(
            start_id=self.identity.start_id,
            assignment=place.assignment,
            attempt=place.attempt,
            progress=Progress(doing="loading"),
        )
        try:
            with self._may_leave():
                answer = self._insist(lambda: self.api.heartbeat(self._known_as.worker_id, beat))
        except LydianError as error:
            if plan.is_rival(error) or plan.after(error).action == "stop":
                raise
            log.info("%s from before this start is dropped: %s", place.assignment, error)
            self._drop(held)
            return
        then = plan.resumption(answer, held.starts)
        if then.action == "go on":
            log.info("%s from before this start is carried on", place.assignment)
            self._do(held.assignment, held)
            return
        log.info("%s from before this start is dropped: %s", place.assignment, then.why)
        if then.action == "give back":
            self._abandon(held.assignment, "task_exited", f"{self.options.name}: {then.why}")
        self._drop(held)

    # ------------------------------------------------------------ asking for work

    def _kept(self) -> list[Holding]:
        return [held.holding for held in self.spool.kept(self.identity.url)]

    def _poll(self) -> PollAnswer | None:
        self._look_whether_well()
        kept, degraded = self._kept(), self._degraded
        request = PollRequest(
            start_id=self.identity.start_id,
            claim_key=secrets.token_hex(8),
            loaded=(self._opened,) if self._opened else (),
            holding=plan.told([], kept),
            degraded=degraded.why[:WHY_LIMIT] if degraded else "",
        )
        awaited = "work" if degraded is None else f"room or rights on the disk: {degraded.why}"
        keeping = f"; {len(kept)} updates are kept until their rounds are closed" if kept else ""
        self._waiting.say(f"waiting for {awaited}{keeping}")
        with self._may_leave():
            answer = self._insist(lambda: self.api.poll(self._known_as.worker_id, request))
        if degraded is not None:
            self._degraded = replace(degraded, told=True)
        if answer is not None and answer.assignment is not None:
            self._waiting.over()
        return answer

    def _follow(self, answer: PollAnswer) -> None:
        """Do what the coordinator answered: forget, delete, send again, and then the new work."""
        url = self.identity.url
        for job in answer.forget:
            with self._disk_trouble():
                self.spool.drop_job(job, url)
        if self._opened in answer.forget:
            self._close_child()
            self._ready_child()  # torch is loaded before the next job needs it
        for held in [self.spool.find_kept(told, url) for told in answer.settled]:
            if held is not None:
                self._drop(held)
        if answer.assignment is not None:
            self._do(answer.assignment, wanted=answer.wanted)
        else:
            self._send_again(answer.wanted)

    def _send_again(self, wanted: tuple[Holding, ...]) -> None:
        """Hand in kept updates once more: a power cut took the coordinator's bytes."""
        for told in wanted:
            held = self.spool.find_kept(told, self.identity.url)
            if held is None:
                log.warning("%s, attempt %d, is wanted again and not kept here", told.assignment, told.attempt)
                continue
            with self._disk_trouble():
                if not self.spool.intact(held):
                    log.warning("%s is wanted again, and damaged on this disk too: dropped", told.assignment)
                    self._drop(held)
                    continue
                log.info("%s is wanted again; handing it in once more", told.assignment)
                try:
                    self._hand_in(held, self.spool.durability(held), before=True)
                except Dropped as dropped:
                    log.info("%s is wanted no more: %s", told.assignment, dropped)
                    self._drop(held)

    # ------------------------------------------------------------ doing it

    def _do(self, assignment: Assignment, known: Untrained | None = None, wanted: tuple[Holding, ...] = ()) -> None:
        """Carry out one assignment. Whatever becomes of it, the agent goes on.

        Args:
            assignment: what to do.
            known: the same from an earlier life; None: it is new.
            wanted: updates that go before it.
        """
        label = f"{assignment.job} {assignment.kind} round {assignment.round} shard {assignment.shard}"
        with self._beating(assignment.id, assignment.attempt) as heart:
            self._send_again(wanted)
            with self._outcome(assignment, label):
                self._check_trust(assignment)
                begun = self.spool.start_again(known) if known else self.spool.begin(assignment, self.identity.url)
                durability = self.spool.durability(begun)
                heart.on_first_beat = durability.begin  # what lives as long as this is worth surviving a power cut
                trained = self._carry_out(begun, durability, heart)
                heart.progress = Progress(doing="uploading", samples=trained.submission.samples)
                self._hand_in(trained, durability)
                log.info("%s: %d samples in %.2f s", label, trained.submission.samples, trained.submission.seconds)
        if heart.order == "drain":
            self._draining = True

    @contextlib.contextmanager
    def _beating(self, assignment: str, attempt: int) -> Iterator[Heart]:
        welcome = self._known_as
        heart = Heart(self.api, welcome.worker_id, self.identity.start_id, assignment, attempt, welcome.heartbeat_s)
        self._heart = heart
        try:
            with heart:
                yield heart
        finally:
            self._heart = None

    @contextlib.contextmanager
    def _outcome(self, work: Assignment | Trained, label: str = "") -> Iterator[None]:
        """What becomes of an assignment whose work ends here in another way than by a receipt."""
        assignment, attempt = (
            (work.id, work.attempt) if isinstance(work, Assignment) else (work.place.assignment, work.place.attempt)
        )
        name = label or assignment
        try:
            yield
            return
        except TaskFailure as failure:
            verdict = plan.disk_verdict(plan.errno_in(failure.sentence)) if failure.code == "worker_error" else "other"
            log.warning("%s: %s", name, failure.sentence)
            if verdict in ("full", "closed"):
                self._give_back_for_room(work, failure.sentence, 0)
            else:
                self._abandon(work, failure.code, failure.sentence, failure.detail)
        except NoRoom as short:
            log.warning("%s: %s", name, short)
            self._give_back_for_room(work, str(short), short.room)
        except OSError as error:  # this machine's disk, not the task: the agent lives on
            self._stop_if_broken(error)
            log.warning("%s: %s", name, error)
            sentence = f"{self.options.name} cannot use its state folder: {error} ({self.spool.free()} bytes are free)"
            if plan.disk_verdict(error.errno) == "other":
                self._abandon(work, "worker_error", sentence)
            else:
                self._give_back_for_room(work, sentence, 0)
        except (TaskStopped, Dropped) as dropped:
            if self._time_is_up.is_set():
                self._hand_back_released(work)
                raise Leaving from dropped
            reason = self._heart.order_reason if self._heart else ""
            log.info("%s: dropped: %s", name, reason or dropped)
            if self._heart is not None and self._heart.fatal is not None:
                raise self._heart.fatal from dropped
        except Leaving:
            self._hand_back_released(work)
            raise
        held = self.spool.find(assignment, attempt)
        if held is not None:
            self._drop(held)

    def _hand_back_released(self, work: Assignment | Trained) -> None:
        """Leave: what is trained stays in the spool for the next start, anything less goes to another worker."""
        if not isinstance(work, Assignment):
            return
        held = self.spool.find(work.id, work.attempt)
        if isinstance(held, Trained):
            log.info("%s is trained and stays in the spool for the next start", work.id)
            return
        self._abandon(work, "released", "the worker was stopped", insist=False)
        if held is not None:
            self._drop(held)

    def _give_back_for_room(self, work: Assignment | Trained, sentence: str, room: int) -> None:
        self._abandon(work, "disk_full", sentence)
        self._degrade(sentence, room)

    def _degrade(self, why: str, room: int) -> None:
        log.warning("degraded, no work is taken: %s", why)
        self._degraded = Degraded(why, room)

    def _look_whether_well(self) -> None:
        """Take work again once the disk does; looked at before each poll after the coordinator has heard of it."""
        degraded = self._degraded
        if degraded is None or not degraded.told:
            return
        try:
            trouble = self.spool.trouble(degraded.room)
        except OSError as error:
            self._stop_if_broken(error)
            raise
        if not trouble:
            log.info("well again: the state folder can be written")
            self._degraded = None
        elif trouble != degraded.why:
            self._degraded = Degraded(trouble, degraded.room)

    def _stop_if_broken(self, error: OSError) -> None:
        """A disk that fails cannot be argued with: what is on it is not known until a next start has looked."""
        if plan.disk_verdict(error.errno) == "broken":
            raise LydianError(
                f"the disk of {self.spool.folder} is broken: {error}",
                code="disk_broken",
                advice="Look into the system's log; start the worker on another disk with --state-dir.",
            ) from error

    @contextlib.contextmanager
    def _disk_trouble(self) -> Iterator[None]:
        """Inside, what the disk refuses is said, and costs at most a file that stays."""
        try:
            yield
        except OSError as error:
            self._stop_if_broken(error)
            if plan.disk_verdict(error.errno) == "other":
                log.warning("the spool: %s", error)
            else:
                self._degrade(f"the state folder cannot be written: {error}", 0)

    def _drop(self, held: Untrained | Trained | Kept) -> None:
        with self._disk_trouble():
            self.spool.drop(held)

    def _check_trust(self, assignment: Assignment) -> None:
        options = self.options
        refused = plan.refusal(assignment.task, builtin=BUILTIN, trust=options.trust, trusted=options.trusted)
        if refused is not None:
            raise TaskFailure(refused.code, refused.sentence, "")

    def _carry_out(self, begun: Untrained, durability: Durability, heart: Heart) -> Trained:
        """Download, train, and spool what came out."""
        assignment, place = begun.assignment, begun.place
        self._make_sure_of_room(assignment)
        base, received = self._fetch(assignment, heart)
        child = self._child_for(assignment, heart)
        if assignment.kind == "init":
            submission = self._init(child, begun, heart)
        else:
            command = self._command(child, begun, base, heart)
            done = child.ask(command, on_progress=heart.see, stall_s=self.options.stall_s)
            if assignment.kind == "train":
                durability.begin()
            submission = Submission(
                attempt=assignment.attempt,
                digest=file_digest(place.update) if assignment.kind == "train" else None,
                samples=done["samples"],
                steps=done.get("steps", 0),
                seconds=done["seconds"],
                metrics=done["metrics"],
                bytes_down=received,
                resumed_at=done.get("resumed_at", 0),
            )
        trained = self.spool.finish(begun, submission)
        if assignment.kind == "train":
            durability.begin()
        return trained

    def _make_sure_of_room(self, assignment: Assignment) -> None:
        digest = assignment.base.digest if assignment.base else ""
        needed = plan.room_needed(assignment, fetched=self.spool.fetched(digest) if digest else 0)
        free = self.spool.make_room(needed, keep=digest)
        if free < needed:
            sentence = f"{self.options.name} has {free} bytes free in {self.spool.folder}, and this needs {needed}"
            raise NoRoom(sentence, needed)

    def _command(self, child: Child, begun: Untrained, base: str, heart: Heart) -> dict[str, Any]:
        assignment, place = begun.assignment, begun.place
        if assignment.kind == "evaluate":
            return {"do": "evaluate", "base": base, "batch_size": assignment.spec.train.batch_size}
        return plan.train_command(
            assignment,
            base=base,
            indices=self._indices(child, begun, heart),
            out=str(place.update),
            checkpoint=str(place.checkpoint),
            checkpoint_every_s=self.options.checkpoint_every_s,
        )

    def _init(self, child: Child, begun: Untrained, heart: Heart) -> Submission:
        assignment, out = begun.assignment, begun.place.update
        command = {"do": "init", "seed": plan.init_seed(assignment.spec), "out": str(out), "labels": None}
        done = child.ask(command, on_progress=heart.see, stall_s=self.options.stall_s)
        bounds: tuple[int, ...] = ()
        if assignment.spec.data.partition != "local":
            bounds = self._cut(child, assignment, heart).bounds
        facts = ModelFacts(
            parameters=done["parameters"],
            train_samples=done["train_samples"],
            test_samples=done["test_samples"],
            bounds=bounds,
        )
        return Submission(attempt=assignment.attempt, digest=file_digest(out), facts=facts)

    def _indices(self, child: Child, begun: Untrained, heart: Heart) -> str | None:
        """The file with the samples of the shard; None: all of this worker's own data."""
        assignment = begun.assignment
        if assignment.samples is None:
            return None
        cut = self._cut(child, assignment, heart)
        if cut.order.size != assignment.train_samples:
            raise TaskFailure(
                "no_data",
                f"{self.options.name} has {cut.order.size} training samples for {assignment.task.name}, "
                f"{assignment.train_samples} where the model was built: every machine needs the same data set",
                "",
            )
        chosen = cut.order[assignment.samples.start : assignment.samples.stop]
        return str(self.spool.write_indices(begun, chosen))

    def _cut(self, child: Child, assignment: Assignment, heart: Heart) -> Partition:
        """The training set in the job's order: the same on every worker, so that nobody ships lists."""
        known = self._cuts.get(assignment.job)
        if known is not None:
            return known
        data, labels_path = assignment.spec.data, self.spool.labels(assignment.job)
        by_label = data.partition in ("dirichlet", "labels")
        command = {"do": "describe", "labels": str(labels_path) if by_label else None}
        done = child.ask(command, on_progress=heart.see, stall_s=self.options.stall_s)
        labels = np.load(labels_path, allow_pickle=False) if by_label else None
        try:
            cut = order_of(
                data.partition,
                total=done["train_samples"],
                shards=assignment.shards,
                seed=assignment.spec.seed,
                alpha=data.alpha,
                labels_per_shard=data.labels_per_shard,
                labels=labels,
            )
        except BadJobError as error:
            raise TaskFailure("bad_task", str(error), "") from error
        self._cuts[assignment.job] = cut
        return cut

    def _fetch(self, assignment: Assignment, heart: Heart) -> tuple[str, int]:
        """The base model as a local file. Returns its path and the bytes that were downloaded for it."""
        base = assignment.base
        if base is None:
            return "", 0
        path, received = self.spool.model(base.digest), 0
        if not self.spool.has_model(base.digest):
            heart.progress = Progress(doing="downloading")
            received = self._transfer(lambda _: self.api.download_model(base.digest, path, size=base.size))
            self.spool.took_model(base.digest)
        return str(path), received

    def _hand_in(self, held: Trained, durability: Durability, *, before: bool = False) -> None:
        """Upload and submit until the coordinator says what became of it. What is acknowledged is on this disk.

        Args:
            held: what was trained.
            durability: of its files, begun.
            before: some of it may be with the coordinator already.

        Raises:
            Dropped: the coordinator wants the result no more.
            LydianError: it will accept nothing from this worker.
        """
        place, submission = held.place, held.submission

        def hand_in(again: bool) -> Receipt:
            if submission.digest is not None:
                self.api.upload(place.assignment, place.attempt, place.update, resume=again or before)
            if plan.stays(place.kind):
                self._await_disk(durability)
            return self.api.submit(place.assignment, submission)

        receipt = self._transfer(hand_in)
        log.debug("%s", receipt.reason)
        if plan.stays(place.kind):
            with self._disk_trouble():
                self.spool.keep(held)
        else:
            self._drop(held)

    def _await_disk(self, durability: Durability) -> None:
        try:
            durability.wait()
        except OSError as error:
            self._stop_if_broken(error)
            log.warning("the copy kept here may not survive a power cut: %s", error)

    def _transfer(self, call: Callable[[bool], T]) -> T:
        """Make a call with bytes until it is answered. It is told whether it is a repeat.

        Raises:
            Dropped: the coordinator wants the result no more.
            LydianError: it will accept nothing from this worker.
            Leaving: the time to finish is up.
        """
        failures = resends = 0
        while True:
            try:
                with self._may_be_cut_short():
                    answer = call(failures > 0)
            except LydianError as error:
                then = plan.after(error, resends=resends)
                heart = self._heart
                if then.action == "stop":
                    raise
                if then.action == "drop" or (heart is not None and heart.ordered):
                    raise Dropped(then.why) from error
                failures += 1
                resends += then.action == "resend"
                self._waiting.say(f"{then.why}; trying again", level=logging.WARNING)
                with self._may_be_cut_short():
                    self._pause(plan.wait_s(failures, random.random()))
            else:
                if failures:
                    self._waiting.over()
                return answer

    def _pause(self, seconds: float) -> None:
        """Wait between two tries, or until something else was ordered."""
        heart = self._heart
        if heart is not None:
            heart.wait(seconds)
        else:
            time.sleep(seconds)

    def _abandon(
        self,
        work: Assignment | Trained,
        code: Any,  # noqa: ANN401 - one of messages.Abandon's
        sentence: str,
        detail: str = "",
        insist: bool = True,
    ) -> None:
        assignment, attempt = (
            (work.id, work.attempt) if isinstance(work, Assignment) else (work.place.assignment, work.place.attempt)
        )
        reason = Abandon(attempt=attempt, code=code, sentence=sentence[:2000], detail=detail[-200_000:])
        try:
            if insist:
                self._insist(lambda: self.api.abandon(assignment, reason))
            else:
                self.api.abandon(assignment, reason)
        except LydianError as error:
            if plan.after(error).action == "stop":
                raise
            log.info("%s: %s", assignment, error)

    # ------------------------------------------------------------ the child

    def _ready_child(self) -> Child:
        """A child that has torch loaded, started now if there is none."""
        if self._child is None or not self._child.alive:
            self._close_child()
            self._child = Child.start(
                device=self.options.device, threads=self.options.threads, log_path=self.log_folder / "child.log"
            )
        return self._child

    def _close_child(self) -> None:
        if self._child is not None:
            self._child.kill()
        self._child, self._opened = None, None
        self._cuts.clear()

    def _child_for(self, assignment: Assignment, heart: Heart) -> Child:
        """The child with the task of this job loaded: once a job, not once a round."""
        if self._opened == assignment.job and self._child is not None and self._child.alive:
            heart.child = self._child
            return self._child
        if self._opened is not None:
            self._close_child()
        child = heart.child = self._ready_child()
        task = assignment.task
        heart.progress = Progress(doing="loading")
        builtin = BUILTIN[task.name] if task.digest is None else None
        if builtin is not None:
            path = builtin.file
        else:
            assert task.digest is not None  # noqa: S101
            path = self._task_file(task.digest, task.name)
        config = plan.child_config(assignment.spec, builtin.config if builtin else {}, self.options.data)
        child.ask(
            {"do": "open", "task": str(path), "config": config}, on_progress=heart.see, stall_s=self.options.stall_s
        )
        self._opened = assignment.job
        return child

    def _task_file(self, digest: str, name: str) -> Path:
        path = self.spool.task(digest, name)
        if not path.exists() or file_digest(path) != digest:
            self._transfer(lambda _: self.api.download_task(digest, path))
        return path
