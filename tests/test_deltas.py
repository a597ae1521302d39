"""Encoded updates and steps on real files, against whole arrays in memory: nothing is lost, both sides agree."""

import hashlib
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codecs import CODECS, Float32s, codec
from common.deltas import (
    BLOCK_ELEMENTS,
    Encoded,
    StepWriter,
    apply_step,
    check_encoded,
    encode_update,
    is_trained,
    kept_size,
    read_delta,
    step_block,
)
from common.errors import BadUpdateError
from common.weights import DTYPES, FLOATS, Array, Layout, Notes, file_digest, load, read_layout, save

NOTES = Notes(
    aliases={"head": "embed"}, variances={"norm.var": "norm.mean"}, buffers=("norm.mean", "norm.var", "positions")
)
Model = dict[str, Array]
every_codec = pytest.mark.parametrize("name", CODECS)


def model(seed: int, *, near: int | None = None) -> Model:
    """One tensor of every dtype and every rule, 0-dimensional, empty and odd-sized ones among them.

    With `near`, the trained tensors are a training away from those of that seed.
    """
    chance = np.random.default_rng(seed)
    integers = [code for code in DTYPES if DTYPES[code].kind in "iu"]
    fresh = {
        **{f"w.{code}": chance.normal(size=(7, 11)).astype(dtype) for code, dtype in FLOATS.items()},
        **{f"n.{code}": chance.integers(0, 100, size=4).astype(DTYPES[code]) for code in integers},
        "embed": chance.normal(size=(73, 123)).astype(np.float32),
        "norm.mean": chance.normal(size=11).astype(np.float32),
        "norm.var": chance.uniform(0.1, 2, size=11).astype(np.float32),
        "positions": chance.normal(size=2).astype(np.float32),
        "scale": np.array(chance.normal(), np.float32),
        "steps": np.array(2**60 + seed, np.int64),
        "mask": chance.integers(0, 2, size=9).astype(np.bool_),
        "nothing": np.empty((0, 4), np.float32),
    }
    if near is None:
        return fresh
    old = model(near)
    moved = {key: old[key].astype(np.float64) + 0.01 * fresh[key].astype(np.float64) for key in trained_names(old)}
    return fresh | {key: np.asarray(values).astype(old[key].dtype) for key, values in moved.items()}


def trained_names(arrays: Mapping[str, Array]) -> list[str]:
    return [name for name in arrays if name.startswith("w.") or name in {"embed", "scale", "nothing"}]


def write(path: Path, arrays: Mapping[str, Array], notes: Notes = NOTES) -> Path:
    save(path, arrays, notes)
    return path


@contextmanager
def folder() -> Iterator[Path]:
    """A folder of its own for each example of a property, which pytest's tmp_path is not."""
    with TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", model(0))


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return write(tmp_path / "trained", model(1, near=0))


def decoded_in(path: Path, layout: Layout, name: str, block_elements: int = BLOCK_ELEMENTS) -> dict[str, Float32s]:
    """Every trained tensor of an encoded file, read block by block."""
    found, chosen = read_layout(path), codec(name)
    values: dict[str, Float32s] = {}
    with path.open("rb", buffering=0) as file:
        for tensor in layout.tensors:
            if is_trained(tensor, layout.notes):
                out = np.full(tensor.elements, np.nan, np.float32)
                for first in range(0, tensor.elements, block_elements):
                    part = out[first : first + block_elements]
                    read_delta(file, chosen, tensor, found[tensor.name].start, first, part.size, out=part)
                values[tensor.name] = out
    return values


def delta(old: Array, new: Array) -> Float32s:
    if old.dtype == np.float64:
        return np.asarray(new - old).astype(np.float32).reshape(-1)
    return np.asarray(new.astype(np.float32) - old.astype(np.float32)).reshape(-1)


def kept_in(path: Path, layout: Layout) -> dict[str, Float32s]:
    values, found, at = np.fromfile(path, np.float32), {}, 0
    for tensor in layout.tensors:
        if is_trained(tensor, layout.notes):
            found[tensor.name] = values[at : at + tensor.elements]
            at += tensor.elements
    assert at == values.size
    return found


