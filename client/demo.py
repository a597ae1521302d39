"""`lydian demo`: a coordinator and a few workers on this machine, real training, the accuracy, and nothing left behind.

folder/coordinator/   its state        folder/worker-1/ …   theirs        folder/*.log   what they said
"""

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from uuid import uuid4

import typer

from client import shown
from client.job_file import Job, flag_layer, read_job
from client.running import Child, Children, python_module, wait_for_line
from client.task_file import is_task_file
from client.watching import Board, Event, LiveView, PlainView, follow, round_table
from common.api import CoordinatorApi
from common.errors import LydianError
from common.messages import JobRequest

READY_S = 60.0  # for the coordinator to listen, on a machine that is busy


def run_demo(*, rounds: int, workers: int, task: str, keep: bool) -> None:
    """Train a task for a few rounds on this machine and print the table of rounds and the final accuracy.

    Raises:
        LydianError: the job is wrong or did not finish, or a part ended by itself; the logs were shown.
    """
    flags = {("task",): task, ("rounds",): str(rounds), ("round", "min_workers"): str(workers)}
    flags |= {("data", "shards"): str(workers)}  # a cut that follows measured speeds would end elsewhere each time
    job = read_job(None, flag_layer(flags), {})
    folder = Path(tempfile.mkdtemp(prefix="lydian-demo-"))
    try:
        with ended_by_signals(), Children(folder) as children:
            _train(children, job, workers, trust_any=is_task_file(task))
    finally:
        if keep:
            typer.echo(f"everything is kept in {folder}", err=True)
        else:
            shutil.rmtree(folder)


def _train(children: Children, job: Job, workers: int, *, trust_any: bool) -> None:
    try:
        url, state = start_coordinator(children)
        _start_workers(children, workers, url, (state / "join.token").read_text().strip(), trust_any=trust_any)
        with CoordinatorApi(url, (state / "admin.token").read_text().strip()) as api:
            board = _watch(api, job, children)
            check_finished(board, "--keep")
    except LydianError:
        for child in children.started:
            show_log(child)
        raise
    header, rows = round_table(list(board.rows.values()), board.best)
    shown.print_table(header, rows, right=header)
    name, value = final(board)
    typer.echo(f"final {name} {shown.measure(value)}")


def start_coordinator(children: Children, settings: Mapping[str, str] | None = None) -> tuple[str, Path]:
    """Start a coordinator on loopback, with settings of its own. Returns its address and its state folder."""
    state = children.folder / "coordinator"
    typer.echo(f"starting a coordinator in {children.folder}", err=True)
    arguments = ["--host", "127.0.0.1", "--port", "0", "--state-dir", str(state)]
    child = children.start(
        "coordinator", python_module("server", arguments), clean_environment() | dict(settings or {})
    )
    return wait_for_line(child, "ready ", timeout_s=READY_S), state


def _start_workers(children: Children, number: int, url: str, join_token: str, *, trust_any: bool) -> None:
    typer.echo(f"starting {shown.several(number, 'worker')}", err=True)
    for at in range(1, number + 1):
        state = str(children.folder / f"worker-{at}")
        arguments = [url, "--name", f"demo-{at}", "--state-dir", state, "--threads", "1"]
        if trust_any:  # the file is the user's own, and so is the machine
            arguments += ["--trust", "any"]
        environment = clean_environment() | {"LYDIAN_TOKEN": join_token}  # not in argv, which all can see
        children.start(f"worker-{at}", python_module("worker", arguments), environment)


def _watch(api: CoordinatorApi, job: Job, children: Children) -> Board:
    view_of_job = api.submit_job(JobRequest(spec=job.spec, task_source=job.task_source, key=uuid4().hex))
    board = Board(view_of_job)
    view = LiveView(board, keep=False) if shown.fancy() else PlainView(board)

    def waiting(sentence: str) -> None:
        children.check()  # a coordinator that has ended will not come back
        view.waiting(sentence)

    follow(checked(api.events(view_of_job.id, on_wait=waiting), children.check), view)
    return board


def check_finished(board: Board, keeps: str) -> None:
    """Make sure that the job finished.

    Raises:
        LydianError: job_not_finished; `keeps` is the option that would keep everything.
    """
    if board.state != "finished":
        raise LydianError(
            f"the job {board.state}: {shown.one_line(board.reason)}",
            code="job_not_finished",
            advice=f"The logs above say more; {keeps} keeps everything.",
        )


def checked(events: Iterable[Event], check: Callable[[], None]) -> Iterator[Event]:
    """The events, as long as all parts run: a job whose workers have died would wait for ever."""
    for event in events:
        yield event
        check()


def final(board: Board) -> tuple[str, float | None]:
    """The measure of the last evaluated model: its accuracy, or what the task has instead."""
    metrics = next((row.evaluation.metrics for row in reversed(board.rows.values()) if row.evaluation), {})
    name = next((name for name in ("accuracy", board.job.spec.target_metric) if name in metrics), None)
    name = name or next(iter(metrics), "accuracy")
    return name, metrics.get(name)


def clean_environment() -> dict[str, str]:
    """This environment without the settings of other coordinators and workers."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LYDIAN_")}


def show_log(child: Child) -> None:
    """The last lines of a child's log, on stderr."""
    tail = child.tail()
    if tail:
        typer.echo(f"--- {child.log.name}\n{shown.printable(tail)}", err=True)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, so that the children are ended too."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    wanted = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, end) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
