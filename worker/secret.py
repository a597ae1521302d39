"""This worker's own secret, from which the noise of example-level privacy comes (worker/task_private.py).

    folder/privacy.secret     32 random bytes, 0600, made when it is first needed

It leaves the machine in no form: what the child is told follows from it and from which work is done, and cannot be
taken back to it. A worker that lost its secret draws other noise from then on, which harms nobody who has not kept an
update of the same work from before.
"""

import os
import secrets
from pathlib import Path

from common.derivation import derived_key
from common.messages import Assignment

NAME = "privacy.secret"
SIZE = 32  # bytes


def own_secret(folder: Path) -> bytes:
    """The secret of the worker with this state folder.

    Raises:
        OSError: it cannot be read or made.
    """
    path = folder / NAME
    if not path.exists():
        part = path.with_name(f"{NAME}.{secrets.token_hex(4)}")
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(SIZE))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    return path.read_bytes()


def noise_seed(folder: Path, assignment: Assignment) -> str:
    """What the noise of one piece of work is drawn from, in hex; the same for each attempt at it here."""
    base = assignment.base.digest if assignment.base is not None else ""
    work = (assignment.job, assignment.round, assignment.shard, base)
    return derived_key(own_secret(folder), "example", *work).hex()
