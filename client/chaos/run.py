"""`lydian chaos`: the same small job twice on a local fleet, undisturbed and with faults, and what came of it.

    schedule (seed) ──▶ inject ──▶ fleet: coordinator, proxy, workers
                                      │ every fact
    report ◀── ledger of the disturbed job, and of the undisturbed one: the truth

In the folder: coordinator/, its state (or disk/, a disk of its own); worker-1/ …; NAME.N.log, what the N-th NAME said.
"""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from uuid import uuid4

import typer

from client import shown
from client.chaos import report
from client.chaos.clocks import find_library, why_no_clock
from client.chaos.disk import Disk, keep_mounts_private, why_no_disk
from client.chaos.fleet import Fleet
from client.chaos.inject import INJECT, Blow, Stage
from client.chaos.ledger import PROGRESS, Ledger, read_facts
from client.chaos.report import Incident, Outcome, Tally
from client.chaos.schedule import KINDS, PlannedFault, plan_faults, schedule_digest
from client.job_file import Job, flag_layer, read_job
from client.running import Children
from client.watching import Event, read_event
from common.errors import LydianError, NotFoundError
from common.messages import JobRequest, JobSpec
from common.weights import file_digest

TASK = Path(__file__).with_name("task.txt")  # no .py: the client's packages reach no torch
FAULTS = 20
FAULT_S = 4.0  # that one takes, about
LAST_WRITES_S = 30.0  # the longest that somebody may still write into a folder that is to be deleted
MORE_ROUNDS = 4  # than faults, by default
SHARDS_A_WORKER = 2
LEASE_S = 6.0
IDLE_S = 2.0
STUCK_S = 90.0  # without any progress after the last fault: the job does not move
ON_A_DISK = frozenset({"disk-full", "power-cut"})


@dataclass(frozen=True)
class Wish:
    """What the command line asks for."""

    faults: int | None
    seconds: float | None
    seed: int
    workers: int
    rounds: int | None
    kinds: tuple[str, ...] | None  # None: all that can be had here
    task: str | None  # None: our own
    lease_s: float
    keep: bool

    @property
    def number(self) -> int:
        """Faults that are planned."""
        if self.faults is not None:
            return self.faults
        return FAULTS if self.seconds is None else math.ceil(self.seconds / FAULT_S)


def run_chaos(wish: Wish, *, as_json: bool) -> bool:
    """Run it, and print what it came to. Returns whether all promises were kept.

    Raises:
        typer.BadParameter: a kind that does not exist, or cannot be had here.
        LydianError: a part could not be started, or the task is wrong; the logs were shown.
    """
    folder = Path(tempfile.mkdtemp(prefix="lydian-chaos-"))
    try:
        with _ended_by_signals():
            outcome = _run(wish, folder)
    finally:
        if wish.keep:
            _say(f"everything is kept in {folder}")
        else:
            remove(folder)
    if as_json:
        typer.echo(json.dumps(report.as_json(outcome)))
    else:
        _print(outcome)
    return report.all_kept(outcome)


def remove(folder: Path) -> None:
    """Delete what a run left. What was killed last may still be writing: into a folder that was just emptied, and by
    renaming a file that was just listed. Both end with it, soon, and until then deleting begins again.
    """
    until = time.monotonic() + LAST_WRITES_S
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT) or time.monotonic() > until:
                raise


def _run(wish: Wish, folder: Path) -> Outcome:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LYDIAN_")}
    environment["TMPDIR"] = str(folder / "tmp")  # torch leaves folders there
    (folder / "tmp").mkdir()
    kinds = choose_kinds(wish.kinds, _why_not(wish.kinds, folder, environment))
    job = make_job(wish)
    with ExitStack() as stack:
        disk = None
        if ON_A_DISK & set(kinds):
            disk = stack.enter_context(Disk(folder / "disk.img", folder / "disk"))
            if wish.keep:
                stack.callback(lambda: shutil.copytree(folder / "disk", folder / "coordinator", dirs_exist_ok=True))
        children = stack.enter_context(Children(folder))
        fleet = stack.enter_context(
            Fleet(
                children=children,
                state=disk.path / "state" if disk else folder / "coordinator",
                workers=wish.workers,
                lease_s=wish.lease_s,
                idle_s=IDLE_S,
                trust_any=job.task_source is not None,
                faketime=find_library() if "clock-jump" in kinds else None,
                environment=environment,
                say=_say,
            )
        )
        try:
            return _play(fleet, disk, job, kinds, wish)
        except LydianError:
            for name, tail in fleet.logs():
                _say(f"--- {name}\n{shown.printable(tail)}")
            raise


