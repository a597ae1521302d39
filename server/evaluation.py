"""Measuring the models of closed rounds: by one worker for all, or by each on its own data; and when to stop for it.

Pure. An evaluation goes beside the rounds, which do not wait for it. With `evaluation.scope = workers` it has a part
for each worker that was there when the round closed, which nobody else can do; it is over when every part has its
numbers, or words for why there are none.

    round closed ──▶ Evaluation ──a part each──▶ Measured … ──the last of them──▶ Evaluated | EvaluationGivenUp
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from common.facts import Measured, WorkerMeasured
from common.messages import JobSpec, ModelRef

T = TypeVar("T")

NO_DATA = "it has no test data of its own"
NO_NUMBER = "what it measured is no finite number"


@dataclass(frozen=True)
class Evaluation(Generic[T]):
    """A model that is to be measured, whatever the rounds do meanwhile."""

    model: ModelRef
    workers: tuple[str, ...] = ()  # ids of those who measure it on their own data; none: anybody, once for all
    tries: Mapping[int, T] = field(default_factory=dict)  # part -> what became of the attempts at it
    measured: Mapping[int, Measured] = field(default_factory=dict)  # part -> what came of it

    @property
    def open_parts(self) -> list[int]:
        """The parts of which nothing has come yet."""
        return [part for part in range(max(len(self.workers), 1)) if part not in self.measured]

    def parts_for(self, worker: str) -> list[int]:
        """Those of them that this worker may do."""
        return [part for part in self.open_parts if not self.workers or self.workers[part] == worker]


def absent(
    round_index: int,
    evaluation: Evaluation[T],
    live: Collection[str],
    excluded: Mapping[str, str],
    held: Collection[int],
    attempts: Mapping[int, int],
) -> Iterator[Measured]:
    """The parts that nobody will do any more, as given up.

    Args:
        round_index: whose model it is.
        evaluation: of workers.
        live: ids of the workers that may get work.
        excluded: worker id -> why it cannot do the job.
        held: parts that some worker holds.
        attempts: part -> its newest attempt.
    """
    for part in evaluation.open_parts if evaluation.workers else []:
        worker = evaluation.workers[part]
        if part in held or (worker in live and worker not in excluded):
            continue
        why = excluded.get(worker, "it was gone, or took no work, before it had measured")
        yield without_numbers(round_index, part, attempts.get(part, 0), worker, worker, why)


def without_numbers(round_index: int, part: int, attempt: int, worker: str, worker_name: str, why: str) -> Measured:
    """A part without numbers."""
    return Measured(round=round_index, shard=part, attempt=attempt, worker=worker, worker_name=worker_name, why=why)


def by_worker(parts: Iterable[Measured]) -> tuple[WorkerMeasured, ...]:
    """What each worker's data says of the model, in the order of the parts."""
    return tuple(
        WorkerMeasured(
            worker=part.worker,
            worker_name=part.worker_name,
            attempt=part.attempt,
            metrics={name: total / count for name, (total, count) in part.metrics.items() if count > 0},
            samples=part.samples,
            why=part.why,
        )
        for part in sorted(parts, key=lambda part: part.shard)
    )


def why_nothing(samples: int, metrics: Collection[str]) -> str:
    """Why a worker that measured so many samples has no numbers; empty: it has some."""
    return "" if metrics else NO_NUMBER if samples else NO_DATA


def is_repeat(known: Iterable[Measured | WorkerMeasured], attempt: int, worker: str) -> bool:
    """Whether this attempt of this worker was handed in before, be it without numbers; and not given up."""
    handed_in = (one for one in known if one.why in ("", NO_DATA, NO_NUMBER))
    return any((one.attempt, one.worker) == (attempt, worker) for one in handed_in)


# ---------------------------------------------------------------- stopping early


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of this metric is the better one."""
    return any(word in metric.lower() for word in ("loss", "error", "perplexity"))


def is_better(metric: str, value: float, than: float | None, *, by: float = 0.0) -> bool:
    """Whether a value is better than another by more than that; than none, any number is."""
    if than is None:
        return not math.isnan(value)
    return than - value > by if lower_is_better(metric) else value - than > by


def stale_after(spec: JobSpec, stale: int, reference: float | None, value: float | None) -> int:
    """Evaluations in a row without a better value of the target metric, once there is one more.

    Args:
        spec: the job's.
        stale: before it.
        reference: the last value that was better than all before it by more than min_delta; None: there was none.
        value: of the evaluation; None: it has none, or one that is no finite number.
    """
    better = value is not None and is_better(spec.target_metric, value, reference, by=spec.evaluation.min_delta)
    return 0 if better else stale + 1


def why_stop(
    spec: JobSpec, round_index: int, stale: int, reference: float | None, best_round: int | None, names: Iterable[str]
) -> str:
    """Why the job ends, in words; empty: it goes on.

    Args:
        spec: the job's.
        round_index: whose evaluation came.
        stale: with it, as `stale_after` says.
        reference: see there.
        best_round: the round whose model measured best, this one looked at.
        names: of the metrics that it has.
    """
    patience, metric = spec.evaluation.patience, spec.target_metric
    if patience is None or stale < patience:
        return ""
    times = f"{stale} evaluation{'' if stale == 1 else 's'}"
    if reference is None:
        found = ", ".join(sorted(names)) or "nothing"
        return f"stopped early at round {round_index}: {times} without {metric}; measured was {found}"
    by = f" by more than {spec.evaluation.min_delta:g}" if spec.evaluation.min_delta else ""
    return (
        f"stopped early at round {round_index}: {metric} was not better than {reference:.4f}{by} in {times}; "
        f"the best model is that of round {best_round}"
    )
