"""An outer step of your own: every number moves by the same length, in the direction that momentum points to.

What a step is: a frozen dataclass with three things. `states` says how many numbers it remembers for each number of the
model, `wants_base` whether it looks at the model that the round began with, and `apply` is its rule, for one block of
numbers at a time. Reading, threads, files, crashes and the order of updates are not its affair.

    python examples/extending/sign_momentum.py

To have it in jobs: the class into server/optimizers.py and `"signum": SignMomentum` into STEPS there; in
common/messages.py `"signum": ("outer_lr", "outer_momentum")` into OUTER_KEYS, and the name into the choices of
AggregationSection.algorithm.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.averaging import Float64Block, weighted_mean
from server.optimizers import FedAvg, OuterStep


@dataclass(frozen=True)
class SignMomentum:
    """Momentum over the mean change Δ = mean − base, of which only the sign counts.

        m <- β m + (1 − β) Δ;  x <- x + η sign(m)

    Source: Bernstein et al. 2018, arXiv 1802.04434, algorithm 2 (Signum), over the mean change instead of a gradient.
    """

    states = 1  # the momentum m
    wants_base = True

    lr: float = 0.01
    momentum: float = 0.9

    def apply(self, base: Float64Block, mean: Float64Block, states: Sequence[Float64Block]) -> Float64Block:
        """One step. What is in `states` afterwards is there again in the next round."""
        (velocity,) = states
        velocity *= self.momentum
        velocity += (1.0 - self.momentum) * (mean - base)
        return base + self.lr * np.sign(velocity)


def play(step: OuterStep, rounds: int) -> list[float]:
    """How far the model is from the optimum after each round: two workers, whose data pull to two sides of it.

    Args:
        step: the outer step.
        rounds: how many; in each, both workers go a tenth of the way to where their own data lie.
    """
    model, states = np.array([1.0, -1.0, 0.5]), [np.zeros(3) for _ in range(step.states)]
    pulls, samples = (np.array([0.3, 0.1, -0.2]), np.array([-0.1, -0.3, 0.2])), (300, 100)
    optimum = weighted_mean(pulls, samples)
    distances = []
    for _ in range(rounds):
        updates = [model + 0.1 * (pull - model) for pull in pulls]
        model = step.apply(model.copy(), weighted_mean(updates, samples), states).copy()
        distances.append(float(np.linalg.norm(model - optimum)))
    return distances


if __name__ == "__main__":
    for name, step in {"fedavg": FedAvg(), "sign momentum": SignMomentum(lr=0.05)}.items():
        shown = " ".join(f"{distance:.3f}" for distance in play(step, 40)[::5])
        print(f"{name}: {shown}")
