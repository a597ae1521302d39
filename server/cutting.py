"""Which shards a round has, how large they are, and for whom.

Pure. Where the cut is left to us (`shards = auto`, iid), every worker gets as many samples as it does in the time that
the others need: its share of the samples is its share of all speeds. A worker whose shard would cost more than it gives
is an evaluator, until that changes. Other cuts are made once, when the model is built, and their sizes stay; of those
with `shards = auto`, the larger shards go to the faster workers.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

from common.errors import BadUpdateError
from common.facts import Absent, Opened, Shard
from common.messages import JobSpec, ModelFacts
from common.pace import LEAST_SHARE
from common.sharding import cohort, cut
from server.outliers import FEWEST

LEAST_BATCHES = 20  # in a round; a worker with less only evaluates, where others have ten times as many
FEW = 0.1  # share of the largest shard under which LEAST_BATCHES counts
MOVED = 0.15  # a share that moved by more is reason to cut anew
RETURNS = 1.15  # how far above the least an evaluator's share must be before it trains again
TRY_AGAIN = 10  # rounds after which an evaluator trains once, to be measured


Sampled = Callable[[int, str], bool]
"""(round, member) -> whether it is in that round. A member is `shard 3`, or a worker's id."""


@dataclass(frozen=True)
class Place:
    """A worker that a round is cut for."""

    worker: str  # its id
    name: str
    here: bool = True  # False: it vanished a short while ago, and is expected back
    rate: float | None = None  # samples/s; None: not known
    trained: int = 0  # the last round that it trained in; 0: none


@dataclass(frozen=True)
class Roles:
    """Who trains how much in the next round, and who does not."""

    weights: Mapping[str, float]  # worker id -> its part of the samples, in any unit
    evaluators: Mapping[str, str]  # worker id -> why it gets no shard


def open_round(
    spec: JobSpec,
    facts: ModelFacts,
    base: str,
    round_index: int,
    places: Sequence[Place],
    before: Sequence[Shard] = (),
    sampled: Sampled | None = None,
) -> Opened:
    """Decide which shards the round has.

    `shards = auto` with iid data: one a worker that trains, so that the cut follows the fleet. Otherwise the cut was
    made at initialisation, and `fraction` of it is drawn. Private data: one shard a worker that has some.

    Args:
        spec: the job's.
        facts: what was found out when the model was built.
        base: digest of the model that the round begins with.
        round_index: the round to open, from 1.
        places: the workers that serve this job: live, or gone for so short a time that they are expected back.
        before: the shards of the round before.
        sampled: of a job with worker-level privacy: draws each member for itself, and maybe none.
    """
    data = spec.data
    if sampled is not None:
        return _sample(spec, facts, base, round_index, places, sampled)
    if data.partition == "local":
        owners = sorted(place.worker for place in places)
        chosen = cohort(len(owners), data.fraction, seed=spec.seed, round_index=round_index) if owners else ()
        own = tuple(Shard(shard=number, worker=owners[number]) for number in chosen)
        reason = f"round {round_index}: {len(own)} workers train on their own data"
        return Opened(round=round_index, base=base, shards=own, reason=reason)
    evaluators: tuple[Absent, ...] = ()
    if data.shards == "auto" and data.partition == "iid":
        known = before if data.fraction == 1 else ()  # else it is not the whole cut
        shards, evaluators = _by_speed(spec, facts.train_samples, round_index, places, known)
        if len(shards) < (least := _least(spec, places)):
            shards, evaluators = _equal(max(least, len(places)), facts.train_samples, places), ()
    else:
        shards = _as_built(spec, facts.bounds, places)
    chosen = cohort(len(shards), data.fraction, seed=spec.seed, round_index=round_index)
    drawn = tuple(shards[at] for at in chosen)
    sizes = [shard.stop - shard.start for shard in drawn]
    reason = f"round {round_index}: {len(drawn)} of {len(shards)} shards, {sum(sizes)} samples"
    if 1 < len(shards) == spec.aggregation.needs > len(places):
        reason += f", more than the {len(places)} workers: {spec.aggregation.needs_words}"
    if evaluators:
        reason += f"; {'; '.join(f'{one.worker_name} {one.why}' for one in evaluators)}"
    return Opened(round=round_index, base=base, shards=drawn, reason=reason, evaluators=evaluators)


