"""`lydian plan`: what a job's rounds will cost each machine, before it starts; or beside what they did cost, after it.

    an earlier job of the same task ──facts──▶ speeds   ─┐
    GET /v1/workers ────────────────────────▶ links      ├─common.forecast─▶ rows, blame, advice
    the job file ───────────────────────────▶ work       ┘

Nothing is run for it unless `--measure` says so: then one round of the job is trained first, and measured.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self
from uuid import uuid4

import typer
from pydantic import Field

from client import sending, shown
from client.job_file import Job
from common.api import CoordinatorApi
from common.cautions import cautions
from common.errors import LydianError
from common.facts import Accepted, Initialised, RoundClosed
from common.forecast import Box, Row, Work, advice, blame, forecast
from common.messages import OVER, JobRequest, JobSpec, JobView, Message, WorkerView
from common.pace import LEAST_SHARE, took_of

MEASURED_ROUNDS = 2  # of a measurement: in the first, data and models are loaded
HEADER = ("WORKER", "DOES", "SHARE", "SAMPLES", "DOWN", "TRAINS", "UP", "WAITS", "SENDS")
TRUTH = ("WORKER", "TRAINS", "FORETOLD", "TRUE", "TRUE/FORETOLD")


@dataclass(frozen=True)
class Measured:
    """What an earlier job tells of its workers, by their names, and of its model."""

    job: str
    rates: Mapping[str, float]  # samples a second
    busy_s: Mapping[str, float]  # seconds of a round from hand-out to hand-in, of all its shards; the median
    round_s: float  # the median
    samples: int  # in the training set
    model_bytes: int

    @classmethod
    def of(cls, job: str, spec: JobSpec, events: Iterable[Mapping[str, Any]], after_round: int = 1) -> Self | None:
        """Read the events of a job; rounds up to `after_round` are left out where there are others. None: no model."""
        made: Initialised | None = None
        updates, rounds = list[Accepted](), list[RoundClosed]()
        for event in events:
            fields = {name: value for name, value in event.items() if name not in ("id", "at", "job")}
            match event["type"]:
                case "initialised":
                    made = Initialised.model_validate(fields)
                case "accepted":
                    updates.append(Accepted.model_validate(fields))
                case "round":
                    rounds.append(RoundClosed.model_validate(fields))
        if made is None or not rounds:
            return None
        late = [update for update in updates if update.round > after_round] or updates
        long = [closed.seconds for closed in rounds if closed.round > after_round] or [c.seconds for c in rounds]
        return cls(
            job,
            _rates(late, spec),
            _busy_by_worker(late),
            statistics.median(long),
            made.facts.train_samples,
            made.size,
        )


def _rates(updates: Iterable[Accepted], spec: JobSpec) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for update in updates:
        if (took := took_of(spec.train, update)) is not None:
            found.setdefault(update.worker_name, []).append(took.samples / took.training_s)
    return {name: statistics.median(rates) for name, rates in found.items()}


def _busy_by_worker(updates: Iterable[Accepted]) -> dict[str, float]:
    found: dict[str, dict[int, float]] = {}
    for update in updates:
        if update.took_s is not None:
            rounds = found.setdefault(update.worker_name, {})
            rounds[update.round] = rounds.get(update.round, 0.0) + update.took_s
    return {name: statistics.median(rounds.values()) for name, rounds in found.items()}


class PlanRow(Message):
    """One worker of a plan; seconds are of one round."""

    worker: str
    role: str
    share: float
    samples: int
    down_s: float
    train_s: float
    up_s: float
    wait_s: float
    bytes_down: int
    bytes_up: int
    true_s: float | None = Field(None, description="from hand-out to hand-in, the median over the job; None: not known")


class Plan(Message):
    """What `lydian plan --json` prints."""

    round_s: float
    measured_by: str = Field(description="the job whose measurements this rests on")
    workers: tuple[PlanRow, ...]
    blame: str
    advice: tuple[str, ...]
    unknown: tuple[str, ...]
    true_round_s: float | None = Field(None, description="of a job that has run: the median of its rounds")


# ---------------------------------------------------------------- before and after


def plan_of(api: CoordinatorApi, job: Job, *, like: str | None, measure: bool) -> Plan:
    """Foretell a job that was not submitted.

    Args:
        api: the coordinator.
        job: what would be submitted.
        like: the job whose measurements count; None: the newest of the same task that has some.
        measure: train so much of this job first that there are some.

    Raises:
        LydianError: nothing was measured (`not_measured`), the measurement failed, or rounds are asynchronous
            (`not_foretold`).
    """
    _refuse_asynchronous(job.spec)
    known = api.jobs()
    if measure:
        base = _measure(api, job)
    elif like is not None:
        base = _measured(api, api.job(like))
    else:
        same = [view for view in reversed(known) if _is_same_work(view.spec, job.spec)]
        base = next((found for view in same if (found := _measured(api, view)) is not None), None)
    if base is None:
        raise LydianError(
            f"nothing is measured of {job.spec.task} here: no job of it has closed a round",
            code="not_measured",
            advice="--measure trains two rounds of it first; --like JOB takes another job's measurements.",
        )
    return _plan(base, _serving(api.workers(), base), job.spec)


def plan_beside_truth(api: CoordinatorApi, view: JobView) -> Plan:
    """A job that has run, as it would have been foretold before it, beside what became of it.

    Raises:
        LydianError: it has closed no round (`not_measured`), or its rounds are asynchronous (`not_foretold`).
    """
    _refuse_asynchronous(view.spec)
    truth = _measured(api, view)
    if truth is None:
        raise LydianError(
            f"{view.id} has closed no round, so there is no truth to set a forecast beside: it is {view.state}",
            code="not_measured",
            advice="Before a job runs, `lydian plan` takes its job file.",
        )
    views = api.jobs()
    earlier = list(reversed(views[: [v.id for v in views].index(view.id)]))
    same = (_measured(api, other) for other in earlier if _is_same_work(other.spec, view.spec))
    base = next((found for found in same if found is not None), truth)
    foretold = _plan(base, _serving(api.workers(), truth), view.spec)
    rows = tuple(row.model_copy(update={"true_s": truth.busy_s.get(row.worker)}) for row in foretold.workers)
    return foretold.model_copy(update={"workers": rows, "true_round_s": truth.round_s})


def _refuse_asynchronous(spec: JobSpec) -> None:
    if spec.round.mode == "async":
        raise LydianError(
            "with round.mode = async nobody waits for a round, so there is none to foretell",
            code="not_foretold",
            advice="--set round.mode=sync foretells what each worker needs for a shard.",
        )


def _plan(base: Measured, boxes: Sequence[Box], spec: JobSpec) -> Plan:
    work = _work(spec, base)
    told = forecast(boxes, work)
    return Plan(
        round_s=told.round_s,
        measured_by=base.job,
        workers=tuple(map(_row, told.rows)),
        blame=blame(told, boxes),
        advice=(*(each.sentence for each in advice(boxes, work)), *cautions(spec), *kept_words(spec, told.rows, work)),
        unknown=told.unknown,
    )


def kept_words(spec: JobSpec, rows: Iterable[Row], work: Work) -> tuple[str, ...]:
    """What the updates that a job keeps take on the coordinator's disk, in a sentence; none, if it keeps none."""
    keep = spec.round.keep_updates
    count = spec.rounds if keep == "all" else min(keep, spec.rounds)
    each = work.model_bytes + sum(row.bytes_up for row in rows)
    words = f"round.keep_updates = {keep} keeps {shown.size(each * count)} on the coordinator's disk"
    rounds = f"{shown.several(count, 'round')} of {shown.size(each)}, and what an outer step remembers beside them"
    return (f"{words}: {rounds}",) if count else ()


