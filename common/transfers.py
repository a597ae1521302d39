"""Bytes to and from the coordinator: in pieces, resumed where they broke, over several streams where one is too slow.

    gaps ──common.streams──▶ pieces ──one request each──▶ the coordinator, or TARGET.part ──SHA-256──▶ TARGET

The thread that calls is the first stream; others are started when the path turns out to need them, and have ended when
the call returns. Nothing is repeated here: the first error ends all streams, and whoever called calls again. One
exception: what a server, or a cache before it, will not give by ranges is fetched whole.
"""

import fcntl
import hashlib
import json
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx2

from common.answers import check_not_elsewhere, whole
from common.errors import BadUpdateError, LydianError, TooLargeError, TooManyError, UnavailableError, from_answer
from common.guarding import tls_trouble
from common.ranges import Ranges, content_range, gaps
from common.staging import NOTE_EVERY, Staging
from common.streams import STREAMS, Piece, Streams

PIECE = 1 << 20  # bytes handed to the socket at a time
BLOCK = 512 << 10  # bytes read off a socket before they are written, hashed and counted: what a core's cache holds
OLD_S = 0.5  # after which they are written in any case, so that a slow or dead line keeps nothing back
STRAIGHT = 8 << 20  # bytes of an answer that are worth a connection of their own (`_blocks`)
IDLE_S = 30.0  # without a byte, after which a connection counts as dead
CONNECT_S = 10.0
LONGEST_WAIT_S = 60  # that anybody is believed who says when to call again
LOOK_S = 0.2  # between two looks whether another process has let go of a file

OnBytes = Callable[[int], None]
"""Called with the bytes of the file that are over so far, those of earlier calls included. From any stream, one at a
time."""


class TransferStopped(Exception):  # noqa: N818 - not an error: what was asked for
    """The transfer was broken off because its `stop` was set. What it brought is kept."""


class _NoRangesError(Exception):
    """The answer to a request for a range is not that range."""


