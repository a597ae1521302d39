"""Rounds of encoded updates, steps and outer state on real files, against whole arrays in memory."""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codecs import CODECS, codec
from common.deltas import apply_step, encode_update
from common.errors import BadUpdateError
from common.messages import StepRef
from common.output import SYNC_EVERY, Output
from common.weights import Array, Notes, file_digest, load, read_layout, save
from server import folding, rounds, versions
from server.folding import Memory, Rules, Targets
from server.inspection import inspect
from server.optimizers import DiLoCo, FedAvg
from tests.rounds_kit import digest, training
from worker import plan

NOTES = Notes(buffers=("mean", "var"), variances={"var": "mean"})
Model = dict[str, Array]
BLOCK = 4096  # elements: a whole block of every codec
every_codec = pytest.mark.parametrize("name", CODECS)


def model(seed: int, near: Model | None = None) -> Model:
    """A model of two blocks and more, of two dtypes; with `near`, a training away from it."""
    chance = np.random.default_rng(seed)
    fresh: Model = {
        "w": chance.normal(size=(2, BLOCK + 100)).astype(np.float32),
        "b": chance.normal(size=50).astype(np.float16),
        "mean": chance.normal(size=5).astype(np.float32),
        "var": chance.uniform(0.5, 2, size=5).astype(np.float32),
        "n": np.array(seed, np.int64),
    }
    if near is not None:
        fresh |= {name: (near[name] + 0.01 * fresh[name]).astype(near[name].dtype) for name in ("w", "b")}
    return fresh


def write(path: Path, arrays: Mapping[str, Array]) -> Path:
    save(path, arrays, NOTES)
    return path


@contextmanager
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


def encoded(here: Path, base: Path, seed: int, name: str) -> Path:
    trained = write(here / f"trained-{seed}", model(seed, near=load(base)))
    encode_update(base, trained, here / f"update-{seed}", codec(name))
    return here / f"update-{seed}"


def whole(here: Path, base: Path, update: Path, name: str) -> Model:
    """What an encoded update stands for, as a model: its trained tensors in float64."""
    target = here / "whole"
    apply_step(base, update, target, codec(name))
    return load(target)


# ---------------------------------------------------------------- asynchronous


@every_codec
def test_encoded_changes_of_asynchronous_rounds_count_by_their_factor_without_their_bases(
    tmp_path: Path, name: str
) -> None:
    old, newest = write(tmp_path / "old", model(0)), write(tmp_path / "newest", model(1))
    updates = [(encoded(tmp_path, newest, 2, name), 3), (encoded(tmp_path, old, 3, name), 5)]
    changes = [
        whole(tmp_path, base, path, name)["b"].astype(np.float64) - load(base)["b"]
        for base, (path, _) in zip((newest, old), updates, strict=True)
    ]
    old.unlink()
    since = [folding.Since(newest, 1.0), folding.Since(old, 0.5)]
    rules = Rules(FedAvg(), codec(name))
    folding.average(newest, updates, Targets(tmp_path / "next"), rules=rules, since=since)
    expected = load(newest)["b"] + (3 * changes[0] + 5 * 0.5 * changes[1]) / 8
    assert np.allclose(load(tmp_path / "next")["b"].astype(np.float64), expected, atol=2e-3)


# ---------------------------------------------------------------- the look


@every_codec
def test_an_encoded_update_passes_the_look_with_the_norm_of_what_it_says(tmp_path: Path, name: str) -> None:
    base = write(tmp_path / "base", model(0))
    update = encoded(tmp_path, base, 1, name)
    found = inspect(update, base, digest=file_digest(update), norm_bound=1e9, codec=codec(name), block_elements=BLOCK)
    old, new = load(base), whole(tmp_path, base, update, name)
    squares = sum(
        float(np.square(new[key].astype(np.float64) - old[key].astype(np.float64)).sum()) for key in ("w", "b")
    )
    assert found.norm == pytest.approx(squares**0.5, rel=1e-2)
    assert found.size == update.stat().st_size


def test_an_encoded_update_is_refused_where_whole_ones_are_wanted_and_the_other_way_round(tmp_path: Path) -> None:
    base = write(tmp_path / "base", model(0))
    update, plain = encoded(tmp_path, base, 1, "int8"), write(tmp_path / "plain", model(1))
    for file, wanted in ((update, None), (plain, codec("int8")), (update, codec("int4"))):
        with pytest.raises(BadUpdateError) as caught:
            inspect(file, base, digest=file_digest(file), norm_bound=None, codec=wanted)
        assert caught.value.code in ("wrong_dtype", "wrong_shape", "bad_encoding")