def _row(row: Row) -> PlanRow:
    fields = asdict(row)
    return PlanRow(worker=fields.pop("name"), **fields)


# ---------------------------------------------------------------- what is known


def _is_same_work(one: JobSpec, other: JobSpec) -> bool:
    """Whether a sample of one job costs what one of the other costs."""
    same = (one.task, one.config, one.train.batch_size) == (other.task, other.config, other.train.batch_size)
    return same and one.data.partition == other.data.partition


def _measured(api: CoordinatorApi, view: JobView) -> Measured | None:
    return Measured.of(view.id, view.spec, _facts(api, view))


def _facts(api: CoordinatorApi, view: JobView) -> Iterable[Mapping[str, Any]]:
    """What has happened to a job so far."""
    for event in api.events(view.id):
        if event["type"] == "now":
            if view.state not in OVER:
                return  # of one that runs, what comes after is not awaited
            continue
        yield event


def _measure(api: CoordinatorApi, job: Job) -> Measured | None:
    """Train some rounds of a job, to be measured.

    Raises:
        LydianError: it did not finish (`not_measured`).
    """
    rules = job.spec.round.model_copy(update={"keep_updates": 0})
    changes = {"rounds": MEASURED_ROUNDS, "name": "measurement", "target": None, "round": rules}
    short = job.spec.model_copy(update=changes)
    request = JobRequest(spec=short, task_source=job.task_source, signatures=job.signatures, key=uuid4().hex)
    view = sending.submit(api, job, request)
    typer.echo(f"measuring: {view.id} trains {MEASURED_ROUNDS} rounds", err=True)
    events = list(api.events(view.id, on_wait=lambda why: typer.echo(why, err=True)))
    done = api.job(view.id)
    if done.state != "finished":
        raise LydianError(
            f"the measurement {view.id} {done.state}: {done.reason}",
            code="not_measured",
            advice=f"`lydian logs {view.id}` has the traceback.",
        )
    return Measured.of(view.id, done.spec, events)


