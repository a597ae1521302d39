"""How far an outer step moves the model, in lengths of what the workers found, and whether that runs away.

Pure. FedAvg takes the mean change as it is: 1. Momentum adds what earlier rounds found: of equal changes Nesterov makes
η (1 + μ / (1 − μ)), which is 7 at η 0.7 and μ 0.9, and more of changes that shrink faster than it forgets. A number
that rises from round to round says that the model moves by what was true earlier, and less and less by what the workers
find now.
"""

import itertools
import math
from collections.abc import Sequence

ROUNDS = 4  # that are looked at: three rises
GROWTH = 2.0  # over them


def amplification(moved: float, change: float) -> float | None:
    """‖x_{t+1} − x_t‖ / ‖mean change‖; None where that is no number: nothing changed, or a norm overflowed."""
    ratio = moved / change if change > 0 else math.inf
    return ratio if math.isfinite(ratio) else None


def keep(history: Sequence[float | None], newest: float | None) -> tuple[float | None, ...]:
    """The newest numbers of a job, as many as are looked at, oldest first."""
    return (*history, newest)[-ROUNDS:]


def growth(history: Sequence[float | None]) -> str:
    """What to say where it grows: in each of the last three rounds, and to twice as much in all; empty: it does not.

    Args:
        history: the newest number of a job and those before it, oldest first.
    """
    known = [value for value in history[-ROUNDS:] if value is not None]
    rises = all(before < after for before, after in itertools.pairwise(known))
    if len(known) < ROUNDS or not rises or known[-1] < GROWTH * known[0]:
        return ""
    return (
        f"the outer step moved the model {known[-1]:.3g} times as far as the workers' mean change, "
        f"{known[0]:.3g} times {ROUNDS - 1} rounds before: if the loss rises, lower aggregation.outer_lr or momentum"
    )
