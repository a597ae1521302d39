"""Weight files: every dtype and shape there and back, beside the safetensors library; headers that lie are refused."""

import hashlib
import itertools
import json
import os
import random
import resource
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import BadUpdateError
from common.weights import (
    DTYPES,
    FLOATS,
    HEADER_LIMIT,
    PIECE,
    Array,
    Notes,
    file_digest,
    load,
    publish,
    read_exactly,
    read_layout,
    save,
    shown,
)

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
EMPTY = Notes()


@contextmanager
def scratch_file() -> Iterator[Path]:
    """A path of its own for each example of a property, which pytest's tmp_path is not."""
    with TemporaryDirectory() as folder:
        yield Path(folder) / "model.safetensors"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# ---------------------------------------------------------------- there and back


def disguises(array: Array) -> Iterator[Array]:
    """The same values in every memory layout that numpy hands out."""
    yield array
    if array.ndim:
        yield np.repeat(array, 2, axis=0)[::2]  # strided
        yield array[::-1].copy()[::-1]  # negative stride
    if array.ndim > 1:
        yield array.T.copy().T  # Fortran order
    if array.dtype.kind in "fiu":
        yield array.astype(array.dtype.newbyteorder(">"))
    yield np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)  # read-only


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    code = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    size = int(np.prod(shape)) * DTYPES[code].itemsize
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    plain = (raw & 1 if code == "BOOL" else raw).view(DTYPES[code]).reshape(shape)
    return draw(st.sampled_from(list(disguises(plain))))


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
MODELS = st.dictionaries(NAMES, arrays(), max_size=5)


def bits(array: Array) -> tuple[object, tuple[int, ...], bytes]:
    """What must survive: dtype, shape and every bit, NaNs included."""
    native = array.astype(array.dtype.newbyteorder("<")) if array.dtype.kind in "fiu" else array
    return native.dtype, native.shape, native.tobytes()


def torch_bits(tensor: torch.Tensor) -> tuple[object, tuple[int, ...], bytes]:
    code = next(code for code, dtype in TORCH.items() if dtype == tensor.dtype)
    flat = tensor.contiguous().reshape(-1)
    return DTYPES[code], tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def as_torch(array: Array) -> torch.Tensor:
    dtype, shape, raw = bits(array)
    code = next(code for code, known in DTYPES.items() if known == dtype)
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(TORCH[code]) if raw else torch.empty(0)
    return flat.to(TORCH[code]).reshape(shape)


@given(MODELS)
def test_what_is_saved_is_loaded_again_bit_by_bit(model: dict[str, Array]) -> None:
    with scratch_file() as path:
        save(path, model, EMPTY)
        found = load(path)
    assert {name: bits(array) for name, array in found.items()} == {name: bits(array) for name, array in model.items()}
    assert all(array.flags.writeable and array.flags.c_contiguous for array in found.values())


@given(MODELS)
def test_torch_reads_what_is_saved(model: dict[str, Array]) -> None:
    with scratch_file() as path:
        save(path, model, EMPTY)
        found = safetensors.torch.load_file(path)
    expected = {name: bits(array) for name, array in model.items()}
    assert {name: torch_bits(tensor) for name, tensor in found.items()} == expected


@given(MODELS)
def test_what_torch_saves_is_loaded(model: dict[str, Array]) -> None:
    with scratch_file() as path:
        safetensors.torch.save_file({name: as_torch(array) for name, array in model.items()}, path)
        found = load(path)
    assert {name: bits(array) for name, array in found.items()} == {name: bits(array) for name, array in model.items()}


@given(MODELS, st.randoms(use_true_random=False))
def test_the_order_of_the_names_never_changes_the_bytes(model: dict[str, Array], chance: random.Random) -> None:
    shuffled = list(model.items())
    chance.shuffle(shuffled)
    with scratch_file() as path:
        save(path, model, EMPTY)
        first = path.read_bytes()
        save(path, dict(shuffled), EMPTY)
        assert path.read_bytes() == first


