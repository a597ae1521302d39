"""`lydian watch`: a job's events, shown as they come.

The board is pure: facts in, rows out. Three views show it: lines of JSON, plain lines for a pipe, and a picture that
renews itself on a terminal. A watcher only looks: ending it changes nothing.

    api.events ──▶ follow ──▶ view.show(event) ──▶ Board.take(fact) ──▶ plain_line | render
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, get_args

import typer
from pydantic import ValidationError

from client import shown
from client.calling import Ending
from common import begins, privacy
from common.api import CoordinatorApi
from common.facts import (
    Absent,
    Evaluated,
    EvaluationGivenUp,
    Extended,
    Fact,
    HandedBack,
    Initialised,
    Late,
    Lost,
    Measured,
    Now,
    OpenedAnew,
    Restored,
    RoundClosed,
    StateChanged,
    Submitted,
    WorkerMeasured,
    WorkerNow,
)
from common.messages import OVER, JobView, Message, Progress

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN_ROUNDS = 10  # rows of the table on a terminal
SHOWN_TROUBLES = 3
ETA_ROUNDS = 5  # rounds whose mean length foretells the rest
QUIET_S = 30.0  # seconds without a line after which plain output says what is awaited
BUSY = frozenset({"training", "aggregating", "evaluating"})  # states in which rounds speak for themselves

Event = Mapping[str, Any]
_FACTS: dict[str, type[Message]] = {k.model_fields["type"].default: k for k in (*get_args(get_args(Fact)[0]), Now)}


def read_event(event: Event) -> Message | None:
    """The fact that an event is; None for one that this version does not know, or cannot read.

    Fields that a newer coordinator added are passed over: a watcher shows what it understands.
    """
    kind = _FACTS.get(str(event.get("type")))
    if kind is None:
        return None
    try:
        return kind.model_validate({name: value for name, value in event.items() if name in kind.model_fields})
    except ValidationError:
        return None


# ---------------------------------------------------------------- the board


@dataclass(frozen=True, slots=True)
class Row:
    """One closed round, and its evaluation, which may come later."""

    closed: RoundClosed
    evaluation: Evaluated | None = None

    def measured(self, name: str) -> float | None:
        """A metric of the evaluation; of the round itself if it brought one of that name."""
        found = self.evaluation.metrics.get(name) if self.evaluation else None
        return found if found is not None else self.closed.metrics.get(name)


class Board:
    """What is known of a job: takes its facts in order, answers what to show. Shows nothing itself."""

    def __init__(self, job: JobView) -> None:
        self.job = job
        self.state: str = job.state
        self.reason = job.reason
        self.rows: dict[int, Row] = {}
        self.best: int | None = None  # the round whose model measured best
        self.now: Now | None = None
        self.troubles: deque[str] = deque(maxlen=SHOWN_TROUBLES)
        self.waiting: str | None = None
        self.warnings = job.warnings
        self._planned: tuple[str, ...] = ()  # what its privacy will cost

    def take(self, fact: Message) -> None:
        """Learn a fact."""
        self.waiting = None
        match fact:
            case Submitted():
                self._planned = privacy.budget_words(fact.spec, fact.affordable, fact.planned_epsilon)
            case Initialised():
                self.warnings = (*privacy.warnings(self.job.spec, fact.facts.parameters), *self._planned)
            case RoundClosed():
                self.rows[fact.round] = Row(fact)
                if fact.warning:
                    self.troubles.append(f"round {fact.round}: {shown.one_line(fact.warning)}")
            case Evaluated():
                self.best = fact.round if fact.best else self.best
                if fact.round in self.rows:
                    self.rows[fact.round] = replace(self.rows[fact.round], evaluation=fact)
            case Now():
                self.now, self.state, self.reason = fact, fact.state, fact.reason
            case StateChanged():
                self.now, self.state, self.reason = None, fact.state, fact.reason
            case HandedBack() | Late() | Lost() | Restored() | Extended() | EvaluationGivenUp() | OpenedAnew():
                self.troubles.append(plain_line(fact, self) or "")
            case Measured() if fact.why:
                self.troubles.append(plain_line(fact, self) or "")
            case _:
                pass

    @property
    def over(self) -> bool:
        """Whether the job has ended."""
        return self.state in OVER

    @property
    def progress(self) -> float:
        """Rounds done, the open one by the share of its updates that are in."""
        now, closed = self.now, next(reversed(self.rows), 0)
        part = now.received / now.shards if now and now.shards and now.round > closed else 0.0
        return min(closed + part, float(self.job.rounds))

    @property
    def seconds_left(self) -> float | None:
        """Foretold from the mean of the last rounds; None before the first and after the end."""
        lengths = [row.closed.seconds for row in self.last(ETA_ROUNDS)]
        if not lengths or self.over:
            return None
        return sum(lengths) / len(lengths) * (self.job.rounds - self.progress)

    def last(self, rounds: int) -> list[Row]:
        """The newest closed rounds, oldest first."""
        return list(islice(reversed(self.rows.values()), rounds))[::-1]


# ---------------------------------------------------------------- plain


def plain_line(fact: Message, board: Board) -> str | None:
    """The line about a fact in a pipe; None where a person is not served by one. No control characters."""
    line = _plain_line(fact, board)
    return None if line is None else shown.one_line(line)


def _plain_line(fact: Message, board: Board) -> str | None:
    match fact:
        case Submitted():
            said = [f"submitted: {fact.spec.task}, {shown.several(fact.spec.rounds, 'round')}"]
            said += [f"begins with {begins.words(fact.begins_with)}"] if fact.begins_with else []
            return "; ".join([*said, *privacy.budget_words(fact.spec, fact.affordable, fact.planned_epsilon)])
        case Initialised():
            said = [f"model built: {shown.several(fact.facts.parameters, 'parameter')}, {shown.size(fact.size)}"]
            return "; ".join([*said, *privacy.warnings(board.job.spec, fact.facts.parameters)])
        case StateChanged():
            return f"{fact.state}: {fact.reason}"
        case RoundClosed():
            return _round_line(fact, board.job.rounds)
        case Evaluated():
            found = ", ".join([*_named(fact.metrics), *_lowest_named(fact.metrics)])
            line = f"evaluation of round {fact.round}: {found}{' (best)' if fact.best else ''}"
            return "; ".join([line, *(f"{one.worker_name}: {_worker_words(one)}" for one in fact.workers)])
        case Measured() if fact.why:
            return f"{fact.worker_name} has no numbers of round {fact.round}: {fact.why}"
        case EvaluationGivenUp():
            return f"round {fact.round} is not evaluated: {fact.reason}"
        case HandedBack():
            work = f"{fact.kind} of round {fact.round}, shard {fact.shard}, attempt {fact.attempt}"
            advice = f"; what to do: {fact.advice}" if fact.advice else ""
            return f"{fact.worker_name} gave back {work}: {fact.sentence} ({fact.code}){advice}"
        case Late():
            return f"an update of round {fact.round}, shard {fact.shard} came too late and is not used"
        case Lost():
            return f"after a power cut: {fact.reason}"
        case Restored():
            return f"{fact.worker_name} sent the update of round {fact.round}, shard {fact.shard} again"
        case OpenedAnew():
            return f"round {fact.round} begins once more: {fact.reason}"
        case Extended():
            return f"round {fact.round} gets more time: {fact.reason}"
        case _:
            return None


def _named(metrics: Mapping[str, float]) -> list[str]:
    """Metrics in words, without those of single classes."""
    return [f"{name} {shown.measure(value)}" for name, value in metrics.items() if "/" not in name]


def _lowest(metrics: Mapping[str, float]) -> tuple[str, float] | None:
    """Of metrics of single classes (`accuracy/3`) the lowest, the first of equals; None: there are none."""
    classes = [(name, value) for name, value in metrics.items() if "/" in name]
    return min(classes, key=lambda one: one[1], default=None)


def _lowest_named(metrics: Mapping[str, float]) -> list[str]:
    found = _lowest(metrics)
    return [] if found is None else [f"lowest {found[0]} {shown.measure(found[1])}"]


def _worker_words(one: WorkerMeasured) -> str:
    """What one worker's own test data says: its metrics and samples, or why there are none."""
    if one.why:
        return one.why
    return ", ".join([*_named(one.metrics), shown.several(one.samples, "sample")])


