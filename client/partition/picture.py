"""The picture of a cut: a bar a shard, as high as it has samples, in the colours of their classes.

matplotlib is imported here alone: nothing else needs it. The same cut gives the same bytes as SVG.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client.partition.statistics import Table
from common.errors import LydianError

KINDS = (".png", ".svg")
WIDTH, HEIGHT = 7.0, 3.6  # inches
DPI = 110
MOST_NAMED = 20  # classes with a colour and a name of their own; of more, colours are a scale
FEW_BARS = 40  # shards between which there is room for a gap


def check_target(target: Path) -> None:
    """Refuse a picture that could not be drawn, before any work.

    Raises:
        LydianError: it is no .png or .svg, its folder is not there, or matplotlib is not installed.
    """
    if target.suffix.lower() not in KINDS:
        raise LydianError(
            f"--plot {target} is no picture that is drawn here", code="bad_target", advice="Name a .png or a .svg file."
        )
    if not target.parent.is_dir():
        raise LydianError(f"--plot {target}: there is no folder {target.parent}", code="bad_target", advice="Make it.")
    if importlib.util.find_spec("matplotlib") is None:
        raise LydianError(
            "--plot needs matplotlib, which is not installed",
            code="missing_packages",
            advice="pip install 'matplotlib>=3.9'",
        )


def draw(table: Table, classes: Sequence[int], title: str, target: Path, *, labelled: bool) -> None:
    """Draw a cut.

    Args:
        table: int64 (shards, classes), samples.
        classes: the value of each column.
        title: above it.
        target: the file.
        labelled: whether the columns are classes.
    """
    import matplotlib as mpl

    style: Any = {"svg.hashsalt": "lydian", "svg.fonttype": "none", "font.size": 9, "axes.axisbelow": True}
    with mpl.rc_context(style):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        _bars(axes, table, classes, labelled=labelled)
        axes.set_title(title)
        axes.set_xlabel("shard")
        axes.set_ylabel("samples")
        axes.grid(axis="y", alpha=0.3)
        if labelled:
            _name_classes(figure, axes, classes)
        svg = target.suffix.lower() == ".svg"
        figure.savefig(target, dpi=DPI, metadata={"Date": None, "Creator": None} if svg else {"Software": None})
    if svg:
        text = target.read_text(encoding="utf-8")
        target.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")


def _bars(axes: Any, table: Table, classes: Sequence[int], *, labelled: bool) -> None:  # noqa: ANN401 - matplotlib's
    """A layer a class, the first at the bottom; of many shards as one surface, which is drawn sooner than its bars."""
    shards, total = table.shape[0], table.sum(axis=1)
    edges = [edge for shard in range(shards) for edge in (shard - 0.5, shard + 0.5)]
    below = table[:, 0] * 0
    for column, colour in enumerate(_colours(classes) if labelled else ["tab:blue"]):
        counts = table[:, column]
        if shards <= FEW_BARS:
            axes.bar(range(shards), counts, width=0.85, bottom=below, color=colour, linewidth=0)
        else:
            axes.fill_between(edges, below.repeat(2), (below + counts).repeat(2), color=colour, linewidth=0)
        below = below + counts
    axes.set_xlim(-0.5, shards - 0.5)
    axes.set_ylim(0, total.max() * 1.02)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _colours(classes: Sequence[int]) -> list[Any]:
    """A colour a class: told apart where they are few, a scale over their values where they are many."""
    import matplotlib as mpl

    if len(classes) <= MOST_NAMED:
        name = "tab10" if len(classes) <= 10 else "tab20"
        return [mpl.colormaps[name](at) for at in range(len(classes))]
    scale = mpl.colors.Normalize(min(classes), max(classes))
    return [mpl.colormaps["viridis"](scale(value)) for value in classes]


def _name_classes(figure: Any, axes: Any, classes: Sequence[int]) -> None:  # noqa: ANN401 - matplotlib's
    """Say which colour is which class."""
    import matplotlib as mpl

    if len(classes) > MOST_NAMED:
        scale = mpl.colors.Normalize(min(classes), max(classes))
        figure.colorbar(mpl.cm.ScalarMappable(scale, "viridis"), ax=axes, label="class")
        return
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=str(name)) for name, colour in zip(classes, _colours(classes), strict=True)]
    axes.legend(
        handles=patches[::-1], title="class", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=7
    )
