"""The coordinator: owns the state and the clock, and carries out what server.rounds decides.

Every change of state happens synchronously on the event loop: decide (rounds), journal (store), evolve, publish. Only
bytes are handled off the loop: looking at an update, averaging, fsync. What a phase calls for is found by looking at
the phase (`_settle`), not by remembering what was started; so a restarted coordinator goes on by looking once.
"""

import asyncio
import errno
import hashlib
import logging
import math
import os
import time
from collections import Counter
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn, Self, TypeVar

from common import PROTOCOL, __version__, begins
from common.advice import advise
from common.cautions import cautions
from common.drift import check_rate_sum, farthest
from common.errors import (
    BadJobError,
    BadTaskError,
    BadUpdateError,
    ConflictError,
    DiskFullError,
    ForbiddenError,
    LateError,
    LydianError,
    NotFoundError,
    SupersededError,
    UnavailableError,
    VersionSkewError,
)
from common.facts import (
    Accepted,
    Evaluated,
    Fact,
    HandedBack,
    HandedOut,
    Initialised,
    OpenedAnew,
    RoundClosed,
    Shard,
    Submitted,
)
from common.logs import ids, ids_of
from common.messages import (
    TOGETHER,
    Abandon,
    Assignment,
    Beginning,
    Group,
    Heartbeat,
    HeartbeatAnswer,
    Holding,
    JobRequest,
    JobSpec,
    ModelRef,
    Order,
    PollAnswer,
    PollRequest,
    Preparation,
    Range,
    Receipt,
    Registration,
    Reveal,
    Roster,
    Scene,
    SecureKeys,
    SecureShares,
    Slots,
    StepRef,
    Submission,
    Submitter,
    Welcome,
)
from common.tasks import BUILTIN
from common.weights import file_digest, read_layout
from server import attempts, drift, folding, nova, privacy, rounds, securing, versions
from server.accounting import AccountantError, Accounting, Planned, example_level, worker_level
from server.blobs import Blobs
from server.buffering import Batch, Buffering, shards_for, size_of
from server.cutting import Place, Sampled
from server.deadlines import Due, expected_s
from server.dues import Dues
from server.evaluation import is_repeat
from server.events import Hub
from server.failpoints import reach
from server.fleet import Fleet, Lease, Timing, Worker
from server.given import Given, job_called, not_here
from server.inspection import Inspection, inspect
from server.keeping import Keeping, keeps_updates
from server.login import parse_rules
from server.logins import Logins
from server.naming import assignment_id, new_id, parse_assignment
from server.probe import Probes
from server.quotas import Quotas
from server.recorder import Recorder
from server.rounds import Aggregating, Job, Limits, Paused, Step, Task, Training
from server.sealing import Sums, check_can_sum, is_secure
from server.securing import Decision, Seal
from server.seeds import SeedLostError, Seeds
from server.settings import Settings
from server.speeds import Speeds, ahead, counted, work_of
from server.store import DiskBrokenError, Journal, StoredFact
from server.tailnet import Tailnet
from server.tokens import Principal, Tokens
from server.unmasking import inspect_masked
from server.uploads import Key, Uploads

PROTOCOLS = (PROTOCOL - 1, PROTOCOL)  # served; the newest last
ORDERS_SINCE = 2  # the protocol that has operators' orders to workers
REAPER_S = 1.0  # between two looks at leases and deadlines; less where leases are short
MASKED_SIZE = 8  # a masked number has eight bytes, and a number of a model at least one
HEADER_ROOM = 1 << 20  # bytes that an update's file may be larger than its base's

V = TypeVar("V")

DAMAGED = "digest_mismatch"  # on the way: the bytes are sent again, and it is nobody's fault
EXIT_DISK_BROKEN = 74  # EX_IOERR of sysexits.h

log = logging.getLogger("lydian.coordinator")