def _round_line(fact: RoundClosed, rounds: int) -> str:
    parts = [
        shown.duration(fact.seconds),
        shown.several(fact.workers, "worker"),
        shown.several(fact.samples, "sample"),
        f"down {shown.size(fact.bytes_down)}",
        f"up {shown.size(fact.bytes_up)}",
        *(f"{name.replace('_', ' ')} {shown.measure(value)}" for name, value in fact.metrics.items()),
        *([privacy.spent_words(fact.privacy.epsilon, fact.privacy.delta)] if fact.privacy else []),
        *([f"{shown.several(fact.left_out, 'shard')} left out"] if fact.left_out else []),
        *([f"{shown.several(fact.fresh, 'shard')} began fresh"] if fact.fresh else []),
    ]
    warning = [f"caution: {fact.warning}"] if fact.warning else []
    late = [f"with {one.worker_name}'s late update of round {one.round} (x {one.factor:.2f})" for one in fact.late]
    return "; ".join(
        [f"round {fact.round} of {rounds}: {', '.join(parts)}", *late, *map(absent_words, fact.absent), *warning]
    )


def absent_words(one: Absent) -> str:
    """Who is not in a round, and why: `shard 2, gpu2: fell behind: …`, `cpu: evaluates only: …`."""
    where = [f"shard {one.shard}"] if one.shard is not None else []
    return f"{', '.join([*where, *([one.worker_name] if one.worker_name else [])])}: {one.why}"


