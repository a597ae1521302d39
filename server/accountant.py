"""What private rounds have cost: a process of its own that reads one question on stdin and answers on stdout.

    python -m server.accountant   {"sample": q, "noise": z, "delta": δ, "rounds": [1, 2, …], "most": N, "budget": ε}
                                  {"spent": [[round, ε, ε by RDP], …], "affordable": n}

A process, since the library takes seconds to load, and an answer keeps one core busy for about as long. It imports
dp-accounting (the extra `privacy`), which nothing else does.

Each round is one Gaussian mechanism on a Poisson sample, for neighbours that differ by one member added or removed.
Epsilon is that of the privacy loss distribution (PLD), an upper bound that is nearly tight; the one of Rényi
divergences (RDP) is told beside it. Where RDP says more than MEANINGLESS it is told for both: a distribution that wide
takes gigabytes, to refine a number that promises nothing.

Sources: Koskela et al. 2020, arXiv 1906.03049; Doroshenko et al. 2022, arXiv 2207.04380 (PLD); Mironov et al. 2019,
arXiv 1908.10530 (RDP).
"""

import functools
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

MEANINGLESS = 100.0  # epsilon
FEW_ROUNDS, COARSE, FINE = 500, 1e-3, 1e-4  # of a PLD: up to so many rounds the coarse grid does, ten times as fast
NICENESS = 10  # training and averaging go first


def epsilons(sample: float, noise: float, delta: float, rounds: int) -> tuple[float, float]:
    """Epsilon of so many rounds, by PLD and by RDP.

    Args:
        sample: q, above 0 and at most 1.
        noise: z, above 0.
        delta: above 0 and below 1.
        rounds: at least 1.
    """
    import dp_accounting
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    one = dp_accounting.PoissonSampledDpEvent(sample, dp_accounting.GaussianDpEvent(noise))
    event = dp_accounting.SelfComposedDpEvent(one, rounds)
    by_rdp = float(RdpAccountant().compose(event).get_epsilon(delta))
    if not by_rdp <= MEANINGLESS:
        return by_rdp, by_rdp
    grid = COARSE if rounds <= FEW_ROUNDS else FINE  # either rounds up
    by_pld = PLDAccountant(value_discretization_interval=grid).compose(event).get_epsilon(delta)
    return float(by_pld), by_rdp


def affordable(epsilon: Callable[[int], float], most: int, budget: float) -> int:
    """The most rounds up to `most` whose epsilon is within the budget; 0: not even one. Epsilon rises with rounds."""
    if epsilon(most) <= budget:
        return most
    within, beyond = 0, most
    while beyond - within > 1:
        middle = (within + beyond) // 2
        within, beyond = (middle, beyond) if epsilon(middle) <= budget else (within, middle)
    return within


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """What is asked for on stdin."""
    sample, noise, delta = question["sample"], question["noise"], question["delta"]
    known = functools.cache(lambda rounds: epsilons(sample, noise, delta, rounds))
    found: dict[str, Any] = {}
    if question.get("budget") is not None:
        found["affordable"] = affordable(lambda rounds: known(rounds)[0], question["most"], question["budget"])
    found["spent"] = [[rounds, *known(rounds)] for rounds in question["rounds"]]
    return found


def main() -> int:
    """Answer one question. Returns the exit code."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    logging.disable(logging.WARNING)  # "failed to converge" is said of orders that are then left out: harmless
    question = json.load(sys.stdin)
    sys.stdout.write(json.dumps(answer(question)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
