"""How fast each worker has been at each job: what was measured of the updates that count.

Pure: facts in, numbers out. A restarted coordinator reads the same facts again, and so knows the same. An update tells

    rate      samples a second of training, every pass over the shard counted
    overhead  seconds from the hand-out to the hand-in without the training: transfers, loading, waiting; None where
              the coordinator did not see both ends

The rate is a moving average, so that one bad round moves little. The last updates are kept one by one beside it: what
is expected of a worker follows from how they spread (server.deadlines).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from common.facts import Accepted
from common.messages import JobSpec, TrainSection
from common.pace import Took, processed, took_of

ALPHA = 0.3  # weight of the newest update in a moving average
REMEMBERED = 20  # updates of a worker that are kept one by one


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
