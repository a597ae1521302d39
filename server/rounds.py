"""The round machine: what a job is doing, which result counts, when a round is averaged, and why.

Pure: no clock, network, disk or tensor. The caller passes `now` in monotonic seconds. A decision looks at a Job and
answers with a Step: the facts that follow (common.facts) and why, in words. `evolve` applies one fact to a Job; nothing
else changes one, so that replaying the journal gives the state back.

    Queued ──▶ Initialising ──▶ Training ⇄ Aggregating ──▶ Evaluating ──▶ Finished
       Paused wraps any of these; Failed and Cancelled end any of these.
       Asynchronous rounds have one phase in place of Training and Aggregating (server.buffering).

An accepted update whose bytes a power cut took is *lost* until its worker has sent its copy again (*restored*), or
until nobody can send it any more and its shard is open again. No round is frozen or averaged while it lacks one.

Which worker holds what is not known here (server.fleet); only the attempts are, since they fence.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableSet, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple, TypeVar, assert_never

from common import begins
from common.cautions import cautions, too_few_steps
from common.errors import BadUpdateError, ConflictError, JobOverError, LateError, NotFoundError, SupersededError
from common.facts import (
    Absent,
    Accepted,
    Evaluated,
    EvaluationGivenUp,
    Extended,
    Fact,
    Frozen,
    HandedBack,
    HandedOut,
    Initialised,
    Late,
    LateMember,
    Lost,
    Measured,
    Opened,
    OpenedAnew,
    Restored,
    RoundClosed,
    Shard,
    Slot,
    StateChanged,
    Submitted,
)
from common.messages import (
    Beginning,
    JobSpec,
    Kind,
    ModelFacts,
    ModelRef,
    PrivacySpent,
    PrivateSteps,
    State,
    StepRef,
    Submission,
    TaskRef,
    TaskSignature,
)
from server import amplification, buffering, nova, outliers
from server import blame as blame_on
from server.buffering import Batch
from server.cutting import Place, Sampled, check_bounds, open_round
from server.deadlines import Due
from server.evaluation import (
    NO_NUMBER,
    Evaluation,
    absent,
    by_worker,
    is_better,
    stale_after,
    why_nothing,
    why_stop,
    without_numbers,
)
from server.lateness import MOST, Past, members, still_useful

V = TypeVar("V")

GRACE = 0.1  # once the quorum is in, stragglers get this share of the time that it took
PATIENCE = 1.0  # and those that are expected within this share of it, by their own history, until then
ENCODINGS = {"fp32": 1.0, "bf16": 0.5, "int8": 0.25, "int4": 0.133}  # share of a float32 model, the finest first
QUICK_S = 2.0  # seconds for an update that need not be made smaller
LONGEST_WAY = 50  # steps from one model to another, before the whole model is fetched instead
NOT_THE_TASKS_FAULT = frozenset({"released", "expired", "lost", "disk_full"})
NOT_FOR_THIS_WORKER = frozenset({"no_data", "not_trusted", "unknown_task", "missing_package"})


# ---------------------------------------------------------------- what there is


@dataclass(frozen=True)
class Limits:
    """How often a task may fail before it is given up."""

    failures: int = 5  # of the task's own code, or refused results
    expiries: int = 20  # leases that ran out: a task that kills every agent looks like this
    evaluation_failures: int = 3


class Task(NamedTuple):
    """One unit of work inside a job. A tuple, since a large fleet's are looked up by the thousand."""

    kind: Kind
    round: int
    shard: int = 0

    def __str__(self) -> str:
        match self.kind:
            case "init":
                return "initialisation"
            case "train":
                return f"round {self.round}, shard {self.shard}"
            case _:
                return f"evaluation of round {self.round}"


class Held(MutableSet[Task]):
    """Tasks of one job that somebody is at work on. Kept by their round, where thousands of shards are looked up."""

    def __init__(self, tasks: Iterable[Task] = ()) -> None:
        self._shards: dict[tuple[Kind, int], set[int]] = {}
        for task in tasks:
            self.add(task)

    def shards(self, kind: Kind, round_index: int) -> AbstractSet[int]:
        """The shards of one round. No copy: for a look, now."""
        return self._shards.get((kind, round_index), frozenset())

    def add(self, task: Task) -> None:
        """Somebody is at work on this."""
        self._shards.setdefault((task.kind, task.round), set()).add(task.shard)

    def discard(self, task: Task) -> None:
        """Nobody is."""
        if task in self:
            self._shards[task.kind, task.round].discard(task.shard)
            if not self._shards[task.kind, task.round]:
                del self._shards[task.kind, task.round]

    def __contains__(self, task: object) -> bool:
        return isinstance(task, Task) and task.shard in self.shards(task.kind, task.round)

    def __iter__(self) -> Iterator[Task]:
        return (Task(kind, index, shard) for (kind, index), shards in self._shards.items() for shard in shards)

    def __len__(self) -> int:
        return sum(map(len, self._shards.values()))


@dataclass(frozen=True)
class Tries:
    """What became of the attempts at one task. Attempt n belongs to workers[n - 1]; the newest may still be out."""

    workers: tuple[str, ...] = ()
    failed_on: tuple[str, ...] = ()  # a worker for each failure
    expired_on: tuple[str, ...] = ()  # and for each lease that ran out
    out: bool = False
    claim_key: str = ""  # of the newest attempt
    blamed: frozenset[int] = frozenset()  # attempts that are among the failures: each once, however often it is said

    @property
    def attempt(self) -> int:
        """The newest attempt's number; 0 before the first."""
        return len(self.workers)

    @property
    def failures(self) -> int:
        """Attempts that failed."""
        return len(self.failed_on)

    @property
    def expiries(self) -> int:
        """Leases that ran out."""
        return len(self.expired_on)


UNTRIED = Tries()


@dataclass(frozen=True)
class Queued:
    """Waiting for workers."""

    state: State = field(default="queued", init=False)


@dataclass(frozen=True)
class Initialising:
    """A worker builds the model from the seed."""

    tries: Tries = UNTRIED
    state: State = field(default="initialising", init=False)


@dataclass(frozen=True)
class Training:
    """A round is open: shards are trained and updates come in."""

    round: int
    base: ModelRef
    shards: Mapping[int, Shard]  # in ascending order
    opened_at: float  # monotonic seconds
    tries: Mapping[int, Tries] = field(default_factory=dict)
    accepted: Mapping[int, Accepted] = field(default_factory=dict)
    quorum_at: float | None = None  # monotonic seconds at which the quorum was reached
    extended: bool = False
    lost: frozenset[int] = frozenset()  # shards whose accepted update has no bytes here
    evaluators: tuple[Absent, ...] = ()  # workers that are too slow for a shard
    seal: int = 0  # how often the round was begun anew, since a secure sum could not come about
    drawn_from: int | None = None  # members that its shards are a random sample of
    owns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # worker -> the shards that are its, or meant so
    state: State = field(default="training", init=False)


@dataclass(frozen=True)
class Aggregating:
    """The set of updates is frozen and is being averaged."""

    round: int
    base: ModelRef
    accepted: tuple[Accepted, ...]  # in shard order: the order of summation
    left_out: int
    opened_at: float
    before: Training  # what was frozen: opened again only if an update is lost for good
    absent: tuple[Absent, ...] = ()  # who is not in it, and why
    late: tuple[Accepted, ...] = ()  # updates of earlier rounds, in the order of `members`
    members: tuple[LateMember, ...] = ()
    state: State = field(default="aggregating", init=False)


Buffering = buffering.Buffering[Tries]


@dataclass(frozen=True)
class Evaluating:
    """Every round is closed; the last evaluations are awaited."""

    state: State = field(default="evaluating", init=False)


@dataclass(frozen=True)
class Paused:
    """No work is handed out. What is out may come in, and a frozen round is averaged."""

    before: "Queued | Initialising | Training | Aggregating | Buffering | Evaluating"
    room: int = 0  # bytes that must be free before it goes on by itself; 0: a person paused it
    state: State = field(default="paused", init=False)


@dataclass(frozen=True)
class Finished:
    """All rounds done, or the target reached."""

    state: State = field(default="finished", init=False)


@dataclass(frozen=True)
class Failed:
    """Ended without its last round."""

    state: State = field(default="failed", init=False)


@dataclass(frozen=True)
class Cancelled:
    """Ended by a person."""

    state: State = field(default="cancelled", init=False)


Active = Queued | Initialising | Training | Aggregating | Buffering | Evaluating
Over = Finished | Failed | Cancelled
Phase = Active | Paused | Over


@dataclass(frozen=True)
class StateOf:
    """The newest state of a shard (optimiser, personal tensors): which round counted an update of it, and whose."""

    round: int
    worker: str
    shard: int  # its number in that round