class Transfer(ABC):
    """One call's worth of bytes, in one direction."""

    def __init__(
        self,
        client: httpx2.Client,
        url: str,
        path: str,
        stop: threading.Event | None,
        *,
        on_bytes: OnBytes | None,
        idle_s: float,
    ) -> None:
        self._client, self._url, self._path = client, url, path
        self._stop = stop or threading.Event()
        self._on_bytes, self._idle_s = on_bytes, idle_s
        self._timeout = httpx2.Timeout(idle_s, connect=CONNECT_S)
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)  # one stream has
        self._failure: BaseException | None = None
        self._streams = Streams(())
        self._running = 0  # streams
        self._there = 0  # bytes of the file that are over
        self.streams_used = 1  # at most, at a time

    @abstractmethod
    def carry(self, piece: Piece) -> None:
        """Bring one piece over, with one request."""

    def carry_all(self, streams: Streams) -> None:
        """Bring over every piece; returns when no stream is left.

        Raises:
            UnavailableError: the line broke, or nobody answers.
            LydianError: what the coordinator answered.
            TransferStopped: it was told to stop.
        """
        self._streams, self._failure, self._running = streams, None, 1
        try:
            with ThreadPoolExecutor(STREAMS, thread_name_prefix="stream") as self._others, self._failing():
                self._work()
                with self._ended:  # those that go on may yet want more
                    self._ended.wait_for(lambda: self._running == 0)
        finally:
            if self._failure is not None:
                raise self._failure  # the one that came first, whichever stream met it

    def _work(self) -> None:
        """One stream: piece after piece, until none is left or something failed."""
        try:
            with self._failing():
                while (piece := self._next()) is not None:
                    self.carry(piece)
                    self._brought(piece)
        finally:
            with self._ended:
                self._running -= 1
                self._ended.notify_all()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Remember the first failure, which ends the other streams; a signal's goes before all."""
        try:
            yield
        except BaseException as error:
            with self._lock:
                if self._failure is None or not isinstance(error, Exception):
                    self._failure = error
            raise

    def _next(self) -> Piece | None:
        self._check()
        with self._lock:
            self.streams_used = max(self.streams_used, self._running)
            return self._streams.take(time.monotonic())

    def _brought(self, piece: Piece) -> None:
        with self._lock:
            self._streams.done(piece, time.monotonic())
            while self._streams.left and self._running < self._streams.wanted and self._failure is None:
                self._others.submit(self._work)  # it waits for the lock, as it takes a piece
                self._running += 1

    def _check(self) -> None:
        """Looked at between two blocks."""
        if self._failure is not None or self._stop.is_set():
            raise TransferStopped(f"{self._path} was broken off on request")

    def _count(self, size: int) -> None:
        with self._lock:
            self._there += size
            if self._on_bytes is not None:
                self._on_bytes(self._there)


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
        *,
        on_bytes: OnBytes | None = None,
        idle_s: float = IDLE_S,
    ) -> None:
        super().__init__(client, url, path, stop, on_bytes=on_bytes, idle_s=idle_s)
        self._source, self._size = source, source.stat().st_size
        self._missing = gaps(held, self._size)

    def run(self) -> int:
        """Send. Returns the bytes sent."""
        to_send = sum(stop - start for start, stop in self._missing)
        self._there = self._size - to_send
        self.carry_all(Streams(self._missing))
        return to_send

    def carry(self, piece: Piece) -> None:
        """PUT one range."""
        start, stop = piece
        headers = {
            "Content-Range": content_range(start, stop, self._size),
            "Content-Length": str(stop - start),
            "Content-Type": "application/octet-stream",
        }
        body = self._read(start, stop)
        with (
            reaching(self._url),
            self._client.stream("PUT", self._path, content=body, headers=headers, timeout=self._timeout) as stream,
        ):
            answer = whole(stream)
        raise_for(answer)

    def _read(self, start: int, stop: int) -> Iterator[bytes]:
        with self._source.open("rb") as file:
            file.seek(start)
            while start < stop:
                self._check()
                block = file.read(min(PIECE, stop - start))
                if not block:
                    raise LydianError(
                        f"{self._source} became shorter while it was sent", advice="Did something else write to it?"
                    )
                start += len(block)
                yield block
                self._count(len(block))


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
        most: int | None = None,
        stop: threading.Event | None = None,
        on_bytes: OnBytes | None = None,
        idle_s: float = IDLE_S,
    ) -> None:
        """What is not known beforehand of digest and size, the coordinator is asked for; `most` bytes are taken."""
        super().__init__(client, url, path, stop, on_bytes=on_bytes, idle_s=idle_s)
        self._target, self._digest, self._size, self._most = target, digest or "", size, most
        self._named = digest is not None
        self.received = 0  # bytes over the wire
        self._staging: Staging | None = None
        self._hash, self._hashed = hashlib.sha256(), 0  # bytes from the beginning that were hashed as they came

    def run(self) -> int:
        """Fetch what is missing, check the whole, and give it its name. Returns the bytes received.

        Raises:
            BadUpdateError: the bytes are damaged (`digest_mismatch`); they are deleted.
        """
        try:
            self._fetch_ranges()
        except _NoRangesError:
            self._fetch_whole()
        return self.received

    def _fetch_ranges(self) -> None:
        if not self._digest or (self._size is None and not self._part.exists()):
            self._ask()
        with _alone(self._part, self._stop):
            staging = Staging.reopen(self._part) or Staging.open(self._part, self._known_size())
            with closing(staging):
                self._begin(staging)
                try:
                    self.carry_all(Streams(staging.missing))
                except _NoRangesError:
                    staging.discard()
                    raise
                self._finish(staging)

    def _fetch_whole(self) -> None:
        """Fetch by one answer that begins at the first byte."""
        with self._get({}) as answer:
            if answer.status_code != 200:
                raise UnavailableError(
                    f"{self._path} answered HTTP {answer.status_code} where the whole file was asked for",
                    advice="Is this URL a coordinator, and no proxy between?",
                    code="wrong_range",
                )
            self._learn(answer)
            with _alone(self._part, self._stop), closing(Staging.open(self._part, self._known_size())) as staging:
                self._begin(staging)
                self._take(staging, answer, 0, staging.size)
                self._finish(staging)

    def _begin(self, staging: Staging) -> None:
        self._staging, self._failure = staging, None
        self._hash, self._hashed = hashlib.sha256(), 0
        self._there = staging.size - sum(stop - start for start, stop in staging.missing)

    def _finish(self, staging: Staging) -> None:
        found = self._whole_digest(staging)
        if found != self._digest:
            staging.discard()
            raise BadUpdateError(
                f"{staging.size} bytes came for {self._digest[:12]}… and their SHA-256 is {found[:12]}…",
                code="digest_mismatch",
                advice="The bytes were damaged on the way; fetch them again.",
            )
        staging.path.replace(self._target)
        staging.forget()

    @property
    def _part(self) -> Path:
        """Where the bytes are kept: what is asked for by name, `newest` for one, is another file tomorrow."""
        which = "" if self._named else f".{self._digest[:16]}"
        return self._target.with_name(f"{self._target.name}{which}.part")

    def _known_size(self) -> int:
        if self._size is None:
            self._ask()
        assert self._size is not None  # noqa: S101 - _ask has learnt it, or raised
        return self._size

    def _ask(self) -> None:
        """Learn digest and size from the head of an answer; its body is left unread."""
        with self._get({"Range": "bytes=0-0"}) as answer:
            self._learn(answer)
            if answer.status_code == 206:
                answer.read()  # one byte: the connection can be used again

    def _learn(self, answer: httpx2.Response) -> None:
        headers = answer.headers
        total = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
        digest = self._digest if self._named else headers.get("ETag", "").strip('"')
        if not total.isdecimal() or not digest:
            raise LydianError(
                f"{self._path} was answered without its length or its digest",
                advice="Is this URL a coordinator, and no proxy between?",
            )
        if self._most is not None and (len(total) > 18 or int(total) > self._most):
            raise TooLargeError(
                f"{self._path} has {total[:18]} bytes, it says, and at most {self._most} are taken",
                advice="Is this URL a coordinator? Nothing was fetched.",
            )
        self._digest, self._size = digest, int(total)

    @contextmanager
    def _get(self, headers: dict[str, str]) -> Iterator[httpx2.Response]:
        """An answer that is no error, or that ranges cannot be had. The body is the caller's to read."""
        asked = {"Accept-Encoding": "identity", **headers}
        with (
            reaching(self._url),
            self._client.stream("GET", self._path, headers=asked, timeout=self._timeout) as answer,
        ):
            if answer.status_code == 416 and headers:
                raise _NoRangesError
            raise_for(answer)
            yield answer

    def carry(self, piece: Piece) -> None:
        """GET one range."""
        start, stop = piece
        assert self._staging is not None  # noqa: S101 - opened before the streams are
        with self._get({"Range": f"bytes={start}-{stop - 1}", "If-Range": f'"{self._digest}"'}) as answer:
            if (answer.status_code, answer.headers.get("Content-Range")) != (
                206,
                content_range(start, stop, self._staging.size),
            ):
                raise _NoRangesError
            self._take(self._staging, answer, start, stop)

    def _take(self, staging: Staging, answer: httpx2.Response, start: int, stop: int) -> None:
        """Write the bytes [start, stop) as they come, and note them by and by."""
        at = noted = start
        try:
            for block in _blocks(answer, stop - start, self._idle_s):
                self._check()
                data = block[: stop - at]
                if not data:
                    continue
                with self._lock:
                    staging.write(at, data)
                    self.received += len(block)
                    if at == self._hashed:
                        self._hash.update(data)
                        self._hashed += len(data)
                at += len(data)
                self._count(len(data))
                if at - noted >= NOTE_EVERY - BLOCK:  # another block may wait in the buffer
                    staging.note(noted, at)
                    noted = at
        finally:
            staging.note(noted, at)
        if at != stop:
            raise UnavailableError(f"{self._path} ended after {at - start} of {stop - start} bytes", code="unreachable")

    def _whole_digest(self, staging: Staging) -> str:
        """SHA-256 of the file: as it came, if it came in order; else by one more pass."""
        if self._hashed == staging.size:
            return self._hash.hexdigest()
        with staging.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _blocks(answer: httpx2.Response, size: int, idle_s: float) -> Iterator[bytes | memoryview]:
    """A body of `size` bytes as it comes. What is yielded is good until the next is asked for.

    A large one is read straight off the socket: through httpx2 each 64 KiB are copied three times and pass ten calls.
    The connection cannot be used again then, since httpx2 does not know what was read.
    """
    line, parts = answer.extensions.get("network_stream"), answer.iter_raw()
    if size < STRAIGHT or line is None or answer.headers.get("Content-Length") != str(size):
        yield from parts
        return
    plain = line.get_extra_info("socket")
    if line.get_extra_info("ssl_object") is not None or not isinstance(plain, socket.socket):
        yield from parts
        return
    first = next(parts, b"")  # with the head; nothing more was taken from the socket
    yield first
    yield from _off_socket(plain, size - len(first), idle_s)


