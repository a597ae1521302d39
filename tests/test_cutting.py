"""Which shards a round has, and for whom: pure calls."""

from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.facts import Opened, Shard
from common.messages import ModelFacts
from server import cutting
from server.cutting import Place, roles
from tests.rounds_kit import DIGEST, spec

AUTO = {"data": {"shards": "auto"}}
SPEEDS = {"new": 1.0, "old": 0.2, "older": 0.16}


def places(rates: dict[str, float | None], *, gone: str = "", trained: int = 1) -> list[Place]:
    return [Place(w, w, here=w not in gone.split(), rate=rate, trained=trained) for w, rate in rates.items()]


def opened(
    some: list[Place], before: Opened | None = None, *, round_index: int = 2, total: int = 13_600, **keys: Any
) -> Opened:
    shards = keys.get("data", {}).get("shards", "auto")
    cuts = (0, total) if shards == "auto" else tuple(range(0, total + 1, total // shards))
    facts = ModelFacts(parameters=1, train_samples=total, test_samples=1, bounds=keys.pop("bounds", cuts))
    job = spec(**{**AUTO, **keys})
    return cutting.open_round(job, facts, DIGEST, round_index, some, before.shards if before else ())


def sizes(made: Opened) -> dict[str | None, int]:
    return {shard.meant: shard.stop - shard.start for shard in made.shards}


def names(made: Opened) -> list[str]:
    return [one.worker_name for one in made.evaluators]


# ---------------------------------------------------------------- sizes


def test_where_no_speed_is_known_all_shards_are_alike() -> None:
    assert sizes(opened(places({"a": None, "b": None}), total=11)) == {"a": 6, "b": 5}


def test_shards_follow_the_speeds() -> None:
    assert sizes(opened(places(SPEEDS))) == {"new": 10_000, "old": 2_000, "older": 1_600}


@given(st.lists(st.floats(1e-3, 1e6) | st.none(), min_size=1, max_size=8), st.integers(1, 5_000), st.data())
def test_every_sample_is_in_one_shard_and_every_shard_is_for_another_worker(
    rates: list[float | None], total: int, data: st.DataObject
) -> None:
    here = data.draw(st.lists(st.booleans(), min_size=len(rates), max_size=len(rates)))
    some = [Place(f"w{n}", f"w{n}", there, rate) for n, (rate, there) in enumerate(zip(rates, here, strict=True))]
    before = None
    for round_index in range(1, 4):
        made = opened(some, before, round_index=round_index, total=total)
        cuts = sorted((shard.start, shard.stop) for shard in made.shards)
        assert [start for start, _ in cuts] == [0, *(stop for _, stop in cuts[:-1])]
        assert cuts[-1][1] == total
        assert len({shard.meant for shard in made.shards}) == len({s.shard for s in made.shards}) == len(made.shards)
        assert not {shard.meant for shard in made.shards} & {one.worker for one in made.evaluators}
        before = made


def test_a_cut_stays_while_nobodys_share_moves_by_more_than_15_percent() -> None:
    first = opened(places({"a": 1.0, "b": 0.5}))
    assert opened(places({"a": 1.1, "b": 0.5}), first, round_index=3).shards == first.shards
    moved = opened(places({"a": 1.6, "b": 0.5}), first, round_index=3)
    assert sizes(moved) == {"a": 10_362, "b": 3_238}


def test_speeds_that_are_nearly_alike_make_equal_shards() -> None:
    assert sizes(opened(places({"a": 1.0, "b": 0.9}))) == {"a": 6_800, "b": 6_800}


def test_a_worker_of_unknown_speed_is_taken_for_the_slowest_that_trains() -> None:
    assert sizes(opened(places({"fast": 3.0, "slow": 1.0, "new": None}), total=50)) == {
        "fast": 30,
        "slow": 10,
        "new": 10,
    }


def test_a_vanished_worker_keeps_its_place_while_all_shards_are_alike_and_loses_a_large_one() -> None:
    alike = opened(places({"a": None, "b": None}))
    assert sizes(opened(places({"a": 1.0, "b": 1.0}, gone="b"), alike)) == sizes(alike)
    speeds: dict[str, float | None] = {"a": 1.0, "b": 0.2, "c": 0.1}
    unlike = opened(places(speeds))
    assert sizes(opened(places(speeds, gone="a"), unlike)) == {"b": 9_067, "c": 4_533}
    assert sizes(opened(places(speeds, gone="a b c"), unlike)) == sizes(unlike)


def test_with_nobody_there_whoever_comes_first_has_all_of_it() -> None:
    assert opened([]).shards == (Shard(shard=0, start=0, stop=13_600),)


def test_a_worker_keeps_the_number_of_its_shard_and_a_new_one_gets_a_free_one() -> None:
    first = opened(places(SPEEDS))
    assert {s.meant: s.shard for s in first.shards} == {"new": 0, "old": 1, "older": 2}
    second = opened(places({"old": 0.2, "older": 0.16, "third": 0.3}), first)
    assert {s.meant: s.shard for s in second.shards} == {"third": 0, "old": 1, "older": 2}


def test_where_all_take_as_many_steps_the_shards_are_alike() -> None:
    made = opened(places({"a": 1.0, "b": 0.2, "c": 0.01}), train={"local_steps": 5})
    assert sizes(made) == {"a": 6_800, "b": 6_800}
    assert names(made) == ["c"]


def test_a_number_of_shards_and_private_data_are_for_no_speed() -> None:
    virtual = opened(places(SPEEDS), data={"shards": 4})
    assert [(s.shard, s.meant, s.stop - s.start) for s in virtual.shards] == [(k, None, 3_400) for k in range(4)]
    private = opened(places(SPEEDS), data={"partition": "local"})
    assert [(s.worker, s.meant) for s in private.shards] == [("new", None), ("old", None), ("older", None)]


def test_a_part_of_the_shards_is_drawn_from_the_whole_cut() -> None:
    made = opened(places(SPEEDS), data={"shards": "auto", "fraction": 0.67})
    assert len(made.shards) == 2
    assert all(shard.stop - shard.start == SPEEDS[str(shard.meant)] * 10_000 for shard in made.shards)


def test_of_a_cut_by_label_the_largest_shard_is_for_the_fastest_worker() -> None:
    skewed: dict[str, Any] = {"data": {"shards": "auto", "partition": "dirichlet"}, "bounds": (0, 100, 10_000, 13_600)}
    made = opened(places({"a": 0.2, "b": 1.0, "c": None}), **skewed)
    assert [shard.meant for shard in made.shards] == [None, "b", "a"]
    for train in ({"keep_optimizer": True}, {"personal": "batchnorm"}):
        kept = opened(places({"a": 0.2, "b": 1.0}), **skewed, train=train)
        assert {shard.meant for shard in kept.shards} == {None}


# ---------------------------------------------------------------- evaluators


def test_a_worker_with_a_share_under_3_percent_only_evaluates_and_it_is_said() -> None:
    made = opened(places({**SPEEDS, "cpu": 0.015}))
    assert sizes(made) == {"new": 10_000, "old": 2_000, "older": 1_600}
    assert [one.why for one in made.evaluators] == ["evaluates only: its share would be 1.1%, under 3%"]
    assert made.reason.endswith("; cpu evaluates only: its share would be 1.1%, under 3%")


def test_an_evaluator_trains_again_when_the_others_are_gone_or_it_has_become_faster() -> None:
    cut = partial(opened, total=60_000)
    before = cut(places({**SPEEDS, "cpu": 0.015}))
    assert names(before) == ["cpu"]
    assert names(cut(places({**SPEEDS, "cpu": 0.015}, gone="new"), before)) == []
    assert names(cut(places({**SPEEDS, "cpu": 0.045}), before)) == ["cpu"]  # 3.2 %: not far enough above the limit
    with_it = cut(places({**SPEEDS, "cpu": 0.05}), before)
    assert names(with_it) == []
    assert names(cut(places({**SPEEDS, "cpu": 0.045}), with_it)) == []
    assert sizes(cut(places({"cpu": 0.015}), before)) == {"cpu": 60_000}


def test_an_evaluator_trains_once_in_a_while_to_be_measured() -> None:
    some = places({**SPEEDS, "cpu": 0.015}, trained=3)
    assert names(opened(some, round_index=3 + cutting.TRY_AGAIN)) == ["cpu"]
    assert sizes(opened(some, round_index=4 + cutting.TRY_AGAIN))["cpu"] == 148


def test_a_shard_of_few_batches_makes_an_evaluator_only_where_others_have_ten_times_as_many() -> None:
    few = opened(places({"a": 1.0, "b": 0.05}), total=3_200)
    assert [one.why for one in few.evaluators] == ["evaluates only: its shard would have 5 batches, under 20"]
    assert names(opened(places({"a": 1.0, "b": 0.05}), total=320_000)) == []
    tiny = opened(places({"a": 1.0, "b": 1.0, "c": 0.2}), total=90)
    assert names(tiny) == []
    assert sizes(tiny) == {"a": 41, "b": 41, "c": 8}
    assert names(opened(places({"a": 1.0, "b": 0.05}), total=3_200, train={"local_seconds": 1.0})) == []


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-3, 1e6), min_size=1), st.integers(1, 100_000))
def test_the_fastest_worker_always_trains(rates: dict[str, float], total: int) -> None:
    fastest = max(rates, key=lambda worker: rates[worker])
    assert fastest in roles(spec(**AUTO), total, 1, places(dict(rates)), {}).weights


@pytest.mark.parametrize("epochs", [1, 4])
def test_more_passes_make_more_batches(epochs: int) -> None:
    made = opened(places({"a": 1.0, "b": 0.05}), total=4_000, train={"local_epochs": epochs})
    assert (names(made) == ["b"]) == (epochs == 1)