@given(MODELS)
def test_every_tensor_begins_at_a_multiple_of_its_element_size(model: dict[str, Array]) -> None:
    with scratch_file() as path:
        save(path, model, EMPTY)
        layout = read_layout(path)
    assert all(tensor.start % tensor.numpy_dtype.itemsize == 0 for tensor in layout.tensors)


def test_a_layout_tells_where_everything_is(path: Path) -> None:
    save(path, {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array(7, np.int64)}, EMPTY)
    layout = read_layout(path)
    raw = path.read_bytes()
    assert [tensor.name for tensor in layout.tensors] == ["a", "b"]
    assert layout.size == len(raw)
    assert raw.startswith(layout.header)
    assert (layout["b"].dtype, layout["b"].shape, layout["b"].elements, layout["b"].is_float) == (
        "F32",
        (2, 3),
        6,
        True,
    )
    assert (layout["a"].elements, layout["a"].is_float) == (1, False)
    assert raw[layout["b"].start : layout["b"].stop] == np.arange(6, dtype=np.float32).tobytes()
    assert "b" in layout
    assert "c" not in layout


def test_the_library_finds_the_notes_under_one_key(path: Path) -> None:
    notes = Notes(aliases={"head": "embed"}, buffers=("embed",))
    save(path, {"embed": np.ones(3, np.float32)}, notes)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"lydian": '{"aliases":{"head":"embed"},"buffers":["embed"],"variances":{}}'}
    assert read_layout(path).notes == notes


def test_a_file_without_notes_has_empty_ones(path: Path) -> None:
    safetensors.torch.save_file({"w": torch.zeros(2)}, path, metadata={"format": "pt"})
    assert read_layout(path).notes == Notes()


def test_untrained_are_the_buffers_and_both_statistics_of_a_batch_norm() -> None:
    notes = Notes(variances={"bn.var": "bn.mean"}, buffers=("positions",))
    assert notes.untrained == {"positions", "bn.mean", "bn.var"}


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("w", np.zeros(2, np.complex64)),
        ("w", np.array(["text"])),
        ("w", np.zeros(2, object)),
        ("__metadata__", np.ones(1)),
    ],
)
def test_what_safetensors_cannot_hold_is_not_written(path: Path, name: str, array: Array) -> None:
    with pytest.raises(ValueError, match=name):
        save(path, {name: array}, EMPTY)
    assert not path.exists()


def test_notes_that_do_not_fit_are_not_written(path: Path) -> None:
    with pytest.raises(BadUpdateError, match="'gone'"):
        save(path, {"w": np.ones(2)}, Notes(buffers=("gone",)))
    assert not path.exists()


def test_saving_contiguous_arrays_copies_none_of_them(path: Path) -> None:
    model = {"w": np.ones(1 << 20)}
    tracemalloc.start()
    save(path, model, EMPTY)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < model["w"].nbytes / 4


