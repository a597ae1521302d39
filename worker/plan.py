"""What the agent decides: may this task run here, what is the child asked, what follows from an error.

Pure: no network, disk, clock or tensor. Randomness is passed in.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from common.errors import (
    BadUpdateError,
    ConflictError,
    DiskFullError,
    ForbiddenError,
    JobOverError,
    LateError,
    LydianError,
    NotFoundError,
    SupersededError,
    UnauthenticatedError,
    UnavailableError,
    VersionSkewError,
)
from common.messages import Assignment, JobSpec, TaskRef, Trust
from common.sharding import derived_seed

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 10.0
RESENDS = 5  # of bytes that arrive damaged, before the assignment is given up


@dataclass(frozen=True)
class Refusal:
    """Why this worker will not run a task, and the code that says it to the coordinator."""

    code: Literal["not_trusted", "unknown_task"]
    sentence: str


def refusal(task: TaskRef, *, builtin: Collection[str], trust: Trust, trusted: Collection[str]) -> Refusal | None:
    """Whether the worker's owner allows this task. None: it may run.

    Args:
        task: a built-in task by name, or a user's file by digest.
        builtin: names of the built-in tasks of this version.
        trust: none (built-in tasks only), listed (digests in `trusted` too), any.
        trusted: the digests that the owner listed.
    """
    if task.digest is None:
        if task.name in builtin:
            return None
        return Refusal("unknown_task", f"this worker's version has no built-in task {task.name}: upgrade it")
    if trust == "any" or (trust == "listed" and task.digest in trusted):
        return None
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
    return {**spec.train.model_dump(exclude_none=True), **builtin, **spec.config, "data": folders}


def train_command(assignment: Assignment, *, base: str, indices: str | None, out: str) -> dict[str, Any]:
    """What the child is asked to train.

    The seed depends on (job seed, round, shard) alone: whoever trains the shard draws the same numbers.
    """
    train = assignment.spec.train
    epochs = train.local_epochs
    if epochs is None and train.local_steps is None and train.local_seconds is None:
        epochs = 1
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
    }


def init_seed(spec: JobSpec) -> int:
    """The seed that the model is built from."""
    return derived_seed(spec.seed, "init")


@dataclass(frozen=True)
class Next:
    """What follows from an error of a call: wait and repeat it, send the bytes again, drop the work, or stop."""

    action: Literal["wait", "resend", "drop", "stop"]
    why: str


def after(error: LydianError, *, resends: int = 0) -> Next:
    """What the agent does after a call failed.

    Args:
        error: what the call raised.
        resends: how often this assignment's bytes were sent again already.
    """
    match error:
        case UnavailableError() | DiskFullError():
            return Next("wait", str(error))
        case UnauthenticatedError() | ForbiddenError() | VersionSkewError():
            return Next("stop", error.lines())
        case BadUpdateError(code="digest_mismatch" | "wrong_length") | ConflictError(code="incomplete"):
            if resends < RESENDS:
                return Next("resend", str(error))
            return Next("drop", f"{error} (given up after {resends} times)")
        case SupersededError() | JobOverError() | LateError() | BadUpdateError() | NotFoundError():
            return Next("drop", str(error))
        case _ if error.status >= 500:
            return Next("wait", str(error))
        case _:
            return Next("drop", str(error))


def wait_s(failures: int, jitter: float) -> float:
    """Seconds to wait before the next try: exponential with full jitter, so that a fleet does not come back at once.

    Args:
        failures: tries that failed in a row, from 1.
        jitter: uniform in [0, 1).
    """
    longest: float = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(failures - 1, 30))
    return longest * jitter