def test_an_encoding_that_nobody_could_have_made_is_refused_by_the_look(tmp_path: Path) -> None:
    base = write(tmp_path / "base", model(0))
    update = encoded(tmp_path, base, 1, "int8")
    tensor = read_layout(update)["w"]
    with update.open("r+b") as file:  # the scale of the first block becomes NaN
        file.seek(tensor.start)
        file.write(np.array(np.nan, np.float32).tobytes())
    with pytest.raises(BadUpdateError) as caught:
        inspect(update, base, digest=file_digest(update), norm_bound=None, codec=codec("int8"))
    assert caught.value.code == "bad_encoding"
    assert "'w'" in str(caught.value)


def test_damage_on_the_way_is_told_from_a_bad_encoding(tmp_path: Path) -> None:
    base = write(tmp_path / "base", model(0))
    update = encoded(tmp_path, base, 1, "int8")
    announced = file_digest(update)
    with update.open("r+b") as file:
        file.seek(read_layout(update)["w"].start)
        file.write(b"\xff\xff\xff\xff")
    with pytest.raises(BadUpdateError) as caught:
        inspect(update, base, digest=announced, norm_bound=None, codec=codec("int8"))
    assert caught.value.code == "digest_mismatch"


# ---------------------------------------------------------------- the fold


@every_codec
@pytest.mark.parametrize("threads", [1, 3])
def test_the_mean_of_encoded_updates_is_the_base_and_the_mean_of_what_they_say(
    tmp_path: Path, name: str, threads: int
) -> None:
    base = write(tmp_path / "base", model(0))
    updates = [(encoded(tmp_path, base, seed, name), seed) for seed in (1, 2, 3)]
    rules = Rules(FedAvg(), update=codec(name))
    folding.average(base, updates, Targets(tmp_path / "next"), rules=rules, block_elements=BLOCK, threads=threads)
    found, said = load(tmp_path / "next"), [(whole(tmp_path, base, path, name), n) for path, n in updates]
    for key in ("w", "b"):
        mean = sum(arrays[key].astype(np.float64) * n for arrays, n in said) / 6
        assert np.allclose(found[key].astype(np.float64), mean, atol=2e-3 if key == "b" else 1e-6)
    assert found["n"] == 3
    assert np.allclose(found["mean"], sum(arrays["mean"] * n for arrays, n in said) / 6, atol=1e-6)


@given(st.sampled_from(CODECS), st.integers(1, 5), st.sampled_from([BLOCK, 2 * BLOCK, 16 * BLOCK]), st.integers(1, 3))
@settings(max_examples=20)
def test_a_worker_that_takes_every_step_always_has_the_coordinators_model(
    name: str, count: int, block: int, threads: int
) -> None:
    """A chain of rounds: the step of each leads from the model before to the bytes that the coordinator published."""
    rules = Rules(DiLoCo(0.7, 0.9), update=codec(name), down=codec(name))
    with folder() as here:
        base = theirs = write(here / "model-0", model(0))
        memory = Memory()
        for number in range(1, count + 1):
            update = encoded(here, base, number, name)
            targets = Targets(
                here / f"model-{number}", (here / f"state-{number}",), here / f"step-{number}", here / f"rest-{number}"
            )
            made = folding.average(
                base, [(update, 1)], targets, rules=rules, memory=memory, block_elements=block, threads=threads
            )
            assert made.step is not None
            assert made.step.digest == file_digest(here / f"step-{number}")
            assert (made.step.kept_digest, *made.states) == (
                file_digest(here / f"rest-{number}"), file_digest(here / f"state-{number}"),
            )  # fmt: skip
            mine = here / f"mine-{number}"
            assert apply_step(theirs, here / f"step-{number}", mine, codec(name)) == made.model
            assert made.model == file_digest(here / f"model-{number}")
            base, theirs, memory = targets.model, mine, Memory(targets.states, targets.residual)


def test_what_a_coarse_step_leaves_out_is_sent_later(tmp_path: Path) -> None:
    """Without changes any more, topk goes on sending what it owes, until the workers have the true model."""
    rules = Rules(FedAvg(), update=codec("bf16"), down=codec("topk"))
    base = write(tmp_path / "model-0", model(0))
    target = {**model(0), "w": model(0)["w"] + np.float32(0.5)}
    encode_update(base, write(tmp_path / "trained", target), tmp_path / "update", codec("bf16"))
    still = tmp_path / "still"
    update, residual = tmp_path / "update", None
    gaps = []
    for number in range(1, 40):
        targets = Targets(tmp_path / f"m{number}", (), tmp_path / f"s{number}", tmp_path / f"r{number}")
        folding.average(base, [(update, 1)], targets, rules=rules, memory=Memory((), residual))
        base, residual = targets.model, targets.residual
        gaps.append(float(np.abs(load(base)["w"] - target["w"]).mean()))
        encode_update(base, write(tmp_path / "same", load(base)), still, codec("bf16"))
        update = still
    assert gaps[-1] < gaps[0] * 0.6
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(gaps))