@dataclass(frozen=True)
class Job:
    """All that decisions need to know of one job."""

    id: str
    spec: JobSpec
    task_digest: str | None
    phase: Phase
    reason: str
    facts: ModelFacts | None = None
    model: ModelRef | None = None  # the newest version
    memory: tuple[str, ...] = ()  # digests of what the next average needs beside it
    closed: int = 0  # rounds closed
    evaluations: Mapping[int, Evaluation[Tries]] = field(default_factory=dict)  # round -> its pending evaluation
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the newest evaluated round
    metrics_round: int | None = None
    best_round: int | None = None
    best_value: float | None = None
    stale: int = 0  # evaluations in a row without a better value of the target metric
    reference: float | None = None  # the last one that was better, by more than min_delta
    excluded: Mapping[str, str] = field(default_factory=dict)  # worker id -> why it cannot do this job
    unusable: frozenset[str] = frozenset()  # ids of the workers that said that its task cannot be used
    past: Mapping[int, Past[Tries]] = field(default_factory=dict)  # closed rounds of which late updates are still used
    late: Mapping[tuple[int, int], Accepted] = field(
        default_factory=dict
    )  # (round, shard) -> one that waits for a round
    states: Mapping[int | str, "StateOf"] = field(
        default_factory=dict
    )  # keep_optimizer, personal: shard, or worker where data is local -> where its newest state is
    amplified: tuple[float | None, ...] = ()  # how far the outer steps of the last rounds went (server.amplification)
    slots: Mapping[str, str] = field(default_factory=dict)  # drift: shard (server.drift.key_of) -> digest of its slot
    slot_total: tuple[str, ...] = ()  # drift: digests of both numbers of the sum of all slots
    owners: frozenset[str] = frozenset()  # drift, own data: workers that have had a shard
    affordable: int | None = None  # rounds within the privacy budget
    planned_epsilon: float | None = None  # of all rounds
    spent: PrivacySpent | None = None  # by the newest round
    private_before: tuple[PrivateSteps, ...] = ()  # example-level privacy: what the worst-off sample has been through
    signatures: tuple[TaskSignature, ...] = ()  # of the task file
    begins_with: Beginning | None = None  # in place of what model(config) builds

    @property
    def task(self) -> TaskRef:
        """The task, as workers are told of it."""
        return TaskRef(name=self.spec.task, digest=self.task_digest, signatures=self.signatures)

    @property
    def rounds(self) -> int:
        """Rounds that will be trained: those planned, as far as the privacy budget goes."""
        return self.spec.rounds if self.affordable is None else min(self.spec.rounds, self.affordable)

    @property
    def over(self) -> bool:
        """Whether the job has ended."""
        return isinstance(self.phase, Over)

    @property
    def inner(self) -> Active | Over:
        """The phase, looking through a pause."""
        return self.phase.before if isinstance(self.phase, Paused) else self.phase


@dataclass(frozen=True)
class Step:
    """A decision: the facts to journal, why in words, and when to look again if nothing happens before."""

    facts: tuple[Fact, ...] = ()
    reason: str = ""
    look_again_at: float | None = None  # monotonic seconds


# ---------------------------------------------------------------- starting, pausing, ending


def begin(job: Job, serving: Sequence[str], spare: int) -> Step:
    """Leave the queue when enough workers are there for it.

    Args:
        job: the job that waits.
        serving: ids of the live workers that could do this job's work.
        spare: how many of them no older job needs.
    """
    wanted = job.spec.round.min_workers
    if not isinstance(job.phase, Queued):
        return Step(reason=job.reason)
    if spare < wanted:
        taken = f", {len(serving) - spare} of them with older jobs" if spare < len(serving) else ""
        refused = "".join(f"; {why}" for why in sorted(set(job.excluded.values())))
        return Step(reason=f"waiting for {workers(wanted)}: {len(serving)} can serve it{taken}{refused}")
    loads = f" and puts {begins.words(job.begins_with)} into it" if job.begins_with else ""
    there = f"{workers(spare)} there, {wanted} needed: one builds the model{loads}"
    reason = "; caution: ".join([there, *cautions(job.spec)])
    return Step((StateChanged(state="initialising", reason=reason),), reason)


def workers(number: int) -> str:
    """A number of workers, in words."""
    return f"{number} worker{'' if number == 1 else 's'}"


def pause(job: Job, who: str, room: int = 0) -> Step:
    """Hand out no more work until resumed. Pausing twice is pausing, but a person's pause outlasts a full disk's.

    Args:
        job: the job.
        who: a user, or the coordinator with what is wrong.
        room: bytes that must be free on the coordinator's disk before the job goes on by itself; 0: not by itself.
    """
    _refuse_if_over(job)
    if isinstance(job.phase, Paused) and (room > 0 or job.phase.room == 0):
        return Step(reason=job.reason)
    reason = f"paused by {who}"
    return Step((StateChanged(state="paused", reason=reason, room=room),), reason)


def resume(job: Job, who: str) -> Step:
    """Go on where the job stood. Resuming a job that runs changes nothing."""
    _refuse_if_over(job)
    if not isinstance(job.phase, Paused):
        return Step(reason=job.reason)
    reason = f"resumed by {who}"
    return Step((_changed(job.phase.before.state, reason),), reason)


def cancel(job: Job, who: str) -> Step:
    """End the job; its closed rounds stay. Cancelling twice is cancelling."""
    if isinstance(job.phase, Cancelled):
        return Step(reason=job.reason)
    _refuse_if_over(job)
    reason = f"cancelled by {who} after {job.closed} of {job.rounds} rounds"
    return Step((_changed("cancelled", reason),), reason)


def fail(job: Job, why: str) -> Step:
    """End the job because it cannot go on."""
    _refuse_if_over(job)
    return Step((_changed("failed", why),), why)


def fail_if_nobody_can(job: Job, live: Iterable[str]) -> Step:
    """End the job when every live worker has said that it cannot do it: no data, or not trusted."""
    live = set(live)
    if job.over or not job.excluded or not live or not live <= job.excluded.keys():
        return Step(reason=job.reason)
    said = "; ".join(sorted({job.excluded[worker] for worker in live}))
    return fail(job, f"none of the {len(live)} live workers can do this job: {said}")


# ---------------------------------------------------------------- handing out work


def next_task(job: Job, worker: str, held: Held, coming: Mapping[str, bool] = MappingProxyType({})) -> Task | None:
    """The task of this job that the worker should do next; None when there is nothing for it.

    Training goes first, since a round waits for it; but an evaluation that lags two rounds behind goes before, so that
    a fleet which is never idle is still measured. Asynchronously nothing waits, and an evaluation goes first.

    Args:
        job: the job.
        worker: the worker's id.
        held: this job's tasks that some worker holds a lease on.
        coming: the workers that can be expected to come for the shards that were cut for them, and whether each is free
            now: those that are live, serve the job, and are not at work for another one.
    """
    if worker in job.excluded:
        return None
    match job.phase:
        case Initialising():
            task = Task("init", 0)
            return None if task in held else task
        case Training() as phase:
            waiting = _evaluations(job, worker, held)
            if waiting and waiting[0].round <= phase.round - 2:
                return waiting[0]
            return _open_shard(job, phase, worker, held, coming) or next(iter(waiting), None)
        case buffering.Buffering() as phase:
            shards = frozenset(task.shard for task in held if task.kind == "train")
            free = buffering.free_shards(phase, worker, shards, job.spec)
            train = (Task("train", phase.newest, shard) for shard in free)
            return next(iter([*_evaluations(job, worker, held), *train]), None)
        case Aggregating() | Evaluating():
            return next(iter(_evaluations(job, worker, held)), None)
        case _:
            return None


def _open_shard(job: Job, phase: Training, worker: str, held: Held, coming: Mapping[str, bool]) -> Task | None:
    """The shard that this worker is to train: its own, else one whose state it has, another's last.

    Asked once for each worker of a fleet, which may be a thousand: so most find their own without a look at the others.
    """
    shards, accepted, taken = phase.shards, phase.accepted, held.shards("train", phase.round)

    def free(numbers: Iterable[int]) -> Iterator[Shard]:
        """Those that nobody has and nobody has handed in."""
        return (shards[number] for number in numbers if number not in accepted and number not in taken)

    own = free(number for number in phase.owns.get(worker, ()) if number in shards)
    others = (shard for shard in free(shards) if shard.worker is None)
    if any(one.worker == worker for one in phase.evaluators):
        trainers = {s.meant for s in shards.values() if s.meant is not None and s.meant in coming}
        # Whoever trains in this round will be done with what is left sooner; not with what it has failed at.
        others = (s for s in others if not _is_left_to_one_of(phase.tries.get(s.shard, UNTRIED), trainers))
    open_to_it = (s for s in others if _may_take(phase, s, worker, coming))
    best = _nearest(job, own, worker) or _nearest(job, open_to_it, worker)
    return None if best is None else Task("train", phase.round, best.shard)


def _nearest(job: Job, shards: Iterable[Shard], worker: str) -> Shard | None:
    """The first of the shards that are the least away from what a worker has; None: there are none."""
    if not job.states:
        return next(iter(shards), None)
    return min(shards, key=lambda shard: _distance(job, shard.shard, worker), default=None)


def _is_left_to_one_of(tries: Tries, trainers: Iterable[str]) -> bool:
    return any(not _has_had_its_turns(tries, trainer) for trainer in trainers)


def _may_take(phase: Training, shard: Shard, worker: str, coming: Mapping[str, bool]) -> bool:
    """Whether a worker may have a shard that may have been cut for another: not while that one is about to come for it.

    Nobody waits for a worker that is gone, is at work elsewhere or gave the shard back. One that is still busy with an
    earlier task of this job is late, so whoever has handed a shard in already goes before it.
    """
    meant = shard.meant
    if meant in (None, worker) or phase.tries.get(shard.shard, UNTRIED).workers:
        return True
    free = coming.get(meant)
    return free is None or (not free and any(update.worker == worker for update in phase.accepted.values()))


