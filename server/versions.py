"""The next version of a model: the files of one average, each made durable and named by its digest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.codecs import codec
from common.errors import BadUpdateError
from common.facts import Accepted, Slot
from common.fixed import Fixed
from common.messages import AggregationSection, ModelRef, StepRef
from common.privacy import first_clip
from common.secure import masks_left
from server import drift, folding, nova, privacy, rounds, slots
from server.blobs import Blobs
from server.buffering import Batch
from server.failpoints import reach
from server.optimizers import FedNova, outer_step
from server.robust_rules import rule_of
from server.rounds import Aggregating, Job
from server.securing import Seal
from server.unmasking import unmask


@dataclass(frozen=True)
class Version:
    """What averaging a round gave. Every file is on the disk."""

    model: ModelRef
    step: StepRef | None  # how workers come here from the model before, where steps are sent
    memory: tuple[str, ...]  # digests of what the next average needs: outer states, a robust rule's, then the residual
    amplification: float | None = None  # server.amplification
    next_clip: float | None = None  # worker-level privacy: the bound of the next round
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
    down = encoded if section.download == "same" else None
    return folding.Rules(outer_step(section), encoded, down, rule_of(section))


def room_for(job: Job, size: int) -> int:
    """Bytes that the files of one average take, of a model of `size` bytes."""
    rules, updates = rules_of(job.spec.aggregation), len(rounds.accepted_of(job))
    carried = drift.room_for(job.spec, size, updates)
    return size * (1 + rules.states + 2 * (rules.down is not None) + job.spec.secure.enabled) + carried


def make(
    job: Job,
    phase: Aggregating | Batch,
    blobs: Blobs,
    stopped: Callable[[], bool],
    seal: Seal | None = None,
    seed: bytes | None = None,
) -> Version:
    """Average the frozen updates of a round, or of a version.

    Args:
        job: the job.
        phase: the frozen round.
        blobs: where the files are.
        stopped: asked now and then whether to give up.
        seal: the round's secure sum, where its updates are masked.
        seed: of the noise, where the job is private by worker.

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
        rules, next_clip = _private(job, phase, rules, seed)
    blobs.check_room(room_for(job, phase.base.size))
    if isinstance(phase, Aggregating):
        with slots.made(job, phase, blobs, rules.update, stopped) as carried:
            if carried is not None:
                return _with_slots(job, phase, blobs, rules, carried, stopped)
    if seal is not None and isinstance(phase, Aggregating):
        updates = [_unmasked(job, phase, seal, blobs, stopped)]
    else:
        updates = [(blobs.path(update.digest), update.samples) for update in phase.accepted]
    made = _fold(job, phase, updates, blobs, rules, stopped, weights=weights)
    if seal is not None:
        updates[0][0].unlink()
    return replace(made, next_clip=next_clip)


def _with_slots(
    job: Job, phase: Aggregating, blobs: Blobs, rules: folding.Rules, carried: slots.Made, stopped: Callable[[], bool]
) -> Version:
    """The next version of a job with `train.drift`: each of its shards counts alike, as in the sum of their slots."""
    updates = [(blobs.path(update.digest), 1) for update in phase.accepted]
    step = drift.outer_step(job)
    if step is None:
        made = _fold(job, phase, updates, blobs, rules, stopped)
    else:
        made = _fold(
            job,
            phase,
            updates,
            blobs,
            replace(rules, step=step),
            stopped,
            reads=tuple(path for path, _ in carried.total),
        )
    for path, digest in carried.files:
        blobs.adopt(path, digest, durable=True, synced=True)
    slot_total = tuple(digest for _, digest in carried.total)
    return replace(made, slots=carried.facts, slot_total=slot_total, fresh=carried.fresh)


