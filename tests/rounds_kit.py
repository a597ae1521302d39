"""Small builders for tests of the round machine and the fleet: a job, and short words for what happens to it."""

from typing import Any

from common import PROTOCOL
from common.facts import Accepted, Fact, HandedBack, Initialised, Submitted
from common.messages import (
    Hardware,
    JobSpec,
    ModelFacts,
    ModelRef,
    Registration,
    Submission,
    TorchBuild,
)
from common.sharding import cut
from server import rounds
from server.cutting import Place
from server.rounds import Job, Limits, Step, Task

DIGEST = "0" * 64
LIMITS = Limits()


def digest(number: int) -> str:
    return f"{number:064x}"


def spec(**keys: Any) -> JobSpec:
    """A job spec; sections as dictionaries: spec(rounds=2, round={"quorum": 2})."""
    return JobSpec.model_validate({"task": "digits", "rounds": 2, "data": {"shards": 2}, **keys})


def registration(name: str = "w", **keys: Any) -> Registration:
    build = TorchBuild(version="2.14.1", device="cpu", threads=1)
    hardware = Hardware(hostname=name, system="Linux", python="3.11", cpu="x", cores=1, memory=1, torch=build)
    fields = {"name": name, "protocol": PROTOCOL, "version": "0.1.0", "start_id": "s1", "hardware": hardware, **keys}
    return Registration.model_validate(fields)


def at(*workers: str) -> list[Place]:
    """Places of live workers of unknown speed."""
    return [Place(worker, worker) for worker in workers]


class Play:
    """A job on a stage: applies steps and keeps every fact, so that the play can be replayed."""

    def __init__(self, spec: JobSpec, task_digest: str | None = None) -> None:
        self.first = Submitted(spec=spec, task_digest=task_digest, key="k")
        self.job: Job = rounds.new_job("job-1", self.first)
        self.facts: list[Fact] = []
        self.now = 0.0

    def do(self, step: Step) -> Step:
        for fact in step.facts:
            self.facts.append(fact)
            self.job = rounds.evolve(self.job, fact, self.now)
        return step

    def replayed(self) -> Job:
        job = rounds.new_job("job-1", self.first)
        for fact in self.facts:
            job = rounds.evolve(job, fact, self.now)
        return job

    # short words ------------------------------------------------------------

    def begin(self, *workers: str) -> Step:
        return self.do(rounds.begin(self.job, workers, len(workers)))

    def init(
        self, worker: str = "a", *, places: tuple[str, ...] = ("a", "b"), test_samples: int = 10, **facts: Any
    ) -> Step:
        self.give(Task("init", 0), worker)
        return self.do(
            rounds.take_init(self.job, self.made(worker, test_samples=test_samples, **facts), at(*places), self.now)
        )

    def made(
        self, worker: str, *, total: int = 20, test_samples: int = 10, bounds: Any = None, attempt: int = 1
    ) -> Initialised:
        shards = self.job.spec.data.shards
        count = 2 if shards == "auto" else shards
        chosen = cut(total, [1.0] * count) if bounds is None else tuple(bounds)
        facts = ModelFacts(parameters=5, train_samples=total, test_samples=test_samples, bounds=chosen)
        return Initialised(attempt=attempt, worker=worker, digest=DIGEST, size=100, facts=facts)

    def give(self, task: Task, worker: str) -> Step:
        return self.do(rounds.hand_out(self.job, task, worker))

    def update(
        self, shard: int, worker: str, *, attempt: int = 1, samples: int = 10, number: int | None = None
    ) -> Accepted:
        phase = self.job.inner
        round_index = getattr(phase, "round", 0)
        return Accepted(
            round=round_index,
            shard=shard,
            attempt=attempt,
            worker=worker,
            worker_name=worker,
            digest=digest(1000 * round_index + shard if number is None else number),
            samples=samples,
            steps=1,
            seconds=1.0,
            metrics={"train_loss": (samples * 2.0, float(samples))},
            bytes_down=7,
            bytes_up=9,
        )

    def train(self, shard: int, worker: str, *, samples: int = 10) -> Step:
        """Hand a shard out and take its update."""
        phase = self.job.inner
        assert isinstance(phase, rounds.Training)
        task = Task("train", phase.round, shard)
        self.give(task, worker)
        attempt = rounds.tries_of(self.job, task).attempt
        update = self.update(shard, worker, attempt=attempt, samples=samples)
        rounds.judge(self.job, task, submission(update), worker)
        return self.do(rounds.take_update(self.job, update))

    def back(self, task: Task, code: str, *, worker: str = "a", attempt: int | None = None) -> Step:
        number = rounds.tries_of(self.job, task).attempt if attempt is None else attempt
        fact = HandedBack(
            kind=task.kind,
            round=task.round,
            shard=task.shard,
            attempt=max(number, 1),
            worker=worker,
            worker_name=worker,
            code=code,
            sentence=f"{code} happened",
        )
        return self.do(rounds.hand_back(self.job, fact, LIMITS))

    def close_if_due(self, *live: str) -> Step:
        return self.do(rounds.close_if_due(self.job, live, self.now))

    def close(self, number: int = 77, *, places: tuple[str, ...] = ("a", "b")) -> Step:
        model = ModelRef(digest=digest(number), size=100)
        return self.do(rounds.close(self.job, model, seconds=1.0, places=at(*places), now=self.now))

    def whole_round(self, *workers: str, number: int = 77) -> Step:
        """Train every shard of the open round, freeze and close it."""
        phase = self.job.inner
        assert isinstance(phase, rounds.Training)
        for index, shard in enumerate(phase.shards):
            self.train(shard, workers[index % len(workers)])
        self.close_if_due(*workers)
        return self.close(number)

    def evaluate(self, round_index: int, worker: str = "a", **metrics: tuple[float, float]) -> Step:
        task = Task("evaluate", round_index)
        self.give(task, worker)
        attempt = rounds.tries_of(self.job, task).attempt
        given = Submission(attempt=attempt, metrics=metrics or {"accuracy": (9.0, 10.0)}, seconds=0.5)
        return self.do(rounds.take_evaluation(self.job, round_index, given, worker))


def submission(update: Accepted) -> Submission:
    return Submission(attempt=update.attempt, digest=update.digest, samples=update.samples)


def training(**keys: Any) -> Play:
    """A job whose first round is open, with two workers a and b."""
    play = Play(spec(**keys))
    play.begin("a", "b")
    play.init()
    return play
