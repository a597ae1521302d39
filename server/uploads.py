"""Updates on their way in: the bytes of each attempt, from the first range to the look that is taken at them.

Survives the coordinator: what was written is noted beside it (server.blobs), at least once a MiB and at the end of each
stream, however that ended, but for what is looked at as soon as it is here. Knows nothing of jobs: who may upload what,
and how much, is decided before.
"""

import asyncio
import errno
from collections.abc import AsyncIterable, Callable

from common.errors import BadUpdateError, ConflictError, DiskFullError, UnavailableError
from common.staging import NOTE_EVERY, Staging
from server.ballast import NO_ROOM
from server.blobs import Blobs

Key = tuple[str, int]  # assignment id, attempt

REFUSED = NO_ROOM | {errno.EACCES, errno.EPERM}  # a person must do something about the folder; it is not broken


class Uploads:
    """Half-sent updates of one coordinator. To be used on the event loop."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._open: dict[Key, Staging] = {}
        self._locks: dict[Key, asyncio.Lock] = {}

    def restore(self, keep: Callable[[Key], bool]) -> None:
        """Go on with the uploads of an earlier process that are still wanted; delete all else that is half here."""
        for name in self._blobs.recorded():
            assignment, _, attempt = name.rpartition(".")
            key = (assignment, int(attempt)) if attempt.isdecimal() else None
            staging = Staging.reopen(self._blobs.part(name)) if key is not None and keep(key) else None
            if key is not None and staging is not None:
                self._open[key] = staging
        self._blobs.clear_parts(keep={_name(key) for key in self._open})

    @property
    def begun(self) -> tuple[Key, ...]:
        """The uploads that are here, whole or in part, the oldest first."""
        return tuple(self._open)

    def held(self, key: Key) -> tuple[tuple[int, int], ...]:
        """The ranges that are here, merged and sorted."""
        return self._open[key].ranges if key in self._open else ()

    def begin(self, key: Key, total: int) -> Staging:
        """The upload of `total` bytes: the one that was begun, or a new one. The caller has made sure of room.

        Raises:
            BadUpdateError: another length was announced before.
        """
        name, _ = key
        staging = self._open.get(key)
        if staging is None:
            staging = self._open[key] = Staging.open(self._blobs.part(_name(key)), total)
        if staging.size != total:
            raise BadUpdateError(f"{name} announced {staging.size} bytes before and {total} now", code="wrong_length")
        return staging

    def __contains__(self, key: Key) -> bool:
        return key in self._open

    async def receive(
        self,
        key: Key,
        total: int,
        start: int,
        stop: int,
        body: AsyncIterable[bytes],
        seen: Callable[[], None] = lambda: None,
        *,
        handed_in: bool = False,
    ) -> None:
        """Write bytes [start, stop) to their place, as they come.

        Args:
            key: whose they are.
            total: bytes of the whole upload.
            start: their place in it.
            stop: where they end.
            body: they themselves, in order.
            seen: called for each chunk: its sender is alive.
            handed_in: they are the whole, which is looked at as soon as it is here: so it is not noted then. Of a
                thousand small updates a round, that is half the files.

        Raises:
            BadUpdateError: more or fewer bytes came than were announced; those that came are kept.
            DiskFullError: the disk is full, or may not be written to. On a full one the upload is dropped: its room is
                worth more than its bytes.
            UnavailableError: the upload was dropped by another of its streams (`upload_dropped`).
            ConflictError: it is complete, and being looked at (`upload_closed`).
            OSError: anything else that went wrong with the disk; EIO: it is broken.
        """
        try:
            staging = self.begin(key, total)
            at = await self._fill(staging, key, start, stop, body, seen, handed_in=handed_in)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self.drop(key)
            raise DiskFullError(f"bytes of {key[0]} could not be written: {error}") from error
        if at != stop:
            raise BadUpdateError(f"{at - start} of {stop - start} bytes announced for {key[0]}", code="wrong_length")

    async def _fill(
        self,
        staging: Staging,
        key: Key,
        start: int,
        stop: int,
        body: AsyncIterable[bytes],
        seen: Callable[[], None],
        *,
        handed_in: bool,
    ) -> int:
        """Write what comes, and note it by and by. Returns where it ended."""
        at = noted = start
        try:
            async for chunk in body:
                seen()
                if at + len(chunk) > stop:
                    sentence = f"more than the {stop - start} bytes announced for {key[0]}"
                    raise BadUpdateError(sentence, code="wrong_length")
                self._check_kept(key, staging)
                staging.write(at, chunk)
                at += len(chunk)
                del chunk  # before the next is waited for: of many uploads it would be much
                if at - noted >= NOTE_EVERY:
                    staging.note(noted, at)
                    noted = at
        finally:
            if not (handed_in and staging.complete):
                staging.note(noted, at)
        return at

    def _check_kept(self, key: Key, staging: Staging) -> None:
        """Several streams fill one upload: what one of them met must not be taken for a verdict by the others."""
        if self._open.get(key) is not staging:
            raise UnavailableError(
                f"the upload of {key[0]} was given up while its bytes came",
                code="upload_dropped",
                advice="Ask which bytes are here, and send the others.",
            )

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
        if (staging := self._open.pop(key, None)) is not None:
            staging.forget()

    def drop(self, key: Key) -> None:
        """Delete what is here of an upload, if anything is."""
        if (staging := self._open.pop(key, None)) is not None:
            staging.discard()

    def drop_job(self, job: str) -> None:
        """Delete every upload of a job."""
        self.keep_only(lambda key: not key[0].startswith(f"{job}."))

    def keep_only(self, wanted: Callable[[Key], bool]) -> None:
        """Delete the uploads that are not wanted any more: half-sent ones of a closed round are finished by nobody.

        One that is being looked at stays: whoever looks still needs the file, and drops it.
        """
        for key in [key for key in self._open if not wanted(key) and not self._is_locked(key)]:
            self.drop(key)

    def _is_locked(self, key: Key) -> bool:
        return key in self._locks and self._locks[key].locked()

    def close(self) -> None:
        """The coordinator stops."""
        for staging in self._open.values():
            staging.close()

    def lock(self, key: Key) -> asyncio.Lock:
        """One submission of an attempt at a time: a repeat waits for the first, and finds its answer."""
        for idle in [known for known, lock in self._locks.items() if known != key and not lock.locked()]:
            del self._locks[idle]
        return self._locks.setdefault(key, asyncio.Lock())


def _name(key: Key) -> str:
    """The part's name; `restore` reads it back."""
    return f"{key[0]}.{key[1]}"
