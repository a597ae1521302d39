"""The agent: asks the coordinator for work, has it done, and hands in what came out.

    register ─▶ what the spool has from an earlier life: hand it in, or carry it on
        └─▶ poll ─▶ download ─▶ child trains (heartbeats meanwhile) ─▶ spool ─▶ upload ─▶ submit ─▶ poll …

No torch in this process. The agent outlives a coordinator that is away, a full disk and a task that crashes, but not
its own bugs. It can be killed at any moment: worker.spool has what a new start needs to go on, and what was trained is
on the disk before the coordinator is told of it. How it is told to go, and what becomes of the work then, is in
worker.departure: what is trained stays in the spool for the next start, anything less is given back.
"""

import contextlib
import logging
import math
import random
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from common import PROTOCOL, __version__
from common.api import CoordinatorApi
from common.errors import ConflictError, LateError, LydianError, RefusedError, UnauthenticatedError
from common.logs import about
from common.messages import (
    TOGETHER,
    Abandon,
    Assignment,
    GpuInventory,
    Heartbeat,
    Holding,
    PollAnswer,
    PollRequest,
    Preparation,
    Progress,
    Receipt,
    Registration,
    Scene,
    Submission,
    Unmask,
    Welcome,
)
from common.secure import unavailable
from common.transfers import TransferStopped
from worker import hardware, plan
from worker.child import TaskFailure, TaskStopped
from worker.departure import Departure, Leaving
from worker.fitting import fit_device
from worker.heart import Heart, Watch
from worker.identity import Identity, usable
from worker.line import Line
from worker.lookout import Lookout
from worker.manners import Manner
from worker.options import Options
from worker.sealing import opened
from worker.senses import watching
from worker.spool import Attempt, Durability, Kept, Spool, Trained, Untrained
from worker.training import NoRoom, Trainer
from worker.waiting import Waiting

log = logging.getLogger("lydian.worker")

POLITE_WAIT_S = 5.0  # a poll cannot be broken off when the owner's rules say something else

WHY_LIMIT, SENTENCE_LIMIT, DETAIL_LIMIT = 500, 2_000, 200_000  # characters, as the messages take them

T = TypeVar("T")


class Dropped(Exception):  # noqa: N818 - not an error: the work counts no more
    """The coordinator wants the result no more."""


class Unfinished(Exception):  # noqa: N818 - not an error: what was asked for
    """A call was given up, because there is no more time or no more use for it."""


@dataclass(frozen=True)
class Degraded:
    """Why the agent can take no work, until that has changed."""

    why: str
    room: int  # bytes that must be free before it is well again
    told: bool = False  # the coordinator has heard of it: only then is it looked whether it is over, so nothing spins


def _patience() -> Callable[[LydianError], plan.Next]:
    """What follows from each error of one call in turn."""
    resends = 0

    def judge(error: LydianError) -> plan.Next:
        nonlocal resends
        then = plan.after(error, resends=resends)
        resends += then.action == "resend"
        return then

    return judge