def _sample(
    spec: JobSpec, facts: ModelFacts, base: str, round_index: int, places: Sequence[Place], sampled: Sampled
) -> Opened:
    """A round of whoever is drawn: every shard, or with private data every worker that is there, may be in it."""
    if spec.data.partition == "local":
        owners = sorted(place.worker for place in places)
        members = [(owner, Shard(shard=number, worker=owner)) for number, owner in enumerate(owners)]
    else:
        members = [(f"shard {shard.shard}", shard) for shard in _as_built(spec, facts.bounds, places)]
    drawn = tuple(shard for member, shard in members if sampled(round_index, member))
    what = "workers" if spec.data.partition == "local" else "shards"
    reason = f"round {round_index}: {len(drawn)} of {len(members)} {what}, sampled at random"
    return Opened(round=round_index, base=base, shards=drawn, reason=reason, drawn_from=len(members))


def check_bounds(spec: JobSpec, facts: ModelFacts) -> None:
    """Refuse a cut of the training set that leaves samples out, or has another number of shards than the job."""
    if spec.data.partition == "local":
        return
    bounds, shards = facts.bounds, spec.data.shards
    rising = all(low < high for low, high in pairwise(bounds))
    whole = len(bounds) >= 2 and (bounds[0], bounds[-1]) == (0, facts.train_samples)
    if not (rising and whole and shards in ("auto", len(bounds) - 1)):
        sentence = f"{facts.train_samples} samples were cut at {list(bounds[:9])}, which is no cut into {shards} shards"
        raise BadUpdateError(sentence, code="bad_samples")


def _as_built(spec: JobSpec, bounds: Sequence[int], places: Sequence[Place]) -> list[Shard]:
    """The shards of the cut that was made with the model; with `auto`, the larger ones for the faster workers.

    Where a shard leaves something on its worker, it stays with the worker that has that instead; of ids there are
    mostly more than workers, and whoever is done takes the next.
    """
    shards = [Shard(shard=k, start=start, stop=stop) for k, (start, stop) in enumerate(pairwise(bounds))]
    if spec.data.shards != "auto" or spec.train.leaves_state or spec.data.partition == "natural":
        return shards
    fastest = sorted((place for place in places if place.rate is not None and place.here), key=lambda p: -(p.rate or 0))
    largest = sorted(shards, key=lambda shard: shard.start - shard.stop)
    meant = {shard.shard: place.worker for shard, place in zip(largest, fastest, strict=False)}
    return [shard.model_copy(update={"meant": meant.get(shard.shard)}) for shard in shards]


# ---------------------------------------------------------------- cut by speed


def _by_speed(
    spec: JobSpec, total: int, round_index: int, places: Sequence[Place], before: Sequence[Shard]
) -> tuple[list[Shard], tuple[Absent, ...]]:
    """The shards, one a worker that trains; and the workers that do not."""
    if not places:  # nobody is there: whoever comes first trains all of it
        return [Shard(shard=0, start=0, stop=total)], ()
    sizes = {shard.meant: shard.stop - shard.start for shard in before if shard.meant is not None}
    found = roles(spec, total, round_index, places, sizes)
    numbers = _numbers(found.weights, before)
    trainers = sorted(found.weights, key=lambda worker: numbers[worker])[:total]
    bounds = cut(total, [found.weights[worker] for worker in trainers])
    shards = [
        Shard(shard=numbers[worker], start=bounds[at], stop=bounds[at + 1], meant=worker)
        for at, worker in enumerate(trainers)
    ]
    names = {place.worker: place.name for place in places}
    absent = (Absent(worker=w, worker_name=names[w], why=why) for w, why in found.evaluators.items())
    return shards, tuple(absent)


def _least(spec: JobSpec, places: Sequence[Place]) -> int:
    """The fewest shards that a round may have: a robust rule needs so many updates, and a guard three to compare.

    Speed is what a worker says of itself. One that claims a great deal would else be given all the work, and with it
    the only voice.
    """
    guarded = spec.aggregation.norm_outlier is not None
    return max(spec.aggregation.needs, min(FEWEST, len(places)) if guarded else 1)


