"""What a scenario is: a question to this system, measured case by case into rows that JSON, a page and a plot can show.

    Wish, Limits ──measure──▶ Outcome: rows, and the cases that were left out with the reason

A new scenario is a module with a `SCENARIO`, and a line in bench.suite.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import psutil  # type: ignore[import-untyped]

from bench.limits import MEGABYTE, Limits
from client.shown import size

Value = str | int | float | bool | None
Row = dict[str, Value]  # the unit is in the name of the key: round_s, peak_bytes
Say = Callable[[str], None]
Spec = dict[str, Any]  # a job, as its file would say it


class Size(Enum):
    """How much is measured."""

    TINY = "tiny"  # that it works; says nothing
    QUICK = "quick"  # without the large models and the large fleets
    FULL = "full"


@dataclass(frozen=True)
class Wish:
    """What is to be measured."""

    size: Size
    overrides: Spec = field(default_factory=dict)  # of the job, nested as in its file
    rounds: int | None = None  # measured in each case; None: as many as the scenario takes for the size
    cases: tuple[tuple[int, int], ...] | None = None  # (megabytes, workers) instead of the scenario's own
    seed: int = 0

    def pick(self, *, tiny: Any, quick: Any, full: Any) -> Any:  # noqa: ANN401 - whatever the scenario chooses between
        """The value for the size."""
        return {Size.TINY: tiny, Size.QUICK: quick, Size.FULL: full}[self.size]


@dataclass(frozen=True)
class Outcome:
    """What a scenario found."""

    rows: tuple[Row, ...]
    skipped: tuple[str, ...] = ()  # a sentence for each case that was left out


@dataclass(frozen=True)
class Column:
    """One column of a scenario's table."""

    head: str
    key: str  # of the row
    show: Callable[[Any], str]


@dataclass(frozen=True)
class Scenario:
    """One question, and how its answer is shown."""

    name: str
    title: str
    about: str  # what was done and what the columns are, for somebody who reads the page
    measure: Callable[[Wish, Limits, Say], Outcome]
    columns: tuple[Column, ...]
    takes_overrides: bool = False  # whether its jobs are those of the wish's overrides


# ---------------------------------------------------------------- the job


def read_overrides(settings: list[str]) -> Spec:
    """KEY=VALUE pairs as a nested dictionary: aggregation.update=int4 is {"aggregation": {"update": "int4"}}.

    Raises:
        ValueError: a pair without `=`, or without a key.
    """
    merged: Spec = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(f"{setting!r} is no KEY=VALUE, as in aggregation.norm_bound=10")
        nested: Any = _value(text)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        merged = merge(merged, nested)
    return merged


def merge(spec: Mapping[str, Any], overrides: Mapping[str, Any]) -> Spec:
    """A job with some of its keys set to something else, section by section."""
    merged = dict(spec)
    for key, value in overrides.items():
        known = merged.get(key)
        if isinstance(known, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(known, value)
        else:
            merged[key] = value
    return merged


def _value(text: str) -> Any:  # noqa: ANN401 - what JSON holds
    try:
        return json.loads(text)
    except ValueError:
        return text


# ---------------------------------------------------------------- room


def shortage(*, memory: float, disk: float) -> str | None:
    """Why this machine has no room for a case now; None: it has.

    Args:
        memory: bytes that its processes will hold at most.
        disk: bytes that it will keep in the folder for temporary files.
    """
    free_memory, free_disk = psutil.virtual_memory().available, shutil.disk_usage(tempfile.gettempdir()).free
    if memory > 0.9 * free_memory:
        return f"it takes about {size(memory)} of memory, and {size(free_memory)} are free"
    if disk > 0.9 * free_disk:
        return f"it takes about {size(disk)} of disk, and {size(free_disk)} are free"
    return None


# ---------------------------------------------------------------- cells


def number(value: float) -> str:
    """A whole number with its thousands apart."""
    return f"{value:,.0f}"


def seconds(value: float) -> str:
    """Seconds, in milliseconds below one."""
    return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def megabytes(value: float) -> str:
    """Bytes as megabytes."""
    return f"{value / MEGABYTE:,.0f} MB"


def rate(value: float) -> str:
    """Bytes a second."""
    return f"{value / 1e9:.2f} GB/s" if value >= 0.9995e9 else f"{value / 1e6:.0f} MB/s"


def ratio(value: float) -> str:
    """How many times something."""
    return f"{value:.3g} ×"


def share(value: float) -> str:
    """A part of a limit."""
    return f"{value:.0%}" if value >= 0.095 else f"{value:.1%}"


def words(value: object) -> str:
    """As it is."""
    return str(value)
