"""Client-drift methods: slots, their sum, the corrections made of them, and the models that follow."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import drift as common_drift
from common.drift import check_rate_sum, correction, farthest, next_slot, next_total, weight_of
from common.errors import BadUpdateError
from common.messages import JobSpec, TrainSection
from common.slots import Carried, Flat, write_correction, write_slot
from common.weights import load, read_layout, save
from server import drift, folding, slots, versions
from tests.drift_kit import MODEL, NOTES, NUMBERS, Loss, Stage
from tests.rounds_kit import spec

LOSSES = {0: Loss(1.0, 2.0), 1: Loss(3.0, -1.0)}
SCHEDULE: list[Sequence[int]] = [(0, 1), (1,), (0, 1)]
Exact = list[Fraction]


@pytest.fixture(scope="module", autouse=True)
def _no_power_cuts() -> Iterator[None]:
    """Nothing here is about them, and a hundred rounds would wait for the disk a thousand times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


# ---------------------------------------------------------------- against the papers, by hand


def steps_by_hand(loss: Loss, x: Fraction, added: Fraction, pull: Fraction, lr: Fraction, steps: int) -> Fraction:
    y = x
    for _ in range(steps):
        y -= lr * (Fraction(loss.a) * (y - Fraction(loss.b)) + added + pull * (y - x))
    return y


def scaffold_by_hand(start: Fraction, schedule: list[Sequence[int]], server_lr: Fraction) -> tuple[Exact, Exact]:
    """Algorithm 1 of Karimireddy et al. with option II, line by line, in exact numbers. Models; c after each round."""
    lr, steps, n = Fraction(1, 10), 2, len(LOSSES)
    x, c, own = start, Fraction(0), [Fraction(0)] * n
    models, means = [], []
    for chosen in schedule:
        changes, differences = [], []
        for k in chosen:
            y = steps_by_hand(LOSSES[k], x, c - own[k], Fraction(0), lr, steps)
            after = own[k] - c + (x - y) / (steps * lr)
            changes.append(y - x)
            differences.append(after - own[k])
            own[k] = after
        x += server_lr * sum(changes) / len(chosen)
        c += Fraction(len(chosen), n) * sum(differences) / len(chosen)
        models.append(x)
        means.append(c)
    return models, means


def feddyn_by_hand(start: Fraction, schedule: list[Sequence[int]], alpha: Fraction) -> tuple[Exact, Exact]:
    """Algorithm 1 of Acar et al., line by line, in exact numbers. Models; h after each round."""
    lr, steps, m = Fraction(1, 10), 2, len(LOSSES)
    theta, h, own = start, Fraction(0), [Fraction(0)] * m
    models, means = [], []
    for chosen in schedule:
        found = []
        for k in chosen:
            local = steps_by_hand(LOSSES[k], theta, -own[k], alpha, lr, steps)
            own[k] -= alpha * (local - theta)
            found.append(local)
        h -= alpha / m * sum(local - theta for local in found)
        theta = sum(found) / len(found) - h / alpha
        models.append(theta)
        means.append(h)
    return models, means


def played(stage: Stage) -> tuple[list[float], list[float]]:
    """The first trained number, and the mean of all slots, after each round of SCHEDULE."""
    models, means = [], []
    for chosen in SCHEDULE:
        stage.round(chosen)
        models.append(float(stage.model()[0]))
        means.append(float(stage.total()[0]) / len(LOSSES))
    return models, means


@pytest.mark.parametrize("server_lr", [None, 1.0, 0.5])
def test_scaffold_is_its_paper_over_rounds_in_which_shards_are_missing(tmp_path: Path, server_lr: float | None) -> None:
    scaled = {"algorithm": "fedavgm", "outer_momentum": 0.0, "outer_lr": server_lr}
    stage = Stage(tmp_path, LOSSES, train={"drift": "scaffold"}, aggregation=scaled if server_lr else {})
    models, means = played(stage)
    x, c = scaffold_by_hand(Fraction(1), SCHEDULE, Fraction(server_lr or 1))
    assert np.allclose(models, [float(value) for value in x], rtol=0, atol=1e-6)
    assert np.allclose(means, [float(value) for value in c], rtol=0, atol=1e-6)