def _distance(job: Job, shard: int, worker: str) -> int:
    state = job.states.get(shard)
    if state is None:
        return 1
    return 0 if state.worker == worker else 2


def state_to_go_on_from(job: Job, shard: int, worker: str) -> StateOf | None:
    """The newest state of this shard, if this worker has it. Local data is its worker's, whatever number it has now."""
    state = job.states.get(worker if job.spec.data.partition == "local" else shard)
    return state if state is not None and state.worker == worker else None


def _states_after(job: Job, updates: Iterable[Accepted]) -> Mapping[int | str, StateOf]:
    """Where the newest states are once these updates count."""
    if not job.spec.train.leaves_state:
        return job.states
    local, states = job.spec.data.partition == "local", dict(job.states)
    for update in updates:
        key = update.worker if local else update.shard
        if key not in states or states[key].round < update.round:
            states[key] = StateOf(update.round, update.worker, update.shard)
    return states


def _evaluations(job: Job, worker: str, held: Held) -> list[Task]:
    pending = sorted(job.evaluations.items())
    tasks = (Task("evaluate", index, part) for index, evaluation in pending for part in evaluation.parts_for(worker))
    return [task for task in tasks if task not in held]


def hand_out(job: Job, task: Task, worker: str, claim_key: str = "") -> Step:
    """Give the task to the worker, as the next attempt."""
    fact = HandedOut(
        kind=task.kind,
        round=task.round,
        shard=task.shard,
        attempt=tries_of(job, task).attempt + 1,
        worker=worker,
        claim_key=claim_key,
    )
    return Step((fact,), f"{task}, attempt {fact.attempt}, to {worker}")


def hand_back(job: Job, back: HandedBack, limits: Limits, able: Callable[[], Collection[str]] = frozenset) -> Step:
    """An attempt ended without a result. Decides whether that ends the task, and with it the job, or the worker's part.

    Args:
        job: the job.
        back: what is said of the attempt.
        limits: how often a task may fail.
        able: gives the ids of the live workers that could do this job's work; not asked where nothing depends on it.
    """
    task = Task(back.kind, back.round, back.shard)
    if job.over or not is_open(job, task) or is_late(job, task):
        return Step((back,), f"{task} had been settled: {back.sentence}")
    tries = _counted(tries_of(job, task), back)
    blame = f"{task} on {back.worker_name}: {back.sentence}"
    if back.code == "bad_task":
        if _is_proven(job, task, said := {*job.unusable, back.worker}, able):
            blame += f"; {len(said)} workers say that it cannot be used" if len(said) > 1 else ""
            return Step((back, _changed("failed", blame)), blame)
        back = back.model_copy(update={"excludes": True})
    if task.kind == "evaluate" and job.evaluations[task.round].workers:
        spent = tries.failures >= limits.evaluation_failures or tries.expiries >= limits.expiries
        if not spent and back.code not in NOT_FOR_THIS_WORKER and not back.excludes:
            return Step((back,), blame)
        part = without_numbers(task.round, task.shard, back.attempt, back.worker, back.worker_name, back.sentence)
        step = _take_part(job, part)
        return replace(step, facts=(back, *step.facts))
    many = {*tries.failed_on, *tries.expired_on}
    too_often = task.kind == "evaluate" and tries.failures >= limits.evaluation_failures
    if too_often and _is_proven(job, task, many, able):
        reason = f"{task} given up after {tries.failures} failures, the last: {back.sentence}"
        given_up = EvaluationGivenUp(round=task.round, reason=reason)
        return Step((back, given_up, *_finish_if_last(job, task.round, reason)), reason)
    if tries.failures >= limits.failures or tries.expiries >= limits.expiries:
        if not _is_proven(job, task, many, able):
            return _without_worker(job, task, back, blame)
        ended = f"{tries.failures} failures and {tries.expiries} lost leases"
        reason = f"{task} was given up after {ended}, the last on {back.worker_name}: {back.sentence}"
        return Step((back, _changed("failed", reason)), reason)
    return Step((back,), blame)


def _without_worker(job: Job, task: Task, back: HandedBack, blame: str) -> Step:
    """A task is not given up, since others are able: they get it. What one worker alone could do goes with it."""
    if not _is_for_one(job, task):
        return Step((back,), f"{blame}; it is left to others")
    back = back.model_copy(update={"excludes": True})
    return Step((back,), f"{blame}; the job goes on without this worker, which alone could do this")


def _is_for_one(job: Job, task: Task) -> bool:
    """Whether this is a shard that one worker alone could train, since the data is its own."""
    return task.kind == "train" and subject_of(job, task)[1].worker is not None


def _is_proven(job: Job, task: Task, said: Collection[str], able: Callable[[], Collection[str]]) -> bool:
    """Whether these workers are enough to say that a task cannot be done.

    Against them stand those that could go on with the job in their place: with own data, those of the open round.
    """
    beside = able()
    if _is_for_one(job, task):
        shards = job.inner.shards if isinstance(job.inner, buffering.Buffering) else _training(job).shards
        owners = {shard.worker for shard in shards.values() if shard.worker is not None}
        beside = owners & set(beside) | {update.worker for update in accepted_of(job)}
    return blame_on.is_proven(said, beside)


def has_had_its_turns(job: Job, task: Task, worker: str) -> bool:
    """Whether a worker was tried at an open task often enough to leave it to others, if any are able."""
    if task.kind == "train" and isinstance(job.inner, buffering.Buffering):
        turn = job.inner.turns.get(task.shard)
        return turn is not None and not turn.counted and _has_had_its_turns(turn.tries, worker)
    return _has_had_its_turns(tries_of(job, task), worker)


def left_to_others(job: Job, worker: str, able: Callable[[], Collection[str]]) -> frozenset[Task]:
    """The open tasks that a worker does not get for now, since it has failed at them and others have not.

    Args:
        job: the job.
        worker: the worker's id.
        able: gives the ids of the live workers that could do this job's work; not asked where nothing depends on it.
    """
    worn = [(task, tries) for task, tries in _tried_again(job) if _has_had_its_turns(tries, worker)]
    found = set(able()) if worn else set[str]()
    return frozenset(
        task
        for task, tries in worn
        if blame_on.leaves_to_others(worker, tries.workers, tries.failed_on, found) and not _is_for_one(job, task)
    )


def _tried_again(job: Job) -> Iterable[tuple[Task, Tries]]:
    """What any worker could do, and was given before more than once: of thousands of shards a few."""
    again = blame_on.FAILURES_EACH
    match job.inner:
        case Initialising(tries=tries):
            yield Task("init", 0), tries
        case Training() as phase:
            often = ((shard, tries) for shard, tries in phase.tries.items() if len(tries.workers) >= again)
            yield from ((Task("train", phase.round, shard), tries) for shard, tries in often)
        case buffering.Buffering() as phase:
            open_turns = ((shard, turn) for shard, turn in phase.turns.items() if not turn.counted)
            yield from ((Task("train", phase.newest, shard), turn.tries) for shard, turn in open_turns)
    for index, evaluation in job.evaluations.items():
        if not evaluation.workers:
            yield from ((Task("evaluate", index, part), tries) for part, tries in evaluation.tries.items())


def _has_had_its_turns(tries: Tries, worker: str) -> bool:
    return blame_on.has_had_its_turns(worker, tries.workers, tries.failed_on)


def _counted(tries: Tries, back: HandedBack) -> Tries:
    failed = back.code not in NOT_THE_TASKS_FAULT | NOT_FOR_THIS_WORKER and back.attempt not in tries.blamed
    return replace(
        tries,
        failed_on=(*tries.failed_on, back.worker) if failed else tries.failed_on,
        blamed=tries.blamed | {back.attempt} if failed else tries.blamed,
        expired_on=(*tries.expired_on, back.worker) if back.code == "expired" else tries.expired_on,
        out=tries.out and back.attempt != tries.attempt,
    )


def tries_of(job: Job, task: Task) -> Tries:
    """What became of the attempts at a task so far. Of a task that is not open any more: nothing."""
    match task.kind, job.inner:
        case "init", Initialising(tries=tries):
            return tries
        case "train", Training(round=task.round) as phase:
            return phase.tries.get(task.shard, UNTRIED)
        case "train", buffering.Buffering() as phase:
            return _tries_of_turn(phase.turns.get(task.shard), task.round)
        case "evaluate", _ if task.round in job.evaluations:
            return job.evaluations[task.round].tries.get(task.shard, UNTRIED)
        case "train", _ if task.round in job.past:
            return job.past[task.round].tries.get(task.shard, UNTRIED)
        case _:
            return UNTRIED


def _tries_of_turn(turn: buffering.Turn[Tries] | None, round_index: int) -> Tries:
    """Of a shard that was not handed out from this version: the failures since it last counted."""
    if turn is not None and turn.round == round_index:
        return turn.tries
    if turn is None or turn.counted:
        return UNTRIED
    return Tries(failed_on=turn.tries.failed_on, expired_on=turn.tries.expired_on)


