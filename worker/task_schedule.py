"""The learning rate over the steps of a whole job.

Part of the child (worker/task_host.py), which loads it by its path: nothing but the standard library. Pure.

    1 ┤   ┌────────── constant          The step is that of the whole job, so that no round begins
      │  ╱ ╲╲___      linear, cosine    anew, whoever trains it and however often it was started.
    0 ┤ ╱warm-up ╲╲_
"""

import math
from collections.abc import Sequence

GAMMA = 0.1  # what `step` multiplies with, unless the job says otherwise


def lr_factor(
    step: int, *, schedule: str, warmup: int, total: int, milestones: Sequence[int] = (), gamma: float = GAMMA
) -> float:
    """What the learning rate is multiplied with in one step: a straight line up to 1, then as the schedule has it.

    Args:
        step: of the whole job, from 0.
        schedule: `constant` stays at 1; `linear` and `cosine` fall from the end of the warm-up to 0 at the end of the
            job; `step` is gamma to the power of the milestones that were reached.
        warmup: steps of the line; the first has 1 / warmup, the last 1.
        total: steps of the whole job.
        milestones: steps of the whole job, those of the warm-up counted in.
        gamma: see `step`.

    Source: Loshchilov, Hutter 2016, arXiv 1608.03983, equation 5, without restarts (cosine); Goyal et al. 2017, arXiv
    1706.02677, section 2.2 (warm-up) and 5.1 (step).
    """
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if schedule == "linear":
        return 1.0 - done
    if schedule == "step":
        return float(gamma ** sum(step >= milestone for milestone in milestones))
    return 1.0
