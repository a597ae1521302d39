"""The secure sums under way: whom they wait for, what is asked of whom, and what is kept until the round is closed.

The shell around server.securing: it asks the fleet who is there, and journals what was decided. Keys and shares are not
facts of the job: nobody watches them, and they are deleted with the round.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from common.errors import BadJobError, SupersededError
from common.facts import OpenedAnew
from common.messages import MEMBERS, Holding, JobSpec, Unmask
from common.secure import LEAST_MEMBERS, digest_of, unavailable
from server import rounds, securing
from server.cutting import Place
from server.deadlines import Due
from server.fleet import Fleet
from server.naming import assignment_id
from server.rounds import Aggregating, Job, Paused, Step, Task, Training
from server.securing import ENTRY, Decision, Seal
from server.store import Journal

log: Final = logging.getLogger("lydian.coordinator")


def check_can_sum(spec: JobSpec) -> None:
    """Refuse a job whose sums this coordinator could not unmask.

    Raises:
        BadJobError: it lacks a package.
    """
    why = unavailable() if spec.secure.enabled else ""
    if why:
        raise BadJobError(f"this coordinator cannot take secure.enabled: {why}", advice="Install it, and start again.")


def is_secure(job: Job) -> bool:
    """Whether a round of a secure job is open, or its sum is being unmasked."""
    return job.spec.secure.enabled and isinstance(job.inner, Training | Aggregating)


def _round_of(job: Job) -> Training:
    assert isinstance(job.inner, Training | Aggregating)  # noqa: S101 - is_secure
    return job.inner.before if isinstance(job.inner, Aggregating) else job.inner


class Sums:
    """One secure sum a job."""

    def __init__(self, journal: Journal, changed: Callable[[], None]) -> None:
        """`changed` is called whenever a sum has come further."""
        self._journal, self._changed = journal, changed
        self._seals: dict[str, Seal] = {}
        self._unable: set[tuple[str, int, int]] = set()  # job, round, attempt of survivors that lost what they need

    def of(self, job: Job) -> Seal:
        """The sum of the open round, read from the journal where it is not known yet."""
        phase, known = _round_of(job), self._seals.get(job.id)
        if known is not None and (known.round, known.number) == (phase.round, phase.seal):
            return known
        seal = Seal(job.id, phase.round, phase.seal)
        for body in self._journal.sum_of(job.id, phase.round, phase.seal):
            seal = securing.evolve(seal, ENTRY.validate_json(body))
        self._seals[job.id] = seal
        return seal

    def keep(self, job: Job, decision: Decision) -> bool:
        """Journal a decision and make it the state. Whether anything changed."""
        if not decision.entries:
            return False
        seal = self.of(job)
        self._journal.sum_append(job.id, seal.round, seal.number, [e.model_dump_json() for e in decision.entries])
        for entry in decision.entries:
            seal = securing.evolve(seal, entry)
        self._seals[job.id] = seal
        log.info("%s: %s", job.id, decision.reason)
        self._changed()
        return True

    def forget(self, job_id: str) -> None:
        """The round was closed or begun anew, or the job is over: no key and no share of it is needed any more."""
        self._seals.pop(job_id, None)
        self._unable = {one for one in self._unable if one[0] != job_id}
        self._journal.sum_forget(job_id)

    # ------------------------------------------------------------ what follows

    def look(
        self,
        job: Job,
        fleet: Fleet,
        now: float,
        *,
        places: Sequence[Place],
        dues: Mapping[int, Due],
        change: bool = True,
    ) -> Step:
        """Go on with a sum as far as it goes: fix who sums together, freeze the round, or begin it anew.

        Args:
            job: one that `is_secure`.
            fleet: who is there, and who holds what.
            now: monotonic seconds.
            places: the workers that a round begun anew would be cut for.
            dues: shard -> when its update is expected.
            change: whether to; else only the reason is true.
        """
        phase = job.inner
        if isinstance(phase, Aggregating):
            decision = securing.await_reveals(self.of(job), self._able(job, fleet, now))
            return self._anew(job, decision.reason, places) if decision.anew else Step(reason=decision.reason)
        assert isinstance(phase, Training)  # noqa: S101 - is_secure
        if len(phase.shards) > MEMBERS:
            return rounds.fail(job, f"{len(phase.shards)} workers would sum securely, and at most {MEMBERS} can")
        if phase.lost:
            return Step(reason=job.reason)
        decision = self._fix(job, phase, fleet, now, change=change)
        seal = self.of(job)
        lost = seal.survivors is not None and not set(seal.survivors) <= phase.accepted.keys()
        if decision.anew or lost:
            why = f"{decision.reason}; an update of the sum was lost" if lost else decision.reason
            return self._anew(job, why, places)
        if seal.survivors is not None:
            return rounds.freeze(job, seal.survivors, decision.reason, dues, now)
        return Step(reason=decision.reason)

    def _fix(self, job: Job, phase: Training, fleet: Fleet, now: float, *, change: bool) -> Decision:
        """Decide what can be decided now, and journal it."""
        while True:
            seal, awaited = self.of(job), awaited_of(job, phase, fleet, now)
            decision = securing.advance(seal, awaited, job.spec.secure.threshold)
            if seal.group is not None:
                held = securing.present(seal, awaited)
                accepted = {
                    k for k, u in phase.accepted.items() if k in seal.keys and u.attempt == seal.keys[k].attempt
                }
                decision = securing.settle_survivors(seal, accepted, held)
            if not change or not self.keep(job, decision):
                return decision

    def _anew(self, job: Job, why: str, places: Sequence[Place]) -> Step:
        """Begin the round anew, as soon as enough workers are there for it."""
        phase, here = _round_of(job), [place for place in places if place.here]
        if isinstance(job.phase, Paused) or (not self.of(job).keys and len(phase.shards) >= LEAST_MEMBERS):
            return Step(reason=why)
        step = rounds.open_anew(job, here, why)
        shards = sum(len(fact.shards) for fact in step.facts if isinstance(fact, OpenedAnew))
        if shards < LEAST_MEMBERS:
            return Step(reason=f"{why}; waiting for {LEAST_MEMBERS} workers that can train: {shards} are there")
        return step

    def _able(self, job: Job, fleet: Fleet, now: float) -> set[int]:
        """Survivors that can still open their shares."""
        able = set[int]()
        for shard, member in self.of(job).keys.items():
            worker = fleet.workers.get(member.worker)
            lacks = (job.id, self.of(job).round, member.attempt) in self._unable
            if worker is not None and fleet.is_live(worker, now) and not lacks:
                able.add(shard)
        return able

    # ------------------------------------------------------------ what workers may do

    def lets_train(self, job: Job, worker_id: str) -> bool:
        """Whether a worker may be given a shard of the open round: once, and before it is decided who sums together."""
        phase = job.inner
        if not (job.spec.secure.enabled and isinstance(phase, Training)):
            return True
        return self.of(job).roster is None and worker_id not in rounds.begun_by(phase)

    def check_update(self, job: Job, task: Task, attempt: int) -> None:
        """Refuse a result that is no part of the sum, whatever it holds.

        Raises:
            SupersededError: its attempt is not in the group.
        """
        if task.kind != "train" or not is_secure(job):
            return
        seal = self.of(job)
        if task.shard not in (seal.group or ()) or seal.keys[task.shard].attempt != attempt:
            raise SupersededError(f"{task}, attempt {attempt}, is not in the sum that is made of this round")

    def asked(self, job: Job, worker_id: str, holding: Sequence[Holding]) -> tuple[Unmask, ...]:
        """What a worker is asked to open: the shares that it has of a frozen round."""
        if not (is_secure(job) and isinstance(job.inner, Aggregating)):
            return ()
        seal = self.of(job)
        if seal.roster is None or seal.survivors is None or seal.can_be_unmasked:
            return ()
        for shard in seal.survivors:
            member = seal.keys[shard]
            if member.worker != worker_id or shard in seal.reveals:
                continue
            name = assignment_id(job.id, Task("train", seal.round, shard))
            if any((held.assignment, held.attempt) == (name, member.attempt) for held in holding):
                return (
                    Unmask(
                        assignment=name,
                        attempt=member.attempt,
                        roster=digest_of(seal.roster),
                        survivors=seal.survivors,
                        sealed=securing.sealed_for(seal, shard),
                    ),
                )
            self._unable.add((job.id, seal.round, member.attempt))
        return ()

    def is_due(self, job: Job) -> bool:
        """Whether a frozen round can be averaged: always, but for a secure sum that cannot be unmasked yet."""
        return not is_secure(job) or self.of(job).can_be_unmasked


def awaited_of(job: Job, phase: Training, fleet: Fleet, now: float) -> dict[int, int]:
    """Shard -> the attempt that is at work on it; 0 where a worker that has none in this round will come for it."""
    leases = (lease for lease in fleet.leases.values() if lease.job == job.id)
    held = {of.task.shard: of.attempt for of in leases if (of.task.kind, of.task.round) == ("train", phase.round)}
    evaluators = {one.worker for one in phase.evaluators}
    free = fleet.coming(job, now).keys() - rounds.begun_by(phase) - evaluators
    for number, shard in phase.shards.items():
        comes = bool(free) if shard.worker is None else shard.worker in free
        if number not in held and number not in phase.accepted and comes:
            held[number] = 0
    return held