def _off_socket(line: socket.socket, left: int, idle_s: float) -> Iterator[memoryview]:
    """The next `left` bytes that a socket brings, in blocks; an empty one now and then while nothing comes.

    Raises:
        httpx2.TransportError: the line broke, or was silent for `idle_s`. What came before was yielded.
    """
    buffer, held = memoryview(bytearray(BLOCK)), 0
    line.settimeout(min(OLD_S, idle_s))
    heard = began = time.monotonic()
    while left:
        broken: httpx2.TransportError | None = None
        try:
            came = line.recv_into(buffer[held:], min(left, BLOCK - held))
            if came == 0:
                broken = httpx2.RemoteProtocolError(f"the connection was closed {left} bytes too early")
        except TimeoutError:
            came = 0
            if time.monotonic() - heard >= idle_s:
                broken = httpx2.ReadTimeout(f"no byte came for {idle_s:g} s")
        except OSError as error:
            came, broken = 0, httpx2.ReadError(str(error))
        now = time.monotonic()
        held, left, heard = held + came, left - came, now if came else heard
        if came == 0 or left == 0 or held == BLOCK or now - began >= OLD_S:
            yield buffer[:held]
            held, began = 0, time.monotonic()
        if broken is not None:
            raise broken


@contextmanager
def _alone(path: Path, stop: threading.Event) -> Iterator[None]:
    """Keep every other call, of any process, from filling this file; wait for one that does.

    The lock is on the file and taken before it is looked into, so that nobody empties what another fills.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while not _try_lock(descriptor):
                if stop.wait(LOOK_S):
                    raise TransferStopped(f"{path} was being filled by another process")
            if _is_at(descriptor, path):
                yield
                return
        finally:
            os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still has this name, and was not finished or deleted by whoever had the lock."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Say it in our words when no answer comes, or not all of it."""
    try:
        yield
    except httpx2.TransportError as error:
        raise unreachable(url, error) from error