def is_late(job: Job, task: Task) -> bool:
    """Whether the round of this task has closed, and an update of it would still be used in a later one."""
    if task.kind != "train" or task.round not in job.past or task.shard not in job.past[task.round].shards:
        return False
    match job.inner:
        case Training(round=coming):
            return coming - task.round <= MOST
        case Aggregating(round=under_way):  # it would join the next round, if there is one
            return under_way < job.rounds and under_way + 1 - task.round <= MOST
        case _:
            return False


def subject_of(job: Job, task: Task) -> tuple[ModelRef, Shard]:
    """What is trained on what: the base and the shard of a task whose update could still count."""
    if isinstance(job.inner, buffering.Buffering):
        return job.inner.bases[task.round], job.inner.turns[task.shard].shard
    phase = job.past[task.round] if is_late(job, task) else _training(job)
    return phase.base, phase.shards[task.shard]


def private_parts(job: Job, task: Task, workers: int) -> int:
    """How many parts the data of a task's round is in, where each worker has its own: one a worker.

    Args:
        job: with data that is the workers' own, and the round of the task open.
        task: of kind train.
        workers: that serve the job now: a round that draws some of them numbers them among all.
    """
    if isinstance(job.inner, buffering.Buffering):
        return max(job.inner.shards) + 1
    if is_late(job, task):
        drawn, numbers = None, job.past[task.round].shards
    else:
        drawn, numbers = _training(job).drawn_from, _training(job).shards
    there = workers if job.spec.data.fraction < 1 else drawn or 1
    return max(max(numbers) + 1, there)


def is_open(job: Job, task: Task) -> bool:
    """Whether a result for this task could still count."""
    if job.over:
        return False
    match task.kind, job.inner:
        case "init", Initialising():
            return True
        case "train", Training(round=task.round) as phase:
            return task.shard in phase.shards and task.shard not in phase.accepted
        case "train", buffering.Buffering() as phase:
            return buffering.is_open(phase, task.round, task.shard, job.spec)
        case "evaluate", _:
            return task.round in job.evaluations and task.shard in job.evaluations[task.round].open_parts
        case _:
            return is_late(job, task)


def outstanding(job: Job) -> list[tuple[Task, int, str, str]]:
    """(task, attempt, worker, claim key) of every attempt that is out; a restarted coordinator leaves them there."""
    tasks: list[Task] = []
    if not job.over:
        match job.inner:
            case Initialising():
                tasks.append(Task("init", 0))
            case Training() as phase:
                tasks += [Task("train", phase.round, shard) for shard in phase.tries]
            case buffering.Buffering(turns=turns):
                tasks += [Task("train", turn.round, shard) for shard, turn in turns.items()]
        tasks += [Task("evaluate", index, part) for index, one in job.evaluations.items() for part in one.tries]
        tasks += [Task("train", index, shard) for index, past in job.past.items() for shard in past.tries]
    found = [(task, tries_of(job, task)) for task in tasks]
    out = [(task, tries) for task, tries in found if tries.out and is_open(job, task)]
    return [(task, tries.attempt, tries.workers[-1], tries.claim_key) for task, tries in out]


# ---------------------------------------------------------------- results


def encoding_for(size: int, bytes_per_s: float | None) -> str:
    """What `update = "auto"` comes to: the least coarse encoding with which an update takes no longer than QUICK_S.

    Never topk: what it leaves out is a choice to be made by a person.

    Args:
        size: bytes of the model.
        bytes_per_s: of the slowest link that was measured; None: none was.
    """
    if bytes_per_s is None:
        return "fp32"
    fitting = (name for name, share in ENCODINGS.items() if size * share <= QUICK_S * bytes_per_s)
    return next(fitting, "int4")


def with_update(spec: JobSpec, update: str) -> JobSpec:
    """The job with its choice of encoding made."""
    return spec.model_copy(update={"aggregation": spec.aggregation.model_copy(update={"update": update})})


def take_init(job: Job, made: Initialised, places: Sequence[Place], now: float, sampled: Sampled | None = None) -> Step:
    """The model was built. Opens the first round."""
    _refuse_if_over(job)
    if not isinstance(job.inner, Initialising):
        raise SupersededError("the model of this job was built by another attempt")
    _refuse_if_never_given(job, Task("init", 0), made.attempt, made.worker)
    check_bounds(job.spec, made.facts)
    begun = evolve(job, made, now)
    if job.spec.evaluation.patience is not None and not evaluates(begun, job.rounds):
        reason = "evaluation.patience counts evaluations, and there are none: dataset(config, 'test') has no samples"
        return Step((made, _changed("failed", reason)), reason)
    opened = _open(begun, 1, places, sampled=sampled)
    given = f", which begins with {begins.words(job.begins_with)}" if job.begins_with else ""
    return Step((made, opened), f"model of {made.facts.parameters:,} parameters built{given}")


def _open(
    job: Job,
    round_index: int,
    places: Sequence[Place],
    before: Sequence[Shard] = (),
    sampled: Sampled | None = None,
) -> Opened:
    assert job.facts is not None  # noqa: S101 - Initialised came before
    assert job.model is not None  # noqa: S101 - as before
    if job.spec.round.mode == "async":
        phase = job.inner if isinstance(job.inner, buffering.Buffering) else None
        return buffering.open_version(job.spec, job.facts, job.model.digest, round_index, places, phase)
    return open_round(job.spec, job.facts, job.model.digest, round_index, places, before, sampled)


def open_anew(job: Job, places: Sequence[Place], why: str) -> Step:
    """Begin the open round once more, for the workers that are there now: its secure sum cannot come about."""
    phase = job.inner.before if isinstance(job.inner, Aggregating) else _training(job)
    opened = _open(job, phase.round, places, tuple(phase.shards.values()))
    fact = OpenedAnew(
        round=phase.round, seal=phase.seal + 1, shards=opened.shards, reason=why, evaluators=opened.evaluators
    )
    return Step((fact,), why)


def judge(job: Job, task: Task, submission: Submission, worker: str) -> Accepted | None:
    """Whether a submitted result may still count, before anybody looks at its bytes.

    Returns:
        None: it may. The update as it was accepted before: it is a repeat, and its sender gets the same answer again.

    Raises:
        JobOverError, SupersededError, LateError: it can count no more.
        NotFoundError: this attempt was never given to this worker.
        BadUpdateError: it claims more samples than the shard has; or, where they weigh, steps that cannot have been.
    """
    if task.kind == "train":
        standing = _standing(job, task)
        if standing is not None:
            if standing.attempt == submission.attempt and standing.digest == submission.digest:
                return standing
            raise SupersededError(f"{task}: attempt {standing.attempt} by {standing.worker_name} counts")
    _refuse_if_over(job)
    if not is_open(job, task):
        raise LateError(f"{task} takes no more results: {why_closed(job, task)}")
    _refuse_if_never_given(job, task, submission.attempt, worker)
    if task.kind == "train":
        _check_samples(job, task, submission.samples)
        if job.spec.aggregation.algorithm == "fednova":
            nova.check_steps(job.spec.train, submission.samples, submission.steps)
    return None


def why_closed(job: Job, task: Task) -> str:
    """Why no result of this task can count any more, in words."""
    if task.kind == "train" and isinstance(job.inner, buffering.Buffering):
        return buffering.why_closed(job.inner, task.round, task.shard, job.spec)
    return job.reason


def lost(update: Accepted) -> Step:
    """The bytes of an accepted update are gone, by a power cut: its worker is asked for its copy."""
    reason = f"{_of(update)} is not whole on the disk; {update.worker_name} is asked for its copy"
    fact = Lost(
        round=update.round,
        shard=update.shard,
        attempt=update.attempt,
        worker=update.worker,
        worker_name=update.worker_name,
        digest=update.digest,
        reason=reason,
    )
    return Step((fact,), reason)


def restored(update: Accepted) -> Step:
    """The bytes of a lost update are here again."""
    fact = Restored(
        round=update.round,
        shard=update.shard,
        attempt=update.attempt,
        worker=update.worker,
        worker_name=update.worker_name,
        digest=update.digest,
    )
    return Step((fact,), f"{_of(update)} is whole again")


def _of(update: Accepted) -> str:
    return f"the update of round {update.round}, shard {update.shard}"


def accepted_of(job: Job) -> tuple[Accepted, ...]:
    """The updates that count in the round that is open or being averaged."""
    match job.inner:
        case Training(accepted=accepted):
            return tuple(accepted.values())
        case Aggregating(accepted=frozen) | buffering.Buffering(accepted=frozen):
            return frozen
        case _:
            return ()


def stands_on(job: Job, task: Task, attempt: int, digest: str | None) -> bool:
    """Whether the round that is open or being averaged has this very update, or one to come will have it."""
    updates: Iterable[Accepted] = accepted_of(job)
    if isinstance(job.inner, Training):  # asked once for each worker that polls: no look at all the others' updates
        own = job.inner.accepted.get(task.shard)
        updates = (own,) if own is not None else ()
    wanted = (task.round, task.shard, attempt, digest)
    return any((u.round, u.shard, u.attempt, u.digest) == wanted for u in (*updates, *waiting_late(job)))


def frozen_of(job: Job) -> "Aggregating | Batch | None":
    """What is being averaged."""
    match job.inner:
        case Aggregating() as frozen:
            return frozen
        case buffering.Buffering(frozen=batch):
            return batch
        case _:
            return None


