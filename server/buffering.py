"""Asynchronous rounds (`[round] mode = "async"`): a version is made whenever enough updates are in, whatever their age.

Pure: no clock, network, disk or tensor; what became of the attempts at a task is the round machine's (`T`).

    open ──accepted──▶ buffer ──K are in──▶ frozen ──averaged──▶ the next version
     ▲                                                               │
     └─────── handed out on the newest version, all the while ◀──────┘

Nobody waits for anybody: whoever is done gets another shard at once, on the newest version, also while K updates are
averaged. A task is (round, shard): the update of a shard that begins with the model of the round before, as in
synchronous rounds. Its staleness is the number of versions made between that and the one that it lands in.

What keeps fast workers from drowning slow ones is counted by shard, since it is samples that must not be drowned: a
shard has one open update at a time, and counts at most once from the same version; of the free ones, the shard goes out
that has counted least. So all samples count alike, whoever trains them. Private data is one shard a worker.

Source: Nguyen et al. 2021, arXiv 2106.06639 (FedBuff), algorithm 1.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

from common.facts import Absent, Accepted, Frozen, LateMember, Opened, Shard
from common.messages import JobSpec, ModelFacts, ModelRef, State
from common.sharding import cut
from server.cutting import Place
from server.deadlines import Due
from server.lateness import factor_of

MOST_BY_DEFAULT = 10  # updates that make a version, where the job does not say: the paper's number


class Attempts(Protocol):
    """What is asked here of the attempts at a task."""

    @property
    def workers(self) -> tuple[str, ...]:
        """Who had them."""
        ...

    @property
    def out(self) -> bool:
        """Whether the newest is still with its worker."""
        ...


T = TypeVar("T", bound=Attempts)


@dataclass(frozen=True)
class Turn(Generic[T]):
    """The newest update of a shard that was handed out."""

    round: int  # it begins with the model of the round before
    shard: Shard
    tries: T
    counted: bool = False


@dataclass(frozen=True)
class Batch:
    """The updates that are being averaged into one version."""

    round: int  # the version
    base: ModelRef  # the newest version, which they are added to
    accepted: tuple[Accepted, ...]  # in the order in which they came: the order of summation
    members: tuple[LateMember, ...]  # the same, with their factors
    bases: tuple[ModelRef, ...]  # that each began with
    opened_at: float  # monotonic seconds
    absent: tuple[Absent, ...] = ()  # whose work became too old, and why
    left_out: int = 0  # of every version: none is awaited
    late: tuple[Accepted, ...] = ()  # beside them: all are in `accepted`


@dataclass(frozen=True)
class Buffering(Generic[T]):
    """Shards are trained and updates come in, while the ones before are averaged."""

    size: int  # updates that make a version
    round: int  # the version that the buffer becomes
    newest: int  # the round of tasks that are handed out now: they begin with the newest model
    bases: Mapping[int, ModelRef]  # round -> the model that its tasks begin with
    shards: Mapping[int, Shard]
    opened_at: float  # monotonic seconds
    turns: Mapping[int, Turn[T]] = field(default_factory=dict)  # shard -> its newest update
    served: Mapping[int, int] = field(default_factory=dict)  # shard -> how often it has counted
    buffer: tuple[Accepted, ...] = ()  # in the order in which they came
    frozen: Batch | None = None
    lost: frozenset[tuple[int, int]] = frozenset()  # (round, shard) of an accepted update that has no bytes here
    state: State = field(default="training", init=False)

    @property
    def accepted(self) -> tuple[Accepted, ...]:
        """Every update that counts and is in no version yet."""
        return (*(self.frozen.accepted if self.frozen else ()), *self.buffer)


# ---------------------------------------------------------------- what there is to train


def size_of(spec: JobSpec, workers: int, shards: int | None = None) -> int:
    """The updates that make a version: what the job says, else half as many as workers are there at the start.

    With one for each worker, a version would have to wait for slow ones wherever fast ones run out of shards: data of
    their own, say, counts once from a version.

    Args:
        spec: the job's.
        workers: that a round would be cut for.
        shards: that there are; more updates can never be in. None: not known yet, or not fixed.
    """
    wanted = spec.round.buffer or max(min(workers // 2, MOST_BY_DEFAULT), 1)
    return wanted if shards is None else min(wanted, shards)


def shards_for(size: int, workers: int) -> int:
    """Into how many shards `auto` cuts: while a buffer fills, nobody finds all of them counted or with others."""
    return size + workers


def open_version(
    spec: JobSpec,
    facts: ModelFacts,
    base: str,
    version: int,
    places: Collection[Place],
    before: Buffering[T] | None,
) -> Opened:
    """Decide which shards there are while the next version is made, and at the first, how many updates make one.

    A shard keeps its number as long as the job lasts. With `auto` and iid data they become more, and smaller, as
    workers join; they are alike, since a fast worker trains more of them. A worker with data of its own has one.

    Args:
        spec: the job's.
        facts: what was found out when the model was built.
        base: digest of the newest model.
        version: the one that is to be made, from 1.
        places: the workers that serve this job: live, or gone for so short a time that they are expected back.
        before: the phase so far; None: this is the first version.
    """
    data, workers, whose = spec.data, len(places), "of"
    size, known = (before.size, before.shards) if before is not None else (None, {})
    if data.partition == "local":
        size, whose = size or size_of(spec, workers), "of private data in"
        shards = _private((place.worker for place in places), known)
    elif data.partition == "iid" and data.shards == "auto":
        size = size or size_of(spec, workers, facts.train_samples)
        number = min(max(shards_for(size, workers), len(known)), facts.train_samples)
        shards = _shards(cut(facts.train_samples, [1.0] * number))
    else:
        size = size or size_of(spec, workers, len(facts.bounds) - 1)
        shards = _shards(facts.bounds)
    reason = f"version {version}: {_several(size, 'update')} to come, {whose} {_several(len(shards), 'shard')}"
    return Opened(round=version, base=base, shards=shards, reason=reason, buffer=size)


def _shards(bounds: Sequence[int]) -> tuple[Shard, ...]:
    return tuple(Shard(shard=number, start=start, stop=stop) for number, (start, stop) in enumerate(pairwise(bounds)))


def _private(owners: Iterable[str], known: Mapping[int, Shard]) -> tuple[Shard, ...]:
    """One shard a worker that ever was there: a number that was another's would be mistaken for it."""
    there = {shard.worker for shard in known.values()}
    new = (Shard(shard=len(known) + at, worker=owner) for at, owner in enumerate(sorted({*owners} - there)))
    return (*(known[number] for number in sorted(known)), *new)


