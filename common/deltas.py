"""Updates and steps as encoded files: what a worker sends up, and what the coordinator sends down, in few bytes.

    worker        trained − base (+ error)       ──encode_update──▶ update file, and the error that is kept
    coordinator   update files ──read_delta──▶ blocks ──the fold──▶ true new values
                  true − base (+ residual)       ──StepWriter──▶ step file, the residual that is kept, and the model
    worker        base + step                    ──apply_step──▶ the same model, bit by bit

An encoded file is a safetensors file with the names and the order of the model that it changes. A trained float tensor
is U8 of shape [codec.size(elements)]; everything else (integers, booleans, buffers) is there as the new model has it.
The notes are those of the model, and name the codec. An error or residual is bare float32: the trained tensors, in the
order of the model. All is read and written block by block: memory is a few blocks, whatever the size of the model.
Nothing is renamed: give targets names that nobody reads yet.

Both sides come to the same model because both call `step_block` on the same numbers. No torch here, and no averaging.
"""

import errno
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np

from common.codecs import Codec, Float32s
from common.errors import BadUpdateError
from common.output import Output
from common.weights import (
    Array,
    Kind,
    Layout,
    Notes,
    TensorInfo,
    file_header,
    read_block,
    read_exactly,
    read_layout,
    shown,
)

BLOCK_ELEMENTS = 1 << 16  # whole blocks of every codec


@dataclass(frozen=True)
class Encoded:
    """An encoded file that has been written."""

    digest: str  # SHA-256 in hex
    size: int  # bytes
    kept_digest: str | None  # of the error or residual written beside it
    norm: float  # L2 norm of what was to be encoded: the change, and what was kept from before
    error: float  # L2 norm of what the codec lost, as a share of `norm`; 0 when there was nothing to encode


# ---------------------------------------------------------------- what a file must hold


def is_trained(tensor: TensorInfo, notes: Notes) -> bool:
    """Whether an optimiser trains a tensor of a model: such tensors are encoded."""
    return tensor.is_float and tensor.name not in notes.untrained


def kept_size(base: Layout) -> int:
    """Bytes of an error or residual of this model."""
    return 4 * sum(tensor.elements for tensor in base.tensors if is_trained(tensor, base.notes))


def check_encoded(layout: Layout, base: Layout, codec: Codec) -> None:
    """Refuse an encoded file that does not fit its model in every name, dtype and shape. The order is free.

    Args:
        layout: the encoded file.
        base: the model that it changes.
        codec: the one that the job has chosen.

    Raises:
        BadUpdateError: bad_encoding (another codec), missing_tensor, wrong_dtype, wrong_shape or extra_tensor, for the
            first that differs.
    """
    if layout.notes.codec != codec.name:
        _refuse(f"the file is encoded as {shown(layout.notes.codec)}, and {codec.name} is wanted", "bad_encoding")
    _check_kinds(layout, _encoded_kinds(base, codec))


def _encoded_kinds(base: Layout, codec: Codec) -> Iterator[Kind]:
    """The tensors of an encoded file, in the order of its model."""
    for tensor in base.tensors:
        if is_trained(tensor, base.notes):
            yield tensor.name, "U8", (codec.size(tensor.elements),)
        else:
            yield tensor.name, tensor.dtype, tensor.shape


def _encoded_header(base: Layout, codec: Codec) -> bytes:
    return file_header(_encoded_kinds(base, codec), base.notes.model_copy(update={"codec": codec.name}))


def _check_kinds(layout: Layout, kinds: Iterable[Kind]) -> None:
    """Refuse a file whose tensors are not exactly these, in any order."""
    names = set()
    for name, code, shape in kinds:
        names.add(name)
        if name not in layout:
            _refuse(f"the file has no tensor {shown(name)}, {code} of shape {shown(shape)}", "missing_tensor")
        found = layout[name]
        if found.dtype != code:
            _refuse(f"{shown(name)} is {found.dtype} in the file, and must be {code}", "wrong_dtype")
        if found.shape != shape:
            _refuse(
                f"{shown(name)} has shape {shown(found.shape)} in the file, and must have {shown(shape)}", "wrong_shape"
            )
    for tensor in layout.tensors:
        if tensor.name not in names:
            _refuse(f"the file has a tensor {shown(tensor.name)} that the model has not", "extra_tensor")