def _serving(workers: Sequence[WorkerView], base: Measured) -> list[Box]:
    """The workers that would serve: those that are there, with what was measured of them."""
    there = [worker for worker in workers if worker.state not in ("gone", "draining", "set aside")]
    return [_box(worker, base.rates.get(worker.name)) for worker in there]


def _box(worker: WorkerView, rate: float | None) -> Box:
    link, path = worker.link, worker.path
    relayed = path is not None and path.kind in ("relay", "peer relay")
    return Box(
        worker.name,
        rate=rate,
        down=link.down if link else None,
        up=link.up if link else None,
        latency_s=link.latency_s if link else 0.0,
        path=f"relayed by {path.via}" if relayed and path is not None else "",
    )


def _work(spec: JobSpec, base: Measured) -> Work:
    train, data, aggregation = spec.train, spec.data, spec.aggregation
    lengths = {"steps": train.local_steps, "seconds": train.local_seconds}
    length = next((name for name, value in lengths.items() if value is not None), "epochs")
    return Work(
        samples=base.samples,
        model_bytes=base.model_bytes,
        batch_size=train.usual_batch,
        length=length,  # type: ignore[arg-type]
        amount=lengths.get(length) or train.local_epochs or 1,
        shards=None if data.shards == "auto" else data.shards,
        fraction=spec.privacy.sample if spec.privacy.level == "worker" else data.fraction,  # in the mean, if drawn
        update=aggregation.update if aggregation.update != "auto" else "fp32",
        masked=spec.secure.enabled,
        whole_download=aggregation.download == "fp32",
        least_share=LEAST_SHARE if data.partition == "iid" else 0.0,
    )


# ---------------------------------------------------------------- for a person


def show(plan: Plan, rounds: int) -> None:
    """Print a plan: the table on stdout, what follows from it beside it."""
    shown.print_table(HEADER, [_cells(row) for row in plan.workers], right=set(HEADER) - {"WORKER", "DOES"})
    whole = f"; {rounds} rounds {shown.duration(plan.round_s * rounds)}" if rounds > 1 else ""
    if plan.round_s:
        typer.echo(f"a round takes {shown.duration(plan.round_s)}{whole}, averaging and evaluation left out")
    for sentence in (plan.blame, *plan.advice, *plan.unknown):
        if sentence:
            typer.echo(shown.one_line(sentence))
    typer.echo(f"measured by {plan.measured_by}", err=True)
    if plan.true_round_s is not None:
        typer.echo("")
        rows = [_truth(row.worker, _busy(row), row.true_s, row.role) for row in plan.workers]
        rows.append(_truth("a round", plan.round_s, plan.true_round_s, ""))
        shown.print_table(TRUTH, rows, right=set(TRUTH) - {"WORKER", "TRAINS"})


def _cells(row: PlanRow) -> list[str]:
    if row.role != "trains":
        return [shown.one_line(row.worker), row.role, *[shown.NOTHING] * (len(HEADER) - 2)]
    times = (row.down_s, row.train_s, row.up_s, row.wait_s)
    sends = shown.size(row.bytes_down + row.bytes_up)
    numbers = [f"{row.share:.1%}", shown.count(row.samples), *map(shown.duration, times), sends]
    return [shown.one_line(row.worker), row.role, *numbers]


def _busy(row: PlanRow) -> float:
    return row.down_s + row.train_s + row.up_s


def _truth(name: str, foretold: float, true: float | None, role: str) -> list[str]:
    ratio = f"{true / foretold:.2f}" if true is not None and foretold > 0 else shown.NOTHING
    said = [
        shown.duration(foretold) if foretold else shown.NOTHING,
        shown.NOTHING if true is None else shown.duration(true),
    ]
    return [shown.one_line(name), role, *said, ratio]
