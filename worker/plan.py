"""What the agent decides: may this task run here, what is the child asked, what follows from an error, from an answer
and from what the last life left on the disk.

Pure: no network, disk, clock or tensor. Randomness is passed in.

    found in the spool       asked of the coordinator      what follows
    trained                  submit                        receipt: keep a train update until settled, drop the rest
                                                           superseded, late, job over, refused: drop
                                                           incomplete, damaged: send the bytes that are missing there
    not trained to the end   heartbeat                     continue, drain: go on from the checkpoint
                                                           superseded, cancelled: drop
                                                           pause: leave it lie for later
                                                           the third start of the same attempt: give it back
    handed in                poll                          settled: delete; wanted: send it again
"""

import errno
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.drift import alpha_of
from common.errors import (
    BadRequestError,
    BadUpdateError,
    ConflictError,
    DiskFullError,
    ForbiddenError,
    JobOverError,
    LateError,
    LydianError,
    NotFoundError,
    SupersededError,
    TooManyError,
    TooSlowError,
    UnauthenticatedError,
    UnavailableError,
    VersionSkewError,
)
from common.guarding import REFUSALS
from common.messages import (
    CLIENT_TERMS,
    Assignment,
    HeartbeatAnswer,
    Holding,
    JobSpec,
    Kind,
    StepRef,
    TaskRef,
    TrainSection,
    Trust,
    VersionView,
)
from common.sharding import derived_seed
from common.signing import Signer, why_unsigned

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 10.0
RESENDS = 5  # of bytes or messages that arrive damaged, before the call is given up
STARTS = 2  # of one attempt: an agent that died in it twice, and came no further, does not try again
HOLDINGS = 10_000  # that one message takes


@dataclass(frozen=True)
class Refusal:
    """Why this worker will not run a task, and the code that says it to the coordinator."""

    code: Literal["not_trusted", "unknown_task"]
    sentence: str


def refusal(
    task: TaskRef,
    *,
    builtin: Collection[str],
    trust: Trust,
    trusted: Collection[str],
    signers: Sequence[Signer] = (),
) -> Refusal | None:
    """Whether the worker's owner allows this task. None: it may run.

    Args:
        task: a built-in task by name, or a user's file by digest, with the signatures that came with it.
        builtin: names of the built-in tasks of this version.
        trust: none (built-in tasks only), listed (digests in `trusted` too), signed (those, and files that one of
            `signers` signed), any.
        trusted: the digests that the owner listed.
        signers: whose signatures count.
    """
    if task.digest is None:
        if task.name in builtin:
            return None
        return Refusal("unknown_task", f"this worker's version has no built-in task {task.name}: upgrade it")
    if trust == "any" or (trust in ("listed", "signed") and task.digest in trusted):
        return None
    if trust == "signed":
        unsigned = why_unsigned(task, signers)
        how = "read the file, then have it signed by whom this worker lists, start the worker with --signer and the"
        how += " key of who signed it, or with --allow FILE"
        return Refusal("not_trusted", f"{unsigned}: {how}") if unsigned else None
    how = "started with --trust none" if trust == "none" else "has not listed this file"
    return Refusal(
        "not_trusted",
        f"task {task.name} ({task.digest[:12]}…) is not built in and this worker {how}: read the file, then start the "
        f"worker with --trust listed --allow FILE, or --trust any to run whatever is submitted",
    )


def child_config(spec: JobSpec, builtin: Mapping[str, Any], data: Mapping[str, str]) -> dict[str, Any]:
    """The `config` of a task's functions: the [train] section, the task's own defaults, [config], data folders."""
    folders = dict(data)
    if spec.data.name is not None and spec.data.name in data:  # the owner's name for what the task calls by its own
        folders[spec.task] = data[spec.data.name]
    if spec.script:
        return {"data": folders}
    known = spec.train.model_dump(exclude_none=True, exclude=set(CLIENT_TERMS))
    train = {**known, "batch_size": batch_size(spec, found=0)}
    return {**train, **builtin, **spec.config, "data": folders}


def client_terms(spec: JobSpec) -> dict[str, Any]:
    """What of [train] the child is told beside `config`, where a task's own keys cannot be taken for it."""
    if spec.script:
        shared = spec.data.partition != "local"
        about = {"config": spec.config, "arguments": spec.arguments, "rounds": spec.rounds, "shared": shared}
        return {"script": about, "seed": init_seed(spec)}
    given = spec.train.model_dump(mode="json", include=set(CLIENT_TERMS) - {"dyn_alpha"})
    terms = {name: value for name, value in given.items() if value and value != "none"}
    if spec.train.drift == "feddyn":  # its pull to the round's model is that term
        terms["proximal"] = alpha_of(spec.train)
    if terms.keys() & {"personal", "trainable_only"}:  # what does not travel is built, and alike in every round
        terms["seed"] = init_seed(spec)
    return terms


