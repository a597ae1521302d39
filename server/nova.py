"""FedNova: updates that come of unequally many steps, joined as if each had come of the same number.

Pure. Whoever trains five times as many steps changes the model about five times as far, and a mean of such changes
follows the one with the most steps: what the model converges to is the minimum of another loss than was asked for.
FedNova takes the mean of the changes *a step*, and goes as many steps as there were on the mean:

    d_k = (x − x_k) / ‖a_k‖₁     τ = Σ p_k ‖a_k‖₁     x <- x − τ Σ p_k d_k     with p_k = n_k / N

‖a_k‖₁ is what the gradients of one update add up to, in plain steps of SGD. In the average this is a mean with the
weights n_k / ‖a_k‖₁, and an outer step that takes the mean change times τ Σ p_k / ‖a_k‖₁. Only trained tensors are
joined so: of buffers, whose size does not grow with the steps, the mean by samples is right.

Source: Wang, Liu, Liang, Joshi, Poor 2020, arXiv 2007.07481, equations 9 to 11, and section 4 for the three ‖a‖₁.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.errors import BadUpdateError
from common.messages import JobSpec, TrainSection

_OWN = re.compile(r"^(?:async +)?def +(optimizer|train)\b|^(optimizer|train) *=(?!=)", re.MULTILINE)


@dataclass(frozen=True)
class Weighing:
    """How the updates of one round are joined."""

    weights: tuple[float, ...]  # of each in the mean; those of equal steps are as their samples
    scale: float  # of the mean change


def steps_of(train: TrainSection, steps: int) -> float:
    """‖a‖₁: what the gradients of this many local steps add up to, in plain steps of SGD.

    Args:
        train: by SGD, with momentum that begins at 0, or with a proximal term, but not both (JobSpec refuses that).
        steps: τ, at least 1. Weight decay counts as part of the gradient.
    """
    rho, alpha = train.momentum, train.lr * train.proximal
    if alpha > 0:  # a step forgets this share of the way so far; so written, since (1 − α)^τ would lose a small α
        return -math.expm1(steps * math.log1p(-alpha)) / alpha
    if rho > 0:
        return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
    return float(steps)


def weigh(train: TrainSection, updates: Sequence[tuple[int, int]]) -> Weighing:
    """How the updates of a round are joined.

    Where all have the same number of steps, the weights are the samples and the scale is 1, exactly: FedAvg.

    Args:
        train: the job's.
        updates: (samples, steps) of each, at least one; both at least 1.
    """
    lengths = [steps_of(train, steps) for _, steps in updates]
    longest = max(lengths)
    weights = tuple(samples * (longest / length) for (samples, _), length in zip(updates, lengths, strict=True))
    total = math.fsum(samples for samples, _ in updates)
    effective = math.fsum(samples * (length / longest) for (samples, _), length in zip(updates, lengths, strict=True))
    return Weighing(weights, (effective / total) * (math.fsum(weights) / total))


def check_steps(train: TrainSection, samples: int, steps: int) -> None:
    """Refuse a number of steps that cannot have been: an update weighs the more, the fewer it says it took.

    A round of seconds has no number of its own: there, at least one step is all that is known.

    Raises:
        BadUpdateError: bad_steps, with what would have been possible.
    """
    least, most = 1, None
    if train.local_steps is not None:
        least = most = train.local_steps
    elif train.local_seconds is None:  # a last batch of one sample may have joined the one before it
        passes, batch = train.local_epochs or 1, train.usual_batch
        least, most = passes * max(samples // batch, 1), passes * math.ceil(samples / batch)
    if steps < least or (most is not None and steps > most):
        possible = f"at least {least}" if most is None else str(most) if least == most else f"{least} to {most}"
        raise BadUpdateError(
            f"the update says it took {steps} steps on {samples} samples, where {possible} are possible",
            code="bad_steps",
            advice="Does the worker run the task of this job, unchanged? The update was not used.",
        )


def why_not(spec: JobSpec, source: Callable[[], str]) -> str:
    """Why a task cannot be trained with fednova, by its text: a loop or an optimiser of its own; empty: none is seen.

    The text is asked for only with fednova; it is searched and not parsed: no input can take the coordinator's memory
    or stack.
    """
    found = _OWN.search(source()) if spec.aggregation.algorithm == "fednova" else None
    if found is None:
        return ""
    name = found[1] or found[2]
    return f"the task {spec.task} has {name}() of its own, and fednova weighs updates by the steps of plain SGD"