def free_shards(phase: Buffering[T], worker: str, held: Collection[int], spec: JobSpec) -> list[int]:
    """The shards that this worker may train on the newest version, the one that has counted least first.

    Args:
        phase: the job's.
        worker: its id.
        held: shards that some worker holds a lease on, from whatever version.
        spec: the job's.
    """
    if phase.round > spec.rounds:
        return []  # the last version has its updates
    free = (number for number, shard in phase.shards.items() if shard.worker in (None, worker) and number not in held)
    can = [number for number in free if not _counted_from_newest(phase, number)]
    return sorted(can, key=lambda number: (phase.served.get(number, 0), number))


def _counted_from_newest(phase: Buffering[T], number: int) -> bool:
    turn = phase.turns.get(number)
    return turn is not None and turn.counted and turn.round == phase.newest


def staleness_of(phase: Buffering[T], round_index: int) -> int:
    """Versions between the model that a task begins with and the version that it would land in now."""
    return phase.round - round_index


def is_open(phase: Buffering[T], round_index: int, shard: int, spec: JobSpec) -> bool:
    """Whether an update of this task could still count."""
    turn = phase.turns.get(shard)
    if turn is None or turn.counted or turn.round != round_index or phase.round > spec.rounds:
        return False
    return staleness_of(phase, round_index) <= spec.round.max_staleness