def check_kept(file: FileIO, base: Layout) -> None:
    """Make sure that a file of bare float32 has a number for each trained one of this model.

    Raises:
        OSError: it has not.
    """
    size, wanted = os.fstat(file.fileno()).st_size, kept_size(base)
    if size != wanted:
        raise OSError(errno.EIO, f"it has {size} bytes, and {wanted} belong to this model", str(file.name))


# ---------------------------------------------------------------- one block


def step_block(base: Array, delta: Float32s, out: Array | None = None) -> Array:
    """New values of a trained tensor: one IEEE addition an element, rounded once where the dtype is narrower.

    The addition is float32, and float64 for a float64 tensor. Nothing is checked: a sum may be infinite.

    Args:
        base: shape (n,), of a float dtype.
        delta: float32 of shape (n,), as decoded.
        out: shape (n,) of base's dtype for the result, which may be `base`; allocated when it is not given.

    Returns:
        shape (n,) of base's dtype: `out` when it is given.
    """
    out = np.empty_like(base) if out is None else out
    with np.errstate(over="ignore", invalid="ignore"):
        if base.dtype.itemsize >= 4:
            np.add(base, delta, out=out)
        else:
            np.copyto(out, np.add(base, delta, dtype=np.float32), casting="same_kind")
    return out


def read_delta(
    file: FileIO,
    codec: Codec,
    tensor: TensorInfo,
    start: int,
    first: int,
    count: int,
    *,
    out: Float32s | None = None,
) -> Float32s:
    """Decode elements [first, first + count) of a trained tensor from an encoded file that `check_encoded` has passed.

    Args:
        file: the encoded file.
        codec: its codec.
        tensor: the tensor, as the model has it.
        start: byte of this file where the encoded tensor begins.
        first: a multiple of codec.block.
        count: a multiple of codec.block, or all that is left of the tensor.
        out: contiguous float32 of shape (count,) for the result; allocated when it is not given.

    Raises:
        BadUpdateError: bad_encoding, naming the tensor.
        ValueError: such a block cannot be decoded on its own.
        OSError: the file cannot be read.
    """
    _check_span(tensor, codec, first, count)
    skipped = codec.size(first)
    data = np.empty(codec.size(first + count) - skipped, np.uint8)
    read_exactly(file, data, start + skipped)
    return decode_delta(data, codec, tensor, first, count, out=out)


def decode_delta(
    data: Array, codec: Codec, tensor: TensorInfo, first: int, count: int, *, out: Float32s | None = None
) -> Float32s:
    """Decode elements [first, first + count) of a trained tensor from their bytes; as `read_delta`.

    Raises:
        BadUpdateError: bad_encoding, naming the tensor.
    """
    try:
        return codec.decode(data, count, out=out)
    except BadUpdateError as error:
        where = f"{shown(tensor.name)} from element {first} on"
        raise BadUpdateError(f"{where}: {error}", code=error.code, advice=error.advice) from error


def _check_span(tensor: TensorInfo, codec: Codec, first: int, count: int) -> None:
    last = first + count
    if first % codec.block or not 0 <= first <= last <= tensor.elements:
        raise ValueError(f"elements {first} … {last} of {tensor.name} are no whole blocks of {codec.name}")
    if last % codec.block and last != tensor.elements:
        raise ValueError(f"elements {first} … {last} of {tensor.name} end within a block of {codec.name}")


