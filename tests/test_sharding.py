"""The cut of a training set: complete, proportional, and the same bytes on every machine."""

import hashlib
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import sharding
from common.errors import BadJobError
from common.sharding import Partition, cohort, cut, derived_seed, order_of

SEEDS = st.integers(0, 2**63 - 1)
SHARES = st.floats(min_value=0.0, exclude_min=True, allow_nan=False, allow_infinity=False)


def split(
    kind: str,
    total: int,
    shards: int | None,
    *,
    seed: int = 0,
    alpha: float = 0.5,
    labels_per_shard: int = 2,
    labels: np.ndarray | None = None,
) -> Partition:
    """`order_of` with the defaults of a job."""
    return order_of(
        kind, total=total, shards=shards, seed=seed, alpha=alpha, labels_per_shard=labels_per_shard, labels=labels
    )


def shards_of(partition: Partition) -> list[np.ndarray]:
    return np.split(partition.order, partition.bounds[1:-1])


def digest(partition: Partition) -> str:
    data = partition.order.astype("<i8").tobytes() + np.array(partition.bounds, "<i8").tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def check_complete(partition: Partition, total: int, shards: int) -> None:
    assert partition.order.dtype == np.int64
    assert np.array_equal(np.sort(partition.order), np.arange(total))
    assert len(partition.bounds) == shards + 1
    assert (partition.bounds[0], partition.bounds[-1]) == (0, total)
    assert all(low < high for low, high in itertools.pairwise(partition.bounds))
    assert all(type(bound) is int for bound in partition.bounds)


# ---------------------------------------------------------------- cut


@pytest.mark.parametrize(
    ("total", "shares", "bounds"),
    [
        (10, [1.0], (0, 10)),
        (10, [1.0, 1.0, 1.0], (0, 4, 7, 10)),  # ties go to the lowest index
        (11, [1.0, 1.0, 1.0], (0, 4, 8, 11)),
        (136, [1.0, 0.2, 0.16], (0, 100, 120, 136)),
        (10, [1.0, 2.0], (0, 3, 10)),  # 3.33 and 6.67
        (4, [1e-9, 1.0, 1e-9, 1.0], (0, 1, 2, 3, 4)),  # nobody goes without
        (5, [1e-9, 1.0], (0, 1, 5)),
        (3, [5e-324, 1.7e308, 1.7e308], (0, 1, 2, 3)),
    ],
)
def test_a_cut_follows_the_shares(total: int, shares: list[float], bounds: tuple[int, ...]) -> None:
    assert cut(total, shares) == bounds


@given(shares=st.lists(SHARES, min_size=1, max_size=12), extra=st.integers(0, 10**12))
def test_every_sample_is_in_exactly_one_shard_and_every_shard_has_one(shares: list[float], extra: int) -> None:
    bounds = cut(len(shares) + extra, shares)

    assert len(bounds) == len(shares) + 1
    assert (bounds[0], bounds[-1]) == (0, len(shares) + extra)
    assert all(low < high for low, high in itertools.pairwise(bounds))


@given(shares=st.lists(SHARES, min_size=1, max_size=12), extra=st.integers(0, 10**12))
def test_sizes_are_within_one_of_proportional_where_every_share_is_worth_a_sample(
    shares: list[float], extra: int
) -> None:
    total = len(shares) + extra
    whole = sum(Fraction(share) for share in shares)
    quotas = [total * Fraction(share) / whole for share in shares]
    bounds = cut(total, shares)

    for number, quota in enumerate(quotas):
        size = bounds[number + 1] - bounds[number]
        assert size < quota + 1 or size == 1
        if min(quotas) >= 1:
            assert abs(size - quota) < 1


@given(total=st.integers(1, 10**9), shards=st.integers(1, 50), speed=SHARES)
def test_equal_shares_never_differ_by_more_than_one_sample(total: int, shards: int, speed: float) -> None:
    bounds = cut(total + shards, [speed] * shards)
    sizes = [high - low for low, high in itertools.pairwise(bounds)]

    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_fewer_samples_than_shards_are_refused_with_both_numbers() -> None:
    with pytest.raises(BadJobError, match="5 samples cannot be cut into 8 shards") as refusal:
        cut(5, [1.0] * 8)
    assert "[data] shards" in refusal.value.advice


