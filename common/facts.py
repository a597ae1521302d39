"""What happened to a job: the facts that the journal keeps, the state is rebuilt from, and `lydian watch` streams.

One shape for all three, so that a line of `lydian watch --json` is the truth itself. A fact says what was decided,
never what should be decided: replaying facts needs no rule. Ids rise by one; `at` is for people and decides nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator

from common.messages import (
    Beginning,
    Count,
    Digest,
    JobSpec,
    Kind,
    Message,
    Metrics,
    ModelFacts,
    Name,
    PrivacySpent,
    PrivateRun,
    Progress,
    Scene,
    State,
    StepRef,
    Submitter,
    TaskSignature,
)


class Submitted(Message):
    """A job was taken. Its first fact."""

    type: Literal["submitted"] = "submitted"
    spec: JobSpec
    task_digest: Digest | None = Field(None, description="of the user's task file; None for a built-in task")
    signatures: tuple[TaskSignature, ...] = Field((), description="of the task file, as they came; nobody checked them")
    key: str = Field(description="the submitter's idempotency key")
    affordable: Count | None = Field(None, description="rounds within the privacy budget; None: there is none")
    planned_epsilon: float | None = Field(None, ge=0, description="what all its rounds would cost")
    by: Submitter | None = Field(None, description="whose call it was; None: not noted")
    begins_with: Beginning | None = Field(None, description="None: what model(config) builds")

    @model_validator(mode="before")
    @classmethod
    def _without_idle_keys(cls, given: Any) -> Any:  # noqa: ANN401 - whatever is to be validated
        """Journals may hold jobs of fedavg that set the outer step's keys: they were taken, and did nothing."""
        match given:
            case {"spec": {"aggregation": dict(section)} as spec} if section.get("algorithm", "fedavg") == "fedavg":
                pass
            case _:
                return given
        used = {key: value for key, value in section.items() if key not in ("outer_lr", "outer_momentum")}
        return {**given, "spec": {**spec, "aggregation": used}}


class StateChanged(Message):
    """The job's state changed by something else than a round: started, paused, resumed, ended."""

    type: Literal["job"] = "job"
    state: State
    reason: str
    room: Count = Field(0, description="paused: bytes that must be free before it goes on by itself; 0: by a person")


class HandedOut(Message):
    """A task of the job was given to a worker, as its next attempt."""

    type: Literal["handed_out"] = "handed_out"
    kind: Kind
    round: Count
    shard: Count
    attempt: int
    worker: Name = Field(description="the worker's id")
    claim_key: str = Field("", description="of the poll that claimed it: the same claim again gets the same attempt")


class HandedBack(Message):
    """An attempt ended without a result: it failed, expired, was released, or its result was refused."""

    type: Literal["handed_back"] = "handed_back"
    kind: Kind
    round: Count
    shard: Count
    attempt: int
    worker: Name
    worker_name: str
    code: str = Field(description="expired, released, refused codes, or what the worker gave (messages.Abandon)")
    sentence: str
    detail: str = ""
    cause: str = Field("", description="what usually does that (common.advice); empty: not known")
    advice: str = Field("", description="what to do about it")
    scene: Scene | None = Field(None, description="the machine then")
    excludes: bool = Field(False, description="the worker gets no more work of the job: it could not do its part")


class Initialised(Message):
    """The model was built, from the seed or with what the job begins with: version 0."""

    type: Literal["initialised"] = "initialised"
    attempt: int
    worker: Name
    digest: Digest
    size: Count
    facts: ModelFacts
    update: str | None = Field(None, description="how updates travel from now on, where the job left that open")


class Shard(Message):
    """One shard of a round."""

    shard: Count
    start: Count = 0
    stop: Count = Field(0, description="samples [start, stop) of the job's order")
    worker: Name | None = Field(None, description="the only worker that can train it: its own data")
    meant: Name | None = Field(None, description="the worker that it was cut for, which goes first")

    @property
    def samples(self) -> int | None:
        """Samples in the shard; None while only its worker knows."""
        return None if self.worker is not None else self.stop - self.start