def unreachable(url: str, error: httpx2.TransportError) -> UnavailableError:
    """No answer came, or not all of it; or who is there was not to be asked."""
    if (refused := tls_trouble(url, error)) is not None:
        return refused
    why = str(error) or type(error).__name__
    advice = "Is it running (`lydian serve`), and is this the right address (--url or LYDIAN_URL)?"
    if isinstance(error, httpx2.RemoteProtocolError) and url.startswith("http:"):
        advice += " If it speaks TLS, say https://."
    return UnavailableError(f"the coordinator at {url} does not answer: {why}", code="unreachable", advice=advice)


def raise_for(answer: httpx2.Response) -> None:
    """Turn an error answer into the error it carries."""
    check_not_elsewhere(answer)
    if answer.status_code < 400:
        return
    answer = whole(answer)
    try:
        body = json.loads(answer.content)
    except (ValueError, RecursionError):  # no JSON, or deeper than can be read
        if answer.request.method == "HEAD":  # a HEAD has no body to say more
            raise _with_wait(_bare(answer), answer) from None
        body = answer.text
    raise _with_wait(from_answer(answer.status_code, body), answer)


def _with_wait(error: LydianError, answer: httpx2.Response) -> LydianError:
    """The error, which knows when it may help to call again, where that was said."""
    told = answer.headers.get("Retry-After", "")
    if isinstance(error, TooManyError) and told.isascii() and told.isdecimal():
        error.retry_after_s = float(min(int(told[:9]), LONGEST_WAIT_S))
    return error


def _bare(answer: httpx2.Response) -> LydianError:
    """The error of an answer that has nothing but its status."""
    sentence = f"{answer.request.url.path} answered HTTP {answer.status_code}"
    return type(from_answer(answer.status_code, {"code": "", "sentence": sentence}))(sentence)
