"""How numbers are shown on a page. Pure."""

import math

from common.messages import JobSpec

NOTHING = "–"
_SIZES = ("B", "kB", "MB", "GB", "TB", "PB")


def size(count: float | None) -> str:
    """Bytes, as 6.7 MB: decimal units."""
    if count is None:
        return NOTHING
    value, at = float(count), 0
    while abs(value) >= 999.95 and at < len(_SIZES) - 1:
        value, at = value / 1000, at + 1
    return f"{value:.1f} {_SIZES[at]}" if at else f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    """Seconds, as 0.42 s, 12.3 s, 1 min 12 s, 2 h 5 min or 3 d 4 h."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return NOTHING
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86_400
    if not hours:
        return f"{minutes} min {whole % 60} s"
    return f"{hours} h {minutes % 60} min" if not days else f"{days} d {hours % 24} h"


def ago(seconds: float) -> str:
    """How long ago, coarsely, so that a page that stands still reads the same for a while."""
    if seconds < 0:
        return "not since the coordinator started"
    steps = ((86_400, "d"), (3_600, "h"), (60, "min"))
    found = next(((seconds // length, unit) for length, unit in steps if seconds >= length), None)
    return f"{found[0]:.0f} {found[1]} ago" if found else "under a minute ago"


def rate(bytes_per_s: float) -> str:
    """What a line carries, in the unit that lines are sold in."""
    mbit = bytes_per_s * 8e-6
    return f"{mbit:.2f}" if mbit < 0.995 else f"{mbit:.1f}" if mbit < 99.95 else f"{mbit:,.0f}"


def measure(value: float | None) -> str:
    """A metric, as 0.912."""
    if value is None:
        return NOTHING
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3g}"


def count(number: float | None) -> str:
    """A whole number with its thousands set apart, as 60,000."""
    return NOTHING if number is None else f"{number:,.0f}"


def several(number: int, thing: str) -> str:
    """`1 worker`, `3 workers`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def silence(spec: JobSpec, *, over: bool) -> str:
    """Why nothing is shown of what a task writes."""
    if over:
        return "The job has ended; what the task wrote before a failure is in the log."
    if spec.hides_data:
        return "What the task writes stays on its workers: the job hides their data, or they have their own."
    return "Nobody at work has written anything yet. It comes with the heartbeats, the last 20 lines of each worker."