class Absent(Message):
    """A worker that a round goes, or went, without; or a shard that nobody had."""

    worker: Name | None = Field(None, description="the worker's id; None: nobody had the shard")
    worker_name: str = ""
    shard: Count | None = Field(None, description="without an update in time; None: it was given no shard")
    why: str


class Opened(Message):
    """A round began."""

    type: Literal["opened"] = "opened"
    round: Count
    base: Digest
    shards: tuple[Shard, ...]
    reason: str
    evaluators: tuple[Absent, ...] = Field((), description="workers that are too slow for a shard, and only evaluate")
    buffer: Count | None = Field(None, description="asynchronous: the updates that make a version")
    drawn_from: Count | None = Field(
        None, description="members that the shards are a random sample of, which may be empty; None: they are no sample"
    )


class OpenedAnew(Message):
    """A round began once more, from its base: a secure sum could not come about. No update of it counts any more."""

    type: Literal["opened_anew"] = "opened_anew"
    round: Count
    seal: Count = Field(description="how often it was begun anew, this time included")
    shards: tuple[Shard, ...]
    reason: str
    evaluators: tuple[Absent, ...] = ()


class Accepted(Message):
    """An update counts."""

    type: Literal["accepted"] = "accepted"
    round: Count
    shard: Count
    attempt: int
    worker: Name
    worker_name: str
    digest: Digest
    samples: Count
    steps: Count
    seconds: float
    metrics: Metrics
    bytes_down: Count
    bytes_up: Count
    resumed_at: Count = Field(0, description="the step of the checkpoint that its worker went on from; 0: none")
    private: PrivateRun | None = Field(None, description="what a training with example-level privacy ran")
    took_s: float | None = Field(
        None, ge=0, description="seconds from hand-out to hand-in on the coordinator's clock; None: it did not see both"
    )
    norm: float | None = Field(
        None, ge=0, description="L2 norm of its change over the trained tensors; None: the job does not ask for it"
    )
    rate_sum: float | None = Field(None, description="train.drift: sum of the learning rates of its steps")


class Lost(Message):
    """The bytes of an accepted update are not whole on the disk any more; its worker is asked for its copy."""

    type: Literal["lost"] = "lost"
    round: Count
    shard: Count
    attempt: int
    worker: Name
    worker_name: str
    digest: Digest
    reason: str


class Restored(Message):
    """The bytes of a lost update are here again."""

    type: Literal["restored"] = "restored"
    round: Count
    shard: Count
    attempt: int
    worker: Name
    worker_name: str
    digest: Digest


class Late(Message):
    """An update is not used: it came too late; or it came late, was to be used, and a power cut took it."""

    type: Literal["late"] = "late"
    round: Count
    shard: Count
    attempt: int
    worker: Name


class Extended(Message):
    """The deadline passed below the quorum: the round gets its time once more."""

    type: Literal["extended"] = "extended"
    round: Count
    reason: str


class LateMember(Message):
    """An update that came after its round had closed, and counts in a later one; asynchronous: any update."""

    round: Count = Field(description="that it was trained in")
    shard: Count
    worker: Name
    worker_name: str
    staleness: Count = Field(description="versions of the model made since the one that it began with")
    factor: float = Field(gt=0, le=1, description="of its change, beside that of an update in time")


class Frozen(Message):
    """The set of updates that will be averaged is decided; nothing changes it any more."""

    type: Literal["frozen"] = "frozen"
    round: Count
    shards: tuple[Count, ...]
    reason: str
    absent: tuple[Absent, ...] = Field((), description="who is not in it, and why")
    late: tuple[LateMember, ...] = Field((), description="updates of earlier rounds that are in it")
    members: tuple[LateMember, ...] = Field(
        (), description="asynchronous: every update that is in it, in the order in which they came and are added"
    )


class Slot(Message):
    """What a shard carries to the next round that it is trained in (common.drift)."""

    key: str = Field(description="the shard's number; where the data is a worker's own, that worker's id")
    digest: Digest