def base_of(job: Job, task: Task) -> ModelRef | None:
    """The model that an update of this task has the names and shapes of, and was trained from where that is known."""
    bases = job.inner.bases if isinstance(job.inner, buffering.Buffering) else {}
    return bases.get(task.round, job.model)


def bases_of(job: Job) -> frozenset[str]:
    """Digests of the models that the work of this job stands on, and what is being averaged."""
    match job.inner:
        case Queued() | Initialising() if job.begins_with is not None:
            return frozenset({job.begins_with.digest})
        case Training(base=base) | Aggregating(base=base):
            return frozenset({base.digest})
        case buffering.Buffering(bases=bases):
            return frozenset(base.digest for base in bases.values())
        case _:
            return frozenset()


def lost_of(job: Job) -> tuple[Accepted, ...]:
    """The updates that count and whose bytes are not here."""
    match job.inner:
        case Training(lost=shards) | Aggregating(before=Training(lost=shards)) if shards:
            return tuple(update for update in accepted_of(job) if update.shard in shards)
        case buffering.Buffering(lost=lost):
            return tuple(update for update in accepted_of(job) if (update.round, update.shard) in lost)
        case _:
            return ()


def waiting_late(job: Job) -> tuple[Accepted, ...]:
    """The updates of earlier rounds that wait for a round, or are being averaged in one."""
    frozen = job.inner.late if isinstance(job.inner, Aggregating) else ()
    return (*frozen, *job.late.values())


def take_update(job: Job, update: Accepted) -> Step:
    """Let an update count whose bytes have been looked at. At most one counts a shard."""
    task = Task("train", update.round, update.shard)
    if not is_open(job, task):  # it was, before the bytes were looked at
        raise LateError(f"{task} takes no more results: {job.reason}")
    if is_late(job, task):
        return Step((update,), f"{task} came late: it joins the next round that is averaged, and weighs less")
    if isinstance(job.inner, buffering.Buffering):
        return Step((update,), buffering.received(job.inner, len(job.inner.buffer) + 1))
    phase = _training(job)
    return Step((update,), f"round {update.round}: {len(phase.accepted) + 1} of {len(phase.shards)} updates are in")


def late(task: Task, attempt: int, worker: str) -> Step:
    """Keep a record of a result that came too late."""
    fact = Late(round=task.round, shard=task.shard, attempt=attempt, worker=worker)
    return Step((fact,), f"{task} came too late from {worker}")


def close_if_due(job: Job, live: Iterable[str], now: float, dues: Mapping[int, Due] = MappingProxyType({})) -> Step:
    """Freeze the round's updates when all are in, or the quorum is and the stragglers' grace is over.

    With a number as deadline, a round below its quorum is extended once, then the job fails and names what is missing.
    A learned one (`auto`) ends nothing: it gives stragglers that are expected soon more grace. A shard that only a
    worker which is gone could train is not waited for, once anything else is in.

    Args:
        job: the job.
        live: ids of the live workers; looked through only where shards are bound to workers.
        now: monotonic seconds.
        dues: shard -> who has it, and when its update is expected.
    """
    phase = job.inner
    if isinstance(phase, buffering.Buffering):
        frozen, reason = buffering.freeze_if_due(phase, set(live) - job.excluded.keys(), job.spec, dues)
        return Step((frozen,) if frozen else (), reason)
    if not isinstance(phase, Training):
        return Step(reason=job.reason)
    missing = [number for number in phase.shards if number not in phase.accepted]  # numbers alone: see `_open_shard`
    if job.excluded:
        missing = [number for number in missing if phase.shards[number].worker not in job.excluded]
    enough = len(phase.accepted) >= job.spec.aggregation.needs
    awaited = missing
    if enough and job.spec.data.partition == "local":
        may_come = {None, *live}
        awaited = [number for number in missing if phase.shards[number].worker in may_come]
    held, total, waited = len(phase.accepted), len(phase.accepted) + len(awaited), now - phase.opened_at
    quorum = quorum_of(job.spec, total)
    tally = f"{held} of {total} updates after {waited:.1f} s"
    if phase.lost:
        return Step(reason=_awaits_lost(job, phase.round))
    if not phase.shards and phase.drawn_from:
        reason = f"round {phase.round}: none of {phase.drawn_from} was sampled: its update is noise alone"
        return _freeze(job, phase, reason, ())
    if not phase.shards:
        return Step(reason=f"round {phase.round}: no live worker offers data for it")
    if not awaited and held < job.spec.aggregation.needs:
        return fail(
            job, f"round {phase.round} cannot have more than {held} updates, and {job.spec.aggregation.needs_words}"
        )
    if not awaited:
        return _freeze(job, phase, f"round {phase.round} closed: {tally}", _absent(phase, dues, now))
    look_again: list[float] = []
    deadline = job.spec.round.deadline
    if held >= quorum:
        until = _grace_ends(phase, awaited, dues if deadline == "auto" else {}, now)
        if now >= until:
            reason = f"round {phase.round} closed by quorum {quorum}: {tally}"
            return _freeze(job, phase, reason, _absent(phase, dues, now))
        look_again.append(until)
    elif isinstance(deadline, float) and not isinstance(job.phase, Paused):
        until = phase.opened_at + deadline * (2 if phase.extended else 1)
        if now >= until:
            return _deadline(job, phase, awaited, quorum, tally)
        look_again.append(until)
    shown = [f"{number} ({dues[number].words(now)})" if number in dues else str(number) for number in awaited[:8]]
    numbers = ", ".join(shown) + (" …" if len(awaited) > 8 else "")
    reason = f"round {phase.round}: {tally}, quorum {quorum}; awaiting shard {numbers}"
    return Step(reason=reason, look_again_at=min(look_again, default=None))


def _grace_ends(phase: Training, awaited: Sequence[int], dues: Mapping[int, Due], now: float) -> float:
    """Until when a round that has its quorum waits for stragglers: for those that are due soon, until they are."""
    reached = phase.quorum_at if phase.quorum_at is not None else now
    took = reached - phase.opened_at
    expected = (dues[number].at for number in awaited if number in dues)
    soon = [at for at in expected if at is not None and at <= reached + PATIENCE * took]
    return max(reached + GRACE * took, *soon, -math.inf)


def _absent(phase: Training, dues: Mapping[int, Due], now: float) -> tuple[Absent, ...]:
    """Who is not in a round that closes at this moment, and why."""
    found = [
        dues[number].absent(number, now)
        if number in dues
        else Absent(worker=s.worker, shard=number, why=_nobody(phase, s))
        for number, s in sorted(phase.shards.items())
        if number not in phase.accepted
    ]
    return (*found, *phase.evaluators)


def _nobody(phase: Training, shard: Shard) -> str:
    if shard.worker is not None:
        return "the worker whose data it is was gone"
    given = len(phase.tries.get(shard.shard, UNTRIED).workers)
    times = (
        "" if not given else " at the end; given out once" if given == 1 else f" at the end; given out {given} times"
    )
    return f"nobody had it{times}"


def _awaits_lost(job: Job, round_index: int) -> str:
    who = "; ".join(f"shard {update.shard} from {update.worker_name}" for update in lost_of(job)[:8])
    return f"round {round_index}: updates that a power cut took are awaited again: {who}"


def _freeze(job: Job, phase: Training, reason: str, absent: tuple[Absent, ...]) -> Step:
    """Decide the set that is averaged: what is in, but for what the guard refuses."""
    rule = job.spec.aggregation
    counted = {(u.round, u.shard): u for u in (*phase.accepted.values(), *job.late.values())}
    found = outliers.guard(tuple(phase.accepted.values()), job.late.values(), rule.norm_outlier, rule.needs)
    refused = [(counted[place], why) for place, why in sorted(found.refused.items())]
    shards = tuple(s for s in sorted(phase.accepted) if (phase.round, s) not in found.refused)
    late = members((u for place, u in job.late.items() if place not in found.refused), phase.round)
    absent = (*(outliers.absent(update, phase.round, why) for update, why in refused), *absent)
    reason += "".join(f"; shard {update.shard} of {update.worker_name} refused" for update, _ in refused) + found.spared
    frozen = Frozen(round=phase.round, shards=shards, reason=reason, absent=absent, late=late)
    return Step((*(outliers.back(update, why) for update, why in refused), frozen), reason)


def freeze(job: Job, shards: Sequence[int], reason: str, dues: Mapping[int, Due], now: float) -> Step:
    """Freeze the round with the updates of these shards alone: those that a secure sum is made of."""
    phase = _training(job)
    counted = replace(phase, accepted={shard: phase.accepted[shard] for shard in shards})
    absent = _absent(counted, dues, now)
    return Step((Frozen(round=phase.round, shards=tuple(sorted(shards)), reason=reason, absent=absent),), reason)


def begun_by(phase: Training) -> frozenset[str]:
    """The workers that were given a shard since the round was begun, or begun anew."""
    begun = set[str]()
    for tries in phase.tries.values():
        since = len(tries.workers) - (tries.workers[::-1].index("") if "" in tries.workers else len(tries.workers))
        begun.update(tries.workers[since:])
    return frozenset(begun)


def without_shards(job: Job) -> Job:
    """The job as a worker sees it that gets no shard of the open round, and may evaluate."""
    return _with_inner(job, replace(_training(job), shards={}))


