"""Inspecting and averaging real files, against whole arrays in memory."""

import errno
import hashlib
import json
import os
import random
import resource
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import BadUpdateError
from common.weights import DTYPES, FLOATS, Array, Notes, file_digest, load, publish, read_layout, save
from server import folding
from server.averaging import Float64Block
from server.folding import Rules, Since, Targets
from server.inspection import Inspection, inspect
from server.optimizers import FedAvg, OuterStep

FEDAVG = FedAvg()
NOTES = Notes(
    aliases={"head": "embed"}, variances={"norm.var": "norm.mean"}, buffers=("norm.mean", "norm.var", "positions")
)
Model = dict[str, Array]


def model(seed: int) -> Model:
    """One tensor of every dtype and every rule, 0-dimensional, empty and odd-sized ones among them."""
    chance = np.random.default_rng(seed)
    integers = [code for code in DTYPES if DTYPES[code].kind in "iu"]
    return {
        **{f"w.{code}": chance.normal(size=(3, 5)).astype(dtype) for code, dtype in FLOATS.items()},
        **{f"n.{code}": chance.integers(0, 100, size=4).astype(DTYPES[code]) for code in integers},
        "embed": chance.normal(size=(7, 3)).astype(np.float32),
        "norm.mean": chance.normal(size=11).astype(np.float32),
        "norm.var": chance.uniform(0.1, 2, size=11).astype(np.float32),
        "positions": chance.normal(size=2).astype(np.float32),
        "scale": np.array(chance.normal(), np.float32),
        "steps": np.array(2**60 + seed, np.int64),
        "mask": chance.integers(0, 2, size=9).astype(np.bool_),
        "nothing": np.empty((0, 4), np.float32),
    }


def write(path: Path, arrays: Mapping[str, Array], notes: Notes = NOTES) -> Path:
    save(path, arrays, notes)
    return path


def write_in_another_order(path: Path, arrays: Mapping[str, Array], order: list[str]) -> Path:
    """As another version of safetensors would: the tensors elsewhere in the file, the header padded otherwise."""
    fields: dict[str, object] = {}
    data = b""
    for name in order:
        code = next(code for code, dtype in DTYPES.items() if dtype == arrays[name].dtype)
        raw = arrays[name].tobytes()
        fields[name] = {"dtype": code, "shape": arrays[name].shape, "data_offsets": (len(data), len(data) + len(raw))}
        data += raw
    body = json.dumps({"__metadata__": {"lydian": NOTES.text()}, **fields}, indent=1).encode()
    path.write_bytes(len(body).to_bytes(8, "little") + body + data)
    return path


@contextmanager
def folder() -> Iterator[Path]:
    """A folder of its own for each example of a property, which pytest's tmp_path is not."""
    with TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", model(0))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the listing's own descriptor is gone for iterdir too


def average(base: Path, updates: Sequence[tuple[Path, int]], target: Path, *, step: OuterStep, **options: Any) -> str:
    """The fold of whole models, with one file to write."""
    return folding.average(base, updates, Targets(target), rules=Rules(step), **options).model


# ---------------------------------------------------------------- inspecting


def look(update: Path, base: Path | None, norm_bound: float | None = 1e300, block_elements: int = 4) -> Inspection:
    digest = file_digest(update)
    return inspect(update, base, digest=digest, norm_bound=norm_bound, block_elements=block_elements)


def refused(update: Path, base: Path | None, norm_bound: float | None = None) -> BadUpdateError:
    with pytest.raises(BadUpdateError) as caught:
        look(update, base, norm_bound)
    return caught.value


def is_trained(name: str) -> bool:
    return name.startswith("w.") or name in {"embed", "scale", "nothing"}


def distance(one: Model, other: Model) -> float:
    pairs = [
        (array.astype(np.float64), other[name].astype(np.float64)) for name, array in one.items() if is_trained(name)
    ]
    return float(np.sqrt(sum(float(np.square(left - right).sum()) for left, right in pairs)))


