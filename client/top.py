"""`lydian top`: the fleet and its jobs on one screen, renewed every few seconds.

All is pure but for the end: what was asked (a Glance) and what was seen before (Paces) become lines, the lines a
picture, plain text or JSON. A watcher only looks: ending it changes nothing.

    coordinator ──▶ Glance ──▶ Paces.take ──▶ screen ──▶ picture | plain text | one JSON document a refresh
"""

import json
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import typer

from client import shown
from client.calling import Ending
from common.api import CoordinatorApi
from common.errors import LydianError, UnavailableError
from common.messages import OVER, JobView, WorkerView

if TYPE_CHECKING:
    from rich.console import RenderableType

ROUNDS_SEEN = 6  # closed rounds, of a job, that its pace is taken from
OVER_SHOWN = 3  # jobs that are over, the newest
LONG_GONE_S = 3600.0  # after which a worker that left is no trouble any more
BACK_S = 10.0  # for how long it is said that the coordinator is back
LEAST_ROWS = 3  # of jobs, and of workers, on however small a screen
RUNNING = frozenset({"training", "aggregating", "evaluating"})
TROUBLE_STYLE = {0: "red", 1: "red", 2: "yellow", 3: "yellow", 4: "yellow"}  # by rank
JOB_STYLE = {"failed": "red", "cancelled": "yellow", "finished": "green", "paused": "yellow"}


@dataclass(frozen=True)
class Glance:
    """What the coordinator said when it was asked last.

    Attributes:
        at: by this machine's clock.
        jobs: oldest first.
        workers: all that ever joined.
        away: why nothing newer is known; empty: this is now.
        back: that the coordinator is back, after how long.
    """

    at: datetime
    jobs: tuple[JobView, ...] = ()
    workers: tuple[WorkerView, ...] = ()
    away: str = ""
    back: str = ""


@dataclass(frozen=True)
class Line:
    """One line of the screen, and the style that it has where there is colour."""

    text: str
    style: str = ""


# ---------------------------------------------------------------- how long it will take


class Paces:
    """How fast rounds close, as seen from here. Before two were seen to close: as fast as since the job was sent."""

    def __init__(self) -> None:
        self._closings: dict[str, deque[tuple[float, int]]] = {}  # job -> (monotonic seconds, rounds closed by then)
        self._sent_s: dict[str, float] = {}  # job -> seconds since it was submitted

    def take(self, jobs: Sequence[JobView], now: float, clock: datetime) -> None:
        """Learn from a glance.

        Args:
            jobs: as they are.
            now: monotonic seconds.
            clock: the coordinator's, which dated the submissions.
        """
        known = {job.id for job in jobs}
        self._closings = {job: seen for job, seen in self._closings.items() if job in known}
        for job in jobs:
            seen = self._closings.setdefault(job.id, deque(maxlen=ROUNDS_SEEN))
            if not seen or seen[-1][1] != job.round:
                seen.append((now, job.round))
            self._sent_s[job.id] = (clock - datetime.fromisoformat(job.submitted_at)).total_seconds()

    def left_s(self, job: JobView, now: float) -> float | None:
        """Seconds until the job's last round closes; None: nothing can be foretold."""
        if job.state not in RUNNING or job.round >= job.rounds:
            return None
        seen = self._closings.get(job.id, deque())
        closings = list(seen)[1:]  # the first is when it was looked at first: mid-round
        if len(closings) >= 2 and closings[-1][1] > closings[0][1]:
            (began, first), (ended, last) = closings[0], closings[-1]
            a_round = (ended - began) / (last - first)
            return max(0.0, a_round * (job.rounds - job.round) - (now - ended))
        sent_s = self._sent_s.get(job.id, 0.0)
        return sent_s / job.round * (job.rounds - job.round) if job.round and sent_s > 0 else None


# ---------------------------------------------------------------- rows


def rank(worker: WorkerView) -> int:
    """How much a worker needs a person: 0 the most, 7 works and all is well, 8 left long ago."""
    if worker.state in ("set aside", "degraded"):
        return 0 if worker.state == "set aside" else 1
    if worker.state == "gone":
        return 8 if worker.last_seen_s < 0 or worker.last_seen_s > LONG_GONE_S else 2
    if worker.warnings or any((speed.expected_in_s or 0.0) < 0 for speed in worker.speeds):
        return 3
    return {"paused": 4, "draining": 4, "resting": 5, "idle": 6}.get(worker.state, 7)


