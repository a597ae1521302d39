"""Client-drift methods, in blocks: what a shard adds to each gradient, and what it carries to its next round.

    slot z_k        what shard k carries: SCAFFOLD's control variate c_k, FedDyn's h_k; zeros before its first update
    total           Σ z_k over all N shards of the job, not only those of a round
    correction d    added to every gradient of a round: total / N − z_k (SCAFFOLD); −z_k (FedDyn)
    change Δ        what the shard's training made of the model: y − x
    weight w        1 / Σ of the steps' learning rates, which is 1 / (K η) where they are equal (SCAFFOLD); α (FedDyn)

    z_k ← −d − w Δ                both methods

Written out that is SCAFFOLD's option II, c_k ← c_k − c + (x − y) / (K η), and FedDyn's h_k ← h_k − α (θ_k − θ). Since d
is what the steps were corrected by, SCAFFOLD's slot is the mean gradient of the shard on its way, whatever d was. The
coordinator computes it from the update that it averages, so no worker can say one thing in its update and another
in its slot, and nothing but the update travels up.

Pure: float32 and float64 blocks in, blocks out. Every operation is one IEEE operation an element in float64, rounded to
float32 once: two machines come to the same bytes.

Source: Karimireddy et al. 2019, arXiv 1910.06378, algorithm 1; Acar et al. 2021, arXiv 2111.04263, algorithm 1.
"""

from collections.abc import Iterable
from typing import Literal

import numpy as np
import numpy.typing as npt

from common.errors import BadUpdateError
from common.messages import REFERENCE_BATCH, JobSpec, TrainSection

Method = Literal["scaffold", "feddyn"]
Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]

ALPHA = 0.01  # of FedDyn, unless the job says another
FARTHEST = 1e30  # of a change times its weight: float32 holds the sum of a hundred million of them
LARGEST_BATCH = 256  # samples a step that a probe finds at most (worker/task_batches.py): lr follows it
SLACK = 1e-6  # of a sum of rates, for its rounding


def alpha_of(train: TrainSection) -> float:
    """FedDyn's α."""
    return ALPHA if train.dyn_alpha is None else train.dyn_alpha


def needs_total(method: Method) -> bool:
    """Whether a worker needs the sum of all slots."""
    return method == "scaffold"


def check_rate_sum(spec: JobSpec, rate_sum: float | None, steps: int) -> None:
    """Refuse a sum of learning rates that steps of this job cannot have.

    Raises:
        BadUpdateError: bad_rate_sum, it is missing, not above zero or too large.
    """
    train = spec.train
    if train.drift != "scaffold":
        return
    lr = spec.config.get("lr", train.lr)  # [config] goes before [train] in what the child is told
    scale = LARGEST_BATCH / REFERENCE_BATCH if train.batch_size == "auto" else 1.0
    most = (lr if isinstance(lr, int | float) else train.lr) * scale * steps * (1 + SLACK)
    if rate_sum is None or not 0 < rate_sum <= most:
        said = "no sum of learning rates" if rate_sum is None else f"{rate_sum:.6g} as the sum of its learning rates"
        sentence = f"the update says {said}, where {steps} steps of this job have at most {most:.6g}, and more than 0"
        advice = "Is the worker of the coordinator's version? The update was not used."
        raise BadUpdateError(sentence, code="bad_rate_sum", advice=advice)


def weight_of(train: TrainSection, rate_sum: float | None) -> float:
    """What a change counts in the shard's slot: 1 over the sum of its steps' rates, or α.

    Args:
        train: with a method.
        rate_sum: of the update; scaffold: has passed `check_rate_sum`.
    """
    if train.drift == "scaffold":
        assert rate_sum is not None  # noqa: S101 - checked when the update came
        return 1.0 / rate_sum
    return alpha_of(train)


def farthest(train: TrainSection, rate_sum: float | None) -> float:
    """How far an update may be from its base (L2), so that its slot stays far from what float32 cannot hold."""
    return FARTHEST / weight_of(train, rate_sum)


def correction(method: Method, slot: Float32s, total: Float32s, shards: int) -> Float32s:
    """What a shard adds to every gradient of a round.

    Args:
        method: of the job.
        slot: float32 (n,), z_k.
        total: float32 (n,), the sum of all slots; feddyn: not looked at.
        shards: N.

    Returns:
        float32 (n,).
    """
    wide = slot.astype(np.float64)
    if method == "feddyn":
        return np.negative(wide).astype(np.float32)
    mean = np.divide(total, float(shards), dtype=np.float64)
    return np.subtract(mean, wide, out=mean).astype(np.float32)


def next_slot(correction: Float32s, change: Float64s, weight: float) -> Float32s:
    """What a shard carries after an update that counts: −d − w Δ.

    Args:
        correction: float32 (n,), d: what its steps were corrected by.
        change: float64 (n,), Δ = y − x; overwritten.
        weight: w.

    Returns:
        float32 (n,); infinite where float32 cannot hold it.
    """
    np.multiply(change, -weight, out=change)
    np.subtract(change, correction, out=change)
    with np.errstate(over="ignore"):
        return change.astype(np.float32)


def next_total(
    total: Float32s, rest: Float32s, slots: Iterable[tuple[Float32s, Float32s]]
) -> tuple[Float32s, Float32s]:
    """The sum of all slots after a round, as two float32: the nearest, and what of the sum that leaves out.

    Together they hold 48 bits of it, so that the sum is that of the slots' files also after very many rounds; alone,
    the first would take up a rounding in each of them.

    Args:
        total: float32 (n,), the first number before the round.
        rest: float32 (n,), the second.
        slots: (before, after) of each shard of the round, in the order of the shards; float32 (n,).

    Returns:
        both numbers after the round; not finite where float32 cannot hold the sum.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.add(total, rest, dtype=np.float64)
        for before, after in slots:
            np.add(exact, after, out=exact)
            np.subtract(exact, before, out=exact)
        total = exact.astype(np.float32)
        return total, np.subtract(exact, total, out=exact).astype(np.float32)
