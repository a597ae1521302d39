"""Updates on their way in: the bytes of each attempt, from the first range to the look that is taken at them.

Knows nothing of jobs: who may upload what, and how much, is decided before.
"""

import asyncio
from collections.abc import AsyncIterable

from common.errors import BadUpdateError, ConflictError, DiskFullError
from server.blobs import Blobs, Staging

Key = tuple[str, int]  # assignment id, attempt


class Uploads:
    """Half-sent updates of one coordinator. To be used on the event loop."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._open: dict[Key, Staging] = {}
        self._locks: dict[Key, asyncio.Lock] = {}

    def held(self, key: Key) -> tuple[tuple[int, int], ...]:
        """The ranges that are here, merged and sorted."""
        return self._open[key].ranges if key in self._open else ()

    def begin(self, key: Key, total: int) -> Staging:
        """The upload of `total` bytes: the one that was begun, or a new one. The caller has made sure of room.

        Raises:
            BadUpdateError: another length was announced before.
        """
        name, attempt = key
        staging = self._open.get(key)
        if staging is None:
            staging = self._open[key] = Staging.open(self._blobs.part(f"{name}.{attempt}"), total)
        if staging.size != total:
            raise BadUpdateError(f"{name} announced {staging.size} bytes before and {total} now", code="wrong_length")
        return staging

    def __contains__(self, key: Key) -> bool:
        return key in self._open

    async def receive(self, key: Key, total: int, start: int, stop: int, body: AsyncIterable[bytes]) -> None:
        """Write bytes [start, stop) to their place, as they come.

        Raises:
            BadUpdateError: more or fewer bytes came than were announced; those that came are kept.
            DiskFullError: they could not be written; the upload is dropped.
        """
        staging, at = self.begin(key, total), start
        async for chunk in body:
            if at + len(chunk) > stop:
                raise BadUpdateError(f"more than the {stop - start} bytes announced for {key[0]}", code="wrong_length")
            try:
                staging.write(at, chunk)
            except OSError as error:
                self.drop(key)
                raise DiskFullError(f"byte {at} of {key[0]} could not be written: {error}") from error
            at += len(chunk)
        if at != stop:
            raise BadUpdateError(f"{at - start} of {stop - start} bytes announced for {key[0]}", code="wrong_length")

    def finish(self, key: Key) -> Staging:
        """The whole upload, closed: nothing more is written to it.

        Raises:
            ConflictError: bytes are missing; the sentence says how many are here.
        """
        staging = self._open.get(key)
        if staging is None or not staging.complete:
            here = sum(stop - start for start, stop in self.held(key))
            of = staging.size if staging else "an unknown number of"
            raise ConflictError(
                f"{here} of {of} bytes of {key[0]} are here",
                code="incomplete",
                advice="Upload the rest, then submit again.",
            )
        staging.close()
        return staging

    def forget(self, key: Key) -> None:
        """The file has another name now."""
        self._open.pop(key, None)

    def drop(self, key: Key) -> None:
        """Delete what is here of an upload, if anything is."""
        if (staging := self._open.pop(key, None)) is not None:
            staging.discard()

    def drop_job(self, job: str) -> None:
        """Delete every upload of a job."""
        for key in [key for key in self._open if key[0].startswith(f"{job}.")]:
            self.drop(key)

    def close(self) -> None:
        """The coordinator stops."""
        for staging in self._open.values():
            staging.close()

    def lock(self, key: Key) -> asyncio.Lock:
        """One submission of an attempt at a time: a repeat waits for the first, and finds its answer."""
        for idle in [known for known, lock in self._locks.items() if known != key and not lock.locked()]:
            del self._locks[idle]
        return self._locks.setdefault(key, asyncio.Lock())