def refused(call: Callable[[], object], code: str) -> str:
    with pytest.raises(BadUpdateError) as caught:
        call()
    assert caught.value.code == code
    return str(caught.value)


# ---------------------------------------------------------------- updates


@every_codec
def test_an_update_holds_what_the_codec_makes_of_each_change(name: str, base: Path, trained: Path) -> None:
    target = base.with_name("update")
    encoded = encode_update(base, trained, target, codec(name))
    layout, old, new, stored = read_layout(base), model(0), model(1, near=0), load(target)
    assert list(stored) == [tensor.name for tensor in layout.tensors]
    for key, values in stored.items():
        if key in trained_names(old):
            assert values.dtype == np.uint8
            np.testing.assert_array_equal(values, codec(name).encode(delta(old[key], new[key])))
        else:
            assert (values.dtype, values.shape, values.tobytes()) == (
                new[key].dtype,
                new[key].shape,
                new[key].tobytes(),
            )
    assert read_layout(target).notes == NOTES.model_copy(update={"codec": name})
    assert (encoded.digest, encoded.size) == (file_digest(target), target.stat().st_size)
    assert encoded.kept_digest is None
    check_encoded(read_layout(target), layout, codec(name))


@every_codec
def test_the_error_of_an_encoding_is_told(name: str, base: Path, trained: Path) -> None:
    target = base.with_name("update")
    encoded = encode_update(base, trained, target, codec(name))
    old, new, got = model(0), model(1, near=0), decoded_in(target, read_layout(base), name)
    changes = {key: delta(old[key], new[key]).astype(np.float64) for key in trained_names(old)}
    norm = np.sqrt(sum(np.square(change).sum() for change in changes.values()))
    lost = np.sqrt(sum(np.square(changes[key] - got[key]).sum() for key in changes))
    assert encoded.norm == pytest.approx(norm, rel=1e-9)
    assert encoded.error == pytest.approx(lost / norm, rel=1e-6)
    assert encoded.error < {"bf16": 0.003, "int8": 0.02, "int4": 0.15, "topk": 1}[name]


@every_codec
def test_a_training_that_changed_nothing_has_no_error(name: str, base: Path) -> None:
    encoded = encode_update(base, base, base.with_name("update"), codec(name))
    assert (encoded.norm, encoded.error) == (0, 0)


@every_codec
@settings(max_examples=25)
@given(seed=st.integers(2, 50), blocks=st.integers(1, 3))
def test_the_size_of_a_block_changes_no_byte(name: str, seed: int, blocks: int) -> None:
    with folder() as here:
        base, trained = write(here / "base", model(0)), write(here / "trained", model(seed, near=0))
        files = here / "one", here / "other"
        kept = here / "kept-one", here / "kept-other"
        sizes = BLOCK_ELEMENTS, 4096 * blocks
        found = [
            encode_update(base, trained, path, codec(name), pending=pending, block_elements=size)
            for path, pending, size in zip(files, kept, sizes, strict=True)
        ]
        assert found[0].digest == found[1].digest == file_digest(files[1])
        assert found[0].kept_digest == found[1].kept_digest == file_digest(kept[1])
        read = [decoded_in(files[0], read_layout(base), name, size) for size in sizes]
        assert all(read[0][key].tobytes() == read[1][key].tobytes() for key in read[0])
        models = [apply_step(base, files[0], here / "next", codec(name), block_elements=size) for size in sizes]
        assert models[0] == models[1] == file_digest(here / "next")


