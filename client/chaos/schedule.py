"""Which fault strikes when: kinds and a seed in, a list out.

Pure: no clock, process, network or disk. When a fault strikes is told in the progress of the job that it disturbs, not
in seconds: it meets the same phase of a round on a fast machine and on a slow one.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

Parameter = int | float | str | bool
T = TypeVar("T")

KINDS: Mapping[str, str] = {
    "kill-worker": "SIGKILL for a worker, which is started again within a second",
    "kill-coordinator": "SIGKILL for the coordinator, which is started again within a second",
    "kill-both": "SIGKILL for the coordinator and a worker at once",
    "kill-at-point": "the coordinator kills itself where a decision meets the disk",
    "stop-worker": "a worker's machine stands still, for up to one and a half lease times",
    "stop-coordinator": "the coordinator's machine stands still, for as long",
    "cut": "every connection is reset",
    "stall": "a connection carries nothing for longer than bodies may stand still",
    "half-close": "one direction of a connection ends early",
    "corrupt": "a byte of a model or an update is changed on its way",
    "clock-jump": "a machine's clock jumps by an hour or ten days",
    "disk-full": "the coordinator's disk has no byte left, for some seconds",
    "power-cut": "the coordinator's disk loses what had not been synced, and the coordinator its life",
}
"""Every kind of fault, in the order in which they are shown."""

POINTS = (
    "accepted-before", "accepted-after", "update-named", "frozen-before", "frozen-after", "model-written",
    "model-named", "closed-before", "closed-after",
)  # fmt: skip
"""Where a coordinator can be made to kill itself: server.failpoints.POINTS, which this package may not import."""

JUMPS_S = (-864_000, -3_600, 3_600, 864_000)  # seconds


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """One fault, and when it strikes."""

    number: int  # from 1
    kind: str
    after: int  # updates of the job that were accepted by then
    fraction: float  # of the time that an undisturbed job takes for one update, which passes after that
    parameters: Mapping[str, Parameter]

    def words(self) -> str:
        """The fault in one line: `stop-worker worker=2 leases=0.7`."""
        return " ".join([self.kind, *(f"{name}={value}" for name, value in self.parameters.items())])


def plan_faults(
    kinds: Iterable[str], *, seed: int, faults: int, updates: int, workers: int
) -> tuple[PlannedFault, ...]:
    """The schedule of a run: the same for the same arguments, on any machine and any Python.

    Every kind comes about equally often, in a random order, and the faults are spread over the whole job.

    Args:
        kinds: names of KINDS, in any order; a repeated one counts once.
        seed: of all that is random here.
        faults: how many.
        updates: the last fault strikes before so many updates of the job are accepted; at least 1.
        workers: they are numbered from 1.

    Raises:
        ValueError: no kind, or one that does not exist.
    """
    asked = set(kinds)
    if unknown := asked - KINDS.keys():
        raise ValueError(f"no such kinds of fault: {', '.join(sorted(unknown))}")
    known = [kind for kind in KINDS if kind in asked]
    if not known:
        raise ValueError("a schedule needs at least one kind of fault")
    chance = _Chance(seed)
    order: list[str] = []
    while len(order) < faults:
        order += chance.shuffled(known)
    return tuple(
        _planned(chance, number, kind, (number - 1 + chance.share()) * updates / faults, workers)
        for number, kind in enumerate(order[:faults], start=1)
    )


def schedule_digest(schedule: Sequence[PlannedFault]) -> str:
    """16 hex digits that two equal schedules share."""
    text = json.dumps([asdict(fault) for fault in schedule], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------- chance


class _Chance:
    """What is drawn. Only `Random.random` is: of it alone Python promises the same numbers in every version."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def share(self) -> float:
        """Uniform in [0, 1)."""
        return self._random.random()

    def between(self, low: float, high: float) -> float:
        """Uniform, to the millisecond, since a person reads it."""
        return round(low + (high - low) * self.share(), 3)

    def one_of(self, choices: Sequence[T]) -> T:
        return choices[int(self.share() * len(choices))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        left, order = list(items), []
        while left:
            order.append(left.pop(int(self.share() * len(left))))
        return order


def _planned(chance: _Chance, number: int, kind: str, at: float, workers: int) -> PlannedFault:
    after = int(at)
    return PlannedFault(number, kind, after, round(at - after, 3), _DRAWS[kind](chance, workers))


def _worker(chance: _Chance, workers: int) -> int:
    return chance.one_of(range(1, workers + 1))


def _away(chance: _Chance, _: int) -> dict[str, Parameter]:
    return {"away_s": chance.between(0, 1)}


def _worker_away(chance: _Chance, workers: int) -> dict[str, Parameter]:
    return {"worker": _worker(chance, workers), "away_s": chance.between(0, 1)}


def _frozen(chance: _Chance, _: int) -> dict[str, Parameter]:
    return {"leases": chance.between(0.3, 1.5)}


def _worker_frozen(chance: _Chance, workers: int) -> dict[str, Parameter]:
    return {"worker": _worker(chance, workers), **_frozen(chance, workers)}


def _way(chance: _Chance, _: int) -> dict[str, Parameter]:
    return {"way": chance.one_of(("up", "down"))}


def _anywhere(chance: _Chance, workers: int) -> dict[str, Parameter]:
    return {**_way(chance, workers), "inside": chance.one_of(("body", "anything"))}


def _stalled(chance: _Chance, workers: int) -> dict[str, Parameter]:
    return {**_anywhere(chance, workers), "idles": chance.between(1.2, 2.5)}


def _point(chance: _Chance, workers: int) -> dict[str, Parameter]:
    return {"point": chance.one_of(POINTS), "times": chance.one_of((1, 2)), **_away(chance, workers)}


def _jump(chance: _Chance, workers: int) -> dict[str, Parameter]:
    return {"machine": chance.one_of(range(workers + 1)), "by_s": chance.one_of(JUMPS_S)}  # 0: the coordinator's


def _full(chance: _Chance, _: int) -> dict[str, Parameter]:
    return {"held_s": chance.between(1, 3)}


def _nothing(_: _Chance, __: int) -> dict[str, Parameter]:
    return {}


_DRAWS: Mapping[str, Callable[[_Chance, int], dict[str, Parameter]]] = {
    "kill-worker": _worker_away,
    "kill-coordinator": _away,
    "kill-both": _worker_away,
    "kill-at-point": _point,
    "stop-worker": _worker_frozen,
    "stop-coordinator": _frozen,
    "cut": _nothing,
    "stall": _stalled,
    "half-close": _anywhere,
    "corrupt": _way,
    "clock-jump": _jump,
    "disk-full": _full,
    "power-cut": _away,
}
