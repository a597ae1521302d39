"""What an update tells of its worker's pace: the samples that were trained on, and the time that went into it.

Pure. The coordinator cuts shards by it and `lydian plan` foretells rounds by it: they must mean the same by a speed.
"""

import math
from dataclasses import dataclass

from common.facts import Accepted
from common.messages import Metrics, TrainSection

LEAST_SHARE = 0.03  # of the samples; with `shards = "auto"` and iid data, a worker with less only evaluates
SHORTEST_S, LONGEST_S = 1e-6, 1e9  # a training of another length was not measured but made up


@dataclass(frozen=True)
class Took:
    """What one update took."""

    samples: int  # every pass counted
    training_s: float
    overhead_s: float | None


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
