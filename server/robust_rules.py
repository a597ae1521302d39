"""Robust rules: how the changes of a round become one that a few bad updates cannot turn.

Pure: float64 in, float64 out; positions stand for updates, in the order of the shards. Every rule comes to one of two
plans, and is then carried out block by block as a mean would be:

    clip, krum, multikrum, rfa, centered_clip ──▶ Weighted   a number for each update, Σ w_k Δ_k
    median, trimmed, bulyan                   ──▶ Ordered    element by element, from the sorted values

What a plan is decided from are distances, which a `Measure` finds in passes over the files (server.surveying). They are
those of changes, by differences: the usual ‖a‖² + ‖b‖² − 2ab on weights is noise where a change is small beside them.

Every update has one voice, whatever samples it claims; only `clip`, which is a mean, weighs by samples, and by no more
than their median. Ties go to the lowest shard. What is not trained (buffers, counters, masks) takes the median of the
updates that the plan kept (`middle`, or the majority): a rule that left it to a mean would let one bad update ruin a
BatchNorm.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from common.messages import AggregationSection
from common.robustness import Robust, least_updates

Float64s = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

FARTHEST = 1e290  # squared distances are cut to it: float64 weights can overflow, and infinity would make NaN
PASSES = 100  # of Weiszfeld's algorithm at most; they cost nothing, see `geometric_median`
SETTLED = 1e-12  # a pass that moves no weight further is the last
SMOOTH = 1e-6  # distances below this share of a usual one are taken for it, so that nothing is divided by zero
CENTRINGS = 3  # passes of centred clipping; each reads all updates


@dataclass(frozen=True)
class Rule:
    """What a job asks for under `[aggregation]`."""

    name: Robust
    faulty: int = 1
    clip_norm: float | None = None

    @property
    def states(self) -> int:
        """Numbers that are remembered for each element from round to round: the centre of centred clipping."""
        return int(self.name == "centered_clip")

    def check(self, updates: int) -> None:
        """Make sure that there are enough updates.

        Raises:
            ValueError: there are not.
        """
        needs = least_updates(self.name, self.faulty, self.clip_norm)
        if updates < needs:
            raise ValueError(f"{self.name} against {self.faulty} bad updates needs {needs}, and there are {updates}")


def rule_of(section: AggregationSection) -> Rule | None:
    """The robust rule that a job asks for; None: none."""
    return None if section.robust == "none" else Rule(section.robust, section.faulty or 1, section.clip_norm)


class Measure(Protocol):
    """Distances between the changes of a round. Each call is a pass over all updates."""

    def pairs(self) -> Float64s:
        """Shape (n, n): ‖Δ_i − Δ_j‖², symmetric, at most FARTHEST."""
        ...

    def from_point(self, weights: Sequence[float], of_centre: float) -> Float64s:
        """Shape (n,): ‖Δ_i − z‖² with z = Σ weights_k Δ_k + of_centre · (what is remembered), at most FARTHEST."""
        ...


@dataclass(frozen=True)
class Weighted:
    """The change is Σ w_k Δ_k, and `of_centre` times what is remembered."""

    weights: tuple[float, ...]  # one an update
    of_centre: float = 0.0

    @property
    def members(self) -> tuple[int, ...]:
        """The updates that have a say."""
        return tuple(at for at, weight in enumerate(self.weights) if weight != 0)


@dataclass(frozen=True)
class Ordered:
    """Every element of the change is the mean of some of its values, by their order."""

    members: tuple[int, ...]  # the updates whose values are looked at
    trimmed: int = 0  # how many of the largest, and of the smallest, are left out
    nearest: int | None = None  # instead: how many of those nearest to the median are kept

    def join(self, rows: Float64s) -> Float64s:
        """The values of one block.

        Args:
            rows: shape (members, n).

        Returns:
            shape (n,).
        """
        return trimmed_mean(rows, self.trimmed) if self.nearest is None else nearest_mean(rows, self.nearest)


Plan = Weighted | Ordered


def decide(rule: Rule, samples: Sequence[int], measure: Measure) -> Plan:
    """How the updates of a round are joined.

    Args:
        rule: the job's.
        samples: of each update, in the order of the shards.
        measure: their distances.

    Raises:
        ValueError: too few updates.
    """
    count, bad = len(samples), rule.faulty
    rule.check(count)
    everyone = tuple(range(count))
    match rule.name:
        case "clip":
            return Weighted(clip(np.sqrt(measure.from_point([0.0] * count, 0.0)), samples, rule.clip_norm))
        case "median":
            return Ordered(everyone, trimmed=(count - 1) // 2)
        case "trimmed":
            return Ordered(everyone, trimmed=bad)
        case "krum":
            return Weighted(_equal(krum(measure.pairs(), bad, 1), count))
        case "multikrum":
            return Weighted(_equal(krum(measure.pairs(), bad, count - bad - 2), count))
        case "bulyan":
            return Ordered(bulyan(measure.pairs(), bad), nearest=count - 4 * bad)
        case "rfa":
            return Weighted(geometric_median(measure.pairs()))
        case "centered_clip":
            return centred(count, rule.clip_norm, measure)
        case _:
            raise ValueError(f"{rule.name} is no robust rule")


def _equal(chosen: Sequence[int], count: int) -> tuple[float, ...]:
    return tuple(1 / len(chosen) if at in chosen else 0.0 for at in range(count))


# ---------------------------------------------------------------- element by element


def trimmed_mean(rows: Float64s, trim: int) -> Float64s:
    """For each element the mean of its values without the `trim` largest and the `trim` smallest.

    With trim = (k − 1) // 2 it is the median: the middle value, or the mean of the middle two.

    Args:
        rows: shape (k, n), k > 2 · trim.
        trim: at least 0.

    Returns:
        shape (n,).

    Source: Yin et al. 2018, arXiv 1803.01498, definitions 1 and 2.
    """
    return _mean(np.sort(rows, axis=0)[trim : len(rows) - trim])


def nearest_mean(rows: Float64s, keep: int) -> Float64s:
    """For each element the mean of the `keep` values that are nearest to its median; of equals, the lowest shards'.

    Args:
        rows: shape (k, n), k >= keep.
        keep: at least 1.

    Returns:
        shape (n,).

    Source: El Mhamdi et al. 2018, arXiv 1802.07927, section 4, second step of Bulyan.
    """
    away = np.abs(rows - trimmed_mean(rows, (len(rows) - 1) // 2))
    nearest = np.argsort(away, axis=0, kind="stable")[:keep]
    return _mean(np.take_along_axis(rows, nearest, axis=0))


def _mean(rows: Float64s) -> Float64s:
    """Row after row, so that the order of summation is said and not numpy's."""
    total = rows[0].copy()
    with np.errstate(over="ignore", invalid="ignore"):
        for row in rows[1:]:
            np.add(total, row, out=total)
        return np.asarray(total / len(rows))