# ---------------------------------------------------------------- headers that lie


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw_file(header: object, data: int | bytes = 8) -> bytes:
    """A file with any header: an object, or JSON text, or bytes that are not even that."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    body = text.encode() if isinstance(text, str) else text
    return len(body).to_bytes(8, "little") + body + (bytes(data) if isinstance(data, int) else data)


def noted(notes: object, **tensors: object) -> dict[str, object]:
    text = notes if isinstance(notes, str) else json.dumps(notes)
    return {"__metadata__": {"lydian": text}, **(tensors or {"w": entry()})}


LIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "0 bytes"),
    "half a length": (b"\x02\0\0\0", "4 bytes"),
    "a length of 2^63": ((2**63).to_bytes(8, "little") + b"{}", "9223372036854775808"),
    "a length of 2^64-1": (b"\xff" * 8 + b"{}", "18446744073709551615"),
    "a length beyond the file": ((1000).to_bytes(8, "little") + b"{}", "1000 bytes"),
    "an empty header": (raw_file(b"", 0), "brace"),
    "leading spaces": (raw_file(" {}", 0), "brace"),
    "a list": (raw_file("[]", 0), "brace"),
    "half an object": (raw_file('{"w":', 0), "cannot be read"),
    "two objects": (raw_file("{}{}", 0), "cannot be read"),
    "not UTF-8": (raw_file(b'{"\xff":1}', 0), "cannot be read"),
    "UTF-16": (raw_file("{}".encode("utf-16-le"), 0), "cannot be read"),
    "half a surrogate pair": (raw_file('{"\\ud800":' + json.dumps(entry()) + "}"), "surrogates"),
    "NaN": (raw_file('{"w":NaN}', 0), "NaN is not JSON"),
    "deep lists": (raw_file('{"w":' + "[" * 100_000 + "]" * 100_000 + "}", 0), "cannot be read"),
    "deep but readable lists": (raw_file('{"w":' + "[" * 300 + "]" * 300 + "}", 0), "must have exactly"),
    "a number of 5000 digits": (raw_file('{"w":' + "9" * 5000 + "}", 0), "cannot be read"),
    "a tensor twice": (raw_file(f'{{"w":{json.dumps(entry())},"w":{json.dumps(entry())}}}'), "'w' is there twice"),
    "a field twice": (
        raw_file('{"w":{"dtype":"F32","dtype":"F64","shape":[1],"data_offsets":[0,8]}}'),
        "'dtype' is there twice",
    ),
    "no object for a tensor": (raw_file({"w": 3}), "'w' is 3"),
    "a field too few": (raw_file({"w": {"dtype": "F32", "shape": [2]}}), "'w' is"),
    "a field too many": (raw_file({"w": {**entry(), "strides": [1]}}), "'w' is"),
    "an unknown dtype": (raw_file({"w": entry("C64", [1])}), "'w' has dtype 'C64'"),
    "a dtype that is a list": (raw_file({"w": entry(["F32"])}), "'w' has dtype"),
    "a shape that is a number": (raw_file({"w": entry(shape=2)}), "'w' has shape 2"),
    "a negative dimension": (raw_file({"w": entry(shape=[-1, -2])}), "'w' has shape [-1, -2]"),
    "a fraction of a dimension": (raw_file({"w": entry(shape=[2.0])}), "'w' has shape [2.0]"),
    "true as a dimension": (raw_file({"w": entry(shape=[True, 2])}), "'w' has shape [True, 2]"),
    "40 dimensions": (raw_file({"w": entry(shape=[1] * 39 + [2])}), "'w' has shape"),
    "an unaddressable empty tensor": (raw_file({"w": entry(shape=[0, 2**61], offsets=[0, 0])}, 0), "can address"),
    "an overflowing shape": (raw_file({"w": entry(shape=[2**40, 0, 10**4000], offsets=[0, 0])}, 0), "can address"),
    "one offset": (raw_file({"w": entry(offsets=[0])}), "'w' has data_offsets [0]"),
    "negative offsets": (raw_file({"w": entry(offsets=[-8, 0])}), "'w' has data_offsets [-8, 0]"),
    "offsets that go back": (raw_file({"w": entry(offsets=[8, 0])}), "takes 8 bytes and not [8, 0]"),
    "a length that is not the shape's": (raw_file({"w": entry(offsets=[0, 4])}, 4), "takes 8 bytes and not [0, 4]"),
    "a hole at the beginning": (raw_file({"w": entry(offsets=[4, 12])}, 12), "'w' begins at byte"),
    "a hole between": (raw_file({"v": entry(), "w": entry(offsets=[12, 20])}, 20), "it leaves a hole"),
    "an overlap": (raw_file({"v": entry(), "w": entry(offsets=[4, 12])}, 12), "it overlaps"),
    "the same bytes twice": (raw_file({"v": entry(), "w": entry()}), "it overlaps"),
    "a tensor beyond the file": (raw_file({"w": entry()}, 7), "the file has"),
    "bytes after the last tensor": (raw_file({"w": entry()}, 9), "the file has"),
    "metadata that is a list": (raw_file({"__metadata__": [], "w": entry()}), "__metadata__ is []"),
    "metadata that is no text": (raw_file({"__metadata__": {"lydian": {}}, "w": entry()}), "__metadata__ is"),
    "notes that are no JSON": (raw_file(noted("{")), "the notes cannot be read"),
    "notes that are a list": (raw_file(noted([])), "the notes must be a JSON object"),
    "an unknown note": (raw_file(noted({"frozen": ["w"]})), "the notes are wrong at ('frozen',)"),
    "an alias of nothing": (raw_file(noted({"aliases": {"v": "gone"}})), "the notes name 'gone'"),
    "an alias that is there itself": (raw_file(noted({"aliases": {"w": "w"}})), "the notes call 'w' an alias"),
    "an alias called metadata": (raw_file(noted({"aliases": {"__metadata__": "w"}})), "call '__metadata__' an alias"),
    "half a surrogate pair for an alias": (raw_file(noted('{"aliases":{"\\ud800":"w"}}')), "surrogates"),
    "a buffer that is not there": (raw_file(noted({"buffers": ["gone"]})), "the notes name 'gone'"),
    "a variance that is not there": (raw_file(noted({"variances": {"gone": "w"}})), "the notes name 'gone'"),
    "a mean that is not there": (raw_file(noted({"variances": {"w": "gone"}})), "the notes name 'gone'"),
    "a mean that is its own variance": (raw_file(noted({"variances": {"w": "w"}})), "'w' a mean and a variance"),
    "a mean of another shape": (
        raw_file(noted({"variances": {"v": "w"}}, v=entry(), w=entry(shape=[1, 2], offsets=[8, 16])), 16),
        "'v' and 'w' are F32 (2,) and F32 (1, 2)",
    ),
    "a mean of integers": (
        raw_file(noted({"variances": {"v": "w"}}, v=entry(), w=entry("I32", offsets=[8, 16])), 16),
        "'v' and 'w' are F32 (2,) and I32 (2,)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_in_a_sentence(path: Path, lie: str) -> None:
    raw, sentence = LIES[lie]
    path.write_bytes(raw)
    with pytest.raises(BadUpdateError) as caught:
        read_layout(path)
    assert caught.value.code == "bad_header"
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 1000
    str(caught.value).encode()  # can be sent


@pytest.mark.parametrize("shape", [[], [0], [3, 0, 2], [1] * 32])
def test_unusual_shapes_are_no_lies(path: Path, shape: list[int]) -> None:
    size = int(np.prod(shape)) * 4
    path.write_bytes(raw_file({"w": entry(shape=shape, offsets=(0, size))}, size))
    assert load(path)["w"].shape == tuple(shape)


@given(st.data())
def test_no_damage_to_a_header_ever_raises_anything_else(data: st.DataObject) -> None:
    header = noted({"aliases": {"h": "w"}, "variances": {"v": "m"}, "buffers": ["m", "v"]}, w=entry(),
                   m=entry(offsets=(8, 16)), v=entry(offsets=(16, 24)))  # fmt: skip
    raw = bytearray(raw_file(header, 24))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        keep = data.draw(st.integers(0, 3))
        raw[at : at + keep] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"-", b"9" * 30, b'"', b"[", b"{", b"}"])
        )
    with scratch_file() as path:
        path.write_bytes(raw)
        try:
            layout = read_layout(path)
        except BadUpdateError as error:
            layout, code = None, error.code
    if layout is None:
        assert code == "bad_header"
        return
    ends = [len(layout.header), *itertools.chain(*((tensor.start, tensor.stop) for tensor in layout.tensors)), len(raw)]
    assert ends == sorted(ends)
    assert layout.size == len(raw)


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    save(path, {"w": np.ones(3, np.float32), "n": np.array(1)}, Notes(buffers=("w",)))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(BadUpdateError):
            read_layout(path)


def test_a_claimed_header_is_not_allocated_before_it_is_there(path: Path) -> None:
    with path.open("wb") as file:
        file.write((HEADER_LIMIT + 1).to_bytes(8, "little") + b"{")
        file.truncate(HEADER_LIMIT + 100)
    tracemalloc.start()
    with pytest.raises(BadUpdateError, match=str(HEADER_LIMIT + 1)):
        read_layout(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_name_cannot_forge_a_line_of_the_log() -> None:
    assert "\n" not in shown("w\n2026 INFO all is well")
    assert "\u202e" not in shown("w\u202e")


# ---------------------------------------------------------------- bytes


@given(st.binary(max_size=300), st.integers(0, 3))
def test_the_digest_is_sha256_of_the_bytes(piece: bytes, megabytes: int) -> None:
    content = piece + bytes(megabytes * PIECE)
    with scratch_file() as path:
        path.write_bytes(content)
        assert file_digest(path) == hashlib.sha256(content).hexdigest()


def test_a_file_that_ends_early_is_an_error_of_the_disk(path: Path) -> None:
    path.write_bytes(b"abc")
    with (
        path.open("rb", buffering=0) as file,
        pytest.raises(OSError, match=r"model\.safetensors ended 2 bytes too early"),
    ):
        read_exactly(file, bytearray(4), 1)


# ---------------------------------------------------------------- for users


class Tied(torch.nn.Module):
    """A language model's shape: the head is the embedding; a BatchNorm brings buffers of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5, dtype=torch.bfloat16))