class Agent:
    """One worker: one device, one assignment at a time."""

    def __init__(
        self, api: CoordinatorApi, identity: Identity, spool: Spool, options: Options, log_folder: Path
    ) -> None:
        """Starts nothing yet. `run` closes the api and the spool."""
        self.api, self.identity, self.spool, self.options = api, identity, spool, options
        self._trainer = Trainer(api, spool, options, log_folder, self._fetch)
        self._departure = Departure(options.grace_s, self._doing, self._let_go)
        self._waiting = Waiting()
        self._idle = True  # the last poll brought no work
        self._at_leisure = True  # the last poll brought nothing: there is time for the line
        self._welcome: Welcome | None = None  # None: not registered, so there is nobody to say goodbye to
        self._heart: Heart | None = None
        self._degraded: Degraded | None = None
        self._line = Line(api)
        self._preparing: Watch | None = None
        self._resting = False  # the child is ended, to be out of the way
        self._lookout = Lookout(options.rules, lambda: self._heart is not None, self._behave)

    # ------------------------------------------------------------ life

    def run(self) -> None:
        """Work until told to leave. Returns when the agent has left in good order.

        Raises:
            LydianError: the coordinator will never accept this worker as it is, or its disk is broken; the sentence
                says why.
        """
        self._departure.catch_signals()
        try:
            self._work()
        except Leaving:
            log.info("stopping at once" if self._departure.at_once else "leaving")
        except LydianError as error:
            if plan.is_rival(error):
                self._welcome = None  # a goodbye would be taken for one more call of a rival
            raise
        finally:
            self._leave()

    def _work(self) -> None:
        found = hardware.inventory()  # before the child takes memory of a GPU
        with usable(self.spool.folder):
            self._trainer.ready()  # torch loads while the coordinator is asked
        self._check_version()
        self._register(found)
        self._hand_in_trained()
        while not self._departure.told:
            self._rest_or_carry_on()
            if self._at_leisure and self._line.is_due:
                with self._departure.may_leave():
                    self._line.measure()
            answer = self._poll()
            if answer is not None:
                self._follow(answer)

    def _leave(self) -> None:
        """Say goodbye, so that nobody waits."""
        try:
            self._departure.last_words(self._say_goodbye)
        except LydianError as error:
            log.info("left without a goodbye: %s", error)
        finally:
            self.api.close()
            self.spool.close()

    def _say_goodbye(self) -> None:
        self._lookout.close()
        self._trainer.close()
        if self._welcome is not None:
            self.api.leave(self._welcome.worker_id, self.identity.start_id)

    def _doing(self) -> str:
        heart = self._heart
        return f"{heart.assignment} ({heart.progress.doing})" if heart is not None else ""

    def _let_go(self) -> None:
        if (heart := self._heart) is not None:
            heart.let_go()

    def _check_version(self) -> None:
        """Make sure that the coordinator understands this worker. Where it is the newer one, it will say so itself."""
        try:
            with self._departure.may_leave():
                view = self._insist(self.api.version)
        except LydianError as error:
            if error.code != "unreadable":
                raise
            raise LydianError(
                f"{self.api.url} answers, and not as a coordinator does",
                code="no_coordinator",
                advice="Paste the URL that `lydian serve` printed.",
            ) from error
        refusal = plan.version_refusal(view, protocol=PROTOCOL, version=__version__)
        if refusal is not None:
            raise refusal

    def _register(self, found: GpuInventory) -> None:
        with usable(self.spool.folder), self._departure.may_leave():
            fitted = fit_device(self._trainer, self.options.device, found)  # waits for torch to be loaded
        self._lookout.open(watching(fitted.build.device, self.options.rules))
        url = self.identity.url
        unsent = [held.holding for held in self.spool.trained(url)]
        unsent += [held.holding for held in self.spool.untrained(url)]
        registration = Registration(
            name=self.options.name,
            protocol=PROTOCOL,
            version=__version__,
            start_id=self.identity.start_id,
            hardware=hardware.describe(fitted.build, found, fitted.reason),
            data=tuple(sorted(self.options.data)),
            trust=self.options.trust,
            trusted=self.options.trusted,
            signers=tuple(signer.id for signer in self.options.signers.now()),
            place=self.identity.place,
            holding=plan.told(unsent, self._kept()),
            no_masks=unavailable()[:WHY_LIMIT],
        )
        if self.identity.credential is not None:
            self.api.use_token(self.identity.credential)
        self._registration = registration
        with self._departure.may_leave():
            welcome = self._insist(lambda: self._introduce(registration))
        if welcome.credential is not None:
            self.identity.remember(welcome.worker_id, welcome.credential, self.options.pins)
            self.api.use_token(welcome.credential)
        self._welcome = welcome
        log.info("%s (%s) at %s", welcome.reason, welcome.worker_id, self.api.url)

    def _renew(self) -> None:
        """Fetch a new credential. The old one counts until the new one is used, which is once it is on this disk."""
        registration = self._registration.model_copy(update={"holding": plan.told([], self._kept())})
        with self._departure.may_leave():
            welcome = self._insist(lambda: self.api.register(registration))
        if welcome.credential is None:
            return
        try:
            self.identity.remember(welcome.worker_id, welcome.credential, self.identity.pins)
        except LydianError as error:
            log.warning("the new credential cannot be kept, so the old one counts on: %s", error)
            return
        self.api.use_token(welcome.credential)
        log.info("%s has a new credential at %s", welcome.worker_id, self.api.url)

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

    # ------------------------------------------------------------ patience

    def _insist(self, call: Callable[[], T]) -> T:
        """Make a call until it is answered; an answer that is final is raised.

        Raises:
            Leaving: the grace is over, and one more try failed.
        """
        try:
            return self._until(self._departure.time_is_up, lambda _: call(), _patience())
        except Unfinished as unfinished:
            raise Leaving from unfinished

    def _fetch(self, call: Callable[[], int], watch: Watch) -> int:
        """Make a call that downloads until it has. Returns the bytes it brought.

        Raises:
            Dropped: there is nothing to download any more.
            Unfinished: the work was to be dropped.
        """
        return self._carry(watch.ordered, lambda _: call())

    def _carry(self, ends: threading.Event, call: Callable[[LydianError | None], T]) -> T:
        """Make a call with bytes until it is answered; damaged ones are sent again, a few times.

        Raises:
            Dropped: the coordinator wants no more of it.
        """
        patience = _patience()

        def judge(error: LydianError) -> plan.Next:
            then = patience(error)
            if then.action == "drop":
                raise Dropped(then.why) from error
            return then

        return self._until(ends, call, judge)

    def _until(
        self,
        ends: threading.Event,
        call: Callable[[LydianError | None], T],
        judge: Callable[[LydianError], plan.Next],
    ) -> T:
        """Make a call until it is answered, with a wait between two tries that grows. Says what is waited for.

        Args:
            ends: once set, there is one more try at most.
            call: is told how the try before failed.
            judge: what follows from an error.

        Raises:
            LydianError: an answer that is final.
            Unfinished: no answer came before `ends`.
        """
        failures, last_error = 0, None
        while True:
            last = ends.is_set()
            try:
                answer = call(last_error)
            except TransferStopped as stopped:
                raise Unfinished(str(stopped)) from stopped
            except LydianError as error:
                then = judge(error)
                if then.action in ("stop", "drop"):
                    raise
                if last:
                    raise Unfinished(then.why) from error
                failures, last_error = failures + 1, error
            else:
                if failures:
                    self._waiting.over()
                return answer
            self._waiting.say(f"{then.why}; trying again", level=logging.WARNING)
            ttl_s = self._welcome.ttl_s if self._welcome else math.inf
            waited = plan.wait_s(failures, random.random(), ttl_s=ttl_s, error=last_error)
            ends.wait(waited)  # between two tries, with jitter

    # ------------------------------------------------------------ what an earlier life left

    def _hand_in_trained(self) -> None:
        """Hand in what an earlier life has trained, before any other work."""
        for trained in self.spool.trained(self.identity.url):
            place = trained.place
            log.info("%s was trained before this start: handing it in", place.assignment)
            with self._attempt(place.assignment, place.attempt, place.assignment) as heart:
                self._hand_in(trained, self._durable(trained), heart, maybe_there=True)

    def _rest_or_carry_on(self) -> None:
        """Out of the way: end the child, so that all of its memory is free. Else: go on with what lies unfinished."""
        if self._lookout.judge().act == "rest":
            self._trainer.close()
            self._resting = True
            return
        if self._resting:
            self._resting = False
            with self._disk_trouble():
                self._trainer.ready()  # torch loads while the coordinator is asked
        for untrained in self.spool.untrained(self.identity.url):
            self._carry_on(untrained)

    def _carry_on(self, held: Untrained) -> None:
        """Go on with an attempt that the last life or a rest left unfinished, if it is still wanted from here."""
        place = held.place
        beat = Heartbeat(
            start_id=self.identity.start_id,
            assignment=place.assignment,
            attempt=place.attempt,
            progress=Progress(doing="loading"),
        )
        try:
            with self._departure.may_leave():
                answer = self._insist(lambda: self.api.heartbeat(self._known_as.worker_id, beat))
        except LydianError as error:
            if plan.is_rival(error) or plan.after(error).action == "stop":
                raise
            then = plan.Resumption("drop", str(error))
        else:
            then = plan.resumption(answer, held.in_vain)
        if then.action == "go on":
            log.info("%s was begun before: going on with it", place.assignment)
            self._do(held.assignment, known=held)
            return
        if then.action == "leave":
            self._lookout.obey("pause")
            self._abandon(place.assignment, place.attempt, "released", f"{self.options.name}: {then.why}")
            return
        log.info("%s was begun before, and is dropped: %s", place.assignment, then.why)
        if then.action == "give back":
            self._abandon(place.assignment, place.attempt, "task_exited", f"{self.options.name}: {then.why}")
        self._drop(held)

    # ------------------------------------------------------------ asking for work

    def _kept(self) -> list[Holding]:
        return [held.holding for held in self.spool.kept(self.identity.url)]

    def _poll(self) -> PollAnswer | None:
        self._look_whether_well()
        kept, degraded, manner = self._kept(), self._degraded, self._lookout.manner
        request = PollRequest(
            start_id=self.identity.start_id,
            claim_key=secrets.token_hex(8),
            loaded=tuple(dict.fromkeys([*self._trainer.loaded, *self.spool.jobs_with_state(self.identity.url)])),
            holding=plan.told([], kept),
            degraded=degraded.why[:WHY_LIMIT] if degraded else "",
            link=self._line.link,
            resting="" if manner.reason.kind == "order" else manner.why[:WHY_LIMIT],  # its order it knows
            obeys=self._lookout.order,
            **({"wait_s": POLITE_WAIT_S} if self.options.rules.watching else {}),
        )
        if self._idle:
            awaited = "work" if degraded is None else f"the disk: {degraded.why}"
            awaited = f"the end of a rest: {manner.why}" if manner.why else awaited
            updates = f"; {len(kept)} {'update is' if len(kept) == 1 else 'updates are'} kept until settled"
            self._waiting.say(f"waiting for {awaited}{updates if kept else ''}")
        with self._departure.may_leave():
            answer = self._ask_for_work(request)
        if degraded is not None:
            self._degraded = replace(degraded, told=True)
        self._idle, self._at_leisure = answer is None or answer.assignment is None, answer is None
        if not self._idle:
            self._waiting.over()
        return answer

    def _ask_for_work(self, request: PollRequest) -> PollAnswer | None:
        """Poll until there is an answer. A model may come with the first; after a failure it is fetched by itself."""
        asked = request.model_copy(update={"together": TOGETHER, "models": self.spool.models})

        def ask() -> PollAnswer | None:
            nonlocal asked
            this, asked = asked, request
            return self.api.poll(self._known_as.worker_id, this, keep=self._keep_model)

        return self._insist(ask)

    def _keep_model(self, digest: str, data: memoryview) -> None:
        with self._disk_trouble():  # a model that is not kept is fetched
            self._trainer.take_model(digest, data)

    def _follow(self, answer: PollAnswer) -> None:
        """Do what the coordinator answered: forget, delete, send again, then the new work or what may become work."""
        url = self.identity.url
        self._lookout.obey(answer.order)
        if answer.renew:
            self._renew()
        with self._disk_trouble():
            for job in answer.forget:
                self.spool.drop_job(job, url)
            if set(self._trainer.loaded) & set(answer.forget):
                self._trainer.forget()
                self._trainer.ready()  # torch is loaded before the next job needs it
        for held in [self.spool.find_kept(told, url) for told in answer.settled]:
            if held is not None:
                self._drop(held)
        self._unmask(answer.unmask)
        if answer.assignment is not None:
            self._do(answer.assignment, wanted=answer.wanted)
        else:
            self._send_again(answer.wanted)
            if answer.prepare is not None:
                self._prepare(answer.prepare)

    def _prepare(self, asked: Preparation) -> None:
        """Load a job while there is no work. Only time is won by it: what fails here the assignment meets again.

        Raises:
            Leaving: a signal came.
        """
        log.info("%s: loading it before there is work of it", asked.job)
        self._preparing = watch = Watch()
        try:
            self._make_way(watch)
            with self._disk_trouble(), self._departure.may_leave():
                self._trainer.prepare(asked, watch)
        except (TaskFailure, TaskStopped, Dropped, Unfinished) as ended:
            log.info("%s is not loaded: %s", asked.job, ended)
        finally:
            self._preparing = None

    def _send_again(self, wanted: tuple[Holding, ...]) -> None:
        """Hand in kept updates once more: a power cut took the coordinator's bytes."""
        for told in wanted:
            held = self.spool.find_kept(told, self.identity.url)
            if held is None:
                log.warning("%s, attempt %d, is wanted again, and is not kept here", told.assignment, told.attempt)
                continue
            with self._disk_trouble():
                if not self.spool.intact(held):
                    log.warning("%s is wanted again, and is damaged on this disk too: dropped", told.assignment)
                    self._drop(held)
                    continue
                log.info("%s is wanted again: handing it in once more", told.assignment)
                try:
                    self._hand_in(held, self._durable(held), None, maybe_there=True)
                except Dropped as dropped:
                    log.info("%s is wanted no more: %s", told.assignment, dropped)
                    self._drop(held)

    def _unmask(self, asked: tuple[Unmask, ...]) -> None:
        """Open shares, so that the sum of a round can be unmasked. What cannot be opened is said, and dropped."""
        for one in asked:
            held = self.spool.find(one.assignment, one.attempt)
            if not isinstance(held, Kept):
                log.warning("%s, attempt %d, is to be unmasked, and is not kept here", one.assignment, one.attempt)
                continue
            with self._disk_trouble():
                try:
                    reveal = opened(self.spool, held, one)
                    self._insist(lambda: self.api.reveal(one.assignment, reveal))  # noqa: B023 - called at once
                except RefusedError as error:
                    log.error("%s: no share is opened, and it is dropped: %s", one.assignment, error)
                    self._drop(held)
                except LydianError as error:
                    if plan.after(error).action == "stop":
                        raise
                    log.info("%s: the shares are not wanted: %s", one.assignment, error)
                    self._drop(held)

    # ------------------------------------------------------------ doing it

    def _do(self, assignment: Assignment, *, known: Untrained | None = None, wanted: tuple[Holding, ...] = ()) -> None:
        """Carry out one assignment. Whatever becomes of it, the agent goes on.

        Args:
            assignment: what to do.
            known: the same from an earlier life; None: it is new.
            wanted: updates that go before it.
        """
        label = f"{assignment.job} {assignment.kind} round {assignment.round} shard {assignment.shard}"
        room = plan.room_needed(assignment, fetched=0)
        with self._attempt(assignment.id, assignment.attempt, label, room) as heart:
            self._send_again(wanted)
            self._trainer.check_trust(assignment.task)
            begun = self.spool.start_again(known) if known else self.spool.begin(assignment, self.identity.url)
            self._make_way(heart)
            durability = self.spool.durability(begun)
            heart.on_first_beat = durability.begin
            trained = self._trainer.carry_out(begun, durability, heart)
            self._hand_in(trained, durability, heart, together=assignment.together)
            log.info("%s: %d samples in %.2f s", label, trained.submission.samples, trained.submission.seconds)

    def _make_way(self, watch: Watch) -> None:
        """Begin no work that the worker is not to do: the lookout may have said so before it saw this watch.

        Raises:
            TaskStopped: out of the way.
        """
        manner = self._lookout.manner
        if manner.act == "rest":
            watch.put_aside(manner.why)
            raise TaskStopped(manner.why)

    def _behave(self, manner: Manner) -> None:
        """The lookout found that the worker is to behave in another way. Called from any thread."""
        heart = self._heart
        match manner.act:
            case "rest":
                if (watch := heart or self._preparing) is not None:
                    watch.put_aside(manner.why)
                self._trainer.kill()
            case "hold" if heart is not None:
                heart.held = manner.why
                self._trainer.hold()
            case _:
                if heart is not None:
                    heart.held = ""
                self._trainer.go_on()

    @contextlib.contextmanager
    def _attempt(self, assignment: str, attempt: int, label: str, room: int = 0) -> Iterator[Heart]:
        """Inside, its heart beats, and what is logged is about it. Arguments: `_beating`."""
        worker = self._known_as.worker_id
        said = about(assignment=assignment, attempt=attempt, worker=worker)
        with said, self._beating(assignment, attempt, label, room) as heart:
            yield heart

    @contextlib.contextmanager
    def _beating(self, assignment: str, attempt: int, label: str, room: int) -> Iterator[Heart]:
        """Inside, its heart beats. What becomes of an attempt that ends in another way than by a receipt is here.

        Args:
            assignment: its id.
            attempt: its number.
            label: what the log calls it.
            room: bytes that it needs on the disk, as far as that is known.
        """
        welcome = self._known_as
        heart = Heart(self.api, welcome.worker_id, self.identity.start_id, assignment, attempt, welcome.heartbeat_s)
        heart.on_pause = lambda: self._lookout.obey("pause")
        self._heart = heart
        try:
            with heart:  # it has stopped when the work is given back: a beat would take it again
                if self._departure.time_is_up.is_set():
                    raise Leaving
                yield heart
        except TaskFailure as failure:
            log.warning("%s: %s", label, failure.sentence)
            if failure.code == "out_of_memory" and self._lookout.look().act == "rest":
                self._put_aside(heart, label)  # another process took the memory before the lookout saw it
                return
            number = plan.errno_in(failure.sentence) if failure.code == "worker_error" else None
            self._give_back(heart, number, room, failure.code, failure.sentence, failure.detail, failure.scene)
        except NoRoom as short:
            log.warning("%s: %s", label, short)
            self._give_back_for_room(heart, str(short), short.room)
        except OSError as error:  # this machine's disk, not the task: the agent lives on
            log.warning("%s: %s", label, error)
            sentence = f"{self.options.name} cannot use its state folder: {error}"
            self._give_back(heart, error.errno, room, "worker_error", sentence)
        except (TaskStopped, Unfinished, Dropped) as ended:
            self._end(heart, label, ended)
        except Leaving:
            self._release(heart)
            raise
        finally:
            self._heart = None
            self._trainer.go_on()

    def _end(self, heart: Heart, label: str, ended: Exception) -> None:
        """The attempt was stopped, or its result is not wanted."""
        if heart.fatal is not None:
            raise heart.fatal from ended
        if self._departure.time_is_up.is_set() and not isinstance(ended, Dropped):
            self._release(heart)
            raise Leaving from ended
        if heart.aside and not (heart.order_reason or isinstance(ended, Dropped)):
            self._put_aside(heart, label)
            return
        log.info("%s: dropped: %s", label, heart.order_reason or ended)
        late = isinstance(ended.__cause__, LateError)  # also said of what counted in a round that is closed
        self._drop(self.spool.find(heart.assignment, heart.attempt), may_count=late)

    def _give_back(
        self,
        heart: Heart,
        number: int | None,
        room: int,
        code: str,
        sentence: str,
        detail: str = "",
        scene: Scene | None = None,
    ) -> None:
        """Give back what failed; what the disk did is the disk's fault, whoever tells of it.

        Args:
            heart: of the attempt.
            number: of the system's error; None: there was none.
            room: bytes that the attempt needs on the disk.
            code: one of messages.Abandon's, where it was not the disk.
            sentence: what happened.
            detail: the traceback.
            scene: the machine then.
        """
        verdict = plan.disk_verdict(number)
        if verdict == "broken":
            raise self._broken(sentence)
        if verdict == "other":
            self._abandon(heart.assignment, heart.attempt, code, sentence, detail, scene)
            self._drop(self.spool.find(heart.assignment, heart.attempt))
        else:
            self._give_back_for_room(heart, self._unwritable(sentence), room if verdict == "full" else 0)

    def _give_back_for_room(self, heart: Heart, sentence: str, room: int) -> None:
        self._degrade(sentence, room)
        held = self.spool.find(heart.assignment, heart.attempt)
        if isinstance(held, Trained):
            log.warning("%s is trained: it stays in the spool, and is handed in at the next start", heart.assignment)
            return
        self._abandon(heart.assignment, heart.attempt, "disk_full", sentence)
        self._drop(held)

    def _put_aside(self, heart: Heart, label: str) -> None:
        """Out of the way: give the work back, for another worker to take; gone on with later if none has."""
        self._trainer.close()  # before anybody is told: its memory is what somebody waits for
        log.info("%s: given back: %s", label, heart.aside)
        sentence = f"{self.options.name} is out of the way: {heart.aside}"
        self._abandon(heart.assignment, heart.attempt, "released", sentence)
        held = self.spool.find(heart.assignment, heart.attempt)
        if isinstance(held, Untrained):
            with self._disk_trouble():
                self.spool.put_aside(held)

    def _release(self, heart: Heart) -> None:
        """Leaving: what is trained stays in the spool for the next start, anything less goes to another worker.

        So does what cannot be given back now. At the second signal the goodbye alone gives it back.
        """
        held = self.spool.find(heart.assignment, heart.attempt)
        if isinstance(held, Trained):
            log.info("%s is trained, and stays in the spool for the next start", heart.assignment)
        elif not self._departure.at_once:
            reason = Abandon(attempt=heart.attempt, code="released", sentence=f"{self.options.name} was stopped")
            try:
                self.api.abandon(heart.assignment, reason)
            except LydianError as error:
                log.info("%s stays in the spool for the next start: %s", heart.assignment, error)
            else:
                self._drop(held)

    def _abandon(
        self,
        assignment: str,
        attempt: int,
        code: Any,  # noqa: ANN401
        sentence: str,
        detail: str = "",
        scene: Scene | None = None,
    ) -> None:
        said, whole = sentence[:SENTENCE_LIMIT], detail[-DETAIL_LIMIT:]
        reason = Abandon(attempt=attempt, code=code, sentence=said, detail=whole, scene=scene)
        try:
            self._insist(lambda: self.api.abandon(assignment, reason))
        except LydianError as error:
            if plan.after(error).action == "stop":
                raise
            log.info("%s: %s", assignment, error)

    # ------------------------------------------------------------ handing in

    def _durable(self, held: Trained) -> Durability:
        durability = self.spool.durability(held)
        durability.begin()
        return durability

    def _hand_in(
        self,
        held: Trained,
        durability: Durability,
        heart: Heart | None,
        *,
        maybe_there: bool = False,
        together: int = 0,
    ) -> None:
        """Upload and submit until the coordinator says what became of it. What is acknowledged is on this disk.

        The beats' orders do not matter any more: a result that comes late may still be useful, and the coordinator
        alone knows.

        Args:
            held: what was trained.
            durability: of its files, begun.
            heart: of the attempt, to show what is done; None: it has none.
            maybe_there: the coordinator may have it already, or some of its bytes.
            together: bytes up to which it may be uploaded and submitted in one call.

        Raises:
            Dropped: the coordinator wants the result no more.
            LydianError: it will accept nothing from this worker.
            Leaving: it could not be handed in within the grace.
        """
        if heart is not None:
            heart.progress = Progress(doing="uploading", samples=held.submission.samples)

        def hand_in(failed: LydianError | None) -> Receipt:
            if failed is not None and plan.doubts_bytes(failed) and not self.spool.intact(held):
                raise Dropped(f"it is damaged on this disk: {failed}")
            if failed is None and not maybe_there and (receipt := self._offer_at_once(held, durability, together)):
                return receipt
            return self._offer(held, durability, maybe_there=maybe_there or failed is not None)

        try:
            receipt = self._carry(self._departure.time_is_up, hand_in)
        except Unfinished as unfinished:
            raise Leaving from unfinished
        log.debug("%s", receipt.reason)
        if plan.stays(held.place.kind):
            with self._disk_trouble():
                self.spool.keep(held)
        else:
            self._drop(held)

    def _offer_at_once(self, held: Trained, durability: Durability, together: int) -> Receipt | None:
        """Hand in a small update by one call; None: it is none."""
        if held.submission.digest is None or held.place.update.stat().st_size > together:
            return None
        self._await_disk(durability)
        return self.api.hand_in(held.place.assignment, held.place.update, held.submission)

    def _offer(self, held: Trained, durability: Durability, *, maybe_there: bool) -> Receipt:
        """One try to hand in. What may be there already is submitted first: once it counts, its bytes are refused."""
        if maybe_there:
            self._await_disk(durability)
            try:
                return self._submit(held)
            except ConflictError as error:
                if error.code != "incomplete":
                    raise
        if held.submission.digest is not None:
            self.api.upload(
                held.place.assignment,
                held.place.attempt,
                held.place.update,
                resume=maybe_there,
                stop=self._departure.uploads_end,
            )
        self._await_disk(durability)
        return self._submit(held)

    def _submit(self, held: Trained) -> Receipt:
        submission: Submission = held.submission
        return self.api.submit(held.place.assignment, submission)

    # ------------------------------------------------------------ the disk

    def _await_disk(self, durability: Durability) -> None:
        """Wait until what is about to be acknowledged would survive a power cut. A full disk only costs that."""
        try:
            durability.wait()
        except OSError as error:
            if plan.disk_verdict(error.errno) == "broken":
                raise self._broken(str(error)) from error
            log.warning("the copy kept here may not survive a power cut: %s", error)

    def _degrade(self, why: str, room: int) -> None:
        log.warning("degraded, so no work is taken: %s", why)
        self._degraded = Degraded(why, room)

    def _look_whether_well(self) -> None:
        """Take work again once the disk does; looked at before each poll, after the coordinator has heard of it."""
        degraded = self._degraded
        if degraded is None or not degraded.told:
            return
        trouble = degraded.why
        with self._disk_trouble():
            trouble = self.spool.trouble(degraded.room)
        if trouble:
            self._degraded = replace(degraded, why=trouble)
        else:
            log.info("well again: %s can be written, so work is taken", self.spool.folder)
            self._degraded = None

    @contextlib.contextmanager
    def _disk_trouble(self) -> Iterator[None]:
        """Inside, what the disk refuses is said, and costs at most a file that stays."""
        try:
            yield
        except OSError as error:
            verdict = plan.disk_verdict(error.errno)
            if verdict == "broken":
                raise self._broken(str(error)) from error
            if verdict == "other":
                log.warning("the spool: %s", error)
            else:
                self._degrade(self._unwritable(str(error)), 0)

    def _unwritable(self, what: str) -> str:
        free = self.spool.free()
        return f"{self.options.name} cannot write to {self.spool.folder} ({free} bytes are free there): {what}"

    def _broken(self, what: str) -> LydianError:
        """A disk that fails cannot be argued with: what is on it is not known until a next start has looked."""
        return LydianError(
            f"the disk under {self.spool.folder} is broken: {what}",
            code="disk_broken",
            advice="Look into the system's log; start the worker on another disk with --state-dir.",
        )

    def _drop(self, held: Attempt | None, *, may_count: bool = False) -> None:
        if held is not None:
            with self._disk_trouble():
                self.spool.drop(held, may_count=may_count)