def _deadline(job: Job, phase: Training, awaited: Sequence[int], quorum: int, tally: str) -> Step:
    names = ", ".join(f"shard {number}" for number in awaited)
    if not phase.extended:
        reason = f"round {phase.round} reached its deadline with {tally}, quorum {quorum}; it gets its time once more"
        return Step((Extended(round=phase.round, reason=reason),), reason)
    return fail(job, f"round {phase.round} missed its quorum of {quorum} twice: {tally}; missing: {names}")


def quorum_of(spec: JobSpec, total: int) -> int:
    """Updates that close a round of `total` shards; never fewer than its robust rule needs."""
    match spec.round.quorum:
        case "all":
            return max(total, spec.aggregation.needs)
        case int(count):
            return max(min(count, total), spec.aggregation.needs)
        case share:
            return max(math.ceil(share * total), spec.aggregation.needs)


def close(
    job: Job,
    model: ModelRef,
    *,
    step: StepRef | None = None,
    memory: tuple[str, ...] = (),
    amplified: float | None = None,
    slots: tuple[Slot, ...] = (),
    slot_total: tuple[str, ...] = (),
    fresh: int = 0,
    seconds: float,
    places: Sequence[Place],
    now: float,
    privacy: PrivacySpent | None = None,
    sampled: Sampled | None = None,
) -> Step:
    """The frozen round was averaged, and what that gave is durable. Opens the next round, or ends the job."""
    phase = frozen_of(job)
    if phase is None:
        raise ConflictError(f"round {job.closed} of {job.id} is not being averaged: the job is {job.phase.state}")
    updates = phase.accepted
    closed = RoundClosed(
        round=phase.round,
        seconds=round(seconds, 6),
        workers=len({u.worker for u in updates}),
        shards=len(updates),
        left_out=phase.left_out,
        absent=phase.absent,
        late=tuple(one for one in phase.members if one.staleness),
        samples=sum(u.samples for u in updates),
        bytes_down=sum(u.bytes_down for u in updates),
        bytes_up=sum(u.bytes_up for u in updates),
        digest=model.digest,
        size=model.size,
        metrics=means(u.metrics for u in updates),
        step=step,
        memory=memory,
        amplification=amplified,
        warning=_warning(job, phase, amplified),
        measured_by=_measured_by(job, phase.round, places),
        privacy=privacy,
        slots=slots,
        slot_total=slot_total,
        fresh=fresh,
    )
    after = evolve(job, closed, now)
    facts: tuple[Fact, ...] = (closed, *_measured_by_nobody(after, phase.round))
    if phase.round < job.rounds:
        before = tuple(phase.before.shards.values()) if isinstance(phase, Aggregating) else ()
        opened = _open(after, phase.round + 1, places, before, sampled)
        if closed.warning:
            opened = opened.model_copy(update={"reason": f"{opened.reason}; in round {phase.round} {closed.warning}"})
        return Step((*facts, opened), opened.reason)
    reason = _done(job)
    if after.evaluations:
        reason += "; the last evaluation is awaited"
        return Step((*facts, _changed("evaluating", reason)), reason)
    return Step((*facts, _changed("finished", reason)), reason)


def _measured_by(job: Job, round_index: int, places: Sequence[Place]) -> tuple[str, ...]:
    """Who is to measure the round's model on its own data, where the job wants that."""
    if job.spec.evaluation.scope != "workers" or not evaluates(job, round_index):
        return ()
    return tuple(sorted(place.worker for place in places if place.here))


def _measured_by_nobody(after: Job, round_index: int) -> tuple[Fact, ...]:
    """That the model of a round which has closed is not measured, though it was to be."""
    if not evaluates(after, round_index) or round_index in after.evaluations:
        return ()
    reason = f"no worker was there to measure the model of round {round_index} on its own data"
    return (EvaluationGivenUp(round=round_index, reason=reason),)


def _warning(job: Job, phase: Aggregating | Batch, amplified: float | None) -> str:
    """What about a round that closes needs a person."""
    grows = amplification.growth(amplification.keep(job.amplified, amplified))
    first = phase.round == 1 and job.spec.train.local_steps is None  # else it was said when the job began
    few = too_few_steps(job.spec, max(update.steps for update in phase.accepted)) if first and phase.accepted else ""
    return "; ".join(filter(None, [grows, few]))


def _done(job: Job) -> str:
    """How a job comes to its end by itself, in words."""
    if job.rounds == job.spec.rounds:
        return f"{job.rounds} rounds done"
    budget = f"the privacy budget of ε {job.spec.privacy.budget:g}"
    return f"{job.rounds} of {job.spec.rounds} rounds done: one more would pass {budget}"


def way_to(round_index: int, size: int, steps: Mapping[int, StepRef]) -> tuple[StepRef, ...]:
    """The steps that lead to a round's model, oldest first, as long as all of them together are less than the model.

    Args:
        round_index: whose model it is.
        size: bytes of that model.
        steps: round -> the step that leads to its model.
    """
    way, left = list[StepRef](), size
    while len(way) < LONGEST_WAY and (step := steps.get(round_index - len(way))) is not None and step.size < left:
        way.append(step)
        left -= step.size
    return tuple(reversed(way))


def take_evaluation(
    job: Job, round_index: int, submission: Submission, worker: str, *, part: int = 0, worker_name: str = ""
) -> Step:
    """A model was measured, or a part of that. May end the job: the target is reached, its patience over, or its work.

    Args:
        job: the job.
        round_index: whose model it is.
        submission: with the metrics.
        worker: who measured.
        part: which of the evaluation's.
        worker_name: for people.
    """
    if job.evaluations[round_index].workers:
        measured = Measured(
            round=round_index,
            shard=part,
            attempt=submission.attempt,
            worker=worker,
            worker_name=worker_name or worker,
            metrics=submission.metrics,
            samples=submission.samples,
            seconds=submission.seconds,
            why=why_nothing(submission.samples, submission.metrics),
        )
        return _take_part(job, measured)
    metrics = means([submission.metrics])
    fact = Evaluated(
        round=round_index,
        attempt=submission.attempt,
        worker=worker,
        metrics=metrics,
        samples=max((int(count) for _, count in submission.metrics.values()), default=0),
        seconds=submission.seconds,
        best=_is_best(job, metrics),
        stale=stale_after(job.spec, job.stale, job.reference, metrics.get(job.spec.target_metric)),
    )
    return _evaluated(job, fact)


def _take_part(job: Job, part: Measured) -> Step:
    """One worker's part of an evaluation is done; the last of them makes it whole."""
    evaluation, index = job.evaluations[part.round], part.round
    parts = [*evaluation.measured.values(), part]
    if len(parts) < len(evaluation.workers):
        return Step((part,), f"evaluation of round {index}: {len(parts)} of {len(evaluation.workers)} workers are done")
    parts.sort(key=lambda one: one.shard)
    metrics = means(one.metrics for one in parts)
    if not metrics:
        whys = "; ".join(f"{one.worker_name}: {one.why or NO_NUMBER}" for one in parts[:8])
        reason = f"evaluation of round {index} given up, since no worker has numbers: {whys}"
        up = EvaluationGivenUp(round=index, reason=reason)
        return Step((part, up, *_finish_if_last(job, index, reason)), reason)
    fact = Evaluated(
        round=index,
        attempt=part.attempt,
        worker=part.worker,
        metrics=metrics,
        samples=sum(one.samples for one in parts),
        seconds=max(one.seconds for one in parts),
        best=_is_best(job, metrics),
        stale=stale_after(job.spec, job.stale, job.reference, metrics.get(job.spec.target_metric)),
        workers=by_worker(parts),
    )
    step = _evaluated(job, fact)
    return replace(step, facts=(part, *step.facts))


def give_up_absent(job: Job, live: Iterable[str], held: Held, now: float) -> Step:
    """Wait for no worker's part of an evaluation that is gone, excluded, or takes no work. Nobody else has its data."""
    there, facts, reason = set(live), list[Fact](), job.reason
    for index in sorted(job.evaluations):
        evaluation = job.evaluations[index]
        holding = held.shards("evaluate", index)
        attempts = {part: tries.attempt for part, tries in evaluation.tries.items()}
        for part in absent(index, evaluation, there, job.excluded, holding, attempts):
            step = _take_part(job, part)
            facts, reason = [*facts, *step.facts], step.reason
            for fact in step.facts:
                job = evolve(job, fact, now)
            if job.over:
                return Step(tuple(facts), reason)
    return Step(tuple(facts), reason)


def _is_best(job: Job, metrics: Mapping[str, float]) -> bool:
    value = metrics.get(job.spec.target_metric)
    return value is not None and is_better(job.spec.target_metric, value, job.best_value)


def _evaluated(job: Job, fact: Evaluated) -> Step:
    """A whole evaluation, and whether it ends the job."""
    metric, round_index = job.spec.target_metric, fact.round
    value = fact.metrics.get(metric)
    shown = ", ".join(f"{name} {number:.4f}" for name, number in fact.metrics.items() if "/" not in name)
    target = job.spec.target
    if target is not None and value is not None and (value == target or is_better(metric, value, target)):
        reason = f"{metric} {value:.4f} reached the target {target} at round {round_index}"
        return Step((fact, _changed("finished", reason)), reason)
    best = round_index if fact.best else job.best_round
    if reason := why_stop(job.spec, round_index, fact.stale, job.reference, best, fact.metrics):
        return Step((fact, _changed("finished", reason)), reason)
    reason = f"{_done(job)}; {shown} at round {round_index}"
    return Step((fact, *_finish_if_last(job, round_index, reason)), f"round {round_index}: {shown}")