@pytest.mark.parametrize("share", [0.0, -1.0, math.nan, math.inf])
def test_a_share_that_is_no_positive_number_is_refused(share: float) -> None:
    with pytest.raises(BadJobError, match="share 1 of 2 is"):
        cut(5, [1.0, share])


def test_no_shard_at_all_is_refused() -> None:
    with pytest.raises(BadJobError, match="5 samples cannot be cut into 0 shards"):
        cut(5, [])


# ---------------------------------------------------------------- the order


@st.composite
def jobs(draw: st.DrawFn) -> dict[str, object]:
    """Arguments of `split` that can be satisfied, whatever the kind."""
    shards, pieces = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    labels = draw(st.lists(st.integers(-2, 5), min_size=shards * pieces, max_size=120))
    return {
        "total": len(labels),
        "shards": shards,
        "seed": draw(SEEDS),
        "alpha": draw(st.floats(1e-12, 1e12)),
        "labels_per_shard": pieces,
        "labels": np.array(labels, draw(st.sampled_from([np.int8, np.int32, np.int64]))),
    }


ALL = ("iid", "quantity", "dirichlet", "labels", "natural")


def possible(kind: str, job: dict) -> dict:
    """The job with as many shards as its ids allow, where they are what is cut by."""
    most = len(np.unique(job["labels"]))
    return {**job, "shards": min(job["shards"], most)} if kind == "natural" else job


@given(kind=st.sampled_from(ALL), job=jobs())
def test_every_sample_is_used_exactly_once_and_every_shard_has_one(kind: str, job: dict) -> None:
    job = possible(kind, job)
    check_complete(split(kind, **job), job["total"], job["shards"])


@given(kind=st.sampled_from(ALL), job=jobs())
def test_the_same_arguments_give_the_same_bytes(kind: str, job: dict) -> None:
    job = possible(kind, job)
    assert digest(split(kind, **job)) == digest(split(kind, **job))


@given(job=jobs(), offset=st.integers(-1000, 1000))
def test_only_the_order_of_the_label_values_counts_and_not_their_size_or_type(job: dict, offset: int) -> None:
    renamed = job["labels"].astype(np.int64) * 7 + offset

    for kind in ("dirichlet", "labels", "natural"):
        given = possible(kind, job)
        assert digest(split(kind, **given)) == digest(split(kind, **{**given, "labels": renamed}))


@given(total=st.integers(20, 200), shards=st.lists(st.integers(1, 20), min_size=2, max_size=2), seed=SEEDS)
def test_the_iid_order_does_not_depend_on_the_number_of_shards(total: int, shards: list[int], seed: int) -> None:
    first, second = (split("iid", total, count, seed=seed) for count in shards)

    assert np.array_equal(first.order, second.order)
    assert first.bounds == cut(total, [1.0] * shards[0])


def test_another_seed_gives_another_order() -> None:
    labels = np.arange(300) % 10
    for kind in ALL:
        assert digest(split(kind, 300, 5, seed=1, labels=labels)) != digest(split(kind, 300, 5, seed=2, labels=labels))


def test_an_order_cannot_be_changed_by_whoever_holds_it() -> None:
    for kind in ALL:
        partition = split(kind, 30, 3, labels=np.arange(30) % 3)
        with pytest.raises(ValueError, match="read-only"):
            partition.order[0] = 1


GOLDEN = {
    ("iid", 0): "cdd33eea9e7d3799",
    ("dirichlet", 0): "6884ab4c5b72f080",
    ("labels", 0): "f8fdb7f37074682d",
    ("iid", 2**63 - 1): "fb0691d637d353d1",
    ("dirichlet", 2**63 - 1): "c825607c46be54c5",
    ("labels", 2**63 - 1): "6954a80fb7bad54d",
    ("quantity", 0): "4ac74700bbcb9308",
    ("quantity", 2**63 - 1): "1086d2372e5301e8",
}


@pytest.mark.parametrize(("kind", "seed"), GOLDEN)
def test_the_order_is_the_one_that_every_other_machine_derives(kind: str, seed: int) -> None:
    """A change here splits a fleet in two: raise the protocol's version with it."""
    labels = np.arange(5000) * 7 % 10
    assert digest(split(kind, 5000, 37, seed=seed, alpha=0.3, labels=labels)) == GOLDEN[kind, seed]


