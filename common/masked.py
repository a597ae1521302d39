"""A masked update as a file: what training changed, as whole numbers modulo 2^64 under masks (common.secure).

    worker        trained − base ──Fixed.encode──▶ + masks ──mask_update──▶ update file
    coordinator   update files ──summed, masks taken away, Fixed.decode──▶ the mean change (server.unmasking)

The file is safetensors with one tensor, `masked`: the float tensors of the model one after the other, buffers too, and
then the samples, which are one more masked number. Integers and booleans do not travel: a sum has no use for them.
All is read and written block by block: memory is a few blocks, whatever the size of the model.
"""

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import BadUpdateError
from common.fixed import Fixed
from common.output import Output
from common.secure import Mask, Uint64s, add_masks
from common.weights import Layout, Notes, TensorInfo, file_header, read_block, read_layout, shown

BLOCK_ELEMENTS = 1 << 16
ELEMENT = 8  # bytes
NAME, CODE = "masked", "U64"


@dataclass(frozen=True)
class Masked:
    """A masked update that has been written."""

    digest: str  # SHA-256 in hex
    cut: int  # numbers that had changed by more than the clip, and were cut to it


def travels(tensor: TensorInfo) -> bool:
    """Whether a tensor's change is in a masked update."""
    return tensor.is_float


def length(base: Layout) -> int:
    """Numbers in a masked update of this model: one for each that travels, and the samples."""
    return 1 + sum(tensor.elements for tensor in base.tensors if travels(tensor))


def check_masked(layout: Layout, base: Layout) -> None:
    """Refuse a file that is no masked update of this model. Its numbers say nothing, so nothing else can be checked.

    Raises:
        BadUpdateError: bad_encoding.
    """
    found = [(tensor.name, tensor.dtype, tensor.shape) for tensor in layout.tensors]
    wanted = [(NAME, CODE, (length(base),))]
    if found != wanted:
        sentence = f"the file holds {shown(found)}, and a masked update of this model {shown(wanted)}"
        raise BadUpdateError(sentence, code="bad_encoding", advice="Are worker and coordinator of the same version?")


def mask_update(
    base: Path,
    trained: Path,
    target: Path,
    fixed: Fixed,
    samples: int,
    masks: Collection[Mask],
    *,
    block_elements: int = BLOCK_ELEMENTS,
) -> Masked:
    """Write what training changed, masked.

    Args:
        base: the model that the training began with.
        trained: the model that it came to.
        target: the file to write; removed if anything fails. Putting it onto the disk is the caller's part.
        fixed: how numbers travel.
        samples: that it was trained on, 1 to fixed.heaviest.
        masks: this member's (Secrets.masks).
        block_elements: elements in memory at once; it changes no byte of the result.

    Raises:
        BadUpdateError: not_finite, or the trained model is not the base's.
        ValueError: samples out of their range.
        OSError: reading or writing failed.
    """
    layout, ours = read_layout(base), read_layout(trained)
    cut, first_of = 0, 0
    with ExitStack() as stack:
        old_file, new_file = (stack.enter_context(path.open("rb", buffering=0)) for path in (base, trained))
        out = stack.enter_context(Output(target, durable=False))
        out.write(file_header([(NAME, CODE, (length(layout),))], Notes()))
        for tensor in filter(travels, layout.tensors):
            if tensor.name not in ours or ours[tensor.name].shape != tensor.shape:
                raise BadUpdateError(
                    f"the trained model has no {shown(tensor.name)} like the base", code="missing_tensor"
                )
            start = ours[tensor.name].start
            for first in range(0, tensor.elements, block_elements):
                count = min(block_elements, tensor.elements - first)
                old = read_block(old_file, tensor, tensor.start, first, count).astype(np.float64)
                new = read_block(new_file, ours[tensor.name], start, first, count).astype(np.float64)
                numbers, of_block = _encode(fixed, tensor, first, new - old, samples)
                cut += of_block
                add_masks(numbers, first_of + first, masks)
                out.write(numbers)
            first_of += tensor.elements
        weight = np.array([samples], np.uint64)
        add_masks(weight, first_of, masks)
        out.write(weight)
        return Masked(out.finish(), cut)


def _encode(
    fixed: Fixed, tensor: TensorInfo, first: int, change: "np.ndarray[tuple[int], np.dtype[np.float64]]", samples: int
) -> tuple[Uint64s, int]:
    finite = np.isfinite(change)
    if not finite.all():
        where = f"{shown(tensor.name)} at element {first + int(finite.argmin())}"
        advice = "Training diverged: lower train.lr, or clip gradients."
        raise BadUpdateError(f"the change of {where} is not finite", code="not_finite", advice=advice)
    numbers, cut = fixed.encode(change, samples)
    return numbers.view(np.uint64), cut