def test_scaffold_gives_the_numbers_of_a_sheet_of_paper(tmp_path: Path) -> None:
    """Worked out once, so that no two programs can agree on the same mistake.

    Round 1 from x = 1: shard 0 goes 1 → 1.1 → 1.19 (c_0 = −0.95), shard 1 goes 1 → 0.4 → −0.02 (c_1 = 5.1);
    x = 0.585, c = 2.075. Round 2, shard 1 alone, each gradient + 2.075 − 5.1: 0.585 → 0.412 → 0.2909; c_1 becomes
    5.1 − 2.075 + 0.2941 / 0.2 = 4.4955; x = 0.2909, c = 1.77275.
    """
    models, means = played(Stage(tmp_path, LOSSES, train={"drift": "scaffold"}))
    assert np.allclose(models[:2], [0.585, 0.2909], rtol=0, atol=1e-6)
    assert np.allclose(means[:2], [2.075, 1.77275], rtol=0, atol=1e-6)


def test_feddyn_is_its_paper_over_rounds_in_which_shards_are_missing(tmp_path: Path) -> None:
    stage = Stage(tmp_path, LOSSES, train={"drift": "feddyn", "dyn_alpha": 0.25})
    models, means = played(stage)
    theta, h = feddyn_by_hand(Fraction(1), SCHEDULE, Fraction(1, 4))
    assert np.allclose(models, [float(value) for value in theta], rtol=0, atol=1e-6)
    assert np.allclose(means, [float(value) for value in h], rtol=0, atol=1e-6)


def test_feddyn_gives_the_numbers_of_a_sheet_of_paper(tmp_path: Path) -> None:
    """Round 1 from 1, α = 0.25: shard 0 goes 1 → 1.1 → 1.1875, shard 1 goes 1 → 0.4 → −0.005; h = −0.25/2 · (0.1875 −
    1.005) = 0.1021875, and the model is 0.59125 − 0.40875 = 0.1825.
    """
    models, means = played(Stage(tmp_path, LOSSES, train={"drift": "feddyn", "dyn_alpha": 0.25}))
    assert np.allclose((models[0], means[0]), (0.1825, 0.1021875), rtol=0, atol=1e-6)


def test_each_shard_counts_alike_however_many_samples_it_has(tmp_path: Path) -> None:
    stage = Stage(tmp_path, LOSSES, train={"drift": "scaffold"})
    few, many = stage.trained(0), stage.trained(1)
    stage.hand_in(0, few)
    update = stage.hand_in(1, many)
    phase = stage.freeze()
    large = tuple(one.model_copy(update={"samples": 1_000 if one == update else 1}) for one in phase.accepted)
    made = stage.average(replace(phase, accepted=large))
    mean = (few["w"].astype(np.float64) + many["w"]) / 2
    assert np.allclose(load(stage.blobs.path(made.model.digest))["w"], mean, atol=1e-7)


# ---------------------------------------------------------------- what it is for

UNLIKE = {0: Loss(1.0, 4.0), 1: Loss(9.0, -1.0), 2: Loss(3.0, -6.0)}


def gaps(method: str, rounds: int, **keys: Any) -> list[float]:
    """How far the mean loss of three very unlike shards is above its least value, after each round."""
    best = sum(loss.a * loss.b for loss in UNLIKE.values()) / sum(loss.a for loss in UNLIKE.values())

    def mean_loss(w: float) -> float:
        return sum(loss.a * (w - loss.b) ** 2 for loss in UNLIKE.values()) / 6

    with TemporaryDirectory() as name:
        stage = Stage(Path(name), UNLIKE, lr=0.05, steps=20, train={"drift": method, **keys})
        found = []
        for _ in range(rounds):
            stage.round(range(3))
            found.append(mean_loss(float(stage.model()[0])) - mean_loss(best))
    return found


def test_scaffold_and_feddyn_come_where_fedavg_never_does_on_unlike_convex_shards() -> None:
    """Twenty local steps: FedAvg ends near the mean of the shards' own ends, which is no minimum of anything."""
    fedavg, scaffold = gaps("none", 12), gaps("scaffold", 20)
    feddyn = gaps("feddyn", 12, dyn_alpha=3.0)
    assert fedavg[-1] == pytest.approx(fedavg[7], rel=1e-2), "it still comes nearer"
    assert scaffold[8] < min(fedavg)
    assert scaffold[-1] < min(fedavg) / 50
    assert feddyn[-1] < min(fedavg) / 10_000


# ---------------------------------------------------------------- the sum is the sum, always

SCHEDULES = st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=5)
FOUR = {k: Loss(1.0 + k, 3.0 - 2 * k) for k in range(4)}