class RoundClosed(Message):
    """A round was averaged; its model is durable."""

    type: Literal["round"] = "round"
    round: Count
    seconds: float
    workers: Count = Field(description="workers whose updates count")
    shards: Count
    left_out: Count = Field(0, description="shards without an update in time")
    absent: tuple[Absent, ...] = Field(
        (), description="who is not in it, and why: those shards, and workers without one"
    )
    late: tuple[LateMember, ...] = Field((), description="updates of earlier rounds that are in it")
    samples: Count
    bytes_down: Count
    bytes_up: Count
    digest: Digest
    size: Count
    metrics: dict[str, float] = Field(default_factory=dict, description="means over the updates: train_loss …")
    measured_by: tuple[Name, ...] = Field(
        (), description="evaluation.scope = workers: ids of those who are to measure its model on their own data"
    )
    step: StepRef | None = Field(None, description="how workers come here from the model before, where steps are sent")
    memory: tuple[Digest, ...] = Field(
        (), description="what the next round needs: outer states, a robust rule's, the residual"
    )
    amplification: float | None = Field(
        None, description="how far the outer step moved the model, in lengths of the mean change; None: nothing changed"
    )
    warning: str = Field("", description="what about this round needs a person; empty: nothing")
    privacy: PrivacySpent | None = Field(None, description="what a private job has spent so far; None: it is not one")
    slots: tuple[Slot, ...] = Field((), description="train.drift: what the shards of this round carry from now on")
    slot_total: tuple[Digest, ...] = Field((), description="the sum of all slots, and what of it float32 leaves out")
    fresh: Count = Field(0, description="shards of this round that carried nothing before: their slots were zeros")


class Measured(Message):
    """One worker measured the model of a round on its own test data, or will not."""

    type: Literal["measured"] = "measured"
    round: Count
    shard: Count = Field(description="which of RoundClosed.measured_by the worker is")
    attempt: Count = Field(description="0: it was never asked")
    worker: Name
    worker_name: str
    metrics: Metrics = Field(default_factory=dict)
    samples: Count = 0
    seconds: float = 0.0
    why: str = Field("", description="why there are no numbers of it; empty: there are")


class WorkerMeasured(Message):
    """What one worker's own test data says of a model."""

    worker: Name = Field(description="the worker's id")
    worker_name: str
    attempt: Count = Field(description="0: it was never asked")
    metrics: dict[str, float]
    samples: Count
    why: str = Field("", description="why there are no numbers of it; empty: there are")


class Evaluated(Message):
    """The model of a round was measured: on the held-out split, or by each worker on its own."""

    type: Literal["evaluation"] = "evaluation"
    round: Count
    attempt: int
    worker: Name
    metrics: dict[str, float]
    samples: Count
    seconds: float
    best: bool
    stale: Count = Field(0, description="evaluations in a row, this one counted, without a better target_metric")
    workers: tuple[WorkerMeasured, ...] = Field(
        (), description="evaluation.scope = workers: each one's; the metrics are the means over all their samples"
    )


class EvaluationGivenUp(Message):
    """The model of a round could not be measured; the job goes on."""

    type: Literal["evaluation_given_up"] = "evaluation_given_up"
    round: Count
    reason: str


Fact = Annotated[
    Submitted | StateChanged | HandedOut | HandedBack | Initialised | Opened | OpenedAnew | Accepted | Lost | Restored
    | Late | Extended | Frozen | RoundClosed | Measured | Evaluated | EvaluationGivenUp,
    Field(discriminator="type"),
]  # fmt: skip
FACT: TypeAdapter[Fact] = TypeAdapter(Fact)


class WorkerNow(Message):
    """What one worker does for the job at this moment."""

    worker: str
    doing: str
    progress: Progress | None = None
    expected_in_s: float | None = Field(
        None, description="seconds until its update is expected, by its own history; below 0: it falls behind"
    )


class Now(Message):
    """Where the job stands at this moment. Streamed beside the facts, never kept, so it has no id."""

    type: Literal["now"] = "now"
    state: State
    reason: str = Field(description="what is awaited, in words")
    round: Count
    rounds: Count
    received: Count = Field(description="updates in, of this round")
    shards: Count
    workers: tuple[WorkerNow, ...] = ()