def why_closed(phase: Buffering[T], round_index: int, shard: int, spec: JobSpec) -> str:
    """Why an update counts no more, in words."""
    stale, most = staleness_of(phase, round_index), spec.round.max_staleness
    if phase.round > spec.rounds:
        return f"the last version, {spec.rounds}, has its updates"
    if stale > most:
        return f"it is {_several(stale, 'version')} behind, and at most {most} are used (round.max_staleness)"
    turn = phase.turns.get(shard)
    if turn is not None and turn.round > round_index:
        return f"shard {shard} was handed out anew, on the model of version {turn.round - 1}"
    return f"version {phase.round} is being made"


# ---------------------------------------------------------------- when a version is made


def received(phase: Buffering[T], number: int) -> str:
    """How it stands with so many updates in the buffer."""
    return f"{number} of {_several(phase.size, 'update')} for version {phase.round}"


def freeze_if_due(
    phase: Buffering[T], live: Collection[str], spec: JobSpec, dues: Mapping[int, Due]
) -> tuple[Frozen | None, str]:
    """Decide whether what is in the buffer becomes the next version, and say how it stands.

    All that is in goes into it: more than K only where updates come faster than versions can be averaged, so that none
    waits for a version after the next. Fewer than K where nothing more can come: every shard of the live workers has
    counted from the newest version.

    Args:
        phase: the job's.
        live: ids of the live workers.
        spec: the job's.
        dues: shard -> who has it, and when its update is expected.
    """
    tally = received(phase, len(phase.buffer))
    if phase.lost:
        return None, f"{tally}; updates that a power cut took are awaited again: {_lost_words(phase)}"
    if phase.round > spec.rounds:
        return None, f"the last version, {spec.rounds}, is being averaged"
    full = len(phase.buffer) >= phase.size
    if phase.frozen is None and phase.buffer and (full or _is_exhausted(phase, live)):
        why = tally if full else f"{tally}, and nothing more can come before it"
        return _freeze(phase, spec, dues, why), why
    averaged = f"; version {phase.frozen.round} is being averaged" if phase.frozen else ""
    if not phase.shards:
        return None, f"version {phase.round}: no live worker offers data for it"
    return None, f"{tally}{averaged}{_behind_words(phase, dues)}"


def _is_exhausted(phase: Buffering[T], live: Collection[str]) -> bool:
    """Whether every shard that a live worker could have has counted from the newest version."""
    there = (n for n, shard in phase.shards.items() if shard.worker is None or shard.worker in live)
    return all(_counted_from_newest(phase, number) for number in there)


def _freeze(phase: Buffering[T], spec: JobSpec, dues: Mapping[int, Due], reason: str) -> Frozen:
    members = tuple(
        LateMember(
            round=update.round,
            shard=update.shard,
            worker=update.worker,
            worker_name=update.worker_name,
            staleness=phase.round - update.round,
            factor=factor_of(phase.round - update.round),
        )
        for update in phase.buffer
    )
    return Frozen(round=phase.round, shards=(), reason=reason, absent=_too_old(phase, spec, dues), members=members)


def _too_old(phase: Buffering[T], spec: JobSpec, dues: Mapping[int, Due]) -> tuple[Absent, ...]:
    """Whose work counts no more from this moment on: it would land in the version after this one."""
    most = spec.round.max_staleness
    gone = (
        (number, turn.tries.workers[-1])
        for number, turn in sorted(phase.turns.items())
        if turn.tries.out and not turn.counted and phase.round - turn.round == most
    )
    why = f"{_several(most + 1, 'version')} behind, and at most {most} are used"
    return tuple(
        Absent(worker=worker, worker_name=dues[number].name if number in dues else "", shard=number, why=why)
        for number, worker in gone
    )


def _lost_words(phase: Buffering[T]) -> str:
    lost = [update for update in phase.accepted if (update.round, update.shard) in phase.lost]
    return "; ".join(f"round {one.round}, shard {one.shard} from {one.worker_name}" for one in lost[:8])