def by_trouble(workers: Sequence[WorkerView]) -> list[WorkerView]:
    """The workers, those that need a person first."""
    return sorted(workers, key=lambda worker: (rank(worker), worker.name, worker.id))


WORKER_HEADER = ("WORKER", "STATE", "DEVICE", "MEMORY", "TEMP", "PATH", "SPEED", "DOING", "WHY")
JOB_HEADER = ("JOB", "STATE", "ROUND", "LOSS", "ACCURACY", "LEFT", "WHY")
RIGHT = frozenset({"MEMORY", "TEMP", "SPEED", "ROUND", "LOSS", "ACCURACY", "LEFT"})


def worker_cells(worker: WorkerView) -> list[str]:
    """One row of the fleet."""
    progress = worker.progress
    measured = [speed.samples_per_s for speed in worker.speeds if speed.samples_per_s is not None]
    speed = (
        progress.samples_per_s if progress and progress.samples_per_s is not None else next(reversed(measured), None)
    )
    heat = progress.temperature if progress else None
    cells = [
        worker.name,
        worker.state,
        _device(worker),
        _memory(worker),
        shown.NOTHING if heat is None else f"{heat:.0f} °C",
        worker.path.kind if worker.path and worker.path.kind != "unknown" else shown.NOTHING,
        shown.NOTHING if speed is None else f"{speed:,.0f}/s",
        _doing(worker),
        "; ".join([*worker.warnings, worker.reason]),
    ]
    return [shown.one_line(cell) for cell in cells]


def _device(worker: WorkerView) -> str:
    torch = worker.hardware.torch
    named = torch.name or next((gpu.name for gpu in worker.hardware.gpus[:1] if torch.device.startswith("cuda")), "")
    return " ".join([*([f"{torch.ranks}×"] if torch.ranks > 1 else []), torch.device, *([named] if named else [])])


def _memory(worker: WorkerView) -> str:
    """Taken and there, of the device that trains; for a CPU, of the machine."""
    on_gpu = worker.hardware.torch.device.startswith("cuda")
    there = worker.hardware.torch.memory if on_gpu else worker.hardware.memory
    used = worker.progress.memory_used if worker.progress else None
    if used is None:
        return shown.size(there) if there else shown.NOTHING
    return f"{shown.size(used)} of {shown.size(there)}" if there else shown.size(used)


def _doing(worker: WorkerView) -> str:
    progress = worker.progress
    if worker.assignment is None:
        return shown.NOTHING
    if progress is None:
        return worker.assignment
    steps = f" {progress.step}/{progress.steps}" if progress.steps else f" {progress.step}" if progress.step else ""
    return f"{worker.assignment}, {progress.doing}{steps}"


def job_cells(job: JobView, loss: float | None, left_s: float | None) -> list[str]:
    """One row of the jobs."""
    cells = [
        job.id,
        job.state,
        f"{job.round}/{job.rounds}",
        shown.measure(loss if loss is not None else job.metrics.get("loss")),
        shown.measure(job.metrics.get("accuracy")),
        shown.NOTHING if left_s is None else shown.duration(left_s),
        job.reason,
    ]
    return [shown.one_line(cell) for cell in cells]


def losses(workers: Sequence[WorkerView]) -> dict[str, float]:
    """Job -> the mean of the losses that workers report of it just now."""
    told: dict[str, list[float]] = {}
    for worker in workers:
        if worker.assignment is not None and worker.progress is not None and worker.progress.loss is not None:
            told.setdefault(worker.assignment.partition(":")[0], []).append(worker.progress.loss)
    return {job: sum(values) / len(values) for job, values in told.items()}


def shown_jobs(jobs: Sequence[JobView]) -> list[JobView]:
    """Those that go on, oldest first, then the newest of those that are over."""
    over = [job for job in jobs if job.state in OVER]
    return [*(job for job in jobs if job.state not in OVER), *reversed(over[-OVER_SHOWN:])]


# ---------------------------------------------------------------- the screen


