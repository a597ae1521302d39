"""What shards carry from round to round, as files: read, and made anew, block by block.

A slot, a sum of slots: bare float32, the trained tensors in the order of the model (as an error or residual in
common.deltas). A file that is None is zeros. A correction is a safetensors file with a float32 tensor for each trained
one, under its name: what the child that trains adds to its gradients.

    slot, total ──write_correction──▶ correction file, for the child
    base, update, slot, total ──write_slot──▶ the shard's next slot

Memory is a few blocks, whatever the size of the model. Nothing is renamed: give targets names that nobody reads yet.
The coordinator and a worker come to the same slot, byte by byte, from the same files: both call `write_slot`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Self

import numpy as np

from common.codecs import Codec
from common.deltas import check_encoded, check_kept, is_trained, read_delta
from common.drift import Float32s, Float64s, Method, correction, next_slot
from common.errors import BadUpdateError
from common.output import Output
from common.weights import Layout, Notes, TensorInfo, file_header, read_block, read_exactly, read_layout, shown

BLOCK_ELEMENTS = 1 << 16  # whole blocks of every codec


@dataclass(frozen=True)
class Carried:
    """What a shard begins a round with."""

    method: Method
    shards: int  # of the job
    slot: Path | None = None
    total: Path | None = None


class Flat:
    """A bare float32 file, read from its beginning to its end; zeros where there is none."""

    def __init__(self, path: Path | None, base: Layout) -> None:
        """Open it.

        Raises:
            OSError: it cannot be read, or is not of this model.
        """
        self._file: FileIO | None = None
        self._at = 0  # bytes
        if path is not None:
            with ExitStack() as unless_right:
                self._file = unless_right.enter_context(path.open("rb", buffering=0))
                check_kept(self._file, base)
                unless_right.pop_all()

    def __enter__(self) -> Self:
        return self

    def read(self, count: int) -> Float32s:
        """The next `count` numbers."""
        block = np.zeros(count, np.float32)
        if self._file is not None:
            read_exactly(self._file, block, self._at)
            self._at += block.nbytes
        return block

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def trained_blocks(layout: Layout, block_elements: int = BLOCK_ELEMENTS) -> Iterator[tuple[TensorInfo, int, int]]:
    """(tensor, first element, number of elements) of each block of the trained tensors, in the order of the files."""
    for tensor in layout.tensors:
        if is_trained(tensor, layout.notes):
            for first in range(0, tensor.elements, block_elements):
                yield tensor, first, min(block_elements, tensor.elements - first)


def write_correction(base: Path, carried: Carried, target: Path, *, block_elements: int = BLOCK_ELEMENTS) -> None:
    """Write what a shard adds to every gradient of a round.

    Args:
        base: the model that the round begins with.
        carried: what the shard begins with.
        target: the file to write; removed if anything fails. Not fsynced: it can be made again.
        block_elements: elements in memory at once; it changes no byte of the result.

    Raises:
        OSError: reading or writing failed, or a file is not of this model.
    """
    layout = read_layout(base)
    kinds = [(t.name, "F32", t.shape) for t in layout.tensors if is_trained(t, layout.notes)]
    with ExitStack() as stack:
        slot, total = (stack.enter_context(Flat(path, layout)) for path in (carried.slot, carried.total))
        output = stack.enter_context(Output(target, durable=False))
        output.write(file_header(kinds, Notes()))
        for _, _, count in trained_blocks(layout, block_elements):
            output.write(correction(carried.method, slot.read(count), total.read(count), carried.shards))
        output.finish()


def write_slot(
    base: Path,
    update: Path,
    codec: Codec | None,
    carried: Carried,
    weight: float,
    target: Path,
    *,
    durable: bool,
    at_block: Callable[[], None] = lambda: None,
    block_elements: int = BLOCK_ELEMENTS,
) -> str:
    """Write what a shard carries after an update that counts.

    Args:
        base: the model that the round began with.
        update: what was handed in; it has been inspected.
        codec: that it is encoded with; None: it is a whole model.
        carried: what the shard began with.
        weight: of its change (common.drift.weight_of).
        target: the file to write; removed if anything fails.
        durable: return only when it would survive a power cut.
        at_block: called before each block; what it raises ends this.
        block_elements: elements in memory at once, whole blocks of the codec; it changes no byte of the result.

    Returns:
        SHA-256 of the target, in hex.

    Raises:
        BadUpdateError: the update does not fit the base, or not_finite: a number is beyond float32.
        OSError: reading or writing failed, or a file is not of this model.
    """
    layout = read_layout(base)
    with ExitStack() as stack:
        changes = stack.enter_context(_Changes(base, layout, update, codec))
        slot, total = (stack.enter_context(Flat(path, layout)) for path in (carried.slot, carried.total))
        output = stack.enter_context(Output(target, durable=durable))
        for tensor, first, count in trained_blocks(layout, block_elements):
            at_block()
            added = correction(carried.method, slot.read(count), total.read(count), carried.shards)
            made = next_slot(added, changes.read(tensor, first, count), weight)
            check_held(tensor, first, made, "its slot")
            output.write(made)
        return output.finish()


def check_held(tensor: TensorInfo, first: int, block: Float32s, what: str) -> None:
    """Refuse a NaN or an infinity.

    Raises:
        BadUpdateError: not_finite, naming the tensor and the element.
    """
    finite = np.isfinite(block)
    if not finite.all():
        where = f"{shown(tensor.name)} at element {first + int(finite.argmin())}"
        advice = "Training diverged: lower train.lr, or clip gradients."
        raise BadUpdateError(f"{what} of {where} is beyond what float32 holds", code="not_finite", advice=advice)


class _Changes:
    """What an update changed of its base, block by block."""

    def __init__(self, base: Path, layout: Layout, update: Path, codec: Codec | None) -> None:
        self._update, self._codec = read_layout(update), codec
        if codec is not None:
            check_encoded(self._update, layout, codec)
        with ExitStack() as stack:
            self._old, self._new = (stack.enter_context(path.open("rb", buffering=0)) for path in (base, update))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def read(self, tensor: TensorInfo, first: int, count: int) -> Float64s:
        """Elements [first, first + count) of a trained tensor of the base."""
        start = self._update[tensor.name].start
        if self._codec is not None:
            return read_delta(self._new, self._codec, tensor, start, first, count).astype(np.float64)
        new = read_block(self._new, tensor, start, first, count).astype(np.float64)
        return np.subtract(new, read_block(self._old, tensor, tensor.start, first, count).astype(np.float64), out=new)

    def __exit__(self, *_: object) -> None:
        self._stack.close()