@given(st.integers(1, 50), st.integers(1, 40), st.randoms(use_true_random=False))
def test_a_good_update_passes_with_its_distance_to_the_base(seed: int, block: int, chance: random.Random) -> None:
    update = model(seed)
    order = list(update)
    chance.shuffle(order)
    with folder() as here:
        base = write(here / "base", model(0))
        path = write_in_another_order(here / "update", update, order)
        found = look(path, base, block_elements=block)
        assert found.size == path.stat().st_size
    assert found.norm == pytest.approx(distance(update, model(0)), rel=1e-12)


def test_a_new_model_is_looked_at_without_a_base(base: Path) -> None:
    assert look(base, None, norm_bound=1e-9) == Inspection(norm=None, size=base.stat().st_size)


def test_the_base_itself_is_no_distance_away(base: Path) -> None:
    assert look(base, base).norm == 0


def test_buffers_and_integers_have_no_part_in_the_distance(base: Path, tmp_path: Path) -> None:
    moved = {name: array if is_trained(name) else model(1)[name] for name, array in model(0).items()}
    assert look(write(tmp_path / "update", moved), base).norm == 0


def test_only_the_base_says_what_a_buffer_is(base: Path, tmp_path: Path) -> None:
    moved = {**model(0), "embed": model(1)["embed"]}
    update = write(tmp_path / "update", moved, Notes(buffers=tuple(moved)))
    assert look(update, base).norm == pytest.approx(distance(moved, model(0)))


def test_a_bound_on_the_distance_is_kept(base: Path, tmp_path: Path) -> None:
    update = write(tmp_path / "update", model(1))
    norm = distance(model(1), model(0))
    look(update, base, norm_bound=norm * 1.001)
    assert refused(update, base, norm_bound=norm * 0.999).code == "norm_bound"


@pytest.mark.parametrize("code", FLOATS)
@given(data=st.data())
def test_a_value_that_is_no_number_is_found_anywhere_in_any_dtype(code: str, data: st.DataObject) -> None:
    arrays = {**model(1), f"w.{code}": np.ones(23, FLOATS[code])}
    place = data.draw(st.integers(0, 22))
    arrays[f"w.{code}"][place] = data.draw(
        st.sampled_from([np.nan] if code == "F8_E4M3" else [np.nan, np.inf, -np.inf])
    )
    with folder() as here:
        error = refused(write(here / "update", arrays), None)
    assert error.code == "not_finite"
    assert f"'w.{code}' is " in str(error)
    assert f"at element {place} " in str(error)


def test_infinity_in_a_buffer_of_a_new_model_is_explained(tmp_path: Path) -> None:
    arrays = {**model(0), "positions": np.array([0, -np.inf], np.float32)}
    assert "persistent=False" in refused(write(tmp_path / "update", arrays), None).advice


MISFITS: dict[str, Callable[[Model], Model]] = {
    "missing_tensor": lambda good: {name: array for name, array in good.items() if name != "scale"},
    "extra_tensor": lambda good: {**good, "more": np.ones(1)},
    "wrong_dtype": lambda good: {**good, "scale": np.array(1.0, np.float64)},
    "wrong_shape": lambda good: {**good, "scale": np.ones(1, np.float32)},
}


@pytest.mark.parametrize("code", MISFITS)
def test_an_update_that_does_not_fit_is_refused(base: Path, tmp_path: Path, code: str) -> None:
    assert refused(write(tmp_path / "update", MISFITS[code](model(1))), base).code == code


def test_what_is_no_weight_file_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "update").write_bytes(b"\x80\x04cos\nsystem\n")
    assert refused(tmp_path / "update", base).code == "bad_header"