@given(st.integers(1, 4), st.sampled_from([1000, BLOCK, 1 << 16]))
@settings(max_examples=15)
def test_outer_state_is_a_stream_beside_the_model_whatever_the_blocks(count: int, block: int) -> None:
    step = DiLoCo(0.5, 0.8)
    with folder() as here:
        path = write(here / "m0", model(0))
        velocity = {key: np.zeros(model(0)[key].size) for key in ("w", "b")}
        state: tuple[Path, ...] = ()
        for number in range(1, count + 1):
            arrays = load(path)
            update = write(here / f"u{number}", model(number, near=arrays))
            targets = Targets(here / f"m{number}", (here / f"v{number}",))
            made = folding.average(
                path, [(update, 1)], targets, rules=Rules(step), memory=Memory(state), block_elements=block, threads=2
            )
            found, said = load(targets.model), load(update)
            for key in ("w", "b"):
                gradient = arrays[key].astype(np.float64).ravel() - said[key].astype(np.float64).ravel()
                velocity[key] = 0.8 * velocity[key] + gradient
                moved = arrays[key].astype(np.float64).ravel() - 0.5 * (gradient + 0.8 * velocity[key])
                assert np.allclose(found[key].ravel().astype(np.float64), moved, atol=2e-2 if key == "b" else 1e-5)
            kept = np.fromfile(targets.states[0], np.float32)
            order = [tensor.name for tensor in read_layout(path).tensors if tensor.name in velocity]
            assert np.allclose(kept, np.concatenate([velocity[key] for key in order]), atol=1e-5)
            assert made.states == (file_digest(targets.states[0]),)
            path, state = targets.model, targets.states


@every_codec
def test_a_late_update_adds_its_damped_change_to_the_mean_and_has_no_part_in_buffers(tmp_path: Path, name: str) -> None:
    base, target = write(tmp_path / "base", model(1)), Targets(tmp_path / "target")
    files = [encoded(tmp_path, base, seed, name) for seed in (2, 3, 4)]
    rules = Rules(FedAvg(), codec(name))
    folding.average(base, [(files[0], 10), (files[1], 30)], target, rules=rules, late=[(files[2], 60, 0.5)])
    found, old = load(target.model), load(base)
    said = [whole(tmp_path, base, file, name) for file in files]
    for part in ("w", "b"):
        changes = [one[part].astype(np.float64) - old[part].astype(np.float64) for one in said]
        mean = (10 * changes[0] + 30 * changes[1] + 60 * 0.5 * changes[2]) / 100
        assert np.allclose(found[part], old[part] + mean, atol=2e-3)
    assert np.allclose(found["mean"], (10 * said[0]["mean"] + 30 * said[1]["mean"]) / 40)
    assert found["n"] == max(said[0]["n"], said[1]["n"]) == 3


def test_late_updates_that_are_whole_models_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    base = write(tmp_path / "base", model(1))
    with pytest.raises(ValueError, match="whole models"):
        folding.average(base, [(base, 1)], Targets(tmp_path / "t"), rules=Rules(FedAvg()), late=[(base, 1, 0.5)])


def test_a_memory_of_another_model_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    base = write(tmp_path / "base", model(0))
    state = tmp_path / "state"
    state.write_bytes(bytes(12))
    before = sorted(tmp_path.iterdir())
    targets = Targets(tmp_path / "next", (tmp_path / "new-state",))
    with pytest.raises(OSError, match="it has 12 bytes"):
        folding.average(base, [(base, 1)], targets, rules=Rules(DiLoCo()), memory=Memory((state,)))
    assert sorted(tmp_path.iterdir()) == before


def test_an_average_that_is_stopped_leaves_none_of_its_files(tmp_path: Path) -> None:
    base = write(tmp_path / "base", model(0))
    update = encoded(tmp_path, base, 1, "int8")
    before = sorted(tmp_path.iterdir())
    targets = Targets(tmp_path / "n", (tmp_path / "v",), tmp_path / "s", tmp_path / "r")
    rules = Rules(DiLoCo(), update=codec("int8"), down=codec("int8"))
    with pytest.raises(folding.Stopped):
        folding.average(base, [(update, 1)], targets, rules=rules, stopped=lambda: True)
    assert sorted(tmp_path.iterdir()) == before