@pytest.mark.parametrize(
    ("shards", "seed", "wanted"),
    [(37, 0, "b6b6795451a557ce"), (37, 2**63 - 1, "9d2fc0efa4197f05"), (None, 0, "c677a3f914476355")],
)
def test_the_shards_of_ids_are_the_ones_that_every_other_machine_derives(
    shards: int | None, seed: int, wanted: str
) -> None:
    assert digest(split("natural", 5000, shards, seed=seed, labels=np.arange(5000) * 31 % 97)) == wanted


def test_shards_that_drew_no_sample_are_filled_the_same_way_everywhere() -> None:
    partition = split("dirichlet", 40, 30, alpha=0.01, labels=np.zeros(40, np.int64))

    check_complete(partition, 40, 30)
    assert sorted(np.diff(partition.bounds).tolist()) == [1] * 28 + [4, 8]  # two shards had drawn all 40
    assert digest(partition) == "2583b396c5ecfa06"


# ---------------------------------------------------------------- dirichlet


def label_counts(partition: Partition, labels: np.ndarray) -> np.ndarray:
    """Samples of each label in each shard: int64 of shape (shards, labels)."""
    return np.array([np.bincount(labels[shard], minlength=labels.max() + 1) for shard in shards_of(partition)])


@pytest.mark.parametrize("seed", range(5))
def test_a_small_alpha_is_more_skewed_than_a_large_one(seed: int) -> None:
    labels = np.arange(10_000) % 10

    def skew(alpha: float) -> float:
        """Mean over classes of the largest part of the class that one shard holds: 0.1 is even, 1 is all in one."""
        counts = label_counts(split("dirichlet", 10_000, 10, seed=seed, alpha=alpha, labels=labels), labels)
        return float((counts.max(axis=0) / counts.sum(axis=0)).mean())

    skews = [skew(alpha) for alpha in (0.01, 0.1, 1.0, 100.0, 1e9)]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.8
    assert skews[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0, 5.0, 100.0])
def test_proportions_have_the_mean_and_the_variance_of_a_dirichlet(alpha: float) -> None:
    weights = sharding._dirichlet_weights(20_000, 5, alpha, 3).astype(float)
    proportions = weights / weights.sum(axis=1, keepdims=True)
    variance = (1 / 5) * (1 - 1 / 5) / (5 * alpha + 1)

    assert proportions.mean(axis=0) == pytest.approx(np.full(5, 0.2), abs=5 * math.sqrt(variance / 20_000))
    assert proportions.var() == pytest.approx(variance, rel=0.03)


@pytest.mark.parametrize(("alpha", "same_as"), [(5e-324, 1e-9), (math.inf, 1e9)])
def test_an_extreme_alpha_is_the_limit_and_not_an_endless_loop(alpha: float, same_as: float) -> None:
    labels = np.arange(100) % 4
    extreme, limit = (split("dirichlet", 100, 4, alpha=value, labels=labels) for value in (alpha, same_as))

    assert digest(extreme) == digest(limit)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_an_alpha_that_is_not_above_zero_is_refused(alpha: float) -> None:
    with pytest.raises(BadJobError, match="alpha is"):
        split("dirichlet", 10, 2, alpha=alpha, labels=np.zeros(10, int))


def test_labels_that_are_no_classes_are_refused_before_they_fill_the_memory() -> None:
    with pytest.raises(BadJobError, match="200000 classes in 100 shards"):
        split("dirichlet", 200_000, 100, labels=np.arange(200_000))


# ---------------------------------------------------------------- labels


@given(shards=st.integers(1, 10), per_shard=st.integers(1, 4), size=st.integers(1, 8), repeats=st.integers(1, 3))
def test_a_shard_holds_no_more_labels_than_pieces_when_the_pieces_fit_the_labels(
    shards: int, per_shard: int, size: int, repeats: int
) -> None:
    classes = shards * per_shard
    labels = np.tile(np.arange(classes), size * repeats)  # a piece lies inside one label
    pieces_each = per_shard * repeats
    partition = split("labels", labels.size, shards, labels_per_shard=pieces_each, labels=labels)

    assert {len(np.unique(labels[shard])) <= pieces_each for shard in shards_of(partition)} == {True}
    assert set(np.diff(partition.bounds)) == {size * pieces_each}


