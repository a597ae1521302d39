"""Manners: never at work outside its hours or beside others, always with a reason, and without flapping."""

import math
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import LydianError
from worker.manners import (
    COOLER_C,
    DAYS,
    HOLD_LEAST_S,
    HOLD_LONGEST_S,
    Amount,
    Hours,
    Manner,
    Measured,
    Rules,
    amount,
    hours,
    judge,
)

MONDAY = datetime(2026, 3, 2)  # noqa: DTZ001 - a wall clock has no zone
NOON = MONDAY + timedelta(hours=12)
GB = 10**9
GAMER = "game (pid 7)"


def at(day: str, clock: str) -> datetime:
    hour, minute = clock.split(":")
    return MONDAY + timedelta(days=DAYS.index(day), hours=int(hour), minutes=int(minute))


class Worker:
    """Judged again and again, as a lookout does."""

    def __init__(self, *, working: bool = True, **rules: Any) -> None:
        self.rules, self.working, self.now, self.manner = Rules(**rules), working, 1000.0, Manner()

    def looks(self, after_s: float = 2.0, *, order: Any = "work", wall: datetime = NOON, **measured: Any) -> Manner:
        self.now += after_s
        seen = Measured(**measured)
        self.manner = judge(self.rules, order, self.manner, seen, wall, self.now, working=self.working)
        self.working = self.working and self.manner.act != "rest"
        return self.manner


# ---------------------------------------------------------------- hours


@pytest.mark.parametrize(
    ("text", "day", "clock", "within"),
    [
        ("09:00-17:00", "mon", "08:59", False),
        ("09:00-17:00", "mon", "09:00", True),
        ("09:00-17:00", "mon", "16:59", True),
        ("9:00-17:00", "sun", "17:00", False),
        ("22:00-07:00", "tue", "23:00", True),
        ("22:00-07:00", "wed", "06:59", True),
        ("22:00-07:00", "wed", "07:00", False),
        ("mon-fri@22:00-07:00", "fri", "22:00", True),
        ("mon-fri@22:00-07:00", "sat", "06:59", True),  # of the Friday on which it began
        ("mon-fri@22:00-07:00", "sat", "22:00", False),
        ("mon-fri@22:00-07:00", "mon", "06:00", False),  # of the Sunday
        ("sat,sun@00:00-24:00", "sun", "23:59", True),
        ("sat,sun@00:00-24:00", "mon", "00:00", False),
        ("fri-mon@08:00-09:00", "sun", "08:30", True),
        ("fri-mon@08:00-09:00", "tue", "08:30", False),
        ("Sat@20:00-00:00", "sat", "23:59", True),
        ("sat@20:00-00:00", "sun", "00:00", False),
    ],
)
def test_hours_hold_from_their_first_minute_to_before_their_last(text: str, day: str, clock: str, within: bool) -> None:
    wall = at(day, clock)
    assert hours(text).hold(wall.weekday(), wall.hour * 60 + wall.minute) == within


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("22-07", "no part of a day"),
        ("22:60-07:00", "no part of a day"),
        ("25:00-07:00", "later than a day"),
        ("22:00-24:01", "later than a day"),
        ("24:00-07:00", "later than a day"),
        ("07:00-07:00", "ends when it begins"),
        ("weekend@07:00-08:00", "no days in 'weekend'"),
        ("mon-@07:00-08:00", "no days in 'mon-'"),
    ],
)
def test_hours_that_are_none_are_refused_with_an_example(text: str, words: str) -> None:
    with pytest.raises(LydianError, match=words) as refused:
        hours(text)
    assert (refused.value.code, "22:00-07:00" in refused.value.advice) == ("bad_hours", True)


PARTS = st.builds(
    Hours,
    st.integers(0, 1439),
    st.integers(0, 1440),
    st.frozensets(st.integers(0, 6), min_size=1),
).filter(lambda part: part.start != part.stop)


@pytest.mark.parametrize(
    "text", ["22:00-07:00", "mon-fri@22:00-07:00", "sat,sun@00:00-24:00", "mon,wed-fri,sun@08:00-09:00"]
)
def test_hours_are_told_as_people_write_them(text: str) -> None:
    assert str(hours(text)) == text


@given(PARTS)
def test_hours_read_what_they_write(part: Hours) -> None:
    assert hours(str(part)) == part


@given(PARTS)
def test_hours_are_as_long_as_they_say_on_each_of_their_days(part: Hours) -> None:
    length = part.stop - part.start if part.start < part.stop else 1440 - part.start + part.stop
    held = sum(part.hold(day, minute) for day in range(7) for minute in range(1440))
    assert held <= length * len(part.days)
    if part.start < part.stop or len(part.days) == 1:
        assert held == length * len(part.days)


