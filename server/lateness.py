"""Updates that come after their round has closed, where the job uses them (`[round] late = "use"`).

Pure. A closed round stays known as a `Past` for as long as an update of it may still be used. One that comes is kept,
and joins the next round that is frozen: its change counts 1 / sqrt(1 + staleness) of what it would have in time.
Staleness is the number of versions made since the one that it began with; above MOST nothing is used.

Source: Nguyen et al. 2021, arXiv 2106.06639 (FedBuff): s(tau) = 1 / sqrt(1 + tau). The sum is divided by all samples
and not by the discounted ones, as there, so that late changes are damped whoever comes with them.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from common.facts import Accepted, LateMember, Shard
from common.messages import ModelRef

T = TypeVar("T")

MOST = 2  # the greatest staleness that is used


@dataclass(frozen=True)
class Past(Generic[T]):
    """A closed round of which updates may still come."""

    base: ModelRef
    shards: Mapping[int, Shard]  # without an update
    tries: Mapping[int, T]  # shard -> what became of the attempts at it


def factor_of(staleness: int) -> float:
    """What the change of a late update counts, beside one in time."""
    return 1.0 / math.sqrt(1 + staleness)


def members(late: Iterable[Accepted], round_index: int) -> tuple[LateMember, ...]:
    """The late updates as members of a round that is frozen, in one order whatever the order they came in."""
    return tuple(
        LateMember(
            round=update.round,
            shard=update.shard,
            worker=update.worker,
            worker_name=update.worker_name,
            staleness=round_index - update.round,
            factor=factor_of(round_index - update.round),
        )
        for update in sorted(late, key=lambda update: (update.round, update.shard))
    )


def still_useful(past: Mapping[int, Past[T]], closed: int) -> dict[int, Past[T]]:
    """The closed rounds of which an update could still be used, once round `closed` has closed."""
    return {index: one for index, one in past.items() if closed + 1 - index <= MOST and one.shards}
