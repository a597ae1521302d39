"""Submitting a job; before it goes the file that it begins with, resumed where the line breaks."""

import sys
from pathlib import Path

from client import shown
from client.job_file import Job
from client.resuming import until_whole
from common.api import CoordinatorApi
from common.begins import FILE
from common.errors import ConflictError, LydianError, NotFoundError
from common.messages import JobRequest, JobView


def submit(api: CoordinatorApi, job: Job, request: JobRequest) -> JobView:
    """Submit a job; before it goes the file that it begins with, where there is one.

    Raises:
        LydianError: whatever the coordinator answers, or that it is away.
    """
    if job.model is None:
        try:
            return api.submit_job(request)
        except NotFoundError as error:
            _say_if_here(error, request.spec.init)
            raise
    digest = (request.spec.init or "").removeprefix(FILE)
    send(api, job.model, digest)
    try:
        return api.submit_job(request)
    except (NotFoundError, ConflictError) as error:
        if error.code not in ("unknown_model", "incomplete"):
            raise
        send(api, job.model, digest)  # what was there was deleted between the two calls
        return api.submit_job(request)


def _say_if_here(error: LydianError, said: str | None) -> None:
    """What is no job, and a file or folder here, was perhaps meant as one."""
    if said is not None and error.code == "unknown_job" and Path(said).exists():
        error.advice = f"For the one that lies here, say --init ./{said}"


def send(api: CoordinatorApi, path: Path, digest: str) -> None:
    """Send a file, until all is there, for as long as each try brings something."""
    sys.stderr.write(f"sending {path}, {shown.size(path.stat().st_size)}\n")
    kept = "What came is kept for an hour; the same command goes on from there."
    until_whole(lambda seen: api.send_model(digest, path, on_bytes=seen), kept)
