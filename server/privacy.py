"""The numbers of a private round: who is sampled, how updates are cut, and the noise on their sum.

Pure: keys and blocks in, blocks out. All chance comes from the job's secret seed through HKDF (common.derivation), one
key a purpose, so that a round that is averaged again after a crash comes to the same bytes and draws no second time.

    seed ──"sample", round, member──▶ whether a member is in the round
         ──"noise", round, tensor, piece──▶ Gaussian noise of PIECE elements
         ──"count", round──▶ noise on how many updates the clip left whole

Noise is drawn in pieces of a fixed length, each with a key of its own and a counter-based generator: which block asks
for a piece, on which thread and in which order, changes nothing.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from common import privacy
from common.derivation import derived_key
from common.messages import JobSpec
from common.weights import Array, Notes
from server.averaging import Float64Block

PIECE = 1 << 16  # elements that one key gives noise for

# ---------------------------------------------------------------- who is in a round


def sampled(seed: bytes, chance: float, round_index: int, member: str) -> bool:
    """Whether a member is in a round: each for itself, with the same chance (Poisson sampling).

    A fixed number out of all would be another mechanism, and the accountant's answer would not hold for it.

    Args:
        seed: the job's secret.
        chance: q, above 0 and at most 1.
        round_index: from 1.
        member: `shard 3`, or a worker's id.
    """
    drawn = int.from_bytes(derived_key(seed, "sample", round_index, member, size=8), "big")
    return (drawn >> 11) * 2.0**-53 < chance


# ---------------------------------------------------------------- clip and noise


@dataclass(frozen=True)
class Noisy:
    """How the updates of one round become the mean change: cut, added up, noise once, divided by a fixed number."""

    factors: tuple[float, ...]  # of each update's change, in the order of the shards; none: nobody was sampled
    deviation: float  # standard deviation of the noise on the sum
    divisor: float  # q K, whoever came
    seed: bytes
    round: int

    def mean_change(
        self, changes: Iterable[Array], tensor: str, first: int, *, out: Float64Block, scratch: Float64Block
    ) -> Float64Block:
        """The private mean change of one block: (Σ f_k Δ_k + N(0, deviation²)) / divisor.

        Args:
            changes: a float block of shape (n,) for each factor, in that order; each used before the next is asked for.
            tensor: the name of the tensor.
            first: the block's first element in the flattened tensor.
            out: float64 of shape (n,) for the result.
            scratch: float64 of shape (n,), overwritten.

        Returns:
            `out`.

        Raises:
            ValueError: not as many changes as factors.

        Source: McMahan et al. 2017, arXiv 1710.06963, algorithm 1, with the estimator f_f.
        """
        out.fill(0.0)
        for change, factor in zip(changes, self.factors, strict=True):
            np.multiply(change, factor, out=scratch, dtype=np.float64)
            np.add(out, scratch, out=out)
        noise = gaussian(self.seed, self.round, tensor, first, out.size)
        np.multiply(noise, self.deviation, out=noise)
        np.add(out, noise, out=out)
        return np.divide(out, self.divisor, out=out)


def noisy(spec: JobSpec, clip: float, norms: Sequence[float], seed: bytes, round_index: int) -> Noisy:
    """What a round of a job does with its updates.

    Args:
        spec: the job, with privacy.level = worker.
        clip: the bound of this round.
        norms: L2 norm of each update's change, in the order of the shards.
        seed: the job's secret.
        round_index: the round.
    """
    return Noisy(
        factors=tuple(factor(norm, clip) for norm in norms),
        deviation=privacy.update_noise(spec) * clip,
        divisor=privacy.mean_sample(spec),
        seed=seed,
        round=round_index,
    )


def factor(norm: float, clip: float) -> float:
    """What an update is multiplied with, so that its norm is at most `clip`: min(1, S / ‖Δ‖), and 1 for no change."""
    return 1.0 if norm <= clip else clip / norm


def gaussian(seed: bytes, round_index: int, tensor: str, first: int, count: int) -> Float64Block:
    """Standard normal numbers for elements [first, first + count) of a tensor, in one round.

    Returns:
        float64 of shape (count,); the same for the same elements, whatever else is asked for.
    """
    noise = np.empty(count)
    for piece in range(first // PIECE, -(-(first + count) // PIECE)):
        start = max(first, piece * PIECE)
        stop = min(first + count, (piece + 1) * PIECE)
        drawn = _generator(seed, "noise", round_index, tensor, piece).standard_normal(stop - piece * PIECE)
        noise[start - first : stop - first] = drawn[start - piece * PIECE :]
    return noise


def _generator(seed: bytes, *purpose: int | str) -> np.random.Generator:
    key = int.from_bytes(derived_key(seed, *purpose, size=16), "little")
    return np.random.Generator(np.random.Philox(key=key))


def next_clip(spec: JobSpec, clip: float, norms: Sequence[float], seed: bytes, round_index: int) -> float:
    """The bound of the next round: a step towards the norm that a share γ of all updates is below.

        b = ½ + (Σ (1[‖Δ‖ <= C] − ½) + N(0, σ_b²)) / (q K);  C <- C exp(−η (b − γ))

    The half is taken off before the sum, so that one member changes it by ½ at most: that is what σ_b is counted with.

    Args:
        spec: the job; without privacy.adaptive the bound stays.
        clip: C, the bound of this round.
        norms: L2 norm of each update's change.
        seed: the job's secret.
        round_index: this round.

    Source: Andrew et al. 2019, arXiv 1905.03871, algorithm 1 and theorem 1.
    """
    section = spec.privacy
    if not section.adaptive:
        return clip
    noise = privacy.count_noise(spec) * float(_generator(seed, "count", round_index).standard_normal())
    halves = math.fsum(0.5 if norm <= clip else -0.5 for norm in norms)
    whole = 0.5 + (halves + noise) / privacy.mean_sample(spec)
    return clip * math.exp(-section.clip_lr * (whole - section.quantile))


# ---------------------------------------------------------------- models that cannot be private


def unfit(notes: Notes) -> str | None:
    """Why a model cannot be trained with worker-level privacy; None: it can.

    Whatever else is not trained (integers, other buffers) stays as it was built: it takes nothing from the data.
    """
    if not notes.variances:
        return None
    name = min(notes.variances)
    return (
        f"the model has running statistics ({name}, {len(notes.variances)} in all), which are means over the data and "
        "would leave each worker without noise: replace BatchNorm by GroupNorm or LayerNorm for privacy.level = worker"
    )
