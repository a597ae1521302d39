"""How numbers, texts and tables are shown to a person.

Pure but for `print_table`. What comes from a worker is never trusted here: a sentence or a name may carry escape codes,
so texts pass `one_line` or `printable` before they reach a terminal.
"""

import math
import os
import sys
from collections.abc import Collection, Sequence

import typer

NOTHING = "-"
_SIZES = ("B", "kB", "MB", "GB", "TB", "PB")


def size(count: float) -> str:
    """Bytes, as 6.7 MB: decimal units."""
    value, at = float(count), 0
    while abs(value) >= 999.95 and at < len(_SIZES) - 1:
        value, at = value / 1000, at + 1
    return f"{value:.1f} {_SIZES[at]}" if at else f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Seconds, as 0.42 s, 12.3 s, 1 min 12 s, 2 h 5 min or 3 d 4 h."""
    if not math.isfinite(seconds) or seconds < 0:
        return NOTHING
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86_400
    if not hours:
        return f"{minutes} min {whole % 60} s"
    return f"{hours} h {minutes % 60} min" if not days else f"{days} d {hours % 24} h"


def line_rate(bytes_per_s: float) -> str:
    """What a line carries, in the unit that lines are sold in: 0.82 Mbit/s, 17.3 Mbit/s, 940 Mbit/s."""
    mbit = bytes_per_s * 8e-6
    return f"{mbit:.2f} Mbit/s" if mbit < 0.995 else f"{mbit:.1f} Mbit/s" if mbit < 99.95 else f"{mbit:,.0f} Mbit/s"


def latency(seconds: float) -> str:
    """Seconds, as 0.4 ms or 83 ms."""
    return f"{seconds * 1e3:.1f} ms" if seconds < 0.00995 else f"{seconds * 1e3:.0f} ms"


def count(number: int) -> str:
    """A whole number with its thousands set apart, as 60,000."""
    return f"{number:,}"


def measure(value: float | None) -> str:
    """A metric, as 0.912; a dash where there is none."""
    if value is None:
        return NOTHING
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3g}"


def several(number: int, thing: str) -> str:
    """`1 worker`, `3 workers`."""
    return f"{count(number)} {thing}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """The text without control characters, line breaks and tabs kept: it cannot steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def one_line(text: str) -> str:
    """The text as one line that cannot steer a terminal."""
    return printable(" ".join(text.split()))


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> list[str]:
    """Plain aligned lines, the header first; the columns named in `right` are set to the right."""
    lines = [header, *rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
    sides = [">" if name in right else "<" for name in header]
    return ["  ".join(f"{c:{s}{w}}" for c, s, w in zip(line, sides, widths, strict=True)).rstrip() for line in lines]


def without_empty(
    header: Sequence[str], rows: Sequence[Sequence[str]], may_go: Collection[str]
) -> tuple[list[str], list[list[str]]]:
    """A table without those of the columns named in `may_go` that say nothing in any row."""
    kept = [at for at, name in enumerate(header) if name not in may_go or any(row[at] != NOTHING for row in rows)]
    return [header[at] for at in kept], [[row[at] for at in kept] for row in rows]


def fancy() -> bool:
    """Whether stdout is a terminal that takes colours and lets its cursor be moved."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> None:
    """A table on stdout: drawn on a terminal, plain aligned text in a pipe."""
    if not fancy():
        typer.echo("\n".join(columns(header, rows, right=right)))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for name in header:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
