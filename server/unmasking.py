"""The sum of masked updates, unmasked: what the round makes its next model from, as if one worker had sent it.

    K masked updates ──add, modulo 2^64──▶ take every mask out ──▶ Σ change · samples, and Σ samples
        ──divide──▶ base + the mean change: a plain model, which is averaged like the update of one worker

No sum of fewer than all survivors is ever made. Block by block: memory is a few blocks, whatever the size of the model
and the number of updates; the same bytes whatever the size of a block, since whole numbers add up exactly.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

import numpy as np

from common.errors import BadUpdateError
from common.fixed import Fixed
from common.masked import ELEMENT, check_masked, length, travels
from common.output import Output
from common.secure import Mask, Uint64s, add_masks
from common.weights import file_digest, read_block, read_exactly, read_layout
from server.averaging import cast
from server.folding import Stopped
from server.inspection import BLOCK_ELEMENTS, model_layout


def inspect_masked(update: Path, base: Path, *, digest: str) -> None:
    """Look at a masked update: that it came as it was sent, and is one of this model. Its numbers say nothing.

    Raises:
        BadUpdateError: digest_mismatch, bad_header or bad_encoding.
        OSError: a file cannot be read, or the base is damaged.
    """
    found = file_digest(update)
    if found != digest:
        sentence = f"the file's SHA-256 is {found}, and {digest} was announced: it was damaged on its way"
        raise BadUpdateError(sentence, code="digest_mismatch", advice="Upload it again.")
    check_masked(read_layout(update), model_layout(base))


def unmask(
    base: Path,
    updates: Sequence[Path],
    target: Path,
    *,
    fixed: Fixed,
    masks: Collection[Mask],
    stopped: Callable[[], bool] = lambda: False,
    block_elements: int = BLOCK_ELEMENTS,
) -> int:
    """Write base + the mean change of the survivors, in the model's own dtypes, and with its header.

    Args:
        base: the model that the round began with.
        updates: the masked updates of all survivors. Each has been inspected.
        target: the file to write; removed if anything fails.
        fixed: how numbers travel.
        masks: what takes every mask out of the sum (common.secure.masks_left).
        stopped: asked before each block whether to give up.
        block_elements: elements of each file in memory at once; it changes no byte of the result.

    Returns:
        The samples of all survivors together.

    Raises:
        Stopped: `stopped` said so.
        BadUpdateError: bad_samples: the samples that the workers masked cannot be right; not_finite: a new value is
            beyond its dtype.
        OSError: reading or writing failed.
    """
    layout = model_layout(base)
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb", buffering=0)) for path in updates]
        starts = [read_layout(path).tensors[0].start for path in updates]
        model = stack.enter_context(base.open("rb", buffering=0))
        scratch = np.empty(block_elements, np.uint64)

        def total(first: int, count: int) -> Uint64s:
            return _sum(files, starts, first, scratch[:count], masks)

        samples = int(total(length(layout) - 1, 1)[0])
        if not len(updates) <= samples <= fixed.heaviest:
            sentence = f"{len(updates)} masked updates say that they have {samples} samples together"
            raise BadUpdateError(
                f"{sentence}, where {len(updates)} to {fixed.heaviest} are possible", code="bad_samples"
            )
        out, first_of = stack.enter_context(Output(target, durable=False)), 0
        out.write(layout.header)
        for tensor in layout.tensors:
            for first in range(0, tensor.elements, block_elements):
                if stopped():
                    raise Stopped(f"unmasking was broken off at {tensor.name}, element {first}")
                count = min(block_elements, tensor.elements - first)
                old = read_block(model, tensor, tensor.start, first, count)
                if not travels(tensor):
                    out.write(old)
                    continue
                mean = fixed.decode(total(first_of + first, count).view(np.int64), samples)
                out.write(cast(np.add(old.astype(np.float64), mean, out=mean), tensor, first=first))
            first_of += tensor.elements if travels(tensor) else 0
        out.finish()
    return samples


def _sum(
    files: Sequence[FileIO], starts: Sequence[int], first: int, scratch: Uint64s, masks: Collection[Mask]
) -> Uint64s:
    """Numbers [first, first + len(scratch)) of all updates, added up, without masks."""
    total = np.zeros(len(scratch), np.uint64)
    for file, start in zip(files, starts, strict=True):
        read_exactly(file, scratch, start + ELEMENT * first)
        np.add(total, scratch, out=total)
    add_masks(total, first, masks)
    return total