@dataclass
class Coordinator:
    """All state of one coordinator. Made by `open`, run by `start`, ended by `stop`."""

    settings: Settings
    journal: Journal
    blobs: Blobs
    tokens: Tokens
    hub: Hub
    clock: Callable[[], float] = time.monotonic
    jobs: dict[str, Job] = field(default_factory=dict)  # by id, oldest first
    submitted_at: dict[str, str] = field(default_factory=dict)  # job id -> ISO time
    submitted_by: dict[str, Submitter | None] = field(default_factory=dict)  # job id -> whose call it was
    models: dict[str, dict[int, ModelRef]] = field(default_factory=dict)  # job id -> round -> a model that is kept
    steps: dict[str, dict[int, StepRef]] = field(default_factory=dict)  # job id -> round -> the way to its model
    fleet: Fleet = field(default_factory=Fleet)
    speeds: Speeds = field(default_factory=Speeds)
    url: str = ""  # that workers reach it by; empty: not known

    def __post_init__(self) -> None:
        self.fleet.timing = Timing(self.settings.ttl_s, self.settings.heartbeat_s)
        self._limits = Limits(failures=self.settings.max_attempts, expiries=self.settings.max_expiries)
        self._by_key: dict[str, str] = {}  # idempotency key -> job id
        self._uploads = Uploads(self.blobs)
        self._keeping = Keeping()
        self.probes, self.audit = Probes(), Recorder(self.journal, self.clock)
        self.quotas = Quotas(self.settings, self.clock)
        self.given = Given(self._uploads, self.blobs, self.quotas, self.settings.max_model_bytes, self.clock)
        self._sums = Sums(self.journal, self._wake)
        self.accounting, self._seeds = Accounting(), Seeds(self.settings.state_dir)
        given = self.settings
        self.tailnet = Tailnet(given.tailscaled, self.journal, given.node_pin == "enforce", given.tailnet_s, self.clock)
        self.logins = Logins(parse_rules(given.login), given.login_capability, given.tailscaled)
        self._watch: asyncio.Task[None] | None = None
        self._spans: dict[
            Key, tuple[float, float]
        ] = {}  # of first models: monotonic seconds of the first and last byte
        self._arriving = Counter[str]()  # digests that have their name and no fact yet, and how many tasks have them
        self._dropped: set[str] = set()  # digests of files that may be needed no more, not yet deleted
        self._averaging: dict[str, asyncio.Task[None]] = {}
        self._looks: dict[str, asyncio.TimerHandle] = {}
        self._changed = asyncio.Event()
        self._reaper: asyncio.Task[None] | None = None
        self._stopping = False

    # ------------------------------------------------------------ life

    @classmethod
    def open(cls, settings: Settings, journal: Journal, tokens: Tokens) -> Self:
        """Rebuild the state from the journal."""
        blobs = Blobs(settings.state_dir, reserve_bytes=settings.reserve_bytes, ballast=journal.ballast.path)
        self = cls(settings, journal, blobs, tokens, Hub())
        now = self.clock()
        recent: dict[str, tuple[str, int]] = {}  # worker id -> the last job and round it had work of
        for stored in journal.facts():
            self._replay(stored, now)
            if isinstance(stored.fact, HandedOut):
                recent[stored.fact.worker] = (stored.job, stored.fact.round)
        for row in journal.workers():
            self.fleet.workers[row.id] = Worker(
                row.id, row.registration, set_aside=row.set_aside_reason, strikes=row.strikes,
                draining=row.ordered == "drain", paused=row.ordered == "pause",
            )  # fmt: skip
        active = {job.id: job for job in self.jobs.values() if not job.over}
        for job_id in self.jobs.keys() - active.keys():
            self.speeds.forget(job_id)
        for worker_id, (job_id, round_index) in recent.items():
            if job_id in active and round_index >= _oldest(active[job_id]) and worker_id in self.fleet.workers:
                self.fleet.seen(worker_id, now)
        for job in active.values():
            for worker_id in {w for one in job.evaluations.values() for w in one.workers} & self.fleet.workers.keys():
                self.fleet.seen(worker_id, now)  # nobody else can measure on its data
            self.fleet.adopt(((job.id, *out) for out in rounds.outstanding(job)), now)
        return self

    async def start(self) -> None:
        """Verify what the open rounds stand on, and go on where the last coordinator stopped."""
        self._uploads.restore(self._is_awaited)
        for key in self._uploads.begun:
            self.quotas.found_staged(self._uploader(key) or "", key)
        self.blobs.sweep(self._needed())
        self._seeds.sweep([job.id for job in self.jobs.values() if not job.over or keeps_updates(job)])
        self._hold_ballast()
        for job in self._active():
            await self._verify(job)
            self._settle(job.id)
        self._start_reaper()
        self._start_watch()

    def _active(self) -> list[Job]:
        return [job for job in self.jobs.values() if not job.over]

    def _is_awaited(self, key: Key) -> bool:
        """Whether an upload may still be finished."""
        return self._uploader(key) is not None

    def _uploader(self, key: Key) -> str | None:
        """Who may finish an upload: the worker of an attempt at an open task, or of an update that is lost here.

        Of a model that a job is to begin with: the token by which it is sent.
        """
        if (owner := self.given.owner(key)) is not None:
            return owner
        name, attempt = key
        try:
            job_id, task = parse_assignment(name)
        except LydianError:
            return None
        job = self.jobs.get(job_id)
        if job is None:
            return None
        lost = {(update.round, update.shard, update.attempt): update.worker for update in rounds.lost_of(job)}
        if task.kind == "train" and (task.round, task.shard, attempt) in lost:
            return lost[task.round, task.shard, attempt]
        tries = rounds.tries_of(job, task)
        awaited = 1 <= attempt <= tries.attempt and rounds.is_open(job, task)
        return tries.workers[attempt - 1] if awaited else None

    def _hold_ballast(self) -> None:
        """Keep room for the journal; taken back as soon as there is any, after a full disk."""
        ballast = self.journal.ballast
        if ballast.held < ballast.size and not ballast.hold():
            log.debug("%d bytes for the journal's ballast are not free", ballast.size)

    async def stop(self) -> None:
        """Hand out nothing more; what is being averaged is averaged again by the next coordinator."""
        self.end_waits()
        tasks = [*self._averaging.values(), *(task for task in (self._reaper, self._watch) if task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for timer in self._looks.values():
            timer.cancel()
        self._uploads.close()
        self.audit.close()

    def end_waits(self) -> None:
        """Answer everybody who waits: the coordinator is stopping."""
        self._stopping = True
        self._wake()
        self.hub.close()

    def _replay(self, stored: StoredFact, now: float) -> None:
        fact = stored.fact
        if isinstance(fact, RoundClosed):
            self._dropped |= self._keeping.closed(self.jobs[stored.job])
        if isinstance(fact, Submitted):
            self.jobs[stored.job] = rounds.new_job(stored.job, fact)
            self._by_key[fact.key] = stored.job
            self.submitted_at[stored.job] = stored.at
            self.submitted_by[stored.job] = fact.by
        else:
            self.jobs[stored.job] = rounds.evolve(self.jobs[stored.job], fact, now)
        self._note(stored)

    async def _verify(self, job: Job) -> None:
        """After a power cut a file may be gone or short under a right name. A lost update is asked for again."""
        try:
            self._seed_of(job)
        except SeedLostError as error:
            self._apply(job.id, rounds.fail(job, f"{error} {error.advice}"))
            return
        models = [job.model.digest] if job.model else rounds.bases_of(job)
        for digest, what in [*((model, "model") for model in models), *drift.carried(job).items()]:
            if not await asyncio.to_thread(self._intact, digest):
                self._apply(job.id, rounds.fail(job, f"the {what} {digest[:12]}… is damaged on the disk"))
                return
        known = rounds.lost_of(job)
        for update in rounds.accepted_of(job):
            intact = await asyncio.to_thread(self._intact, update.digest)
            if not intact:
                self.blobs.remove(update.digest)  # no name without its bytes
            if intact == (update in known):
                self._apply(job.id, rounds.restored(update) if intact else rounds.lost(update))
        for update in rounds.waiting_late(job):
            if not await asyncio.to_thread(self._intact, update.digest):
                self.blobs.remove(update.digest)
                task = Task("train", update.round, update.shard)
                self._apply(job.id, rounds.late(task, update.attempt, update.worker))

    def _give_up_lost(self, job: Job) -> None:
        """Open the shards again whose update is lost here and whose worker has been gone for a lease time."""
        now = self.clock()
        for update in rounds.lost_of(job):
            worker = self.fleet.workers.get(update.worker)
            if worker is None or not self.fleet.is_live(worker, now):
                self._open_again(job.id, update, f"{update.worker_name} has been gone for {self.settings.ttl_s:g} s")

    def _open_again(self, job_id: str, update: Accepted, why: str) -> None:
        sentence = f"the update {update.digest[:12]}… is not whole on the disk after a restart, and {why}"
        task = Task("train", update.round, update.shard)
        back = self._back(task, update.attempt, update.worker, "lost", sentence)
        self._apply(job_id, Step((back,), sentence))

    def _intact(self, digest: str) -> bool:
        path = self.blobs.path(digest)
        return path.exists() and file_digest(path) == digest

    # ------------------------------------------------------------ the one way to change a job

    def _apply(self, job_id: str, step: Step) -> Job:
        """Journal a decision, make it the state, tell who listens, and do what the new phase calls for."""
        before = self.jobs[job_id]
        for stored in self._keep_facts(job_id, step):
            self._replay(stored, self.clock())
            self.hub.publish(stored)
        if step.facts:
            log.info("%s: %s", job_id, step.reason, extra=ids_of(job_id, step.facts[0]))
            frees = isinstance(before.inner, Buffering)  # an accepted update: its shard is there for others
            if any(not isinstance(fact, HandedOut if frees else HandedOut | Accepted) for fact in step.facts):
                self._wake()
            if self.jobs[job_id].over or isinstance(self.jobs[job_id].inner, Aggregating):
                held = (update.digest for update in (*rounds.accepted_of(before), *rounds.waiting_late(before)))
                self._dropped.update(held, rounds.bases_of(before))  # what is frozen is needed, what was refused is not
            if before.spec.secure.enabled:
                self._end_sum(before, step)
            went_out = all(isinstance(fact, HandedOut) for fact in step.facts)
            if went_out and isinstance(before.inner, Training) and not is_secure(before):
                self.hub.touch(job_id)  # it makes nothing due
            else:
                self._settle(job_id)
        return self.jobs[job_id]

    def _keep_facts(self, job_id: str, step: Step) -> list[StoredFact]:
        try:
            return self.journal.append(job_id, step.facts) if step.facts else []
        except DiskBrokenError as error:
            _die(str(error))

    def _note(self, stored: StoredFact) -> None:
        """Keep the indexes that are derived from facts."""
        match stored.fact:
            case Initialised() as fact:
                self._keep(stored.job, 0, ModelRef(digest=fact.digest, size=fact.size))
                if (given := self.jobs[stored.job].begins_with) is not None:
                    self._dropped.add(given.digest)  # from now on it has a model of its own
            case RoundClosed() as fact:
                if fact.step is not None:
                    self.steps.setdefault(stored.job, {})[fact.round] = fact.step
                self._keep(stored.job, fact.round, ModelRef(digest=fact.digest, size=fact.size))
            case Accepted() as fact:
                job = self.jobs[stored.job]
                self.speeds.note(job.id, work_of(job.spec, job.task_digest), job.spec, fact)

    def _keep(self, job_id: str, round_index: int, model: ModelRef) -> None:
        """Keep the newest models and the best one; forget the others."""
        models = self.models.setdefault(job_id, {})
        models[round_index] = model
        job = self.jobs[job_id]
        wanted = {job.best_round, job.metrics_round, *job.evaluations, *sorted(models)[-self.settings.keep_models :]}
        for old in [r for r in models if r not in wanted]:
            self._dropped.add(models.pop(old).digest)
        steps = self.steps.get(job_id, {})
        useful = {step.digest for index in models for step in rounds.way_to(index, models[index].size, steps)}
        for old in [r for r, step in steps.items() if step.digest not in useful]:
            self._dropped.add(steps.pop(old).digest)

    def keeps(self, digest: str) -> bool:
        """Whether this is a model that is kept, or that work which goes on begins with, a step to one, or a slot."""
        models = (model.digest for models in self.models.values() for model in models.values())
        steps = (step.digest for steps in self.steps.values() for step in steps.values())
        if digest in models or digest in steps or any(digest in rounds.bases_of(job) for job in self._active()):
            return True
        return any(digest in drift.carried(job) for job in self._active() if job.spec.train.drift != "none")

    def _settle(self, job_id: str) -> None:
        """Do what the job's phase calls for. Safe to call at any time, any number of times."""
        job, now = self.jobs[job_id], self.clock()
        if (timer := self._looks.pop(job_id, None)) is not None:
            timer.cancel()
        if job.over:
            self._forget(job_id)
            return
        if any(one.workers for one in job.evaluations.values()):
            step = rounds.give_up_absent(job, self.fleet.there(now), self.fleet.tasks_held(job_id), now)
            if step.facts:
                self._apply(job_id, step)
                return
        if is_secure(job):
            step = self.sum_now(job, now, change=True)
        else:
            step = rounds.close_if_due(job, self.fleet.there(now), now, self.dues(job))
        if step.facts:
            reach("frozen-before")
            self._apply(job_id, step)
            reach("frozen-after")
            for fact in step.facts:
                if isinstance(fact, HandedBack):  # after the facts: a kill between them forgives, and counts none twice
                    self._strike(self.worker(fact.worker), fact.sentence)
            return
        if step.look_again_at is not None:
            delay = max(step.look_again_at - now, 0.0)
            self._looks[job_id] = asyncio.get_running_loop().call_later(delay, self._settle, job_id, context=Context())
        frozen = rounds.frozen_of(job)
        due = frozen is not None and not rounds.lost_of(job) and self._sums.is_due(job)
        if frozen is not None and due and job_id not in self._averaging:
            average = self._average(job_id, frozen)  # in a context of its own: nobody's call decides what comes of it
            task = asyncio.create_task(average, name=f"average {job_id}", context=Context())
            task.add_done_callback(lambda done: self._averaged(job_id, done))
            self._averaging[job_id] = task
        self.hub.touch(job_id)

    def _forget(self, job_id: str) -> None:
        """Drop what an ended job held: leases, half uploads, updates that were not averaged, steps, outer state."""
        for lease in [lease for lease in self.fleet.leases.values() if lease.job == job_id]:
            self.fleet.release(lease.worker, job_id, lease.task)
        self.fleet.asked.pop(job_id, None)
        self.speeds.forget(job_id)
        if self.jobs[job_id].spec.secure.enabled:
            self._sums.forget(job_id)
        if not keeps_updates(self.jobs[job_id]):  # beside those the seed tells nothing more
            self._seeds.remove(job_id)
        self._uploads.drop_job(job_id)
        for key in [key for key in self._spans if key[0].startswith(f"{job_id}.")]:
            del self._spans[key]
        steps = self.steps.pop(job_id, {})
        self._dropped |= {step.digest for step in steps.values()} | set(drift.carried(self.jobs[job_id]))
        self._dropped |= {digest} if (digest := self.jobs[job_id].task_digest) is not None else set()
        self._discard()
        self.hub.touch(job_id)

    def _wake(self) -> None:
        """Let every waiting poll look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def tokens_changed(self) -> None:
        """Let every waiting poll and every stream look again whether its caller's token counts."""
        self._wake()
        for job_id in self.jobs:
            self.hub.touch(job_id)

    # ------------------------------------------------------------ jobs

    async def plan(self, request: JobRequest) -> Planned | None:
        """What a private job will cost; None: it is no such job, or was taken before.

        Raises:
            BadJobError: it cannot be accounted for here, or its budget is below one round.
            AccountantError: its cost could not be found.
        """
        return None if request.key in self._by_key else await self.accounting.plan(request.spec)

    async def take_job(self, request: JobRequest, by: Submitter) -> Job:
        """Take a job, with the file that it begins with where one was sent for it.

        Raises:
            NotFoundError, ConflictError, BadUpdateError: there is no such file, or not all of it, or it is damaged.
        """
        planned = await self.plan(request)
        digest = begins.parse(request.spec.init).digest if request.spec.init else ""
        if not digest or request.key in self._by_key or self.model_called(digest) is not None:
            return self.submit(request, planned, by)
        self._admit(request, by)  # before the file is taken, which would have to be sent again
        with self._arrival(digest):
            try:
                brought = await self.given.take(by.token, digest, _die_if_broken)
            except NotFoundError:
                if self.model_called(digest) is None:
                    raise
                brought = None  # the same call, made twice, has brought it
            return self.submit(request, planned, by, brought)

    def submit(
        self,
        request: JobRequest,
        planned: Planned | None = None,
        by: Submitter | None = None,
        brought: Beginning | None = None,
    ) -> Job:
        """Take a job. The same key again gives the job that was made for it, to who submitted that.

        Args:
            request: the job.
            planned: what `plan` said of it.
            by: whose call it is; None: nobody's that is noted.
            brought: the file that it begins with, which was sent for it; None: none was.

        Raises:
            TooManyError: too many jobs are open.
            NotFoundError: what it is to begin with is not here.
        """
        if (known := self._by_key.get(request.key)) is not None:
            job = self.jobs[known]
            asked = request.spec
            if asked.aggregation.update == "auto":
                asked = rounds.with_update(asked, job.spec.aggregation.update)
            before = self.submitted_by[known]
            if job.spec != asked or (by is not None and before is not None and by.token != before.token):
                raise ConflictError(f"the key {request.key!r} was used for another job, {known}", code="key_reused")
            return job
        self._admit(request, by)
        spec, digest = request.spec, None
        begins_with = brought or self._beginning_of(spec)
        if request.task_source is not None:
            data = request.task_source.encode()
            digest = hashlib.sha256(data).hexdigest()
            self.blobs.put_bytes(data)
            self._dropped.add(digest)  # should the job not be taken
        elif spec.task not in BUILTIN:
            names = ", ".join(sorted(BUILTIN))
            raise BadTaskError(
                f"there is no built-in task {spec.task!r}: {names}", advice="Send your own with --task FILE.py."
            )
        job_id = new_id(spec.name or spec.task)
        if spec.privacy.level == "worker":
            self._seeds.create(job_id)  # before there is a job: one without its seed could not go on
        taken = Submitted(
            spec=spec,
            task_digest=digest,
            signatures=request.signatures,
            key=request.key,
            affordable=planned.affordable if planned else None,
            planned_epsilon=planned.epsilon if planned else None,
            by=by,
            begins_with=begins_with,
        )
        for stored in self._keep_facts(job_id, Step((taken,), "submitted")):
            self._replay(stored, self.clock())
            self.hub.publish(stored)
        log.info("%s: submitted", job_id, extra=ids(job=job_id))
        for sentence in cautions(spec):
            log.warning("%s: %s", job_id, sentence, extra=ids(job=job_id))
        self._run_queue()
        self._wake()  # while it waits in the queue it can be prepared
        return self.jobs[job_id]

    async def receive_model(
        self, token: str, digest: str, span: tuple[int, int, int], body: AsyncIterable[bytes]
    ) -> None:
        """Take bytes of a file that a job is to begin with."""
        await self.given.receive(token, digest, span, body, _die_if_broken)

    def _admit(self, request: JobRequest, by: Submitter | None) -> None:
        """Refuse a job that is not taken, whatever it begins with."""
        open_of = (self.submitted_by[job.id] for job in self._active())
        self.quotas.admit_job(by, [one.token if one is not None else None for one in open_of])
        check_can_sum(request.spec)
        if unfit := nova.why_not(request.spec, partial(_source_of, request)):
            raise BadJobError(unfit, advice="Use fedavg, which needs to know nothing of the steps.")

    def _beginning_of(self, spec: JobSpec) -> Beginning | None:
        """The model that a job begins with, as it is here now; None: what model(config) builds.

        Raises:
            NotFoundError: there is no such job, or its model is not kept, or no such file was sent.
            ConflictError: several jobs have the name (`ambiguous_name`).
        """
        if spec.init is None:
            return None
        wanted = begins.parse(spec.init)
        if wanted.digest:
            if (kept := self.model_called(wanted.digest)) is None:
                raise not_here(wanted.digest)
            return kept
        job = job_called(self.jobs, wanted.job)
        model = self.model(job.id, wanted.which)
        named = {"newest": job.closed, "best": job.best_round}
        number = named[wanted.which] if wanted.which in named else int(wanted.which)
        return Beginning(digest=model.digest, size=model.size, job=job.id, round=number)

    def model_called(self, digest: str) -> Beginning | None:
        """The model of this digest that is kept: of a job, or one that an open job is to begin with; None: none is."""
        for job_id, models in self.models.items():
            for number, model in models.items():
                if model.digest == digest:
                    return Beginning(digest=digest, size=model.size, job=job_id, round=number)
        waiting = (job.begins_with for job in self._active() if digest in rounds.bases_of(job))
        return next((one for one in waiting if one is not None and one.digest == digest), None)

    def job(self, job_id: str) -> Job:
        """The job of this id."""
        try:
            return self.jobs[job_id]
        except KeyError:
            raise NotFoundError(f"there is no job {job_id[:80]!r}", code="unknown_job") from None

    def command(self, job_id: str, decide: Callable[[Job, str], Step], who: str) -> Job:
        """Pause, resume or cancel a job."""
        job = self._apply(job_id, decide(self.job(job_id), who))
        self._run_queue()
        return job

    def open_jobs_of(self, token_id: str) -> tuple[str, ...]:
        """Ids of the jobs that are not over and that this token submitted."""
        return tuple(job.id for job in self._active() if (by := self.submitted_by[job.id]) and by.token == token_id)

    def model(self, job_id: str, which: str) -> ModelRef:
        """A model of a job: `newest`, `best`, or a round's number."""
        job, models = self.job(job_id), self.models.get(job_id, {})
        if which == "newest" and job.model is not None:
            return job.model
        number = job.best_round if which == "best" else int(which) if which.isdecimal() else None
        if number is not None and number in models:
            return models[number]
        kept = ", ".join(str(n) for n in sorted(models)) or "none yet"
        state = f"it is {job.phase.state}, {job.closed} rounds closed"
        raise NotFoundError(
            f"{job_id} has no model {which[:20]!r}: {state}; rounds kept: {kept}",
            code="unknown_model",
            advice="Ask for one of the rounds kept, `newest`, or `best` after an evaluation.",
        )

    def _run_queue(self) -> None:
        """Let jobs leave the queue that can, oldest first."""
        now = self.clock()
        older: list[Job] = []
        for job in self._active():
            if isinstance(job.phase, rounds.Queued):
                self._apply(job.id, rounds.begin(job, self.fleet.serving(job, now), self.fleet.spare(job, older, now)))
            older.append(self.jobs[job.id])

    # ------------------------------------------------------------ privacy

    def _seed_of(self, job: Job) -> bytes | None:
        """The secret seed of a job with worker-level privacy; None: it is no such job.

        Raises:
            SeedLostError: it is gone.
        """
        return self._seeds.read(job.id) if job.spec.privacy.level == "worker" else None

    def _sampled(self, job: Job) -> Sampled | None:
        """Who is in a round, where that is drawn at random for privacy."""
        seed = self._seed_of(job)
        return None if seed is None else partial(privacy.sampled, seed, job.spec.privacy.sample)

    # ------------------------------------------------------------ speeds

    def places(self, job: Job) -> list[Place]:
        """The workers that a round of this job is cut for, with what is known of their speed."""
        now, work = self.clock(), work_of(job.spec, job.task_digest)
        serving = set(self.fleet.serving(job, now))
        return [self._place(job, work, worker, here=worker in serving) for worker in self.fleet.places(job, now)]

    def _place(self, job: Job, work: str, worker: str, *, here: bool) -> Place:
        measured, name = self.speeds.of(job.id, worker), self.fleet.workers[worker].name
        rate, trained = self.speeds.rate(job.id, work, worker), measured.round if measured is not None else 0
        return Place(worker, name, here, rate, trained)

    def dues(self, job: Job) -> Mapping[int, Due]:
        """Who has the shards of the open round that are out, and when each is expected."""

        def due_of(worker: str) -> Due:
            lease = self.fleet.leases[worker]
            return lease.due or self._expect(job, lease)

        held = self.fleet.held(job.id)
        if isinstance(job.inner, Training):
            return Dues(job.inner.round, held, due_of)
        out = {task: worker for task, worker in held.items() if task.kind == "train" and _is_awaited(job, task)}
        return {task.shard: due_of(worker) for task, worker in out.items()}

    def _expect(self, job: Job, lease: Lease) -> Due:
        """Work out when the update of a lease is expected; it stays while the lease does."""
        measured, known = self.speeds.of(job.id, lease.worker), self.fleet.workers.get(lease.worker)
        samples = ahead(job.spec.train, rounds.subject_of(job, lease.task)[1].samples)
        within = expected_s(measured.updates, samples) if measured is not None else None
        lease.due = Due(lease.worker, known.name if known else lease.worker, lease.since, within)
        return lease.due

    def _say_if_behind(self, job: Job, lease: Lease) -> str | None:
        """What a worker is told that has overrun its own time; it is logged once."""
        phase, now = job.inner, self.clock()
        if rounds.is_late(job, lease.task):
            return f"round {lease.task.round} closed without this update; it is used in a later one if it comes soon"
        if lease.task.kind != "train" or not isinstance(phase, Training | Buffering):
            return None
        due = lease.due or self._expect(job, lease)
        if not due.is_behind(now):
            return None
        if not lease.is_behind:
            lease.is_behind = True
            log.warning("%s: %s: %s", job.id, lease.task, due.words(now), extra=ids(job=job.id, worker=lease.worker))
        return due.words(now)

    # ------------------------------------------------------------ workers

    def register(self, registration: Registration, known: str | None, joining: Principal | None = None) -> Welcome:
        """A worker introduces itself, for the first time (with a join token) or again (with its own).

        Args:
            registration: what it says of itself.
            known: its id, where it came with its own token.
            joining: whose call it is, where it came with a join token.
        """
        if registration.protocol not in PROTOCOLS:
            sides = "the coordinator" if registration.protocol > PROTOCOLS[-1] else "this worker"
            raise VersionSkewError(
                f"worker {registration.version} speaks protocol {registration.protocol}, "
                f"coordinator {__version__} speaks {' and '.join(map(str, PROTOCOLS))}",
                advice=f"Upgrade {sides}.",
            )
        self.quotas.admit_worker(registration, len(self.fleet.workers) if known is None else 0)
        now = self.clock()
        claim = f"{registration.name} {registration.place or registration.start_id}"
        before = known or (self.tokens.joined_before(joining, claim) if joining is not None else None)
        worker_id = before or new_id(registration.name)
        self._refuse_rival(worker_id, registration, now)
        told = before is None or self.audit.returned(worker_id)
        self.journal.worker_put(worker_id, registration, told=told)
        credential = self.tokens.credential(worker_id, registration.name, joining, claim)
        for lease in self.fleet.register(worker_id, registration, now):
            if self._goes_on(lease, registration.holding):
                self.fleet.grant(lease.job, lease.task, lease.attempt, worker_id, now, lease.claim_key)
            else:
                self._give_back(lease, "expired", f"{registration.name} was started anew")
        self._run_queue()
        self._settle_all()
        reason = f"welcome{' back' if before else ''}, {registration.name}"
        return Welcome(
            worker_id=worker_id,
            credential=credential,
            protocol=registration.protocol,
            heartbeat_s=self.settings.heartbeat_s,
            ttl_s=self.settings.ttl_s,
            reason=reason,
        )

    def _refuse_rival(self, worker_id: str, registration: Registration, now: float) -> None:
        """One credential on two machines: the one at work stays, so that they do not push each other out in turn."""
        rival = self.fleet.rival(worker_id, registration, now)
        if rival is None:
            return
        host, own = rival.registration.hardware.hostname, registration.hardware.hostname
        waits = "waits for work" if rival.polling else f"called {now - (rival.seen_at or now):.1f} s ago"
        raise ConflictError(
            f"{rival.name} is at work already, on host {host} ({waits}), and {own} came with its credential too",
            code="already_working",
            advice="A copied state folder? Give this one its own --state-dir and a join token. If the one on "
            f"{host} was moved here, stop it there and start this one {self.settings.ttl_s:g} s later.",
        )

    def _goes_on(self, lease: Lease, holding: tuple[Holding, ...]) -> bool:
        """Whether a worker that was started anew has the work of its lease on its disk."""
        name = assignment_id(lease.job, lease.task)
        return any((held.assignment, held.attempt) == (name, lease.attempt) for held in holding)

    def worker(self, worker_id: str) -> Worker:
        """The worker of this id."""
        try:
            return self.fleet.workers[worker_id]
        except KeyError:
            raise NotFoundError(f"there is no worker {worker_id[:80]!r}", code="unknown_worker") from None

    def named(self, name: str) -> Worker:
        """The worker of this id, or the only one of this name.

        Raises:
            NotFoundError: there is none.
            ConflictError: several have the name (ambiguous_name).
        """
        if name in self.fleet.workers:
            return self.fleet.workers[name]
        found = [worker for worker in self.fleet.workers.values() if worker.name == name]
        if len(found) > 1:
            ids = ", ".join(sorted(worker.id for worker in found))
            raise ConflictError(
                f"{len(found)} workers are called {name}: {ids}",
                code="ambiguous_name",
                advice="Name the one you mean by its id; `lydian workers` shows what each of them does.",
            )
        return found[0] if found else self.worker(name)

    def give_order(self, name: str, order: Order) -> Worker:
        """Have a worker finish and take no more (drain), be out of the way at once (pause), or work. Twice is once."""
        worker = self.named(name)
        if worker.order != order:
            self.journal.worker_ordered(worker.id, order)
            log.info("%s is ordered by an operator to %s", worker.name, order)
        worker.draining, worker.paused = order == "drain", order == "pause"
        self._run_queue()
        self._settle_all()
        self._wake()
        return worker

    def readmit(self, name: str) -> Worker:
        """Give a worker work again, from whichever machine; its strikes are forgiven, and it is under no order."""
        worker = self.named(name)
        self.tailnet.unpin(worker.id)
        self.journal.worker_judged(worker.id, 0, None)
        if worker.set_aside is not None:
            log.info("%s is readmitted", worker.name)
        worker.set_aside, worker.strikes = None, 0
        return self.give_order(worker.id, "work")

    def leave(self, worker_id: str, start_id: str) -> None:
        """A worker says goodbye: nobody waits for it."""
        self._part_with(self._called(worker_id, start_id), "said goodbye")

    def cut_off(self, worker_id: str) -> None:
        """A worker's token was revoked: what it held goes to others at once, and its calls under way end."""
        if (worker := self.fleet.workers.get(worker_id)) is not None:
            self._part_with(worker, "may not call any more: its token was revoked")

    def _part_with(self, worker: Worker, why: str) -> None:
        worker.left = True
        self._end_polls(worker)
        self.fleet.unask(worker.id)
        lease = self.fleet.leases.get(worker.id)
        if lease is not None:
            self._give_back(lease, "released", f"{worker.name} {why}")
        self._settle_all()

    def _end_polls(self, worker: Worker) -> int:
        """Answer every poll of a worker that still waits, with nothing: whoever made it listens no more, and would
        be given work. Returns the number of the poll that comes now."""
        worker.polls += 1
        if worker.polling:
            self._wake()
        return worker.polls

    async def poll(
        self, worker_id: str, request: PollRequest, disconnected: Callable[[], Awaitable[bool]]
    ) -> PollAnswer | None:
        """Wait for work. Answered the moment there is some; None when `wait_s` have passed without, and at once when
        this worker polls again or says goodbye meanwhile."""
        worker = self._called(worker_id, request.start_id)
        number = self._end_polls(worker)
        worker.degraded, worker.resting = request.degraded, request.resting
        worker.link = request.link or worker.link
        until = self.clock() + min(request.wait_s, self.settings.poll_s)
        worker.polling += 1
        try:
            self._run_queue()
            while True:
                if self._stopping:
                    raise UnavailableError("the coordinator is stopping", code="stopping")
                changed = self._changed
                newer = worker.registration.protocol >= ORDERS_SINCE
                if newer and self.tokens.is_to_renew(worker_id, self.clock()):
                    return PollAnswer(order=worker.order, renew=True)
                if newer and worker.order != request.obeys:
                    return PollAnswer(order=worker.order)
                if (answer := self._claim(worker, request)) is not None:
                    return answer.model_copy(update={"order": worker.order})
                left = until - self.clock()
                if left <= 0:
                    return None
                try:
                    async with asyncio.timeout(left):
                        await changed.wait()
                except TimeoutError:
                    return None
                if await disconnected():
                    return None
                worker = self._same(worker_id, request.start_id)
                if worker.polls != number:
                    return None
        finally:
            self.fleet.workers[worker_id].polling -= 1

    def _called(self, worker_id: str, start_id: str) -> Worker:
        """A worker calls. A process that another one has taken the place of is told so."""
        worker = self.worker(worker_id)
        if start_id != worker.registration.start_id:
            worker.rival_at = self.clock()
        return self.fleet.seen(self._same(worker_id, start_id).id, self.clock())

    def _same(self, worker_id: str, start_id: str) -> Worker:
        self.tokens.check_worker(worker_id)
        worker = self.worker(worker_id)
        if start_id != worker.registration.start_id:
            raise SupersededError(
                f"another process works as {worker.name} since this one registered, "
                f"on host {worker.registration.hardware.hostname}",
                advice="If two machines share one state folder, give each its own; else start the worker again.",
            )
        return worker

    def _claim(self, worker: Worker, request: PollRequest) -> PollAnswer | None:
        """Work for a worker that asks, or what it may forget, or is to send again; None: nothing yet."""
        forget = tuple(j for j in request.loaded if j not in self.jobs or self.jobs[j].over)
        settled = tuple(held for held in request.holding if not self._stands_on(held))
        wanted = self._lost_with(worker, request.holding)
        lease = self.fleet.leases.get(worker.id)
        if lease is not None and not rounds.is_open(self.jobs[lease.job], lease.task):  # closed without it
            self.fleet.release(worker.id, lease.job, lease.task)
            lease = None
        if lease is not None and lease.claim_key == request.claim_key:  # our answer was lost on the way
            return PollAnswer(assignment=self._assignment(lease), forget=forget, settled=settled, wanted=wanted)
        if lease is not None:
            self._give_back(lease, "released", f"{worker.name} asked for new work instead")
        if wanted:
            return PollAnswer(forget=forget, settled=settled, wanted=wanted)
        unmask = tuple(one for job in self._active() for one in self._sums.asked(job, worker.id, request.holding))
        if unmask:
            return PollAnswer(forget=forget, settled=settled, unmask=unmask)
        may = self.quotas.may_have_work(worker.id)
        choice = self.fleet.choose(worker.id, self._open_to(worker.id), self.clock()) if may else None
        if choice is None:
            prepare = self._preparation(worker, request)
            something = forget or settled or prepare
            return PollAnswer(forget=forget, settled=settled, prepare=prepare) if something else None
        job, task = self.jobs[choice[0].id], choice[1]
        step = rounds.hand_out(job, task, worker.id, request.claim_key)
        attempt = rounds.tries_of(job, task).attempt + 1
        lease = self.fleet.grant(job.id, task, attempt, worker.id, self.clock(), request.claim_key, whole=True)
        self._apply(job.id, step)
        return PollAnswer(assignment=self._assignment(lease), forget=forget, settled=settled)

    async def model_along(self, answer: PollAnswer, request: PollRequest) -> bytes | None:
        """The base of the assignment, where it is small and the worker lacks it; None: it asks for what it needs."""
        work = answer.assignment
        if work is None or work.base is None or work.base.size > min(request.together, TOGETHER):
            return None
        if not {work.base.digest, *(step.base for step in work.steps)}.isdisjoint(request.models):
            return None  # it has it, or has a shorter way to it
        try:
            return await self.blobs.reading.whole(work.base.digest, self.blobs.path(work.base.digest))
        except FileNotFoundError:
            return None  # it was replaced meanwhile: whoever asks for it is told so

    def _preparation(self, worker: Worker, request: PollRequest) -> Preparation | None:
        """What a worker without work is to load meanwhile. Nothing stands on it, so it is not journalled."""
        job = self.fleet.to_prepare(worker.id, request.claim_key, request.loaded, list(self.jobs.values()))
        if job is None:
            return None
        self.fleet.ask_to_prepare(worker.id, request.claim_key, job.id, self.clock())
        return Preparation(job=job.id, task=job.task, spec=job.spec)

    def _stands_on(self, held: Holding) -> bool:
        """Whether the round that is open or being averaged has this very update: its worker must keep its copy."""
        try:
            job_id, task = parse_assignment(held.assignment)
        except LydianError:
            return False
        job = self.jobs.get(job_id)
        return job is not None and rounds.stands_on(job, task, held.attempt, held.digest)

    def _lost_with(self, worker: Worker, holding: tuple[Holding, ...]) -> tuple[Holding, ...]:
        """The updates of this worker that are lost here and not there; those lost there too are trained again."""
        wanted: list[Holding] = []
        for job in self._active():
            for update in rounds.lost_of(job):
                if update.worker != worker.id:
                    continue
                name = assignment_id(job.id, Task("train", update.round, update.shard))
                copy = Holding(assignment=name, attempt=update.attempt, digest=update.digest)
                if copy in holding:
                    wanted.append(copy)
                else:
                    self._open_again(job.id, update, f"{worker.name} has no copy of it")
        return tuple(wanted)

    def _assignment(self, lease: Lease) -> Assignment:
        job, task = self.jobs[lease.job], lease.task
        base, samples, slots = job.model, None, None
        shards = len(job.facts.bounds) - 1 if job.facts and job.facts.bounds else 1
        match task.kind, job.inner:
            case "init", _:
                shards, base = self._shards_to_cut(job), job.begins_with
            case "train", _:
                base, shard = rounds.subject_of(job, task)
                if shard.worker:
                    shards = rounds.private_parts(job, task, len(self.fleet.places(job, self.clock())))
                samples = None if shard.worker else Range(start=shard.start, stop=shard.stop)
                slots = self._slots(job, shard)
            case _:
                base = job.evaluations[task.round].model
        state = rounds.state_to_go_on_from(job, task.shard, lease.worker) if task.kind == "train" else None
        return Assignment(
            id=assignment_id(job.id, task),
            attempt=lease.attempt,
            job=job.id,
            kind=task.kind,
            round=task.round,
            shard=task.shard,
            shards=shards,
            samples=samples,
            train_samples=job.facts.train_samples if job.facts else 0,
            task=job.task,
            spec=job.spec,
            base=base,
            private_before=job.private_before if task.kind == "train" else (),
            optimizer_of=state.round if state is not None else 0,
            state_shard=state.shard if state is not None and state.shard != task.shard else None,
            ttl_s=self.settings.ttl_s,
            max_bytes=self._largest(job, base.size) if base and job.model else self.settings.max_model_bytes,
            together=TOGETHER,
            steps=self._way_to(job.id, base),
            slots=slots,
        )

    def _slots(self, job: Job, shard: Shard) -> Slots | None:
        """What of earlier rounds the shard begins with; None: the job has nothing of the kind."""
        size = self.blobs.size(job.slot_total[0]) if job.slot_total else 0
        return drift.slots_for(job, shard, size)

    def _way_to(self, job_id: str, base: ModelRef | None) -> tuple[StepRef, ...]:
        """The steps that lead to a model, for workers that have an earlier one."""
        found = [index for index, model in self.models.get(job_id, {}).items() if base is not None and model == base]
        steps = self.steps.get(job_id, {})
        return rounds.way_to(found[-1], base.size, steps) if found and base is not None and steps else ()

    def _shards_to_cut(self, job: Job) -> int:
        wanted = job.spec.data.shards
        if wanted != "auto":
            return wanted
        workers = max(len(self.fleet.places(job, self.clock())), 1)
        return workers if job.spec.round.mode == "sync" else shards_for(size_of(job.spec, workers), workers)

    def heartbeat(self, worker_id: str, beat: Heartbeat) -> HeartbeatAnswer:
        """Renew a lease. Says whether the work still counts."""
        worker = self._called(worker_id, beat.start_id)
        job_id, task = parse_assignment(beat.assignment)
        job, now = self.job(job_id), self.clock()
        lease = self.fleet.lease_of(worker_id, job_id, task, beat.attempt)
        if lease is None and self._may_have_back(job, task, beat.attempt, worker_id):
            lease = self.fleet.grant(job_id, task, beat.attempt, worker_id, now)
        if lease is None:
            self._check_owner(job, task, beat.attempt, worker_id)
        if job.over:
            return HeartbeatAnswer(order="cancelled", reason=f"the job is {job.phase.state}: {job.reason}")
        if not rounds.is_open(job, task):  # closed by quorum: whatever comes now is late
            self.fleet.release(worker_id, job_id, task)
            reason = f"{task} takes no more results: {rounds.why_closed(job, task)}"
            return HeartbeatAnswer(order="superseded", reason=reason)
        if lease is None:
            return HeartbeatAnswer(order="superseded", reason=f"{task} is not with this worker any more")
        self.fleet.renew(lease, beat.progress, now)
        self.hub.touch(job_id)
        lease.held, lease.said = beat.held, beat.said
        if worker.paused:
            return self._pause(worker, lease)
        if worker.draining:
            return HeartbeatAnswer(order="drain", reason="finish this; no more work comes then")
        return HeartbeatAnswer(order="continue", reason=self._say_if_behind(job, lease) or job.reason)

    def _pause(self, worker: Worker, lease: Lease) -> HeartbeatAnswer:
        """A paused worker gives back what it does; one that knows no such order is told that it counts no more."""
        reason = f"an operator paused {worker.name}"
        if worker.registration.protocol >= ORDERS_SINCE:
            return HeartbeatAnswer(order="pause", reason=reason)
        self._give_back(lease, "released", reason)
        return HeartbeatAnswer(order="superseded", reason=reason)

    def _may_have_back(self, job: Job, task: Task, attempt: int, worker_id: str) -> bool:
        """Whether a lease that ran out may live again: nobody else got the task meanwhile."""
        tries = rounds.tries_of(job, task)
        newest = tries.attempt == attempt and attempt > 0 and tries.workers[-1] == worker_id
        free = task not in self.fleet.held(job.id) and worker_id not in self.fleet.leases
        return newest and free and rounds.is_open(job, task)

    def abandon(self, worker_id: str, name: str, reason: Abandon) -> None:
        """A worker gives an assignment back, and says why."""
        job_id, task = parse_assignment(name)
        job = self.job(job_id)
        self._check_owner(job, task, reason.attempt, worker_id)
        self._uploads.drop((name, reason.attempt))
        if self.fleet.lease_of(worker_id, job_id, task, reason.attempt) is None and attempts.came_back(
            self._attempts(job, task), reason.attempt, worker_id
        ):
            return  # its first answer was lost, or the coordinator knew before: said again it changes nothing
        self.fleet.release(worker_id, job_id, task, reason.attempt)
        if reason.attempt in rounds.tries_of(job, task).blamed:
            return  # it failed before: twice is once
        back = self._back(task, reason.attempt, worker_id, reason.code, reason.sentence, reason.detail, reason.scene)
        self._apply(job_id, self._ended(job_id, back))
        self._fail_if_nobody_can(job_id)

    def _give_back(self, lease: Lease, code: str, sentence: str) -> None:
        """Take a lease away without a result."""
        self.fleet.release(lease.worker, lease.job, lease.task)
        back = self._back(lease.task, lease.attempt, lease.worker, code, sentence)
        self._apply(lease.job, self._ended(lease.job, back))

    def _ended(self, job_id: str, back: HandedBack) -> Step:
        """What follows from an attempt that ended without a result, and from who else could do it."""
        job = self.jobs[job_id]
        return rounds.hand_back(job, back, self._limits, lambda: self.fleet.serving(job, self.clock()))

    def _back(
        self,
        task: Task,
        attempt: int,
        worker_id: str,
        code: str,
        sentence: str,
        detail: str = "",
        scene: Scene | None = None,
    ) -> HandedBack:
        known, told = self.fleet.workers.get(worker_id), advise(code, sentence, detail, scene)
        self.quotas.note_hand_back(worker_id)
        return HandedBack(
            kind=task.kind,
            round=task.round,
            shard=task.shard,
            attempt=attempt,
            worker=worker_id,
            worker_name=known.name if known else worker_id,
            code=code,
            sentence=sentence,
            detail=self.quotas.cut(worker_id, detail),
            cause=told.cause,
            advice=told.words,
            scene=scene,
        )

    def _fail_if_nobody_can(self, job_id: str) -> None:
        job, now = self.jobs[job_id], self.clock()
        able = (w for w in self.fleet.live(now) if w in job.excluded)
        self._apply(job_id, rounds.fail_if_nobody_can(job, (*able, *self.fleet.serving(job, now))))

    # ------------------------------------------------------------ updates

    def _check_owner(self, job: Job, task: Task, attempt: int, worker_id: str) -> None:
        """A worker reaches its own attempts alone; those of others are not there for it, closed ones too."""
        tries = rounds.tries_of(job, task)
        if rounds.is_open(job, task):
            own = 1 <= attempt <= tries.attempt and tries.workers[attempt - 1] == worker_id
        else:
            own = attempts.was_given(self._attempts(job, task), attempt, worker_id)
        if not own:
            raise NotFoundError(
                f"attempt {attempt} at {task} was not given to this worker",
                code="unknown_attempt",
                advice="Poll for work.",
            )

    def _attempts(self, job: Job, task: Task) -> list[Fact]:
        return [stored.fact for stored in self.journal.attempts(job.id, task.kind, task.round, task.shard)]

    def held_ranges(self, worker_id: str, name: str, attempt: int) -> tuple[tuple[int, int], ...]:
        """The bytes of an upload that are here already."""
        job_id, task = parse_assignment(name)
        self._check_owner(self.job(job_id), task, attempt, worker_id)
        return self._uploads.held((name, attempt))

    async def receive(
        self,
        worker_id: str,
        name: str,
        attempt: int,
        span: tuple[int, int, int],
        body: AsyncIterable[bytes],
        *,
        handed_in: bool = False,
    ) -> None:
        """Write bytes [start, stop) of an upload of `total` bytes to their place, as they come.

        `handed_in`: they came with their submission, so that `take` follows.
        """
        start, stop, total = span
        self._let_upload(worker_id, name, attempt, total)

        def seen() -> None:
            self.fleet.seen(worker_id, self.clock())

        began, key = self.clock(), (name, attempt)
        try:
            await self._uploads.receive(key, total, start, stop, body, seen, handed_in=handed_in)
        except OSError as error:
            _die_if_broken(error)
            raise
        if parse_assignment(name)[1].kind == "init":
            self._spans[key] = (self._spans.get(key, (began, 0.0))[0], self.clock())

    def _let_upload(self, worker_id: str, name: str, attempt: int, total: int) -> None:
        """Make sure that this worker may upload so many bytes for this, and that there is room for them."""
        job_id, task = parse_assignment(name)
        job = self.job(job_id)
        self._check_owner(job, task, attempt, worker_id)
        if not rounds.is_open(job, task) and self._lost(job, task, attempt, worker_id) is None:
            raise LateError(f"{task} takes no more results: {rounds.why_closed(job, task)}")
        if task.kind == "evaluate":
            raise ForbiddenError("an evaluation has no bytes to upload", code="no_upload")
        most = (
            self._largest(job, job.model.size) if job.model and task.kind == "train" else self.settings.max_model_bytes
        )
        if total > most:
            raise BadUpdateError(
                f"{name} announces {total} bytes, where at most {most} are possible", code="wrong_length"
            )
        if (name, attempt) not in self._uploads:
            if stale := self.quotas.make_way(worker_id, (name, attempt), lambda key: key in self._uploads):
                self._uploads.keep_only(lambda key: key not in stale)
            self._make_sure_of_room(job, total)

    def _largest(self, job: Job, model_size: int) -> int:
        """Bytes of the largest update of a model."""
        return model_size * (MASKED_SIZE if job.spec.secure.enabled else 1) + HEADER_ROOM

    def _make_sure_of_room(self, job: Job, size: int) -> None:
        """Refuse an upload that does not fit, and pause its job, so that a person is told; the worker keeps trying."""
        try:
            self.blobs.check_room(size)
        except DiskFullError as error:
            self._apply(job.id, rounds.pause(job, f"the coordinator until there is room: {error}", room=size))
            raise

    def _lost(self, job: Job, task: Task, attempt: int, worker_id: str) -> Accepted | None:
        """The update that this very attempt handed in before, if its bytes are lost here."""
        for update in rounds.lost_of(job):
            if (update.round, update.shard, update.attempt, update.worker) == (
                task.round,
                task.shard,
                attempt,
                worker_id,
            ):
                return update if task.kind == "train" else None
        return None

    async def take(self, worker_id: str, name: str, submission: Submission) -> Receipt:
        """Let a result count, at most once, after its bytes have been looked at."""
        job_id, task = parse_assignment(name)
        key = (name, submission.attempt)
        async with self._uploads.lock(key):
            try:
                return await self._take(worker_id, self.job(job_id), task, name, submission)
            finally:
                if not self._is_awaited(key):
                    self._uploads.drop(key)

    async def _take(self, worker_id: str, job: Job, task: Task, name: str, submission: Submission) -> Receipt:
        if (lost := self._lost(job, task, submission.attempt, worker_id)) is not None:
            return await self._restore(job, name, lost, submission)
        if (repeat := self._accepted_before(job, task, submission, worker_id)) is not None:
            return repeat
        self._check_owner(job, task, submission.attempt, worker_id)
        try:
            rounds.judge(job, task, submission, worker_id)
            self._sums.check_update(job, task, submission.attempt)
            if task.kind == "evaluate":
                return self._count_evaluation(job, task, submission, worker_id)
            return await self._look_and_count(job, task, name, submission, worker_id)
        except LateError:
            known = task.kind != "train" or attempts.was_late(self._attempts(job, task), submission.attempt, worker_id)
            if not known:  # the fact is about an update
                self._apply(job.id, rounds.late(task, submission.attempt, worker_id))
            raise
        except BadUpdateError as error:
            self._uploads.drop((name, submission.attempt))
            if error.code != DAMAGED:
                self._refuse(job.id, task, submission.attempt, worker_id, error)
            raise

    async def _restore(self, job: Job, name: str, lost: Accepted, submission: Submission) -> Receipt:
        """Take the bytes of an accepted update again. What counted, counts; nothing else of it is looked at."""
        if submission.digest != lost.digest:
            raise SupersededError(f"{name} was accepted as {lost.digest[:12]}…, and only those bytes are wanted again")
        with self._arrival(lost.digest):
            await self._look(job, Task("train", lost.round, lost.shard), name, submission)
            if lost in rounds.lost_of(self.jobs[job.id]):
                self._apply(job.id, rounds.restored(lost))
            else:  # the job ended meanwhile
                self._dropped.add(lost.digest)
        return Receipt(repeat=True, reason=self.jobs[job.id].reason)

    def _count_evaluation(self, job: Job, task: Task, submission: Submission, worker_id: str) -> Receipt:
        self.fleet.release(worker_id, job.id, task)
        name = self.worker(worker_id).name
        step = rounds.take_evaluation(job, task.round, submission, worker_id, part=task.shard, worker_name=name)
        after = self._apply(job.id, step)
        self._run_queue()
        return Receipt(repeat=False, reason=after.reason)

    def _accepted_before(self, job: Job, task: Task, submission: Submission, worker_id: str) -> Receipt | None:
        """The same answer as before, if this very result was taken before."""
        pending = job.evaluations.get(task.round) if task.kind == "evaluate" else None
        if pending is not None and is_repeat(pending.measured.values(), submission.attempt, worker_id):
            return Receipt(repeat=True, reason=job.reason)
        for stored in self.journal.results(job.id, task.kind, task.round, task.shard):
            fact = stored.fact
            if isinstance(fact, Evaluated) and is_repeat(fact.workers, submission.attempt, worker_id):
                return Receipt(repeat=True, reason=job.reason)
            same = (getattr(fact, "attempt", None), getattr(fact, "worker", None)) == (submission.attempt, worker_id)
            if same and getattr(fact, "digest", None) == submission.digest:
                return Receipt(repeat=True, reason=job.reason)
        return None

    async def _look_and_count(self, job: Job, task: Task, name: str, submission: Submission, worker_id: str) -> Receipt:
        """Check the uploaded bytes off the loop, give them their name, and let them count."""
        digest = submission.digest
        if digest is None:
            raise BadUpdateError(f"{name} was submitted without the digest of its bytes", code=DAMAGED)
        with self._arrival(digest):
            found = await self._look(job, task, name, submission)
            return self._count(job.id, task, submission, worker_id, digest, found)

    @contextmanager
    def _arrival(self, digest: str) -> Iterator[None]:
        """Keep bytes that have their name and no fact yet; delete them if it turns out that nothing needs them."""
        self._arriving[digest] += 1
        counted = False
        try:
            yield
            counted = True
        finally:
            if not counted:
                self._dropped.add(digest)
            self._arriving[digest] -= 1
            self._arriving += Counter()  # forgets what counts nothing
            if digest in self._dropped:
                self._discard()

    async def _look(self, job: Job, task: Task, name: str, submission: Submission) -> Inspection:
        """Check the uploaded bytes and give them their name. Returns what is known of them."""
        attempt, digest = submission.attempt, submission.digest or ""
        staging = self._uploads.finish((name, attempt))
        model = rounds.base_of(job, task) if task.kind == "train" else None
        base = self.blobs.path(model.digest) if model else None
        bound = job.spec.aggregation.norm_bound
        measured = job.spec.aggregation.norm_outlier is not None or job.spec.privacy.level == "worker"
        if base is not None and job.spec.train.drift != "none":
            check_rate_sum(job.spec, submission.rate_sum, submission.steps)
            bound = min(bound or math.inf, farthest(job.spec.train, submission.rate_sum))
        durable = task.kind == "init" or job.spec.round.fsync
        try:
            codec = versions.rules_of(job.spec.aggregation).update if task.kind == "train" else None

            def look() -> Inspection:
                """Both in one thread's turn: a loop with much to do comes back to each only after a while."""
                if base is not None and job.spec.secure.enabled:
                    inspect_masked(staging.path, base, digest=digest)
                    found = Inspection(size=staging.size, norm=None)
                else:
                    found = inspect(staging.path, base, digest=digest, norm_bound=bound, measured=measured, codec=codec)
                self.blobs.adopt(staging.path, digest, durable=durable)
                return found

            found = await asyncio.to_thread(look)
        except OSError as error:
            _die_if_broken(error)
            raise
        self._uploads.forget((name, attempt))
        reach("update-named")
        return found

    def _count(
        self, job_id: str, task: Task, submission: Submission, worker_id: str, digest: str, found: Inspection
    ) -> Receipt:
        """The bytes are good: decide once more, since time has passed, and let them count."""
        self.tokens.check_worker(worker_id)
        job, now = self.jobs[job_id], self.clock()
        rounds.judge(job, task, submission, worker_id)
        if task.kind == "init":
            if submission.facts is None:
                raise BadUpdateError(
                    "the model came without its facts (parameters, samples, bounds)", code="bad_update"
                )
            made = Initialised(
                attempt=submission.attempt,
                worker=worker_id,
                digest=digest,
                size=found.size,
                facts=submission.facts,
                update=self._encoding(job, (assignment_id(job_id, task), submission.attempt), found.size),
            )
            unfit = privacy.unfit(read_layout(self.blobs.path(digest)).notes) if self._seed_of(job) else None
            if unfit is not None:
                self._dropped.add(digest)
                step = rounds.fail(job, unfit)
            else:
                step = rounds.take_init(job, made, self.places(job), now, self._sampled(job))
        else:
            if job.spec.privacy.level == "example" and submission.private is None:
                raise BadUpdateError(f"{task} came without what its privacy cost", code="bad_update")
            lease = self.fleet.lease_of(worker_id, job_id, task, submission.attempt)
            update = Accepted(
                round=task.round,
                shard=task.shard,
                attempt=submission.attempt,
                worker=worker_id,
                worker_name=self.worker(worker_id).name,
                digest=digest,
                samples=counted(job.spec, submission.samples, submission.steps, submission.metrics),
                steps=submission.steps,
                seconds=submission.seconds,
                metrics=submission.metrics,
                bytes_down=submission.bytes_down,
                bytes_up=found.size,
                resumed_at=submission.resumed_at,
                private=submission.private,
                rate_sum=submission.rate_sum,
                took_s=now - lease.since if lease is not None and lease.whole else None,
                norm=found.norm,
            )
            step = rounds.take_update(job, update)
        self.fleet.release(worker_id, job_id, task)
        reach("accepted-before")
        after = self._apply(job_id, step)
        reach("accepted-after")
        return Receipt(repeat=False, reason=after.reason)

    def _encoding(self, job: Job, key: Key, size: int) -> str | None:
        """How updates travel, where the job leaves that to the link that the first model came over."""
        if job.spec.aggregation.update != "auto":
            return None
        span = self._spans.get(key)
        rate = size / max(span[1] - span[0], 1e-3) if span is not None else None
        update = rounds.encoding_for(size, rate)
        log.info("%s: updates travel as %s, since the model came at %s bytes a second",
                 job.id, update, "unknown" if rate is None else f"{rate:.0f}")  # fmt: skip
        return update

    def _refuse(self, job_id: str, task: Task, attempt: int, worker_id: str, error: LydianError) -> None:
        """A result that must not count: the task is handed out again, and the worker gets a strike. Once an attempt."""
        self.fleet.release(worker_id, job_id, task, attempt)
        if attempt in rounds.tries_of(self.jobs[job_id], task).blamed:
            return  # or one worker could end a job by saying one wrong thing five times
        self._strike(self.worker(worker_id), str(error))
        back = self._back(task, attempt, worker_id, error.code, str(error))
        self._apply(job_id, self._ended(job_id, back))

    def _strike(self, worker: Worker, why: str) -> None:
        worker.strikes += 1
        if worker.strikes >= self.settings.strikes and worker.set_aside is None:
            worker.set_aside = f"{worker.strikes} results were refused, the last: {why}"
            log.warning("%s is set aside: %s", worker.name, worker.set_aside, extra=ids(worker=worker.id))
        self.journal.worker_judged(worker.id, worker.strikes, worker.set_aside)

    # ------------------------------------------------------------ secure sums

    def sum_now(self, job: Job, now: float, *, change: bool = False) -> Step:
        """Where the secure sum of the open round stands; with `change`, it is gone on with."""
        places = self.places(job)
        return self._sums.look(job, self.fleet, now, places=places, dues=self.dues(job), change=change)

    def _end_sum(self, before: Job, step: Step) -> None:
        """A closed round's keys and shares are deleted; one begun anew frees whoever was at work for it."""
        if any(isinstance(fact, RoundClosed | OpenedAnew) for fact in step.facts):
            self._sums.forget(before.id)
        if any(isinstance(fact, OpenedAnew) for fact in step.facts):
            self._dropped |= {update.digest for update in rounds.accepted_of(before)}
            for lease in [lease for lease in self.fleet.leases.values() if lease.job == before.id]:
                if lease.task.kind == "train":
                    self.fleet.release(lease.worker, before.id, lease.task)
            self._discard()

    def _open_to(self, worker_id: str) -> list[Job]:
        """All jobs, those without their shards whose sum this worker cannot join any more."""
        return [
            job if self._sums.lets_train(job, worker_id) else rounds.without_shards(job) for job in self.jobs.values()
        ]

    async def announce(self, worker_id: str, name: str, keys: SecureKeys) -> Roster | None:
        """A worker will send a masked update. Answered when it is decided who sums together; None: not yet."""
        job, task = self._summed(worker_id, name, keys.attempt)
        if rounds.tries_of(job, task).attempt != keys.attempt:
            raise SupersededError(f"{task}: attempt {keys.attempt} is not the newest")
        self._count_in_sum(job, securing.take_keys(self._sums.of(job), task.shard, worker_id, keys))
        return await self._decided(worker_id, name, keys.attempt, lambda seal: seal.roster)

    async def cut(self, worker_id: str, name: str, shares: SecureShares) -> Group | None:
        """A worker has cut its secrets into shares. Answered when it is decided whose masks are in; None: not yet."""
        job, task = self._summed(worker_id, name, shares.attempt)
        self._count_in_sum(job, securing.take_shares(self._sums.of(job), task.shard, shares))
        return await self._decided(worker_id, name, shares.attempt, securing.group_of)

    def reveal(self, worker_id: str, name: str, reveal: Reveal) -> None:
        """A worker opened its shares of a frozen round."""
        job_id, task = parse_assignment(name)
        job = self.job(job_id)
        self._check_owner(job, task, reveal.attempt, worker_id)
        if not (is_secure(job) and isinstance(job.inner, Aggregating) and job.inner.round == task.round):
            raise LateError(f"{task} needs no shares any more: {job.reason}")
        seal = self._sums.of(job)
        if task.shard not in seal.keys or seal.keys[task.shard].worker != worker_id:
            raise NotFoundError(f"{task} was not given to this worker", code="unknown_attempt", advice="Poll for work.")
        self._count_in_sum(job, securing.take_reveal(seal, task.shard, reveal))

    def _summed(self, worker_id: str, name: str, attempt: int) -> tuple[Job, Task]:
        """The job and the task of a worker's message about the sum of an open round."""
        job_id, task = parse_assignment(name)
        job = self.job(job_id)
        self._check_owner(job, task, attempt, worker_id)
        if not job.spec.secure.enabled or task.kind != "train" or not rounds.is_open(job, task):
            raise LateError(f"{task} is in no sum that can be joined: {job.reason}")
        self.fleet.seen(worker_id, self.clock())
        return job, task

    def _count_in_sum(self, job: Job, decision: Decision) -> None:
        if self._sums.keep(job, decision):
            self._settle(job.id)

    async def _decided(self, worker_id: str, name: str, attempt: int, read: Callable[[Seal], V | None]) -> V | None:
        """Wait until something of a sum is decided; None: it was not while a poll lasts."""
        until = self.clock() + self.settings.poll_s
        while not self._stopping:
            changed = self._changed
            job, task = self._summed(worker_id, name, attempt)
            seal = self._sums.of(job)
            if (found := read(seal)) is not None:
                if task.shard not in seal.members or seal.keys[task.shard].attempt != attempt:
                    raise SupersededError(f"{task}, attempt {attempt}, is not in the sum that is made of this round")
                return found
            try:
                async with asyncio.timeout(max(until - self.clock(), 0.0)):
                    await changed.wait()
            except TimeoutError:
                return None
        raise UnavailableError("the coordinator is stopping", code="stopping")

    # ------------------------------------------------------------ averaging

    async def _average(self, job_id: str, phase: Aggregating | Batch) -> None:
        """Fold the frozen updates into the next model, make it durable, and close the round."""
        job, spent = self.jobs[job_id], None
        try:
            seal = self._sums.of(job) if is_secure(job) else None
            seed, sampled = self._seed_of(job), self._sampled(job)
            if seed is not None:  # first: nothing is made whose cost is not known
                spent = await self.accounting.spent(job.spec, phase.round)
            made = await asyncio.to_thread(versions.make, job, phase, self.blobs, lambda: self._stopping, seal, seed)
        except (SeedLostError, AccountantError) as error:
            self._hold_private(job_id, phase, error)
            return
        except folding.Stopped:
            log.info("%s: round %d is averaged by the next coordinator", job_id, phase.round, extra=ids(job=job_id))
            return
        except (OSError, DiskFullError, BadUpdateError) as error:
            log.exception("%s: round %d could not be averaged", job_id, phase.round, extra=ids(job=job_id))
            self._averaging.pop(job_id, None)
            if isinstance(error, OSError):
                _die_if_broken(error)
            job = self.jobs[job_id]
            if isinstance(error, BadUpdateError):
                self._apply(job_id, rounds.fail(job, f"round {phase.round} could not be averaged: {error}"))
            elif not job.over:
                why = f"the coordinator until there is room: round {phase.round} could not be averaged: {error}"
                self._apply(job_id, rounds.pause(job, why, room=versions.room_for(job, phase.base.size)))
            return
        self._averaging.pop(job_id, None)
        job, now = self.jobs[job_id], self.clock()
        self._dropped |= {update.digest for update in (*phase.accepted, *phase.late)} | set(drift.carried(job))
        self._dropped |= rounds.bases_of(job)
        if rounds.frozen_of(job) != phase:  # it was ended meanwhile
            self._dropped |= made.digests
        else:
            step = rounds.close(
                job,
                made.model,
                step=made.step,
                memory=made.memory,
                amplified=made.amplification,
                slots=made.slots,
                slot_total=made.slot_total,
                fresh=made.fresh,
                seconds=now - phase.opened_at,
                places=self.places(job),
                now=now,
                privacy=example_level(job, phase) if spent is None else worker_level(job, spent, made.next_clip),
                sampled=sampled,
            )
            for fact in step.facts:
                if isinstance(fact, RoundClosed) and fact.warning:
                    log.warning("%s: round %d: %s", job_id, fact.round, fact.warning, extra=ids_of(job_id, fact))
            reach("closed-before")
            self._apply(job_id, step)
            reach("closed-after")
        self._discard()
        self._run_queue()

    def _hold_private(self, job_id: str, phase: Aggregating | Batch, error: LydianError) -> None:
        """A private round that cannot be closed now: without its seed it never can, without its cost it waits."""
        self._averaging.pop(job_id, None)
        job = self.jobs[job_id]
        if isinstance(error, SeedLostError):
            self._apply(job_id, rounds.fail(job, f"{error} {error.advice}"))
        elif not job.over:
            why = f"the coordinator: round {phase.round} is not averaged while its privacy is not known: {error}"
            self._apply(job_id, rounds.pause(job, why))

    def _averaged(self, job_id: str, done: asyncio.Task[None]) -> None:
        """A fault of our own while averaging must not leave the job waiting without a word."""
        if done.cancelled() or (error := done.exception()) is None:
            return
        log.error("%s: averaging broke off", job_id, exc_info=error, extra=ids(job=job_id))
        self._averaging.pop(job_id, None)
        if not self.jobs[job_id].over:
            self._apply(job_id, rounds.fail(self.jobs[job_id], f"averaging broke off: {type(error).__name__}: {error}"))

    def _discard(self) -> None:
        """Delete what was dropped, unless something else needs it, and half uploads that nobody can finish."""
        for digest in self._dropped - self._needed() - self._arriving.keys():
            self.blobs.remove(digest)
        self._dropped &= self._arriving.keys()
        self._uploads.keep_only(self._is_awaited)

    def _task_files(self, job: Job) -> set[str]:
        """The task file of a job, while it goes on, and as long as there is a model of it, which is none without it."""
        kept = job.task_digest is not None and (not job.over or bool(self.models.get(job.id)))
        return {job.task_digest} if kept and job.task_digest is not None else set()

    def _needed(self) -> set[str]:
        needed = {model.digest for models in self.models.values() for model in models.values()}
        needed |= {step.digest for steps in self.steps.values() for step in steps.values()} | self._keeping.digests()
        for job in self.jobs.values():
            needed |= self._task_files(job)
            if job.over:
                continue
            needed |= {evaluation.model.digest for evaluation in job.evaluations.values()} | set(drift.carried(job))
            needed |= {update.digest for update in rounds.waiting_late(job)}
            needed |= rounds.bases_of(job) | {update.digest for update in rounds.accepted_of(job)}
        return needed

    # ------------------------------------------------------------ time

    def _start_watch(self) -> None:
        self._watch = asyncio.create_task(self.tailnet.watch(), name="tailnet")
        self._watch.add_done_callback(self._watched)

    def _watched(self, done: asyncio.Task[None]) -> None:
        """Nothing of a job depends on it: a fault in it is logged, and it stays away."""
        if not done.cancelled() and not self._stopping:
            log.error("the tailnet is not watched any more", exc_info=done.exception())

    def _start_reaper(self) -> None:
        self._reaper = asyncio.create_task(self._reap(), name="reaper")
        self._reaper.add_done_callback(self._reaped)

    def _reaped(self, done: asyncio.Task[None]) -> None:
        """Without a reaper no lease would ever expire: a fault in it is logged, and it goes on."""
        if not done.cancelled() and not self._stopping:
            log.error("the reaper broke off and is started again", exc_info=done.exception())
            self._start_reaper()

    async def _reap(self) -> None:
        """Take expired leases away and keep deadlines, once a second. Notices when it stood still itself."""
        period = min(REAPER_S, self.settings.ttl_s / 8)
        last = self.clock()
        while True:
            await asyncio.sleep(period)
            now = self.clock()
            if now - last - period > self.settings.ttl_s / 2:
                log.warning("the coordinator stood still for %.1f s; every lease is extended", now - last)
                self.fleet.extend_all(now)
            last = now
            for lease in self.fleet.expired(now):
                name = self.fleet.workers[lease.worker].name if lease.worker in self.fleet.workers else lease.worker
                sentence = f"{name} has not been heard of for {self.settings.ttl_s:g} s"
                back = self._back(lease.task, lease.attempt, lease.worker, "expired", sentence)
                self._apply(lease.job, self._ended(lease.job, back))
            self._hold_ballast()
            self.given.expire()
            self._record_waiting()
            for job in self._active():
                self._give_up_lost(job)
                self._resume_if_room(job)
            self._run_queue()
            self._settle_all()

    def _record_waiting(self) -> None:
        try:
            self.audit.tick()
        except DiskBrokenError as error:
            _die(str(error))

    def _resume_if_room(self, job: Job) -> None:
        """A job that a full disk has paused goes on when there is room again."""
        room = job.phase.room if isinstance(job.phase, Paused) else 0
        if room:
            with suppress(DiskFullError):
                self.blobs.check_room(room)
                self._apply(job.id, rounds.resume(job, "the coordinator: there is room on its disk again"))

    def _settle_all(self) -> None:
        for job in self._active():
            self._settle(job.id)


def _source_of(request: JobRequest) -> str:
    """The text of the task; empty for one that nobody knows."""
    if request.task_source is not None:
        return request.task_source
    builtin = BUILTIN.get(request.spec.task)
    return builtin.file.read_text("utf-8") if builtin is not None else ""


def _is_awaited(job: Job, task: Task) -> bool:
    """Whether an update of this task is awaited by an asynchronous version, and does not only come late."""
    return isinstance(job.inner, Buffering) and rounds.is_open(job, task)


def _oldest(job: Job) -> int:
    """The oldest round that work of this job may still be out of."""
    return job.closed if job.spec.round.mode == "sync" else job.closed - job.spec.round.max_staleness


def _die_if_broken(error: OSError) -> None:
    """A disk that fails cannot be argued with: what is on it is not known until the next start has looked."""
    if error.errno == errno.EIO:
        _die(str(error))


def _die(why: str) -> NoReturn:
    """End at once, as by `kill -9`: a next start finds everything as after any other death, and checks every file."""
    log.critical("the coordinator ends, and its next start checks every file: %s", why)
    logging.shutdown()
    os._exit(EXIT_DISK_BROKEN)