@given(job=jobs())
def test_labels_straddle_pieces_at_the_boundaries_of_labels_alone(job: dict) -> None:
    labels, pieces = job["labels"], job["shards"] * job["labels_per_shard"]
    partition = split("labels", **job)
    held = [len(np.unique(labels[shard])) for shard in shards_of(partition)]

    assert sum(held) <= pieces + len(np.unique(labels)) - 1
    if np.unique(labels, return_counts=True)[1].min() >= math.ceil(labels.size / pieces):
        assert max(held) <= 2 * job["labels_per_shard"]  # no piece spans more than one boundary


def test_two_labels_a_shard_is_what_mcmahan_had_on_mnist() -> None:
    labels = np.repeat(np.arange(10), 600)
    partition = split("labels", 6000, 100, labels_per_shard=2, labels=labels)
    held = [len(np.unique(labels[shard])) for shard in shards_of(partition)]

    assert set(np.diff(partition.bounds)) == {60}
    assert set(held) == {1, 2}
    assert len({tuple(np.unique(labels[shard])) for shard in shards_of(partition)}) > 20  # dealt, not in turn


@pytest.mark.parametrize("labels_per_shard", [0, 4])
def test_more_pieces_than_samples_or_none_are_refused(labels_per_shard: int) -> None:
    with pytest.raises(BadJobError, match=f"10 samples cannot be cut into 3 shards of {labels_per_shard} pieces"):
        split("labels", 10, 3, labels_per_shard=labels_per_shard, labels=np.zeros(10, int))


@pytest.mark.parametrize("kind", ["dirichlet", "labels"])
@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (None, "the task gives none"),
        (np.zeros(10, np.float32), "float32"),
        (np.zeros(9, np.int64), r"shape \(9,\)"),
        (np.zeros((10, 1), np.int64), r"shape \(10, 1\)"),
    ],
)
def test_a_cut_by_label_needs_one_integer_label_a_sample(kind: str, labels: np.ndarray | None, said: str) -> None:
    with pytest.raises(BadJobError, match=said):
        split(kind, 10, 2, labels=labels)


def test_more_samples_than_fit_the_arithmetic_are_refused() -> None:
    most = sharding.MOST_SAMPLES
    with pytest.raises(BadJobError, match="too many"):
        split("dirichlet", most + 1, 2, labels=np.broadcast_to(np.int8(0), (most + 1,)))


@given(st.lists(st.integers(0, 2**31), min_size=2, max_size=6).filter(any))
def test_the_largest_data_set_is_shared_out_without_overflow(weights: list[int]) -> None:
    total = sharding.MOST_SAMPLES
    sizes = sharding._shared_out(total, np.array(weights))

    assert sizes.sum() == total
    assert all(abs(int(size) - Fraction(total * w, sum(weights))) < 1 for size, w in zip(sizes, weights, strict=True))


@pytest.mark.parametrize("kind", ["local", "striped"])
def test_a_kind_that_is_not_cut_by_index_is_refused(kind: str) -> None:
    with pytest.raises(BadJobError, match=kind):
        split(kind, 10, 2)


def test_too_few_samples_are_refused_for_every_kind() -> None:
    for kind in ("iid", "quantity", "dirichlet", "labels"):
        for shards in (4, None):
            with pytest.raises(BadJobError, match=f"3 samples cannot be cut into {shards or 0} shards"):
                split(kind, 3, shards, labels=np.zeros(3, int))


# ---------------------------------------------------------------- quantity


@pytest.mark.parametrize("seed", range(5))
def test_a_small_alpha_makes_sizes_more_unlike_than_a_large_one(seed: int) -> None:
    spreads = [
        np.std(np.diff(split("quantity", 10_000, 10, seed=seed, alpha=alpha).bounds)) for alpha in (0.05, 0.5, 5, 1e9)
    ]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] == 0