@given(SCHEDULES, st.sampled_from(["scaffold", "feddyn"]), st.sampled_from(["fp32", "int8"]))
@settings(max_examples=20, deadline=None)
def test_the_sum_is_that_of_all_slots_whoever_trains_when(schedule: list[set[int]], method: str, update: str) -> None:
    with TemporaryDirectory() as name:
        stage = Stage(Path(name), FOUR, train={"drift": method}, aggregation={"update": update})
        for chosen in schedule:
            stage.round(chosen)
            exact = sum(stage.slot(str(k)).astype(np.float64) for k in range(4))
            largest = max(float(np.abs(stage.slot(str(k))).max()) for k in range(4))
            assert np.allclose(stage.total(), exact, rtol=0, atol=1e-13 * max(largest, 1e-30))
            assert all(stage.slots(k).shards == 4 for k in stage.open.shards)


@given(st.permutations([0, 1, 2, 3]))
@settings(max_examples=8, deadline=None)
def test_the_order_in_which_updates_come_changes_no_byte(order: list[int]) -> None:
    found = set()
    for arrivals in ([0, 1, 2, 3], order):
        with TemporaryDirectory() as name:
            stage = Stage(Path(name), FOUR, train={"drift": "scaffold"})
            stage.round(range(4), order=arrivals)
            made = stage.round([1, 3], order=[k for k in arrivals if k in (1, 3)])
            found.add((made.model, made.slots, made.slot_total))
    assert len(found) == 1


def test_a_round_that_is_averaged_again_gives_the_same_files(tmp_path: Path) -> None:
    stage = Stage(tmp_path, LOSSES, train={"drift": "feddyn"})
    stage.round([0, 1])
    for shard in (0, 1):
        stage.hand_in(shard, stage.trained(shard))
    phase = stage.freeze()
    assert stage.average(phase) == stage.average(phase)


def test_an_average_that_is_broken_off_leaves_no_file(tmp_path: Path) -> None:
    stage = Stage(tmp_path, LOSSES, train={"drift": "scaffold"})
    for shard in (0, 1):
        stage.hand_in(shard, stage.trained(shard))
    phase = stage.freeze()
    for looks in range(12):
        left = iter([False] * looks)
        try:
            versions.make(stage.job, phase, stage.blobs, lambda left=left: next(left, True))
        except folding.Stopped:
            assert not list((tmp_path / "parts").iterdir())
        else:
            break
    assert looks > 4, "it was never broken off among the slots"


def test_a_slot_beyond_float32_ends_the_average_in_words_and_leaves_no_file(tmp_path: Path) -> None:
    stage = Stage(tmp_path, LOSSES, train={"drift": "scaffold"})
    stage.hand_in(0, {**stage.trained(0), "w": np.full(3, 1e38, np.float32)}, rate_sum=1e-3)
    with pytest.raises(BadUpdateError, match=r"its slot of 'w' at element 0 is beyond what float32 holds"):
        stage.average(stage.freeze())
    assert not list((tmp_path / "parts").iterdir())


