"""What trackers are told of a job: facts in, points out.

    facts ──▶ Teller.take ──▶ Point ──▶ every tracker (client.tracking.trackers)

Pure, and the same facts always give the same points with the same ids: a tracker that is started again reads the job
from its beginning, and passes over the points that it has.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from client import shown
from client.watching import absent_words
from common.facts import Accepted, Evaluated, Frozen, Initialised, Late, RoundClosed, StateChanged, Submitted
from common.messages import JobView, Message

Setting = str | int | float | bool

_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_./ -]")  # what MLflow, the strictest of them, takes


@dataclass(frozen=True, slots=True)
class Run:
    """The job, as trackers call it: a run with hyperparameters."""

    job: str
    name: str
    task: str
    settings: Mapping[str, Setting]  # `train.lr` -> 0.1
    target: str  # what counts most among the values
    at: str  # when it was submitted, in ISO 8601


@dataclass(frozen=True, slots=True)
class Point:
    """What is told at once.

    Attributes:
        id: of the fact that it comes from; rises from point to point.
        type: of that fact: submitted, initialised, round, evaluation, job (common.facts).
        at: when, by the coordinator's clock, in ISO 8601.
        round: whose it is; of the job as a whole: that closed last.
        values: name -> number; names are grouped by what is before their first slash.
        words: name -> text: digests, who is absent and why, what a person should hear about.
    """

    id: int
    type: str
    at: str
    round: int
    values: Mapping[str, float] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)


def run_of(job: JobView) -> Run:
    """The job's name and settings; those that are not set are left out."""
    flat = dict(_flat("", job.spec.model_dump(mode="json", exclude_none=True)))
    return Run(job.id, job.name, job.task, flat, f"evaluation/{_name(job.spec.target_metric)}", job.submitted_at)


def _flat(prefix: str, section: Mapping[str, object]) -> Iterable[tuple[str, Setting]]:
    for name, value in section.items():
        match value:
            case dict():
                yield from _flat(f"{prefix}{name}.", value)
            case str() | int() | float():
                yield prefix + name, value
            case _:
                yield prefix + name, json.dumps(value)


class Teller:
    """Takes a job's facts in their order, and says which of them are worth a point."""

    def __init__(self) -> None:
        self._round = 0  # closed last
        self._accepted: dict[tuple[int, int], Accepted] = {}  # by round and shard; not averaged yet
        self._frozen: Frozen | None = None
        self._labels: dict[str, str] = {}  # a worker's id -> what it is called here

    def take(self, id: int, at: str, fact: Message) -> Point | None:  # noqa: A002 - the fact's name for it
        """Learn a fact; the point about it, where there is one."""
        match fact:
            case Submitted():
                words = {"task_digest": fact.task_digest} if fact.task_digest else {}
                return Point(id, fact.type, at, 0, {}, words)
            case Initialised():
                return Point(id, fact.type, at, 0, _model(fact), {"digest": fact.digest})
            case Accepted():
                self._accepted[fact.round, fact.shard] = fact
            case Late():
                self._accepted.pop((fact.round, fact.shard), None)
            case Frozen():
                self._frozen = fact
            case RoundClosed():
                self._round = fact.round
                values = {**_round(fact), **self._by_worker(self._members(fact))}
                return Point(id, fact.type, at, fact.round, values, _round_words(fact))
            case Evaluated():
                return Point(id, fact.type, at, fact.round, self._evaluation(fact), _evaluation_words(fact))
            case StateChanged():
                return Point(
                    id, fact.type, at, self._round, {}, {"state": fact.state, "reason": shown.one_line(fact.reason)}
                )
            case _:
                pass
        return None

    def _members(self, closed: RoundClosed) -> list[Accepted]:
        """The updates that a round was averaged from; they are forgotten."""
        frozen, self._frozen = self._frozen, None
        places = {(one.round, one.shard) for one in closed.late}
        if frozen is not None:
            places |= {(frozen.round, shard) for shard in frozen.shards}
            places |= {(one.round, one.shard) for one in frozen.members if not one.staleness}
        return [found for place in sorted(places) if (found := self._accepted.pop(place, None)) is not None]

    def _by_worker(self, updates: Iterable[Accepted]) -> dict[str, float]:
        """What each worker did for a round: the sums over its updates, times in seconds."""
        sums: dict[str, float] = {}
        for update in updates:
            label = self._label(update.worker, update.worker_name)
            numbers = {
                "updates": 1,
                "samples": update.samples,
                "steps": update.steps,
                "train_seconds": update.seconds,
                "seconds": update.took_s,
                "bytes_down": update.bytes_down,
                "bytes_up": update.bytes_up,
            }
            for name, number in numbers.items():
                if number is not None:
                    key = f"worker/{label}/{name}"
                    sums[key] = sums.get(key, 0) + number
        return sums

    def _evaluation(self, fact: Evaluated) -> dict[str, float]:
        values = {f"evaluation/{_name(name)}": value for name, value in fact.metrics.items()}
        values |= {
            "evaluation/samples": fact.samples,
            "evaluation/seconds": fact.seconds,
            "evaluation/best": float(fact.best),
        }
        for one in fact.workers:
            label = self._label(one.worker, one.worker_name)
            values |= {f"worker/{label}/{_name(name)}": value for name, value in one.metrics.items()}
        return values

    def _label(self, worker: str, name: str) -> str:
        """A worker's name; its id where another worker of the job has that name."""
        if worker not in self._labels:
            wanted = _name(name).replace("/", "_")
            self._labels[worker] = wanted if wanted not in self._labels.values() else worker
        return self._labels[worker]


def _model(fact: Initialised) -> dict[str, float]:
    facts = fact.facts
    return {
        "model/parameters": facts.parameters,
        "model/bytes": fact.size,
        "model/train_samples": facts.train_samples,
        "model/test_samples": facts.test_samples,
    }


def _round(fact: RoundClosed) -> dict[str, float]:
    values: dict[str, float] = {
        "round/seconds": fact.seconds,
        "round/samples": fact.samples,
        "round/workers": fact.workers,
        "round/shards": fact.shards,
        "round/left_out": fact.left_out,
        "round/absent": len(fact.absent),
        "round/late": len(fact.late),
        "round/bytes_down": fact.bytes_down,
        "round/bytes_up": fact.bytes_up,
        "round/model_bytes": fact.size,
    }
    values |= {f"train/{_name(name)}": value for name, value in fact.metrics.items()}
    if fact.amplification is not None:
        values["round/amplification"] = fact.amplification
    if fact.privacy is not None:
        values |= {"privacy/epsilon": fact.privacy.epsilon, "privacy/clip": fact.privacy.clip}
    return values


def _round_words(fact: RoundClosed) -> dict[str, str]:
    late = (f"{one.worker_name}: of round {one.round}, x {one.factor:.2f}" for one in fact.late)
    words = {
        "digest": fact.digest,
        "absent": "; ".join(map(absent_words, fact.absent)),
        "late": "; ".join(late),
        "warning": fact.warning,
    }
    return {name: shown.one_line(text) for name, text in words.items() if text}


def _evaluation_words(fact: Evaluated) -> dict[str, str]:
    silent = "; ".join(f"{one.worker_name}: {one.why}" for one in fact.workers if one.why)
    return {"not_measured": shown.one_line(silent)} if silent else {}


def _name(text: str) -> str:
    """A metric's name as every tracker takes it."""
    return _NOT_IN_A_NAME.sub("_", text)
