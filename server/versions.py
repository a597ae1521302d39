"""The next version of a model: the files of one average, each made durable and named by its digest."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from common.codecs import codec
from common.messages import AggregationSection, ModelRef, StepRef
from common.privacy import first_clip
from server import folding, nova, privacy
from server.blobs import Blobs
from server.failpoints import reach
from server.inspection import measure
from server.optimizers import FedNova, outer_step
from server.rounds import Aggregating, Job


@dataclass(frozen=True)
class Version:
    """What averaging a round gave. Every file is on the disk."""

    model: ModelRef
    step: StepRef | None  # how workers come here from the model before, where steps are sent
    memory: tuple[str, ...]  # digests of what the next average needs: outer states, then the residual
    amplification: float | None = None  # server.amplification
    next_clip: float | None = None  # worker-level privacy: the bound of the next round

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
    return folding.Rules(outer_step(section), encoded, encoded if section.download == "same" else None)


def room_for(job: Job, size: int) -> int:
    """Bytes that the files of one average take, of a model of `size` bytes."""
    rules = rules_of(job.spec.aggregation)
    return size * (1 + rules.step.states + 2 * (rules.down is not None))


def make(job: Job, phase: Aggregating, blobs: Blobs, stopped: Callable[[], bool], seed: bytes | None = None) -> Version:
    """Average the frozen updates of a round.

    Args:
        job: the job.
        phase: the round.
        blobs: where its files are, and go.
        stopped: asked from time to time whether to give up.
        seed: the secret one of a job with worker-level privacy.

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
    next_clip = None
    if seed is not None:
        rules, next_clip = _private(job, phase, blobs, rules, stopped, seed)
    targets = _targets(job.id, phase.round, rules, blobs)
    blobs.check_room(room_for(job, phase.base.size))
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
    return Version(model, step, tuple(digest for _, digest in kept), made.amplification, next_clip)


def clip_of(job: Job) -> float:
    """Worker-level privacy: the bound of the round under way."""
    moved = job.spent.next_clip if job.spent is not None else None
    return first_clip(job.spec.privacy) if moved is None else moved


def _private(
    job: Job, phase: Aggregating, blobs: Blobs, rules: folding.Rules, stopped: Callable[[], bool], seed: bytes
) -> tuple[folding.Rules, float]:
    """The rules with clip and noise of this round, and the next round's clip."""
    base, norms = blobs.path(phase.base.digest), list[float]()
    for update in phase.accepted:
        if stopped():
            raise folding.Stopped(f"averaging was broken off before the norm of shard {update.shard}")
        norms.append(measure(blobs.path(update.digest), base, rules.update))
    clip = clip_of(job)
    noisy = privacy.noisy(job.spec, clip, norms, seed, phase.round)
    return replace(rules, noisy=noisy), privacy.next_clip(job.spec, clip, norms, seed, phase.round)


def _targets(job_id: str, round_index: int, rules: folding.Rules, blobs: Blobs) -> folding.Targets:
    def part(what: str) -> Path:
        return blobs.part(f"{job_id}.{what}.{round_index}")

    return folding.Targets(
        model=part("model"),
        states=tuple(part(f"state{number}") for number in range(rules.step.states)),
        step=part("step") if rules.down else None,
        residual=part("residual") if rules.down else None,
    )