# ---------------------------------------------------------------- a terminal


def round_table(rows: Collection[Row], best: int | None) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of rounds; the best has a star. A metric has a column when a round has it.

    Of single classes the lowest is shown, and of what workers measured on their own data the first metric of each.
    """
    names = {name for row in rows if row.evaluation for name in row.evaluation.metrics if "/" not in name}
    ordered = sorted(names, key=lambda name: (name != "accuracy", name))
    header = ["round", "seconds", "workers", "samples", "↓", "↑", "train loss", *ordered]
    cells = [_cells(row, ordered, "*" if row.closed.round == best else "") for row in rows]
    measured = [row.evaluation for row in rows if row.evaluation]
    if any(_lowest(one.metrics) for one in measured):
        header.append("lowest class")
        for line, row in zip(cells, rows, strict=True):
            found = _lowest(row.evaluation.metrics) if row.evaluation else None
            line.append(shown.NOTHING if found is None else f"{found[0].partition('/')[2]}: {shown.measure(found[1])}")
    if any(one.workers for one in measured):
        header.append("by worker")
        for line, row in zip(cells, rows, strict=True):
            line.append(_by_worker(row.evaluation, next(iter(ordered), "")))
    if any(row.closed.privacy for row in rows):
        header.append("ε")
        for line, row in zip(cells, rows, strict=True):
            line.append(privacy.shown_epsilon(row.closed.privacy.epsilon) if row.closed.privacy else "")
    if any(row.closed.absent for row in rows):
        header.append("without")
        for line, row in zip(cells, rows, strict=True):
            line.append(shown.one_line("; ".join(map(absent_words, row.closed.absent))))
    return header, cells


def _by_worker(evaluation: Evaluated | None, metric: str) -> str:
    """One metric of each worker that measured: `gpu1 0.91, attic 0.84`; a dash for one that has none."""
    if evaluation is None or not evaluation.workers:
        return shown.NOTHING
    values = (f"{one.worker_name} {shown.measure(one.metrics.get(metric))}" for one in evaluation.workers)
    return shown.one_line(", ".join(values))


def _cells(row: Row, metrics: Iterable[str], star: str) -> list[str]:
    closed = row.closed
    return [
        f"{star} {closed.round}".lstrip(),
        shown.duration(closed.seconds),
        shown.count(closed.workers),
        shown.count(closed.samples),
        shown.size(closed.bytes_down),
        shown.size(closed.bytes_up),
        shown.measure(closed.metrics.get("train_loss")),
        *(shown.measure(row.measured(name)) for name in metrics),
    ]


def render(board: Board) -> "RenderableType":
    """The picture of a job on a terminal: state, progress, workers, the last rounds, the last troubles."""
    from rich import box
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    job = board.job
    colour = {"finished": "green", "failed": "red", "cancelled": "yellow"}.get(board.state, "cyan")
    head = Text.assemble(
        (job.id, "bold"), f"  {job.name}  ", (board.state, colour), f"  {shown.one_line(board.reason)}"
    )
    left = board.seconds_left
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        Text(f"round {int(board.progress)}/{job.rounds}{_updates_in(board)}"),
        ProgressBar(total=job.rounds, completed=board.progress, width=40),
        Text("" if left is None else f"about {shown.duration(left)} left"),
    )
    parts: list[RenderableType] = [head, bar]
    parts += [Text(f"began with {begins.words(job.begins_with)}")] if job.begins_with else []
    parts += [Text(shown.one_line(warning), style="yellow") for warning in board.warnings]
    if board.waiting:
        parts.append(Text(shown.one_line(board.waiting), style="yellow"))
    if board.now and board.now.workers:
        parts.append(_worker_grid(board.now.workers))
    if board.rows:
        header, cells = round_table(board.last(SHOWN_ROUNDS), board.best)
        table = Table(*header, box=box.SIMPLE_HEAD)
        for column in table.columns:
            column.justify = "right"
        for row in cells:
            table.add_row(*row, style="bold" if row[0].startswith("*") else None)
        parts.append(table)
    parts += [Text(trouble, style="yellow") for trouble in board.troubles]
    return Group(*parts)


def _updates_in(board: Board) -> str:
    """Of the open round."""
    now = board.now
    if now is None or not now.shards or board.over:
        return ""
    return f", {now.received} of {shown.several(now.shards, 'update')} in"


def _worker_grid(workers: Iterable[WorkerNow]) -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for worker in workers:
        cells = [worker.worker, worker.doing, *progress_cells(worker.progress), expected(worker.expected_in_s)]
        grid.add_row(*(Text(shown.one_line(cell)) for cell in cells))
    return grid


def expected(seconds: float | None) -> str:
    """When an update is expected, by its worker's own history; empty where that is not known."""
    if seconds is None:
        return ""
    late = shown.duration(-seconds)
    return f"expected in {shown.duration(seconds)}" if seconds >= 0 else f"falls behind by {late}"


