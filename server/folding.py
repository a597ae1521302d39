"""Weight files in, a verdict or the next model out: the shell around averaging, optimizers and robust.

    update ──inspect──▶ counts, or BadUpdateError
    base + K updates ──average──▶ the next model, with the header of base, verbatim

Everything is read block by block into buffers that are used again: memory is a few blocks, whatever the size of the
model and the number of updates. Nothing is mapped, since mapped pages count as ours. The bytes that come out depend on
the base, the updates and their order alone: not on the size of a block, nor on how a file lays its tensors out.
"""

import errno
import hashlib
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Self

import numpy as np

from common.errors import BadUpdateError
from common.weights import Array, Layout, Notes, TensorInfo, file_digest, read_exactly, read_layout
from server.averaging import Float64Block, Rule, cast, majority, maximum, pooled_variance, rule_of, weighted_mean
from server.optimizers import OuterStep
from server.robust import check_finite, check_layout, check_norm, norm_of, squared_distance

__all__ = ["BLOCK_ELEMENTS", "Inspection", "Stopped", "average", "file_digest", "inspect"]

BLOCK_ELEMENTS = 1 << 16  # 512 KiB as float64: what one thread works on stays in its core's cache
THREADS = max(1, min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
OPEN_FILES = 256  # kept open during an average; a quarter of what Linux allows a process unless told otherwise
SYNC_EVERY = 64 << 20  # bytes written, after which the disk is set to work on them
_WIDEST = 8  # bytes of the widest dtype


class Stopped(Exception):  # noqa: N818 - not an error: what was asked for
    """The average was broken off because its coordinator stops. The next one does it again, from the same files."""


@dataclass(frozen=True)
class Inspection:
    """What is known of an update that may count."""

    norm: float | None  # L2 distance to the base over the trained tensors; None where there is no base
    size: int  # bytes


def inspect(
    update: Path, base: Path | None, *, digest: str, norm_bound: float | None, block_elements: int = BLOCK_ELEMENTS
) -> Inspection:
    """Look at an update once, from its first byte to its last, before it may count.

    Args:
        update: the file as it came.
        base: the model that it was trained from; None for a freshly built model, of which nothing is known.
        digest: SHA-256 in hex that its sender announced.
        norm_bound: largest L2 distance to the base over trained float tensors, if there is a bound.
        block_elements: elements read at once.

    Raises:
        BadUpdateError: digest_mismatch, whatever else is wrong too: the file was damaged on its way, and its contents
            are nobody's fault; else bad_header, missing_tensor, extra_tensor, wrong_dtype, wrong_shape, not_finite or
            norm_bound.
        OSError: a file cannot be read, or the base is damaged.
    """
    try:
        found, inspection = _look(update, base, block_elements)
    except BadUpdateError as error:
        found = file_digest(update)  # the look ended early; a second pass, only for what is refused anyway
        if found == digest:
            raise
        raise _mismatch(found, digest) from error
    if found != digest:
        raise _mismatch(found, digest)
    if norm_bound is not None and inspection.norm is not None:
        check_norm(inspection.norm, norm_bound)
    return inspection


def average(
    base: Path,
    updates: Sequence[tuple[Path, int]],
    target: Path,
    *,
    step: OuterStep,
    stopped: Callable[[], bool] = lambda: False,
    block_elements: int = BLOCK_ELEMENTS,
    threads: int = THREADS,
) -> str:
    """Fold the updates of a round into the next model.

    Threads compute the blocks; this one hashes and writes them, in order, and yet another sets the disk to work while
    that goes on, so that little is left to wait for at the end.

    Args:
        base: the model that the round began with. Its header, notes included, becomes that of the next model.
        updates: (file, samples) of each update that counts, in the order of the shards. Each has been inspected.
        target: the file to write; it is fsynced, and removed if anything fails. Renaming it is the caller's part.
        step: the outer step, for the trained float tensors.
        stopped: asked before each block whether to give up.
        block_elements: elements of each file in memory at once, in each thread; it changes no byte of the result.
        threads: that compute; nor does their number.

    Returns:
        SHA-256 of the target, in hex.

    Raises:
        ValueError: no update, or one with less than one sample.
        Stopped: `stopped` said so.
        BadUpdateError: an update no longer fits the base, or a new value is beyond its dtype (server.averaging.cast).
        OSError: reading or writing failed, or the base is damaged.
    """
    if not updates or min(samples for _, samples in updates) < 1:
        raise ValueError(f"{len(updates)} updates, each of at least one sample, were to be averaged")
    layout = _model_layout(base)
    digest = hashlib.sha256(layout.header)
    try:
        with ExitStack() as stack, target.open("wb", buffering=0) as file:
            starts = [_starts(at, path, layout) for at, (path, _) in enumerate(updates)]
            folds = [
                _Fold(layout, base, updates, starts, step, block_elements, OPEN_FILES // (threads + 1), stack)
                for _ in range(threads + 1)
            ]
            disk = stack.enter_context(_Disk(file.fileno()))
            disk.write(layout.header)
            for block in _in_order(folds, threads, layout, block_elements, stopped):
                digest.update(block)
                disk.write(block)
            disk.sync()
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return digest.hexdigest()


def _in_order(
    folds: Sequence["_Fold"], threads: int, layout: Layout, block_elements: int, stopped: Callable[[], bool]
) -> Iterator[memoryview]:
    """The bytes of the next model, block by block; each is good until the next is asked for."""
    free, busy = deque(folds), deque[tuple[_Fold, Future[memoryview]]]()
    with ThreadPoolExecutor(threads, thread_name_prefix="fold") as pool:
        try:
            for index, tensor in enumerate(layout.tensors):
                for first, count in _spans(tensor, block_elements):
                    if stopped():
                        raise Stopped(f"averaging was broken off at {tensor.name}, element {first}")
                    if not free:
                        fold, oldest = busy.popleft()
                        yield oldest.result()
                        free.append(fold)
                    fold = free.popleft()
                    busy.append((fold, pool.submit(fold.block, index, first, count)))
            for _, left in busy:
                yield left.result()
        finally:
            for _, left in busy:
                left.cancel()


class _Disk:
    """Writes a file, and has the disk take what was written while more comes. A context manager."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._written, self._synced = descriptor, 0, 0
        self._syncing: Future[None] | None = None

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sync")
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while view:
            written = os.write(self._descriptor, view)
            self._written, view = self._written + written, view[written:]
        if self._written - self._synced >= SYNC_EVERY and (self._syncing is None or self._syncing.done()):
            self._wait()
            self._synced = self._written
            self._syncing = self._thread.submit(os.fsync, self._descriptor)

    def sync(self) -> None:
        """Return when all of it would survive a power cut."""
        self._wait()
        os.fsync(self._descriptor)

    def _wait(self) -> None:
        if self._syncing is not None:
            self._syncing.result()  # the system tells of a failed write once


def _look(update: Path, base: Path | None, block_elements: int) -> tuple[str, Inspection]:
    """The digest of a whole update, and what its blocks say. Refuses header, layout and values."""
    layout = read_layout(update)
    model = None if base is None else _model_layout(base)
    if model is not None:
        check_layout(layout, model)
    digest = hashlib.sha256(layout.header)
    raw, raw_base = (np.empty(block_elements * _WIDEST, np.uint8) for _ in range(2))
    scratch = np.empty(block_elements)
    squares: list[float] = []
    with ExitStack() as stack:
        file = stack.enter_context(update.open("rb", buffering=0))
        base_file = None if base is None else stack.enter_context(base.open("rb", buffering=0))
        notes = layout.notes if model is None else model.notes
        for tensor in layout.tensors:  # in the order of the file, without a hole: so the digest sees every byte
            trained = _is_trained(tensor, notes)
            for first, count in _spans(tensor, block_elements):
                block = _read(file, tensor, tensor.start, first, count, raw)
                digest.update(block.view(np.uint8).data)
                check_finite(tensor.name, block, first=first, trained=trained)
                if trained and model is not None and base_file is not None:
                    start = model[tensor.name].start
                    origin = _read(base_file, tensor, start, first, count, raw_base)
                    squares.append(squared_distance(block, origin, scratch=scratch[:count]))
    norm = None if model is None else norm_of(squares)
    return digest.hexdigest(), Inspection(norm, layout.size)


def _mismatch(found: str, announced: str) -> BadUpdateError:
    sentence = f"the file's SHA-256 is {found}, and {announced} was announced: it was damaged on its way"
    return BadUpdateError(sentence, code="digest_mismatch", advice="Upload it again.")


def _starts(at: int, path: Path, layout: Layout) -> "array[int]":
    """Where each tensor of the base lies in update number `at`, in the order of the base."""
    try:
        found = read_layout(path)
        check_layout(found, layout)
    except BadUpdateError as error:
        raise BadUpdateError(f"update {at} ({path.name}): {error}", code=error.code, advice=error.advice) from error
    # Eight bytes a tensor: a thousand layouts kept whole would be larger than the blocks.
    return array("Q", (found[tensor.name].start for tensor in layout.tensors))


class _Fold:
    """What one block at a time is computed with: files of its own, since each has a place in it, and buffers."""

    def __init__(
        self,
        layout: Layout,
        base: Path,
        updates: Sequence[tuple[Path, int]],
        starts: Sequence["array[int]"],
        step: OuterStep,
        block_elements: int,
        open_files: int,
        stack: ExitStack,
    ) -> None:
        """`stack` closes what is opened; of more updates than `open_files`, each is opened again for every block."""
        self._layout, self._starts, self._step = layout, starts, step
        self._paths, self._samples = [path for path, _ in updates], [samples for _, samples in updates]
        self._model = stack.enter_context(base.open("rb", buffering=0))
        self._files = [stack.enter_context(path.open("rb", buffering=0)) for path in self._paths[:open_files]]
        self._index_of = {tensor.name: index for index, tensor in enumerate(layout.tensors)}
        self._total, self._scratch, self._origin = (np.empty(block_elements) for _ in range(3))
        self._raw, self._raw_mean, self._raw_result = (np.empty(block_elements * _WIDEST, np.uint8) for _ in range(3))

    def block(self, index: int, first: int, count: int) -> memoryview:
        """The bytes of the new values [first, first + count) of tensor number `index`; good until the next call."""
        return self._values(index, first, count).view(np.uint8).data

    def _values(self, index: int, first: int, count: int) -> Array:
        tensor, notes = self._layout.tensors[index], self._layout.notes
        blocks = self._blocks(index, first, count, self._raw)
        rule = rule_of(tensor, notes)
        if rule is Rule.MAJORITY:
            return majority(blocks, self._samples)
        if rule is Rule.MAXIMUM:
            return maximum(blocks)
        if rule is Rule.VARIANCE:
            means = self._blocks(self._index_of[notes.variances[tensor.name]], first, count, self._raw_mean)
            values = pooled_variance(blocks, means, self._samples)
        else:
            values = weighted_mean(blocks, self._samples, out=self._total[:count], scratch=self._scratch[:count])
            if _is_trained(tensor, notes):
                values = self._step.apply(self._base(tensor, first, count), values)
        out = _typed(self._raw_result, tensor, count)
        return cast(values, tensor, first=first, out=out)

    def _blocks(self, index: int, first: int, count: int, buffer: Array) -> Iterator[Array]:
        """The same block of every update in turn, each over the one before in `buffer`."""
        tensor = self._layout.tensors[index]
        for at, starts in enumerate(self._starts):
            if at < len(self._files):
                yield _read(self._files[at], tensor, starts[index], first, count, buffer)
            else:
                with self._paths[at].open("rb", buffering=0) as file:
                    yield _read(file, tensor, starts[index], first, count, buffer)

    def _base(self, tensor: TensorInfo, first: int, count: int) -> Float64Block:
        origin = self._origin[:count]
        np.copyto(origin, _read(self._model, tensor, tensor.start, first, count, self._raw))
        return origin


def _model_layout(path: Path) -> Layout:
    """The layout of a model that we keep. That it does not read is the disk's doing, and no update's."""
    try:
        return read_layout(path)
    except BadUpdateError as error:
        raise OSError(errno.EIO, f"the model is damaged: {error}", str(path)) from error


def _is_trained(tensor: TensorInfo, notes: Notes) -> bool:
    """Whether an optimiser trains it: such tensors have a norm and take an outer step."""
    return tensor.is_float and tensor.name not in notes.untrained


def _spans(tensor: TensorInfo, block_elements: int) -> Iterator[tuple[int, int]]:
    """(first element, number of elements) of each block of a tensor; none for an empty tensor."""
    for first in range(0, tensor.elements, block_elements):
        yield first, min(block_elements, tensor.elements - first)


def _read(file: FileIO, tensor: TensorInfo, start: int, first: int, count: int, buffer: Array) -> Array:
    """Elements [first, first + count) of a tensor that begins at byte `start` of this file, as a view of `buffer`."""
    block = _typed(buffer, tensor, count)
    read_exactly(file, block, start + first * block.itemsize)
    return block


def _typed(buffer: Array, tensor: TensorInfo, count: int) -> Array:
    """The beginning of a byte buffer as `count` elements of a tensor."""
    dtype = tensor.numpy_dtype
    return buffer[: count * dtype.itemsize].view(dtype)
