"""What people and scripts are shown of the coordinator's state. Reads, never changes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from common import privacy
from common.facts import HandedBack, Now, WorkerNow
from common.messages import NEW_KEYS, NEW_SECTIONS, JobView, LogEntry, Output, PollAnswer, WorkerSpeed, WorkerView
from server import drift, paths, rounds
from server.buffering import Buffering
from server.coordinator import Coordinator
from server.fleet import Lease, Worker, standing, why_nobody, why_not
from server.paths import Verdict
from server.rounds import Job, Paused, Queued, Task, Training, close_if_due
from server.sealing import is_secure


def poll_answer(answer: PollAnswer, protocol: int) -> str:
    """The answer to a poll as JSON, without what a worker of an older protocol would refuse as unknown."""
    if protocol >= 2:
        return answer.model_dump_json()
    spec: dict[str, set[str] | bool] = {section: set(keys) for section, keys in NEW_KEYS.items()}
    spec |= dict.fromkeys(NEW_SECTIONS, True)
    return answer.model_dump_json(
        exclude={
            "settled": True,
            "wanted": True,
            "unmask": True,
            "prepare": True,
            "order": True,
            "renew": True,
            "assignment": {
                "task": {"signatures": True},
                "steps": True,
                "optimizer_of": True,
                "state_shard": True,
                "together": True,
                "private_before": True,
                "slots": True,
                "spec": spec,
            },
        }
    )


def job_view(coordinator: Coordinator, job: Job) -> JobView:
    """One job as `lydian jobs` shows it."""
    return JobView(
        id=job.id,
        name=job.spec.name or job.spec.task,
        task=job.spec.task,
        state=job.phase.state,
        reason=why(coordinator, job),
        submitted_at=coordinator.submitted_at[job.id],
        round=job.closed,
        rounds=job.rounds,
        model=job.model,
        metrics=dict(job.metrics),
        metrics_round=job.metrics_round,
        best_round=job.best_round,
        best_value=job.best_value,
        parameters=job.facts.parameters if job.facts else None,
        privacy=job.spent,
        warnings=_warnings(job),
        slots=len(job.slots) if job.spec.train.drift != "none" else None,
        submitted_by=coordinator.submitted_by[job.id],
        begins_with=job.begins_with,
        spec=job.spec,
    )


def _warnings(job: Job) -> tuple[str, ...]:
    parameters = job.facts.parameters if job.facts else None
    clip = job.spent.next_clip if job.spent else None
    planned = privacy.budget_words(job.spec, job.affordable, job.planned_epsilon)
    return (*privacy.warnings(job.spec, parameters, clip), *planned)


def why(coordinator: Coordinator, job: Job) -> str:
    """What the job waits for, in words; for an ended job, why it ended."""
    now = coordinator.clock()
    if job.over or isinstance(job.phase, Paused):
        return job.reason
    live = coordinator.fleet.live(now)
    if isinstance(job.phase, Queued):
        wanted, serving = job.spec.round.min_workers, coordinator.fleet.serving(job, now)
        nobody = why_nobody(coordinator.fleet, job, now)
        behind = f"; {nobody}" if nobody else "" if len(serving) < wanted else ", and older jobs go first"
        if job.spec.secure.enabled and not nobody and len(serving) < wanted:
            behind = "".join(f"; {why}" for w in live if (why := why_not(coordinator.fleet.workers[w], job)))
        return f"waiting for {rounds.workers(wanted)} that can serve it: {len(serving)} of {len(live)} live can{behind}"
    reason = job.reason
    if isinstance(job.inner, Training | Buffering):
        reason = close_if_due(job, live, now, coordinator.dues(job)).reason
        fresh = drift.fresh_words(job)
        reason += f"; {fresh}" if fresh else ""
    if is_secure(job):
        reason = coordinator.sum_now(job, now).reason
    if not coordinator.fleet.held(job.id) and not coordinator.fleet.serving(job, now):
        reason += f"; no live worker serves it ({why_nobody(coordinator.fleet, job, now) or 'none is live'})"
    return reason


def now_of(coordinator: Coordinator, job: Job) -> Now:
    """Where the job stands at this moment, with what each of its workers does."""
    phase, now = job.inner, coordinator.clock()
    training = phase if isinstance(phase, Training | Buffering) else None
    due_at = {due.worker: due.at for due in coordinator.dues(job).values()}
    workers = tuple(
        WorkerNow(
            worker=coordinator.fleet.workers[lease.worker].name,
            doing=str(lease.task),
            progress=lease.progress,
            expected_in_s=_left(due_at.get(lease.worker), now),
        )
        for lease in coordinator.fleet.leases.values()
        if lease.job == job.id and lease.worker in coordinator.fleet.workers
    )
    return Now(
        state=job.phase.state,
        reason=why(coordinator, job),
        round=min(training.round, job.rounds) if training else job.closed,
        rounds=job.rounds,
        received=_received(training) if training else 0,
        shards=(training.size if isinstance(training, Buffering) else len(training.shards)) if training else 0,
        workers=tuple(sorted(workers, key=lambda w: w.worker)),
    )


def _received(phase: Training | rounds.Buffering) -> int:
    """Updates that are in; of an asynchronous version, at most as many as it needs."""
    return min(len(phase.buffer), phase.size) if isinstance(phase, Buffering) else len(phase.accepted)


def _left(at: float | None, now: float) -> float | None:
    return None if at is None else round(at - now, 1)


def worker_view(coordinator: Coordinator, worker: Worker) -> WorkerView:
    """One worker as `lydian workers` shows it."""
    return worker_views(coordinator, [worker])[0]


def worker_views(coordinator: Coordinator, workers: Sequence[Worker]) -> list[WorkerView]:
    """Some workers, likewise. What is true of a job is found once, however many are shown."""
    jobs = [_JobNow.of(coordinator, job) for job in coordinator.jobs.values() if not job.over]
    return [_worker_view(coordinator, worker, jobs) for worker in workers]


def _worker_view(coordinator: Coordinator, worker: Worker, jobs: Sequence["_JobNow"]) -> WorkerView:
    now = coordinator.clock()
    lease = coordinator.fleet.leases.get(worker.id)
    shown = standing(coordinator.fleet, worker, now, _doing)
    waiting = worker.polling > 0
    tailnet = coordinator.tailnet
    caller, refused = tailnet.callers.get(worker.id), tailnet.refused.get(worker.id)
    node = caller.found.node if caller else None
    there = caller if shown.state != "gone" else None
    path = paths.path_to(there.address[0], node, tailnet.status) if there else None
    verdict = refused.verdict if refused else Verdict()
    speeds = tuple(_speed(coordinator, job, worker, now) for job in jobs)
    said = [shown.reason]
    if shown.state == "idle":
        said += [f"{speed.job}: {speed.evaluates}" for speed in speeds if speed.evaluates]
    said += [
        f"expected in {speed.expected_in_s:.0f} s"
        if speed.expected_in_s >= 0
        else f"falls behind by {-speed.expected_in_s:.0f} s"
        for speed in speeds
        if speed.expected_in_s is not None
    ]
    return WorkerView(
        id=worker.id,
        name=worker.name,
        state=shown.state,
        reason="; ".join(said),
        last_seen_s=0.0 if waiting else -1.0 if worker.seen_at is None else round(now - worker.seen_at, 1),
        version=worker.registration.version,
        hardware=worker.registration.hardware,
        data=worker.registration.data,
        trust=worker.registration.trust,
        labels=coordinator.tokens.labels_of(worker.id),
        assignment=_doing(lease) if lease else None,
        progress=lease.progress if lease else None,
        link=worker.link,
        address=caller.address[0] if caller else None,
        node=node,
        node_unknown=caller.found.why if caller else "it has not called since the coordinator started",
        path=path,
        warnings=paths.warnings(path, node, worker.link, verdict, now=datetime.now(UTC)),
        speeds=tuple(speed for speed in speeds if speed != WorkerSpeed(job=speed.job)),
    )


@dataclass(frozen=True)
class _JobNow:
    """What of a job that goes on is shown with its workers, by worker id."""

    id: str
    samples: Mapping[str, int]  # in the shard of the open round that was cut for it
    total: int  # samples in the open round
    evaluators: Mapping[str, str]  # why it only evaluates
    due_at: Mapping[str, float | None]  # monotonic seconds

    @classmethod
    def of(cls, coordinator: Coordinator, job: Job) -> "_JobNow":
        phase = job.inner
        shards = list(phase.shards.values()) if isinstance(phase, Training) else []
        evaluators = phase.evaluators if isinstance(phase, Training) else ()
        return cls(
            job.id,
            {shard.meant: shard.samples or 0 for shard in shards if shard.meant is not None},
            sum(shard.samples or 0 for shard in shards),
            {one.worker: one.why for one in evaluators if one.worker is not None},
            {due.worker: due.at for due in coordinator.dues(job).values()},
        )


def _speed(coordinator: Coordinator, job: _JobNow, worker: Worker, now: float) -> WorkerSpeed:
    """What is known of a worker at a job; nothing but the job's id if that is nothing."""
    measured, own = coordinator.speeds.of(job.id, worker.id), job.samples.get(worker.id)
    return WorkerSpeed(
        job=job.id,
        samples_per_s=measured.rate if measured else None,
        overhead_s=measured.updates[-1].overhead_s if measured else None,
        share=own / job.total if own else None,
        evaluates=job.evaluators.get(worker.id, ""),
        expected_in_s=_left(job.due_at.get(worker.id), now),
    )


