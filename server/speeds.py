"""How fast each worker has been at each job: what was measured of the updates that count.

Pure: facts in, numbers out. A restarted coordinator reads the same facts again, and so knows the same. An update tells

    rate      samples a second of training, every pass over the shard counted
    overhead  seconds from the hand-out to the hand-in without the training: transfers, loading, waiting; None where
              the coordinator did not see both ends

The rate is a moving average, so that one bad round moves little. The last updates are kept one by one beside it: what
is expected of a worker follows from how they spread (server.deadlines).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from common.facts import Accepted
from common.messages import JobSpec, Metrics, TrainSection

ALPHA = 0.3  # weight of the newest update in a moving average
REMEMBERED = 20  # updates of a worker that are kept one by one
SHORTEST_S, LONGEST_S = 1e-6, 1e9  # a training of another length was not measured but made up


@dataclass(frozen=True)
class Took:
    """What one update took."""

    samples: int  # every pass counted
    training_s: float
    overhead_s: float | None


@dataclass(frozen=True)
class Measured:
    """What is known of one worker at one job."""

    rate: float  # samples/s
    round: int  # of its newest update
    updates: tuple[Took, ...]  # the newest last


@dataclass
class Speeds:
    """The measured speeds of every worker at every job that goes on, and what ended jobs have left to know."""

    jobs: dict[str, dict[str, Measured]] = field(default_factory=dict)  # job -> worker id -> what was measured
    earlier: dict[str, dict[str, float]] = field(default_factory=dict)  # work -> worker id -> the last known rate

    def note(self, job: str, work: str, spec: JobSpec, update: Accepted) -> None:
        """Learn from an update that counts."""
        took = took_of(spec.train, update)
        if took is None:
            return
        known = self.jobs.setdefault(job, {})
        before = known.get(update.worker)
        old = before.rate if before is not None else self.earlier.get(work, {}).get(update.worker)
        new = took.samples / took.training_s
        rate = new if old is None else old + ALPHA * (new - old)
        updates = (*(before.updates if before is not None else ()), took)[-REMEMBERED:]
        known[update.worker] = Measured(rate, update.round, updates)
        self.earlier.setdefault(work, {})[update.worker] = rate

    def of(self, job: str, worker: str) -> Measured | None:
        """What was measured of a worker at this job."""
        return self.jobs.get(job, {}).get(worker)

    def rate(self, job: str, work: str, worker: str) -> float | None:
        """Samples/s to reckon with: measured at this job, else at an earlier one of the same work; None: unknown.

        A worker that measures itself before it trains belongs between the two.
        """
        measured = self.of(job, worker)
        return measured.rate if measured is not None else self.earlier.get(work, {}).get(worker)

    def forget(self, job: str) -> None:
        """The job is over. What it taught of its work stays."""
        self.jobs.pop(job, None)


def work_of(spec: JobSpec, task_digest: str | None) -> str:
    """Names the work of a job: jobs with one name have the same samples, model and batches, hence the same speeds."""
    return json.dumps([spec.task, task_digest, spec.train.batch_size, spec.config], sort_keys=True)


def took_of(train: TrainSection, update: Accepted) -> Took | None:
    """What an update took; None where its worker names no time in which anything could be trained."""
    seconds = min(update.seconds, update.took_s or update.seconds)
    if not SHORTEST_S <= seconds <= LONGEST_S:
        return None
    samples = processed(train, update.samples, update.steps, update.metrics)
    return Took(samples, seconds, None if update.took_s is None else update.took_s - seconds)


def processed(train: TrainSection, samples: int, steps: int, metrics: Metrics) -> int:
    """The samples that a training went through, at least one, every pass counted.

    By epochs that is known. By steps or seconds it is the count behind the mean of the training loss, or without one,
    as many passes as the steps make.

    Args:
        train: what the job asked for.
        samples: in the shard.
        steps: that were taken.
        metrics: of the update: (sum, count) by name.
    """
    if train.local_steps is None and train.local_seconds is None:
        return max(samples * (train.local_epochs or 1), 1)
    count = metrics.get("train_loss", (0.0, 0.0))[1]
    if not (math.isfinite(count) and count >= 1):
        count = samples * steps / math.ceil(max(samples, 1) / train.usual_batch)
    return max(int(count), 1)


def ahead(train: TrainSection, samples: int | None) -> int | None:
    """The samples that a worker will go through with a shard of so many, every pass counted.

    None: its time does not follow from that, but from the job's steps or seconds; or only the worker knows its data.
    """
    if samples is None or train.local_steps is not None or train.local_seconds is not None:
        return None
    return samples * (train.local_epochs or 1)


def counted(spec: JobSpec, samples: int, steps: int, metrics: Mapping[str, tuple[float, float]]) -> int:
    """The samples that an update weighs in the average.

    The shard's; where the time is set and every shard is a random part of the same data, at most those that were
    trained on: a worker that came through half of its shard counts for half of it. Private or skewed data is never
    weighed by what was done with it, or the classes of a slow worker would vanish from the model.
    """
    if spec.train.local_seconds is None or spec.data.partition != "iid":
        return samples
    return min(samples, processed(spec.train, samples, steps, dict(metrics)))
