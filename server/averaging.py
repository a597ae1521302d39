"""The arithmetic of a round: many blocks in, one block out, for each kind of tensor its rule.

Pure: no file, no clock. A block is a 1-dimensional piece of one tensor in the tensor's own dtype. Blocks come one after
the other, in the order of the shards, and are used before the next one is asked for: the caller may read all of them
into one buffer, so that memory does not grow with the number of updates. Arrival order never gets here.

    float parameters and buffers   weighted_mean      Σ w_k x_k / Σ w_k, in float64; w_k is n_k, or as a job weighs
    BatchNorm running variances    pooled_variance    of all the workers' data together
    integers (step counters)       maximum            in their own dtype
    booleans (masks)               majority           by samples

Float results are float64; `cast` rounds them to the tensor's dtype, once. Blocks are finite (server.robust): a float64
tensor can still overflow on the way, and `cast` refuses what came of it.
"""

import enum
import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from common.errors import BadUpdateError
from common.weights import Array, Notes, TensorInfo, shown
from server.robust import not_finite_at

Float64Block = npt.NDArray[np.float64]


class Rule(enum.Enum):
    """How the values of one tensor are joined."""

    MEAN = "mean"
    VARIANCE = "pooled variance"
    MAXIMUM = "maximum"
    MAJORITY = "majority"


def rule_of(tensor: TensorInfo, notes: Notes) -> Rule:
    """The rule for one tensor, by what it is."""
    if tensor.name in notes.variances:
        return Rule.VARIANCE
    if tensor.is_float:
        return Rule.MEAN
    return Rule.MAJORITY if tensor.dtype == "BOOL" else Rule.MAXIMUM


def weighted_mean(
    blocks: Iterable[Array],
    weights: Sequence[float],
    *,
    out: Float64Block | None = None,
    scratch: Float64Block | None = None,
) -> Float64Block:
    """The mean of float blocks, each weighted by the samples that it was trained on, or by what else a job weighs it.

    Values on which all blocks agree come back unchanged, bit by bit, from every dtype but float64, as long as the
    weights are whole numbers of a sum below 2^29. Whole numbers below 2^53 give the same bytes as int and as float.

    Args:
        blocks: K blocks of shape (n,), in the order of the shards.
        weights: K finite numbers above 0; of FedAvg counts of samples.
        out: float64 of shape (n,) for the result; allocated when it is not given.
        scratch: float64 of shape (n,), overwritten; allocated when it is not given.

    Returns:
        float64 of shape (n,): `out` when it is given.

    Raises:
        ValueError: no block, a weight that is not above 0 and finite, or not as many blocks as weights.

    Source: McMahan et al. 2017, arXiv 1602.05629, algorithm 1, last line: w <- Σ_k (n_k / n) w_k.
    """
    if not weights or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(
            f"every update needs at least one sample, or a finite weight above 0; there are {shown(list(weights))}"
        )
    total = math.fsum(weights)  # exact, and rounded once, as a sum of integers is
    pairs = zip(blocks, weights, strict=True)
    with np.errstate(over="ignore", invalid="ignore"):
        # The dtype is said, since numpy would multiply float32 by a Python number in float32.
        block, weight = next(pairs)
        mean = np.multiply(block, float(weight), out=out, dtype=np.float64)
        for block, weight in pairs:
            # Multiply, then add: one operation for both would round differently on machines that can fuse them.
            scratch = np.multiply(block, float(weight), out=scratch, dtype=np.float64)
            np.add(mean, scratch, out=mean)
        return np.divide(mean, total, out=mean)


def pooled_variance(variances: Iterable[Array], means: Iterable[Array], samples: Sequence[int]) -> Float64Block:
    """The variance of all the workers' data together, from each worker's variance and mean.

    A plain mean of variances misses how far the workers' means lie apart. All means are taken relative to the first,
    which changes nothing on paper, and keeps a small variance beside a large mean from vanishing in rounding.

    Args:
        variances: K float blocks of shape (n,), in the order of the shards.
        means: K float blocks of shape (n,), in the same order.
        samples: K counts, each at least 1.

    Returns:
        float64 of shape (n,), at least 0: Σ p_k (v_k + m_k²) − (Σ p_k m_k)² with p_k = n_k / N.

    Raises:
        ValueError: no block, a count below one, or not as many blocks as counts.
    """
    total = _total(samples)
    triples = zip(variances, means, samples, strict=True)
    with np.errstate(over="ignore", invalid="ignore"):
        variance, mean, count = next(triples)
        origin = mean.astype(np.float64)
        offset, square = np.zeros_like(origin), float(count) * variance.astype(np.float64)
        for variance, mean, count in triples:
            away = np.subtract(mean, origin, dtype=np.float64)
            offset += float(count) * away
            square += float(count) * (np.square(away) + variance.astype(np.float64))
        return np.maximum(square / total - np.square(offset / total), 0.0)


def maximum(blocks: Iterable[Array]) -> Array:
    """The largest of each element, in the blocks' own integer dtype: float64 would lose what lies above 2^53.

    Raises:
        ValueError: no block.
    """
    largest: Array | None = None
    for block in blocks:
        largest = block.copy() if largest is None else np.maximum(largest, block, out=largest)
    if largest is None:
        raise ValueError("there is no block to take a maximum of")
    return largest


def majority(blocks: Iterable[Array], samples: Sequence[int]) -> npt.NDArray[np.bool_]:
    """For each element of boolean blocks, what more samples stand behind; on a tie, what the first block says.

    Raises:
        ValueError: no block, a count below one, or not as many blocks as counts.
    """
    total = _total(samples)
    # A file may hold other bytes than 0 and 1, on which numpy's own logic errs: hence the comparison.
    pairs = ((block.view(np.uint8) != 0, float(count)) for block, count in zip(blocks, samples, strict=True))
    first, count = next(pairs)
    behind: Float64Block = count * first
    for true, count in pairs:
        behind += count * true
    return np.where(2 * behind == total, first, 2 * behind > total)


def cast(values: Float64Block, tensor: TensorInfo, *, first: int = 0, out: Array | None = None) -> Array:
    """Round results to the tensor's dtype, once; to 16 and 8 bits through float32, as ml_dtypes would on its own.

    Args:
        values: float64 of shape (n,).
        tensor: the float tensor that the block belongs to.
        first: index of the block's first element in the flattened tensor, for the sentence of an error.
        out: shape (n,) of the tensor's dtype for the result; allocated when it is not given.

    Returns:
        shape (n,) of the tensor's dtype: `out` when it is given.

    Raises:
        BadUpdateError: not_finite, a value is beyond what the dtype holds.
    """
    dtype = tensor.numpy_dtype
    out = np.empty(values.shape, dtype) if out is None else out
    with np.errstate(over="ignore"):
        np.copyto(out, values if dtype.itemsize >= 4 else values.astype(np.float32), casting="same_kind")
    index = not_finite_at(out)
    if index is not None:
        where = f"{shown(tensor.name)} at element {first + index}"
        sentence = f"the new value of {where} is {values[index]:.6g}, which {tensor.dtype} cannot hold"
        advice = "Lower train.lr, or keep this tensor in a wider dtype."
        raise BadUpdateError(sentence, code="not_finite", advice=advice)
    return out


def _total(samples: Sequence[int]) -> float:
    if not samples or min(samples) < 1:
        raise ValueError(f"every update needs at least one sample; the counts are {shown(list(samples))}")
    return float(sum(samples))