def screen(glance: Glance, left_s: Mapping[str, float | None], *, url: str, height: int | None = None) -> list[Line]:
    """The whole screen.

    Args:
        glance: what is known.
        left_s: job -> seconds until it is done; None: not known.
        url: the coordinator's.
        height: lines that there is room for; None: as many as it takes.
    """
    standing = Counter(worker.state for worker in glance.workers)
    counted = ", ".join(f"{number} {state}" for state, number in standing.most_common())
    fleet = shown.several(len(glance.workers), "worker")
    head = [Line(f"{url}  {glance.at.astimezone():%H:%M:%S}  {fleet}{f': {counted}' if counted else ''}", "bold")]
    head += [Line(shown.one_line(glance.away), "bold red")] if glance.away else []
    head += [Line(glance.back, "green")] if glance.back else []
    loss = losses(glance.workers)
    jobs, workers = shown_jobs(glance.jobs), by_trouble(glance.workers)
    room = None if height is None else height - len(head) - 4  # two headers, two empty lines
    for_jobs, for_workers = _rooms(room, len(jobs), len(workers))
    job_rows = [job_cells(job, loss.get(job.id), left_s.get(job.id)) for job in jobs[:for_jobs]]
    job_styles = [JOB_STYLE.get(job.state, "") for job in jobs[:for_jobs]]
    rows = [worker_cells(worker) for worker in workers[:for_workers]]
    styles = [TROUBLE_STYLE.get(rank(worker), "") for worker in workers[:for_workers]]
    return [
        *head,
        Line(""),
        *_table(JOB_HEADER, job_rows, job_styles, "no job yet: `lydian submit --help` says how to send one"),
        *_rest([job.state for job in jobs[for_jobs:]]),
        Line(""),
        *_table(WORKER_HEADER, rows, styles, "no worker yet: `lydian serve` prints the line that starts one"),
        *_rest([worker.state for worker in workers[for_workers:]]),
    ]