def middle(rows: Array) -> Array:
    """For each element of integers the middle one of its values, of two the smaller: one that some update has.

    Args:
        rows: integers of shape (k, n).

    Returns:
        shape (n,), of the same dtype.
    """
    return np.asarray(np.sort(rows, axis=0)[(len(rows) - 1) // 2])


def combination(changes: Iterable[Array], weights: Sequence[float], out: Float64s, scratch: Float64s) -> Float64s:
    """Σ w_k Δ_k of one block, in the order given.

    Args:
        changes: a block of shape (n,) for each weight, each used before the next is asked for.
        weights: what is 0 is left out, whatever the block holds.
        out: float64 of shape (n,) for the result.
        scratch: float64 of shape (n,), overwritten.
    """
    out.fill(0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        for change, weight in zip(changes, weights, strict=True):
            if weight != 0:
                np.add(out, np.multiply(change, weight, out=scratch, dtype=np.float64), out=out)
    return out


# ---------------------------------------------------------------- by distances


def krum(distances: Float64s, faulty: int, count: int) -> tuple[int, ...]:
    """The `count` updates with the lowest scores: the sum of the squared distances to the n − f − 2 nearest others.

    Args:
        distances: shape (n, n), squared.
        faulty: f.
        count: 1 is Krum; up to n − f − 2 is multi-Krum.

    Returns:
        their positions, rising; of equal scores the lowest.

    Source: Blanchard et al. 2017, arXiv 1703.02757, section 3, and section 5 for several.
    """
    every = range(len(distances))
    scores = {at: _score(distances, at, every, len(distances) - faulty - 2) for at in every}
    return tuple(sorted(sorted(every, key=lambda at: (scores[at], at))[:count]))


def _score(distances: Float64s, at: int, others: Iterable[int], neighbours: int) -> float:
    """An update is no neighbour of itself by its position, and not for its distance: a twin's is 0 as well."""
    nearest = sorted(float(distances[at, other]) for other in others if other != at)[:neighbours]
    return math.fsum(nearest)


def bulyan(distances: Float64s, faulty: int) -> tuple[int, ...]:
    """The n − 2f updates that repeated Krum picks, each time among those that are left.

    Towards the end so few are left that n' − f − 2 is no number of neighbours; one is compared with at least.

    Source: El Mhamdi et al. 2018, arXiv 1802.07927, section 4, first step.
    """
    left, chosen = list(range(len(distances))), list[int]()
    for _ in range(len(distances) - 2 * faulty):
        neighbours = max(len(left) - faulty - 2, 1)
        best = min(left, key=lambda at: (_score(distances, at, left, neighbours), at))
        left.remove(best)
        chosen.append(best)
    return tuple(sorted(chosen))


def geometric_median(distances: Float64s) -> tuple[float, ...]:
    """The weights of the point with the least sum of distances to the updates, by Weiszfeld's algorithm from the mean.

        z <- Σ b_k Δ_k / Σ b_k,   b_k = 1 / max(ν, ‖z − Δ_k‖)

    Every z is a mean of the updates with some weights c, and so its distances follow from those between the updates:
    ‖z − Δ_k‖² = (D c)_k − ½ c'D c for weights that sum to 1. No pass reads a file: there can be as many as it takes.
    ν is relative to the updates' distances: an absolute one would turn late, small changes back into their mean.

    Args:
        distances: shape (n, n), squared; n >= 2.

    Source: Pillutla et al. 2019, arXiv 1912.13445, algorithm 2 (smoothed Weiszfeld), with equal weights.
    """
    count = len(distances)
    # Half of an update's others: bad ones, being fewer, cannot make it larger for all. It may be 0, if most are alike.
    nearer = np.sort(distances, axis=1)[:, count // 2].min()
    floor = max(SMOOTH * math.sqrt(nearer), 1e-150)
    weights = np.full(count, 1 / count)
    for _ in range(PASSES):
        rows = (distances * weights).sum(axis=1)
        away = np.sqrt(np.maximum(rows - 0.5 * (weights * rows).sum(), 0.0))
        pull = floor / np.maximum(away, floor)
        moved = pull / pull.sum()
        settled = float(np.abs(moved - weights).max()) <= SETTLED
        weights = moved
        if settled:
            break
    return tuple(weights.tolist())


# ---------------------------------------------------------------- cut to a norm


def clip(norms: Sequence[float] | Float64s, samples: Sequence[int], bound: float | None) -> tuple[float, ...]:
    """The weights of a mean in which every change is cut to a norm: p_k · min(1, C / ‖Δ_k‖).

    p_k follows the samples, cut to their median: where data is a worker's own, the number is a claim.

    Args:
        norms: ‖Δ_k‖.
        samples: at least 1 each.
        bound: C; None: the median norm.
    """
    most = statistics.median(samples)
    voices = [min(count, most) for count in samples]
    factors = _cut(norms, bound)
    return tuple(voice / sum(voices) * factor for voice, factor in zip(voices, factors, strict=True))


def centred(count: int, bound: float | None, measure: Measure) -> Weighted:
    """Centred clipping: v <- v + mean((Δ_k − v) · min(1, τ / ‖Δ_k − v‖)), a few times, from the v of the round before.

    Every v is a combination of the changes and of the first v; so only its weights are worked on here.

    Args:
        count: of updates.
        bound: τ; None: the median of the distances, in each pass anew.
        measure: the distances.

    Source: Karimireddy, He, Jaggi 2020, arXiv 2012.10333, algorithm 2 (the centre kept) with the iteration of (CC).
    """
    weights, of_centre = (0.0,) * count, 1.0
    for _ in range(CENTRINGS):
        steps = _cut(np.sqrt(measure.from_point(weights, of_centre)), bound)
        stays = 1 - math.fsum(steps) / count
        weights = tuple(stays * weight + step / count for weight, step in zip(weights, steps, strict=True))
        of_centre *= stays
    return Weighted(weights, of_centre)


def _cut(norms: Sequence[float] | Float64s, bound: float | None) -> list[float]:
    """min(1, bound / norm) of each; what has no length needs no cutting."""
    most = statistics.median(float(norm) for norm in norms) if bound is None else bound
    return [1.0 if norm <= most else most / float(norm) for norm in norms]


# ---------------------------------------------------------------- sums of blocks


def pair_sums(rows: Float64s) -> Float64s:
    """‖row_i − row_j‖² of one block.

    Args:
        rows: shape (k, n).

    Returns:
        shape (k, k), symmetric, zeros on the diagonal.
    """
    sums = np.zeros((len(rows), len(rows)))
    for at in range(len(rows) - 1):
        sums[at, at + 1 :] = sums[at + 1 :, at] = point_sums(rows[at + 1 :], rows[at])
    return sums


def point_sums(rows: Float64s, point: Float64s) -> Float64s:
    """‖row_i − point‖² of one block, at most FARTHEST.

    Args:
        rows: shape (k, n).
        point: shape (n,).

    Returns:
        shape (k,).
    """
    with np.errstate(over="ignore"):
        away = np.subtract(rows, point)
        return np.asarray(np.minimum(np.square(away, out=away).sum(axis=1), FARTHEST))


def total(sums: Iterable[Float64s], shape: tuple[int, ...]) -> Float64s:
    """The sum of many arrays as if it were exact, one at a time: `math.fsum` for arrays, without holding them.

    Args:
        sums: arrays of one shape, not negative.
        shape: theirs; zeros if there is none.

    Source: Neumaier 1974, Rundungsfehleranalyse einiger Verfahren zur Summation endlicher Summen, algorithm IV.
    """
    found, lost = np.zeros(shape), np.zeros(shape)
    for block in sums:
        more = found + block
        lost += np.where(found >= block, (found - more) + block, (block - more) + found)
        found = more
    return np.minimum(found + lost, FARTHEST)


def spans(count: int, span: int) -> Iterator[tuple[int, int]]:
    """(first, number) of the pieces of `count` elements."""
    for first in range(0, count, span):
        yield first, min(span, count - first)
