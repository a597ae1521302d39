"""How cost grows: the exponent p of cost ≈ c · xᵖ, by least squares over the logarithms. Pure: rows in, rows out.

At small x a constant hides the growth, so the exponent between the two largest x stands beside that of the whole curve.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.scenario import Column, Row, Value, number, words
from client.shown import several


@dataclass(frozen=True)
class Fit:
    """A power law through points."""

    exponent: float
    factor: float  # the cost at x = 1
    fitted: float  # R² of the logarithms, 1: the points lie on it
    steepest: float  # the exponent between the two largest x alone

    def at(self, x: float) -> float:
        """The cost that the law gives."""
        return float(self.factor * x**self.exponent)


def power_law(points: Iterable[tuple[float, float]]) -> Fit | None:
    """The power law with the least squares of errors of the logarithms; None below three different x.

    Args:
        points: (x, cost), both above zero; in any order, an x may come twice.
    """
    known = sorted(points)
    if len({x for x, _ in known}) < 3:
        return None
    logs = [(math.log(x), math.log(y)) for x, y in known]
    middle_x, middle_y = (sum(axis) / len(logs) for axis in zip(*logs, strict=True))
    spread = sum((x - middle_x) ** 2 for x, _ in logs)
    exponent = sum((x - middle_x) * (y - middle_y) for x, y in logs) / spread
    total = sum((y - middle_y) ** 2 for _, y in logs)
    missed = sum((y - middle_y - exponent * (x - middle_x)) ** 2 for x, y in logs)
    return Fit(
        exponent=exponent,
        factor=math.exp(middle_y - exponent * middle_x),
        fitted=1 - missed / total if total > 0 else 1.0,
        steepest=_last_step(logs),
    )


def _last_step(logs: Sequence[tuple[float, float]]) -> float:
    """The slope between the last two different x; of several points at one x, their mean."""
    xs = sorted({x for x, _ in logs})[-2:]
    low, high = (_mean(y for x, y in logs if x == wanted) for wanted in xs)
    return (high - low) / (xs[1] - xs[0])


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)


# ---------------------------------------------------------------- what is fitted


@dataclass(frozen=True)
class Curve:
    """One family of curves: a cost of one scenario against one key, for each value of another."""

    scenario: str
    cost: str  # key of the cost
    named: str  # what it is
    against: str  # key of x
    grouped: str | None  # one curve for each value of this key
    group_name: Callable[[Any], str] = str


CURVES = (
    Curve("rounds", "round_s", "a round", "megabytes", "workers", lambda n: several(n, "worker")),
    Curve("rounds", "round_s", "a round", "workers", "megabytes", lambda mb: f"{mb:,} MB"),
    Curve("many", "round_s", "a round, light workers", "workers", None),
    Curve("many", "wait_p99_s", "wait p99, light workers", "workers", None),
    Curve("many", "cpu_s", "processor of the coordinator a round", "workers", None),
    Curve("many", "peak_bytes", "memory of the coordinator", "workers", None),
    Curve("averaging", "average_s", "averaging", "megabytes", "updates", lambda n: several(n, "update")),
    Curve("averaging", "average_s", "averaging", "updates", "megabytes", lambda mb: f"{mb:,} MB"),
    Curve("transfers", "download_s", "download", "megabytes", None),
    Curve("transfers", "upload_s", "upload", "megabytes", None),
)


def fits(found: Mapping[str, Sequence[Row]]) -> tuple[Row, ...]:
    """Every curve that has points enough.

    Args:
        found: scenario -> its rows.
    """
    return tuple(row for curve in CURVES for row in _fits(curve, found.get(curve.scenario, ())))


def _fits(curve: Curve, rows: Sequence[Row]) -> Iterable[Row]:
    groups: dict[Value, list[tuple[float, float]]] = {}
    for row in rows:
        group = row[curve.grouped] if curve.grouped else None
        x, cost = (float(row[key] or 0) for key in (curve.against, curve.cost))
        if x > 0 and cost > 0:
            groups.setdefault(group, []).append((x, cost))
    for group, points in groups.items():
        fit = power_law(points)
        if fit is not None:
            xs = sorted(x for x, _ in points)
            yield {
                "cost": curve.named if curve.grouped is None else f"{curve.named}, {curve.group_name(group)}",
                "scenario": curve.scenario,
                "against": curve.against,
                "from": xs[0],
                "to": xs[-1],
                "points": len(points),
                "exponent": fit.exponent,
                "steepest": fit.steepest,
                "fitted": fit.fitted,
            }


COLUMNS = (
    Column("cost", "cost", words),
    Column("against", "against", words),
    Column("from", "from", number),
    Column("to", "to", number),
    Column("points", "points", number),
    Column("exponent", "exponent", lambda value: f"{value:.2f}"),
    Column("between the last two", "steepest", lambda value: f"{value:.2f}"),
    Column("R²", "fitted", lambda value: f"{value:.3f}"),
)
