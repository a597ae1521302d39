"""Changes of a model as whole numbers, so that sums of them are exact, in any order, modulo 2^64.

Pure. A change is cut to ±clip, rounded to a multiple of 2^−fraction, and weighed by the samples that it was trained on:

    encode   rint(min(max(x, −clip), clip) · 2^fraction) · n        int64, one worker's
    decode   Σ / (N · 2^fraction)                                   float64, with N = Σ n

As long as N is at most `heaviest`, no sum leaves int64, so that what wraps around on the way comes back.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]

MOST = 2**63 - 1  # of a sum
LEAST_BITS, MOST_BITS = 8, 48  # of one number: below 2^53, so that float64 has every one of them


@dataclass(frozen=True)
class Fixed:
    """How numbers travel: `bits` wide with their sign, in ±clip."""

    clip: float  # greatest change of one number that is sent as it is; above 0
    bits: int  # LEAST_BITS to MOST_BITS

    @cached_property
    def fraction(self) -> int:
        """Bits after the point: as many as let `clip` fit; below 0 where it is very large."""
        _, exponent = math.frexp(self.clip)  # clip is in [2^(exponent − 1), 2^exponent)
        return self.bits - 1 - exponent

    @cached_property
    def levels(self) -> int:
        """The greatest number that is sent, of either sign: below 2^(bits − 1)."""
        return int(math.ldexp(self.clip, self.fraction))

    @property
    def heaviest(self) -> int:
        """The most samples that the updates of one sum may have together."""
        return MOST // max(self.levels, 1)

    def encode(self, change: Float64s, samples: int, *, out: Int64s | None = None) -> tuple[Int64s, int]:
        """One worker's numbers, weighed.

        Args:
            change: shape (n,), finite; overwritten.
            samples: that it was trained on: 1 to `heaviest`.
            out: int64 of shape (n,) for the result; allocated when it is not given.

        Returns:
            int64 of shape (n,), `out` when it is given; and how many numbers were cut to ±clip.

        Raises:
            ValueError: samples out of their range, or a number that is not finite.
        """
        if not 1 <= samples <= self.heaviest:
            raise ValueError(f"{samples} samples, where 1 to {self.heaviest} have room beside {self.bits} bits")
        if not np.isfinite(change).all():
            raise ValueError("a number is not finite")
        with np.errstate(over="ignore"):
            np.multiply(change, math.ldexp(1.0, self.fraction), out=change)
        cut = int(np.count_nonzero(np.abs(change) > self.levels))
        np.rint(np.clip(change, -self.levels, self.levels, out=change), out=change)
        out = np.empty(change.shape, np.int64) if out is None else out
        np.copyto(out, change, casting="unsafe")
        np.multiply(out, samples, out=out)
        return out, cut

    def decode(self, total: Int64s, samples: int) -> Float64s:
        """The mean change, from the sum of all updates.

        Args:
            total: shape (n,).
            samples: of all updates together, at least 1.

        Returns:
            float64 of shape (n,).
        """
        mean = total.astype(np.float64)
        return np.multiply(np.divide(mean, float(samples), out=mean), math.ldexp(1.0, -self.fraction), out=mean)