def test_more_updates_than_files_may_be_open_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write(tmp_path / "base", model(0))
    updates = [(encoded(tmp_path, base, seed, "int4"), seed) for seed in range(1, 6)]
    rules = Rules(FedAvg(), update=codec("int4"))
    first = folding.average(base, updates, Targets(tmp_path / "one"), rules=rules)
    monkeypatch.setattr(folding, "OPEN_FILES", 4)
    assert folding.average(base, updates, Targets(tmp_path / "two"), rules=rules) == first


# ---------------------------------------------------------------- files under way


@pytest.mark.parametrize("size", [0, 1, SYNC_EVERY + 7])
def test_an_output_has_the_digest_of_its_bytes_and_is_gone_unless_it_was_finished(tmp_path: Path, size: int) -> None:
    path, piece = tmp_path / "out", 1 << 20
    with Output(path) as output:
        for start in range(0, size, piece):
            output.write(bytes(min(piece, size - start)))
        found = output.finish()
    assert (found, output.size, path.stat().st_size) == (file_digest(path), size, size)
    with Output(path) as output:
        output.write(b"half")
    assert not path.exists()
    with suppress(KeyError), Output(path) as output:
        output.finish()
        raise KeyError
    assert not path.exists()


# ---------------------------------------------------------------- which way a worker goes


def steps(*sizes: int) -> dict[int, StepRef]:
    return {
        number: StepRef(base=digest(number - 1), model=digest(number), digest=digest(100 + number), size=size)
        for number, size in enumerate(sizes, start=1)
    }


def test_the_way_to_a_model_is_as_long_as_it_costs_less_than_the_model() -> None:
    known = steps(10, 10, 10, 10)
    assert rounds.way_to(4, 1000, known) == tuple(known.values())
    assert rounds.way_to(4, 25, known) == (known[3], known[4])
    assert rounds.way_to(4, 10, known) == ()
    assert rounds.way_to(9, 1000, known) == ()
    assert rounds.way_to(4, 1000, {4: known[4], 2: known[2]}) == (known[4],)


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(1, 1000))
def test_a_way_always_leads_to_its_model_and_never_costs_as_much(sizes: list[int], size: int) -> None:
    way = rounds.way_to(len(sizes), size, steps(*sizes))
    assert sum(step.size for step in way) < size
    assert len(way) <= rounds.LONGEST_WAY
    assert not way or way[-1].model == digest(len(sizes))
    assert all(after.base == before.model for before, after in itertools.pairwise(way))


def test_a_worker_begins_with_the_newest_model_that_it_has() -> None:
    way = tuple(steps(10, 10, 10).values())
    assert plan.way(way, {digest(0), digest(1)}.__contains__) == way[1:]
    assert plan.way(way, {digest(0)}.__contains__) == way
    assert plan.way(way, {digest(3)}.__contains__) == ()
    assert plan.way((), {digest(0)}.__contains__) == ()


# ---------------------------------------------------------------- which encoding a link is given


@pytest.mark.parametrize(
    ("size", "rate", "update"),
    [
        (1_000_000, None, "fp32"),
        (1_000_000, 500_000, "fp32"),
        (1_000_000, 499_999, "bf16"),
        (1_000_000, 249_999, "int8"),
        (1_000_000, 124_999, "int4"),
        (100_000_000, 1.0, "int4"),
    ],
)
def test_the_least_coarse_encoding_that_is_quick_enough_is_taken(size: int, rate: float | None, update: str) -> None:
    assert rounds.encoding_for(size, rate) == update


@given(st.integers(0, 10**12), st.floats(1, 1e12), st.floats(1, 1e12))
def test_a_faster_link_never_gets_a_coarser_encoding(size: int, one: float, other: float) -> None:
    order = list(rounds.ENCODINGS)
    slow, fast = sorted((one, other))
    assert order.index(rounds.encoding_for(size, fast)) <= order.index(rounds.encoding_for(size, slow))


def test_the_room_that_a_paused_job_waits_for_is_what_its_average_takes() -> None:
    def room(**aggregation: str) -> int:
        return versions.room_for(training(aggregation=aggregation).job, 100)

    assert room() == 100
    assert room(update="int8") == 300  # the step and the residual
    assert room(update="int8", download="fp32") == 100
    assert room(update="int8", algorithm="diloco") == 400