@given(st.data())
def test_damage_on_the_way_is_never_taken_for_a_bad_update(data: st.DataObject) -> None:
    with folder() as here:
        base = write(here / "base", model(0))
        update = write(here / "update", model(1))
        whole = update.read_bytes()
        at = data.draw(st.integers(0, len(whole) - 1))
        damaged = whole[:at] if data.draw(st.booleans()) else whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
        update.write_bytes(damaged)
        with pytest.raises(BadUpdateError) as caught:
            inspect(update, base, digest=hashlib.sha256(whole).hexdigest(), norm_bound=1e-9)
    assert caught.value.code == "digest_mismatch"
    assert hashlib.sha256(damaged).hexdigest() in str(caught.value)


def test_a_damaged_base_is_not_the_updates_fault(base: Path, tmp_path: Path) -> None:
    update = write(tmp_path / "update", model(1))
    base.write_bytes(base.read_bytes()[:-1])
    with pytest.raises(OSError, match="the model is damaged") as caught:
        look(update, base)
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="the model is damaged"):
        average(base, [(update, 1)], tmp_path / "next", step=FEDAVG)
    assert not (tmp_path / "next").exists()


def test_looking_leaves_no_file_open(base: Path, tmp_path: Path) -> None:
    update = write(tmp_path / "update", {**model(1), "scale": np.array(np.nan, np.float32)})
    before = open_files()
    look(base, base)
    refused(update, base)
    assert open_files() == before


# ---------------------------------------------------------------- averaging


def whole(updates: list[Model], samples: list[int]) -> Model:
    """The next model by the same rules, all arrays whole and in memory."""
    result: Model = {}
    for name, like in updates[0].items():
        arrays = [update[name] for update in updates]
        total = sum(samples)
        if name == "norm.var":
            origin = updates[0]["norm.mean"].astype(np.float64)
            square = offset = np.zeros(like.shape)
            for update, count in zip(updates, samples, strict=True):
                away = update["norm.mean"].astype(np.float64) - origin
                offset = offset + count * away
                square = square + count * (away * away + update[name].astype(np.float64))
            values = np.asarray(np.maximum(square / total - (offset / total) ** 2, 0))
        elif like.dtype in FLOATS.values():
            values = arrays[0].astype(np.float64) * samples[0]
            for array, count in zip(arrays[1:], samples[1:], strict=True):
                values = values + array.astype(np.float64) * count
            values = np.asarray(values / total)
        elif like.dtype == np.bool_:
            balance = sum(np.where(array, count, -count) for array, count in zip(arrays, samples, strict=True))
            values = np.where(balance == 0, arrays[0], balance > 0)
        else:
            values = np.max(arrays, axis=0)
        half = like.dtype in FLOATS.values() and like.dtype.itemsize < 4
        result[name] = (values.astype(np.float32) if half else values).astype(like.dtype)
    return result


ROUNDS = st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 2**40)), min_size=1, max_size=5)  # (seed, samples)


@given(ROUNDS, st.integers(1, 30), st.integers(1, 3), st.randoms(use_true_random=False))
def test_the_next_model_is_the_whole_array_average_byte_for_byte(
    workers: list[tuple[int, int]], block: int, threads: int, chance: random.Random
) -> None:
    models, samples = [model(seed) for seed, _ in workers], [count for _, count in workers]
    with folder() as here:
        base = write(here / "base", model(0))
        updates = []
        for position, (arrays, count) in enumerate(zip(models, samples, strict=True)):
            order = list(arrays)
            chance.shuffle(order)
            updates.append((write_in_another_order(here / f"{position}", arrays, order), count))
        digest = average(base, updates, here / "next", step=FEDAVG, block_elements=block, threads=threads)
        expected = write(here / "expected", whole(models, samples))
        assert (here / "next").read_bytes() == expected.read_bytes()
        assert digest == file_digest(expected)