@given(total=st.integers(20, 200), shards=st.integers(1, 20), alpha=st.floats(1e-12, 1e12), seed=SEEDS)
def test_unlike_sizes_are_cut_out_of_the_iid_order(total: int, shards: int, alpha: float, seed: int) -> None:
    ours, iid = (split(kind, total, shards, alpha=alpha, seed=seed) for kind in ("quantity", "iid"))
    assert np.array_equal(ours.order, iid.order)


def test_more_samples_than_can_be_shared_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "MOST_SAMPLES", 9)
    with pytest.raises(BadJobError, match='10 samples are too many for partition = "quantity": at most 9'):
        split("quantity", 10, 2)


# ---------------------------------------------------------------- natural

IDS = st.lists(st.integers(0, 9), min_size=1, max_size=80).map(np.array)


@given(ids=IDS, seed=SEEDS)
def test_without_a_number_of_shards_each_id_is_one_in_the_order_of_the_ids(ids: np.ndarray, seed: int) -> None:
    partition = split("natural", ids.size, None, seed=seed, labels=ids)
    held = [np.unique(ids[shard]).tolist() for shard in shards_of(partition)]
    assert held == [[each] for each in np.unique(ids)]
    assert np.diff(partition.bounds).tolist() == np.unique(ids, return_counts=True)[1].tolist()


@given(ids=IDS, shards=st.integers(1, 9), seed=SEEDS)
def test_no_id_is_ever_in_two_shards_and_shards_have_as_many_ids_but_for_one(
    ids: np.ndarray, shards: int, seed: int
) -> None:
    shards = min(shards, len(np.unique(ids)))
    held = [set(ids[shard]) for shard in shards_of(split("natural", ids.size, shards, seed=seed, labels=ids))]
    assert sum(map(len, held)) == len(set.union(*held)) == len(np.unique(ids))
    assert max(map(len, held)) - min(map(len, held)) <= 1


@pytest.mark.parametrize("shards", [0, 4])
def test_more_shards_than_ids_or_none_are_refused_with_both_numbers(shards: int) -> None:
    with pytest.raises(BadJobError, match=f"6 samples of 3 ids cannot be cut into {shards} shards") as refusal:
        split("natural", 6, shards, labels=np.array([1, 1, 5, 5, 9, 9]))
    assert "[data] shards" in refusal.value.advice


def test_more_ids_than_a_job_may_have_shards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "MOST_SHARDS", 2)
    with pytest.raises(BadJobError, match="6 samples of 3 ids cannot be cut into 3 shards: at most 2 are possible"):
        split("natural", 6, None, labels=np.array([1, 1, 5, 5, 9, 9]))
    check_complete(split("natural", 6, 2, labels=np.array([1, 1, 5, 5, 9, 9])), 6, 2)


@pytest.mark.parametrize("labels", [None, np.zeros(10, np.float32), np.zeros(9, np.int64), np.zeros(0, np.int64)])
def test_a_cut_by_id_needs_one_id_a_sample(labels: np.ndarray | None) -> None:
    with pytest.raises(BadJobError, match="needs one integer id a sample") as refusal:
        split("natural", 10, 2, labels=labels)
    assert "[data] by" in refusal.value.advice


def test_a_training_set_without_samples_has_no_ids() -> None:
    with pytest.raises(BadJobError, match="0 samples of 0 ids"):
        split("natural", 0, None, labels=np.zeros(0, np.int64))


# ---------------------------------------------------------------- the cohort


@given(shards=st.integers(1, 300), fraction=st.floats(0.001, 1.0), seed=SEEDS, round_index=st.integers(0, 10**6))
def test_a_cohort_never_names_a_shard_twice_and_is_as_large_as_the_fraction(
    shards: int, fraction: float, seed: int, round_index: int
) -> None:
    chosen = cohort(shards, fraction, seed=seed, round_index=round_index)

    assert list(chosen) == sorted(set(chosen))
    assert set(chosen) <= set(range(shards))
    assert len(chosen) == max(math.floor(Fraction(str(fraction)) * shards), 1)
    assert all(type(shard) is int for shard in chosen)


@pytest.mark.parametrize(
    ("shards", "fraction", "size"),
    [(100, 0.29, 29), (10, 0.1, 1), (9, 0.1, 1), (10, 0.99, 9), (7, 1.0, 7), (3, 1e-9, 1)],
)
def test_a_fraction_is_the_decimal_that_was_written(shards: int, fraction: float, size: int) -> None:
    assert len(cohort(shards, fraction, seed=0, round_index=1)) == size
    assert len(cohort(shards, np.float64(fraction), seed=0, round_index=1)) == size