def _rooms(room: int | None, jobs: int, workers: int) -> tuple[int, int]:
    """Rows of jobs and of workers that fit: a third for jobs, and more where workers leave it. A rest needs a line."""
    if room is None or jobs + workers <= room:
        return jobs, workers
    for_jobs = min(jobs, max(LEAST_ROWS, room // 3, room - workers))
    for_workers = max(LEAST_ROWS, room - for_jobs)
    return (
        for_jobs if for_jobs >= jobs else max(1, for_jobs - 1),
        for_workers if for_workers >= workers else max(1, for_workers - 1),
    )


def _table(header: Sequence[str], rows: list[list[str]], styles: list[str], none: str) -> list[Line]:
    if not rows:
        return [Line(none)]
    top, *lines = shown.columns(header, rows, right=RIGHT)
    return [Line(top, "dim"), *(Line(text, style) for text, style in zip(lines, styles, strict=True))]


def _rest(states: Sequence[str]) -> list[Line]:
    """What there is no room for, counted."""
    if not states:
        return []
    counted = ", ".join(f"{number} {state}" for state, number in Counter(states).most_common())
    return [Line(f"… and {len(states)} more: {counted}", "dim")]


def document(glance: Glance, left_s: Mapping[str, float | None]) -> str:
    """A glance as one JSON document on one line: {at, away, jobs, workers}; a job has `left_s` beside its view."""
    jobs = [job.model_dump(mode="json") | {"left_s": left_s.get(job.id)} for job in glance.jobs]
    workers = [worker.model_dump(mode="json") for worker in by_trouble(glance.workers)]
    at = glance.at.isoformat(timespec="seconds").replace("+00:00", "Z")
    return json.dumps({"at": at, "away": glance.away, "jobs": jobs, "workers": workers}, ensure_ascii=False)


# ---------------------------------------------------------------- looking


class Lookout:
    """Asks the coordinator, and remembers what it said while it is away."""

    def __init__(self, api: CoordinatorApi, clock: Callable[[], float] = time.monotonic) -> None:
        self._api, self._clock = api, clock
        self._paces = Paces()
        self._last: Glance | None = None
        self._away_since: float | None = None
        self._back: tuple[float, str] = (0.0, "")  # until when it is said, and what
        self._offset: timedelta | None = None  # the coordinator's clock is ahead by so much

    @property
    def left_s(self) -> dict[str, float | None]:
        """Job -> seconds until it is done."""
        now = self._clock()
        return {job.id: self._paces.left_s(job, now) for job in (self._last.jobs if self._last else ())}

    def look(self) -> Glance:
        """Ask once.

        Raises:
            LydianError: it refuses, or has never answered; one that answered before is waited for instead.
        """
        try:
            jobs, workers = tuple(self._api.jobs()), tuple(self._api.workers())
        except UnavailableError as error:
            if self._last is None:
                raise
            return self._missing(self._last, error)
        now, at = self._clock(), datetime.now(UTC)
        if self._away_since is not None:
            back = f"the coordinator is back, after {shown.duration(now - self._away_since)}"
            self._away_since, self._back = None, (now + BACK_S, back)
        if self._offset is None:
            self._offset = (self._api.wall_clock() or at) - at
        self._paces.take(jobs, now, at + self._offset)
        self._last = Glance(at, jobs, workers, back=self._back[1] if now < self._back[0] else "")
        return self._last

    def _missing(self, last: Glance, error: LydianError) -> Glance:
        now = self._clock()
        self._away_since = self._away_since if self._away_since is not None else now
        since = shown.duration(now - self._away_since)
        said_at = f"{last.at.astimezone():%H:%M:%S}"
        away = f"no answer for {since}, asking again: {error}; below is what it said last, at {said_at}"
        self._last = replace(last, back="")
        return replace(self._last, away=away)


@contextmanager
def keys() -> Iterator[Callable[[float], bool]]:
    """What waits so many seconds and says whether `q` was pressed. Without a terminal to read from nothing is."""
    nobody = threading.Event()
    if not sys.stdin.isatty():
        yield nobody.wait
        return
    try:
        import select
        import termios
        import tty
    except ImportError:  # Windows: Ctrl-C leaves
        yield nobody.wait
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)

    def pressed(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([keyboard], [], [], left)[0]:
                typed = os.read(keyboard, 64)  # not through sys.stdin, which would keep what select then does not see
                if not typed or b"q" in typed.lower():
                    return True
        return False

    try:
        tty.setcbreak(keyboard)
        yield pressed
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def run_top(api: CoordinatorApi, *, every_s: float, once: bool, as_json: bool) -> Ending:
    """Show the fleet until `q`, Ctrl-C or, with `once`, once.

    Returns:
        The exit code: Ctrl-C is how one leaves, and no error.
    """
    lookout = Lookout(api)
    try:
        if as_json or once or not shown.fancy():
            _print(lookout, api.url, every_s, once=once, as_json=as_json)
        else:
            _draw(lookout, api.url, every_s)
    except KeyboardInterrupt:
        pass
    return Ending.FINE


def _print(lookout: Lookout, url: str, every_s: float, *, once: bool, as_json: bool) -> None:
    """Plain text or JSON, one after the other."""
    pause, first = threading.Event(), True
    while True:
        glance = lookout.look()
        left_s = lookout.left_s
        if as_json:
            typer.echo(document(glance, left_s))
        else:
            said = [line.text for line in screen(glance, left_s, url=url)]
            typer.echo("\n".join([*([] if first else [""]), *said]))
        sys.stdout.flush()
        if once:
            return
        first = False
        pause.wait(every_s)


def _draw(lookout: Lookout, url: str, every_s: float) -> None:
    """A picture on the terminal's other screen, which is gone when one leaves."""
    from rich.live import Live

    glance = lookout.look()  # before the screen changes, so that a first failure is an ordinary error
    with keys() as pressed, Live(screen=True, auto_refresh=False) as live:
        while True:
            live.update(picture(glance, lookout.left_s, url=url, height=live.console.height), refresh=True)
            if pressed(every_s):
                return
            glance = lookout.look()


def picture(glance: Glance, left_s: Mapping[str, float | None], *, url: str, height: int) -> "RenderableType":
    """The screen in colour, each line cut to the terminal's width."""
    from rich.console import Group
    from rich.text import Text

    lines: list[Any] = [
        Text(line.text, style=line.style, no_wrap=True, overflow="ellipsis")
        for line in screen(glance, left_s, url=url, height=height - 1)
    ]
    return Group(*lines, Text("q leaves", style="dim"))
