"""Bytes to and from the coordinator: in pieces, resumed where they broke, over several streams where one is too slow.

    gaps ──common.streams──▶ pieces ──one request each──▶ the coordinator, or TARGET.part ──SHA-256──▶ TARGET

The thread that calls is the first stream; others are started when the path turns out to need them, and have ended when
the call returns. Nothing is repeated here: the first error ends all streams, and whoever called calls again.
"""

import hashlib
import json
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx2

from common.errors import (
    BadUpdateError,
    LydianError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
    from_answer,
)
from common.ranges import Ranges, content_range, gaps
from common.staging import Staging
from common.streams import Piece, Streams

PIECE = 1 << 20  # bytes handed to the socket or the disk at a time
NOTE_EVERY = 1 << 20  # bytes of one stream that a killed process forgets at most


class TransferStopped(Exception):  # noqa: N818 - not an error: what was asked for
    """The transfer was broken off because its `stop` was set. What it brought is kept."""


class Transfer(ABC):
    """One call's worth of bytes, in one direction."""

    def __init__(self, client: httpx2.Client, url: str, path: str, stop: threading.Event | None) -> None:
        self._client, self._url, self._path = client, url, path
        self._stop = stop or threading.Event()
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self.streams_used = 1

    @abstractmethod
    def carry(self, piece: Piece) -> None:
        """Bring one piece over, with one request."""

    def carry_all(self, streams: Streams) -> None:
        """Bring over every piece; returns when no stream is left.

        Raises:
            UnavailableError: the line broke, or nobody answers.
            LydianError: what the coordinator answered.
        """
        threads: list[threading.Thread] = []
        try:
            self._work(streams, threads)
        except BaseException as error:  # a signal's: the other streams must not go on
            self._fail(error, error.__cause__)
            raise
        finally:
            for thread in threads:  # started by any of them while they worked
                thread.join()
        if self._failure is not None:
            raise self._failure

    def _work(self, streams: Streams, threads: list[threading.Thread]) -> None:
        """One stream: piece after piece, until none is left or something failed."""
        try:
            while self._failure is None:
                self._check_stop()
                with self._lock:
                    piece = streams.take(time.monotonic())
                if piece is None:
                    return
                self.carry(piece)
                with self._lock:
                    streams.done(piece, time.monotonic())
                    more = min(streams.wanted - 1 - sum(thread.is_alive() for thread in threads), 15)
                    for _ in range(more if streams.left else 0):
                        threads.append(threading.Thread(target=self._work, args=(streams, threads), name="stream"))
                        threads[-1].start()
                    self.streams_used = max(self.streams_used, streams.wanted)
        except httpx2.TransportError as error:
            self._fail(unreachable(self._url, error), error)
        except (LydianError, OSError, TransferStopped) as error:
            self._fail(error, error.__cause__)

    def _fail(self, error: BaseException, cause: BaseException | None) -> None:
        """Keep the first failure; the others follow from it."""
        with self._lock:
            if self._failure is None:
                error.__cause__ = cause
                self._failure = error

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise TransferStopped(f"{self._path} was broken off on request")


class Upload(Transfer):
    """Sends a file, but for the ranges that the coordinator holds."""

    def __init__(
        self,
        client: httpx2.Client,
        url: str,
        path: str,
        source: Path,
        held: Ranges,
        stop: threading.Event | None,
    ) -> None:
        super().__init__(client, url, path, stop)
        self._source, self._held = source, held
        self._size = source.stat().st_size

    def run(self) -> int:
        """Send. Returns the bytes sent."""
        missing = gaps(self._held, self._size)
        self.carry_all(Streams(missing))
        return sum(stop - start for start, stop in missing)

    def carry(self, piece: Piece) -> None:
        """PUT one range."""
        start, stop = piece
        headers = {
            "Content-Range": content_range(start, stop, self._size),
            "Content-Length": str(stop - start),
            "Content-Type": "application/octet-stream",
        }
        raise_for(self._client.request("PUT", self._path, content=self._read(start, stop), headers=headers))

    def _read(self, start: int, stop: int) -> Iterator[bytes]:
        with self._source.open("rb") as file:
            file.seek(start)
            while start < stop:
                self._check_stop()
                piece = file.read(min(PIECE, stop - start))
                if not piece:
                    raise LydianError(
                        f"{self._source} became shorter while it was sent", advice="Did something else write to it?"
                    )
                start += len(piece)
                yield piece