def _where(task: Task, attempt: int) -> str:
    return f"{task}, attempt {attempt}"


def _doing(lease: Lease) -> str:
    return f"{lease.job}: {lease.task}"


def outputs(coordinator: Coordinator, job: Job) -> list[Output]:
    """What the task wrote last, on each worker that is at work for a job and said so; by the workers' names."""
    fleet = coordinator.fleet
    said = (
        Output(worker=fleet.workers[lease.worker].name, where=_where(lease.task, lease.attempt), said=lease.said)
        for lease in fleet.leases.values()
        if lease.job == job.id and lease.said and lease.worker in fleet.workers
    )
    return sorted(said, key=lambda one: one.worker)


def log_entries(coordinator: Coordinator, job: Job, after: int = 0) -> Iterator[LogEntry]:
    """Every trouble of a job after the fact of this id, oldest first."""
    for stored in coordinator.journal.facts(after=after, job=job.id, types=("handed_back",)):
        fact = stored.fact
        if isinstance(fact, HandedBack):
            task = Task(fact.kind, fact.round, fact.shard)
            yield LogEntry(
                id=stored.id,
                at=stored.at,
                worker=fact.worker_name,
                where=_where(task, fact.attempt),
                code=fact.code,
                sentence=fact.sentence,
                detail=fact.detail,
                cause=fact.cause,
                advice=fact.advice,
                scene=fact.scene,
            )