def test_many_shards_and_blocks_need_the_memory_of_a_few_blocks_and_change_no_byte(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    base = tmp_path / "base"
    save(base, {"w": chance.normal(size=999).astype(np.float32)}, NOTES.model_copy(update={"buffers": ()}))
    files = []
    for k in range(5):
        files.append((None if k % 2 else tmp_path / f"before{k}", tmp_path / f"after{k}"))
        for path in files[-1]:
            if path is not None:
                chance.normal(size=999).astype(np.float32).tofile(path)
    digests = set()
    for block in (7, 64, 5_000):
        targets = [tmp_path / "total", tmp_path / "rest"]
        digests.add(slots.write_total(read_layout(base), (), files, targets, block_elements=block))
    assert len(digests) == 1


# ---------------------------------------------------------------- whose slot is whose


def test_a_shard_that_carries_nothing_begins_fresh_and_is_counted(tmp_path: Path) -> None:
    stage = Stage(tmp_path, FOUR, train={"drift": "scaffold"})
    assert stage.slots(0).own is None
    assert not stage.correction(0).any()
    assert [stage.round(chosen).fresh for chosen in ([0, 1], [1, 2], [0, 1, 2])] == [2, 1, 0]
    assert stage.slots(3).own is None
    assert drift.fresh_words(stage.job) == "1 of 4 shards carry nothing yet"
    assert stage.slots(3).total is not None
    mean = (stage.total() / 4).astype(np.float32)
    assert np.allclose(stage.correction(3), mean, atol=1e-7), "a fresh shard is corrected by the mean alone"


def test_own_data_has_a_slot_by_worker_and_a_newcomer_makes_the_mean_smaller(tmp_path: Path) -> None:
    stage = Stage(tmp_path, LOSSES, train={"drift": "scaffold"}, data={"partition": "local"})
    assert stage.slots(0).shards == 2
    for shard in (0, 1):
        stage.hand_in(shard, stage.trained(shard))
    stage.close(stage.average(stage.freeze()), places=("b", "c"))  # a is gone, c is new: b has another number now
    assert [shard.worker for shard in stage.open.shards.values()] == ["b", "c"]
    assert stage.slots(0).own == stage.job.slots["b"]
    assert stage.slots(1).own is None
    assert stage.slots(0).shards == 3, "who left stays in the sum, and who came is counted"
    mean = stage.total() / 3
    assert np.allclose(stage.correction(0), mean - stage.slot("b"), atol=1e-6)


def test_feddyn_tells_a_worker_of_its_own_slot_alone(tmp_path: Path) -> None:
    stage = Stage(tmp_path, LOSSES, train={"drift": "feddyn"})
    stage.round([0, 1])
    assert (stage.slots(0).own, stage.slots(0).total) == (stage.job.slots["0"], None)
    assert np.array_equal(stage.correction(0), -stage.slot("0"))


def test_a_job_without_a_method_has_no_slots_and_makes_none(tmp_path: Path) -> None:
    stage = Stage(tmp_path, LOSSES, train={})
    phase = stage.open
    assert drift.slots_for(stage.job, phase.shards[0], 0) is None
    assert drift.fresh_words(stage.job) == ""
    assert (drift.room_for(stage.job.spec, 100, 3), drift.carried(stage.job)) == (0, {})
    for shard in (0, 1):
        arrays = {**MODEL, "w": MODEL["w"] + shard}
        stage.hand_in(shard, arrays)
    made = stage.average(stage.freeze())
    stage.close(made)
    assert (made.slots, made.slot_total, stage.job.slots, stage.job.owners) == ((), (), {}, frozenset())


def test_what_a_job_carries_is_known_by_name(tmp_path: Path) -> None:
    stage = Stage(tmp_path, LOSSES, train={"drift": "scaffold"})
    made = stage.round([1])
    assert drift.carried(stage.job) == {
        made.slots[0].digest: "slot of shard 1", **dict.fromkeys(made.slot_total, "sum of the slots")
    }  # fmt: skip
    assert made.digests >= drift.carried(stage.job).keys()
    stage.round([0])
    assert drift.fresh_words(stage.job) == ""
    assert drift.room_for(stage.job.spec, 100, 3) == 1_000


def test_a_replayed_journal_has_the_same_slots(tmp_path: Path) -> None:
    stage = Stage(tmp_path, FOUR, train={"drift": "scaffold"})
    stage.round([0, 2])
    stage.round([1])
    again = stage.play.replayed()
    assert (again.slots, again.slot_total) == (stage.job.slots, stage.job.slot_total)


# ---------------------------------------------------------------- both sides


@pytest.mark.parametrize("method", ["scaffold", "feddyn"])
@pytest.mark.parametrize("update", ["fp32", "bf16", "int8"])
def test_a_worker_comes_to_the_slot_that_the_coordinator_has(tmp_path: Path, method: Any, update: str) -> None:
    stage = Stage(tmp_path, LOSSES, train={"drift": method}, aggregation={"update": update})
    stage.round([0, 1])
    given = stage.slots(0)
    own, total = (None if digest is None else stage.blobs.path(digest) for digest in (given.own, given.total))
    accepted = stage.hand_in(0, stage.trained(0))
    weight = weight_of(stage.job.spec.train, accepted.rate_sum)
    base, sent = stage.blobs.path(stage.open.base.digest), stage.blobs.path(accepted.digest)
    carried = Carried(method, given.shards, own, total)
    here = write_slot(base, sent, stage.codec, carried, weight, tmp_path / "slot", durable=False, block_elements=4096)
    made = stage.average(stage.freeze())
    assert [slot.digest for slot in made.slots] == [here]


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    base, short = tmp_path / "base", tmp_path / "short"
    save(base, MODEL, NOTES)
    short.write_bytes(bytes(4 * NUMBERS - 4))
    with pytest.raises(OSError, match="belong to this model"):
        write_correction(base, Carried("scaffold", 2, short, None), tmp_path / "correction")
    assert not (tmp_path / "correction").exists()
    with Flat(None, read_layout(base)) as nothing:
        assert not nothing.read(3).any()


@given(st.integers(0, 1_000), st.floats(1e-6, 1e3))
def test_both_methods_are_one_formula_and_scaffolds_is_the_mean_gradient(seed: int, rates: float) -> None:
    chance = np.random.default_rng(seed)
    own, total, gradient = (chance.normal(size=6).astype(np.float32) for _ in range(3))
    d = correction("scaffold", own, total, 3)
    change = -rates * (gradient.astype(np.float64) + d)  # steps of gradient + d, whose rates add up to `rates`
    assert np.allclose(next_slot(d, change.copy(), 1 / rates), gradient, atol=1e-5)
    h = next_slot(correction("feddyn", own, total, 3), change.copy(), 0.5)
    assert np.allclose(h, own - 0.5 * change, rtol=1e-5, atol=1e-5)


def test_two_numbers_hold_what_one_would_lose() -> None:
    """Ten thousand rounds of a change that float32 rounds away beside the sum: alone it would still be 1."""
    tiny, zero = np.full(1, 2.0**-30, np.float32), np.zeros(1, np.float32)
    total, rest = np.ones(1, np.float32), zero
    for _ in range(10_000):
        total, rest = next_total(total, rest, [(zero, tiny)])
    assert float(total[0]) + float(rest[0]) == 1 + 10_000 * 2.0**-30


# ---------------------------------------------------------------- what is refused

SCAFFOLD = spec(train={"drift": "scaffold", "lr": 0.1})


@pytest.mark.parametrize(("rates", "steps"), [(None, 3), (0.0, 3), (-0.1, 3), (0.31, 3), (float("nan"), 3), (0.1, 0)])
def test_a_sum_of_rates_that_the_steps_cannot_have_is_refused(rates: float | None, steps: int) -> None:
    with pytest.raises(BadUpdateError) as caught:
        check_rate_sum(SCAFFOLD, rates, steps)
    assert caught.value.code == "bad_rate_sum"


def test_a_sum_of_rates_may_be_all_that_the_job_allows() -> None:
    check_rate_sum(SCAFFOLD, 0.1 + 0.1 + 0.1, 3)
    check_rate_sum(spec(train={"drift": "scaffold", "lr": 0.1, "batch_size": "auto"}), 2.4, 3)
    check_rate_sum(spec(train={"drift": "scaffold", "lr": 0.1}, config={"lr": 1.0}), 3.0, 3)
    check_rate_sum(spec(train={"drift": "feddyn"}), None, 3)


def test_an_update_may_be_so_far_away_that_its_slot_stays_finite() -> None:
    assert farthest(TrainSection(drift="scaffold", lr=0.1), 0.5) == common_drift.FARTHEST * 0.5
    assert farthest(TrainSection(drift="feddyn"), None) == common_drift.FARTHEST / common_drift.ALPHA
    assert weight_of(TrainSection(drift="feddyn", dyn_alpha=0.3), None) == 0.3


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"data": {"shards": "auto"}}, "set a number"),
        ({"train": {"drift": "scaffold", "momentum": 0.9}}, "momentum = 0.9 is set"),
        ({"train": {"drift": "feddyn", "optimizer": "adamw"}}, "optimizer = adamw is set"),
        ({"train": {"drift": "scaffold", "dyn_alpha": 0.1}}, "dyn_alpha is a key of feddyn"),
        ({"train": {"drift": "scaffold", "proximal": 0.1}}, "train.proximal is 0.1"),
        ({"train": {"drift": "feddyn", "proximal": 0.1}}, "train.proximal is 0.1"),
        ({"round": {"late": "use"}, "aggregation": {"update": "int8"}}, "set round.late = refuse"),
        ({"aggregation": {"algorithm": "diloco"}}, "aggregation.algorithm is diloco"),
        ({"aggregation": {"algorithm": "fedavgm"}}, "or fedavgm with outer_momentum = 0"),
        ({"train": {"drift": "feddyn"}, "aggregation": {"algorithm": "fedavgm", "outer_momentum": 0}}, "set fedavg"),
        ({"aggregation": {"update": "topk"}}, "topk may say too little"),
        ({"aggregation": {"update": "auto"}}, "auto may say too little"),
        ({"aggregation": {"update": "int8", "feedback": True}}, "set it to false"),
    ],
)
def test_what_a_method_cannot_be_joined_with_is_refused_at_submit(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        spec(**{"train": {"drift": "scaffold"}, **keys})


def test_own_data_needs_no_number_of_shards_and_no_worker_of_protocol_1_is_given_such_a_job() -> None:
    assert spec(train={"drift": "feddyn"}, data={"partition": "local"}).data.shards == "auto"
    assert JobSpec(task="digits").train.drift == "none"
    assert SCAFFOLD.beyond_protocol_1 == "train.drift"


def test_feddyns_outer_step_takes_the_mean_slot_over_alpha_from_the_mean() -> None:
    base = np.array([1.0, 2.0])
    dyn = drift.DynStep(alpha=0.5, shards=2).apply(base, np.array([3.0, 0.0]), [np.array([1.0, 1.0]), np.zeros(2)])
    assert dyn.tolist() == [2.0, -1.0]