@given(ROUNDS, st.integers(1, 30), st.integers(1, 3))
def test_neither_the_size_of_a_block_nor_threads_ever_change_a_byte(
    workers: list[tuple[int, int]], block: int, threads: int
) -> None:
    with folder() as here:
        base = write(here / "base", model(0))
        updates = [(write(here / f"{at}", model(seed)), count) for at, (seed, count) in enumerate(workers)]
        average(base, updates, here / "small", step=FEDAVG, block_elements=block, threads=threads)
        average(base, updates, here / "usual", step=FEDAVG)
        assert (here / "small").read_bytes() == (here / "usual").read_bytes()


def test_updates_are_added_in_the_order_given(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"w": np.zeros(1)}, Notes())
    files = {value: write(tmp_path / f"{value}", {"w": np.array([value])}, Notes()) for value in (1e16, -1e16, 1.0)}
    for order, expected in (((1e16, -1e16, 1.0), 1 / 3), ((1e16, 1.0, -1e16), 0.0)):
        average(base, [(files[value], 1) for value in order], tmp_path / "next", step=FEDAVG)
        assert load(tmp_path / "next")["w"][0] == expected


def test_the_next_model_keeps_the_header_and_notes_of_the_base(base: Path, tmp_path: Path) -> None:
    order = sorted(model(0), reverse=True)
    odd = write_in_another_order(tmp_path / "odd", model(0), order)
    update = write(tmp_path / "update", model(1), Notes())
    average(odd, [(update, 3)], tmp_path / "next", step=FEDAVG)
    assert read_layout(tmp_path / "next").header == read_layout(odd).header
    assert read_layout(tmp_path / "next").notes == NOTES


def test_one_update_alone_becomes_the_model(base: Path, tmp_path: Path) -> None:
    update = write(tmp_path / "update", model(7))
    assert average(base, [(update, 1000)], tmp_path / "next", step=FEDAVG) == file_digest(update)


def test_the_next_model_can_be_trained_from_and_published(base: Path, tmp_path: Path) -> None:
    update = write(tmp_path / "update", model(1))
    average(base, [(update, 1), (base, 1)], tmp_path / "next", step=FEDAVG)
    look(update, tmp_path / "next")
    publish(tmp_path / "next", tmp_path / "mine")
    assert load(tmp_path / "mine")["head"].tobytes() == load(tmp_path / "next")["embed"].tobytes()


# ---------------------------------------------------------------- asynchronous


def test_the_mean_of_damped_changes_is_added_to_the_newest_model(tmp_path: Path) -> None:
    """By hand: 10 + (2 · 1 · (12 − 10) + 6 · ½ · (9 − 5)) / 8 = 12; divided by all samples, not by damped ones."""
    old, newest = (write(tmp_path / f"{x}", {"w": np.array([x, x], np.float32)}, Notes()) for x in (5.0, 10.0))
    fresh = write(tmp_path / "fresh", {"w": np.array([12.0, 8.0], np.float32)}, Notes())
    stale = write(tmp_path / "stale", {"w": np.array([9.0, 5.0], np.float32)}, Notes())
    since = [Since(newest, 1.0), Since(old, 0.5)]
    average(newest, [(fresh, 2), (stale, 6)], tmp_path / "next", step=FEDAVG, since=since)
    assert load(tmp_path / "next")["w"].tolist() == [12.0, 9.5]
    average(newest, [(fresh, 2), (stale, 6)], tmp_path / "next", step=FEDAVG, since=since, weights=[1.0, 1.0])
    assert load(tmp_path / "next")["w"].tolist() == [12.0, 9.0]


def test_buffers_and_counters_are_joined_whatever_their_age(tmp_path: Path) -> None:
    notes = Notes(variances={"var": "mean"}, buffers=("mean", "var", "n"))
    arrays = {
        name: {"mean": np.array([m], np.float32), "var": np.array([v], np.float32), "n": np.array(n, np.int64)}
        for name, (m, v, n) in {"base": (0.0, 1.0, 4), "a": (1.0, 2.0, 5), "b": (3.0, 2.0, 3)}.items()
    }
    base, a, b = (write(tmp_path / name, each, notes) for name, each in arrays.items())
    since = [Since(base, 0.5), Since(base, 0.1)]
    average(base, [(a, 1), (b, 1)], tmp_path / "next", step=FEDAVG, since=since)
    made = load(tmp_path / "next")
    assert [made[name].item() for name in ("mean", "var", "n")] == [2.0, 3.0, 5]