@given(st.lists(PARTS, min_size=1, max_size=3), st.integers(0, 7 * 1440 - 1), st.booleans(), st.data())
def test_a_worker_is_never_at_work_outside_its_hours(
    parts: list[Hours], minute: int, working: bool, data: st.DataObject
) -> None:
    wall = MONDAY + timedelta(minutes=minute)
    within = any(part.hold(wall.weekday(), wall.hour * 60 + wall.minute) for part in parts)
    before = replace(Manner(), since=data.draw(st.floats(0, 100)), troubled_at=data.draw(st.floats(0, 100)))
    found = judge(Rules(hours=tuple(parts)), "work", before, Measured(), wall, 100.0, working=working)
    assert (found.act == "work") == within
    if not within:
        assert found.why.startswith("outside its hours (")
        back = found.why.rpartition(" at ")[2]
        assert any(part.start == int(back[:2]) * 60 + int(back[3:]) for part in parts)


@given(PARTS, st.integers(0, 7 * 1440 - 1), st.integers(1, 3000))
def test_only_the_weekday_and_the_clock_decide_whatever_the_date_or_daylight_saving(
    part: Hours, minute: int, weeks: int
) -> None:
    one = MONDAY + timedelta(minutes=minute)
    rules = Rules(hours=(part,))
    found = [
        judge(rules, "work", Manner(), Measured(), wall, 5.0, working=False)
        for wall in (one, one + timedelta(weeks=weeks), (one + timedelta(seconds=59)).replace(fold=1))
    ]
    assert [(manner.act, manner.why) for manner in found] == [(found[0].act, found[0].why)] * 3


@pytest.mark.parametrize(
    ("texts", "day", "clock", "back"),
    [
        (("22:00-07:00",), "mon", "12:00", "back at 22:00"),
        (("06:00-07:00",), "mon", "12:00", "back at 06:00"),
        (("mon-fri@22:00-07:00",), "sat", "12:00", "back on mon at 22:00"),
        (("mon@22:00-23:00", "wed@10:00-11:00"), "tue", "12:00", "back at 10:00"),
        (("06:00-07:00", "06:00-08:00"), "mon", "12:00", "back at 06:00"),  # two parts that begin together
        (("mon@22:00-23:00",), "mon", "23:00", "back on mon at 22:00"),
    ],
)
def test_outside_its_hours_a_worker_says_when_it_is_back(
    texts: tuple[str, ...], day: str, clock: str, back: str
) -> None:
    worker = Worker(hours=tuple(map(hours, texts)))
    assert worker.looks(wall=at(day, clock)).why.endswith(back)


def test_a_worker_is_back_in_the_minute_in_which_its_hours_begin() -> None:
    worker = Worker(hours=(hours("22:00-07:00"),))
    assert worker.looks(wall=at("mon", "21:59")).act == "rest"
    assert worker.looks(wall=at("mon", "22:00")).act == "work"


# ---------------------------------------------------------------- amounts


