"""The robust rules that a job can choose between, and how many updates each of them needs.

Pure: names and numbers. The rules themselves are arithmetic of the coordinator (server.robust_rules).
"""

from typing import Literal

Robust = Literal["none", "clip", "trimmed", "median", "krum", "multikrum", "bulyan", "rfa", "centered_clip"]

CUTTING = frozenset({"clip", "centered_clip"})
"""The rules that cut a change to a norm."""
WEIGHING: frozenset[str] = frozenset({"fednova"})
"""Outer steps that weigh each update by the work behind it, and so have no use for a rule that gives each one voice."""
_NEEDS = {"krum": (2, 3), "multikrum": (2, 3), "bulyan": (4, 3)}
_MAJORITY = (2, 1)


def least_updates(rule: Robust, faulty: int, clip_norm: float | None) -> int:
    """How many updates a round needs for its rule to hold against `faulty` bad ones.

    Median, trimmed mean and geometric median need an honest majority, and so does what is cut to the median of the
    round's norms; a norm that the job fixes itself bounds every update, however few there are.

    Source: Yin et al. 2018, arXiv 1803.01498 (median, trimmed: n > 2f); Blanchard et al. 2017, arXiv 1703.02757 (Krum:
    n >= 2f + 3); El Mhamdi et al. 2018, arXiv 1802.07927 (Bulyan: n >= 4f + 3); Pillutla et al. 2019, arXiv 1912.13445
    (geometric median: less than half).
    """
    if rule == "none" or (rule in CUTTING and clip_norm is not None):
        return 1
    times, more = _NEEDS.get(rule, _MAJORITY)
    return times * faulty + more
