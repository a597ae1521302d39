"""What happened to one job, kept small: its facts in, and out what its page shows. Pure.

Of every round a few numbers are kept, of the last rounds also who did what and when. So a refresh of the page never
walks through all rounds, and a job of 10,000 rounds takes about as many bytes as its curves.

    journal ──facts──▶ History.take ──▶ curves (all rounds) · rounds, attempts, troubles (the last) · shares (sums)
"""

import math
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime

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
    Late,
    Lost,
    Opened,
    OpenedAnew,
    RoundClosed,
    StateChanged,
)
from common.then import scene_lines
from server.pages import words

SHOWN_ROUNDS = 30  # rows of the table
DETAILED_ROUNDS = 20  # rounds of which it is kept who did what
DETAILED_ATTEMPTS = 2_000  # and attempts, over all of those
SHOWN_EVENTS = 100
CURVES = 12  # metrics that a chart can show; a worker may name a hundred
POINTS = 1_000  # of one answer with curves
SCAN_ROUNDS = 64  # updates that a later round may still use are this many rounds old at most


@dataclass
class Attempt:
    """One attempt at one task of a round, with times in seconds since 1970."""

    worker: str  # id
    round: int
    shard: int
    began: float
    ended: float | None = None
    result: Accepted | None = None
    back: HandedBack | None = None


@dataclass
class Detail:
    """Who did what in a round."""

    round: int
    opened: float
    frozen: float | None = None
    closed: float | None = None
    attempts: dict[tuple[int, int], Attempt] = field(default_factory=dict)  # (shard, attempt)
    absent: tuple[Absent, ...] = ()


@dataclass
class Share:
    """What one worker has contributed: only what is in a model."""

    name: str
    updates: int = 0
    samples: int = 0
    seconds: float = 0.0  # of training
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(frozen=True)
class Event:
    """A line of the log."""

    id: int
    at: str
    kind: str  # trouble, note, state
    text: str
    detail: str = ""
    more: tuple[str, ...] = ()  # what to do about it, and the machine then