def _equal(count: int, total: int, places: Sequence[Place]) -> list[Shard]:
    """So many equal shards; where they are more than the workers, some train two."""
    bounds = cut(total, [1.0] * min(count, total))
    workers = dict(enumerate(sorted(place.worker for place in places)))
    return [Shard(shard=k, start=a, stop=b, meant=workers.get(k)) for k, (a, b) in enumerate(pairwise(bounds))]


def roles(spec: JobSpec, total: int, round_index: int, places: Sequence[Place], before: Mapping[str, int]) -> Roles:
    """Who trains how much, and who only evaluates.

    A worker of unknown speed is taken for as slow as the slowest that trains, and measured in this round. Where all are
    unknown, all get the same. The cut of the round before stays while nobody's share has moved far from it. A worker
    that vanished keeps its place only while all shards are alike: nobody else is to train a large one for it.

    Args:
        spec: the job's.
        total: samples in the training set.
        round_index: the round to open.
        places: the workers, at least one.
        before: worker id -> samples, of the round before.
    """
    if not _are_alike(_weights(places)):
        places = [place for place in places if place.here] or places
    evaluators = _evaluators(spec, total, round_index, places, before)
    weights = _weights([place for place in places if place.worker not in evaluators])
    if spec.train.local_steps is not None:  # everybody takes as many steps: a smaller shard would save no time
        weights = dict.fromkeys(weights, 1.0)
    if before.keys() == weights.keys() and not _moved(weights, before):
        return Roles({worker: float(size) for worker, size in before.items()}, evaluators)
    return Roles(dict.fromkeys(weights, 1.0) if _are_alike(weights) else weights, evaluators)


def _weights(places: Sequence[Place]) -> dict[str, float]:
    """Worker id -> its rate, that of the slowest where its own is not known."""
    slowest = min((place.rate for place in places if place.rate is not None), default=1.0)
    return {place.worker: slowest if place.rate is None else place.rate for place in places}


def _moved(shares: Mapping[str, float], before: Mapping[str, float]) -> bool:
    """Whether some worker's share is far from what it was, in whatever unit either is."""
    now, then = sum(shares.values()), sum(before.values())
    return any(abs(shares[w] * then / (before[w] * now) - 1) > MOVED for w in shares)


def _are_alike(shares: Mapping[str, float]) -> bool:
    return not _moved(shares, dict.fromkeys(shares, 1.0))


def _evaluators(
    spec: JobSpec, total: int, round_index: int, places: Sequence[Place], before: Mapping[str, int]
) -> dict[str, str]:
    """Worker id -> why it trains nothing: its share of all known speeds is too small to be worth a shard."""
    whole = sum(place.rate for place in places if place.rate is not None)
    largest = max((place.rate for place in places if place.rate is not None), default=0.0)
    found: dict[str, str] = {}
    for place in places:
        if place.rate is None or place.rate == largest or round_index - place.trained > TRY_AGAIN:
            continue
        share = place.rate / whole
        least = LEAST_SHARE * (1.0 if place.worker in before else RETURNS)
        batches = share * total * (spec.train.local_epochs or 1) / spec.train.usual_batch
        by_epochs = spec.train.local_steps is None and spec.train.local_seconds is None
        if share < least:
            found[place.worker] = f"evaluates only: its share would be {share:.1%}, under {LEAST_SHARE:.0%}"
        elif by_epochs and batches < LEAST_BATCHES and place.rate < FEW * largest:
            found[place.worker] = f"evaluates only: its shard would have {batches:.0f} batches, under {LEAST_BATCHES}"
    return found


def _numbers(workers: Collection[str], before: Sequence[Shard]) -> dict[str, int]:
    """Worker id -> the number of its shard: as in the round before, for it may keep things of it; else a free one."""
    kept = {shard.meant: shard.shard for shard in before if shard.meant in workers}
    free = (number for number in count() if number not in kept.values())
    return {worker: kept[worker] if worker in kept else next(free) for worker in workers}
