"""The slots of a round: what each of its shards carries from now on, and the sum of all slots of the job.

    base, updates, slots before ──one pass an update──▶ slots after ──one pass──▶ the sum after

The sum changes by exactly what the files of the slots change by, so that it is the sum of those files at all times. All
is read block by block; memory is a few blocks a thread, whatever the size of the model and the number of updates. The
bytes that come out depend on the files and the order of the shards alone.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.codecs import Codec
from common.drift import Float32s, Method, next_total, weight_of
from common.facts import Slot
from common.output import Output
from common.slots import BLOCK_ELEMENTS, Carried, Flat, check_held, trained_blocks, write_slot
from common.weights import Layout, read_exactly
from server import folding
from server.blobs import Blobs
from server.drift import key_of, shards_of
from server.inspection import model_layout
from server.rounds import Aggregating, Job


@dataclass(frozen=True)
class Made:
    """Slots and sum after a round: files that have no name yet, and their digests."""

    slots: tuple[tuple[str, Path, str], ...]  # key, file, digest; in the order of the shards
    total: tuple[tuple[Path, str], ...]  # file and digest of its two numbers
    fresh: int  # shards that carried nothing before

    @property
    def files(self) -> tuple[tuple[Path, str], ...]:
        """All of them, with their digests."""
        return (*((path, digest) for _, path, digest in self.slots), *self.total)

    @property
    def facts(self) -> tuple[Slot, ...]:
        """What the journal keeps of the slots."""
        return tuple(Slot(key=key, digest=digest) for key, _, digest in self.slots)


@contextmanager
def made(
    job: Job, phase: Aggregating, blobs: Blobs, codec: Codec | None, stopped: Callable[[], bool]
) -> Iterator[Made | None]:
    """Make the slots of the round's shards anew, and their sum; what has no name at the end is removed.

    Args:
        job: with the slots before the round; of one without `train.drift` there is nothing to make.
        phase: the frozen updates, in the order of the shards.
        blobs: where everything is.
        codec: what updates are encoded with; None: they are whole models.
        stopped: asked before each block whether to give up.

    Raises:
        Stopped: `stopped` said so (server.folding).
        BadUpdateError: not_finite, a number is beyond float32; an update no longer fits.
        OSError: reading or writing failed, or a file is damaged.
    """
    if job.spec.train.drift == "none":
        yield None
        return
    files = [blobs.part(f"{job.id}.slot{update.shard}.{phase.round}") for update in phase.accepted]
    sums = [blobs.part(f"{job.id}.total{number}.{phase.round}") for number in range(2)]

    def at_block() -> None:
        if stopped():
            raise folding.Stopped("making the slots was broken off")

    try:
        yield _make(job, phase, blobs, codec, files, sums, at_block)
    finally:
        for path in (*files, *sums):
            path.unlink(missing_ok=True)


def _make(
    job: Job,
    phase: Aggregating,
    blobs: Blobs,
    codec: Codec | None,
    files: Sequence[Path],
    sums: Sequence[Path],
    at_block: Callable[[], None],
) -> Made:
    base, train, shards = blobs.path(phase.base.digest), job.spec.train, shards_of(job)
    keys = [key_of(phase.before.shards[update.shard]) for update in phase.accepted]
    before = [blobs.path(job.slots[key]) if key in job.slots else None for key in keys]
    total = [blobs.path(digest) for digest in job.slot_total]
    assert train.drift != "none"  # noqa: S101 - `made` has looked
    method: Method = train.drift

    def one(at: int) -> str:
        update = phase.accepted[at]
        carried = Carried(method, shards, before[at], total[0] if total else None)
        weight, path = weight_of(train, update.rate_sum), blobs.path(update.digest)
        return write_slot(base, path, codec, carried, weight, files[at], durable=True, at_block=at_block)

    with ThreadPoolExecutor(folding.THREADS, thread_name_prefix="slots") as pool:
        digests = list(pool.map(one, range(len(files))))
    written = write_total(model_layout(base), total, list(zip(before, files, strict=True)), sums, at_block)
    return Made(
        tuple(zip(keys, files, digests, strict=True)),
        tuple(zip(sums, written, strict=True)),
        sum(path is None for path in before),
    )


def write_total(
    layout: Layout,
    before: Sequence[Path],
    slots: Sequence[tuple[Path | None, Path]],
    targets: Sequence[Path],
    at_block: Callable[[], None] = lambda: None,
    *,
    block_elements: int = BLOCK_ELEMENTS,
) -> tuple[str, str]:
    """Write both numbers of the sum of all slots.

    Args:
        layout: of the model.
        before: files of both numbers before the round; none: zeros.
        slots: (before, after) of each shard of the round, in the order of the shards; None: zeros.
        targets: both files to write; removed if anything fails. They survive a power cut when this returns.
        at_block: called before each block; what it raises ends this.
        block_elements: elements of each file in memory at once; it changes no byte of the result.

    Returns:
        SHA-256 of both, in hex.

    Raises:
        BadUpdateError: not_finite, the sum is beyond float32.
        OSError: reading or writing failed, or a file is damaged.
    """
    at = 0
    with ExitStack() as stack:
        total, rest = (stack.enter_context(Flat(path, layout)) for path in (before or (None, None)))
        outputs = [stack.enter_context(Output(path)) for path in targets]
        for tensor, first, count in trained_blocks(layout, block_elements):
            at_block()
            blocks = next_total(total.read(count), rest.read(count), _pairs(slots, at, count))
            for output, block in zip(outputs, blocks, strict=True):
                check_held(tensor, first, block, "the sum of the slots")
                output.write(block)
            at += count
        first_digest, second_digest = (output.finish() for output in outputs)
        return first_digest, second_digest


def _pairs(slots: Sequence[tuple[Path | None, Path]], at: int, count: int) -> Iterator[tuple[Float32s, Float32s]]:
    """Numbers [at, at + count) of each slot before and after. Opened for each block: a round may have many shards."""
    for before, after in slots:
        yield _numbers(before, at, count), _numbers(after, at, count)


def _numbers(path: Path | None, at: int, count: int) -> Float32s:
    block = np.zeros(count, np.float32)
    if path is not None:
        with path.open("rb", buffering=0) as file:
            read_exactly(file, block, at * block.itemsize)
    return block
