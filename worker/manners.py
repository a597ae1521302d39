"""A polite worker: what its owner allows, and whether it may work, is to stand still, or must be out of the way.

Pure: no network, disk, clock or tensor. What was measured, the time on the wall and `now` in monotonic seconds are
passed in.

    work ──too hot, too much power──▶ hold ──cooler──▶ work         the child stands still, its lease is kept
      │                                 │ HOLD_LONGEST_S
      └──not its hours, the machine is ─┴──▶ rest ──for quiet_s──▶ work   the child is ended, its memory given back,
         used, an operator's order                 nothing of it          and what it did is handed back

So that it does not flap: out of the way at the first sight of a reason, back when none was seen for `quiet_s`. Only
hours and orders have sharp edges, and end a rest at once. Power and load are means over some seconds, and a hold ends
below its limit, not at it.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from common.errors import LydianError
from common.messages import Order

Act = Literal["work", "hold", "rest"]

HOLD_LEAST_S = 10.0  # a hold is not shorter: cooling takes that, and it bounds how often the child is stopped
HOLD_LONGEST_S = 120.0  # a round waits for a held lease; after that it is handed back
COOLER_C = 5.0  # below the highest temperature before the work goes on
LESS_POWER = 0.9  # of the highest power, likewise
POWER_MEAN_S, LOAD_MEAN_S = 30.0, 10.0  # time constants of the means
SHARP = frozenset({"hours", "order"})  # reasons whose end is known to be one

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES = 24 * 60
_HOURS = re.compile(r"(?:([a-z,-]+)@)?([0-9]{1,2}):([0-9]{2})-([0-9]{1,2}):([0-9]{2})")
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(%|[kmgt]i?b?|b)?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


# ---------------------------------------------------------------- what the owner said


@dataclass(frozen=True)
class Hours:
    """A part of the day in which work is allowed, on the days on which it begins."""

    start: int  # minutes after midnight
    stop: int  # minutes after midnight, exclusive; not above `start`: of the next day
    days: frozenset[int] = frozenset(range(7))  # Monday is 0

    def hold(self, weekday: int, minute: int) -> bool:
        """Whether a moment, in minutes after midnight, is within."""
        today = weekday in self.days and self.start <= minute
        if self.start < self.stop:
            return today and minute < self.stop
        return today or ((weekday - 1) % 7 in self.days and minute < self.stop)

    def __str__(self) -> str:
        days = f"{_named(self.days)}@" if len(self.days) < len(DAYS) else ""
        return f"{days}{_clock(self.start)}-{_clock(self.stop)}"


@dataclass(frozen=True)
class Amount:
    """Memory: bytes, or a share of what there is."""

    number: float
    share: bool

    def of(self, total: int) -> int:
        """In bytes.

        Args:
            total: bytes that there are.
        """
        return int(self.number * total) if self.share else int(self.number)


@dataclass(frozen=True)
class Rules:
    """What the owner of a worker allows. By default, everything."""

    hours: tuple[Hours, ...] = ()  # none: always
    only_idle: bool = False
    idle_load: float = 0.25  # share of the machine's processors that others may use while it counts as idle
    max_temperature: float | None = None  # °C
    max_power: float | None = None  # watts
    max_memory: Amount | None = None  # of the machine's, in use by all
    quiet_s: float = 60.0  # seconds without a reason to rest, before work is taken again

    @property
    def watching(self) -> bool:
        """Whether anything must be looked at from time to time."""
        return bool(self.hours) or self.measuring

    @property
    def measuring(self) -> bool:
        """Whether anything must be measured."""
        return self.only_idle or (self.max_temperature, self.max_power, self.max_memory) != (None, None, None)


def hours(text: str) -> Hours:
    """`22:00-07:00`, `mon-fri@18:00-08:00` or `sat,sun@00:00-24:00`.

    Raises:
        LydianError: it is none of these (bad_hours).
    """
    found = _HOURS.fullmatch(text.strip().lower())
    numbers = [int(part) for part in found.groups()[1:]] if found else []
    if found is None or any(minute > 59 for minute in numbers[1::2]):
        raise _bad_hours(text, "is no part of a day")
    start, stop = numbers[0] * 60 + numbers[1], numbers[2] * 60 + numbers[3]
    if start >= DAY_MINUTES or stop > DAY_MINUTES:
        raise _bad_hours(text, "is later than a day has hours")
    if start == stop:
        raise _bad_hours(text, "ends when it begins")
    return Hours(start, stop, _days(text, found[1]))


def _days(text: str, named: str | None) -> frozenset[int]:
    if named is None:
        return frozenset(range(7))
    days: set[int] = set()
    for part in named.split(","):
        first, dash, last = part.partition("-")
        if first not in DAYS or (dash and last not in DAYS):
            raise _bad_hours(text, f"has no days in {part!r}")
        begin, end = DAYS.index(first), DAYS.index(last if dash else first)
        days |= {day % 7 for day in range(begin, end + 1 if end >= begin else end + 8)}
    return frozenset(days)


def _bad_hours(text: str, why: str) -> LydianError:
    advice = "e.g. --hours 22:00-07:00, --hours mon-fri@18:00-08:00 --hours sat,sun@00:00-24:00; the clock is this "
    return LydianError(f"--hours {text} {why}", code="bad_hours", advice=f"{advice}machine's.")


def amount(flag: str, text: str) -> Amount:
    """`80%`, `0.8`, `6GB` or `6GiB`: a share of what there is, or bytes.

    Raises:
        LydianError: it is none of these (bad_amount).
    """
    found = _AMOUNT.fullmatch(text.strip())
    number, unit = (float(found[1]), (found[2] or "").lower()) if found else (0.0, "")
    share = unit == "%" or (not unit and number <= 1)
    if unit == "%":
        number /= 100
    if number <= 0 or (share and number > 1):
        raise LydianError(
            f"{flag} {text} is neither a share nor a size",
            code="bad_amount",
            advice=f"e.g. {flag} 80%, {flag} 0.8 or {flag} 6GB.",
        )
    return Amount(number if share else number * _UNITS[unit.removesuffix("b")], share=share)


# ---------------------------------------------------------------- what was measured


@dataclass(frozen=True)
class Measured:
    """The machine at one moment. What no rule asks for need not be known."""

    device: str = "this machine"  # whose temperature and power these are, e.g. GPU 0
    others_on_gpu: tuple[str, ...] = ()  # other processes that use the worker's GPU, in words
    others_load: float = 0.0  # share of the machine's processors that other processes used since the last look
    temperature: float | None = None  # °C
    power: float | None = None  # watts
    memory: int = 0  # bytes of the machine's memory in use by all
    own_memory: int = 0  # bytes of these that are the worker's
    total_memory: int = 0  # bytes
    unknown: str = ""  # what could not be measured now, and why; empty: all was that a rule asks for


# ---------------------------------------------------------------- what follows


@dataclass(frozen=True)
class Reason:
    """Why the worker may not simply work. The same kind is the same reason, whatever its words."""

    act: Act
    kind: str
    why: str  # a clause, which the coordinator is told
    names: str = ""  # what stays in this machine's log: whose processes


WORK = Reason("work", "", "")


@dataclass(frozen=True)
class Manner:
    """How the worker behaves now, and what the next judgement needs to know of those before."""

    reason: Reason = WORK
    since: float = -math.inf  # monotonic seconds at which this act began
    trouble: Reason = WORK  # the last reason that was not sharp
    troubled_at: float = -math.inf  # monotonic seconds at which it was last seen
    measured_at: float | None = None  # monotonic seconds
    load: float = 0.0  # mean of others_load
    power: float = 0.0  # mean, watts
    peak: int = 0  # bytes of memory that the worker's work has needed at most

    @property
    def act(self) -> Act:
        """What the worker does."""
        return self.reason.act

    @property
    def why(self) -> str:
        """Why it does not work; empty while it does."""
        return self.reason.why


def judge(
    rules: Rules, order: Order, before: Manner, measured: Measured, wall: datetime, now: float, *, working: bool
) -> Manner:
    """What the worker does from now on, and why.

    Args:
        rules: the owner's.
        order: an operator's.
        before: the last judgement.
        measured: what was measured last.
        wall: local time of this machine; only its weekday, hour and minute count.
        now: monotonic seconds.
        working: whether an assignment is under way.
    """
    manner = _remembering(before, measured, now, working=working)
    reasons = list(_reasons(rules, order, manner, measured, wall, working=working))
    blurred = next((reason for reason in reasons if reason.kind not in SHARP), None)
    if blurred is not None:
        manner = replace(manner, trouble=blurred, troubled_at=now)
    # In the order in which they are asked for, but for one: what is out of the way need not stand still as well.
    found = next((reason for reason in reasons if reason.act == "rest"), blurred or WORK)
    found = _steady(rules, manner, found, now, working=working)
    if (found.act, found.kind) == (manner.act, manner.reason.kind):
        return manner  # in the words in which it began, so that a log says it once
    return replace(manner, reason=found, since=manner.since if found.act == manner.act else now)


def _remembering(before: Manner, measured: Measured, now: float, *, working: bool) -> Manner:
    """The last judgement with the means carried on to now."""
    passed = math.inf if before.measured_at is None else now - before.measured_at
    return replace(
        before,
        measured_at=now,
        load=_mean(before.load, measured.others_load, passed / LOAD_MEAN_S),
        power=_mean(before.power, measured.power or 0.0, passed / POWER_MEAN_S),
        peak=max(before.peak, measured.own_memory) if working else before.peak,
    )


def _mean(before: float, new: float, time_constants: float) -> float:
    return new + (before - new) * math.exp(-time_constants)


def _reasons(
    rules: Rules, order: Order, manner: Manner, measured: Measured, wall: datetime, *, working: bool
) -> Iterator[Reason]:
    """Every reason not to simply work, the first the one that is told."""
    if order == "pause" or (order == "drain" and not working):
        yield Reason("rest", "order", f"an operator ordered it ({order})")
    if rules.hours and not any(part.hold(wall.weekday(), wall.hour * 60 + wall.minute) for part in rules.hours):
        yield Reason("rest", "hours", f"outside its hours ({', '.join(map(str, rules.hours))}): {_back(rules, wall)}")
    if rules.measuring and measured.unknown:
        yield Reason("rest", "unknown", measured.unknown)
    if rules.only_idle and measured.others_on_gpu:
        used = f"{measured.device} is used by {'another process' if len(measured.others_on_gpu) == 1 else 'others'}"
        yield Reason("rest", "gpu", used, ", ".join(measured.others_on_gpu))
    if rules.only_idle and manner.load > rules.idle_load:
        used = f"others use {manner.load:.0%} of the processors, and it counts as idle up to {rules.idle_load:.0%}"
        yield Reason("rest", "load", used)
    if rules.max_memory is not None:
        yield from _of_memory(rules.max_memory.of(measured.total_memory), manner, measured)
    yield from _of_heat(rules, manner, measured)


def _of_memory(most: int, manner: Manner, measured: Measured) -> Iterator[Reason]:
    """While out of the way, the memory that the work would need again counts as if it were used."""
    own = max(measured.own_memory, manner.peak) if manner.act == "rest" else measured.own_memory
    others = measured.memory - measured.own_memory
    if others + own > most:
        used = f"{gigabytes(others)} of memory are used by others and {gigabytes(own)} by the worker's work"
        yield Reason("rest", "memory", f"{used}, and {gigabytes(most)} are allowed")


def _of_heat(rules: Rules, manner: Manner, measured: Measured) -> Iterator[Reason]:
    kind = manner.reason.kind
    if rules.max_temperature is not None and measured.temperature is not None:
        allowed = rules.max_temperature - (COOLER_C if kind == "temperature" else 0.0)
        if measured.temperature > allowed:
            is_at = f"{measured.device} is at {measured.temperature:g} °C, and {rules.max_temperature:g} °C are allowed"
            yield Reason("hold", "temperature", is_at)
    if rules.max_power is not None and measured.power is not None:
        allowed = rules.max_power * (LESS_POWER if kind == "power" else 1.0)
        if manner.power > allowed:
            draws = f"{measured.device} draws {manner.power:.0f} W in the mean of {POWER_MEAN_S:g} s"
            yield Reason("hold", "power", f"{draws}, and {rules.max_power:g} W are allowed")


def _steady(rules: Rules, manner: Manner, found: Reason, now: float, *, working: bool) -> Reason:
    """The reason that counts, so that nothing flaps: a hold is neither short nor long, and a rest ends in quiet."""
    if manner.act == "hold" and found.act == "work" and working and now - manner.since < HOLD_LEAST_S:
        return manner.reason
    if found.act == "hold" and (
        not working or manner.act == "rest" or (manner.act == "hold" and now - manner.since >= HOLD_LONGEST_S)
    ):
        return replace(found, act="rest")
    if manner.act == "rest" and found.act == "work" and now - manner.troubled_at < rules.quiet_s:
        return Reason("rest", "quiet", f"{manner.trouble.why}: seen less than {rules.quiet_s:g} s ago")
    return found


# ---------------------------------------------------------------- words


def _back(rules: Rules, wall: datetime) -> str:
    """When the hours begin again."""
    now = wall.hour * 60 + wall.minute
    ahead, start = min(
        (((day - wall.weekday()) * DAY_MINUTES + part.start - now) % (7 * DAY_MINUTES), part.start)
        for part in rules.hours
        for day in part.days
    )
    day = DAYS[(wall.weekday() + (now + ahead) // DAY_MINUTES) % 7]
    return f"back at {_clock(start)}" if ahead < DAY_MINUTES else f"back on {day} at {_clock(start)}"


def _named(days: frozenset[int]) -> str:
    """Days as `hours` reads them, three or more in a row as a range."""
    parts: list[list[int]] = []
    for day in sorted(days):
        if parts and parts[-1][-1] == day - 1:
            parts[-1].append(day)
        else:
            parts.append([day])
    return ",".join(
        f"{DAYS[part[0]]}-{DAYS[part[-1]]}" if len(part) > 2 else ",".join(DAYS[day] for day in part) for part in parts
    )


def _clock(minutes: int) -> str:
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def gigabytes(size: int) -> str:
    """Bytes as people read them on a machine's label."""
    return f"{size / 1e9:.1f} GB"
