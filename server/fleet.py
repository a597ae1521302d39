"""The fleet: who is alive, who holds what, and which job's work a worker gets.

Pure: no clock, network, disk or tensor; the caller passes `now` in monotonic seconds. Nothing here is journalled: after
a restart the workers introduce themselves by their next call, and `adopt` gives each one lease time to do so.

Policy of the queue, in three sentences. Jobs are served in the order of submission: a worker that asks gets the oldest
running job's next open task. A job leaves the queue when as many workers as its `min_workers` can serve it and are not
needed by older jobs. A job needs as many workers as its rounds have shards; with `shards = auto`, all of them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from common.messages import Link, Order, Progress, Registration, TorchBuild
from server.buffering import Buffering
from server.deadlines import Due
from server.rounds import Aggregating, Held, Job, Paused, Queued, Task, has_had_its_turns, left_to_others, next_task

PLACE_KEPT_S = 600.0  # a worker that is gone without a word is expected back for this long
PREPARING_S = 120.0  # a worker that loads a job, and so has no reason to call, is not taken for gone
PREPARES_SINCE = 2  # the protocol that has preparations


@dataclass(frozen=True)
class Timing:
    """Durations of the leases, in seconds."""

    ttl_s: float = 40.0
    heartbeat_s: float = 10.0


@dataclass
class Lease:
    """One attempt at one task, held by one worker until it expires."""

    job: str
    task: Task
    attempt: int
    worker: str
    expires_at: float  # monotonic seconds
    claim_key: str = ""
    progress: Progress | None = None
    held: str = ""  # why the work stands still for now, as its worker says
    said: str = ""  # what its task wrote last
    since: float = 0.0  # monotonic seconds at which it was granted
    whole: bool = False  # whether that was the hand-out: not of a lease that was adopted, or had run out meanwhile
    due: Due | None = None  # when its update is expected, once that was worked out
    is_behind: bool = False  # it has overrun that, and it was said


@dataclass
class Worker:
    """What is known of a worker while the coordinator runs."""

    id: str
    registration: Registration
    seen_at: float | None = None  # monotonic seconds of its last call; None: not since the coordinator started
    polling: int = 0  # polls that wait for work right now
    polls: int = 0  # polls so far, a goodbye counted as one: an older one that still waits is given nothing
    left: bool = False  # said goodbye
    draining: bool = False  # by an operator's order, as is `paused`
    paused: bool = False
    set_aside: str | None = None
    strikes: int = 0
    degraded: str = ""  # why it can take no work now, as it says itself
    link: Link | None = None  # to it, as it measured it last
    resting: str = ""  # why its owner lets it take none now, likewise
    preparing: str | None = None  # the job that it was asked to load by the answer to its last call
    rival_at: float | None = None  # monotonic seconds at which an older process of the same name last called

    @property
    def name(self) -> str:
        """The name its owner gave it."""
        return self.registration.name

    @property
    def order(self) -> Order:
        """What an operator ordered."""
        return "pause" if self.paused else "drain" if self.draining else "work"


@dataclass
class Fleet:
    """Workers and their leases. A worker holds at most one lease; a task is held by at most one worker."""

    timing: Timing = Timing()
    workers: dict[str, Worker] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)  # worker id -> its lease; changed by `put` and `drop`
    asked: dict[str, dict[str, str]] = field(default_factory=dict)  # job -> worker id -> the claim key it asked with
    _holders: dict[str, dict[Task, str]] = field(default_factory=dict)  # job -> task -> who holds it; of `leases`
    _held: dict[str, Held] = field(default_factory=dict)  # job -> its tasks among them

    # ------------------------------------------------------------ who is there

    def register(self, worker_id: str, registration: Registration, now: float) -> list[Lease]:
        """A worker introduces itself. Returns the leases that its earlier life held, which are void now."""
        known = self.workers.get(worker_id)
        reborn = known is not None and known.registration.start_id != registration.start_id
        worker = Worker(worker_id, registration, seen_at=now)
        if known is not None:
            worker.set_aside, worker.strikes = known.set_aside, known.strikes
            worker.polling, worker.polls = known.polling, known.polls
            worker.rival_at, worker.link = known.rival_at, known.link
            worker.draining, worker.paused = known.draining, known.paused
        self.workers[worker_id] = worker
        if reborn:
            self.unask(worker_id)
        void = self.drop(worker_id) if reborn else None
        return [void] if void else []

    def rival(self, worker_id: str, registration: Registration, now: float) -> Worker | None:
        """The live worker whose credential somebody else comes with, from a copied state folder; None: there is none.

        The same place with a new start_id is a restart, and goes before its earlier life. From another place it is a
        second machine, and must not push out the one at work; nor may two processes of one place do so in turn, once
        the elder was seen to live on.
        """
        known = self.workers.get(worker_id)
        if known is None or known.registration.start_id == registration.start_id or not self.is_live(known, now):
            return None
        ours, theirs = known.registration.place, registration.place
        elsewhere = bool(ours and theirs) and ours != theirs
        in_turn = known.rival_at is not None and now - known.rival_at <= PLACE_KEPT_S
        return known if elsewhere or in_turn else None

    def seen(self, worker_id: str, now: float) -> Worker:
        """A worker called."""
        worker = self.workers[worker_id]
        worker.seen_at, worker.left, worker.preparing = now, False, None
        return worker

    def is_live(self, worker: Worker, now: float) -> bool:
        """Whether the worker has called within one lease time, or waits in a poll."""
        if worker.left or worker.seen_at is None:
            return False
        return worker.polling > 0 or now - worker.seen_at <= self.timing.ttl_s

    def is_loading(self, worker: Worker, now: float) -> bool:
        """Whether the worker was asked to load a job, and so has had no reason to call since."""
        asked = worker.preparing is not None and worker.seen_at is not None and not worker.left
        return asked and now - (worker.seen_at or 0.0) <= PREPARING_S

    def live(self, now: float) -> list[str]:
        """Ids of the live workers that may get work, by name."""
        return [w.id for w in sorted(self._there(now), key=lambda w: (w.name, w.id))]

    def there(self, now: float) -> Iterator[str]:
        """The same ids in no order, found as they are asked for."""
        return (w.id for w in self._there(now))

    def _there(self, now: float) -> Iterator[Worker]:
        """The live workers that may get work."""
        return (w for w in self.workers.values() if self.is_there(w, now))

    def is_there(self, worker: Worker, now: float) -> bool:
        """Whether the worker is live and may get work."""
        return may_work(worker) and (self.is_live(worker, now) or self.is_loading(worker, now))

    def serving(self, job: Job, now: float) -> list[str]:
        """Ids of the live workers that could do this job's work."""
        return [w for w in self.live(now) if w not in job.excluded and why_not(self.workers[w], job) is None]

    def serves(self, worker_id: str, job: Job, now: float) -> bool:
        """Whether the worker is one of those."""
        worker = self.workers.get(worker_id)
        if worker is None or worker_id in job.excluded or not self.is_there(worker, now):
            return False
        return why_not(worker, job) is None

    def places(self, job: Job, now: float) -> list[str]:
        """Ids of the workers that a round is cut for: those that serve, and those that vanished a short while ago."""
        serving = self.serving(job, now)
        there = set(serving)
        expected = (
            w.id
            for w in self.workers.values()
            if w.id not in there
            and w.seen_at is not None
            and now - w.seen_at <= PLACE_KEPT_S
            and not (w.left or w.id in job.excluded)
            and may_work(w)
            and why_not(w, job) is None
        )
        return [*serving, *sorted(expected)]

    def coming(self, job: Job, now: float) -> Mapping[str, bool]:
        """The workers that will come for the shards that were cut for them -> whether each is free now.

        Those that serve the job and are not at work for another one. No copy: for a look, now.
        """
        return _Coming(self, job, now)

    # ------------------------------------------------------------ who holds what

    def held(self, job: str) -> Mapping[Task, str]:
        """The job's tasks that some worker holds -> its id. No copy: for a look, now."""
        return self._holders.get(job, {})

    def tasks_held(self, job: str) -> Held:
        """Those tasks alone, likewise."""
        return self._held.get(job, Held())

    def put(self, lease: Lease) -> None:
        """A worker holds this, and nothing else."""
        self.drop(lease.worker)
        self.leases[lease.worker] = lease
        self._holders.setdefault(lease.job, {})[lease.task] = lease.worker
        self._held.setdefault(lease.job, Held()).add(lease.task)

    def drop(self, worker_id: str) -> Lease | None:
        """The worker holds nothing. Returns what it held."""
        lease = self.leases.pop(worker_id, None)
        if lease is not None:
            holders = self._holders[lease.job]
            if holders.get(lease.task) == worker_id:
                del holders[lease.task]
                self._held[lease.job].discard(lease.task)
            if not holders:
                del self._holders[lease.job], self._held[lease.job]
        return lease

    def lease_of(self, worker_id: str, job: str, task: Task, attempt: int) -> Lease | None:
        """The worker's lease, if it is on this attempt."""
        lease = self.leases.get(worker_id)
        same = lease is not None and (lease.job, lease.task, lease.attempt) == (job, task, attempt)
        return lease if same else None

    def grant(
        self,
        job: str,
        task: Task,
        attempt: int,
        worker_id: str,
        now: float,
        claim_key: str = "",
        *,
        whole: bool = False,
    ) -> Lease:
        """Give a task to a worker for one lease time; `whole`: this is the hand-out, and no earlier lease of it."""
        lease = Lease(job, task, attempt, worker_id, now + self.timing.ttl_s, claim_key, since=now, whole=whole)
        self.put(lease)
        return lease

    def adopt(self, outstanding: Iterable[tuple[str, Task, int, str, str]], now: float) -> None:
        """After a restart, leave every attempt that is out with its worker for one lease time."""
        for job, task, attempt, worker_id, claim_key in outstanding:
            self.grant(job, task, attempt, worker_id, now, claim_key)

    def renew(self, lease: Lease, progress: Progress | None, now: float) -> None:
        """The holder is still at work."""
        lease.expires_at = now + self.timing.ttl_s
        lease.progress = progress or lease.progress

    def release(self, worker_id: str, job: str, task: Task, attempt: int | None = None) -> None:
        """The task, or only this attempt at it, is not with this worker any more; freeing twice is freeing."""
        lease = self.leases.get(worker_id)
        if lease is not None and (lease.job, lease.task) == (job, task) and attempt in (None, lease.attempt):
            self.drop(worker_id)

    def expired(self, now: float) -> list[Lease]:
        """Leases that ran out. They are taken away."""
        gone = [lease for lease in self.leases.values() if lease.expires_at <= now]
        for lease in gone:
            self.drop(lease.worker)
        return gone

    def extend_all(self, now: float) -> None:
        """The coordinator itself stood still: nobody could renew, so everybody gets a whole lease time."""
        for lease in self.leases.values():
            lease.expires_at = now + self.timing.ttl_s
            lease.whole = False  # its time says nothing of its worker
        for worker in self.workers.values():
            if worker.seen_at is not None and not worker.left:
                worker.seen_at = now

    # ------------------------------------------------------------ who gets what

    def choose(self, worker_id: str, jobs: Sequence[Job], now: float) -> tuple[Job, Task] | None:
        """The next task for a worker: the oldest job's that has one for it.

        Args:
            worker_id: a live worker without a lease.
            jobs: all jobs, oldest first.
            now: monotonic seconds.
        """
        worker = self.workers[worker_id]
        if not may_work(worker):
            return None
        for job in jobs:
            if job.over or isinstance(job.phase, Paused | Queued) or why_not(worker, job) is not None:
                continue
            held, coming = self.tasks_held(job.id), self.coming(job, now)
            task = next_task(job, worker_id, held, coming)
            if task is not None and has_had_its_turns(job, task, worker_id):
                left = left_to_others(job, worker_id, partial(self.serving, job, now))
                task = next_task(job, worker_id, Held((*held, *left)), coming)
            if task is not None:
                return job, task
        return None

    def to_prepare(self, worker_id: str, claim_key: str, loaded: Sequence[str], jobs: Sequence[Job]) -> Job | None:
        """The job that a worker without work is to load meanwhile: the oldest that may have work for it.

        Each worker is asked once a job, and as many as the job can keep busy. One that has a job loaded which goes on
        is not asked: it would have to forget that one.

        Args:
            worker_id: a live worker without a lease, for which there is no task.
            claim_key: of its poll; the same one again is asked the same again, since an answer may be lost.
            loaded: jobs that it has in memory.
            jobs: all jobs, oldest first.
        """
        worker = self.workers[worker_id]
        if not may_work(worker) or worker.registration.protocol < PREPARES_SINCE:
            return None
        active = [job for job in jobs if not job.over]
        if any(job.id in loaded for job in active):
            return None
        for job in active:
            asked = self.asked.get(job.id, {})
            if asked.get(worker_id) == claim_key:
                return job
            if worker_id in asked or isinstance(job.phase, Paused):
                continue
            if worker_id in job.excluded or why_not(worker, job) is not None:
                continue
            busy = asked.keys() | {lease.worker for lease in self.leases.values() if lease.job == job.id}
            if len(busy) < workers_needed(job, len(self.workers)):
                return job
        return None

    def ask_to_prepare(self, worker_id: str, claim_key: str, job: str, now: float) -> None:
        """A worker is asked to load a job, and not expected to call before it has."""
        worker = self.seen(worker_id, now)
        worker.preparing = job
        self.asked.setdefault(job, {})[worker_id] = claim_key

    def unask(self, worker_id: str) -> None:
        """A worker has nothing loaded any more: it left, or is another process now."""
        for asked in self.asked.values():
            asked.pop(worker_id, None)

    def spare(self, job: Job, older: Sequence[Job], now: float) -> int:
        """How many of the workers that could serve this job no older job needs."""
        serving = set(self.serving(job, now))
        for other in older:
            if other.over or isinstance(other.phase, Paused | Queued):
                continue
            theirs = [w for w in self.serving(other, now) if w in serving]
            serving.difference_update(theirs[: workers_needed(other, len(theirs))])
        return len(serving)


