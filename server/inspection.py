"""The look that is taken at an update, once and from its first byte to its last, before it may count.

    update ──inspect──▶ an Inspection, or BadUpdateError

Read block by block into buffers that are used again: memory is a few blocks, whatever the size of the model.
"""

import errno
import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.codecs import Codec
from common.deltas import check_encoded, decode_delta, is_trained
from common.errors import BadUpdateError
from common.weights import Layout, TensorInfo, file_digest, read_block, read_exactly, read_layout
from server.robust import check_finite, check_layout, check_norm, norm_of, squared_distance

BLOCK_ELEMENTS = 1 << 16  # whole blocks of every codec; 256 KiB of float32
_WIDEST = 8  # bytes of the widest dtype


@dataclass(frozen=True)
class Inspection:
    """What is known of an update that may count."""

    norm: float | None  # L2 distance to the base over the trained tensors; None where it was not asked for
    size: int  # bytes


def inspect(
    update: Path,
    base: Path | None,
    *,
    digest: str,
    norm_bound: float | None,
    measured: bool = False,
    codec: Codec | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> Inspection:
    """Look at an update.

    Args:
        update: the file as it came.
        base: the model that it was trained from; None for a freshly built model, of which nothing is known.
        digest: SHA-256 in hex that its sender announced.
        norm_bound: largest L2 distance to the base over trained float tensors, if there is a bound.
        measured: whether that distance is wanted without a bound too.
        codec: what the job's updates are encoded with; None: they are whole models. A first model always is.
        block_elements: elements read at once, whole blocks of the codec.

    Raises:
        BadUpdateError: digest_mismatch, whatever else is wrong too: the file was damaged on its way, and its contents
            are nobody's fault; else bad_header, bad_encoding, missing_tensor, extra_tensor, wrong_dtype, wrong_shape,
            not_finite or norm_bound.
        OSError: a file cannot be read, or the base is damaged.
    """
    try:
        with ExitStack() as stack:
            measured = measured or norm_bound is not None
            look = _Look(update, base, codec, stack, measured=measured, block_elements=block_elements)
            found, inspection = look.run()
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


class _Look:
    """One look: the digest of a whole update, and what its blocks say."""

    def __init__(
        self,
        update: Path,
        base: Path | None,
        codec: Codec | None,
        stack: ExitStack,
        *,
        measured: bool,
        block_elements: int,
    ) -> None:
        """Refuse header and layout. With `measured`, the norm is computed too."""
        self._layout = read_layout(update)
        self._model = None if base is None else model_layout(base)
        self._codec = codec if base is not None else None
        if self._model is not None and self._codec is not None:
            check_encoded(self._layout, self._model, self._codec)
        elif self._model is not None:
            check_layout(self._layout, self._model)
        self._file = stack.enter_context(update.open("rb", buffering=0))
        self._base = None if base is None or not measured else stack.enter_context(base.open("rb", buffering=0))
        self._measured, self._block_elements = measured and base is not None, block_elements
        longest = max(
            [min(tensor.elements, block_elements) for tensor in (self._model or self._layout).tensors], default=0
        )
        self._raw, self._raw_base = (np.empty(longest * _WIDEST, np.uint8) for _ in range(2))
        self._scratch = np.empty(longest if self._measured else 0)
        self._digest, self._squares = hashlib.sha256(self._layout.header), list[float]()

    def run(self) -> tuple[str, Inspection]:
        """Refuse values. Returns the digest, and what was found."""
        notes = (self._model or self._layout).notes
        for tensor in self._layout.tensors:  # in the order of the file, without a hole: so the digest sees every byte
            model = self._model[tensor.name] if self._model is not None else tensor
            if self._codec is not None and is_trained(model, notes):
                self._encoded(tensor, model, self._codec)
            else:
                self._plain(tensor, model, trained=is_trained(model, notes))
        norm = norm_of(self._squares) if self._measured else None
        return self._digest.hexdigest(), Inspection(norm, self._layout.size)

    def _plain(self, tensor: TensorInfo, model: TensorInfo, *, trained: bool) -> None:
        for first in range(0, tensor.elements, self._block_elements):
            count = min(self._block_elements, tensor.elements - first)
            block = read_block(self._file, tensor, tensor.start, first, count, self._raw)
            self._digest.update(block.view(np.uint8).data)
            check_finite(tensor.name, block, first=first, trained=trained)
            if trained and self._base is not None:
                origin = read_block(self._base, model, model.start, first, count, self._raw_base)
                self._squares.append(squared_distance(block, origin, scratch=self._scratch[:count]))

    def _encoded(self, tensor: TensorInfo, model: TensorInfo, codec: Codec) -> None:
        """Decoded, to refuse what no encoder made; a decoded delta is finite."""
        for first in range(0, model.elements, self._block_elements):
            count = min(self._block_elements, model.elements - first)
            skipped = codec.size(first)
            data = self._raw[: codec.size(first + count) - skipped]
            read_exactly(self._file, data, tensor.start + skipped)
            self._digest.update(data.data)
            delta = decode_delta(data, codec, model, first, count)
            if self._measured:
                self._squares.append(float(np.square(delta, dtype=np.float64).sum()))


def _mismatch(found: str, announced: str) -> BadUpdateError:
    sentence = f"the file's SHA-256 is {found}, and {announced} was announced: it was damaged on its way"
    return BadUpdateError(sentence, code="digest_mismatch", advice="Upload it again.")


def model_layout(path: Path) -> Layout:
    """The layout of a model that we keep. That it does not read is the disk's doing, and no update's."""
    try:
        return read_layout(path)
    except BadUpdateError as error:
        raise OSError(errno.EIO, f"the model is damaged: {error}", str(path)) from error