class History:
    """One job's facts so far."""

    def __init__(self) -> None:
        self.last_id = 0
        self.rounds = 0  # closed
        self.curves: dict[str, array[float]] = {}  # metric -> its value in each round; NaN: none
        self.closed: deque[RoundClosed] = deque(maxlen=SHOWN_ROUNDS)
        self.evaluated: dict[int, Evaluated] = {}  # round -> its evaluation, of the rounds in `closed`
        self.best: int | None = None
        self.details: dict[int, Detail] = {}
        self.shares: dict[str, Share] = {}  # worker id -> its share
        self.events: deque[Event] = deque(maxlen=SHOWN_EVENTS)
        self.bytes_down = self.bytes_up = self.samples = 0
        self.seconds = 0.0
        self._updates: dict[tuple[int, int], Accepted] = {}  # (round, shard) -> what may still be averaged
        self._frozen: Frozen | None = None

    def take(self, id: int, at: str, fact: Fact) -> None:  # noqa: A002 - the field's name
        """Learn a fact. One that was taken before is passed over."""
        if id <= self.last_id:
            return
        self.last_id = id
        match fact:
            case Opened():
                self._detail(fact.round, _seconds(at))
            case OpenedAnew():
                self._anew(fact, at)
            case HandedOut() if fact.kind == "train":
                made = Attempt(fact.worker, fact.round, fact.shard, _seconds(at))
                self._detail(fact.round, made.began).attempts[fact.shard, fact.attempt] = made
            case Accepted():
                self._accept(fact, _seconds(at))
            case HandedBack():
                self._back(fact, at)
            case Frozen():
                self._frozen = fact
                if (detail := self.details.get(fact.round)) is not None:
                    detail.frozen = _seconds(at)
            case RoundClosed():
                self._close(fact, _seconds(at))
            case Evaluated():
                self._evaluate(fact)
            case _:
                pass
        if (said := _said(fact)) is not None:
            self.events.append(Event(id, at, *said, _more(fact)))

    def _anew(self, fact: OpenedAnew, at: str) -> None:
        self._updates = {key: update for key, update in self._updates.items() if key[0] != fact.round}
        self.details.pop(fact.round, None)
        self._detail(fact.round, _seconds(at))

    def _detail(self, round_index: int, at: float) -> Detail:
        """What is known of a round; of the oldest ones it is forgotten."""
        if round_index not in self.details:
            self.details[round_index] = Detail(round_index, at)
            kept = sum(len(detail.attempts) for detail in self.details.values())
            while len(self.details) > DETAILED_ROUNDS or (kept > DETAILED_ATTEMPTS and len(self.details) > 2):
                kept -= len(self.details.pop(min(self.details)).attempts)
            return self.details.get(round_index, Detail(round_index, at))
        return self.details[round_index]

    def _accept(self, fact: Accepted, at: float) -> None:
        self._updates[fact.round, fact.shard] = fact
        detail = self._detail(fact.round, at)
        began = at - (fact.took_s if fact.took_s is not None else fact.seconds)
        made = detail.attempts.setdefault(
            (fact.shard, fact.attempt), Attempt(fact.worker, fact.round, fact.shard, max(began, detail.opened))
        )
        made.ended, made.result = at, fact

    def _back(self, fact: HandedBack, at: str) -> None:
        if fact.kind != "train":
            return
        if fact.code in ("lost", "norm_outlier"):  # it was accepted, and counts no more
            self._updates.pop((fact.round, fact.shard), None)
        detail = self.details.get(fact.round)
        if detail is not None and (made := detail.attempts.get((fact.shard, fact.attempt))) is not None:
            made.ended, made.back = _seconds(at), fact

    def _close(self, fact: RoundClosed, at: float) -> None:
        for update in self._counted(fact):
            share = self.shares.setdefault(update.worker, Share(update.worker_name))
            share.updates += 1
            share.samples += update.samples
            share.seconds += update.seconds
            share.bytes_down += update.bytes_down
            share.bytes_up += update.bytes_up
        if (detail := self.details.get(fact.round)) is not None:
            detail.closed, detail.absent = at, fact.absent
        self.rounds = max(self.rounds, fact.round)
        self.samples += fact.samples
        self.seconds += fact.seconds
        self.bytes_down += fact.bytes_down
        self.bytes_up += fact.bytes_up
        self.closed.append(fact)
        oldest = self.closed[0].round
        self.evaluated = {index: found for index, found in self.evaluated.items() if index >= oldest}
        self._updates = {key: one for key, one in self._updates.items() if key[0] > fact.round - SCAN_ROUNDS}
        self._set(fact.round, {f"{name} (training)": value for name, value in fact.metrics.items()})
        if fact.privacy is not None:
            self._set(fact.round, {"epsilon": fact.privacy.epsilon})

    def _counted(self, fact: RoundClosed) -> Iterator[Accepted]:
        """The updates that are in a round's model; each is given out once."""
        frozen = self._frozen
        keys: Iterable[tuple[int, int]] = [(one.round, one.shard) for one in fact.late]
        if frozen is not None and frozen.round == fact.round:
            members = [(one.round, one.shard) for one in frozen.members]
            keys = [*keys, *members] if members else [*keys, *((fact.round, shard) for shard in frozen.shards)]
        for key in dict.fromkeys(keys):
            if (update := self._updates.pop(key, None)) is not None:
                yield update

    def _evaluate(self, fact: Evaluated) -> None:
        self.evaluated[fact.round] = fact
        self.best = fact.round if fact.best else self.best
        self._set(fact.round, fact.metrics)

    def _set(self, round_index: int, values: dict[str, float]) -> None:
        """Put values into the curves. Metrics of single classes (`accuracy/3`) have none; round 0 has no place."""
        for name, value in values.items():
            if "/" in name or (name not in self.curves and len(self.curves) >= CURVES) or round_index < 1:
                continue
            curve = self.curves.setdefault(name, array("d"))
            if len(curve) < round_index:
                curve.extend([math.nan] * (round_index - len(curve)))
            curve[round_index - 1] = value

    # ------------------------------------------------------------ what is asked of it

    def series(self, after: int = 0) -> dict[str, object]:
        """The curves from the round after `after` on, thinned out to POINTS rounds, of which the last is one.

        Returns:
            {"rounds": [1, 2, …], "until": N, "curves": {"accuracy": [0.1, null, …], …}}; null where nothing was
            measured. A stretch that is thinned out keeps the least and the greatest value in it, so that no peak is
            lost.
        """
        new = self.rounds - after
        if new <= POINTS:
            rounds: list[int] = list(range(after + 1, self.rounds + 1))
        else:
            rounds = sorted(self._telling(after))
        curves = {name: [_at(curve, index) for index in rounds] for name, curve in self.curves.items()}
        return {"rounds": rounds, "until": self.rounds, "curves": curves}

    def _telling(self, after: int) -> set[int]:
        """Rounds that show the shape of every curve: of each of equal stretches those of its extremes."""
        each = max(1, POINTS // (2 * max(1, len(self.curves))))
        width = max(1.0, (self.rounds - after) / each)
        chosen = {after + 1, self.rounds}
        for curve in self.curves.values():
            for number in range(each):
                first = after + int(number * width)
                values = [
                    (value, index) for index, value in enumerate(curve[first : first + math.ceil(width)], first + 1)
                    if math.isfinite(value)
                ]  # fmt: skip
                if values:
                    chosen |= {min(values)[1], max(values)[1]}
        return {index for index in chosen if index <= self.rounds}

    def ranked(self) -> list[tuple[str, Share, float]]:
        """(worker id, its share, its part of all samples), the greatest first."""
        whole = sum(share.samples for share in self.shares.values()) or 1
        found = sorted(self.shares.items(), key=lambda item: (-item[1].samples, item[1].name))
        return [(worker, share, share.samples / whole) for worker, share in found]

    def table(self) -> list[tuple[RoundClosed, Evaluated | None]]:
        """The last closed rounds, newest first, each with its evaluation."""
        return [(fact, self.evaluated.get(fact.round)) for fact in reversed(self.closed)]


def _at(curve: "array[float]", round_index: int) -> float | None:
    """A value of a curve as JSON has it: no NaN, no infinity."""
    value = curve[round_index - 1] if round_index <= len(curve) else math.nan
    return value if math.isfinite(value) else None


def _seconds(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()


def _code(fact: HandedBack) -> str:
    return f"{fact.code}, {fact.cause}" if fact.cause not in ("", fact.code) else fact.code


def _more(fact: Fact) -> tuple[str, ...]:
    """What to do about a trouble, and the machine then."""
    if not isinstance(fact, HandedBack):
        return ()
    said = [f"what to do: {fact.advice}"] if fact.advice else []
    return (*said, *(scene_lines(fact.scene, words.size) if fact.scene is not None else ()))


def _said(fact: Fact) -> tuple[str, str, str] | None:
    """(kind, line, detail) of a fact that the log shows."""
    match fact:
        case StateChanged():
            return "state", f"{fact.state}: {fact.reason}", ""
        case HandedBack():
            where = f"{fact.kind} of round {fact.round}, shard {fact.shard}, attempt {fact.attempt}"
            return "trouble", f"{fact.worker_name} gave back {where}: {fact.sentence} ({_code(fact)})", fact.detail
        case Late():
            return "note", f"an update of round {fact.round}, shard {fact.shard} came too late and is not used", ""
        case Lost():
            return "trouble", f"after a power cut: {fact.reason}", ""
        case OpenedAnew():
            return "trouble", f"round {fact.round} begins once more: {fact.reason}", ""
        case Extended():
            return "note", f"round {fact.round} gets more time: {fact.reason}", ""
        case EvaluationGivenUp():
            return "trouble", f"round {fact.round} is not evaluated: {fact.reason}", ""
        case RoundClosed() if fact.warning:
            return "trouble", f"round {fact.round}: {fact.warning}", ""
        case _:
            return None