class _Coming(Mapping[str, bool]):
    """Who will come for a shard that was cut for it, found for each as somebody asks: few are ever asked for."""

    def __init__(self, fleet: Fleet, job: Job, now: float) -> None:
        self._fleet, self._job, self._now = fleet, job, now

    def __getitem__(self, worker: str) -> bool:
        lease = self._fleet.leases.get(worker)
        if (lease is None or lease.job == self._job.id) and self._fleet.serves(worker, self._job, self._now):
            return lease is None
        raise KeyError(worker)

    def __iter__(self) -> Iterator[str]:
        return (worker for worker in self._fleet.workers if worker in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def may_work(worker: Worker) -> bool:
    """Whether a worker that is there may be given work."""
    ordered = worker.draining or worker.paused
    return worker.set_aside is None and not (ordered or worker.degraded or worker.resting)


def workers_needed(job: Job, serving: int) -> int:
    """How many of its serving workers a running job can keep busy."""
    match job.inner:
        case Aggregating() if job.inner.round >= job.rounds:
            return 1
        case Buffering() if job.inner.round > job.spec.rounds:
            return 1
        case _ if job.inner.state == "evaluating":
            return sum(len(evaluation.open_parts) for evaluation in job.evaluations.values())
    data = job.spec.data
    if data.shards == "auto" or data.partition == "local" or job.spec.round.mode == "async":
        return serving
    return min(serving, max(int(data.shards * data.fraction), 1))


def _distrust(worker: Worker, job: Job, digest: str) -> str:
    """Why its owner lets this worker not run the job's task file, as far as can be told here; empty: it may.

    Whether a signature is right only the worker finds out: here it is only looked whose it says that it is.
    """
    registration = worker.registration
    if registration.trust == "any" or (registration.trust != "none" and digest in registration.trusted):
        return ""
    if registration.trust == "none":
        return f"{worker.name} runs built-in tasks only (--trust none)"
    if registration.trust == "listed":
        return f"{worker.name} has not listed task {digest[:12]}…"
    if not job.signatures:
        return f"{worker.name} runs signed tasks only (--trust signed), and task {digest[:12]}… is not signed"
    if any(signature.key in registration.signers for signature in job.signatures):
        return ""
    signed = ", ".join(f"{signature.name} (key {signature.key})" for signature in job.signatures)
    return f"{worker.name} lists no key of who signed task {digest[:12]}…: {signed}"


def why_not(worker: Worker, job: Job) -> str | None:
    """Why this worker cannot do this job's work; None: it can."""
    registration = worker.registration
    if job.task_digest is not None and (distrust := _distrust(worker, job, job.task_digest)):
        return distrust
    if registration.protocol < 2 and job.spec.beyond_protocol_1:
        missing = job.spec.beyond_protocol_1
        return f"{worker.name} speaks protocol {registration.protocol}, which has no {missing}: upgrade it"
    if job.spec.secure.enabled and registration.no_masks:
        return f"{worker.name} cannot mask its updates: {registration.no_masks}"
    if job.spec.privacy.level == "example" and (lacks := _lacks_for_examples(registration.hardware.torch)):
        return f"{worker.name} {lacks}"
    wanted = job.spec.data.name or ("" if job.spec.script else job.spec.task)  # a script may know where its data is
    if job.spec.data.partition == "local" and wanted and wanted not in registration.data:
        return f"{worker.name} offers no data named {wanted} (--data {wanted}=PATH)"
    return None


def _lacks_for_examples(build: TorchBuild) -> str:
    """What a worker lacks for example-level privacy; empty: nothing."""
    if not build.opacus:
        return "has no opacus, which example-level privacy needs (there: pip install 'opacus>=1.6.0')"
    return f"trains on {build.ranks} devices together, and example-level privacy on one" if build.ranks > 1 else ""


@dataclass(frozen=True)
class Standing:
    """How a worker is shown: its state and why."""

    state: Literal["idle", "working", "gone", "draining", "paused", "resting", "degraded", "set aside"]
    reason: str


def standing(fleet: Fleet, worker: Worker, now: float, describe: Callable[[Lease], str]) -> Standing:
    """What a worker is doing, in words."""
    lease = fleet.leases.get(worker.id)
    if worker.set_aside is not None:
        return Standing("set aside", worker.set_aside)
    if worker.left:
        return Standing("gone", "it said goodbye")
    if not (fleet.is_live(worker, now) or fleet.is_loading(worker, now)):
        away = "not seen since the coordinator started" if worker.seen_at is None else "no call for a lease time"
        return Standing("gone", away)
    if worker.degraded and lease is None:
        return Standing("degraded", worker.degraded)
    if worker.paused:
        return Standing("paused", f"giving back {describe(lease)}" if lease else "by an operator, until it is resumed")
    if worker.draining:
        return Standing("draining", describe(lease) if lease else "takes no more work until it is resumed")
    if worker.resting and lease is None:
        return Standing("resting", worker.resting)
    if lease is None:
        return Standing("idle", f"loading {worker.preparing}" if worker.preparing else "waiting for work")
    return Standing("working", describe(lease) + (f", stands still: {lease.held}" if lease.held else ""))


def why_nobody(fleet: Fleet, job: Job, now: float) -> str:
    """Why live workers cannot serve a job, one clause a worker; empty if some can, or none is live."""
    reasons: Mapping[str, str | None] = {w: why_not(fleet.workers[w], job) for w in fleet.live(now)}
    if not reasons or any(reason is None and w not in job.excluded for w, reason in reasons.items()):
        return ""
    return "; ".join(reason or job.excluded[w] for w, reason in reasons.items())
