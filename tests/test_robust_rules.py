"""The arithmetic of the robust rules: vectors worked out by hand, numpy and scipy, and what always holds."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from server import robust_rules as rules
from server.robust_rules import Float64s, Ordered, Rule, Weighted, decide

SIX = 1e6  # where numbers of a property end


def column(*values: float) -> Float64s:
    """One element of every update."""
    return np.array(values, np.float64)[:, None]


def squares(changes: Float64s, point: Float64s | None = None) -> Float64s:
    """Squared distances, whole and in memory: to each other, or to a point."""
    other = changes[:, None] if point is None else point
    return np.asarray(np.square(changes - other).sum(axis=-1))


class Known:
    """A Measure of changes that are in memory, with what is remembered."""

    def __init__(self, changes: Float64s, centre: Float64s | None = None) -> None:
        self.changes, self.centre = changes, np.zeros(changes.shape[1]) if centre is None else centre

    def pairs(self) -> Float64s:
        return squares(self.changes)

    def from_point(self, weights: Sequence[float], of_centre: float) -> Float64s:
        return squares(self.changes, np.array(weights) @ self.changes + of_centre * self.centre)


def joined(name: str, changes: Float64s, faulty: int = 1, centre: Float64s | None = None, **keys: float) -> Float64s:
    """What a rule makes of changes of shape (updates, n)."""
    rule = Rule(name, faulty, **keys)  # type: ignore[arg-type]
    plan = decide(rule, [10] * len(changes), Known(changes, centre))
    if isinstance(plan, Ordered):
        return plan.join(changes[list(plan.members)])
    kept = 0.0 if centre is None else plan.of_centre * centre
    return np.array(plan.weights) @ changes + kept


# ---------------------------------------------------------------- by hand


def test_the_trimmed_mean_leaves_out_the_ends() -> None:
    assert rules.trimmed_mean(column(100, 1, 3, 2), 1) == 2.5


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two() -> None:
    assert joined("median", column(4, 100, 1, 2)) == 3
    assert joined("median", column(4, -100, 1)) == 1


def test_the_nearest_to_the_median_are_kept() -> None:
    assert rules.nearest_mean(column(10, 0, 3, 1, 2), 3) == 2


def test_of_equally_near_values_the_lowest_shard_counts() -> None:
    assert rules.nearest_mean(column(3, 1), 1) == 3
    assert rules.nearest_mean(column(1, 3), 1) == 1


def test_krum_takes_the_lowest_score_and_of_equals_the_lowest_shard() -> None:
    distances = squares(column(0, 1, 2, 10, 3))  # scores of the two nearest: 5, 2, 2, 113, 5
    assert rules.krum(distances, 1, 1) == (1,)
    assert rules.krum(distances, 1, 3) == (0, 1, 2)
    assert joined("krum", column(0, 1, 2, 10, 3)) == 1
    assert joined("multikrum", column(0, 1, 2, 10, 3)) == 1.5  # n − f − 2 = 2 of them


def test_a_twin_is_a_neighbour_although_its_distance_is_nothing() -> None:
    distances = squares(column(0, 0, 5, 5.5, 6))
    # Scores: 0 + 25 twice, 1.25, 0.5, 1.25. Were "the smallest distance" left out instead, the twins' would be 0.
    assert rules.krum(distances, 1, 1) == (3,)


def test_bulyan_picks_again_and_again_among_those_left() -> None:
    changes = column(0, 1, 2, 3, 4, 5, 100)
    assert rules.bulyan(squares(changes), 1) == (0, 1, 2, 3, 4)  # in the order 2, 3, 1, 4, 0
    assert joined("bulyan", changes) == 2  # the mean of 1, 2, 3, which are nearest to the median of those five


def test_the_geometric_median_of_points_on_a_line_is_the_middle_one() -> None:
    assert joined("rfa", column(0, 1, 10)) == pytest.approx(1, abs=1e-4)


def test_the_geometric_median_of_a_square_is_its_centre() -> None:
    square = np.array([[0, 0], [0, 2], [2, 0], [2, 2]], np.float64)
    assert joined("rfa", square).tolist() == pytest.approx([1, 1])


def test_the_geometric_median_of_a_kite_is_where_its_diagonals_cross() -> None:
    kite = np.array([[-3, 0], [1, 0], [0, 2], [0, -7]], np.float64)  # known of every convex quadrangle
    assert joined("rfa", kite).tolist() == pytest.approx([0, 0], abs=1e-3)


def test_a_geometric_median_does_not_follow_one_that_is_a_million_times_as_far() -> None:
    changes = np.array([[1, 0], [0, 1], [-1, 0], [0, -1], [1e6, 0]], np.float64)
    assert np.abs(joined("rfa", changes)).max() < 1


def test_points_that_are_most_of_them_one_are_their_geometric_median() -> None:
    assert joined("rfa", column(7, 7, 7, 1e6)) == pytest.approx(7, abs=1e-3)


def test_a_clipped_mean_cuts_what_is_longer() -> None:
    assert rules.clip([1, 2, 4], [10, 10, 10], 2.0) == pytest.approx((1 / 3, 1 / 3, 1 / 6))
    assert rules.clip([1, 2, 4], [10, 10, 10], None) == pytest.approx((1 / 3, 1 / 3, 1 / 6))
    assert rules.clip([0, 0, 4], [10, 10, 10], None) == pytest.approx((1 / 3, 1 / 3, 0))


def test_no_claim_of_samples_weighs_more_than_the_median_one() -> None:
    assert rules.clip([1, 1, 1], [1, 2, 10**15], None) == pytest.approx((0.2, 0.4, 0.4))


@pytest.mark.parametrize("bound", [None, 0.7])
def test_centred_clipping_moves_its_centre_as_the_paper_says(bound: float | None) -> None:
    chance = np.random.default_rng(0)
    changes, centre = chance.normal(size=(5, 3)), chance.normal(size=3)
    v = centre.copy()
    for _ in range(rules.CENTRINGS):
        away = np.linalg.norm(changes - v, axis=1)
        most = np.median(away) if bound is None else bound
        v = v + np.mean((changes - v) * np.minimum(1, most / away)[:, None], axis=0)
    plan = rules.centred(5, bound, Known(changes, centre))
    found = np.array(plan.weights) @ changes + plan.of_centre * centre
    assert found.tolist() == pytest.approx(v.tolist())


def test_the_middle_of_integers_is_one_that_somebody_has() -> None:
    rows = np.array([[2**60 + 1], [2**60], [0], [2**62]], np.int64)
    assert rules.middle(rows).tolist() == [2**60]
    assert rules.middle(rows).dtype == np.int64


def test_what_weighs_nothing_may_hold_anything() -> None:
    blocks = [np.array([np.inf]), np.array([3.0])]
    assert rules.combination(blocks, [0.0, 0.5], np.empty(1), np.empty(1)) == 1.5


def test_the_updates_with_a_weight_are_members() -> None:
    assert Weighted((0.5, 0.0, 0.5)).members == (0, 2)


# ---------------------------------------------------------------- distances


def test_sums_of_blocks_are_added_as_if_exactly() -> None:
    parts = [np.array([1e16]), np.array([1.0]), np.array([1.0]), np.array([1e-3])]
    assert rules.total(iter(parts), (1,)) == math.fsum([1e16, 1, 1, 1e-3])
    assert rules.total(iter([*reversed(parts)]), (1,)) == math.fsum([1e16, 1, 1, 1e-3])
    assert rules.total(iter([]), (2,)).tolist() == [0, 0]


def test_a_distance_that_overflows_is_very_far_and_no_nan() -> None:
    rows = np.array([[1e200], [0.0], [-1e200]])
    found = rules.pair_sums(rows)
    assert found.tolist() == [[0, 1e290, 1e290], [1e290, 0, 1e290], [1e290, 1e290, 0]]
    assert rules.total([found] * 3, (3, 3)).max() == rules.FARTHEST


def test_krum_sees_tiny_changes_on_large_weights_where_the_usual_formula_sees_noise() -> None:
    chance = np.random.default_rng(3)
    weights = chance.normal(scale=100, size=4096).astype(np.float32)
    steps = np.full((7, 4096), 1e-4) + 1e-6 * chance.normal(size=(7, 4096))
    steps[5] = -3e-4  # the bad one
    updates = (weights.astype(np.float64) + steps).astype(np.float32).astype(np.float64)
    usual = updates.astype(np.float32)
    squared = np.square(usual).sum(axis=1)
    naive = squared[:, None] + squared - 2 * usual @ usual.T
    changes = updates - weights
    assert np.abs(naive - squares(changes)).max() > 100 * squares(changes).max()
    assert rules.krum(rules.pair_sums(changes), 1, 6) == (0, 1, 2, 3, 4, 6)


# ---------------------------------------------------------------- what always holds

NUMBERS = st.floats(-SIX, SIX, allow_nan=False)
CHANGES = st.integers(7, 9).flatmap(
    lambda count: st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=count, max_size=count)
).map(lambda rows: np.array(rows, np.float64))  # fmt: skip
NAMES = ("clip", "trimmed", "median", "krum", "multikrum", "bulyan", "rfa", "centered_clip")


@given(CHANGES, st.integers(0, 3))
def test_trimmed_means_are_those_of_scipy(changes: Float64s, trim: int) -> None:
    expected = stats.trim_mean(changes, trim / len(changes) + 1e-9, axis=0)
    assert rules.trimmed_mean(changes, trim).tolist() == pytest.approx(expected.tolist(), abs=1e-6)


@given(CHANGES)
def test_medians_are_those_of_numpy(changes: Float64s) -> None:
    assert joined("median", changes, 3).tolist() == pytest.approx(np.median(changes, axis=0).tolist())


@given(CHANGES)
def test_no_point_nearby_has_a_lower_sum_of_distances_than_the_geometric_median(changes: Float64s) -> None:
    def sum_at(point: Float64s) -> float:
        return float(np.sqrt(squares(changes, point)).sum())

    found = joined("rfa", changes)
    scale = float(np.sqrt(squares(changes)).max())
    best = min(sum_at(changes.mean(axis=0)), *(sum_at(change) for change in changes))
    assert sum_at(found) <= best * (1 + 1e-3) + 1e-3 * scale


@given(st.sampled_from(NAMES), CHANGES)
def test_what_all_agree_on_is_the_result(name: str, changes: Float64s) -> None:
    alike = np.repeat(changes[:1], 7, axis=0)
    assert joined(name, alike).tolist() == pytest.approx(alike[0].tolist(), rel=1e-9, abs=1e-9)


@given(st.sampled_from(["trimmed", "median", "multikrum", "bulyan"]), CHANGES, st.integers(0, 6), NUMBERS)
def test_one_bad_update_never_takes_the_result_out_of_the_range_of_the_others(
    name: str, changes: Float64s, at: int, far: float
) -> None:
    changes[at] = 1e3 * far
    others = np.delete(changes, at, axis=0)
    found = joined(name, changes)
    if name == "multikrum" and abs(far) < SIX / 10:
        return  # it is near enough to be chosen
    if name == "multikrum":
        found, others = found[:0], others[:, :0]
    slack = 1e-6 * (1 + np.abs(others))
    assert (found >= (others - slack).min(axis=0)).all()
    assert (found <= (others + slack).max(axis=0)).all()


@given(st.sampled_from(["clip", "centered_clip"]), CHANGES, st.integers(0, 6))
def test_one_bad_update_never_moves_the_model_further_than_the_norm_it_is_cut_to(
    name: str, changes: Float64s, at: int
) -> None:
    changes[at] *= 1e6
    passes = 1 if name == "clip" else rules.CENTRINGS
    assert np.linalg.norm(joined(name, changes, clip_norm=2.0)) <= 2.0 * passes * (1 + 1e-9)


@given(st.sampled_from(["trimmed", "median"]), CHANGES, st.randoms(use_true_random=False))
def test_the_order_of_the_shards_never_changes_what_order_rules_give(
    name: str, changes: Float64s, chance: object
) -> None:
    order = list(range(len(changes)))
    chance.shuffle(order)  # type: ignore[attr-defined]
    assert joined(name, changes).tobytes() == joined(name, changes[order]).tobytes()


NEEDS = {"median": 5, "trimmed": 5, "krum": 7, "multikrum": 7, "bulyan": 11, "rfa": 5, "clip": 5, "centered_clip": 5}


@pytest.mark.parametrize(("name", "needs"), NEEDS.items())
def test_too_few_updates_are_never_joined(name: str, needs: int) -> None:
    changes = np.zeros((needs, 1))
    joined(name, changes, 2)
    with pytest.raises(ValueError, match=f"{name} against 2 bad updates needs {needs}, and there are {needs - 1}"):
        joined(name, changes[1:], 2)


def test_a_norm_that_is_said_needs_no_majority() -> None:
    assert joined("clip", column(5.0), clip_norm=1.0) == 1.0


def test_no_rule_is_no_plan() -> None:
    with pytest.raises(ValueError, match="none is no robust rule"):
        decide(Rule("none"), [1], Known(column(1)))


def test_only_centred_clipping_remembers_a_centre() -> None:
    assert [name for name in NAMES if Rule(name).states] == ["centered_clip"]  # type: ignore[arg-type]


def test_spans_cover_every_element_once() -> None:
    assert list(rules.spans(10, 4)) == [(0, 4), (4, 4), (8, 2)]
    assert list(rules.spans(0, 4)) == []