def _play(fleet: Fleet, disk: Disk | None, job: Job, kinds: Sequence[str], wish: Wish) -> Outcome:
    """Both jobs, one after the other, and the comparison."""
    updates = job.spec.rounds * shards_of(wish)
    schedule = plan_faults(
        kinds,
        seed=wish.seed,
        faults=wish.number,
        updates=max(updates - shards_of(wish), 1),  # the last round shows what follows the last fault
        workers=wish.workers,
    )
    _say(f"schedule {schedule_digest(schedule)}: {shown.several(len(schedule), 'fault')} of {', '.join(kinds)}")
    _say(f"starting a coordinator and {shown.several(wish.workers, 'worker')} in {fleet.children.folder}")
    fleet.start()
    truth = _send(fleet, job)
    _finish(fleet, truth)
    if truth.ending != "finished":
        raise LydianError(
            f"the job without faults {truth.ending or 'does not move'}: {_reason(truth)}",
            code="no_truth",
            advice="Without it there is nothing to compare with; does `lydian demo --task …` work?",
        )
    undisturbed_s = truth.progress_at - truth.began_at
    _say(f"without faults: {shown.several(job.spec.rounds, 'round')} in {shown.duration(undisturbed_s)}; now with them")
    ledger = _send(fleet, job)
    strikes = _disturb(Stage(fleet, ledger, disk), schedule, wish.seconds, _update_s(truth))
    _finish(fleet, ledger)
    return _judge(fleet, (truth, ledger), strikes, wish, schedule_digest(schedule), job.spec)


def _send(fleet: Fleet, job: Job) -> Ledger:
    """Send the job, and follow it."""
    request = JobRequest(spec=job.spec, task_source=job.task_source, key=uuid4().hex)
    return Ledger(fleet.new_api(), fleet.api.submit_job(request).id)


def _finish(fleet: Fleet, ledger: Ledger) -> None:
    """Wait until a job is over, or moves no more."""
    fleet.wait(lambda: _stands(ledger), math.inf)


def _stands(ledger: Ledger) -> bool:
    """Whether a job will not move any further."""
    ledger.check()
    return bool(ledger.ending) or time.monotonic() - ledger.progress_at > STUCK_S


def _update_s(ledger: Ledger) -> float:
    """Seconds from one accepted update to the next, as a mean."""
    times = [seen.at for seen in ledger.seen if seen.event["type"] == "accepted"]
    return (times[-1] - times[0]) / max(len(times) - 1, 1)


# ---------------------------------------------------------------- the faults


@dataclass(frozen=True)
class Strike:
    """A fault of the schedule that had its turn; times in monotonic seconds."""

    fault: PlannedFault
    accepted: int
    struck_at: float
    lifted_at: float
    missed: str  # why it did not strike; empty: it did


def _disturb(stage: Stage, schedule: Sequence[PlannedFault], seconds: float | None, update_s: float) -> list[Strike]:
    """Inject the faults in their order, each when the job has come to its point.

    Args:
        stage: what is broken.
        schedule: the faults.
        seconds: after which none strikes any more.
        update_s: that an update takes without faults.
    """
    fleet, ledger = stage.fleet, stage.ledger
    strikes: list[Strike] = []
    for fault in schedule:
        reached = partial(_has_come_to, ledger, fault.after)
        fleet.wait(reached, math.inf)
        fleet.wait(lambda: _stands(ledger), fault.fraction * update_s)
        accepted, now = ledger.accepted, time.monotonic()
        missed = _why_too_late(ledger, seconds, now)
        blow = Blow(missed=missed) if missed else INJECT[fault.kind](stage, fault)
        lifted_at = time.monotonic()
        strike = Strike(fault, accepted, now if blow.missed else blow.struck_at, lifted_at, blow.missed)
        strikes.append(strike)
        if not missed:
            _say(_strike_line(strike, len(schedule), ledger.began_at))
    return strikes


def _has_come_to(ledger: Ledger, updates: int) -> bool:
    return _stands(ledger) or ledger.accepted >= updates


def _why_too_late(ledger: Ledger, seconds: float | None, now: float) -> str:
    if ledger.ending:
        return "the job was over"
    if _stands(ledger):
        return "the job did not move any more"
    return "the time was up" if seconds is not None and now - ledger.began_at > seconds else ""


def _strike_line(strike: Strike, of: int, began_at: float) -> str:
    told = (
        f"missed: {strike.missed}" if strike.missed else f"lasted {shown.duration(strike.lifted_at - strike.struck_at)}"
    )
    at = shown.duration(strike.struck_at - began_at)
    fault = strike.fault
    return f"{at:>12}  {fault.number}/{of}  {fault.words()}, after {shown.several(strike.accepted, 'update')}: {told}"


# ---------------------------------------------------------------- the judgement


def _judge(
    fleet: Fleet, ledgers: tuple[Ledger, Ledger], strikes: Sequence[Strike], wish: Wish, digest: str, spec: JobSpec
) -> Outcome:
    """Read both journals anew, fetch both models, and put everything together."""
    truth, ledger = ledgers
    kept = {each.job: read_facts(fleet.api, each.job) for each in ledgers}
    expected = [(r, s) for r in range(1, spec.rounds + 1) for s in range(shards_of(wish))]
    return Outcome(
        seed=wish.seed,
        schedule=digest,
        rounds=spec.rounds,
        shards=shards_of(wish),
        state=ledger.ending or "stuck",
        reason=_reason(ledger),
        seconds=ledger.progress_at - ledger.began_at,
        undisturbed_s=truth.progress_at - truth.began_at,
        truth=_tally(kept[truth.job], expected),
        found=_tally(kept[ledger.job], expected),
        forgotten=sum(report.forgotten([s.event for s in each.seen], kept[each.job]) for each in ledgers),
        true_model=_model(fleet, truth.job),
        model=_model(fleet, ledger.job),
        ended=[ended.name for ended in fleet.ended],
        incidents=_incidents(strikes, ledger),
    )