def _change(new: Array, old: Array) -> Array:
    """new − old, each element rounded to float32; the subtraction of float64 values is float64."""
    wide = np.float64 if 8 in (new.dtype.itemsize, old.dtype.itemsize) else np.float32
    return np.subtract(new, old, dtype=wide).astype(np.float32, copy=False)


# ---------------------------------------------------------------- whole files


def encode_update(
    base: Path,
    trained: Path,
    target: Path,
    codec: Codec,
    *,
    error: Path | None = None,
    pending: Path | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> Encoded:
    """Encode what training changed.

    Args:
        base: the model that the training began with.
        trained: the model that it came to.
        target: the encoded file to write; removed if anything fails. Putting it onto the disk is the caller's part.
        codec: how to encode.
        error: what earlier updates left out, added to this one; none, or a file that is not there, is zeros.
        pending: another file, for what this update leaves out, likewise. It becomes the next `error` when the update
            was taken, and is dropped when it was not: so nothing is lost, and nothing sent twice.
        block_elements: elements in memory at once, whole blocks of the codec; it changes no byte of the result.

    Raises:
        BadUpdateError: not_finite, a value or its change is beyond float32; bad_header, missing_tensor, wrong_dtype,
            wrong_shape or extra_tensor: the trained model is not the base's.
        OSError: reading or writing failed, or `error` is not of this model.

    Source: Karimireddy et al. 2019, arXiv 1901.09847, algorithm 2: p = γg + e, Δ = C(p), e <- p − Δ.
    """
    layout, ours = read_layout(base), read_layout(trained)
    _check_kinds(ours, ((tensor.name, tensor.dtype, tensor.shape) for tensor in layout.tensors))
    with ExitStack() as stack:
        old_file, new_file = (stack.enter_context(path.open("rb", buffering=0)) for path in (base, trained))
        kept = stack.enter_context(_Kept(error, layout))
        encoder = stack.enter_context(_Encoder(layout, codec, target, pending, durable=False))
        for tensor in layout.tensors:
            for first, count in _spans(tensor, block_elements):
                new = read_block(new_file, tensor, ours[tensor.name].start, first, count)
                if not is_trained(tensor, layout.notes):
                    encoder.write(new)
                    continue
                old = read_block(old_file, tensor, tensor.start, first, count)
                with np.errstate(over="ignore", invalid="ignore"):
                    wanted = _change(new, old)
                    wanted += kept.read(count)
                _check_change(tensor, first, wanted, old, new)
                decoded = encoder.encode(tensor, first, wanted)
                encoder.keep(np.subtract(wanted, decoded, out=decoded))
        return encoder.finish()


def apply_step(base: Path, step: Path, target: Path, codec: Codec, *, block_elements: int = BLOCK_ELEMENTS) -> str:
    """Make the next model from the one that is here and the coordinator's step: what `StepWriter` gave, bit by bit.

    Args:
        base: the model that the step begins with. Its header becomes that of the next model, verbatim.
        step: an encoded file.
        target: the model to write; removed if anything fails. Not fsynced: it can be made again.
        codec: the step's.
        block_elements: elements in memory at once, whole blocks of the codec; it changes no byte of the result.

    Returns:
        SHA-256 of the target, in hex.

    Raises:
        BadUpdateError: the step does not fit (check_encoded), bad_encoding, or not_finite.
        OSError: reading or writing failed.
    """
    layout, change = read_layout(base), read_layout(step)
    check_encoded(change, layout, codec)
    with ExitStack() as stack:
        base_file, step_file = (stack.enter_context(path.open("rb", buffering=0)) for path in (base, step))
        model = stack.enter_context(Output(target, durable=False))
        model.write(layout.header)
        for tensor in layout.tensors:
            start = change[tensor.name].start
            for first, count in _spans(tensor, block_elements):
                if is_trained(tensor, layout.notes):
                    old = read_block(base_file, tensor, tensor.start, first, count)
                    new = step_block(old, read_delta(step_file, codec, tensor, start, first, count))
                    _check_step(tensor, first, new)
                else:
                    new = read_block(step_file, tensor, start, first, count)
                model.write(new)
        return model.finish()


class StepWriter:
    """The coordinator's step, block by block beside the fold: x' = x + dec(enc(r + x_true − x)), r' = what is missing.

    `r` is the residual: what earlier steps left out. It takes up the codec's error and the rounding of x' to the
    model's dtype alike, so that x' + r' is the true model, however small its changes and however coarse the codec.

        with StepWriter(layout, codec, step, residual, previous=old_residual) as writer:
            for each tensor and block, in the order of the model:
                file.write(writer.block(index, first, true_values, base_block))
            encoded = writer.finish()

    Without `finish`, or when anything fails, both files are removed.
    """

    def __init__(self, base: Layout, codec: Codec, step: Path, residual: Path, *, previous: Path | None = None) -> None:
        """Open the files.

        Args:
            base: the model that the step begins with.
            codec: how to encode.
            step: the encoded file to write.
            residual: the residual to write, for the next step; another file than `previous`.
            previous: the residual of the step before; none, or a file that is not there, is zeros.

        Raises:
            OSError: a file cannot be opened, or `previous` is not of this model.
        """
        self._base, self._codec = base, codec
        self._index, self._first = 0, 0  # of the next block
        with ExitStack() as stack:
            self._kept = stack.enter_context(_Kept(previous, base))
            self._encoder = stack.enter_context(_Encoder(base, codec, step, residual, durable=True))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def block(self, index: int, first: int, values: Array, base: Array, *, out: Array | None = None) -> Array:
        """Take the next block, and give what the next model holds there.

        Args:
            index: number of the tensor in the model.
            first: its first element; blocks come in order, and begin and end with blocks of the codec.
            values: shape (n,); a trained tensor's true new values as float64 or float32, any other's in its own dtype.
            base: shape (n,), the old values in the tensor's dtype; not looked at unless it is trained.
            out: shape (n,) of the tensor's dtype for the result; allocated when it is not given.

        Returns:
            shape (n,) of the tensor's dtype: what `apply_step` comes to; `values` itself for a tensor not trained.

        Raises:
            BadUpdateError: not_finite, a new value or its change is beyond float32 or the tensor's dtype.
            ValueError: another block is next.
            OSError: reading or writing failed.
        """
        tensor = self._place(index, first, values.size)
        if not is_trained(tensor, self._base.notes):
            self._encoder.write(values)
            return values
        with np.errstate(over="ignore", invalid="ignore"):
            # Summed in float64 and rounded once, so that next to nothing of the true values is lost.
            change = np.subtract(values, base, dtype=np.float64)
            change += self._kept.read(values.size)
            wanted = change.astype(np.float32)
        _check_change(tensor, first, wanted, base, values)
        new = step_block(base, self._encoder.encode(tensor, first, wanted), out)
        _check_step(tensor, first, new)
        self._encoder.keep(wanted - _change(new, base))
        return new

    def finish(self) -> Encoded:
        """End both files, when every block has come.

        Raises:
            ValueError: a block is missing.
            OSError: writing failed.
        """
        self._skip()
        if self._index < len(self._base.tensors):
            raise ValueError(f"the step ended before element {self._first} of tensor {self._index}")
        return self._encoder.finish()

    def _place(self, index: int, first: int, count: int) -> TensorInfo:
        """The tensor of the block that comes, if it is its turn."""
        self._skip()
        if (index, first) != (self._index, self._first):
            due = f"element {self._first} of tensor {self._index}"
            raise ValueError(f"element {first} of tensor {index} came, and {due} is next")
        tensor = self._base.tensors[index]
        _check_span(tensor, self._codec, first, count)
        self._first += count
        return tensor

    def _skip(self) -> None:
        """Go on to the next tensor where one is complete, over empty ones too."""
        tensors = self._base.tensors
        while self._index < len(tensors) and self._first == tensors[self._index].elements:
            self._index, self._first = self._index + 1, 0


# ---------------------------------------------------------------- files under way


class _Kept:
    """An error or residual that is read from its beginning to its end; zeros where there is none."""

    def __init__(self, path: Path | None, base: Layout) -> None:
        self._file = path.open("rb", buffering=0) if path is not None and path.exists() else None
        self._at = 0  # bytes
        if self._file is not None:
            with ExitStack() as unless_right:
                unless_right.callback(self._file.close)
                check_kept(self._file, base)
                unless_right.pop_all()

    def __enter__(self) -> Self:
        return self

    def read(self, count: int) -> Array | float:
        """The next `count` elements."""
        if self._file is None:
            return 0.0
        block = np.empty(count, np.float32)
        read_exactly(self._file, block, self._at)
        self._at += block.nbytes
        return block

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


class _Encoder:
    """An encoded file and what is kept beside it, both under way."""

    def __init__(self, base: Layout, codec: Codec, target: Path, kept: Path | None, *, durable: bool) -> None:
        self._codec = codec
        self._wanted, self._lost = 0.0, 0.0  # sums of squares
        with ExitStack() as stack:
            self._target = stack.enter_context(Output(target, durable=durable))
            self._kept = None if kept is None else stack.enter_context(Output(kept, durable=durable))
            self._target.write(_encoded_header(base, codec))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def write(self, block: Array) -> None:
        """Write a block of a tensor that is not trained."""
        self._target.write(block)

    def encode(self, tensor: TensorInfo, first: int, wanted: Float32s) -> Float32s:
        """Write a block of a trained tensor; what the other side will decode."""
        _check_span(tensor, self._codec, first, wanted.size)
        data = self._codec.encode(wanted)
        self._target.write(data)
        decoded = self._codec.decode(data, wanted.size)
        self._wanted += float(np.square(wanted, dtype=np.float64).sum())
        self._lost += float(np.square(np.subtract(wanted, decoded, dtype=np.float64)).sum())
        return decoded

    def keep(self, rest: Float32s) -> None:
        """Write what a block of a trained tensor left out."""
        if self._kept is not None:
            self._kept.write(rest)

    def finish(self) -> Encoded:
        """End both files."""
        kept_digest = None if self._kept is None else self._kept.finish()
        norm = math.sqrt(self._wanted)
        error = math.sqrt(self._lost) / norm if norm else 0.0
        return Encoded(self._target.finish(), self._target.size, kept_digest, norm, error)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def _spans(tensor: TensorInfo, block_elements: int) -> Iterator[tuple[int, int]]:
    """(first element, number of elements) of each block of a tensor; none for an empty tensor."""
    for first in range(0, tensor.elements, block_elements):
        yield first, min(block_elements, tensor.elements - first)


def _check_change(tensor: TensorInfo, first: int, wanted: Float32s, old: Array, new: Array) -> None:
    finite = np.isfinite(wanted)
    if not finite.all():
        index = int(finite.argmin())
        change = f"from {float(old[index]):.6g} to {float(new[index]):.6g}"
        sentence = f"{shown(tensor.name)} changed {change} at element {first + index}: beyond what can be encoded"
        _refuse(sentence, "not_finite", "Training diverged: lower train.lr, or clip gradients.")


def _check_step(tensor: TensorInfo, first: int, new: Array) -> None:
    finite: Any = np.isfinite(new)
    if not finite.all():
        where = f"{shown(tensor.name)} at element {first + int(finite.argmin())}"
        advice = "Lower train.lr, or keep this tensor in a wider dtype."
        _refuse(f"the new value of {where} is beyond what {tensor.dtype} can hold", "not_finite", advice)


def _refuse(sentence: str, code: str, advice: str | None = None) -> NoReturn:
    advice = advice or "Are both sides of the same version, with the same model? The update was not used."
    raise BadUpdateError(sentence, code=code, advice=advice)