@every_codec
@settings(max_examples=25)
@given(seed=st.integers(0, 50), rounds=st.integers(1, 4))
def test_what_was_decoded_and_the_error_are_all_that_was_trained(name: str, seed: int, rounds: int) -> None:
    with folder() as here:
        base = write(here / "base", model(seed))
        layout, old = read_layout(base), model(seed)
        wanted = {key: np.zeros(old[key].size) for key in trained_names(old)}
        got = {key: np.zeros(old[key].size) for key in wanted}
        for at in range(rounds):
            new = model(seed + at + 1, near=seed)
            trained, update = write(here / "trained", new), here / "update"
            encode_update(base, trained, update, codec(name), error=here / "error", pending=here / "pending")
            (here / "pending").replace(here / "error")  # as after an update that was taken
            decoded = decoded_in(update, layout, name)
            for key in wanted:
                wanted[key] += delta(old[key], new[key])
                got[key] += decoded[key]
        error = kept_in(here / "error", layout)
        assert (here / "error").stat().st_size == kept_size(layout)
        for key, values in wanted.items():
            # Each round, two roundings to float32.
            np.testing.assert_allclose(got[key] + error[key], values, rtol=0, atol=rounds * rounds * 2.0**-23)


def test_an_error_of_another_model_is_not_used(base: Path, trained: Path, tmp_path: Path) -> None:
    error = tmp_path / "error"
    error.write_bytes(bytes(kept_size(read_layout(base)) - 4))
    with pytest.raises(OSError, match="belong to this model"):
        encode_update(base, trained, tmp_path / "update", codec("topk"), error=error, pending=tmp_path / "pending")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "error", "trained"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_training_that_diverged_is_named_and_leaves_no_file(base: Path, tmp_path: Path, value: float) -> None:
    arrays = model(1, near=0)
    arrays["embed"].reshape(-1)[8000] = value
    trained, pending = write(tmp_path / "trained", arrays), tmp_path / "pending"
    sentence = refused(
        lambda: encode_update(base, trained, tmp_path / "update", codec("int8"), pending=pending, block_elements=4096),
        "not_finite",
    )
    assert sentence.startswith("'embed' changed from ")
    assert f" to {value} at element 8000: " in sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "trained"]


@pytest.mark.parametrize(("dtype", "far"), [(np.float32, 3e38), (np.float64, 1e300)], ids=["float32", "float64"])
def test_a_change_beyond_float32_is_refused(tmp_path: Path, dtype: type, far: float) -> None:
    base = write(tmp_path / "base", {"w": np.array([1, -far], dtype)}, Notes())
    trained = write(tmp_path / "trained", {"w": np.array([1, far], dtype)}, Notes())
    sentence = refused(lambda: encode_update(base, trained, tmp_path / "update", codec("bf16")), "not_finite")
    assert f"changed from -{far:.6g} to {far:.6g} at element 1" in sentence


def test_an_untrained_buffer_that_is_not_finite_travels(base: Path, tmp_path: Path) -> None:
    arrays = model(1, near=0) | {"positions": np.array([-np.inf, 0], np.float32)}
    encode_update(base, write(tmp_path / "trained", arrays), tmp_path / "update", codec("bf16"))
    assert load(tmp_path / "update")["positions"][0] == -np.inf


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda arrays: arrays.pop("steps"), "missing_tensor"),
        (lambda arrays: arrays.update(more=np.zeros(1, np.float32)), "extra_tensor"),
        (lambda arrays: arrays.update(embed=arrays["embed"].astype(np.float16)), "wrong_dtype"),
        (lambda arrays: arrays.update(embed=arrays["embed"].T.copy()), "wrong_shape"),
    ],
)
def test_another_model_than_the_base_is_not_encoded(
    base: Path, tmp_path: Path, change: Callable[[Model], object], code: str
) -> None:
    arrays = model(1)
    change(arrays)
    trained = write(tmp_path / "trained", arrays)
    refused(lambda: encode_update(base, trained, tmp_path / "update", codec("bf16")), code)


# ---------------------------------------------------------------- checking and reading


def encoded_arrays(name: str) -> Model:
    old, new = model(0), model(1, near=0)
    return new | {key: codec(name).encode(delta(old[key], new[key])) for key in trained_names(old)}


def encoded_notes(name: str) -> Notes:
    notes = NOTES.model_dump() | {"codec": name}
    return Notes.model_validate(notes)


