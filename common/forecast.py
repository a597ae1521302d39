"""What a round will cost each machine, foretold from what was measured of it, and what would be better.

Pure: numbers in, numbers and sentences out. Nothing is known of a box but its measurements; where one is missing the
forecast says so instead of guessing.

    boxes (samples/s, link) ─┐
                             ├─forecast─▶ who trains what, for how long, who waits for whom
    work (samples, bytes) ───┘      └─advice──▶ the same with one thing changed, where that is better

Of a round it counts the download, the training, the upload and the calls between them. Averaging on the coordinator is
left out: it is a pass over memory, and nearly the same for every choice.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from common.codecs import CODECS, codec
from common.sharding import cut

MASKED_BYTES = 8  # of a number in a masked update
ROUND_TRIPS = 4  # calls of an assignment that wait for an answer: poll, model, update, submit
WORTH_SAYING = 0.1  # an alternative is told when it saves this share of what a sample costs
TIMES_LONGER = 4  # how much longer the local training of an alternative is
FP32_BYTES = 4

Length = Literal["epochs", "steps", "seconds"]


@dataclass(frozen=True)
class Box:
    """What was measured of one machine. None: not yet."""

    name: str
    rate: float | None = None  # samples of this task a second
    down: float | None = None  # bytes a second to this box
    up: float | None = None  # bytes a second from it
    latency_s: float = 0.0  # a round trip
    path: str = ""  # in words, where it is worth saying: "relayed by fra"


@dataclass(frozen=True)
class Work:
    """What of a job decides the cost of its rounds."""

    samples: int  # in the training set
    model_bytes: int
    batch_size: int
    length: Length = "epochs"
    amount: float = 1  # epochs, steps or seconds of local training
    shards: int | None = None  # None: one for each box, sized by its speed
    fraction: float = 1.0  # of the shards, that trains in a round; in the mean where they are drawn one by one
    update: str = "fp32"
    masked: bool = False  # secure aggregation
    whole_download: bool = False  # models go down whole, although updates are encoded
    least_share: float = 0.0  # a box below this share of the fleet's speed evaluates instead of training


@dataclass(frozen=True)
class Row:
    """One box in one round."""

    name: str
    role: Literal["trains", "evaluates", "not measured"]
    share: float = 0.0  # of the round's samples
    samples: int = 0
    down_s: float = 0.0
    train_s: float = 0.0
    up_s: float = 0.0
    wait_s: float = 0.0  # until the round closes
    bytes_down: int = 0
    bytes_up: int = 0

    @property
    def busy_s(self) -> float:
        """Seconds from the opening of the round to the end of its last upload."""
        return self.down_s + self.train_s + self.up_s


@dataclass(frozen=True)
class Forecast:
    """A round, foretold."""

    rows: tuple[Row, ...]
    round_s: float  # 0: nobody can train, or nobody was measured
    unknown: tuple[str, ...]  # sentences: what was not measured, and what was taken for it

    @property
    def trainers(self) -> tuple[Row, ...]:
        """The rows of those that train."""
        return tuple(row for row in self.rows if row.role == "trains")

    @property
    def slowest(self) -> Row | None:
        """The box that the others wait for; None where nobody waits."""
        return max(self.trainers, key=lambda row: row.busy_s) if len(self.trainers) > 1 else None


@dataclass(frozen=True)
class Advice:
    """One change, and what it would bring."""

    sentence: str
    round_s: float
    saves: float  # share of the time per trained sample


def bytes_of(work: Work) -> tuple[int, int]:
    """Bytes (down, up) of one shard in a round, headers left out; where steps are sent, from the second round on."""
    if work.masked:
        return work.model_bytes, work.model_bytes * MASKED_BYTES // FP32_BYTES
    if work.update not in CODECS:
        return work.model_bytes, work.model_bytes
    encoded = codec(work.update).size(work.model_bytes // FP32_BYTES)
    return work.model_bytes if work.whole_download else encoded, encoded


def forecast(boxes: Sequence[Box], work: Work) -> Forecast:
    """Foretell one round of a job.

    Args:
        boxes: the machines that would serve it, each name once.
        work: the job.
    """
    rates = {box.name: box.rate for box in boxes if box.rate}
    given = _by_speed(work, rates) if work.shards is None else _pulled(boxes, work, rates)
    rows = [_row(box, *given.get(box.name, (0, 0)), work, rates) for box in boxes]
    total = sum(row.samples for row in rows)
    round_s = max((row.busy_s for row in rows), default=0.0)
    done = (
        replace(row, share=row.samples / total, wait_s=round_s - row.busy_s) if row.samples else row for row in rows
    )
    return Forecast(tuple(done), round_s, _unknown(boxes, work))


def blame(told: Forecast, boxes: Sequence[Box]) -> str:
    """Who the others wait for, how long and why; empty where nobody does to speak of."""
    slowest = told.slowest
    if slowest is None:
        return ""
    others = max(row.busy_s for row in told.trainers if row.name != slowest.name)
    late = (told.round_s - others) / told.round_s if told.round_s else 0.0
    if late < WORTH_SAYING:
        return ""
    parts = {"its download": slowest.down_s, "its training": slowest.train_s, "its upload": slowest.up_s}
    part = max(parts, key=lambda name: parts[name])
    path = next(box.path for box in boxes if box.name == slowest.name)
    way = f" ({path})" if path and part != "its training" else ""
    return (
        f"{slowest.name} is waited for during {late:.0%} of a round: {part}{way} takes {in_seconds(parts[part])} of "
        f"its {in_seconds(slowest.busy_s)}"
    )


def advice(boxes: Sequence[Box], work: Work) -> tuple[Advice, ...]:
    """What would make the job cheaper, the best first: coarser updates, longer rounds, shards by speed, one box less.

    Compared is what a trained sample costs in seconds, since a longer round trains on more.
    """
    now = forecast(boxes, work)
    cost, slowest = _cost(now, work), now.slowest
    if cost is None or slowest is None:
        return ()
    others = [box for box in boxes if box.name != slowest.name]
    longer = replace(work, amount=work.amount * TIMES_LONGER)
    choices = [(f'update = "{name}"', boxes, replace(work, update=name)) for name in _coarser(work)]
    choices.append((f"local_{work.length} = {longer.amount:g}", boxes, longer))
    choices.append((f"without {slowest.name}", others, work))
    if work.shards is not None:
        choices.append(('shards = "auto"', boxes, replace(work, shards=None, fraction=1.0)))
    found = list[Advice]()
    for what, fleet, changed in choices:
        then = forecast(fleet, changed)
        price = _cost(then, changed)
        if price is not None and price <= cost * (1 - WORTH_SAYING):
            more = f", and trains {TIMES_LONGER} times as much" if changed.amount > work.amount else ""
            sentence = f"{what}: a round takes {in_seconds(then.round_s)} instead of {in_seconds(now.round_s)}{more}"
            found.append(Advice(sentence, then.round_s, 1 - price / cost))
    return tuple(sorted(found, key=lambda each: -each.saves))


def in_seconds(value: float) -> str:
    """Seconds, with two digits that count."""
    return f"{value:.2g} s" if value < 100 else f"{value:,.0f} s"


# ---------------------------------------------------------------- who trains what


def _by_speed(work: Work, rates: Mapping[str, float]) -> dict[str, tuple[int, int]]:
    """One shard for each box that is fast enough, sized by its speed: name -> (1, samples)."""
    total = sum(rates.values())
    able = {name: rate for name, rate in rates.items() if rate >= work.least_share * total}
    if not able:
        return {}
    bounds = cut(max(work.samples, len(able)), list(able.values()))
    return {name: (1, bounds[at + 1] - bounds[at]) for at, name in enumerate(able)}


def _pulled(boxes: Sequence[Box], work: Work, rates: Mapping[str, float]) -> dict[str, tuple[int, int]]:
    """Equal shards, of which each box takes the next when it is done with one: name -> (shards, samples)."""
    able = [box for box in boxes if box.name in rates]
    if not able:
        return {}
    shards = work.shards or 1
    taken = {box.name: (0, 0) for box in able}
    free = [(0.0, at) for at in range(len(able))]
    bounds = cut(max(work.samples, shards), [1.0] * shards)
    for shard in range(max(int(shards * work.fraction), 1)):
        _, at = heapq.heappop(free)
        name, size = able[at].name, bounds[shard + 1] - bounds[shard]
        count, samples = taken[name]
        taken[name] = (count + 1, samples + size)
        heapq.heappush(free, (_row(able[at], *taken[name], work, rates).busy_s, at))
    return taken


def _row(box: Box, shards: int, samples: int, work: Work, rates: Mapping[str, float]) -> Row:
    """What a box does with so many shards. A link that was not measured costs nothing."""
    if not shards:
        return Row(box.name, "evaluates" if box.name in rates else "not measured")
    down, up = bytes_of(work)
    calls_s = box.latency_s * ROUND_TRIPS * shards / 2  # half of them before the training
    down_s = (down / box.down if box.down else 0.0) + calls_s
    up_s = (up * shards / box.up if box.up else 0.0) + calls_s
    train_s = _train_s(work, shards, samples, rates[box.name])
    return Row(box.name, "trains", 0.0, samples, down_s, train_s, up_s, 0.0, down, up * shards)


def _train_s(work: Work, shards: int, samples: int, rate: float) -> float:
    match work.length:
        case "seconds":
            return shards * work.amount
        case "steps":
            return shards * work.amount * work.batch_size / rate
        case _:
            return work.amount * samples / rate


# ---------------------------------------------------------------- what it costs


def _cost(told: Forecast, work: Work) -> float | None:
    """Seconds for each sample trained on, or for each step or second where the job counts those; None: no training."""
    trained = sum(row.samples for row in told.rows) if work.length == "epochs" else len(told.trainers)
    return told.round_s / (trained * work.amount) if trained else None


def _coarser(work: Work) -> list[str]:
    """The codecs that send fewer bytes than the job does now."""
    if work.masked:  # which excludes them
        return []
    return [name for name in CODECS if bytes_of(replace(work, update=name))[1] < bytes_of(work)[1]]


def _unknown(boxes: Sequence[Box], work: Work) -> tuple[str, ...]:
    slow = [box.name for box in boxes if not box.rate]
    links = [box.name for box in boxes if box.rate and not (box.down and box.up)]
    said = []
    if slow:
        said.append(f"the speed of {', '.join(slow)} is not measured for this task: left out of the forecast")
    if links and work.model_bytes:
        said.append(f"the link of {', '.join(links)} is not measured: its transfers are taken to cost nothing")
    return tuple(said)