def kept_model(path: Path, model: torch.nn.Module) -> None:
    """A model as the coordinator keeps it."""
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}
    notes = Notes(
        aliases={"head.weight": "embed.weight"},
        variances={"norm.running_var": "norm.running_mean"},
        buffers=("norm.running_mean", "norm.running_var", "scale"),
    )
    safetensors.torch.save_file(state, path, metadata={"lydian": notes.text()})


def test_a_published_model_loads_strictly_into_plain_torch(path: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, target = Tied(), tmp_path / "mine.safetensors"
    kept_model(path, model)
    publish(path, target)
    fresh = Tied()
    fresh.load_state_dict(safetensors.torch.load_file(target), strict=True)
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    with safetensors.safe_open(target, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert names_in(tmp_path) == ["mine.safetensors", "model.safetensors"]


@given(MODELS)
def test_publishing_changes_no_value(model: dict[str, Array]) -> None:
    aliases = {f"{name} again!": name for name in model if f"{name} again!" not in model}
    with scratch_file() as path:
        save(path, model, Notes(aliases=aliases))
        publish(path, path)
        found, notes = load(path), read_layout(path).notes
    expected = {name: bits(array) for name, array in model.items()}
    expected |= {alias: expected[name] for alias, name in aliases.items()}
    assert {name: bits(array) for name, array in found.items()} == expected
    assert notes == Notes()


def test_publishing_holds_no_tensor_in_memory(path: Path, tmp_path: Path) -> None:
    save(path, {"w": np.ones(6 * PIECE // 8 + 1)}, Notes(aliases={"v": "w"}))
    tracemalloc.start()
    publish(path, tmp_path / "mine")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * PIECE
    assert (load(tmp_path / "mine")["v"] == 1).all()


def test_publishing_that_fails_leaves_the_old_file_and_nothing_else(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.write_bytes(b"precious")
    save(path, {"w": np.ones(4 * PIECE // 8)}, EMPTY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PIECE, hard))  # as a full disk: Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError, match="too large"):
            publish(path, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == b"precious"
    assert names_in(tmp_path) == ["mine", "model.safetensors"]


def test_a_published_file_is_whole_on_the_disk_before_it_gets_its_name(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, list[str]]] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        synced.append((os.fstat(descriptor).st_size, names_in(tmp_path)))

    monkeypatch.setattr(os, "fsync", watched)
    save(path, {"w": np.ones(1000)}, EMPTY)
    publish(path, tmp_path / "mine")
    assert synced == [((tmp_path / "mine").stat().st_size, ["mine.part", "model.safetensors"])]


def test_publishing_what_is_no_model_makes_no_file(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"not a model")
    with pytest.raises(BadUpdateError):
        publish(path, tmp_path / "mine")
    assert names_in(tmp_path) == ["model.safetensors"]


def test_every_float_is_a_dtype_that_torch_calls_float() -> None:
    assert {code for code, dtype in TORCH.items() if dtype.is_floating_point} == set(FLOATS)
    assert TORCH.keys() == DTYPES.keys()