def _tally(events: Iterable[Event], expected: Sequence[tuple[int, int]]) -> Tally:
    facts = (read_event(event) for event in events)
    return report.tally((fact for fact in facts if fact is not None), expected)


def _model(fleet: Fleet, job: str) -> str:
    """SHA-256 of a job's newest model, as it is fetched; empty where there is none."""
    target = fleet.children.folder / f"{job}.safetensors"
    try:
        fleet.api.pull(job, target)
    except NotFoundError:
        return ""
    return file_digest(target)


def _incidents(strikes: Iterable[Strike], ledger: Ledger) -> list[Incident]:
    progress = [seen.at for seen in ledger.seen if seen.event["type"] in PROGRESS]
    return [
        Incident(
            number=strike.fault.number,
            kind=strike.fault.kind,
            parameters=strike.fault.parameters,
            accepted=strike.accepted,
            struck_s=strike.struck_at - ledger.began_at,
            lasted_s=strike.lifted_at - strike.struck_at,
            recovery_s=None if strike.missed else report.recovery_s(strike.lifted_at, progress),
            missed=strike.missed,
        )
        for strike in strikes
    ]


def _reason(ledger: Ledger) -> str:
    ends = [seen.event for seen in ledger.seen if seen.event["type"] == "job"]
    return shown.one_line(str(ends[-1]["reason"]) if ledger.ending else ledger.awaited)


def _print(outcome: Outcome) -> None:
    header, rows = report.fault_table(outcome.incidents)
    shown.print_table(header, rows, right=header[1:])
    typer.echo(f"\n{report.work_line(outcome)}\n")
    shown.print_table(*report.promise_table(outcome))


def _say(line: str) -> None:
    typer.echo(line, err=True)


# ---------------------------------------------------------------- what is asked for, and what can be had


def make_job(wish: Wish) -> Job:
    """The job that is run twice.

    Raises:
        LydianError: the task is not known, or its file cannot be used.
    """
    rounds = wish.rounds or wish.number + MORE_ROUNDS
    if wish.task is not None:
        flags = {
            ("task",): wish.task,
            ("rounds",): str(rounds),
            ("seed",): str(wish.seed),
            ("data", "shards"): str(shards_of(wish)),
        }
        return read_job(None, flag_layer(flags), {})
    spec = JobSpec.model_validate(
        {
            "task": "chaos",
            "rounds": rounds,
            "seed": wish.seed,
            "train": {"local_steps": 12, "batch_size": 16, "lr": 0.05, "momentum": 0.9},
            "data": {"shards": shards_of(wish)},
            "round": {"evaluate_every": 5},
            "config": {"step_s": 0.03},
        }
    )
    return Job(spec, TASK.read_text(encoding="utf-8"))


def shards_of(wish: Wish) -> int:
    """Shards of a round: more than workers, so that a worker which is gone does not stop the others."""
    return SHARDS_A_WORKER * wish.workers


def choose_kinds(asked: Collection[str] | None, why_not: Mapping[str, str]) -> list[str]:
    """The kinds of faults of a run, in their order.

    Args:
        asked: names; None: all that can be had.
        why_not: kind -> why it cannot be had here.

    Raises:
        typer.BadParameter: one that was asked for does not exist, or cannot be had.
    """
    for kind in asked or ():
        if kind not in KINDS:
            raise typer.BadParameter(f"there is no {kind!r}; there are {', '.join(KINDS)}", param_hint="--kinds")
        if kind in why_not:
            raise typer.BadParameter(f"{kind} cannot be had here: {why_not[kind]}", param_hint="--kinds")
    if asked is None:
        for kind, reason in why_not.items():
            _say(f"left out: {kind}: {reason}")
    return [kind for kind in KINDS if (kind in asked if asked is not None else kind not in why_not)]


def _why_not(asked: Collection[str] | None, folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Kind -> why it cannot be had here, of those that are asked for; what is not asked for is not tried."""
    wanted = set(KINDS) if asked is None else set(asked)
    found: dict[str, str] = {}
    if wanted & ON_A_DISK:
        found |= dict.fromkeys(sorted(wanted & ON_A_DISK), keep_mounts_private() or why_no_disk())
    if "clock-jump" in wanted:
        found["clock-jump"] = why_no_clock(folder, environment)
    return {kind: reason for kind, reason in found.items() if reason}


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, so that everything is ended and unmounted."""

    heard: list[str] = []

    def end(number: int, _: FrameType | None) -> None:
        heard.append(signal.Signals(number).name)
        raise SystemExit(128 + number)

    wanted = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, end) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if heard:
            _say(f"ended by {heard[0]}; everything is stopped")
    if heard:  # the exit was lost on its way, as one that is raised inside a destructor is
        raise SystemExit(128 + signal.Signals[heard[0]])
