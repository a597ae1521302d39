"""Blobs on their way out: pieces of files, read off the loop, and read once for all who want the same at the same time.

    many answers ──the same piece──▶ one read ──▶ the same bytes for all of them

Memory is bounded by two numbers, however many download: the pieces of answers become smaller as answers become more
(OUT), and of the pieces that were read last a few are kept (KEPT). To be used on the event loop.
"""

import asyncio
import os
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

LARGEST, SMALLEST = 1 << 20, 1 << 16  # bytes of a piece; a power of two, so that pieces of one size are shared
OUT = 32 << 20  # bytes of pieces that wait for their readers, about, while there are fewer than OUT / SMALLEST of them
KEPT = 8 << 20  # bytes of pieces that were read last
THREADS = 4  # that read

Piece = tuple[str, int, int]  # digest, start, bytes


class Reading:
    """What is being read of all blobs, for how many answers."""

    def __init__(self) -> None:
        self._answers = 0
        self._pieces: OrderedDict[Piece, asyncio.Future[bytes]] = OrderedDict()  # the last used last
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="read")  # started as they are needed

    @contextmanager
    def answering(self) -> Iterator[None]:
        """One answer more, for as long as it takes."""
        self._answers += 1
        try:
            yield
        finally:
            self._answers -= 1

    @property
    def piece_bytes(self) -> int:
        """How large the pieces of an answer are to be now."""
        fair = OUT // max(self._answers, 1)
        return min(max(1 << fair.bit_length() - 1, SMALLEST), LARGEST)

    async def piece(self, digest: str, descriptor: int, at: int, stop: int) -> bytes:
        """Bytes of a file from `at` on, at most to `stop`, and at least one.

        Args:
            digest: what the file is called.
            descriptor: the file, open; it may be closed as soon as this returns or is cancelled.
            at: the first byte.
            stop: where to end at most.

        Raises:
            OSError: the file cannot be read, or is shorter than `stop`.
        """
        size = self.piece_bytes
        start = at - at % size
        data = await asyncio.shield(self._read((digest, start, size), descriptor))
        wanted = data[at - start : stop - start]  # no copy where that is all of it
        if not wanted:
            raise OSError(f"{digest[:12]}… ends before byte {at}")
        return wanted

    async def whole(self, digest: str, path: Path) -> bytes:
        """A small file, all of it: one piece, whatever its size, and the same bytes for all who ask.

        Raises:
            OSError: it cannot be read; FileNotFoundError: it is not there.
        """
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return await asyncio.shield(self._read((digest, 0, os.fstat(descriptor).st_size), descriptor))
        finally:
            os.close(descriptor)

    def _read(self, piece: Piece, descriptor: int) -> asyncio.Future[bytes]:
        known = self._pieces.get(piece)
        if known is not None and not (known.done() and (known.cancelled() or known.exception() is not None)):
            self._pieces.move_to_end(piece)
            return known
        loop, (_, start, size) = asyncio.get_running_loop(), piece
        reading = loop.run_in_executor(self._threads, _read_and_close, os.dup(descriptor), start, size)
        self._pieces[piece] = reading
        kept = sum(size for _, _, size in self._pieces)
        while kept > KEPT:
            (_, _, dropped), _ = self._pieces.popitem(last=False)  # whoever waits for it has it all the same
            kept -= dropped
        return reading


def _read_and_close(descriptor: int, start: int, size: int) -> bytes:
    try:
        return os.pread(descriptor, size, start)
    finally:
        os.close(descriptor)
