"""The next version of a model: the files of one average, each made durable and named by its digest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.codecs import codec
from common.facts import Slot
from common.messages import AggregationSection, ModelRef, StepRef
from server import drift, folding, nova, rounds, slots
from server.blobs import Blobs
from server.failpoints import reach
from server.optimizers import FedNova, outer_step
from server.rounds import Aggregating, Job


@dataclass(frozen=True)
class Version:
    """What averaging a round gave. Every file is on the disk."""

    model: ModelRef
    step: StepRef | None  # how workers come here from the model before, where steps are sent
    memory: tuple[str, ...]  # digests of what the next average needs: outer states, then the residual
    amplification: float | None = None  # server.amplification
    slots: tuple[Slot, ...] = ()  # what the shards of the round carry from now on
    slot_total: tuple[str, ...] = ()  # digests of the sum of all slots
    fresh: int = 0  # shards that carried nothing before

    @property
    def digests(self) -> set[str]:
        """Of every file."""
        found = {self.model.digest, *self.memory, *(slot.digest for slot in self.slots), *self.slot_total}
        return found | ({self.step.digest} if self.step is not None else set())


def rules_of(section: AggregationSection) -> folding.Rules:
    """How a job's updates become its next model.

    Raises:
        BadJobError: there is no such step or codec.
    """
    encoded = None if section.update == "fp32" else codec(section.update)
    return folding.Rules(outer_step(section), encoded, encoded if section.download == "same" else None)


def room_for(job: Job, size: int) -> int:
    """Bytes that the files of one average take, of a model of `size` bytes."""
    rules, updates = rules_of(job.spec.aggregation), len(rounds.accepted_of(job))
    carried = drift.room_for(job.spec, size, updates)
    return size * (1 + rules.step.states + 2 * (rules.down is not None)) + carried


def make(job: Job, phase: Aggregating, blobs: Blobs, stopped: Callable[[], bool]) -> Version:
    """Average the frozen updates of a round.

    Raises:
        Stopped: `stopped` said so (server.folding).
        BadUpdateError: an update no longer fits, or a new value is beyond its dtype.
        DiskFullError: there is no room for the files.
        OSError: reading or writing failed.
    """
    rules, weights = rules_of(job.spec.aggregation), None
    if isinstance(rules.step, FedNova):
        weighing = nova.weigh(job.spec.train, [(one.samples, one.steps) for one in (*phase.accepted, *phase.late)])
        rules, weights = replace(rules, step=FedNova(weighing.scale)), weighing.weights
    blobs.check_room(room_for(job, phase.base.size))
    with slots.made(job, phase, blobs, rules.update, stopped) as carried:
        if carried is None:
            return _fold(job, phase, blobs, rules, stopped, weights=weights)
        return _with_slots(job, phase, blobs, rules, carried, stopped)


def _with_slots(
    job: Job, phase: Aggregating, blobs: Blobs, rules: folding.Rules, carried: slots.Made, stopped: Callable[[], bool]
) -> Version:
    """The next version of a job with `train.drift`: each of its shards counts alike, as in the sum of their slots."""
    even = replace(phase, accepted=tuple(update.model_copy(update={"samples": 1}) for update in phase.accepted))
    step = drift.outer_step(job)
    if step is None:
        made = _fold(job, even, blobs, rules, stopped)
    else:
        made = _fold(
            job, even, blobs, replace(rules, step=step), stopped, reads=tuple(path for path, _ in carried.total)
        )
    for path, digest in carried.files:
        blobs.adopt(path, digest, durable=True)
    slot_total = tuple(digest for _, digest in carried.total)
    return replace(made, slots=carried.facts, slot_total=slot_total, fresh=carried.fresh)


def _fold(
    job: Job,
    phase: Aggregating,
    blobs: Blobs,
    rules: folding.Rules,
    stopped: Callable[[], bool],
    *,
    weights: Sequence[float] | None = None,
    reads: tuple[Path, ...] = (),
) -> Version:
    targets = _targets(job.id, phase.round, rules, blobs)
    states, memory = rules.step.states, [blobs.path(digest) for digest in job.memory]
    made = folding.average(
        blobs.path(phase.base.digest),
        [(blobs.path(update.digest), update.samples) for update in phase.accepted],
        targets,
        rules=rules,
        late=[
            (blobs.path(update.digest), update.samples, member.factor)
            for update, member in zip(phase.late, phase.members, strict=True)
        ],
        weights=weights,
        memory=folding.Memory(tuple(memory[:states]), memory[states] if len(memory) > states else None, reads),
        stopped=stopped,
    )
    model = ModelRef(digest=made.model, size=targets.model.stat().st_size)
    reach("model-written")
    kept, step = list(zip(targets.states, made.states, strict=True)), None
    if made.step is not None and targets.step is not None and targets.residual is not None:
        assert made.step.kept_digest is not None  # noqa: S101 - a step always leaves a residual
        step = StepRef(base=phase.base.digest, model=model.digest, digest=made.step.digest, size=made.step.size)
        blobs.adopt(targets.step, step.digest, durable=True)
        kept.append((targets.residual, made.step.kept_digest))
    for path, digest in kept:
        blobs.adopt(path, digest, durable=True)
    blobs.adopt(targets.model, model.digest, durable=True)
    reach("model-named")
    return Version(model, step, tuple(digest for _, digest in kept), made.amplification)


def _targets(job_id: str, round_index: int, rules: folding.Rules, blobs: Blobs) -> folding.Targets:
    def part(what: str) -> Path:
        return blobs.part(f"{job_id}.{what}.{round_index}")

    return folding.Targets(
        model=part("model"),
        states=tuple(part(f"state{number}") for number in range(rules.step.states)),
        step=part("step") if rules.down else None,
        residual=part("residual") if rules.down else None,
    )
