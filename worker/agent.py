"""The agent: asks the coordinator for work, has the child do it, and hands in what came out.

    register ─▶ poll ─▶ download ─▶ child trains (heartbeats meanwhile) ─▶ upload ─▶ submit ─▶ poll …

No torch in this process. The agent outlives a coordinator that is away and a task that crashes, but not its own bugs.
The first SIGTERM lets it finish what it does and leave; the second stops it at once.
"""

import contextlib
import logging
import random
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np

from common import PROTOCOL, __version__
from common.api import CoordinatorApi
from common.errors import BadJobError, LydianError, UnauthenticatedError
from common.messages import (
    Abandon,
    Assignment,
    Heartbeat,
    ModelFacts,
    PollRequest,
    Progress,
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
from worker.identity import Identity
from worker.spool import Spool

log = logging.getLogger("lydian.worker")

STOP_GRACE_S = 10.0  # for the child to stop at its next step, before it is killed

T = TypeVar("T")


class Leaving(BaseException):
    """A signal asked the agent to go, at a moment when it can. Not an Exception: no handler of errors may stop it."""


class Dropped(Exception):  # noqa: N818 - not an error: the work counts no more
    """The assignment counts no more, or not from here; the agent polls for new work."""


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
        self._signals = 0
        self._interruptible = False
        self._draining = False

    # ------------------------------------------------------------ life

    def run(self) -> None:
        """Work until told to leave. Returns when the agent has left in good order.

        Raises:
            LydianError: the coordinator will never accept this worker as it is; the sentence says why.
        """
        self._catch_signals()
        try:
            self._ready_child()
            welcome = self._register()
            while not self._draining:
                assignment = self._poll()
                if assignment is not None:
                    self._do(assignment, welcome)
        except Leaving:
            log.info("stopping at once" if self._signals > 1 else "leaving")
        finally:
            self._leave()

    def _catch_signals(self) -> None:
        def caught(number: int, _: FrameType | None) -> None:
            self._signals += 1
            self._draining = True
            if self._interruptible or self._signals > 1:
                self._interruptible = False
                raise Leaving
            log.info("%s: finishing what is under way; once more stops at once", signal.Signals(number).name)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, caught)

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

    def _leave(self) -> None:
        if self._child is not None:
            self._child.kill()
        if self.identity.worker_id is not None:
            try:
                self.api.leave(self.identity.worker_id, self.identity.start_id)
            except LydianError as error:
                log.info("left without a goodbye: %s", error)
        self.api.close()

    def _register(self) -> Welcome:
        child = self._ready_child()
        registration = Registration(
            name=self.options.name,
            protocol=PROTOCOL,
            version=__version__,
            start_id=self.identity.start_id,
            hardware=hardware.describe(child.hello, child.hello.device),
            data=tuple(sorted(self.options.data)),
            trust=self.options.trust,
            trusted=self.options.trusted,
        )
        if self.identity.credential is not None:
            self.api.use_token(self.identity.credential)
        with self._may_leave():
            welcome = self._insist(lambda: self._introduce(registration))
        if welcome.credential is not None:
            self.identity.remember(welcome.worker_id, welcome.credential)
            self.api.use_token(welcome.credential)
        log.info("%s (%s) at %s", welcome.reason, welcome.worker_id, self.api.url)
        return welcome

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

    def _insist(self, call: Callable[[], T]) -> T:
        """Make a call until it is answered; an answer that is final is raised."""
        failures, said = 0, ""
        while True:
            try:
                return call()
            except LydianError as error:
                if plan.after(error).action != "wait":
                    raise
                failures += 1
                if str(error) != said:
                    said = str(error)
                    log.warning("%s; trying again", said)
                time.sleep(plan.wait_s(failures, random.random()))  # between two tries, with jitter

    # ------------------------------------------------------------ work

    def _poll(self) -> Assignment | None:
        assert self.identity.worker_id is not None  # noqa: S101 - registered
        worker, request = (
            self.identity.worker_id,
            PollRequest(
                start_id=self.identity.start_id,
                claim_key=secrets.token_hex(8),
                loaded=(self._opened,) if self._opened else (),
            ),
        )
        with self._may_leave():
            answer = self._insist(lambda: self.api.poll(worker, request))
        if answer is None:
            return None
        if self._opened in answer.forget:
            self._close_child()
            self._ready_child()  # torch is loaded before the next job needs it
        return answer.assignment

    def _do(self, assignment: Assignment, welcome: Welcome) -> None:
        """Carry out one assignment. Whatever becomes of it, the agent goes on."""
        label = f"{assignment.job} {assignment.kind} round {assignment.round} shard {assignment.shard}"
        with _Heart(self, assignment, welcome.heartbeat_s) as heart:
            try:
                self._check_trust(assignment)
                submission = self._carry_out(assignment, heart)
                if submission.digest is not None:
                    heart.progress = Progress(doing="uploading", samples=submission.samples)
                self._hand_in(assignment, submission, heart)
                log.info("%s: %d samples in %.2f s", label, submission.samples, submission.seconds)
            except TaskFailure as failure:
                log.warning("%s: %s", label, failure.sentence)
                self._abandon(assignment, failure.code, failure.sentence, failure.detail)
            except OSError as error:  # this machine's disk, not the task: the agent lives on
                log.warning("%s: %s", label, error)
                self._abandon(assignment, "worker_error", f"{self.options.name} cannot use its state folder: {error}")
            except (TaskStopped, Dropped) as dropped:
                log.info("%s: dropped: %s", label, heart.order_reason or dropped)
            except Leaving:
                self._abandon(assignment, "released", "the worker was stopped", insist=False)
                raise
            finally:
                self.spool.drop(assignment)
        if heart.order == "drain":
            self._draining = True

    def _check_trust(self, assignment: Assignment) -> None:
        options = self.options
        refused = plan.refusal(assignment.task, builtin=BUILTIN, trust=options.trust, trusted=options.trusted)
        if refused is not None:
            raise TaskFailure(refused.code, refused.sentence, "")

    def _carry_out(self, assignment: Assignment, heart: "_Heart") -> Submission:
        base, received = self._fetch(assignment, heart)
        child = self._child_for(assignment, heart)
        if assignment.kind == "init":
            return self._init(child, assignment, heart)
        if assignment.kind == "train":
            indices = self._indices(child, assignment, heart)
            command = plan.train_command(assignment, base=base, indices=indices, out=str(self.spool.update(assignment)))
        else:
            command = {"do": "evaluate", "base": base, "batch_size": assignment.spec.train.batch_size}
        done = child.ask(command, on_progress=heart.see, stall_s=self.options.stall_s)
        return Submission(
            attempt=assignment.attempt,
            digest=file_digest(self.spool.update(assignment)) if assignment.kind == "train" else None,
            samples=done["samples"],
            steps=done.get("steps", 0),
            seconds=done["seconds"],
            metrics=done["metrics"],
            bytes_down=received,
        )

    def _init(self, child: Child, assignment: Assignment, heart: "_Heart") -> Submission:
        out = self.spool.update(assignment)
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

    def _indices(self, child: Child, assignment: Assignment, heart: "_Heart") -> str | None:
        """The file with the samples of the shard; None: all of this worker's own data."""
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
        return str(self.spool.write_indices(assignment, chosen))

    def _cut(self, child: Child, assignment: Assignment, heart: "_Heart") -> Partition:
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

    def _fetch(self, assignment: Assignment, heart: "_Heart") -> tuple[str, int]:
        """The base model as a local file. Returns its path and the bytes that were downloaded for it."""
        if assignment.base is None:
            return "", 0
        path, received = self.spool.model(assignment.base.digest), 0
        if not path.exists():
            heart.progress = Progress(doing="downloading")
            received = self._transfer(
                lambda _: self.api.download_model(assignment.base.digest if assignment.base else "", path), heart
            )
            self.spool.trim_models(keep=assignment.base.digest)
        return str(path), received

    def _hand_in(self, assignment: Assignment, submission: Submission, heart: "_Heart") -> None:
        """Upload and submit until the coordinator says what became of it."""
        out = self.spool.update(assignment)

        def hand_in(again: bool) -> None:
            if submission.digest is not None:
                self.api.upload(assignment.id, assignment.attempt, out, resume=again)
            receipt = self.api.submit(assignment.id, submission)
            log.debug("%s", receipt.reason)

        self._transfer(hand_in, heart)

    def _transfer(self, call: Callable[[bool], T], heart: "_Heart") -> T:
        """Make a call with bytes until it is answered. It is told whether it is a repeat.

        Raises:
            Dropped: the coordinator wants the result no more.
            LydianError: it will accept nothing from this worker.
        """
        failures = resends = 0
        while True:
            try:
                return call(failures > 0)
            except LydianError as error:
                then = plan.after(error, resends=resends)
                if then.action == "stop":
                    raise
                if then.action == "drop" or heart.order in ("cancelled", "superseded"):
                    raise Dropped(then.why) from error
                failures += 1
                resends += then.action == "resend"
                log.warning("%s; trying again", then.why)
                heart.wait(plan.wait_s(failures, random.random()))

    def _abandon(self, assignment: Assignment, code: Any, sentence: str, detail: str = "", insist: bool = True) -> None:  # noqa: ANN401
        reason = Abandon(attempt=assignment.attempt, code=code, sentence=sentence[:2000], detail=detail[-200_000:])
        try:
            if insist:
                self._insist(lambda: self.api.abandon(assignment.id, reason))
            else:
                self.api.abandon(assignment.id, reason)
        except LydianError as error:
            if plan.after(error).action == "stop":
                raise
            log.info("%s: %s", assignment.id, error)

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

    def _child_for(self, assignment: Assignment, heart: "_Heart") -> Child:
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
            path = self._task_file(task.digest, task.name, heart)
        config = plan.child_config(assignment.spec, builtin.config if builtin else {}, self.options.data)
        child.ask(
            {"do": "open", "task": str(path), "config": config}, on_progress=heart.see, stall_s=self.options.stall_s
        )
        self._opened = assignment.job
        return child

    def _task_file(self, digest: str, name: str, heart: "_Heart") -> Path:
        path = self.spool.task(digest, name)
        if not path.exists() or file_digest(path) != digest:
            self._transfer(lambda _: self.api.download_task(digest, path), heart)
        return path


