"""Robust rules over real files: against whole arrays, in any blocks and threads, beside codecs and outer steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codecs import codec
from common.deltas import encode_update
from common.errors import BadUpdateError
from common.weights import Array, Notes, file_digest, load, read_layout, save
from server import folding, surveying
from server.folding import Averaged, Memory, Rules, Stopped, Targets
from server.optimizers import DiLoCo, FedAvg
from server.robust_rules import Rule
from tests.test_folding import folder, peak_of

NAMES = ("clip", "trimmed", "median", "krum", "multikrum", "bulyan", "rfa", "centered_clip")
CHOOSING = ("krum", "multikrum", "bulyan")
NOTES = Notes(variances={"var": "mean"}, buffers=("mean", "var"))
BAD = 3  # the update of the hostile worker, of COUNT
COUNT = 7
TRAINED = ("w", "half", "scale")
Model = dict[str, Array]


def model(seed: int, size: int = 5000) -> Model:
    chance = np.random.default_rng(seed)
    return {
        "w": chance.normal(size=(2, size)).astype(np.float32),
        "half": chance.normal(size=9).astype(np.float16),
        "scale": np.array(chance.normal(), np.float32),
        "nothing": np.empty((0, 4), np.float32),
        "mean": np.zeros(3, np.float32),
        "var": np.ones(3, np.float32),
        "steps": np.array(100, np.int64),
        "mask": np.array([True, False, True]),
    }


def trained(seed: int, size: int = 5000) -> Model:
    """What honest training may come to: another change from each worker, all of them in one direction."""
    chance, base = np.random.default_rng(seed), model(0, size)
    moved = {name: base[name] + (0.01 * chance.normal(1, 0.2, base[name].shape)).astype(base[name].dtype)
             for name in TRAINED}  # fmt: skip
    moved["scale"] = np.asarray(moved["scale"])
    buffers = {"mean": base["mean"] + np.float32(0.1 * seed), "var": base["var"] + np.float32(0.1)}
    return {**base, **moved, **buffers, "steps": np.array(100 + seed, np.int64)}


def hostile(size: int = 5000) -> Model:
    """All that can be said in finite numbers."""
    base, good = model(0, size), trained(99, size)
    return {
        **{name: np.asarray(base[name] - 100 * (good[name] - base[name]), base[name].dtype) for name in TRAINED},
        "nothing": base["nothing"],
        "mean": np.full(3, 1e30, np.float32),
        "var": np.full(3, -1e30, np.float32),
        "steps": np.array(2**62, np.int64),
        "mask": np.array([False, True, False]),
    }


def write(here: Path, size: int = 5000) -> tuple[Path, list[tuple[Path, int]]]:
    """A base, and the updates of a round, one of them hostile."""
    save(here / "base", model(0, size), NOTES)
    for at in range(COUNT):
        save(here / f"{at}", hostile(size) if at == BAD else trained(at + 1, size), NOTES)
    return here / "base", [(here / f"{at}", 10 + at) for at in range(COUNT)]


def average(base: Path, updates: Sequence[tuple[Path, int]], rule: Rule, **options: Any) -> Averaged:
    here = base.parent
    states = tuple(here / f"state{n}" for n in range(rule.states))
    rules = options.pop("rules", Rules(FedAvg(), robust=rule))
    return folding.average(
        base, updates, options.pop("targets", Targets(here / "next", states)), rules=rules, **options
    )


def changes(base: Path, paths: Sequence[Path], name: str) -> Array:
    before = load(base)[name].astype(np.float64)
    return np.stack([load(path)[name].astype(np.float64) - before for path in paths])


# ---------------------------------------------------------------- what they give


@pytest.mark.parametrize("name", NAMES)
def test_no_rule_lets_one_hostile_worker_turn_the_model_or_its_buffers(tmp_path: Path, name: str) -> None:
    base, updates = write(tmp_path)
    average(base, updates, Rule(name))  # type: ignore[arg-type]
    found, good = load(tmp_path / "next"), changes(base, [path for path, _ in updates[:BAD]], "w")
    moved = found["w"].astype(np.float64) - load(base)["w"]
    assert np.linalg.norm(moved - good.mean(axis=0)) < 0.4 * np.linalg.norm(good.mean(axis=0))
    assert 0 <= found["mean"].min() <= found["mean"].max() <= 0.8
    assert found["var"].tolist() == pytest.approx([1.1] * 3)
    assert 101 <= found["steps"] <= 107
    assert found["mask"].tolist() == [True, False, True]


def test_the_mean_of_the_same_updates_is_ruined(tmp_path: Path) -> None:
    base, updates = write(tmp_path)
    with pytest.raises(BadUpdateError, match="the new value of 'var' at element 0 is"):  # it ends the job even
        folding.average(base, updates, Targets(tmp_path / "next"), rules=Rules(FedAvg()))
    save(updates[BAD][0], {**hostile(), "var": np.ones(3, np.float32), "mean": np.ones(3, np.float32)}, NOTES)
    folding.average(base, updates, Targets(tmp_path / "next"), rules=Rules(FedAvg()))
    moved = load(tmp_path / "next")["w"].astype(np.float64) - load(base)["w"]
    assert moved.mean() < -0.1


def test_the_median_over_files_is_numpys_of_whole_arrays(tmp_path: Path) -> None:
    base, updates = write(tmp_path)
    average(base, updates, Rule("median"))
    found, models = load(tmp_path / "next"), [load(path) for path, _ in updates]
    for name in ("w", "half", "scale", "mean", "var"):
        expected = np.median(np.stack([one[name].astype(np.float64) for one in models]), axis=0)
        assert np.allclose(found[name], expected, rtol=1e-3 if name == "half" else 1e-6)


def test_krum_over_files_is_one_of_the_updates(tmp_path: Path) -> None:
    base, updates = write(tmp_path)
    average(base, updates, Rule("krum"))
    good = [load(path) for at, (path, _) in enumerate(updates) if at != BAD]
    found = load(tmp_path / "next")
    assert any(all(np.array_equal(found[name], one[name]) for name in found) for one in good)


def test_clipping_over_files_cuts_to_the_norm_that_is_said(tmp_path: Path) -> None:
    base, updates = write(tmp_path)
    average(base, updates, Rule("clip", clip_norm=1e-3))
    found = load(tmp_path / "next")
    moved = [found[name].astype(np.float64) - load(base)[name] for name in ("w", "scale")]
    assert 1e-4 < np.sqrt(sum(np.square(each).sum() for each in moved)) <= 1.1e-3


def test_centred_clipping_goes_on_from_where_it_was(tmp_path: Path) -> None:
    base, updates = write(tmp_path)
    first = average(base, updates, Rule("centered_clip"))
    state = tmp_path / "kept"
    (tmp_path / "state0").rename(state)
    again = average(base, updates, Rule("centered_clip"), memory=Memory((state,)))
    assert first.states != again.states
    assert average(base, updates, Rule("centered_clip"), memory=Memory((state,))) == again
    kept = np.frombuffer((tmp_path / "state0").read_bytes(), np.float32)
    trained_ones = [tensor.name for tensor in read_layout(base).tensors if tensor.name in TRAINED]
    moved = np.concatenate([changes(base, [tmp_path / "next"], name).ravel() for name in trained_ones])
    assert np.allclose(kept, moved, atol=2e-3)


def test_an_outer_step_takes_what_the_rule_gives(tmp_path: Path) -> None:
    base, updates = write(tmp_path)
    rules = Rules(DiLoCo(lr=2.0, momentum=0.0), robust=Rule("median"))
    average(base, updates, Rule("median"))
    plain = load(tmp_path / "next")["w"] - load(base)["w"]
    made = average(base, updates, Rule("median"), rules=rules, targets=Targets(tmp_path / "next", (tmp_path / "m",)))
    assert made.amplification == pytest.approx(2)
    assert np.allclose(load(tmp_path / "next")["w"] - load(base)["w"], 2 * plain, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_encoded_updates_are_joined_as_whole_ones_are(tmp_path: Path, name: str) -> None:
    base, updates = write(tmp_path)
    coded, bf16 = list[tuple[Path, int]](), codec("bf16")
    for path, samples in updates:
        encode_update(base, path, tmp_path / f"{path.name}.coded", bf16)
        coded.append((tmp_path / f"{path.name}.coded", samples))
    rule = Rule(name)  # type: ignore[arg-type]
    average(base, updates, rule)
    whole = load(tmp_path / "next")["w"] - load(base)["w"]
    states = tuple(tmp_path / f"state{n}" for n in range(rule.states))
    targets = Targets(tmp_path / "next", states, tmp_path / "step", tmp_path / "residual")
    average(base, coded, rule, rules=Rules(FedAvg(), bf16, bf16, rule), targets=targets)
    away = load(tmp_path / "next")["w"] - load(base)["w"] - whole  # bf16 may let another of two near ones be chosen
    assert np.linalg.norm(away) < (0.3 if name in CHOOSING else 0.01) * np.linalg.norm(whole)


# ---------------------------------------------------------------- what never changes them


@settings(max_examples=20)
@given(st.sampled_from(NAMES), st.sampled_from([1, 7, 4096, 1 << 13, 1 << 16]), st.integers(1, 4))
def test_neither_block_nor_threads_ever_change_a_byte(name: str, block: int, threads: int) -> None:
    with folder() as here:
        base, updates = write(here, 40 if block < 10 else 5000)
        rule = Rule(name)  # type: ignore[arg-type]
        usual = average(base, updates, rule, threads=1)
        assert average(base, updates, rule, threads=threads, block_elements=block) == usual


def test_spans_are_measured_to_the_same_distances_by_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, updates = write(tmp_path, 40_000)
    monkeypatch.setattr(surveying, "PIECE", 1 << 12)  # many pieces of a tensor
    found = {average(base, updates, Rule("rfa"), threads=threads).model for threads in (1, 2, 4)}
    assert len(found) == 1


def test_more_updates_than_open_files_are_measured_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, updates = write(tmp_path)
    expected = average(base, updates, Rule("bulyan"))
    monkeypatch.setattr(folding, "OPEN_FILES", 5)
    assert average(base, updates, Rule("bulyan")) == expected


# ---------------------------------------------------------------- what cannot be done


def test_too_few_updates_are_refused_before_a_file_is_written(tmp_path: Path) -> None:
    base, updates = write(tmp_path)
    with pytest.raises(ValueError, match="krum against 1 bad updates needs 5, and there are 4"):
        average(base, updates[:4], Rule("krum"))
    assert not (tmp_path / "next").exists()


def test_late_updates_have_no_part_in_a_robust_rule(tmp_path: Path) -> None:
    base, updates = write(tmp_path)
    rules = Rules(FedAvg(), codec("bf16"), robust=Rule("clip"))
    with pytest.raises(ValueError, match="late updates and other weights have no part in clip"):
        average(base, updates, Rule("clip"), rules=rules, late=[(*updates[0], 0.5)])


def test_measuring_stops_when_the_coordinator_does(tmp_path: Path) -> None:
    base, updates = write(tmp_path)
    with pytest.raises(Stopped, match="while the updates were measured"):
        average(base, updates, Rule("krum"), stopped=lambda: True)
    assert not (tmp_path / "next").exists()


def test_an_update_that_no_longer_fits_is_still_named(tmp_path: Path) -> None:
    base, updates = write(tmp_path)
    save(updates[2][0], {**model(0), "scale": np.ones(1, np.float32)}, NOTES)
    with pytest.raises(BadUpdateError, match=r"update 2 \(2\): 'scale' has shape"):
        average(base, updates, Rule("rfa"))


@pytest.mark.parametrize("name", ["bulyan", "rfa"])
def test_memory_is_spans_of_the_updates_whatever_the_model(tmp_path: Path, name: str) -> None:
    large = {"w": np.ones(1 << 19, np.float32), "n": np.ones(1 << 18, np.int64)}
    save(tmp_path / "base", large, Notes())
    updates = [(tmp_path / "base", 1)] * 12
    rule, span = Rule(name), surveying.SPAN * 8  # type: ignore[arg-type]
    peak = peak_of(lambda: average(tmp_path / "base", updates, rule, threads=2, block_elements=1 << 12))
    assert peak < 3 * 5 * 12 * span  # readers, copies of the rows, updates
    assert 12 * (tmp_path / "base").stat().st_size > 8 * peak
    assert file_digest(tmp_path / "next") == file_digest(tmp_path / "base")
