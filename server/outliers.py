"""The guard of a round: updates whose change is far longer than that of the others do not count.

Pure. Norms are measured once, when an update is looked at, and journalled with it: so what is refused is a function of
the set of updates, whatever order they came in, and a restarted coordinator refuses the same.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from common.facts import Absent, Accepted, HandedBack

CODE = "norm_outlier"  # of the fact by which an accepted update stops counting
FEWEST = 3  # updates, for there to be a majority


@dataclass(frozen=True)
class Guarded:
    """What the guard says of a round."""

    refused: Mapping[tuple[int, int], str]  # (round, shard) -> why
    spared: str = ""  # what is kept although it is too long, in words


def guard(updates: Sequence[Accepted], late: Iterable[Accepted], factor: float | None, least: int) -> Guarded:
    """Find the updates whose change is more than `factor` times as long as the median of the round.

    A robust rule bears a number of bad updates by itself, and needs a number in all: the guard leaves it those, the
    nearest of what it would refuse first.

    Args:
        updates: those of the round. One whose norm was not measured is never refused.
        late: updates of earlier rounds that are to be in it. They are measured by its median, and move it not.
        factor: None: nothing is refused.
        least: updates of the round that must be left.
    """
    known = {(update.round, update.shard): update.norm for update in updates if update.norm is not None}
    if factor is None or len(known) < FEWEST:
        return Guarded({})
    median = statistics.median(known.values())
    far = sorted((place for place, norm in known.items() if norm > factor * median), key=lambda p: (known[p], p))
    kept = far[: max(least - (len(updates) - len(far)), 0)]
    tail = f"the median {median:.6g} of the round's {len(known)} updates"
    beyond = {(one.round, one.shard): one.norm for one in late if one.norm is not None and one.norm > factor * median}
    why = {
        place: f"its change has the norm {norm:.6g}, and {factor:g} times {tail} is allowed"
        for place, norm in [*((place, known[place]) for place in far if place not in kept), *beyond.items()]
    }
    names = ", ".join(str(shard) for _, shard in sorted(kept))
    spared = f"; shard {names} is kept, though beyond {factor:g} times {tail}: the rule needs {least}" if kept else ""
    return Guarded(why, spared)


def back(update: Accepted, why: str) -> HandedBack:
    """An accepted update does not count after all."""
    return HandedBack(
        kind="train",
        round=update.round,
        shard=update.shard,
        attempt=update.attempt,
        worker=update.worker,
        worker_name=update.worker_name,
        code=CODE,
        sentence=f"the update was refused when the round closed: {why}",
    )


def absent(update: Accepted, round_index: int, why: str) -> Absent:
    """Who is not in the round for it, and why."""
    late = f"its update of round {update.round}, which came late, " if update.round != round_index else ""
    return Absent(worker=update.worker, worker_name=update.worker_name, shard=update.shard, why=f"{late}refused: {why}")