@every_codec
def test_the_order_in_the_file_is_free(name: str, base: Path, trained: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", encoded_arrays(name), encoded_notes(name))
    encode_update(base, trained, tmp_path / "update", codec(name))
    digests = [apply_step(base, path, tmp_path / "next", codec(name)) for path in (other, tmp_path / "update")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda arrays: arrays.pop("w.F16"), "missing_tensor"),
        (lambda arrays: arrays.pop("steps"), "missing_tensor"),
        (lambda arrays: arrays.update(more=np.zeros(1, np.uint8)), "extra_tensor"),
        (lambda arrays: arrays.update(embed=arrays["embed"].view(np.int8)), "wrong_dtype"),
        (lambda arrays: arrays.update(embed=model(1)["embed"]), "wrong_dtype"),
        (lambda arrays: arrays.update(steps=np.array(1, np.int32)), "wrong_dtype"),
        (lambda arrays: arrays.update(embed=arrays["embed"][:-1]), "wrong_shape"),
        (lambda arrays: arrays.update(embed=arrays["embed"][:, None]), "wrong_shape"),
        (lambda arrays: arrays.update(mask=arrays["mask"][:-1]), "wrong_shape"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    base: Path, tmp_path: Path, change: Callable[[Model], object], code: str
) -> None:
    arrays = encoded_arrays("int4")
    change(arrays)
    step = write(tmp_path / "step", arrays, encoded_notes("int4"))
    refused(lambda: check_encoded(read_layout(step), read_layout(base), codec("int4")), code)
    refused(lambda: apply_step(base, step, tmp_path / "next", codec("int4")), code)
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize("notes", [NOTES, encoded_notes("int4"), encoded_notes("x" * 1000)])
def test_another_codec_than_the_job_s_is_refused(base: Path, tmp_path: Path, notes: Notes) -> None:
    step = write(tmp_path / "step", encoded_arrays("int8"), notes)
    sentence = refused(lambda: check_encoded(read_layout(step), read_layout(base), codec("int8")), "bad_encoding")
    assert "and int8 is wanted" in sentence
    assert len(sentence) < 250


def test_a_model_is_no_encoded_file_and_says_nothing_of_a_codec(base: Path) -> None:
    assert b"codec" not in read_layout(base).header


def test_wrong_bytes_are_refused_with_the_tensor_s_name(base: Path, tmp_path: Path) -> None:
    arrays = encoded_arrays("int8")
    arrays["embed"][4100:4104] = 0xFF
    step = write(tmp_path / "step", arrays, encoded_notes("int8"))
    sentence = refused(
        lambda: apply_step(base, step, tmp_path / "next", codec("int8"), block_elements=4096), "bad_encoding"
    )
    assert sentence.startswith("'embed' from element 4096 on: the encoding is wrong: a scale is outside 0 … ")
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize(
    ("first", "count"), [(1, 4096), (4096, 100), (4096, 8979 - 4096 + 1), (8192, -4096), (12288, 0), (-4096, 4096)]
)
def test_only_whole_blocks_are_read(base: Path, trained: Path, tmp_path: Path, first: int, count: int) -> None:
    encode_update(base, trained, tmp_path / "update", codec("int8"))
    tensor, start = read_layout(base)["embed"], read_layout(tmp_path / "update")["embed"].start
    with (tmp_path / "update").open("rb", buffering=0) as file, pytest.raises(ValueError, match="of embed"):
        read_delta(file, codec("int8"), tensor, start, first, count)


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("code", FLOATS)
def test_a_step_is_one_addition_and_one_rounding(code: str) -> None:
    chance = np.random.default_rng(3)
    base = chance.normal(size=1000).astype(FLOATS[code])
    change = chance.normal(size=1000).astype(np.float32) * np.float32(0.01)
    wide = np.float64 if code == "F64" else np.float32
    wanted = (base.astype(wide) + change.astype(wide)).astype(FLOATS[code])
    found = step_block(base, change)
    assert (found.dtype, found.tobytes()) == (base.dtype, wanted.tobytes())
    assert step_block(base, change, base) is base
    assert base.tobytes() == wanted.tobytes()


def step(
    here: Path, base: Path, true: Mapping[str, Array], name: str, previous: Path | None = None, block: int = 4096
) -> tuple[Encoded, Path]:
    """What a coordinator does: the step, the residual, and the model that it keeps itself."""
    layout, old, at_home = read_layout(base), load(base), here / "at-home"
    with (
        StepWriter(layout, codec(name), here / "step", here / "residual", previous=previous) as writer,
        at_home.open("wb") as file,
    ):
        file.write(layout.header)
        for index, tensor in enumerate(layout.tensors):
            values, origin = true[tensor.name].reshape(-1), old[tensor.name].reshape(-1)
            for first in range(0, tensor.elements, block):
                part = slice(first, first + block)
                file.write(writer.block(index, first, values[part], origin[part]).view(np.uint8).data)
        return writer.finish(), at_home


def true_model(seed: int, old: Mapping[str, Array]) -> Model:
    """A mean of updates: float64 for what is trained."""
    chance = np.random.default_rng(seed)
    moved = {
        key: np.asarray(old[key].astype(np.float64) + 0.01 * chance.normal(size=old[key].shape))
        for key in trained_names(old)
    }
    return model(seed) | moved


@every_codec
@settings(max_examples=25)
@given(seed=st.integers(1, 50), blocks=st.integers(1, 3))
def test_both_sides_come_to_the_same_model(name: str, seed: int, blocks: int) -> None:
    with folder() as here:
        base = write(here / "base", model(0))
        true = true_model(seed, load(base))
        encoded, at_home = step(here, base, true, name, block=4096 * blocks)
        digest = apply_step(base, here / "step", here / "away", codec(name))
        assert digest == file_digest(at_home) == file_digest(here / "away")
        assert read_layout(here / "away").header == read_layout(base).header
        assert (encoded.digest, encoded.size) == (file_digest(here / "step"), (here / "step").stat().st_size)
        assert encoded.kept_digest == file_digest(here / "residual")
        assert (here / "residual").stat().st_size == kept_size(read_layout(base))
        for key, values in load(here / "away").items():
            if key not in trained_names(true):
                assert values.tobytes() == true[key].tobytes()


@every_codec
@settings(max_examples=25)
@given(seed=st.integers(1, 50), rounds=st.integers(1, 4))
def test_the_model_and_the_residual_are_the_true_model(name: str, seed: int, rounds: int) -> None:
    with folder() as here:
        base = write(here / "base", model(0))
        layout = read_layout(base)
        wanted = {key: values.astype(np.float64) for key, values in model(0).items()}
        for at in range(rounds):
            old = load(base)
            true = true_model(seed + at, old)
            for key in trained_names(old):
                wanted[key] = wanted[key] + (true[key] - old[key].astype(np.float64))
            previous = here / "previous"
            step(here, base, true, name, previous)
            (here / "residual").replace(previous)
            apply_step(base, here / "step", here / "next", codec(name))
            (here / "next").replace(base)
        residual = kept_in(here / "previous", layout)
        for key, values in load(base).items():
            if key in residual:
                found = values.astype(np.float64).reshape(-1) + residual[key]
                np.testing.assert_allclose(found, wanted[key].reshape(-1), rtol=0, atol=rounds * 2.0**-23)


def test_changes_too_small_for_the_dtype_add_up(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"w": np.ones(10, DTYPES["BF16"])}, Notes())
    for _ in range(100):  # each a tenth of what bfloat16 can tell from 1
        true = {"w": load(base)["w"].astype(np.float64) + 2.0**-7 / 10}
        step(tmp_path, base, true, "bf16", tmp_path / "previous")
        (tmp_path / "residual").replace(tmp_path / "previous")
        apply_step(base, tmp_path / "step", tmp_path / "next", codec("bf16"))
        (tmp_path / "next").replace(base)
    np.testing.assert_allclose(load(base)["w"].astype(np.float64), 1 + 100 * 2.0**-7 / 10, atol=2.0**-7)