@pytest.mark.parametrize(
    ("text", "size"),
    [("80%", 80), ("0.8", 80), ("100%", 100), ("1", 100), ("6GB", 6 * GB), ("6gib", 6 << 30), ("1.5 G", 15 * GB // 10),
     ("4096", 4096), ("4096B", 4096), ("0.5k", 500), ("2Ti", 2 << 40)],
)  # fmt: skip
def test_an_amount_is_a_share_or_a_size(text: str, size: int) -> None:
    assert amount("--max-memory", text).of(100) == size


@pytest.mark.parametrize("text", ["", "much", "-1", "0", "0%", "101%", "1.5.2", "6 GBs"])
def test_an_amount_that_is_none_is_refused_with_its_flag(text: str) -> None:
    with pytest.raises(LydianError, match=r"^--max-memory .*neither a share nor a size") as refused:
        amount("--max-memory", text)
    assert refused.value.code == "bad_amount"


# ---------------------------------------------------------------- others go first


def test_without_a_rule_a_worker_works_whatever_it_sees() -> None:
    worker = Worker()
    seen = {"others_on_gpu": (GAMER,), "others_load": 1.0, "temperature": 99.0, "power": 999.0, "unknown": "all"}
    assert worker.looks(**seen).act == "work"
    assert not worker.rules.watching
    assert not worker.rules.measuring


def test_another_process_on_the_gpu_sends_the_worker_away_at_the_first_look() -> None:
    worker = Worker(only_idle=True)
    assert worker.looks().act == "work"
    found = worker.looks(device="GPU 0", others_on_gpu=(GAMER,))
    assert (found.act, found.why) == ("rest", "GPU 0 is used by another process")


def test_names_of_processes_are_for_this_machines_log_alone() -> None:
    found = Worker(only_idle=True).looks(device="GPU 0", others_on_gpu=(GAMER, "python (pid 8)"))
    assert (found.why, found.reason.names) == ("GPU 0 is used by others", "game (pid 7), python (pid 8)")


def test_a_worker_is_back_when_the_machine_was_left_alone_for_long_enough() -> None:
    worker = Worker(only_idle=True, quiet_s=60)
    worker.looks(device="GPU 0", others_on_gpu=(GAMER,))
    quiet = worker.looks(59.0)
    assert (quiet.act, quiet.why) == ("rest", "GPU 0 is used by another process: seen less than 60 s ago")
    worker.looks(0.5, others_on_gpu=(GAMER,))
    assert worker.looks(59.0).act == "rest"
    assert worker.looks(1.0).act == "work"


def test_a_reason_keeps_the_words_that_it_began_with() -> None:
    worker = Worker(only_idle=True)
    first = worker.looks(others_on_gpu=(GAMER,))
    assert worker.looks(others_on_gpu=(GAMER, "python (pid 8)")).why == first.why


def test_others_load_counts_as_a_mean_so_that_a_moment_does_not() -> None:
    worker = Worker(only_idle=True, idle_load=0.25)
    worker.looks(others_load=0.0)
    assert worker.looks(others_load=1.0).act == "work"
    found = worker.looks(10.0, others_load=1.0)
    assert (found.act, found.reason.kind) == ("rest", "load")


def test_what_cannot_be_seen_is_taken_for_others() -> None:
    worker = Worker(max_temperature=80)
    assert worker.looks(unknown="the driver does not tell it").why == "the driver does not tell it"


def test_memory_counts_all_that_is_used_and_while_away_what_the_work_would_need_again() -> None:
    worker = Worker(max_memory=Amount(10 * GB, share=False), quiet_s=0)
    assert worker.looks(memory=10 * GB, own_memory=4 * GB).act == "work"
    assert worker.looks(memory=11 * GB, own_memory=4 * GB).reason.kind == "memory"
    assert worker.looks(memory=7 * GB).act == "rest"  # 7 of others and 4 again: the child alone made it less
    assert worker.looks(memory=6 * GB).act == "work"


def test_memory_may_be_a_share() -> None:
    worker = Worker(max_memory=Amount(0.5, share=True))
    assert worker.looks(memory=51, total_memory=100).act == "rest"


# ---------------------------------------------------------------- too hot


def test_a_hot_worker_stands_still_until_it_is_some_degrees_cooler() -> None:
    worker = Worker(max_temperature=80)
    assert worker.looks(temperature=80.0).act == "work"
    hot = worker.looks(device="GPU 0", temperature=81.0)
    assert (hot.act, hot.why) == ("hold", "GPU 0 is at 81 °C, and 80 °C are allowed")
    assert worker.looks(HOLD_LEAST_S, temperature=80.0 - COOLER_C + 0.5).act == "hold"
    assert worker.looks(temperature=80.0 - COOLER_C).act == "work"


def test_a_hold_is_not_short() -> None:
    worker = Worker(max_temperature=80)
    worker.looks(temperature=90.0)
    assert worker.looks(HOLD_LEAST_S - 1, temperature=20.0).act == "hold"
    assert worker.looks(1.0, temperature=20.0).act == "work"


def test_a_hold_that_lasts_becomes_a_rest_since_a_round_waits_for_it() -> None:
    worker = Worker(max_temperature=80, quiet_s=60)
    worker.looks(temperature=90.0)
    assert worker.looks(HOLD_LONGEST_S - 1, temperature=90.0).act == "hold"
    assert worker.looks(1.0, temperature=90.0).act == "rest"
    assert worker.looks(59.0, temperature=90.0).act == "rest"
    assert worker.looks(59.0, temperature=20.0).act == "rest"
    assert worker.looks(1.0, temperature=20.0).act == "work"


def test_a_hot_worker_without_work_takes_none() -> None:
    assert Worker(max_temperature=80, working=False).looks(temperature=90.0).act == "rest"


def test_power_counts_as_a_mean_and_falls_while_the_worker_stands_still() -> None:
    worker = Worker(max_power=200)
    worker.looks(power=190.0)
    assert worker.looks(power=260.0).act == "work"
    while worker.looks(power=260.0).act == "work":
        assert worker.now < 2000
    assert worker.manner.reason.kind == "power"
    assert worker.manner.power > 200
    while worker.looks(power=20.0).act == "hold":
        assert worker.manner.power > 180 or worker.now - worker.manner.since < HOLD_LEAST_S
    assert worker.manner.act == "work"


def test_who_is_away_for_others_need_not_stand_still_for_the_heat() -> None:
    worker = Worker(only_idle=True, max_temperature=80)
    assert worker.looks(temperature=90.0, others_on_gpu=(GAMER,)).reason.kind == "gpu"


# ---------------------------------------------------------------- an operator


def test_a_paused_worker_is_away_at_once_and_back_at_once() -> None:
    worker = Worker(quiet_s=60)
    assert worker.looks(order="pause").why == "an operator ordered it (pause)"
    assert worker.looks(0.0, order="work").act == "work"


def test_a_drained_worker_finishes_what_it_does() -> None:
    worker = Worker()
    assert worker.looks(order="drain").act == "work"
    worker.working = False
    assert worker.looks(order="drain").act == "rest"


# ---------------------------------------------------------------- whatever comes

SEEN = st.builds(
    Measured,
    others_on_gpu=st.sampled_from([(), (GAMER,)]),
    others_load=st.floats(0, 1),
    temperature=st.sampled_from([None, 60.0, 79.0, 81.0, 95.0]),
    power=st.sampled_from([None, 20.0, 190.0, 400.0]),
    memory=st.integers(0, 100),
    own_memory=st.integers(0, 50),
    total_memory=st.just(100),
    unknown=st.sampled_from(["", "", "", "no driver"]),
)
RULES = st.builds(
    Rules,
    hours=st.sampled_from([(), (hours("08:00-20:00"),)]),
    only_idle=st.booleans(),
    max_temperature=st.sampled_from([None, 80.0]),
    max_power=st.sampled_from([None, 200.0]),
    max_memory=st.sampled_from([None, Amount(0.6, share=True)]),
    quiet_s=st.sampled_from([0.0, 30.0, 60.0]),
)
ORDERS = st.sampled_from(["work", "work", "work", "drain", "pause"])
LOOKS = st.lists(
    st.tuples(st.floats(0.1, 90), SEEN, ORDERS, st.booleans(), st.integers(0, 23)), min_size=1, max_size=30
)


def judged(rules: Rules, looks: list[Any]) -> list[tuple[float, Manner, Any]]:
    now, manner, found = 0.0, Manner(), []
    for passed, seen, order, working, hour in looks:
        now += passed
        at_work = working and manner.act != "rest"
        manner = judge(rules, order, manner, seen, MONDAY + timedelta(hours=hour), now, working=at_work)
        found.append((now, manner, (seen, order, at_work)))
    return found


def disturbed(rules: Rules, seen: Measured) -> bool:
    """Whether this one look alone says that the worker must not go on."""
    return bool(
        (rules.only_idle and seen.others_on_gpu)
        or (rules.measuring and seen.unknown)
        or (rules.max_temperature is not None and (seen.temperature or 0) > rules.max_temperature)
        or (rules.max_memory is not None and seen.memory > 60)
    )


@given(RULES, LOOKS)
def test_never_at_work_beside_what_a_rule_or_an_order_forbids(rules: Rules, looks: list[Any]) -> None:
    for _, manner, (seen, order, at_work) in judged(rules, looks):
        assert not (manner.act == "work" and (order == "pause" or disturbed(rules, seen)))
        assert (manner.act == "work") == (manner.why == "")
        assert manner.act != "hold" or at_work


@given(RULES, LOOKS)
def test_a_worker_never_comes_back_before_it_was_left_alone_for_long_enough(rules: Rules, looks: list[Any]) -> None:
    before, disturbed_at = Manner(), -math.inf
    for now, manner, (seen, _, _) in judged(rules, looks):
        disturbed_at = now if disturbed(rules, seen) else disturbed_at
        if before.act == "rest" and manner.act == "work":
            assert now - disturbed_at >= rules.quiet_s
        before = manner


@given(RULES.filter(lambda rules: not rules.hours and rules.quiet_s >= HOLD_LEAST_S), st.lists(SEEN, max_size=60))
def test_whatever_is_measured_a_worker_that_went_stays_away_for_ten_seconds(
    rules: Rules, sights: list[Measured]
) -> None:
    worker, went_at = Worker(), -math.inf
    worker.rules = rules
    for seen in sights:
        before = worker.manner.act
        worker.now += 2.0
        worker.manner = judge(rules, "work", worker.manner, seen, NOON, worker.now, working=before != "rest")
        if before == "work" and worker.manner.act != "work":
            went_at = worker.now
        if before != "work" and worker.manner.act == "work":
            assert worker.now - went_at >= HOLD_LEAST_S


@given(RULES, SEEN, ORDERS, st.booleans(), st.integers(0, 23))
def test_the_reason_that_is_told_is_the_first_of_a_fixed_order(
    rules: Rules, seen: Measured, order: Any, working: bool, hour: int
) -> None:
    wall = MONDAY + timedelta(hours=hour)
    once, again = (judge(rules, order, Manner(), seen, wall, 1.0, working=working) for _ in range(2))
    assert once == again
    ranks = ["order", "hours", "unknown", "gpu", "load", "memory", "temperature", "power", ""]
    if rules.hours and not 8 <= hour < 20:
        assert ranks.index(once.reason.kind) <= 1
    if order == "pause":
        assert once.reason.kind == "order"
