"""The secret seeds of private jobs: one file a job, readable by the coordinator's user alone.

    folder/privacy/JOB.seed     32 random bytes, 0600

Whoever has a seed can take the noise off every model of its job. So it is in no export, log, fact or answer, and is
deleted as soon as the job has ended: nobody needs it then, unless the job keeps its updates for a proof. A seed that is
lost is never made anew, since a second draw of a round's noise would take from the first.
"""

import os
import secrets
from collections.abc import Collection
from pathlib import Path

from common.errors import LydianError
from server.store import sync

SIZE = 32  # bytes


class SeedLostError(LydianError):
    """The secret seed of a private job is not there any more."""

    code = "seed_lost"


class Seeds:
    """The seeds of one state folder."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the state folder. Nothing is made in it before there is a private job."""
        self._folder = folder / "privacy"

    def create(self, job_id: str) -> None:
        """Draw the seed of a job, and have it on the disk.

        Raises:
            OSError: there is one already, or it cannot be written.
        """
        self._folder.mkdir(exist_ok=True, mode=0o700)
        handle = os.open(self._path(job_id), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(SIZE))
            file.flush()
            os.fsync(file.fileno())
        sync(self._folder)
        sync(self._folder.parent)

    def read(self, job_id: str) -> bytes:
        """The seed of a job.

        Raises:
            SeedLostError: it is not there, or not whole.
        """
        path = self._path(job_id)
        try:
            seed = path.read_bytes()
        except FileNotFoundError:
            seed = b""
        if len(seed) != SIZE:
            raise SeedLostError(
                f"the secret seed of {job_id} is gone from {self._folder}, and another one would draw noise twice",
                advice="Put the file back from a copy of the state folder, or submit the job again.",
            )
        return seed

    def remove(self, job_id: str) -> None:
        """Delete the seed of a job, if there is one."""
        self._path(job_id).unlink(missing_ok=True)

    def sweep(self, keep: Collection[str]) -> None:
        """Delete the seeds of all jobs but these."""
        for path in self._folder.glob("*.seed"):
            if path.stem not in keep:
                path.unlink(missing_ok=True)

    def _path(self, job_id: str) -> Path:
        return self._folder / f"{job_id}.seed"