def test_a_step_that_leaves_the_dtype_is_refused_on_both_sides(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"w": np.full(3, 65504, np.float16)}, Notes())
    true = {"w": np.array([65504.0, 65504.0, 70000.0])}
    sentence = refused(lambda: step(tmp_path, base, true, "int8"), "not_finite")
    assert sentence == "the new value of 'w' at element 2 is beyond what F16 can hold"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at-home", "base"]
    change = codec("int8").encode(np.array([0, 0, 5000], np.float32))
    hostile = write(tmp_path / "step", {"w": change}, Notes(codec="int8"))
    refused(lambda: apply_step(base, hostile, tmp_path / "next", codec("int8")), "not_finite")
    assert not (tmp_path / "next").exists()


def test_a_true_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"w": np.ones(3)}, Notes())
    sentence = refused(lambda: step(tmp_path, base, {"w": np.array([1, 1e300, 1])}, "int8"), "not_finite")
    assert "'w' changed from 1 to 1e+300 at element 1" in sentence


def test_a_residual_of_another_model_is_not_used(base: Path, tmp_path: Path) -> None:
    (tmp_path / "previous").write_bytes(b"1234")
    with pytest.raises(OSError, match="it has 4 bytes"):
        StepWriter(
            read_layout(base), codec("int8"), tmp_path / "step", tmp_path / "residual", previous=tmp_path / "previous"
        )
    assert not (tmp_path / "step").exists()


