"""The fleet as rows of a table: what is shown of each worker, which rows are asked for, and in what order. Pure."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.messages import Progress, TorchBuild, WorkerView
from server.pages import words

PAGE = 50  # rows

MARKS = {
    "working": "●", "idle": "○", "draining": "◐", "paused": "‖", "resting": "◔", "degraded": "▲", "set aside": "✕",
    "gone": "◌",
}  # fmt: skip
"""State -> its mark, so that no state is told by its colour alone. In the order in which they are counted."""


@dataclass(frozen=True)
class Row:
    """One worker as the table shows it. Two that are equal look the same."""

    id: str
    name: str
    state: str
    mark: str
    reason: str  # what it does now, or why it waits
    doing: str  # how far it is
    part: float | None  # of its work, 0 to 1; None: not known
    device: str
    memory: int  # bytes, of the device or of the machine
    used: int | None  # bytes of it that are taken, by whomever; None: not told, as by one without work
    gauges: str  # `71 °C, 182 W`, as far as it tells them
    torch: str
    path: str
    link: str
    rate: float | None  # samples a second
    warnings: tuple[str, ...]
    seen: str  # of one that is gone


def row_of(view: WorkerView) -> Row:
    """What is shown of one worker."""
    build, gone = view.hardware.torch, view.state == "gone"
    measured = [speed.samples_per_s for speed in view.speeds if speed.samples_per_s is not None]
    live = view.progress.samples_per_s if view.progress else None
    return Row(
        id=view.id,
        name=view.name,
        state=view.state,
        mark=MARKS[view.state],
        reason=view.reason,
        doing=progress_words(view.progress),
        part=part_of(view.progress),
        device=device_of(view),
        memory=build.memory or view.hardware.memory,
        used=view.progress.memory_used if view.progress and not gone else None,
        gauges=gauge_words(view.progress) if not gone else "",
        torch=torch_of(build),
        path=path_words(view),
        link=f"↓ {words.rate(view.link.down)} ↑ {words.rate(view.link.up)} Mbit/s" if view.link else "",
        rate=live or (measured[-1] if measured else None),
        warnings=view.warnings,
        seen=words.ago(view.last_seen_s) if gone else "",
    )


def device_of(view: WorkerView) -> str:
    """What it computes on: the card's name, or the processor's."""
    build = view.hardware.torch
    name = build.name or (view.hardware.cpu if build.device == "cpu" else "")
    several = f" × {build.ranks}" if build.ranks > 1 else ""
    return f"{name or build.device}{several}"


def torch_of(build: TorchBuild) -> str:
    """Its torch, with what that was built for."""
    if build.cuda:
        return f"{build.version} · CUDA {build.cuda}"
    return f"{build.version} · ROCm {build.rocm}" if build.rocm else build.version


def path_words(view: WorkerView) -> str:
    """The way to it: `direct`, `relayed by fra`."""
    if view.path is None or view.path.kind == "unknown":
        return ""
    if view.path.kind == "relay":
        return f"relayed by {view.path.via}" if view.path.via else "relayed"
    return {"peer relay": "peer relay", "loopback": "this machine", "other": "no tailnet"}.get(view.path.kind, "direct")


def progress_words(progress: Progress | None) -> str:
    """How far a worker is, as `training, step 12 of 40, loss 0.31`."""
    if progress is None:
        return ""
    said: list[str] = [progress.doing]
    if progress.step:
        said.append(f"step {progress.step:,}" + (f" of {progress.steps:,}" if progress.steps else ""))
    if progress.loss is not None:
        said.append(f"loss {words.measure(progress.loss)}")
    return ", ".join(said)


def gauge_words(progress: Progress | None) -> str:
    """How warm the device is and what it draws, as `71 °C, 182 W`; what its worker cannot tell is left out."""
    if progress is None:
        return ""
    said = [] if progress.temperature is None else [f"{progress.temperature:.0f} °C"]
    said += [] if progress.power is None else [f"{progress.power:,.0f} W"]
    return ", ".join(said)


def part_of(progress: Progress | None) -> float | None:
    """The share of its steps that is done."""
    return min(progress.step / progress.steps, 1.0) if progress and progress.steps else None


# ---------------------------------------------------------------- which rows

SORTS: dict[str, Callable[[Row], tuple[object, ...]]] = {
    "name": lambda row: (row.name, row.id),
    "state": lambda row: (list(MARKS).index(row.state), row.name, row.id),
    "device": lambda row: (row.device, row.name, row.id),
    "memory": lambda row: (-row.memory, row.name, row.id),
    "path": lambda row: (row.path, row.name, row.id),
    "speed": lambda row: (-(row.rate or 0.0), row.name, row.id),
}


@dataclass(frozen=True)
class Shown:
    """The part of the fleet that was asked for."""

    rows: Sequence[Row]
    first: int  # number of the first row, from 1
    found: int  # rows that fit the question
    all: int
    page: int  # from 1
    pages: int
    sort: str
    states: dict[str, int]  # state -> workers in it, for all workers


def choose(rows: Sequence[Row], *, find: str = "", state: str = "", sort: str = "state", page: int = 1) -> Shown:
    """The rows of one page: those with every word of `find` somewhere in them, of one state if that is given.

    A page beyond the last is the last.
    """
    sought = find.lower().split()
    fitting = [row for row in rows if state in ("", row.state) and all(word in _text(row) for word in sought)]
    fitting.sort(key=SORTS[sort])
    pages = max(1, -(-len(fitting) // PAGE))
    page = min(max(page, 1), pages)
    first = (page - 1) * PAGE
    counted = Counter(row.state for row in rows)
    return Shown(
        fitting[first : first + PAGE], first + 1, len(fitting), len(rows), page, pages, sort,
        {name: counted[name] for name in MARKS if counted[name]},
    )  # fmt: skip


def _text(row: Row) -> str:
    return " ".join((row.name, row.id, row.device, row.torch, row.reason, row.path, *row.warnings)).lower()