class Download(Transfer):
    """Fetches an immutable file by its strong ETag, which is the SHA-256 of its bytes."""

    def __init__(
        self,
        client: httpx2.Client,
        url: str,
        path: str,
        target: Path,
        *,
        digest: str | None = None,
        size: int | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """What is not known beforehand of digest and size, the coordinator is asked for."""
        super().__init__(client, url, path, stop)
        self._target, self._digest, self._size = target, digest, size
        self._named = digest is not None
        self.received = 0
        self._staging: Staging | None = None
        self._hash = hashlib.sha256()
        self._hashed = 0  # bytes from the beginning that went into the hash as they came

    def run(self) -> int:
        """Fetch what is missing, check the whole, and give it its name. Returns the bytes received."""
        staging = self._begin()
        while not staging.lock():  # another process finished it meanwhile: two `lydian pull` to one file
            staging.close()
            staging = self._begin()
        with closing(staging):
            self._staging = staging
            self.carry_all(Streams(staging.missing))
            found = self._whole_digest(staging)
            if found != self._digest:
                staging.discard()
                raise BadUpdateError(
                    f"{staging.size} bytes came for {str(self._digest)[:12]}… and their SHA-256 is {found[:12]}…",
                    code="digest_mismatch",
                    advice="The bytes were damaged on the way; fetch them again.",
                )
            staging.path.replace(self._target)
            staging.forget()
        return self.received

    def _begin(self) -> Staging:
        """The half-fetched file of an earlier call, or a new one whose size the coordinator has said."""
        if self._digest is not None:
            known = Staging.reopen(self._part(self._digest))
            if known is not None:
                return known
        if self._digest is None or self._size is None:
            digest, self._size = self._ask_size()
            self._digest = self._digest or digest
        part, size = self._part(self._digest), self._size
        return Staging.reopen(part) or Staging.open(part, size)

    def _part(self, digest: str) -> Path:
        """Where the bytes are kept: what is asked for by name, `newest` for one, is another file tomorrow."""
        which = "" if self._named else f".{digest[:16]}"
        return self._target.with_name(f"{self._target.name}{which}.part")

    def _ask_size(self) -> tuple[str, int]:
        """(digest, bytes) of what is to be fetched: of the answer's head; its body is left unread."""
        try:
            with self._client.stream("GET", self._path, headers={"Range": "bytes=0-0"}) as answer:
                raise_for(answer)
                total = answer.headers.get("Content-Range", "").rpartition("/")[2]
                total = total or answer.headers.get("Content-Length", "")
                digest = answer.headers.get("ETag", "").strip('"')
                if answer.status_code == 206:
                    answer.read()  # one byte: the connection can be used again
        except httpx2.TransportError as error:
            raise unreachable(self._url, error) from error
        if not total.isdecimal():
            raise LydianError(
                f"{self._path} did not say how long it is", advice="Is this URL a coordinator, and no proxy between?"
            )
        return digest, int(total)

    def carry(self, piece: Piece) -> None:
        """GET one range."""
        staging, (start, stop) = self._opened(), piece
        headers = {"Range": f"bytes={start}-{stop - 1}", "If-Range": f'"{self._digest}"'}
        with self._client.stream("GET", self._path, headers=headers) as answer:
            raise_for(answer)
            wanted = f"bytes {start}-{stop - 1}/{staging.size}"
            if answer.headers.get("Content-Range") != wanted:
                staging.discard()
                raise UnavailableError(
                    f"{self._path} answered {answer.status_code} with the range "
                    f"{answer.headers.get('Content-Range')!r}, where {wanted!r} was asked for",
                    advice="It is fetched from the beginning.",
                    code="wrong_range",
                )
            self._take(staging, answer, start, stop)

    def _take(self, staging: Staging, answer: httpx2.Response, start: int, stop: int) -> None:
        at = noted = start
        try:
            for data in answer.iter_raw(PIECE):
                self._check_stop()
                with self._lock:
                    staging.write(at, data[: stop - at])
                    self.received += len(data)
                    if at == self._hashed:
                        self._hash.update(data)
                        self._hashed += len(data)
                at += len(data)
                if at - noted >= NOTE_EVERY:
                    with self._lock:
                        staging.note(noted, at)
                    noted = at
        finally:
            with self._lock:
                staging.note(noted, min(at, stop))
        if at != stop:
            raise UnavailableError(f"{self._path} ended after {at - start} of {stop - start} bytes", code="unreachable")

    def _whole_digest(self, staging: Staging) -> str:
        """SHA-256 of the file: as it came, if it came in order; else by one more pass."""
        if self._hashed == staging.size:
            return self._hash.hexdigest()
        with staging.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _opened(self) -> Staging:
        assert self._staging is not None  # noqa: S101 - run() has opened it
        return self._staging


def unreachable(url: str, error: httpx2.TransportError) -> UnavailableError:
    """No answer came, or not all of it."""
    why = str(error) or type(error).__name__
    return UnavailableError(
        f"the coordinator at {url} does not answer: {why}",
        code="unreachable",
        advice="Is it running (`lydian serve`), and is this the right address (--url or LYDIAN_URL)?",
    )


def raise_for(answer: httpx2.Response) -> None:
    """Turn an error answer into the error it carries."""
    if answer.status_code < 400:
        return
    answer.read()
    try:
        body = json.loads(answer.content)
    except ValueError:
        if answer.request.method == "HEAD":  # a HEAD has no body to say more
            raise _bare(answer) from None
        body = answer.text
    raise from_answer(answer.status_code, body)


def _bare(answer: httpx2.Response) -> LydianError:
    kind = {401: UnauthenticatedError, 404: NotFoundError}.get(answer.status_code, LydianError)
    return kind(f"{answer.request.url.path} answered HTTP {answer.status_code}")
