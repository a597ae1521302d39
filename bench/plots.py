"""Plots of a page as SVG files, by matplotlib: the same rows give the same bytes.

matplotlib is needed for nothing else, so that it is a package of developers and imported here alone.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.growth import power_law
from bench.limits import MEGABYTE
from bench.scenario import Row
from bench.suite import Document
from client.shown import several

WIDTH, HEIGHT = 7.0, 4.2  # inches


def available() -> bool:
    """Whether plots can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(runs: Sequence[Document], folder: Path) -> dict[str, Path]:
    """Draw what the runs have rows for. Returns scenario -> file."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "lydian", "svg.fonttype": "none", "font.size": 9, "axes.grid": True,
                         "grid.alpha": 0.3, "legend.frameon": False})  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for run in runs:
        for section in run["sections"]:
            plot = PLOTS.get(section["name"])
            if plot is not None and not section["set"] and section["rows"]:
                drawn[section["name"]] = folder / f"performance-{section['name']}.svg"
                _save(plot, section["rows"], run["limits"], drawn[section["name"]])
    return drawn


def _save(plot: "Plot", rows: Sequence[Row], limits: dict[str, Any], target: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    plot(figure.subplots(), rows, limits)
    figure.savefig(target, metadata={"Date": None, "Creator": None})
    text = target.read_text(encoding="utf-8")
    target.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")


Plot = Callable[[Any, Sequence[Row], dict[str, Any]], None]


def _rounds(axes: Any, rows: Sequence[Row], limits: dict[str, Any]) -> None:  # noqa: ANN401 - matplotlib's
    """Seconds a round against the size of the model, above what loopback needs for the bytes."""
    for at, workers in enumerate(sorted({int(row["workers"] or 0) for row in rows})):
        points = _points((row for row in rows if row["workers"] == workers), "megabytes", "round_s")
        fit = power_law(points)
        slope = f", p = {fit.exponent:.2f}" if fit else ""
        axes.plot(*zip(*points, strict=True), "o-", color=f"C{at}", label=several(workers, "worker") + slope)
        floor = [(x, 2 * x * MEGABYTE * workers / limits["loopback"]) for x, _ in points]
        axes.plot(*zip(*floor, strict=True), ":", color=f"C{at}")
    axes.plot([], [], ":", color="black", label="its bytes at loopback speed")
    _finish(axes, "model (MB)", "seconds a round", log="xy")


def _many(axes: Any, rows: Sequence[Row], limits: dict[str, Any]) -> None:  # noqa: ANN401, ARG001
    """Seconds against the number of light workers."""
    for key, name in (
        ("round_s", "a round"), ("floor_s", "its bytes at loopback speed"), ("cpu_s", "processor of the coordinator"),
        ("wait_p99_s", "wait for a task, p99"), ("wait_p50_s", "wait for a task, p50"),
    ):  # fmt: skip
        axes.plot(*zip(*_points(rows, "workers", key), strict=True), ":" if key == "floor_s" else "o-", label=name)
    _finish(axes, "workers", "seconds", log="xy")


def _averaging(axes: Any, rows: Sequence[Row], limits: dict[str, Any]) -> None:  # noqa: ANN401
    """GB/s of updates read, below what the machine copies."""
    for size in sorted({int(row["megabytes"] or 0) for row in rows}):
        points = _points((row for row in rows if row["megabytes"] == size), "updates", "read")
        axes.plot([x for x, _ in points], [y / 1e9 for _, y in points], "o-", label=f"{size:,} MB")
    axes.axhline(limits["axpy"] / 1e9, linestyle="--", color="grey", label="weighted sum in numpy")
    axes.axhline(limits["copy"] / 1e9, linestyle=":", color="black", label="memory copy")
    _finish(axes, "updates", "GB/s read", log="x")


def _transfers(axes: Any, rows: Sequence[Row], limits: dict[str, Any]) -> None:  # noqa: ANN401
    """MB/s against the size of the model."""
    for key in ("download", "upload", "check"):
        points = _points(rows, "megabytes", key)
        axes.plot([x for x, _ in points], [y / 1e6 for _, y in points], "o-", label=key)
    axes.axhline(limits["loopback"] / 1e6, linestyle=":", color="black", label="TCP loopback")
    _finish(axes, "model (MB)", "MB/s", log="x")


def _points(rows: Any, x: str, y: str) -> list[tuple[float, float]]:  # noqa: ANN401 - rows, once
    return sorted((float(row[x] or 0), float(row[y] or 0)) for row in rows)


def _finish(axes: Any, x: str, y: str, *, log: str) -> None:  # noqa: ANN401
    axes.set(xlabel=x, ylabel=y, **{f"{axis}scale": "log" for axis in log})
    if "y" not in log:
        axes.set_ylim(bottom=0)
    measured = sorted({float(x) for line in axes.lines if line.get_marker() == "o" for x in line.get_xdata()})
    axes.set_xticks(measured, [f"{x:g}" for x in measured])
    axes.set_xticks([], minor=True)
    axes.legend()


PLOTS: dict[str, Plot] = {"rounds": _rounds, "many": _many, "averaging": _averaging, "transfers": _transfers}