def _finish_if_last(job: Job, round_index: int, reason: str) -> tuple[Fact, ...]:
    last = isinstance(job.inner, Evaluating) and set(job.evaluations) <= {round_index}
    return (_changed("finished", reason),) if last else ()


def evaluates(job: Job, round_index: int) -> bool:
    """Whether the model of this round is measured."""
    every = job.spec.round.evaluate_every
    by_workers = job.spec.evaluation.scope == "workers"  # of whose data nobody else knows
    measurable = job.facts is not None and (job.facts.test_samples > 0 or by_workers)
    return measurable and (round_index == job.rounds or (every > 0 and round_index % every == 0))


def means(metrics: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Means of (sum, count) pairs over all parts, by name; a name whose count is zero says nothing and is left out."""
    total: dict[str, list[tuple[float, float]]] = {}
    for part in metrics:
        for name, pair in part.items():
            total.setdefault(name, []).append(pair)
    sums = {name: (math.fsum(s for s, _ in pairs), math.fsum(c for _, c in pairs)) for name, pairs in total.items()}
    return {name: value / count for name, (value, count) in sums.items() if count > 0}


# ---------------------------------------------------------------- facts into state


def new_job(job_id: str, fact: Submitted) -> Job:
    """A job, from its first fact."""
    job = Job(job_id, fact.spec, fact.task_digest, Queued(), "in the queue")
    given = replace(job, signatures=fact.signatures, begins_with=fact.begins_with)
    return replace(given, affordable=fact.affordable, planned_epsilon=fact.planned_epsilon)


def evolve(job: Job, fact: Fact, now: float) -> Job:
    """The job after one more fact. Knows no rule about what should happen: the fact has been decided."""
    match fact:
        case StateChanged():
            return _evolve_state(job, fact, now)
        case HandedOut():
            tries = tries_of(job, Task(fact.kind, fact.round, fact.shard))
            given = replace(tries, workers=(*tries.workers, fact.worker), out=True, claim_key=fact.claim_key)
            return _with_tries(job, Task(fact.kind, fact.round, fact.shard), given)
        case HandedBack():
            return _evolve_back(job, fact)
        case Initialised():
            model = ModelRef(digest=fact.digest, size=fact.size)
            spec = job.spec if fact.update is None else with_update(job.spec, fact.update)
            return replace(job, spec=spec, facts=fact.facts, model=model, reason="the model was built")
        case Opened():
            return _evolve_opened(job, fact, now)
        case OpenedAnew():
            return _evolve_anew(job, fact, now)
        case Accepted():
            return _evolve_accepted(job, fact, now)
        case Lost():
            if isinstance(job.inner, buffering.Buffering):
                lost = job.inner.lost | {(fact.round, fact.shard)}
                return _with_inner(replace(job, reason=fact.reason), replace(job.inner, lost=lost))
            return _evolve_lost(replace(job, reason=fact.reason), fact.round, lambda shards: shards | {fact.shard})
        case Restored():
            if isinstance(job.inner, buffering.Buffering):
                return _with_inner(job, replace(job.inner, lost=job.inner.lost - {(fact.round, fact.shard)}))
            return _evolve_lost(job, fact.round, lambda shards: shards - {fact.shard})
        case Extended():
            return _with_inner(replace(job, reason=fact.reason), replace(_training(job), extended=True))
        case Frozen():
            return _evolve_frozen(job, fact)
        case RoundClosed():
            return _evolve_closed(job, fact)
        case Measured():
            return _evolve_measured(job, fact)
        case Evaluated():
            return _evolve_evaluated(job, fact)
        case EvaluationGivenUp():
            return replace(job, evaluations=_without(job.evaluations, fact.round), reason=fact.reason)
        case Late():
            return _evolve_dropped(job, fact)
        case Submitted():
            return job
        case _:
            assert_never(fact)


def _evolve_state(job: Job, fact: StateChanged, now: float) -> Job:
    phase: Phase
    match fact.state:
        case "paused" if not job.over:
            assert not isinstance(job.inner, Over)  # noqa: S101 - it is not over
            phase = Paused(job.inner, fact.room)
        case "finished":
            phase = Finished()
        case "failed":
            phase = Failed()
        case "cancelled":
            phase = Cancelled()
        case "initialising" if isinstance(job.phase, Queued):
            phase = Initialising()
        case "evaluating" if isinstance(job.inner, Aggregating | Training | buffering.Buffering):
            return _with_inner(replace(job, reason=fact.reason), Evaluating())
        case _ if isinstance(job.phase, Paused):  # resumed: the state named is the one before
            phase = _resumed(job.phase.before, now)
        case _:
            raise ConflictError(f"{job.id} is {job.phase.state} and cannot become {fact.state}")
    over = isinstance(phase, Over)
    job = replace(job, phase=phase, reason=fact.reason)
    return replace(job, evaluations={}, past={}, late={}) if over else job


def _resumed(phase: Active, now: float) -> Active:
    """The phase after a pause: the round's time starts again, since nobody was given work meanwhile."""
    if isinstance(phase, buffering.Buffering):
        return replace(phase, opened_at=now)
    if not isinstance(phase, Training):
        return phase
    return replace(phase, opened_at=now, quorum_at=None if phase.quorum_at is None else now)


def _evolve_back(job: Job, fact: HandedBack) -> Job:
    task = Task(fact.kind, fact.round, fact.shard)
    own_part = fact.kind == "evaluate" and job.spec.evaluation.scope == "workers"  # without test data, it may train
    if fact.excludes or (fact.code in NOT_FOR_THIS_WORKER and not own_part):
        job = replace(job, excluded={**job.excluded, fact.worker: fact.sentence})
    if fact.code == "bad_task":
        job = replace(job, unusable=job.unusable | {fact.worker})
    if fact.code == "lost" and isinstance(job.inner, buffering.Buffering):
        return _with_inner(job, buffering.without(job.inner, fact.round, fact.shard))
    phase = job.inner.before if isinstance(job.inner, Aggregating) else job.inner
    if fact.code == outliers.CODE:
        return _evolve_refused(job, fact)
    if fact.code == "lost" and isinstance(phase, Training) and phase.round == fact.round:
        accepted, shards = _without(phase.accepted, fact.shard), phase.lost - {fact.shard}
        job = replace(job, late={(update.round, update.shard): update for update in waiting_late(job)})
        return _with_inner(job, replace(phase, accepted=accepted, lost=shards, quorum_at=None))
    if not is_open(job, task):
        return job
    return _with_tries(job, task, _counted(tries_of(job, task), fact))


def _evolve_refused(job: Job, fact: HandedBack) -> Job:
    """An accepted update stops counting, in time or late; its round is frozen without it in the same breath."""
    phase = _training(job)
    if fact.round != phase.round:
        return replace(job, late={place: one for place, one in job.late.items() if place != (fact.round, fact.shard)})
    return _with_inner(job, replace(phase, accepted=_without(phase.accepted, fact.shard)))


def _evolve_lost(job: Job, round_index: int, change: Callable[[frozenset[int]], frozenset[int]]) -> Job:
    match job.inner:
        case Training(round=r) as phase if r == round_index:
            return _with_inner(job, replace(phase, lost=change(phase.lost)))
        case Aggregating(round=r) as frozen if r == round_index:
            before = replace(frozen.before, lost=change(frozen.before.lost))
            return _with_inner(job, replace(frozen, before=before))
        case _:
            raise ConflictError(f"{job.id} is {job.inner.state}: no update of round {round_index} can be lost or found")


def _evolve_opened(job: Job, fact: Opened, now: float) -> Job:
    assert job.model is not None  # noqa: S101 - a round opens on a model
    if job.spec.round.mode == "async":
        before = job.inner if isinstance(job.inner, buffering.Buffering) else None
        return _with_inner(replace(job, reason=fact.reason), buffering.opened(before, fact, job.model, job.spec, now))
    shards = _by_number(fact.shards)
    phase = Training(
        fact.round, job.model, shards, now, evaluators=fact.evaluators, drawn_from=fact.drawn_from, owns=_owns(shards)
    )
    if job.spec.train.drift != "none":
        job = replace(job, owners=job.owners | {shard.worker for shard in fact.shards if shard.worker is not None})
    return _with_inner(replace(job, reason=fact.reason), phase)


def _by_number(shards: Iterable[Shard]) -> dict[int, Shard]:
    """In ascending order, which whoever goes through them may count on."""
    return {shard.shard: shard for shard in sorted(shards, key=lambda shard: shard.shard)}


def _owns(shards: Mapping[int, Shard]) -> dict[str, tuple[int, ...]]:
    """Worker -> the numbers of the shards that it alone can train, or that were cut for it."""
    owns: dict[str, tuple[int, ...]] = {}
    for number, shard in shards.items():
        if (owner := shard.worker or shard.meant) is not None:
            owns[owner] = (*owns.get(owner, ()), number)
    return owns


def _evolve_anew(job: Job, fact: OpenedAnew, now: float) -> Job:
    before = job.inner.before if isinstance(job.inner, Aggregating) else _training(job)
    # One attempt that was nobody's: those that are out are not the newest any more, and come too late.
    tries = {at: replace(of, workers=(*of.workers, ""), out=False, claim_key="") for at, of in before.tries.items()}
    shards = _by_number(fact.shards)
    phase = Training(
        fact.round, before.base, shards, now, tries, evaluators=fact.evaluators, seal=fact.seal, owns=_owns(shards)
    )
    return _with_inner(replace(job, reason=fact.reason), phase)


def _evolve_accepted(job: Job, fact: Accepted, now: float) -> Job:
    if is_late(job, Task("train", fact.round, fact.shard)):
        past = job.past[fact.round]
        rest = replace(past, shards=_without(past.shards, fact.shard), tries=_without(past.tries, fact.shard))
        late = {**job.late, (fact.round, fact.shard): fact}
        return replace(job, past={**job.past, fact.round: rest}, late=late, states=_states_after(job, [fact]))
    if isinstance(job.inner, buffering.Buffering):
        if not is_open(job, Task("train", fact.round, fact.shard)):
            raise ConflictError(f"round {fact.round}, shard {fact.shard} of {job.id} is accepted twice")
        tries = replace(job.inner.turns[fact.shard].tries, out=False)
        after = buffering.accepted(job.inner, fact, tries)
        return _with_inner(replace(job, reason=buffering.received(after, len(after.buffer))), after)
    phase = _training(job)
    if fact.shard in phase.accepted:
        raise ConflictError(f"round {fact.round}, shard {fact.shard} of {job.id} is accepted twice")
    accepted = {**phase.accepted, fact.shard: fact}
    tries = phase.tries.get(fact.shard, UNTRIED)
    reached = phase.quorum_at is None and len(accepted) >= quorum_of(job.spec, len(phase.shards))
    phase = replace(
        phase,
        accepted=accepted,
        tries={**phase.tries, fact.shard: replace(tries, out=False)},
        quorum_at=now if reached else phase.quorum_at,
    )
    reason = f"round {fact.round}: {len(accepted)} of {len(phase.shards)} updates are in"
    return _with_inner(replace(job, reason=reason), phase)


def _evolve_frozen(job: Job, fact: Frozen) -> Job:
    if isinstance(job.inner, buffering.Buffering):
        return _with_inner(replace(job, reason=fact.reason), buffering.frozen(job.inner, fact))
    phase = _training(job)
    updates = tuple(phase.accepted[shard] for shard in fact.shards)
    left_out = len(phase.shards) - len(updates)
    late = tuple(job.late[one.round, one.shard] for one in fact.late)
    frozen = Aggregating(
        phase.round, phase.base, updates, left_out, phase.opened_at, phase, fact.absent, late, fact.late
    )
    return _with_inner(replace(job, reason=fact.reason, late={}), frozen)


def _evolve_dropped(job: Job, fact: Late) -> Job:
    """A late update that was to be used is not there any more; any other never counted."""
    key, phase = (fact.round, fact.shard), job.inner
    if isinstance(phase, Aggregating):
        kept = [at for at, update in enumerate(phase.late) if (update.round, update.shard) != key]
        late, named = tuple(phase.late[at] for at in kept), tuple(phase.members[at] for at in kept)
        job = _with_inner(job, replace(phase, late=late, members=named))
    return replace(job, late={other: update for other, update in job.late.items() if other != key})


def _evolve_closed(job: Job, fact: RoundClosed) -> Job:
    model = ModelRef(digest=fact.digest, size=fact.size)
    pending = job.evaluations
    if evaluates(job, fact.round) and (fact.measured_by or job.spec.evaluation.scope == "global"):
        pending = {**pending, fact.round: Evaluation(model, fact.measured_by)}
    states = _states_after(job, job.inner.accepted) if isinstance(job.inner, Aggregating) else job.states
    past = still_useful(_left_behind(job) if job.spec.round.late == "use" else {}, fact.round)
    job = replace(job, model=model, memory=fact.memory, closed=fact.round, evaluations=pending, states=states)
    if isinstance(job.inner, buffering.Buffering):
        job = _with_inner(job, buffering.closed(job.inner))
    job = replace(job, spent=fact.privacy, private_before=private_before(job))
    slots = {**job.slots, **{slot.key: slot.digest for slot in fact.slots}}
    job = replace(job, slots=slots, slot_total=fact.slot_total)
    return replace(job, past=past, amplified=amplification.keep(job.amplified, fact.amplification))


def private_before(job: Job) -> tuple[PrivateSteps, ...]:
    """Example-level privacy: what the worst-off sample has been through, with the round that closes now.

    In a round a sample is in one shard, and the shards' data have nothing to do with each other. So the round cost a
    sample at most what it cost in the worst of them; a greater rate and more steps are worse.
    """
    runs = [run for update in accepted_of(job) if (run := update.private) is not None]
    if not runs:
        return job.private_before
    rate, noise, steps = max(r.sample_rate for r in runs), min(r.noise for r in runs), max(r.steps for r in runs)
    so_far = {(before.sample_rate, before.noise): before.steps for before in job.private_before}
    so_far[rate, noise] = so_far.get((rate, noise), 0) + steps
    return tuple(PrivateSteps(sample_rate=r, noise=z, steps=n) for (r, z), n in so_far.items())


def _left_behind(job: Job) -> dict[int, Past[Tries]]:
    """The rounds of which updates may still come, the one that closes now included."""
    assert isinstance(job.inner, Aggregating)  # noqa: S101 - a round closes when it was averaged
    before = job.inner.before
    shards = {number: shard for number, shard in before.shards.items() if number not in before.accepted}
    tries = {number: tries for number, tries in before.tries.items() if number in shards}
    return {**job.past, before.round: Past(before.base, shards, tries)}


def _evolve_measured(job: Job, fact: Measured) -> Job:
    evaluation = job.evaluations[fact.round]
    changed = replace(evaluation, measured={**evaluation.measured, fact.shard: fact})
    return replace(job, evaluations={**job.evaluations, fact.round: changed})


def _evolve_evaluated(job: Job, fact: Evaluated) -> Job:
    job = replace(job, evaluations=_without(job.evaluations, fact.round), stale=fact.stale)
    if not fact.stale:
        job = replace(job, reference=fact.metrics.get(job.spec.target_metric))
    if job.metrics_round is None or fact.round > job.metrics_round:
        job = replace(job, metrics=fact.metrics, metrics_round=fact.round)
    if fact.best:
        job = replace(job, best_round=fact.round, best_value=fact.metrics[job.spec.target_metric])
    return job


def _with_tries(job: Job, task: Task, tries: Tries) -> Job:
    match task.kind, job.inner:
        case "init", Initialising():
            return _with_inner(job, Initialising(tries))
        case "train", Training(round=task.round) as phase:
            return _with_inner(job, replace(phase, tries={**phase.tries, task.shard: tries}))
        case "train", buffering.Buffering() as phase:
            return _with_inner(job, buffering.handed_out(phase, task.round, task.shard, tries))
        case "evaluate", _ if task.round in job.evaluations:
            evaluation = job.evaluations[task.round]
            changed = replace(evaluation, tries={**evaluation.tries, task.shard: tries})
            return replace(job, evaluations={**job.evaluations, task.round: changed})
        case _:
            return job


def _with_inner(job: Job, phase: Active) -> Job:
    return replace(job, phase=replace(job.phase, before=phase) if isinstance(job.phase, Paused) else phase)


def _training(job: Job) -> Training:
    if not isinstance(job.inner, Training):
        raise ConflictError(f"{job.id} is {job.inner.state}, not training")
    return job.inner


def _standing(job: Job, task: Task) -> Accepted | None:
    """The update that counts for this shard, while its round is remembered."""
    match job.inner:
        case Training(round=task.round) as phase:
            return phase.accepted.get(task.shard)
        case Aggregating(round=task.round, accepted=accepted):
            return next((update for update in accepted if update.shard == task.shard), None)
        case buffering.Buffering(accepted=accepted):
            return next((u for u in accepted if (u.round, u.shard) == (task.round, task.shard)), None)
        case _:
            found = (update for update in waiting_late(job) if (update.round, update.shard) == (task.round, task.shard))
            return next(found, None)


def _check_samples(job: Job, task: Task, samples: int) -> None:
    most = subject_of(job, task)[1].samples
    if samples < 1 or (most is not None and samples > most):
        allowed = "at least 1" if most is None else f"1 to {most}"
        raise BadUpdateError(f"{task} claims {samples} samples, where {allowed} are possible", code="bad_samples")


def _refuse_if_never_given(job: Job, task: Task, attempt: int, worker: str) -> None:
    tries = tries_of(job, task)
    if not (1 <= attempt <= tries.attempt) or tries.workers[attempt - 1] != worker:
        raise NotFoundError(
            f"attempt {attempt} at {task} was not given to this worker", code="unknown_attempt", advice="Poll for work."
        )


def _refuse_if_over(job: Job) -> None:
    if job.over:
        raise JobOverError(f"{job.id} is {job.phase.state}: {job.reason}")


def _changed(state: State, reason: str) -> Fact:
    return StateChanged(state=state, reason=reason)


def _without(mapping: Mapping[int, V], key: int) -> dict[int, V]:
    return {k: v for k, v in mapping.items() if k != key}
