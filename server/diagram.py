"""Draws the job's state diagram from the round machine itself: `python -m server.diagram` prints it as Mermaid.

Nothing is drawn from a list. Small jobs are played through every decision from every state that can be reached; each
change of state seen is an arrow; so the picture cannot differ from the code. docs/architecture.md holds a copy, and a
test compares the two.
"""

import sys
from collections.abc import Callable, Iterator

from common.errors import LydianError
from common.facts import Accepted, Frozen, HandedBack, Initialised, Submitted
from common.messages import JobSpec, ModelFacts, ModelRef, Submission
from server import rounds
from server.cutting import Place
from server.rounds import Job, Limits, Step, Task

_ONE_STRIKE = Limits(failures=1, expiries=1, evaluation_failures=1)
_MODEL = ModelRef(digest="0" * 64, size=1)
_WORKER = ("w",)
_PLACES = (Place("w", "w"),)
_ORDER = (
    "queued",
    "initialising",
    "training",
    "aggregating",
    "evaluating",
    "paused",
    "finished",
    "failed",
    "cancelled",
)

Move = tuple[str, Callable[[Job], Step]]


def arrows() -> list[tuple[str, str, str]]:
    """(state, state after, what happened) of every change of state that the machine can make, in reading order."""
    seen: set[tuple[str, str, str]] = set()
    for test_samples in (0, 1):
        _explore(_job(rounds_wanted=2), test_samples, seen)
    _explore(_job(rounds_wanted=3, patience=1), 1, seen)
    return sorted(seen, key=lambda arrow: (_ORDER.index(arrow[0]), _ORDER.index(arrow[1]), arrow[2]))


def mermaid() -> str:
    """The diagram; several reasons for one arrow share its label."""
    lines = ["stateDiagram-v2", "    [*] --> queued: submit"]
    labels: dict[tuple[str, str], list[str]] = {}
    for before, after, why in arrows():
        labels.setdefault((before, after), []).append(why)
    lines += [f"    {before} --> {after}: {', '.join(whys)}" for (before, after), whys in labels.items()]
    lines += [f"    {state} --> [*]" for state in ("finished", "failed", "cancelled")]
    return "\n".join(lines)


def _explore(start: Job, test_samples: int, seen: set[tuple[str, str, str]]) -> None:
    """Make every move from every job that differs in what matters here, until nothing new appears."""
    todo, known = [start], set()
    while todo:
        job = todo.pop()
        if (key := _essence(job)) in known:
            continue
        known.add(key)
        for why, move in _moves(test_samples):
            after = _after(job, move)
            if after is None:
                continue
            if after.phase.state != job.phase.state:
                seen.add((job.phase.state, after.phase.state, why))
            todo.append(after)


def _after(job: Job, move: Callable[[Job], Step]) -> Job | None:
    try:
        step = move(job)
    except LydianError:  # the machine refuses this move in this state: no arrow
        return None
    for fact in step.facts:
        job = rounds.evolve(job, fact, 0.0)
    return job if step.facts else None


def _essence(job: Job) -> tuple[object, ...]:
    inner = job.inner
    accepted = len(inner.accepted) if isinstance(inner, rounds.Training | rounds.Aggregating) else 0
    extended = isinstance(inner, rounds.Training) and inner.extended
    given = tuple(rounds.tries_of(job, task).attempt > 0 for task in _tasks(job))
    measured = job.reference is not None
    return (job.phase.state, inner.state, job.closed, accepted, extended, tuple(job.evaluations), given, measured)


def _tasks(job: Job) -> Iterator[Task]:
    yield Task("init", 0)
    yield Task("train", job.closed + 1)
    yield from (Task("evaluate", round_index) for round_index in job.evaluations)