def progress_cells(progress: Progress | None) -> tuple[str, str, str, str]:
    """What a worker does, its steps, its speed and its loss; empty where it has not said."""
    if progress is None:
        return "", "", "", ""
    steps = f"{progress.step}/{progress.steps}" if progress.steps else str(progress.step or "")
    speed = "" if progress.samples_per_s is None else f"{progress.samples_per_s:,.0f} samples/s"
    loss = "" if progress.loss is None else f"loss {shown.measure(progress.loss)}"
    return progress.doing, steps, speed, loss


# ---------------------------------------------------------------- views


class View(Protocol):
    """Whatever shows a job's events."""

    def opened(self) -> AbstractContextManager[object]:
        """Shown while this lasts."""

    def show(self, event: Event) -> None:
        """Show one event."""

    def waiting(self, sentence: str) -> None:
        """Say that the coordinator is away."""


class JsonView:
    """One JSON object a line: every fact as it came; `now` events, which are no facts, are left out."""

    def opened(self) -> AbstractContextManager[object]:
        """Nothing to open."""
        return nullcontext()

    def show(self, event: Event) -> None:
        """Print one fact."""
        if event.get("type") != Now.model_fields["type"].default:
            typer.echo(json.dumps(event))

    def waiting(self, sentence: str) -> None:
        """Say it on stderr."""
        typer.echo(sentence, err=True)