@given(ROUNDS, st.integers(1, 30), st.randoms(use_true_random=False))
def test_changes_since_unlike_bases_are_summed_byte_for_byte_whatever_the_block(
    workers: list[tuple[int, int]], block: int, chance: random.Random
) -> None:
    samples = [count for _, count in workers]
    factors = [chance.choice([1.0, 0.5, 3**-0.5]) for _ in workers]
    with folder() as here:
        bases = [write(here / f"base{at}", model(at)) for at in range(3)]
        began = [chance.randrange(3) for _ in workers]
        updates = [(write(here / f"{at}", model(seed)), count) for at, (seed, count) in enumerate(workers)]
        since = [Since(bases[at], factor) for at, factor in zip(began, factors, strict=True)]
        average(bases[0], updates, here / "next", step=FEDAVG, since=since, block_elements=block)
        made, joined = load(here / "next"), whole([model(seed) for seed, _ in workers], samples)
    for name, values in made.items():
        if not is_trained(name):
            assert values.tobytes() == joined[name].tobytes()
            continue
        total = np.zeros(values.shape)
        for (seed, count), at, factor in zip(workers, began, factors, strict=True):
            change = model(seed)[name].astype(np.float64) - model(at)[name].astype(np.float64)
            total = total + change * factor * count
        expected = total / sum(samples) + model(0)[name].astype(np.float64)
        half = values.dtype.itemsize < 4
        assert values.tobytes() == (expected.astype(np.float32) if half else expected).astype(values.dtype).tobytes()


def test_more_bases_than_open_files_are_subtracted_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases = [write(tmp_path / f"base{at}", model(at)) for at in range(4)]
    updates = [(write(tmp_path / f"{at}", model(10 + at)), at + 1) for at in range(4)]
    since = [Since(base, 0.5) for base in bases]
    first = average(bases[0], updates, tmp_path / "all", step=FEDAVG, since=since)
    monkeypatch.setattr(folding, "OPEN_FILES", 1)
    assert average(bases[0], updates, tmp_path / "few", step=FEDAVG, since=since) == first


def test_an_update_without_the_base_that_it_began_with_is_a_mistake_of_the_caller(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 updates began with 0 bases"):
        average(base, [(base, 1)], tmp_path / "next", step=FEDAVG, since=[])


def test_the_file_is_whole_when_it_is_synced(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, int]] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        state = os.fstat(descriptor)
        synced.append((state.st_ino, state.st_size))

    monkeypatch.setattr(os, "fsync", watched)
    average(base, [(base, 1)], tmp_path / "next", step=FEDAVG)
    state = (tmp_path / "next").stat()
    assert synced == [(state.st_ino, base.stat().st_size)]


class Stay:
    """An outer step that never moves, and writes down what it is asked."""

    states = 0
    wants_base = True

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def apply(self, base: Float64Block, mean: Float64Block, states: Sequence[Float64Block]) -> Float64Block:
        self.seen.append(base.tolist())
        mean[:] = base
        return mean


@pytest.mark.parametrize("block", [2, 1000])
def test_an_outer_step_sees_every_trained_element_once_and_nothing_else(base: Path, tmp_path: Path, block: int) -> None:
    step = Stay()
    update = write(tmp_path / "update", model(1))
    average(base, [(update, 1)], tmp_path / "next", step=step, block_elements=block, threads=1)
    found = load(tmp_path / "next")
    trained = [array for name, array in load(base).items() if is_trained(name)]
    assert [value for seen in step.seen for value in seen] == [
        float(value) for array in trained for value in array.flat
    ]
    for name, array in found.items():
        assert array.tobytes() == model(0 if is_trained(name) else 1)[name].tobytes()