def _moves(test_samples: int) -> list[Move]:
    return [
        ("workers are there", lambda job: rounds.begin(job, _WORKER, 1)),
        ("handed out", _hand_out),
        ("model built", lambda job: rounds.take_init(job, _built(test_samples), _PLACES, 0.0)),
        ("update accepted", lambda job: rounds.take_update(job, _update(job))),
        ("all updates or quorum in", lambda job: rounds.close_if_due(job, _WORKER, 0.0)),
        ("quorum missed twice", _miss_deadline),
        ("a power cut took an update, and its worker is gone", _lose),
        ("round averaged", lambda job: rounds.close(job, _MODEL, seconds=0.0, places=_PLACES, now=0.0)),
        ("target reached", lambda job: _evaluate(job, 1.0)),
        ("evaluated", lambda job: _evaluate_once_more(job, stops=False)),
        ("no better for long", lambda job: _evaluate_once_more(job, stops=True)),
        ("evaluation given up", lambda job: _fail_task(job, "evaluate")),
        ("task keeps failing", lambda job: _fail_task(job, "init", "train")),
        ("pause", lambda job: rounds.pause(job, "a user")),
        ("resume", lambda job: rounds.resume(job, "a user")),
        ("cancel", lambda job: rounds.cancel(job, "a user")),
    ]


def _job(rounds_wanted: int, patience: int | None = None) -> Job:
    wanted = {"task": "t", "rounds": rounds_wanted, "target": 1.0, "data": {"shards": 1}, "round": {"deadline": 1.0}}
    wanted["evaluation"] = {"patience": patience}
    return rounds.new_job("j", Submitted(spec=JobSpec.model_validate(wanted), key="k"))


def _built(test_samples: int) -> Initialised:
    facts = ModelFacts(parameters=1, train_samples=1, test_samples=test_samples, bounds=(0, 1))
    return Initialised(attempt=1, worker="w", digest=_MODEL.digest, size=1, facts=facts)


def _hand_out(job: Job) -> Step:
    task = rounds.next_task(job, "w", rounds.Held())
    if task is None or rounds.tries_of(job, task).attempt:
        return Step()
    return rounds.hand_out(job, task, "w")


def _update(job: Job) -> Accepted:
    return Accepted(
        round=job.closed + 1,
        shard=0,
        attempt=1,
        worker="w",
        worker_name="w",
        digest=_MODEL.digest,
        samples=1,
        steps=1,
        seconds=0.0,
        metrics={},
        bytes_down=0,
        bytes_up=0,
    )


def _miss_deadline(job: Job) -> Step:
    """Long after any deadline, with something still missing."""
    step = rounds.close_if_due(job, _WORKER, 1e9)
    return Step() if any(isinstance(fact, Frozen) for fact in step.facts) else step


def _lose(job: Job) -> Step:
    """The bytes of an accepted update are gone, and so is the worker that had a copy."""
    update = next(iter(rounds.accepted_of(job)), None)
    return Step() if update is None else Step((_back(Task("train", update.round), "lost"),))


def _evaluate(job: Job, accuracy: float) -> Step:
    if not job.evaluations:
        return Step()
    given = Submission(attempt=1, metrics={"accuracy": (accuracy, 1.0)})
    return rounds.take_evaluation(job, min(job.evaluations), given, "w")


def _evaluate_once_more(job: Job, *, stops: bool) -> Step:
    """An evaluation as good as the one before, if it ends the job, or if it does not."""
    step = _evaluate(job, 0.0)
    return step if step.reason.startswith("stopped early") == stops else Step()


def _fail_task(job: Job, *kinds: str) -> Step:
    task = next((t for t in _tasks(job) if t.kind in kinds and rounds.is_open(job, t)), None)
    if task is None:
        return Step()
    return rounds.hand_back(job, _back(task, "task_failed"), _ONE_STRIKE)


def _back(task: Task, code: str) -> HandedBack:
    return HandedBack(
        kind=task.kind,
        round=task.round,
        shard=0,
        attempt=1,
        worker="w",
        worker_name="w",
        code=code,
        sentence="x",
    )


if __name__ == "__main__":
    sys.stdout.write(mermaid() + "\n")