def batch_size(spec: JobSpec, *, found: int) -> int:
    """Samples a step of a job here.

    Args:
        spec: the job's.
        found: by a probe of this machine's memory; 0: there was none, or not yet.
    """
    if spec.train.batch_size != "auto":
        return spec.train.batch_size
    return found or int(TrainSection.model_fields["batch_size"].default)


def shards_to_cut(assignment: Assignment) -> int | None:
    """Shards that the training set is cut into; None: as many as it has ids."""
    data = assignment.spec.data
    return None if data.partition == "natural" and data.shards == "auto" else assignment.shards


def measuring(spec: JobSpec) -> dict[str, Any]:
    """What the child is told of how the job is evaluated, beside the usual; nothing where it is as always.

    A worker measures on its own test data in the split `local-test`; where all of its data is its own, `test` is too.
    """
    wanted: dict[str, Any] = {"per_class": True} if spec.evaluation.per_class else {}
    if spec.evaluation.scope == "workers":
        wanted["splits"] = ["local-test", "test"] if spec.data.partition == "local" else ["local-test"]
    return wanted


def _largest(assignment: Assignment) -> int:
    """Samples in the largest shard of an even cut."""
    return -(-assignment.train_samples // assignment.shards)


def train_command(
    assignment: Assignment,
    *,
    base: str,
    indices: str | None,
    out: str,
    checkpoint: str | None = None,
    checkpoint_every_s: float = 0.0,
    optimizer: str = "",
    optimizer_from: str = "",
    personal: str = "",
    personal_from: str = "",
    found: int = 0,
    fits: int = 0,
    noise_seed: str = "",
    correction: str = "",
) -> dict[str, Any]:
    """What the child is asked to train.

    The seed depends on (job seed, round, shard) alone: whoever trains the shard draws the same numbers. One attempt
    gives the same command in every life of the agent, so that the child goes on from the checkpoint of the last one.

    Args:
        assignment: of kind train.
        base: path of the model to train.
        indices: path of the samples of the shard; None: all of this worker's own data.
        out: path of the update.
        checkpoint: path of the checkpoint.
        checkpoint_every_s: seconds between two checkpoints; 0: none is written, nor gone on from.
        optimizer: path of the optimiser's state at the end, where the job keeps it.
        optimizer_from: path of the state that the newest round of this shard that counted here left.
        personal: path of the personal tensors at the end, where the job has some.
        personal_from: path of those that the newest round of this shard that counted here left.
        found: samples a step that a probe found, where the job leaves that to each machine.
        fits: samples that this machine's memory takes at once; 0: as far as is known, any.
        noise_seed: the secret that example-level privacy draws from here.
        correction: path of what is added to each gradient, where the job has `train.drift`; empty: nothing.
    """
    train = assignment.spec.train
    sizes: dict[str, Any] = {"fits": fits} if fits else {}
    if train.batch_size == "auto":
        sizes["batch_size"] = batch_size(assignment.spec, found=found)
    epochs = train.local_epochs
    if epochs is None and train.local_steps is None and train.local_seconds is None:
        epochs = 1
    keeping: dict[str, Any] = {}
    if train.keep_optimizer:
        of = assignment.optimizer_of
        keeping = {"optimizer": optimizer, "optimizer_from": optimizer_from, "optimizer_of": of}
    if train.personal:
        of = assignment.optimizer_of
        keeping |= {"personal": personal, "personal_from": personal_from, "personal_of": of}
    if checkpoint is not None and checkpoint_every_s > 0:
        digest = assignment.base.digest if assignment.base else ""
        keeping |= {"checkpoint": checkpoint, "checkpoint_every_s": checkpoint_every_s, "base_digest": digest}
    if train.scheduled and train.local_steps is None:  # iid data and epochs: as JobSpec makes sure of
        keeping |= {"job_rounds": assignment.spec.rounds, "largest_shard": _largest(assignment)}
    return {
        "do": "train",
        "base": base,
        "indices": indices,
        "out": out,
        "seed": derived_seed(assignment.spec.seed, "train", assignment.round, assignment.shard),
        "round": assignment.round,
        "epochs": epochs,
        "steps": train.local_steps,
        "seconds": train.local_seconds,
        "total_steps": None if train.local_steps is None else assignment.spec.rounds * train.local_steps,
        **keeping,
        **sizes,
        **_private(assignment, noise_seed),
        **({"correction": correction} if correction else {}),
    }


def script_command(assignment: Assignment, *, base: str, indices: str | None, out: str) -> dict[str, Any]:
    """What the child is asked to train where it runs a script, whose length, batch and optimiser are its own.

    Args:
        assignment: of kind train.
        base: path of the model to train.
        indices: path of the samples of the shard; None: all that the script has there.
        out: path of the update.
    """
    shard = {"round": assignment.round, "shard": assignment.shard, "shards": assignment.shards}
    seed = derived_seed(assignment.spec.seed, "train", assignment.round, assignment.shard)
    return {"do": "train", "base": base, "indices": indices, "out": out, "seed": seed, **shard}


def _private(assignment: Assignment, seed: str) -> dict[str, Any]:
    """What the child needs for example-level privacy; nothing where the job has none."""
    section = assignment.spec.privacy
    if section.level != "example":
        return {}
    before = [[run.sample_rate, run.noise, run.steps] for run in assignment.private_before]
    wanted = {"clip": section.clip, "noise": section.noise, "delta": section.delta}
    return {"private": {**wanted, "seed": seed, "before": before}}


def probe_command(assignment: Assignment, *, base: str, indices: str | None) -> dict[str, Any]:
    """What the child is asked before a job whose batch is left to each machine."""
    seed = derived_seed(assignment.spec.seed, "train", assignment.round, assignment.shard)
    return {"do": "probe", "base": base, "indices": indices, "seed": seed}


def init_seed(spec: JobSpec) -> int:
    """The seed that the model is built from."""
    return derived_seed(spec.seed, "init")


# ---------------------------------------------------------------- calls that failed


@dataclass(frozen=True)
class Next:
    """What follows from an error of a call: wait and repeat it, send the bytes again, drop the work, or stop."""

    action: Literal["wait", "resend", "drop", "stop"]
    why: str


def after(error: LydianError, *, resends: int = 0) -> Next:
    """What the agent does after a call about an assignment failed.

    Args:
        error: what the call raised.
        resends: how often the same was sent again already because it arrived damaged.
    """
    match error:
        case (
            BadUpdateError(code="digest_mismatch" | "wrong_length")
            | ConflictError(code="incomplete")
            | BadRequestError()
            | UnavailableError(code="unreadable")
        ):  # what a flipped bit makes of an update, of a message or of an answer
            if resends < RESENDS:
                return Next("resend", str(error))
            return Next("drop", f"{error} (given up after {resends} times)")
        case UnavailableError() if error.code in REFUSALS:  # whoever stands there may be gone in a minute
            return Next("wait", f"{error}. {error.advice}")
        case UnavailableError() | DiskFullError() | TooSlowError():
            return Next("wait", str(error))
        case UnauthenticatedError() | ForbiddenError() | VersionSkewError():
            return Next("stop", error.lines())
        case SupersededError() | JobOverError() | LateError() | BadUpdateError() | NotFoundError():
            return Next("drop", str(error))
        case _ if error.status >= 500:
            return Next("wait", str(error))
        case _:
            return Next("drop", str(error))


def doubts_bytes(error: LydianError) -> bool:
    """Whether a failure may come from damaged bytes here, so that they are worth being hashed before the next try."""
    return isinstance(error, BadUpdateError) or type(error) is LydianError


def is_rival(error: LydianError) -> bool:
    """Whether an answer to a call of the worker itself (register, poll, heartbeat) says that another process works with
    its credential. Then there is nothing to try again: the two would push each other out in turn.
    """
    return isinstance(error, ConflictError) and error.code in ("superseded", "already_working")


def wait_s(failures: int, jitter: float, *, ttl_s: float = math.inf, error: LydianError | None = None) -> float:
    """Seconds to wait before the next try: exponential with full jitter, so that a fleet does not come back at once.

    Args:
        failures: tries that failed in a row, from 1.
        jitter: uniform in [0, 1).
        ttl_s: seconds of silence that end a lease, so that a coordinator that is back is heard from several times
            within one.
        error: how the last try failed: where a coordinator said how long its caller is to be quiet, it is no sooner.
    """
    longest: float = min(LONGEST_WAIT_S, ttl_s / 4, FIRST_WAIT_S * 2.0 ** min(failures - 1, 30))
    told = error.retry_after_s if isinstance(error, TooManyError) else 0.0
    return told + longest * jitter


def version_refusal(coordinator: VersionView, *, protocol: int, version: str) -> VersionSkewError | None:
    """Why this worker cannot work for that coordinator; None: it can, or the coordinator itself will say why not.

    Args:
        coordinator: what it says of itself.
        protocol: the one that this worker speaks.
        version: this worker's.
    """
    if coordinator.protocol >= protocol:
        return None
    return VersionSkewError(
        f"coordinator {coordinator.version} speaks protocol {coordinator.protocol}, "
        f"and worker {version} speaks protocol {protocol}, which it does not know",
        advice=f"Upgrade the coordinator, or install version {coordinator.version} here.",
    )


# ---------------------------------------------------------------- what the spool holds


def stays(kind: Kind) -> bool:
    """Whether a result is kept after its receipt, until the model made from it is on the coordinator's disk.

    An update may be lost there by a power cut. The first model is durable before its receipt; an evaluation is small.
    """
    return kind == "train"


@dataclass(frozen=True)
class Resumption:
    """What becomes of an attempt that the last life of the agent, or a rest, did not let be trained to the end."""

    action: Literal["go on", "leave", "give back", "drop"]
    why: str


def resumption(answer: HeartbeatAnswer, starts: int) -> Resumption:
    """Whether an unfinished attempt is carried on.

    Args:
        answer: the coordinator's to a heartbeat for it.
        starts: how often in a row it was started and came no further; 0: the last life left a checkpoint.
    """
    if answer.order in ("superseded", "cancelled"):
        return Resumption("drop", answer.reason)
    if answer.order == "pause":
        return Resumption("leave", answer.reason)
    if starts >= STARTS:
        sentence = f"the whole agent ended {starts} times in this work, no further than before: it is not started again"
        return Resumption("give back", sentence)
    return Resumption("go on", answer.reason)


def told(unsent: Sequence[Holding], kept: Sequence[Holding]) -> tuple[Holding, ...]:
    """The attempts that one message names: what is still to be handed in goes before what is kept, old before new.

    What does not fit has its turn when the coordinator has settled what does.
    """
    return tuple([*unsent, *kept][:HOLDINGS])


# ---------------------------------------------------------------- this machine's disk

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
CLOSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def disk_verdict(number: int | None) -> Literal["full", "closed", "broken", "other"]:
    """What an error of the system says about the disk.

    Args:
        number: errno; None where there was none.

    Returns:
        full or closed (read-only, forbidden): no work until that has changed. broken: what is on the disk cannot be
        known, so the agent must stop. other: not the disk.
    """
    if number == errno.EIO:
        return "broken"
    return "full" if number in FULL else "closed" if number in CLOSED else "other"


def errno_in(sentence: str) -> int | None:
    """The number of the system's error that the child's words name; None where they name none.

    Python writes `[Errno 28] No space left on device`; safetensors, in Rust, `No space left on device (os error 28)`.
    """
    found = re.search(r"\[Errno (\d{1,4})\]|\(os error (\d{1,4})\)", sentence)
    return int(found[1] or found[2]) if found else None


def way(steps: Sequence[StepRef], has: Callable[[str], bool]) -> tuple[StepRef, ...]:
    """The steps from the newest model that is here to the one that is wanted; none where there is no such way.

    Args:
        steps: to the wanted model, oldest first.
        has: whether a model of this digest is here.
    """
    for start in range(len(steps) - 1, -1, -1):
        if has(steps[start].base):
            return tuple(steps[start:])
    return ()


def room_needed(assignment: Assignment, *, fetched: int) -> int:
    """Bytes that must be free before an assignment is begun: for what is left to download, and for what comes out.

    A job that keeps optimisers leaves two numbers a parameter beside the update, as AdamW has; an encoded update is
    made of a whole one, takes half of that at most, and may leave as much as that out. A masked one has eight bytes a
    number, and the numbers of a model at least two. With `train.drift` come the shard's slot, the sum of all, the
    correction made of them and the slot after: float32 each.

    Args:
        assignment: with the size of the base, which an update has as well; that of a first model is not known.
        fetched: bytes of the base that are here already.
    """
    if assignment.base is None:
        return 0
    size = assignment.base.size
    if assignment.kind != "train":
        return max(size - fetched, 0)
    made = size
    if assignment.spec.train.keep_optimizer:
        made += 2 * size
    if assignment.spec.aggregation.update != "fp32":
        made += size // 2 + size
    if assignment.spec.secure.enabled:  # eight bytes a number, beside what was trained
        made += 4 * size
    if assignment.slots is not None:
        made += 4 * 2 * size
    return max(size - fetched, 0) + made