# ---------------------------------------------------------------- averaging that cannot be done


@pytest.mark.parametrize("samples", [[], [0], [3, -1]])
def test_nothing_to_average_is_a_mistake_of_the_caller(base: Path, tmp_path: Path, samples: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        average(base, [(base, count) for count in samples], tmp_path / "next", step=FEDAVG)
    assert not (tmp_path / "next").exists()


def test_an_update_that_no_longer_fits_is_named_and_leaves_no_file(base: Path, tmp_path: Path) -> None:
    update = write(tmp_path / "spoilt", MISFITS["wrong_shape"](model(1)))
    before = open_files()
    with pytest.raises(BadUpdateError, match=r"update 1 \(spoilt\): 'scale' has shape") as caught:
        average(base, [(base, 1), (update, 1)], tmp_path / "next", step=FEDAVG)
    assert caught.value.code == "wrong_shape"
    assert not (tmp_path / "next").exists()
    assert open_files() == before


def test_an_update_that_is_gone_leaves_no_file(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        average(base, [(base, 1), (tmp_path / "gone", 1)], tmp_path / "next", step=FEDAVG)
    assert not (tmp_path / "next").exists()


def test_a_new_value_beyond_its_dtype_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    notes = Notes(variances={"var": "mean"})
    files = [
        write(tmp_path / f"{mean}", {"mean": np.full(9, mean, np.float16), "var": np.ones(9, np.float16)}, notes)
        for mean in (-60_000, 60_000)
    ]
    with pytest.raises(BadUpdateError, match=r"'var' at element 0 is 3\.6e\+09, which F16 cannot hold"):
        average(files[0], [(path, 1) for path in files], tmp_path / "next", step=FEDAVG, block_elements=4)
    assert not (tmp_path / "next").exists()


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    base = write(tmp_path / "base", {"w": np.ones(1 << 16)}, Notes())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))  # Python ignores SIGXFSZ, so that write fails
    try:
        with pytest.raises(OSError, match="too large"):
            average(base, [(base, 1)], tmp_path / "next", step=FEDAVG, block_elements=1 << 12)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "next").exists()


# ---------------------------------------------------------------- what it costs


def test_more_updates_than_open_files_are_averaged_all_the_same(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = [(write(tmp_path / f"{seed}", model(seed)), seed) for seed in range(1, 41)]
    expected = average(base, updates, tmp_path / "all-open", step=FEDAVG)
    monkeypatch.setattr(folding, "OPEN_FILES", 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(13)]  # the lowest that are free; between them others of this process may lie
    for descriptor in free:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free), hard))
    try:
        assert average(base, updates, tmp_path / "few-open", step=FEDAVG) == expected
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def peak_of(work: Callable[[], object]) -> int:
    """Bytes that `work` held at most, numpy's included."""
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("updates", [1, 30])
def test_memory_is_a_few_blocks_whatever_the_model_and_the_fleet(tmp_path: Path, updates: int) -> None:
    block_elements = 1 << 13
    block = block_elements * 8  # bytes
    large: Model = {
        "w": np.ones(1 << 20, np.float32),
        "v": np.ones(1 << 18, np.float16),
        "n": np.ones(1 << 18, np.int64),
        "b": np.ones(1 << 20, np.bool_),
        "mean": np.ones(1 << 17),
        "var": np.ones(1 << 17),
    }
    base = write(tmp_path / "base", large, Notes(variances={"var": "mean"}))
    digest = file_digest(base)
    files = [(base, 1)] * updates
    assert (
        peak_of(lambda: average(base, files, tmp_path / "next", step=FEDAVG, block_elements=block_elements, threads=2))
        < 40 * block
    )
    assert (
        peak_of(lambda: inspect(base, base, digest=digest, norm_bound=1.0, block_elements=block_elements)) < 8 * block
    )
    assert base.stat().st_size > 100 * block