def test_a_residual_that_cannot_be_written_leaves_no_step(base: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        StepWriter(read_layout(base), codec("int8"), tmp_path / "step", tmp_path / "not" / "there")
    assert not (tmp_path / "step").exists()


TWO = {"a": np.ones(5000, np.float32), "b": np.ones(3, np.float32), "e": np.ones((0, 2), np.float32)}


@pytest.mark.parametrize(
    "blocks",
    [
        [(1, 0, 3)], [(0, 4096, 904)], [(0, 0, 4096), (1, 0, 3)], [(0, 0, 4096), (0, 0, 4096)],
        [(0, 0, 4000)], [(0, 0, 5001)], [(0, 0, 5000), (1, 0, 3), (2, 0, 0)], [(0, 0, 5000), (1, 0, 3), (0, 0, 5000)],
    ],
)  # fmt: skip
def test_blocks_come_in_order_and_whole(tmp_path: Path, blocks: list[tuple[int, int, int]]) -> None:
    layout = read_layout(write(tmp_path / "base", TWO, Notes()))

    def take_all() -> None:
        with StepWriter(layout, codec("int8"), tmp_path / "step", tmp_path / "residual") as writer:
            for index, first, count in blocks:
                writer.block(index, first, np.ones(count), np.ones(count, np.float32))

    with pytest.raises(ValueError, match=r"is next$|no whole blocks|within a block"):
        take_all()
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_step_that_ends_early_leaves_no_file(tmp_path: Path) -> None:
    layout = read_layout(write(tmp_path / "base", TWO, Notes()))
    with StepWriter(layout, codec("int8"), tmp_path / "step", tmp_path / "residual") as writer:
        out = np.empty(5000, np.float32)
        assert writer.block(0, 0, np.ones(5000), np.ones(5000, np.float32), out=out) is out
        with pytest.raises(ValueError, match=r"^the step ended before element 0 of tensor 1$"):
            writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    def peak(elements: int) -> int:
        arrays = {"w": np.zeros(elements, np.float32), "b": np.zeros(elements, np.int32)}
        base = write(tmp_path / "base", arrays, Notes())
        trained = write(tmp_path / "trained", {**arrays, "w": np.ones(elements, np.float32)}, Notes())
        del arrays
        tracemalloc.start()
        encode_update(base, trained, tmp_path / "update", codec("int8"), pending=tmp_path / "pending")
        apply_step(base, tmp_path / "update", tmp_path / "next", codec("int8"))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    small, large = peak(1 << 18), peak(1 << 22)
    assert large < small * 1.1 < 4_000_000


def test_the_digest_is_that_of_all_that_was_written(base: Path, trained: Path, tmp_path: Path) -> None:
    encoded = encode_update(base, trained, tmp_path / "update", codec("topk"), pending=tmp_path / "pending")
    raw = (tmp_path / "update").read_bytes()
    kept = hashlib.sha256((tmp_path / "pending").read_bytes()).hexdigest()
    assert replace(encoded, norm=0, error=0) == Encoded(hashlib.sha256(raw).hexdigest(), len(raw), kept, 0, 0)
