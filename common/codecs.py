"""Codecs: how the change of a trained tensor travels in fewer bytes than float32.

Pure: arrays in, arrays out; no disk, no network, no torch. What is encoded is a *delta*, never a weight: a weight would
lose each update that is small beside it. A tensor is cut into blocks of `Codec.block` elements, of which only the last
may be shorter, and all that a block needs lies together. So any run of whole blocks is encoded and decoded on its own.

    codec   block          bytes of a whole block                                            bits an element
    bf16        1   2      rounded to nearest, ties to even                                               16
    int8     4096   4100   scale float32 │ 4096 × int8                                                  8.01
    int4       64   34     scale bfloat16 │ 64 × 4 bits, the lower half of a byte first                 4.25
    topk     4096   128    codebook 4 × float32 │ 64 × 2 bits │ 64 × 12 bits                            0.25

    int8, int4   x ≈ q·scale with scale = max|x| / 127 or 7. A scale below the smallest normal number becomes 0, and
                 one so large that q·scale could overflow the largest that does not.
    topk         the 64 elements of largest magnitude (of equals the first), the rest is 0. Their indices ascend, each
                 two in three bytes: the lower 12 bits first. Their values become one of four means: of the large and of
                 the small negative, of the small and of the large positive ones, where large is above the mean
                 magnitude. A block of 64 elements or less is sent whole as bf16: it is never larger than a full block.

All numbers are little-endian. Decoding is one exact look-up or one IEEE multiplication an element: the same bytes give
the same floats on every machine. A decoder believes nothing: the length is known beforehand, and what an encoder never
writes is refused.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NoReturn

import ml_dtypes
import numpy as np
import numpy.typing as npt

from common.errors import BadJobError, BadUpdateError

Bytes = npt.NDArray[np.uint8]
Float32s = npt.NDArray[np.float32]

PIECE = 1 << 16  # elements that are worked on at once, so that they stay in the cache; whole blocks of every codec
KEPT = 64  # elements that topk keeps of a block

_FLOAT32, _BFLOAT16 = np.dtype("<f4"), np.dtype(ml_dtypes.bfloat16)
_UINT32, _UINT16, _INT8 = np.dtype("<u4"), np.dtype("<u2"), np.dtype("i1")
_MAGNITUDE = np.uint32(0x7FFF_FFFF)  # every bit of a float32 but its sign
_INFINITY = 0x7F80_0000  # the magnitude of infinity; that of a NaN is larger
_LARGEST = np.finfo(np.float32).max
_LARGEST_BFLOAT16 = np.uint32(0x7F7F_0000).view(np.float32)
_SMALLEST_NORMAL = np.finfo(np.float32).tiny  # of bfloat16 as well
_TO_INTEGER = np.float32(3 << 22)  # added to |x| < 2^22, it rounds x to an integer, which the low bits then hold


class Codec(ABC):
    """One way to write float32 values. It keeps nothing between calls."""

    name: ClassVar[str]
    block: ClassVar[int]
    """Elements that are encoded together; PIECE is a multiple of it."""
    feedback: ClassVar[bool]
    """Whether it drops so much that the error must be kept and added to the next delta (Karimireddy et al. 2019)."""

    def size(self, count: int) -> int:
        """Bytes of `count` encoded elements, a whole tensor or whole blocks of one."""
        whole, rest = divmod(count, self.block)
        return whole * self._width(self.block) + (self._width(rest) if rest else 0)

    def encode(self, values: Float32s) -> Bytes:
        """Encode a tensor or a run of whole blocks: encode(a ++ b) is encode(a) ++ encode(b) if a is whole blocks.

        Args:
            values: float32 of shape (n,).

        Returns:
            uint8 of shape (size(n),), which `decode` takes.

        Raises:
            ValueError: a value is NaN or infinite, or they are not such an array.
        """
        if values.dtype != _FLOAT32 or values.ndim != 1:
            raise ValueError(f"float32 of one dimension can be encoded, and not {values.dtype} of {values.ndim}")
        values = np.ascontiguousarray(values)
        data = np.empty(self.size(values.size), np.uint8)
        for first, last, start, stop, rows in self._runs(values.size):
            self._pack(values[first:last].reshape(rows, -1), data[start:stop].reshape(rows, -1))
        return data

    def decode(self, data: Bytes, count: int, *, out: Float32s | None = None) -> Float32s:
        """Decode what another machine sent.

        Args:
            data: uint8 of shape (size(count),).
            count: elements: all of a tensor, or whole blocks of one.
            out: contiguous float32 of shape (count,) for the result; allocated when it is not given.

        Returns:
            finite float32 of shape (count,): `out` when it is given.

        Raises:
            BadUpdateError: bad_encoding, the bytes are not what `encode` writes. `out` may be half filled.
            ValueError: `out` is not such an array.
        """
        if out is None:
            out = np.empty(count, np.float32)
        elif out.dtype != _FLOAT32 or out.shape != (count,) or not out.flags.c_contiguous:
            raise ValueError(f"{count} elements cannot be decoded into {out.dtype} of shape {out.shape}")
        if data.shape != (self.size(count),):
            _refuse(f"{count} elements take {self.size(count)} bytes as {self.name}, and {data.size} came")
        data = np.ascontiguousarray(data)
        for first, last, start, stop, rows in self._runs(count):
            self._unpack(data[start:stop].reshape(rows, -1), out[first:last].reshape(rows, -1))
        return out

    def _runs(self, count: int) -> Iterator[tuple[int, int, int, int, int]]:
        """(first, last, start, stop, rows) of runs of whole blocks and of the short last one: elements, bytes, rows."""
        whole = count - count % self.block
        for first in range(0, whole, PIECE):
            last = min(first + PIECE, whole)
            yield first, last, self.size(first), self.size(last), (last - first) // self.block
        if whole < count:
            yield whole, count, self.size(whole), self.size(count), 1

    @abstractmethod
    def _width(self, count: int) -> int:
        """Bytes of one block of `count` elements, 1 <= count <= block."""

    @abstractmethod
    def _pack(self, values: Float32s, data: Bytes) -> None:
        """Encode blocks: float32 (rows, n) into uint8 (rows, width(n))."""

    @abstractmethod
    def _unpack(self, data: Bytes, out: Float32s) -> None:
        """Decode blocks: uint8 (rows, width(n)) into float32 (rows, n)."""


class _BFloat16(Codec):
    name, block, feedback = "bf16", 1, False

    def _width(self, count: int) -> int:
        return 2 * count

    def _pack(self, values: Float32s, data: Bytes) -> None:
        _magnitudes(values)
        # The largest float32 would round to infinity.
        data.view(_BFLOAT16)[...] = np.clip(values, -_LARGEST_BFLOAT16, _LARGEST_BFLOAT16)

    def _unpack(self, data: Bytes, out: Float32s) -> None:
        if (data.view(_UINT16) & np.uint16(_MAGNITUDE >> 16)).max() >= _INFINITY >> 16:
            _refuse("a value is NaN or infinite")
        out[...] = data.view(_BFLOAT16)


class _Int8(Codec):
    name, block, feedback = "int8", 4096, False
    _limit = np.nextafter(_LARGEST / np.float32(127), np.float32(0))  # 127 times it is finite

    def _width(self, count: int) -> int:
        return 4 + count

    def _pack(self, values: Float32s, data: Bytes) -> None:
        scale = _scale(np.max(_magnitudes(values), axis=1, keepdims=True).view(_FLOAT32) / np.float32(127), self._limit)
        data[:, :4] = scale.view(np.uint8)
        data[:, 4:] = _integers(values, scale)

    def _unpack(self, data: Bytes, out: Float32s) -> None:
        scale, codes = data[:, :4].view(_FLOAT32), data[:, 4:].view(_INT8)
        # As bits, so that a sign or a NaN is above the limit too.
        if scale.view(_UINT32).max() > self._limit.view(_UINT32):
            _refuse(f"a scale is outside 0 … {self._limit:.6g}")
        if codes.min() < -127:
            _refuse("a code is -128; they go from -127 to 127")
        np.multiply(codes, scale, out=out)


class _Int4(Codec):
    name, block, feedback = "int4", 64, False
    # 7 times it is finite. Of bfloat16, and not of float16, in which the scales of late, small deltas are 0.
    _limit = ((_LARGEST / np.float32(7)).view(_UINT32) & np.uint32(0xFFFF_0000)).view(_FLOAT32)

    def _width(self, count: int) -> int:
        return 2 + (count + 1) // 2

    def _pack(self, values: Float32s, data: Bytes) -> None:
        largest = np.max(_magnitudes(values), axis=1, keepdims=True).view(_FLOAT32)
        scale = _scale((largest / np.float32(7)).astype(_BFLOAT16).astype(_FLOAT32), self._limit)
        data[:, :2] = scale.astype(_BFLOAT16).view(np.uint8)
        rows, count = values.shape
        nibbles = np.zeros((rows, count + count % 2), np.uint8)
        nibbles[:, :count] = _integers(values, scale)
        nibbles &= np.uint8(15)
        pairs = nibbles.view(_UINT16)
        data[:, 2:] = pairs | pairs >> np.uint16(4)  # of which the lower byte is kept

    def _unpack(self, data: Bytes, out: Float32s) -> None:
        # As bits, and before it is widened, which a signalling NaN would not take quietly.
        if data[:, :2].view(_UINT16).max() > self._limit.view(_UINT32) >> 16:
            _refuse(f"a scale is outside 0 … {self._limit:.6g}")
        scale = data[:, :2].view(_BFLOAT16).astype(_FLOAT32)
        pairs = data[:, 2:].astype(_UINT16)
        pairs |= pairs << np.uint16(4)
        pairs &= np.uint16(0x0F0F)
        nibbles = pairs.view(_INT8)
        if (nibbles == 8).any():
            _refuse("a code is -8; they go from -7 to 7")
        count = out.shape[1]
        if nibbles[:, count:].any():
            _refuse("the half byte after the last element is not 0")
        nibbles ^= np.int8(8)  # 4 bits with a sign: 0 … 7 become 8 … 15, and -7 … -1 become 1 … 7
        nibbles -= np.int8(8)
        np.multiply(nibbles[:, :count], scale, out=out)


class _TopK(Codec):
    name, block, feedback = "topk", 4096, True
    _dense = _BFloat16()

    def _width(self, count: int) -> int:
        return 128 if count > KEPT else 2 * count

    def _pack(self, values: Float32s, data: Bytes) -> None:
        rows, count = values.shape
        if count <= KEPT:
            self._dense._pack(values, data)
            return
        positions = np.flatnonzero(_largest(_magnitudes(values))).reshape(rows, KEPT)
        codebook, codes = _quantised(values.reshape(-1)[positions])
        data[:, :16] = codebook.view(np.uint8)
        four = codes.reshape(rows, -1, 4) << np.array([0, 2, 4, 6], np.uint8)
        data[:, 16:32] = np.bitwise_or.reduce(four, axis=2)
        indices = positions - count * np.arange(rows)[:, None]
        low, high = indices[:, 0::2], indices[:, 1::2]
        triples = data[:, 32:].reshape(rows, -1, 3)
        triples[:, :, 0] = low & 0xFF
        triples[:, :, 1] = low >> 8 | (high & 0xF) << 4
        triples[:, :, 2] = high >> 4

    def _unpack(self, data: Bytes, out: Float32s) -> None:
        rows, count = out.shape
        if count <= KEPT:
            self._dense._unpack(data, out)
            return
        codebook = data[:, :16].view(_FLOAT32)
        if not np.isfinite(codebook).all():
            _refuse("a value of a codebook is NaN or infinite")
        triples = data[:, 32:].reshape(rows, -1, 3).astype(np.intp)
        indices = np.empty((rows, KEPT), np.intp)
        indices[:, 0::2] = triples[:, :, 0] | (triples[:, :, 1] & 0xF) << 8
        indices[:, 1::2] = triples[:, :, 1] >> 4 | triples[:, :, 2] << 4
        if (indices[:, 1:] <= indices[:, :-1]).any():
            _refuse("indices do not ascend")
        if (indices[:, -1] >= count).any():
            _refuse(f"an index is beyond a block of {count} elements")
        codes = (data[:, 16:32, None] >> np.array([0, 2, 4, 6], np.uint8) & np.uint8(3)).reshape(rows, KEPT)
        out.fill(0)
        # Row by row in one go: `indices` are unique, and below `count` in every row.
        np.put_along_axis(out, indices, np.take_along_axis(codebook, codes.astype(np.intp), axis=1), axis=1)


def _magnitudes(values: Float32s) -> npt.NDArray[np.int32]:
    """The bits of |x|, which order as |x| does. Refuses NaN and infinity."""
    magnitudes = (values.view(_UINT32) & _MAGNITUDE).view(np.int32)
    if magnitudes.max() >= _INFINITY:
        raise ValueError("a value is NaN or infinite, and cannot be encoded")
    return magnitudes


def _scale(wanted: Float32s, limit: np.float32) -> Float32s:
    """The scales as they are sent: at most `limit`, and 0 where a subnormal one would be too coarse."""
    return np.where(wanted < _SMALLEST_NORMAL, np.float32(0), np.minimum(wanted, limit))


def _integers(values: Float32s, scale: Float32s) -> npt.NDArray[np.uint32]:
    """x / scale rounded to nearest, ties to even, in the low bits as two's complement; 0 where the scale is 0.

    |x| / scale is below 127.1 for int8 and 7.1 for int4: nothing has to be clamped.
    """
    steps = values / np.where(scale == 0, np.float32(np.inf), scale)
    steps += _TO_INTEGER
    return steps.view(np.uint32)


def _largest(magnitudes: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """KEPT times True in each row, which is longer: at the largest values, and of equal ones at the first."""
    place = magnitudes.shape[1] - KEPT
    least = np.partition(magnitudes, place, axis=1)[:, place, None]
    kept = magnitudes >= least
    crowded = np.count_nonzero(kept, axis=1) > KEPT
    if crowded.any():  # rare: several share the least magnitude that is kept
        above, level = magnitudes[crowded] > least[crowded], magnitudes[crowded] == least[crowded]
        room = KEPT - np.count_nonzero(above, axis=1)
        kept[crowded] = above | level & (np.cumsum(level, axis=1) <= room[:, None])
    return kept


def _quantised(values: Float32s) -> tuple[Float32s, Bytes]:
    """The codebook (rows, 4) and the codes (rows, KEPT) of the values (rows, KEPT) that are kept."""
    magnitudes = np.abs(values)
    large = magnitudes > _sums(magnitudes)[:, None] / KEPT
    codes = np.where(values < 0, np.uint8(1) - large, np.uint8(2) + large).astype(np.uint8)
    members = codes[:, None, :] == np.arange(4)[:, None]
    sums = _sums(np.where(members, values[:, None, :], np.float32(0)))
    means = sums / np.maximum(np.count_nonzero(members, axis=2), 1)
    return means.astype(np.float32), codes


def _sums(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Sums over the last axis, of length KEPT, in float64: by halves, so in one order however many rows there are."""
    sums = values.astype(np.float64)
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def _refuse(sentence: str) -> NoReturn:
    advice = "Are both sides of the same version? The update was not used."
    raise BadUpdateError(f"the encoding is wrong: {sentence}", code="bad_encoding", advice=advice)


_BY_NAME: dict[str, Codec] = {kind.name: kind for kind in (_BFloat16(), _Int8(), _Int4(), _TopK())}

CODECS: tuple[str, ...] = tuple(_BY_NAME)
"""Names of the codecs, from the finest to the coarsest."""


def codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        BadJobError: there is none.
    """
    if name not in _BY_NAME:
        raise BadJobError(f"there is no codec {name!r}; known are {', '.join(CODECS)}", advice="Mend the job file.")
    return _BY_NAME[name]