def _behind_words(phase: Buffering[T], dues: Mapping[int, Due]) -> str:
    """Who trains on an older version than the newest, the oldest first."""
    ages = {
        due.name: phase.newest - phase.turns[number].round
        for number, due in dues.items()
        if number in phase.turns and phase.turns[number].round < phase.newest
    }
    oldest = sorted(ages.items(), key=lambda each: (-each[1], each[0]))
    return "".join(f"; {name} is {_several(age, 'version')} behind" for name, age in oldest[:8])


def _several(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# ---------------------------------------------------------------- facts into state


def opened(phase: Buffering[T] | None, fact: Opened, base: ModelRef, spec: JobSpec, now: float) -> Buffering[T]:
    """A new version is there, and work begins with it. Bases that nothing stands on any more are forgotten."""
    shards = {shard.shard: shard for shard in fact.shards}
    if phase is None:
        bases = {fact.round: base}
        return Buffering(fact.buffer or 1, fact.round, fact.round, bases, shards, opened_at=now)
    after = replace(phase, newest=fact.round, shards=shards, opened_at=now, bases={**phase.bases, fact.round: base})
    open_work = {turn.round for number, turn in after.turns.items() if is_open(after, turn.round, number, spec)}
    needed = {after.newest, *open_work, *(update.round for update in after.accepted)}
    return replace(after, bases={index: model for index, model in after.bases.items() if index in needed})


def handed_out(phase: Buffering[T], round_index: int, shard: int, tries: T) -> Buffering[T]:
    """What became of the attempts at a task changed. A task of a later round takes the place of an earlier one."""
    turn = phase.turns.get(shard)
    if turn is not None and turn.round == round_index:
        changed = replace(turn, tries=tries)
    else:
        changed = Turn(round_index, phase.shards[shard], tries)
    return replace(phase, turns={**phase.turns, shard: changed})


def accepted(phase: Buffering[T], update: Accepted, tries: T) -> Buffering[T]:
    """An update counts."""
    turn = replace(phase.turns[update.shard], tries=tries, counted=True)
    served = {**phase.served, update.shard: phase.served.get(update.shard, 0) + 1}
    turns = {**phase.turns, update.shard: turn}
    return replace(phase, turns=turns, served=served, buffer=(*phase.buffer, update))


def frozen(phase: Buffering[T], fact: Frozen) -> Buffering[T]:
    """The buffer, or what the fact names of it, is being averaged; a new one is open."""
    there = {(update.round, update.shard): update for update in phase.buffer}
    batch = tuple(there.pop((one.round, one.shard)) for one in fact.members)
    made = Batch(
        fact.round,
        phase.bases[phase.newest],
        batch,
        fact.members,
        tuple(phase.bases[update.round] for update in batch),
        phase.opened_at,
        fact.absent,
    )
    return replace(phase, round=fact.round + 1, buffer=tuple(there.values()), frozen=made)


def closed(phase: Buffering[T]) -> Buffering[T]:
    """What was frozen is a version now."""
    return replace(phase, frozen=None)


def without(phase: Buffering[T], round_index: int, shard: int) -> Buffering[T]:
    """An update that counted is gone for good: the version is made of the others, and its shard is free again."""
    key, turn = (round_index, shard), phase.turns[shard]
    phase = replace(phase, lost=phase.lost - {key}, served={**phase.served, shard: phase.served[shard] - 1})
    if turn.round == round_index:
        phase = replace(phase, turns={**phase.turns, shard: replace(turn, counted=False)})
    rest = tuple(update for update in phase.buffer if (update.round, update.shard) != key)
    batch = phase.frozen
    if len(rest) < len(phase.buffer) or batch is None:
        return replace(phase, buffer=rest)
    kept = [at for at, update in enumerate(batch.accepted) if (update.round, update.shard) != key]
    if not kept:  # nothing to average: the buffer becomes this version
        return replace(phase, round=batch.round, frozen=None)
    left = replace(
        batch,
        accepted=tuple(batch.accepted[at] for at in kept),
        members=tuple(batch.members[at] for at in kept),
        bases=tuple(batch.bases[at] for at in kept),
    )
    return replace(phase, frozen=left)
