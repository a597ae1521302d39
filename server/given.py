"""Models that people bring: files of weights that are sent before the job which is to begin with them is submitted.

    PUT /v1/models/{digest} ──ranges──▶ parts/DIGEST-TOKEN.0.part ──POST /v1/jobs, init = sha256:…──▶ blobs/…

Until then a file is an upload like any other (server.uploads): resumed after a break and after a restart, and each
token has its own, so that nobody's bytes get into another's file. One that nobody comes back to is deleted.
"""

import asyncio
import re
from collections.abc import AsyncIterable, Callable, Mapping
from pathlib import Path

from common.errors import BadUpdateError, ConflictError, NotFoundError, TooLargeError
from common.messages import Beginning
from common.ranges import Ranges
from common.weights import file_digest, read_block, read_layout, shown
from server.blobs import Blobs
from server.quotas import Quotas
from server.robust import not_finite_at
from server.rounds import Job
from server.uploads import Key, Uploads

KEPT_S = 3_600.0  # after the last sign of whoever sends it
BLOCK_ELEMENTS = 1 << 16

_NAME = re.compile(r"[0-9a-f]{64}-([0-9a-f]{1,64})")


class Given:
    """The files on their way. To be used on the event loop."""

    def __init__(self, uploads: Uploads, blobs: Blobs, quotas: Quotas, most: int, clock: Callable[[], float]) -> None:
        """`most` bytes a file may have."""
        self._uploads, self._blobs, self._quotas, self._most, self._clock = uploads, blobs, quotas, most, clock
        self._seen: dict[Key, float] = {}  # monotonic seconds

    def owner(self, key: Key) -> str | None:
        """The id of the token by which this upload is sent; None: it is none of a person's."""
        found = _NAME.fullmatch(key[0])
        if found is None:
            return None
        self._seen.setdefault(key, self._clock())  # after a restart it is here, and was not seen
        return found[1]

    def held(self, token: str, digest: str) -> Ranges:
        """The bytes that are here of what this token sends."""
        key = _key(token, digest)
        if key in self._uploads:
            self._seen[key] = self._clock()
        return self._uploads.held(key)

    async def receive(
        self,
        token: str,
        digest: str,
        span: tuple[int, int, int],
        body: AsyncIterable[bytes],
        broken: Callable[[OSError], None],
    ) -> None:
        """Write bytes [start, stop) of a file of `total` bytes to their place, as they come.

        Args:
            token: by whose calls they come.
            digest: that the whole file is said to have.
            span: start, stop and total.
            body: they themselves, in order.
            broken: told of an error of the disk.

        Raises:
            TooLargeError: the file is larger than a model may be.
            TooManyError: this token sends too much at once.
            DiskFullError: there is no room for it.
            BadUpdateError: another length was announced, before or now.
        """
        (start, stop, total), key = span, _key(token, digest)
        if total > self._most:
            raise TooLargeError(
                f"the file has {total} bytes, and a model at most {self._most}",
                advice="Is it the right file? Else raise LYDIAN_MAX_MODEL_BYTES on the coordinator.",
            )
        with self._quotas.uploading(token, key):
            if key not in self._uploads:
                self._begin(token, key, total)
            try:
                await self._uploads.receive(key, total, start, stop, body, lambda: self._see(key))
            except OSError as error:
                broken(error)
                raise

    def _begin(self, token: str, key: Key, total: int) -> None:
        stale = self._quotas.make_way(token, key, lambda one: one in self._uploads)
        self._uploads.keep_only(lambda one: one not in stale)
        self._blobs.check_room(total)
        self._seen = {one: at for one, at in self._seen.items() if one in self._uploads}
        self._see(key)

    def _see(self, key: Key) -> None:
        self._seen[key] = self._clock()

    def expire(self) -> None:
        """Delete what nobody has come back to."""
        old = {key for key, at in self._seen.items() if self._clock() - at >= KEPT_S}
        if old:
            self._uploads.keep_only(lambda key: key not in old)
            self._seen = {key: at for key, at in self._seen.items() if key not in old or key in self._uploads}

    async def take(self, token: str, digest: str, broken: Callable[[OSError], None]) -> Beginning:
        """Look at a whole file, and give it the name of its digest, durably. The caller keeps it from then on.

        Raises:
            NotFoundError: nothing of it was sent by this token (`unknown_model`).
            ConflictError: not all of it (`incomplete`).
            BadUpdateError: it is damaged (`digest_mismatch`), or no job can begin with it; it is deleted.
        """
        key = _key(token, digest)
        async with self._uploads.lock(key):
            if key not in self._uploads:
                raise not_here(digest)
            staging = self._uploads.finish(key)
            try:
                await asyncio.to_thread(check, staging.path, digest)
                await asyncio.to_thread(self._blobs.adopt, staging.path, digest, durable=True)
            except (BadUpdateError, OSError) as error:
                self._uploads.drop(key)
                if isinstance(error, OSError):
                    broken(error)
                raise
            self._uploads.forget(key)
        return Beginning(digest=digest, size=staging.size)


def check(path: Path, digest: str) -> None:
    """Look at a file of weights from its first byte to its last.

    Raises:
        BadUpdateError: digest_mismatch, whatever else is wrong too; bad_header; not_finite: a job that began with such
            a number could never be averaged.
        OSError: it cannot be read.
    """
    found = file_digest(path)
    if found != digest:
        raise BadUpdateError(
            f"the file's SHA-256 is {found}, and {digest} was announced: it was damaged on its way, or changed",
            code="digest_mismatch",
            advice="Send it again.",
        )
    layout = read_layout(path)
    if not layout.tensors:
        raise BadUpdateError("the file has no tensors", code="bad_header", advice="Is it the right file?")
    with path.open("rb", buffering=0) as file:
        for tensor in layout.tensors:
            for first in range(0, tensor.elements, BLOCK_ELEMENTS):
                count = min(BLOCK_ELEMENTS, tensor.elements - first)
                block = read_block(file, tensor, tensor.start, first, count)
                if (at := not_finite_at(block)) is not None:
                    raise BadUpdateError(
                        f"{shown(tensor.name)} is {float(block[at])} at element {first + at} of the file",
                        code="not_finite",
                        advice="No job can begin with it: take a file from before the training came apart; what is "
                        "infinite on purpose, such as a mask, belongs into a buffer with persistent=False.",
                    )


def job_called(jobs: Mapping[str, Job], name: str) -> Job:
    """The job of this id, or the only one of this name.

    Raises:
        NotFoundError: there is none (`unknown_job`).
        ConflictError: several have the name (`ambiguous_name`).
    """
    if name in jobs:
        return jobs[name]
    found = [job for job in jobs.values() if (job.spec.name or job.spec.task) == name]
    if not found:
        raise NotFoundError(f"there is no job {name[:80]!r} to begin with", code="unknown_job")
    if len(found) > 1:
        newest = ", ".join(job.id for job in reversed(found[-5:]))
        raise ConflictError(
            f"{len(found)} jobs are called {name}, the newest: {newest}",
            code="ambiguous_name",
            advice="Name the one you mean by its id; `lydian jobs` lists them.",
        )
    return found[0]


def not_here(digest: str) -> NotFoundError:
    """There is no model of this digest."""
    return NotFoundError(
        f"the model {digest[:12]}… is not here: no job keeps it, and it was not sent with this token",
        code="unknown_model",
        advice="`lydian submit --init FILE` sends a file before the job; what is not used within an hour is deleted.",
    )


def _key(token: str, digest: str) -> Key:
    return f"{digest}-{token}", 0
