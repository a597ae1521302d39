"""`lydian simulate`: very many virtual clients on this machine, over the real protocol.

    folder/coordinator/     its state        folder/simulator-1/ …   theirs        folder/*.log   what they said

A virtual client is a shard of the training set. A round trains some of them; a few processes, each with a
worker for every shard that it trains at once, share them. A process that dies leaves its shards to the others.
"""

import contextlib
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import typer

from client import sending, shown
from client.demo import (
    check_finished,
    checked,
    clean_environment,
    ended_by_signals,
    final,
    show_log,
    start_coordinator,
)
from client.job_file import Job, Layer, Setting, flag_layer, read_job, set_layer
from client.pulling import pull_model
from client.running import Child, Children, python_module
from client.watching import Board, Event, JsonView, View, follow, read_event, round_table, view_for
from common.api import CoordinatorApi
from common.cautions import cautions
from common.errors import LydianError
from common.messages import JobRequest
from common.sharding import cohort

BEATS = 5  # in a lease
FRACTION = 0.1


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line asks for."""

    what: str
    clients: int
    fraction: float | None
    rounds: int | None
    seed: int | None
    settings: tuple[str, ...]
    processes: int
    at_once: int
    device: str
    threads: int
    stack: str
    data: tuple[str, ...]
    lease_s: float
    state_dir: Path | None
    output: Path | None


@dataclass(frozen=True, slots=True)
class Summary:
    """What a simulation came to."""

    clients: int
    rounds: int
    updates: int  # that counted
    seconds: float  # from the first round's begin to the last one's end
    metric: str
    value: float | None

    @property
    def updates_per_s(self) -> float:
        """Client updates a second, over all rounds."""
        return self.updates / self.seconds if self.seconds else 0.0


# ---------------------------------------------------------------- what is decided


def job_of(wish: Wish) -> Job:
    """The job that is submitted: the task's defaults, the job file, the clients and the flags, and --set.

    Raises:
        LydianError: a key or value is wrong, or the task cannot be used.
    """
    file = Path(wish.what) if wish.what.endswith(".toml") else None
    said: dict[tuple[str, ...], Any] = {("data", "shards"): str(wish.clients)}
    if file is None:
        said[("task",)] = wish.what
    for path, value in ((("rounds",), wish.rounds), (("seed",), wish.seed), (("data", "fraction"), wish.fraction)):
        if value is not None:
            said[path] = str(value)
    sets: Layer = set_layer(wish.settings)
    job = read_job(file, flag_layer(said), sets)
    if wish.fraction is None and not _says_fraction(job):
        job = read_job(file, flag_layer(said), {("data", "fraction"): Setting(FRACTION, "the default"), **sets})
    if job.spec.script:
        raise LydianError(
            "a simulation trains many clients in a few processes, and a training script has a process of its own",
            code="bad_job",
            advice="Try it with `python FILE.py`, then on real workers; or make a task file of it.",
        )
    if job.spec.data.shards != wish.clients or job.spec.data.partition == "local":
        raise LydianError(
            "a simulation's clients are shards of one data set: partition local and shards of its own do not fit",
            code="bad_job",
            advice="Use --clients, and any other partition.",
        )
    if job.spec.evaluation.scope == "workers":
        raise LydianError(
            "a simulation's workers have no test data of their own, so evaluation.scope = workers does not fit",
            code="bad_job",
            advice="Leave it out: the model is measured on the task's test split.",
        )
    return job


def _says_fraction(job: Job) -> bool:
    return "fraction" in job.spec.data.model_fields_set


def workers_each(clients: int, fraction: float, processes: int, most: int) -> int:
    """Virtual workers of each process: as many as its fair part of a round's clients, so that none takes all.

    Args:
        clients: of the job.
        fraction: of them that trains in a round.
        processes: that share them.
        most: that a process trains at once.
    """
    chosen = len(cohort(clients, fraction, seed=0, round_index=1))
    return min(most, math.ceil(chosen / processes))


def summary_of(board: Board, clients: int) -> Summary:
    """What the closed rounds came to."""
    rows = board.rows.values()
    metric, value = final(board)
    return Summary(
        clients=clients,
        rounds=len(rows),
        updates=sum(row.closed.shards - row.closed.left_out for row in rows),
        seconds=sum(row.closed.seconds for row in rows),
        metric=metric,
        value=value,
    )


# ---------------------------------------------------------------- what is done


def run_simulation(wish: Wish, *, as_json: bool) -> None:
    """Simulate, and print the table of rounds and what it came to.

    Raises:
        LydianError: the job is wrong or did not finish, or the coordinator or every process ended by itself.
    """
    job = job_of(wish)
    with _folder(wish.state_dir) as folder, ended_by_signals(), Children(folder) as children:
        try:
            _simulate(children, wish, job, as_json=as_json)
        except LydianError:
            for child in children.started:
                show_log(child)
            raise


@contextlib.contextmanager
def _folder(asked: Path | None) -> Iterator[Path]:
    """The folder for everything: the one asked for, or one that is removed afterwards."""
    if asked is None:
        made = Path(tempfile.mkdtemp(prefix="lydian-simulate-"))
        try:
            yield made
        finally:
            shutil.rmtree(made)
        return
    asked.mkdir(parents=True, exist_ok=True)
    if any(asked.iterdir()):
        raise LydianError(
            f"{asked} is not empty", code="folder_unusable", advice="A simulation begins in a new or empty folder."
        )
    yield asked.resolve()


def _simulate(children: Children, wish: Wish, job: Job, *, as_json: bool) -> None:
    data = job.spec.data
    number = workers_each(wish.clients, data.fraction, wish.processes, wish.at_once)
    timing = {"LYDIAN_TTL_S": str(wish.lease_s), "LYDIAN_HEARTBEAT_S": str(wish.lease_s / BEATS)}
    url, state = start_coordinator(children, timing)
    join_token = (state / "join.token").read_text().strip()
    for at in range(1, wish.processes + 1):
        _start_process(children, at, number, url, join_token, wish, job)
    per_round = len(cohort(wish.clients, data.fraction, seed=0, round_index=1))
    typer.echo(
        f"{shown.several(wish.clients, 'client')}, {shown.count(per_round)} a round, in "
        f"{wish.processes} process{'' if wish.processes == 1 else 'es'} with "
        f"{shown.several(number, 'virtual worker')} each",
        err=True,
    )
    for sentence in cautions(job.spec):
        typer.echo(f"caution: {sentence}", err=True)
    with CoordinatorApi(url, (state / "admin.token").read_text().strip()) as api:
        request = JobRequest(spec=job.spec, task_source=job.task_source, key=uuid4().hex)
        view_of_job = sending.submit(api, job, request)
        board = Board(view_of_job)
        _watch(api, board, children, as_json=as_json)
        check_finished(board, "--state-dir")
        if wish.output is not None:
            pull_model(api, view_of_job.id, wish.output, which="newest", force=True)
    _print_summary(board, wish, state, view_of_job.id, as_json=as_json)


def _start_process(children: Children, at: int, workers: int, url: str, join_token: str, wish: Wish, job: Job) -> None:
    name = f"simulator-{at}"
    arguments = [url, "--name", name, "--state-dir", str(children.folder / name), "--workers", str(workers)]
    arguments += ["--device", wish.device, "--threads", str(wish.threads), "--stack", wish.stack]
    arguments += [part for item in wish.data for part in ("--data", item)]
    if job.task_source is not None:  # this very file and no other: it is the user's own, and so is the machine
        arguments += ["--trusted", hashlib.sha256(job.task_source.encode()).hexdigest()]
    environment = clean_environment() | {"LYDIAN_TOKEN": join_token}  # not in argv, which all can see
    children.start(name, python_module("worker.simulation", arguments), environment)


class Both:
    """A view that also keeps the board for the summary, where the view has none of its own."""

    def __init__(self, view: JsonView, board: Board) -> None:
        self._view, self._board = view, board
        self.opened = view.opened
        self.waiting = view.waiting

    def show(self, event: Event) -> None:
        """Show one event, and learn from it."""
        self._view.show(event)
        if (fact := read_event(event)) is not None:
            self._board.take(fact)


def _watch(api: CoordinatorApi, board: Board, children: Children, *, as_json: bool) -> None:
    view: View = view_for(board, as_json=as_json, keep=False)
    view = Both(view, board) if isinstance(view, JsonView) else view
    said: set[str] = set()

    def waiting(sentence: str) -> None:
        _check(children, said)  # a coordinator that has ended will not come back
        view.waiting(sentence)

    follow(checked(api.events(board.job.id, on_wait=waiting), partial(_check, children, said)), view)


def _check(children: Children, said: set[str]) -> None:
    """Say which process has ended; the others do its work.

    Raises:
        LydianError: child_ended, the coordinator or the last of the others has.
    """
    coordinator, *others = children.started
    for child in others:
        if child.ended and child.name not in said:
            said.add(child.name)
            typer.echo(f"{child.name} ended by itself {_how(child)}: its clients go to the others", err=True)
    dead = [coordinator] if coordinator.ended else others if all(child.ended for child in others) else []
    if dead:
        raise LydianError(
            f"{dead[0].name} ended by itself {_how(dead[0])}",
            code="child_ended",
            advice="The last lines of its log say why.",
        )


def _how(child: Child) -> str:
    return f"with exit code {child.process.returncode}"


def _print_summary(board: Board, wish: Wish, state: Path, job: str, *, as_json: bool) -> None:
    summary = summary_of(board, wish.clients)
    kept = str(state) if wish.state_dir is not None else None
    if as_json:
        line = {
            "type": "summary", "job": job, "clients": summary.clients, "rounds": summary.rounds,
            "updates": summary.updates, "seconds": summary.seconds, "updates_per_s": summary.updates_per_s,
            "metric": summary.metric, "value": summary.value, "state_dir": kept,
            "output": str(wish.output) if wish.output is not None else None,
        }  # fmt: skip
        typer.echo(json.dumps(line))
        return
    header, rows = round_table(list(board.rows.values()), board.best)
    shown.print_table(header, rows, right=header)
    typer.echo(
        f"{shown.count(summary.updates)} client updates in {shown.duration(summary.seconds)}: "
        f"{summary.updates_per_s:.1f} a second"
    )
    typer.echo(f"final {summary.metric} {shown.measure(summary.value)}")
    typer.echo(_where(kept, wish.output, job), err=True)


def _where(kept: str | None, output: Path | None, job: str) -> str:
    """Where the models are."""
    if kept is not None:
        return f"the models are kept: `lydian serve --state-dir {kept}`, then `lydian pull {job} -o FILE`"
    if output is not None:
        return f"the newest model is {output}"
    return "the models are gone with the temporary folder: -o FILE or --state-dir DIR keeps them"