def test_every_shard_has_its_turn() -> None:
    turns = np.zeros(20)
    for round_index in range(1, 401):
        turns[list(cohort(20, 0.25, seed=9, round_index=round_index))] += 1

    assert turns.sum() == 400 * 5
    assert turns.min() > 60  # 100 expected, standard deviation 8.7
    assert turns.max() < 140


def test_the_cohort_is_the_one_that_every_other_coordinator_draws() -> None:
    assert cohort(20, 0.25, seed=0, round_index=1) == (0, 5, 16, 17, 19)
    assert cohort(20, 0.25, seed=0, round_index=2) == (0, 3, 6, 8, 15)


@pytest.mark.parametrize(("shards", "fraction"), [(0, 0.5), (3, 0.0), (3, 1.5), (3, math.nan)])
def test_a_cohort_of_nothing_is_refused(shards: int, fraction: float) -> None:
    with pytest.raises(BadJobError, match="cannot train"):
        cohort(shards, fraction, seed=0, round_index=1)


# ---------------------------------------------------------------- seeds and numbers


def test_derived_seeds_are_the_ones_that_every_other_machine_derives() -> None:
    # printf '[7,"train",3,0]' | sha256sum
    assert derived_seed(7, "train", 3, 0) == 0xC8717CE94263D348 >> 1
    assert derived_seed(0) == 0xD0BCA111F8628137 >> 1


@given(seed=SEEDS, parts=st.lists(st.integers() | st.text()))
def test_a_derived_seed_has_at_most_63_bits(seed: int, parts: list[int | str]) -> None:
    assert 0 <= derived_seed(seed, *parts) < 2**63


@given(st.lists(st.tuples(SEEDS, st.lists(st.integers() | st.text(max_size=4), max_size=4)), min_size=2, max_size=2))
def test_other_parts_never_give_the_same_seed(pair: list[tuple[int, list[int | str]]]) -> None:
    (seed, parts), (other_seed, other_parts) = pair
    same = (seed, parts) == (other_seed, other_parts)

    assert (derived_seed(seed, *parts) == derived_seed(other_seed, *other_parts)) == same


@pytest.mark.parametrize(
    ("parts", "others"), [((1,), ("1",)), (("a", "b"), ("ab",)), (("a,b",), ("a", "b")), ((), ("",))]
)
def test_parts_that_read_alike_stay_apart(parts: tuple[int | str, ...], others: tuple[int | str, ...]) -> None:
    assert derived_seed(0, *parts) != derived_seed(0, *others)


def test_splitmix64_gives_the_published_numbers() -> None:
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert sharding._splitmix64(5, 1234567).tolist() == published


@given(count=st.integers(1, 50), seed=SEEDS)
def test_the_iid_order_is_what_any_language_with_integers_derives(count: int, seed: int) -> None:
    """SplitMix64 as its authors wrote it, in whole numbers; the samples sorted by it."""

    def mixed(number: int) -> int:
        number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
        return number ^ number >> 31

    state = derived_seed(seed, "order")
    keys = [mixed((state + (sample + 1) * 0x9E3779B97F4A7C15) % 2**64) for sample in range(count)]
    assert split("iid", count, 1, seed=seed).order.tolist() == sorted(range(count), key=lambda sample: keys[sample])


@given(st.lists(st.floats(1e-300, 1e300), min_size=1))
def test_our_logarithm_is_the_logarithm(values: list[float]) -> None:
    assert sharding._log(np.array(values)) == pytest.approx(np.log(values), rel=1e-14, abs=1e-15)


@given(st.lists(st.floats(-1e12, 700), min_size=1))
def test_our_exponential_is_the_exponential(values: list[float]) -> None:
    assert sharding._exp(np.array(values)) == pytest.approx(np.exp(values), rel=2e-13, abs=1e-300)


def test_uniform_numbers_are_uniform_and_never_at_the_ends() -> None:
    numbers = sharding._uniforms(100_000, 5)

    assert 0 < numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx(np.full(10, 10_000), abs=500)
