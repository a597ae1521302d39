"""The guard: an update that does not fit the model, is not finite or lies too far away never reaches the mean.

Pure: layouts and blocks in, nothing or a BadUpdateError out. A block is a 1-dimensional piece of one tensor in the
tensor's own dtype; `first` is the index of its first element in the flattened tensor. No file is read here.
"""

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from common.errors import BadUpdateError
from common.weights import Array, Layout, TensorInfo, shown

_DIVERGED = "Training diverged: lower train.lr, or clip gradients. The update was not used."
_BUFFER = "Buffers are averaged too: register one that holds infinity, such as a mask, with persistent=False."


def check_layout(update: Layout, base: Layout) -> None:
    """Refuse an update whose names, dtypes and shapes are not exactly those of the model that it was trained from.

    The order of the tensors in the file is free: other versions of safetensors lay them out in another one.

    Raises:
        BadUpdateError: missing_tensor, wrong_dtype, wrong_shape or extra_tensor, for the first tensor that differs.
    """
    extra = next((tensor for tensor in update.tensors if tensor.name not in base), None)
    for theirs in base.tensors:
        if theirs.name not in update:
            instead = f", and has {shown(extra.name)} that the model has not" if extra else ""
            _refuse(f"the update has no tensor {shown(theirs.name)}, {_kind(theirs)}{instead}", "missing_tensor")
        ours = update[theirs.name]
        if ours.dtype != theirs.dtype:
            _refuse(f"{shown(ours.name)} is {ours.dtype} in the update and {theirs.dtype} in the model", "wrong_dtype")
        if ours.shape != theirs.shape:
            shapes = f"{shown(ours.shape)} in the update and {shown(theirs.shape)} in the model"
            _refuse(f"{shown(ours.name)} has shape {shapes}", "wrong_shape")
    if extra:
        _refuse(f"the update has a tensor {shown(extra.name)}, {_kind(extra)}, that the model has not", "extra_tensor")


def not_finite_at(block: Array) -> int | None:
    """The index of the first NaN or infinity in a block of any dtype of `common.weights.DTYPES`, if there is one."""
    with np.errstate(invalid="ignore"):  # bfloat16 is widened first, which a signalling NaN objects to
        finite = np.isfinite(block)
    return None if finite.all() else int(finite.argmin())


def check_finite(name: str, block: Array, *, first: int = 0, trained: bool = True) -> None:
    """Refuse a NaN or an infinity: one is enough to ruin every mean. Integers and booleans always pass.

    Args:
        name: the tensor's name.
        block: shape (n,), of any dtype of `common.weights.DTYPES`.
        first: index of the block's first element in the flattened tensor.
        trained: whether an optimiser trains the tensor; the advice is another one for a buffer.

    Raises:
        BadUpdateError: not_finite, naming the tensor, the element and its value.
    """
    index = not_finite_at(block)
    if index is not None:
        advice = _DIVERGED if trained else _BUFFER
        sentence = f"{shown(name)} is {float(block[index])} at element {first + index} of the update"
        raise BadUpdateError(sentence, code="not_finite", advice=advice)


def squared_distance(update: Array, base: Array, *, scratch: npt.NDArray[np.float64] | None = None) -> float:
    """The sum of squared differences of two finite float blocks, in float64; infinity when that overflows.

    Args:
        update: floats of shape (n,).
        base: floats of shape (n,).
        scratch: float64 of shape (n,), overwritten; allocated when it is not given.
    """
    with np.errstate(over="ignore"):  # only float64 weights beyond 1e154 get there, and infinity exceeds every bound
        difference = np.subtract(update, base, out=scratch, dtype=np.float64)
        np.square(difference, out=difference)
        return float(np.sum(difference))


def norm_of(squares: Iterable[float]) -> float:
    """The L2 norm from the squared sums of blocks, whose order does not matter: their sum is exact.

    On one machine equal files have equal norms; between machines the sums inside a block may round differently.
    """
    try:
        return math.sqrt(math.fsum(squares))
    except OverflowError:  # fsum raises where + would give infinity
        return math.inf


def check_norm(norm: float, bound: float) -> None:
    """Refuse an update that lies further than `bound` from its base.

    Raises:
        BadUpdateError: norm_bound, with both numbers.
    """
    if not norm <= bound:  # so written, a NaN is refused too
        advice = "Train with a lower train.lr or fewer local steps, or raise aggregation.norm_bound."
        raise BadUpdateError(
            f"the update is {norm:.6g} away from its base, and {bound:.6g} is allowed", code="norm_bound", advice=advice
        )


def _kind(tensor: TensorInfo) -> str:
    return f"{tensor.dtype} of shape {shown(tensor.shape)}"


def _refuse(sentence: str, code: str) -> None:
    advice = "Does the worker run the task of this job, unchanged? The update was not used."
    raise BadUpdateError(sentence, code=code, advice=advice)