def _fold(
    job: Job,
    phase: Aggregating | Batch,
    updates: Sequence[tuple[Path, int]],
    blobs: Blobs,
    rules: folding.Rules,
    stopped: Callable[[], bool],
    *,
    weights: Sequence[float] | None = None,
    reads: tuple[Path, ...] = (),
) -> Version:
    targets = _targets(job.id, phase.round, rules, blobs)
    states, memory = rules.states, [blobs.path(digest) for digest in job.memory]
    made = folding.average(
        blobs.path(phase.base.digest),
        updates,
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
        memory=folding.Memory(tuple(memory[:states]), memory[states] if len(memory) > states else None, reads),
        stopped=stopped,
    )
    model = ModelRef(digest=made.model, size=targets.model.stat().st_size)
    reach("model-written")
    kept, step = list(zip(targets.states, made.states, strict=True)), None
    if made.step is not None and targets.step is not None and targets.residual is not None:
        assert made.step.kept_digest is not None  # noqa: S101 - a step always leaves a residual
        step = StepRef(base=phase.base.digest, model=model.digest, digest=made.step.digest, size=made.step.size)
        blobs.adopt(targets.step, step.digest, durable=True, synced=True)
        kept.append((targets.residual, made.step.kept_digest))
    for path, digest in kept:
        blobs.adopt(path, digest, durable=True, synced=True)
    blobs.adopt(targets.model, model.digest, durable=True, synced=True)
    reach("model-named")
    return Version(model, step, tuple(digest for _, digest in kept), made.amplification)


def clip_of(job: Job) -> float:
    """Worker-level privacy: the bound of the round under way."""
    moved = job.spent.next_clip if job.spent is not None else None
    return first_clip(job.spec.privacy) if moved is None else moved


def norm_of(update: Accepted) -> float:
    """How far a private round's update is from its base (L2), as it was measured when it came.

    Raises:
        BadUpdateError: it was not: whoever took it did not know that it would be clipped. Nothing goes in unclipped.
    """
    if update.norm is None:
        raise BadUpdateError(
            f"the update of shard {update.shard} was taken without its norm being measured, so it cannot be clipped",
            advice="An older coordinator took it: cancel the job, and submit it anew.",
        )
    return update.norm


def _private(job: Job, phase: Aggregating | Batch, rules: folding.Rules, seed: bytes) -> tuple[folding.Rules, float]:
    """The rules with clip and noise of this round, and the next round's clip."""
    norms = [norm_of(update) for update in phase.accepted]
    clip = clip_of(job)
    noisy = privacy.noisy(job.spec, clip, norms, seed, phase.round)
    return replace(rules, noisy=noisy), privacy.next_clip(job.spec, clip, norms, seed, phase.round)


def _since(batch: Batch, blobs: Blobs) -> list[folding.Since]:
    """What each update of a version began with, and what its change counts."""
    return [
        folding.Since(blobs.path(base.digest), member.factor)
        for base, member in zip(batch.bases, batch.members, strict=True)
    ]


def _unmasked(job: Job, phase: Aggregating, seal: Seal, blobs: Blobs, stopped: Callable[[], bool]) -> tuple[Path, int]:
    """The mean of a round's masked updates, as the update of one worker."""
    if seal.roster is None or seal.group is None or seal.survivors is None:
        raise BadUpdateError(f"round {phase.round} has no secure sum to unmask", code="bad_shares")
    masks = masks_left(seal.roster, seal.group, seal.survivors, seal.reveals)
    fixed = Fixed(job.spec.secure.clip, job.spec.secure.bits)
    path, updates = blobs.part(f"{job.id}.unmasked.{phase.round}"), [blobs.path(of.digest) for of in phase.accepted]
    samples = unmask(blobs.path(phase.base.digest), updates, path, fixed=fixed, masks=masks, stopped=stopped)
    return path, samples


def _targets(job_id: str, round_index: int, rules: folding.Rules, blobs: Blobs) -> folding.Targets:
    def part(what: str) -> Path:
        return blobs.part(f"{job_id}.{what}.{round_index}")

    return folding.Targets(
        model=part("model"),
        states=tuple(part(f"state{number}") for number in range(rules.states)),
        step=part("step") if rules.down else None,
        residual=part("residual") if rules.down else None,
    )
