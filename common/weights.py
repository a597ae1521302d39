"""Weights in safetensors files, without torch: what a file holds, writing and reading one, publishing it for users.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes back to back. A header
comes from another machine and is believed only as far as it can be checked; a name in it never becomes a path. What
safetensors cannot say itself travels as `Notes`, one JSON string under the metadata key "lydian". Nothing here averages
or judges values. The bytes of a tensor are little-endian, as are the machines that we run on.
"""

import hashlib
import json
import math
import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from common.errors import BadUpdateError
from common.messages import Digest, Message

Array = npt.NDArray[Any]
Kind = tuple[str, str, tuple[int, ...]]
"""name, safetensors code and shape of a tensor."""

FLOATS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
"""safetensors code of a floating-point dtype -> the numpy dtype."""

DTYPES: dict[str, np.dtype[Any]] = FLOATS | {
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""safetensors code of a dtype that we take -> the numpy dtype."""

HEADER_LIMIT = 16 << 20  # bytes; a header of this size names more than 100,000 tensors
PIECE = 1 << 20  # bytes that are read, hashed or copied at once
_DIMENSIONS = 32  # as many as the oldest numpy that we support can hold
_ADDRESSABLE = 2**63  # bytes; numpy refuses to shape even an empty array whose other dimensions exceed this
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_NOTES = "lydian"
_ADVICE = "Write the file with safetensors; if it was cut or changed on its way, send it again."
_QUOTE = reprlib.Repr()
_QUOTE.maxstring = _QUOTE.maxother = 100


# ---------------------------------------------------------------- what a file says


class Notes(Message):
    """What the machine that built the model knows about its tensors, and safetensors cannot say."""

    aliases: dict[str, str] = Field(
        default_factory=dict, description="tied weight that is not in the file -> tensor that holds its values"
    )
    variances: dict[str, str] = Field(default_factory=dict, description="BatchNorm running variance -> running mean")
    buffers: tuple[str, ...] = Field((), description="float tensors that no optimiser trains")
    rest: Digest | None = Field(
        None, description="of the model's tensors that are in no file, since model(config) builds them; None: all are"
    )
    codec: str | None = Field(
        None, description="how the trained tensors are encoded (common.deltas); None: they are not"
    )

    @cached_property
    def untrained(self) -> frozenset[str]:
        """Names of the float tensors that no optimiser trains: buffers, running means and running variances."""
        return frozenset(self.buffers).union(self.variances, self.variances.values())

    def text(self) -> str:
        """The value of the metadata key: the same notes give the same characters."""
        fields = self.model_dump(mode="json", exclude_none=True)
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in its file, and how its bytes read."""

    name: str
    dtype: str  # safetensors code, a key of DTYPES
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The numpy dtype of the elements."""
        return DTYPES[self.dtype]

    @property
    def elements(self) -> int:
        """Number of elements: 1 for a 0-dimensional tensor, 0 for an empty one."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return self.dtype in FLOATS


@dataclass(frozen=True)
class Layout:
    """What a file holds and where. Every check of `read_layout` has been passed."""

    tensors: tuple[TensorInfo, ...]  # ascending by offset, without hole or overlap
    header: bytes  # length and JSON, verbatim: everything before the first tensor
    size: int  # bytes of the whole file
    notes: Notes

    @cached_property
    def _by_name(self) -> dict[str, TensorInfo]:
        return {tensor.name: tensor for tensor in self.tensors}

    def __getitem__(self, name: str) -> TensorInfo:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name


def shown(value: object) -> str:
    """A value from a file as a sentence may quote it: escaped, and cut where it is long, wide or deep."""
    return _QUOTE.repr(value)


def read_layout(path: Path) -> Layout:
    """Read and check the header of a safetensors file. No tensor is read.

    Raises:
        BadUpdateError: bad_header, with a sentence that names the tensor and the values that do not fit: the header is
            longer than HEADER_LIMIT, not a JSON object, or has a key twice; a dtype is unknown; a shape does not give
            the length; tensors leave a hole or overlap; the file is longer or shorter than it says; notes name a
            tensor that is not there.
        OSError: the file cannot be read.

    Source: github.com/huggingface/safetensors, "Format"; stricter than its library, which takes duplicate keys.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            _refuse(f"the file has {size} bytes, and a safetensors file has at least 8")
        head = bytearray(8)
        read_exactly(file, head, 0)
        length = int.from_bytes(head, "little")
        if length > min(HEADER_LIMIT, size - 8):
            _refuse(f"the header claims {length} bytes; the file has {size}, and a header at most {HEADER_LIMIT}")
        body = bytearray(length)
        read_exactly(file, body, 8)
    return _layout(bytes(head + body), size)


def _layout(header: bytes, size: int) -> Layout:
    """The checked layout of a file of `size` bytes that begins with `header`."""
    if header[8:9] != b"{":  # JSON may begin with spaces, a safetensors header may not
        _refuse(f"the header begins with {shown(header[8:9])} instead of an opening brace")
    fields = _parse(header[8:], "header")
    metadata = fields.pop(_METADATA, {})
    tensors = [_tensor(name, entry, len(header)) for name, entry in fields.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop, tensor.name))
    end = len(header)
    for tensor in tensors:
        if tensor.start != end:
            what = "leaves a hole" if tensor.start > end else "overlaps"
            _refuse(f"{shown(tensor.name)} begins at byte {tensor.start}, and byte {end} is next: it {what}")
        end = tensor.stop
    if end != size:
        _refuse(f"the tensors end at byte {end}, and the file has {size} bytes")
    layout = Layout(tuple(tensors), header, size, _notes(metadata))
    _check_notes(layout)
    return layout


def _tensor(name: str, entry: object, offset: int) -> TensorInfo:
    """One checked entry of the header; `offset` is where the tensors' bytes begin in the file."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(f"{shown(name)} is {shown(entry)}, and must have exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        _refuse(f"{shown(name)} has dtype {shown(code)}; known are {', '.join(DTYPES)}")
    if not _whole_numbers(shape) or len(shape) > _DIMENSIONS:
        _refuse(f"{shown(name)} has shape {shown(shape)}; it must be at most {_DIMENSIONS} whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        _refuse(f"{shown(name)} has data_offsets {shown(offsets)}; they must be two whole numbers")
    start, stop = offsets
    itemsize = DTYPES[code].itemsize
    if math.prod(max(length, 1) for length in shape) * itemsize >= _ADDRESSABLE:
        _refuse(f"{shown(name)} has shape {shown(shape)}, more than a machine can address")
    if stop - start != math.prod(shape) * itemsize:
        length = math.prod(shape) * itemsize
        _refuse(f"{shown(name)}, {code} of shape {shown(shape)}, takes {length} bytes and not {shown(offsets)}")
    return TensorInfo(name, code, tuple(shape), offset + start, offset + stop)


def _whole_numbers(values: object) -> bool:
    # `type(...) is int`, since JSON's true is an int to isinstance.
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _notes(metadata: object) -> Notes:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(f"{_METADATA} is {shown(metadata)}; it must be strings by name")
    if _NOTES not in metadata:
        return Notes()
    fields = _parse(metadata[_NOTES], "notes")
    try:
        return Notes.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        _refuse(f"the notes are wrong at {shown(first['loc'])}: {first['msg']}")


def _check_notes(layout: Layout) -> None:
    """Refuse notes that name a tensor which is not there, or which cannot be what they say."""
    notes = layout.notes
    named = (*notes.aliases.values(), *notes.variances, *notes.variances.values(), *notes.buffers)
    for name in named:
        if name not in layout:
            _refuse(f"the notes name {shown(name)}, and there is no such tensor")
    for alias in notes.aliases:
        if alias in layout or alias == _METADATA:
            _refuse(f"the notes call {shown(alias)} an alias, and the file has its own entry of that name")
    for name, mean_name in notes.variances.items():
        variance, mean = layout[name], layout[mean_name]
        if not (variance.is_float and mean.is_float and variance.shape == mean.shape):
            kinds = f"{variance.dtype} {shown(variance.shape)} and {mean.dtype} {shown(mean.shape)}"
            _refuse(
                f"a variance and its mean must be float and alike; {shown(name)} and {shown(mean_name)} are {kinds}"
            )
        if mean_name in notes.variances:
            _refuse(f"the notes call {shown(mean_name)} a mean and a variance")


def _parse(text: str | bytes, what: str) -> dict[str, Any]:
    """One JSON object without a key twice."""
    try:
        # Decoded here, as json.loads would take UTF-16 for JSON too.
        decoded = text.decode() if isinstance(text, bytes) else text
        fields = json.loads(decoded, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a key twice, too deep
        _refuse(f"the {what} cannot be read: {error}", error)
    if not isinstance(fields, dict):
        _refuse(f"the {what} must be a JSON object, and not {shown(fields)}")
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the key {shown(name)} is there twice")
        name.encode()  # JSON can spell half a surrogate pair, which could never be written to a file again
        fields[name] = value
    return fields


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _refuse(sentence: str, cause: Exception | None = None) -> NoReturn:
    raise BadUpdateError(sentence, code="bad_header", advice=_ADVICE) from cause


# ---------------------------------------------------------------- bytes


def read_exactly(file: FileIO, target: bytearray | memoryview | Array, offset: int) -> None:
    """Fill `target` (contiguous) with the file's bytes from `offset` on.

    Raises:
        OSError: the file ends before `target` is full: it was cut after its length had been checked.
    """
    view = target.view(np.uint8).data if isinstance(target, np.ndarray) else memoryview(target)
    file.seek(offset)
    while view:
        got = file.readinto(view)
        if not got:
            raise OSError(f"{file.name!s} ended {len(view)} bytes too early, at byte {file.tell()}")
        view = view[got:]


def read_block(
    file: FileIO, tensor: TensorInfo, start: int, first: int, count: int, buffer: Array | None = None
) -> Array:
    """Elements [first, first + count) of a tensor that begins at byte `start` of this file.

    Args:
        file: where they are.
        tensor: whose they are.
        start: byte at which the tensor begins.
        first: the first element.
        count: elements.
        buffer: bytes to read into, of which the result is a view; allocated when it is not given.

    Raises:
        OSError: the file ends too early.
    """
    block = np.empty(count, tensor.numpy_dtype) if buffer is None else typed(buffer, tensor, count)
    read_exactly(file, block, start + first * block.itemsize)
    return block


def typed(buffer: Array, tensor: TensorInfo, count: int) -> Array:
    """The beginning of a byte buffer as `count` elements of a tensor."""
    dtype = tensor.numpy_dtype
    return buffer[: count * dtype.itemsize].view(dtype)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    piece = memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(piece):
            digest.update(piece[:got])
    return digest.hexdigest()


# ---------------------------------------------------------------- whole files


def save(path: Path, arrays: Mapping[str, Array], notes: Notes) -> None:
    """Write arrays as a safetensors file. The same names, values and notes give the same bytes, in any order.

    Args:
        path: the file; what was there is overwritten. Not atomic: give it a name that nobody reads yet.
        arrays: name -> array of any shape and strides, 0-dimensional and empty ones too, with a dtype of DTYPES.
        notes: they travel in the header.

    Raises:
        ValueError: an array's dtype has no code in DTYPES, or its name is the one that safetensors keeps for itself.
        BadUpdateError: bad_header, the notes do not fit the arrays. Nothing has been written.
    """
    # Written here and not by the safetensors library: safetensors.numpy 0.8.0 saves strided arrays wrong without a
    # word and cannot open fp8, and its functions copy every tensor first. The format is three lines.
    kinds: list[Kind] = []
    for name, array in arrays.items():
        code = _CODES.get(array.dtype.newbyteorder("<"))
        if code is None or name == _METADATA:
            wrong = f"dtype {array.dtype}" if code is None else "a name that safetensors keeps for itself"
            raise ValueError(f"{shown(name)} cannot be saved: it has {wrong}")
        kinds.append((name, code, array.shape))
    header, order = _header(kinds, {_NOTES: notes.text()})
    _layout(header, len(header) + sum(array.nbytes for array in arrays.values()))
    with path.open("wb") as file:
        file.write(header)
        for name, code, _ in order:
            # Not ascontiguousarray, which gives a 0-dimensional array a dimension, nor tobytes, which always copies.
            values = np.asarray(arrays[name], dtype=DTYPES[code], order="C").reshape(-1)
            file.write(values.view(np.uint8).data)


def load(path: Path) -> dict[str, Array]:
    """Read a whole file at once: name -> array that owns its memory, in the order of the file.

    Raises:
        BadUpdateError: bad_header, as `read_layout`.
    """
    layout = read_layout(path)
    arrays: dict[str, Array] = {}
    with path.open("rb", buffering=0) as file:
        for tensor in layout.tensors:
            array = np.empty(tensor.shape, tensor.numpy_dtype)
            read_exactly(file, array.reshape(-1), tensor.start)
            arrays[tensor.name] = array
    return arrays


def publish(source: Path, target: Path) -> None:
    """Write a model as a user wants it: `load_state_dict(safetensors.torch.load_file(target))` works, strictly.

    Every alias becomes a tensor of its own with the values that it shares, and our notes are left out. Copies in
    pieces, so that memory does not grow with the model. Atomic: `target` is the old file or the whole new one.

    Args:
        source: a model as the coordinator keeps it.
        target: the file to make; `target` with .part appended is used on the way.

    Raises:
        BadUpdateError: bad_header, `source` is not such a file.
        OSError: reading or writing failed; the .part file is removed.
    """
    layout = read_layout(source)
    held_by = {tensor.name: tensor for tensor in layout.tensors}
    held_by |= {alias: layout[name] for alias, name in layout.notes.aliases.items()}
    header, order = _header(((name, held.dtype, held.shape) for name, held in held_by.items()), {"format": "pt"})
    part = target.with_name(f"{target.name}.part")
    try:
        with source.open("rb", buffering=0) as old, part.open("wb") as new:
            new.write(header)
            piece = memoryview(bytearray(PIECE))
            for name, _, _ in order:
                held = held_by[name]
                for start in range(held.start, held.stop, PIECE):
                    view = piece[: min(PIECE, held.stop - start)]
                    read_exactly(old, view, start)
                    new.write(view)
            new.flush()
            os.fsync(new.fileno())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def file_header(kinds: Iterable[Kind], notes: Notes) -> bytes:
    """Everything before the first tensor of a file with these tensors, whose bytes follow in the order given."""
    return _written(kinds, {_NOTES: notes.text()})


def _header(kinds: Iterable[Kind], metadata: dict[str, str]) -> tuple[bytes, list[Kind]]:
    """The header of a file with these tensors, and the order in which their bytes follow.

    Wide elements first, then by name, and spaces up to a multiple of eight: so every tensor is aligned to its elements.
    """
    order = sorted(kinds, key=lambda kind: (-DTYPES[kind[1]].itemsize, kind[0]))
    return _written(order, metadata), order


def _written(kinds: Iterable[Kind], metadata: dict[str, str]) -> bytes:
    fields: dict[str, Any] = {_METADATA: metadata}
    end = 0
    for name, code, shape in kinds:
        start, end = end, end + math.prod(shape) * DTYPES[code].itemsize
        fields[name] = {"dtype": code, "shape": shape, "data_offsets": (start, end)}
    body = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body
