"""What a round will cost: by hand, and properties that hold for any fleet."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.codecs import CODECS
from common.forecast import Box, Work, advice, blame, bytes_of, forecast, in_seconds

MB = 1_000_000
WORK = Work(samples=1000, model_bytes=100 * MB, batch_size=10)
NEW, OLD = (
    Box("new", rate=100.0, down=100.0 * MB, up=50.0 * MB, latency_s=0.5),
    Box("old", rate=25.0, down=10.0 * MB, up=5.0 * MB, latency_s=0.0),
)


def test_a_round_is_download_training_upload_and_calls() -> None:
    (row,) = forecast([NEW], WORK).rows
    assert (row.role, row.samples, row.share) == ("trains", 1000, 1.0)
    assert row.down_s == pytest.approx(1 + 1)  # 100 MB at 100 MB/s, and two calls of half a second
    assert row.train_s == pytest.approx(10)
    assert row.up_s == pytest.approx(2 + 1)
    assert (row.bytes_down, row.bytes_up, row.wait_s) == (100 * MB, 100 * MB, 0)


def test_shards_follow_speed_so_that_training_ends_together() -> None:
    told = forecast([NEW, OLD], WORK)
    assert [row.samples for row in told.rows] == [800, 200]
    assert told.rows[0].train_s == told.rows[1].train_s == 8
    assert told.round_s == pytest.approx(10 + 8 + 20)  # the old one's link
    assert told.rows[0].wait_s == pytest.approx(told.round_s - told.rows[0].busy_s)


def test_equal_shards_are_pulled_by_whoever_is_free() -> None:
    told = forecast([replace(NEW, latency_s=0, down=None, up=None), replace(OLD, down=None, up=None)],
                    replace(WORK, shards=10))  # fmt: skip
    assert [row.samples for row in told.rows] == [800, 200]
    assert told.round_s == pytest.approx(8)


def test_a_fraction_trains_so_many_shards() -> None:
    told = forecast([NEW], replace(WORK, shards=10, fraction=0.3))
    assert told.rows[0].samples == 300
    assert told.rows[0].bytes_up == 3 * 100 * MB


@pytest.mark.parametrize(("length", "amount", "seconds"), [("epochs", 2, 20), ("steps", 50, 5), ("seconds", 7, 7)])
def test_the_length_of_training_is_the_jobs(length: str, amount: float, seconds: float) -> None:
    told = forecast([NEW], replace(WORK, length=length, amount=amount))  # type: ignore[arg-type]
    assert told.rows[0].train_s == pytest.approx(seconds)


def test_a_box_that_is_too_slow_evaluates() -> None:
    slow = Box("cpu", rate=1.0)
    told = forecast([NEW, slow], replace(WORK, least_share=0.03))
    assert [(row.role, row.samples) for row in told.rows] == [("trains", 1000), ("evaluates", 0)]


def test_what_was_not_measured_is_said_and_not_guessed() -> None:
    told = forecast([NEW, Box("stranger"), Box("dark", rate=10.0)], WORK)
    assert [row.role for row in told.rows] == ["trains", "not measured", "trains"]
    assert told.rows[2].down_s == 0
    assert told.unknown == (
        "the speed of stranger is not measured for this task: left out of the forecast",
        "the link of dark is not measured: its transfers are taken to cost nothing",
    )


def test_nobody_measured_is_no_forecast() -> None:
    for shards in (None, 4):
        work = replace(WORK, shards=shards)
        told = forecast([Box("stranger")], work)
        assert (told.round_s, told.slowest) == (0, None)
        assert advice([Box("stranger")], work) == ()
        assert blame(told, [Box("stranger")]) == ""


def test_who_is_waited_for_is_named_with_the_reason() -> None:
    relayed = replace(OLD, path="relayed by fra")
    told = forecast([NEW, relayed], WORK)
    said = blame(told, [NEW, relayed])
    assert said.startswith(
        "old is waited for during 66% of a round: its upload (relayed by fra) takes 20 s of its 38 s"
    )


def test_slow_training_is_not_blamed_on_the_way() -> None:
    slow = Box("old", rate=1.0, path="relayed by fra")
    told = forecast([NEW, slow], replace(WORK, shards=2))
    assert "its training takes" in blame(told, [NEW, slow])
    assert "relayed" not in blame(told, [NEW, slow])


def test_nobody_is_blamed_where_all_end_together() -> None:
    twin = replace(NEW, name="twin")
    assert blame(forecast([NEW, twin], WORK), [NEW, twin]) == ""


def test_nobody_is_blamed_for_a_round_that_takes_no_time() -> None:
    boxes = [Box("a", rate=1e300), Box("b", rate=1e300)]
    told = forecast(boxes, replace(WORK, length="seconds", amount=0.0))
    assert blame(told, boxes) == ""


def test_a_slow_link_is_answered_by_fewer_bytes_longer_rounds_or_one_box_less() -> None:
    found = advice([NEW, OLD], WORK)
    said = " | ".join(each.sentence for each in found)
    assert 'update = "int4": a round takes' in said
    assert "local_epochs = 4: a round takes" in said
    assert "trains 4 times as much" in said
    assert "without old: a round takes" in said
    assert [each.saves for each in found] == sorted((each.saves for each in found), reverse=True)


def test_equal_shards_on_unlike_machines_are_answered_by_shards_that_follow_speed() -> None:
    boxes = [replace(NEW, down=None, up=None), Box("old", rate=20.0), Box("older", rate=16.0)]
    said = [each.sentence for each in advice(boxes, replace(WORK, shards=3))]
    assert any(sentence.startswith('shards = "auto": ') for sentence in said)


@pytest.mark.parametrize("update", ["fp32", *CODECS])
def test_bytes_fall_with_the_codec_and_downloads_may_stay_whole(update: str) -> None:
    down, up = bytes_of(replace(WORK, update=update))
    assert up <= 100 * MB
    assert down == up
    assert bytes_of(replace(WORK, update=update, whole_download=True)) == (100 * MB, up)


def test_seconds_have_two_digits_that_count() -> None:
    assert (in_seconds(0.1234), in_seconds(12.3), in_seconds(1234.5)) == ("0.12 s", "12 s", "1,234 s")


speeds = st.one_of(st.none(), st.floats(0.01, 1e5))
boxes_of_any_kind = st.lists(
    st.builds(Box, st.just(""), speeds, speeds, speeds, st.floats(0, 1)), min_size=1, max_size=6
).map(lambda boxes: [replace(box, name=f"b{at}") for at, box in enumerate(boxes)])
works = st.builds(
    Work,
    samples=st.integers(1, 10_000),
    model_bytes=st.integers(0, 10**9),
    batch_size=st.integers(1, 512),
    length=st.sampled_from(["epochs", "steps", "seconds"]),
    amount=st.integers(1, 50),
    shards=st.one_of(st.none(), st.integers(1, 50)),
    fraction=st.floats(0.01, 1),
    update=st.sampled_from(["fp32", *CODECS]),
    least_share=st.sampled_from([0.0, 0.03]),
)


@given(boxes_of_any_kind, works)
def test_shares_add_up_nobody_waits_less_than_nothing_and_one_waits_not_at_all(boxes: list[Box], work: Work) -> None:
    told = forecast(boxes, work)
    assert [row.name for row in told.rows] == [box.name for box in boxes]
    if told.trainers:
        assert sum(row.share for row in told.rows) == pytest.approx(1)
        assert min(row.wait_s for row in told.trainers) == pytest.approx(0, abs=1e-9)
        assert told.round_s == max(row.busy_s for row in told.rows)
    assert all(row.wait_s >= 0 for row in told.rows)


@given(boxes_of_any_kind, works)
def test_advice_is_always_worth_it_and_the_best_comes_first(boxes: list[Box], work: Work) -> None:
    found = advice(boxes, work)
    assert all(each.saves >= 0.1 - 1e-9 for each in found)
    assert list(found) == sorted(found, key=lambda each: -each.saves)


@given(boxes_of_any_kind, works)
def test_a_faster_link_never_makes_a_round_by_speed_longer(boxes: list[Box], work: Work) -> None:
    work = replace(work, shards=None)
    faster = [replace(box, up=box.up * 2 if box.up else None) for box in boxes]
    assert forecast(faster, work).round_s <= forecast(boxes, work).round_s


def test_masked_updates_have_twice_the_bytes_of_float32_and_no_smaller_ones_are_advised() -> None:
    masked = replace(WORK, masked=True)
    assert bytes_of(masked) == (100 * MB, 200 * MB)
    slow = [Box("a", rate=100.0, down=MB, up=MB), Box("b", rate=100.0, down=MB, up=MB)]
    assert any("update =" in one.sentence for one in advice(slow, WORK))
    assert not any("update =" in one.sentence for one in advice(slow, masked))