class PlainView:
    """One line a closed round, evaluation, change or trouble; and what is awaited, where that is news."""

    def __init__(self, board: Board, clock: Callable[[], float] = time.monotonic) -> None:
        self.board = board
        self._clock = clock
        self._awaited = ""  # the last line that said what is awaited
        self._said_at = clock()
        self._is_away = False

    def opened(self) -> AbstractContextManager[object]:
        """Nothing to open."""
        return nullcontext()

    def show(self, event: Event) -> None:
        """Print the line about one event, if it has one."""
        fact = read_event(event)
        if fact is None:
            return
        self._is_away = False
        self.board.take(fact)
        line = self._news(fact) if isinstance(fact, Now) else plain_line(fact, self.board)
        left = self.board.seconds_left if isinstance(fact, RoundClosed) else None
        if line is not None:
            typer.echo(f"{line}; about {shown.duration(left)} left" if left else line)
            self._said_at = self._clock()
            self._awaited = line if isinstance(fact, Now | StateChanged) else self._awaited

    def waiting(self, sentence: str) -> None:
        """Say it on stderr, once each time the coordinator goes away."""
        if not self._is_away:
            self._is_away = True
            typer.echo(shown.one_line(sentence), err=True)

    def _news(self, now: Now) -> str | None:
        """What the job waits for: at once while no round runs, and where a round has been quiet for long."""
        line = shown.one_line(f"{now.state}: {now.reason}")
        is_quiet = now.state not in BUSY or self._clock() - self._said_at > QUIET_S
        return line if is_quiet and line != self._awaited else None


class LiveView:
    """A picture on a terminal, drawn four times a second by a thread of rich's, however fast the events come."""

    def __init__(self, board: Board, *, keep: bool = True) -> None:
        from rich.live import Live

        self.board = board
        self._lock = threading.Lock()
        self._live: Live = Live(get_renderable=self._draw, refresh_per_second=4, transient=not keep)

    def opened(self) -> AbstractContextManager[object]:
        """The picture, which stays or goes at the end as was chosen."""
        return self._live

    def show(self, event: Event) -> None:
        """Learn from one event."""
        fact = read_event(event)
        if fact is not None:
            with self._lock:
                self.board.take(fact)

    def waiting(self, sentence: str) -> None:
        """Show that the coordinator is away, until the next event."""
        with self._lock:
            self.board.waiting = sentence

    def _draw(self) -> "RenderableType":
        with self._lock:
            return render(self.board)


def view_for(board: Board, *, as_json: bool, keep: bool = True) -> View:
    """The view that fits: JSON when asked for, a picture on a terminal, else plain lines."""
    if as_json:
        return JsonView()
    return LiveView(board, keep=keep) if shown.fancy() else PlainView(board)


def follow(events: Iterable[Event], view: View) -> str:
    """Show events until they end; the state that the job ended in."""
    state = ""
    with view.opened():
        for event in events:
            view.show(event)
            if event.get("type") == "job":
                state = str(event["state"])
    return state


def watch(api: CoordinatorApi, job: JobView, *, as_json: bool) -> Ending:
    """Show a job until it is over.

    Returns:
        The exit code for how it ended.
    """
    view = view_for(Board(job), as_json=as_json)
    try:
        state = follow(api.events(job.id, on_wait=view.waiting), view)
    except KeyboardInterrupt:
        return interrupted(job.id)
    return ending_of(state)


def ending_of(state: str) -> Ending:
    """The exit code of a command that looked on until a job ended in this state."""
    return {"finished": Ending.FINE, "cancelled": Ending.CANCELLED}.get(state, Ending.FAILED)


def interrupted(job: str) -> Ending:
    """Say that a job goes on, whose watcher was told to stop; the exit code for it."""
    typer.echo(f"{job} goes on; `lydian watch {job}` shows it again, `lydian cancel {job}` ends it", err=True)
    return Ending.INTERRUPTED
