"""The next version of a model: the files of one average, each made durable and named by its digest."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from common.codecs import codec
from common.messages import AggregationSection, ModelRef, StepRef
from server import folding, nova
from server.blobs import Blobs
from server.buffering import Batch
from server.failpoints import reach
from server.optimizers import FedNova, outer_step
from server.robust_rules import rule_of
from server.rounds import Aggregating, Job


@dataclass(frozen=True)
class Version:
    """What averaging a round gave. Every file is on the disk."""

    model: ModelRef
    step: StepRef | None  # how workers come here from the model before, where steps are sent
    memory: tuple[str, ...]  # digests of what the next average needs: outer states, a robust rule's, then the residual
    amplification: float | None = None  # server.amplification

    @property
    def digests(self) -> set[str]:
        """Of every file."""
        return {self.model.digest, *self.memory} | ({self.step.digest} if self.step is not None else set())


def rules_of(section: AggregationSection) -> folding.Rules:
    """How a job's updates become its next model.

    Raises:
        BadJobError: there is no such step or codec.
    """
    encoded = None if section.update == "fp32" else codec(section.update)
    down = encoded if section.download == "same" else None
    return folding.Rules(outer_step(section), encoded, down, rule_of(section))


def room_for(job: Job, size: int) -> int:
    """Bytes that the files of one average take, of a model of `size` bytes."""
    rules = rules_of(job.spec.aggregation)
    return size * (1 + rules.states + 2 * (rules.down is not None))


def make(job: Job, phase: Aggregating | Batch, blobs: Blobs, stopped: Callable[[], bool]) -> Version:
    """Average the frozen updates of a round, or of a version.

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
    targets = _targets(job.id, phase.round, rules, blobs)
    blobs.check_room(room_for(job, phase.base.size))
    states, memory = rules.states, [blobs.path(digest) for digest in job.memory]
    made = folding.average(
        blobs.path(phase.base.digest),
        [(blobs.path(update.digest), update.samples) for update in phase.accepted],
        targets,
        rules=rules,
        late=[
            (blobs.path(update.digest), update.samples, member.factor)
            for update, member in zip(phase.late, phase.members, strict=True)
        ]
        if isinstance(phase, Aggregating)
        else (),
        since=None if isinstance(phase, Aggregating) else _since(phase, blobs),
        weights=weights,
        memory=folding.Memory(tuple(memory[:states]), memory[states] if len(memory) > states else None),
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


def _since(batch: Batch, blobs: Blobs) -> list[folding.Since]:
    """What each update of a version began with, and what its change counts."""
    return [
        folding.Since(blobs.path(base.digest), member.factor)
        for base, member in zip(batch.bases, batch.members, strict=True)
    ]


def _targets(job_id: str, round_index: int, rules: folding.Rules, blobs: Blobs) -> folding.Targets:
    def part(what: str) -> Path:
        return blobs.part(f"{job_id}.{what}.{round_index}")

    return folding.Targets(
        model=part("model"),
        states=tuple(part(f"state{number}") for number in range(rules.states)),
        step=part("step") if rules.down else None,
        residual=part("residual") if rules.down else None,
    )