class _Heart(threading.Thread):
    """Beats while an assignment is under way: tells the coordinator, and stops the child when it is told to."""

    def __init__(self, agent: Agent, assignment: Assignment, period_s: float) -> None:
        super().__init__(name="heart", daemon=True)
        self.progress = Progress(doing="loading")
        self.child: Child | None = None
        self.order = "continue"
        self.order_reason = ""
        self._agent, self._assignment, self._period_s = agent, assignment, period_s
        self._ended = threading.Event()
        self._ordered = threading.Event()

    def __enter__(self) -> "_Heart":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def see(self, progress: Progress) -> None:
        """The child reported."""
        self.progress = progress

    def wait(self, seconds: float) -> None:
        """Wait between two tries, or until the coordinator ordered something else."""
        self._ordered.wait(seconds)

    def run(self) -> None:
        """Beat until the assignment is over."""
        agent, assignment = self._agent, self._assignment
        assert agent.identity.worker_id is not None  # noqa: S101 - registered
        said = ""
        while not self._ended.wait(self._period_s):
            beat = Heartbeat(
                start_id=agent.identity.start_id,
                assignment=assignment.id,
                attempt=assignment.attempt,
                progress=self.progress,
            )
            try:
                answer = agent.api.heartbeat(agent.identity.worker_id, beat)
            except LydianError as error:
                if str(error) != said:
                    said = str(error)
                    log.warning("heartbeat: %s; the work goes on", said)
                if plan.after(error).action == "wait":
                    continue
                self._obey("superseded", str(error))
                return
            said = ""
            if answer.order in ("cancelled", "superseded"):
                self._obey(answer.order, answer.reason)
                return
            self.order = answer.order

    def _obey(self, order: str, reason: str) -> None:
        self.order, self.order_reason = order, reason
        self._ordered.set()
        if self.child is not None:
            self.child.stop()
            if not self._ended.wait(STOP_GRACE_S):  # a step longer than that, or a loop of its own that never looks
                self.child.kill()
