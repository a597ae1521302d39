"""A file that is hashed while it is written, put onto the disk meanwhile, and gone again unless it was finished."""

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from common.weights import Array

SYNC_EVERY = 32 << 20  # bytes written, after which the disk is set to work on them


class Output:
    """One file under way. A context manager: without `finish`, or when anything fails inside, the file is removed.

    The disk takes what was written while more comes, so that little is left to wait for at the end.
    """

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        """Open the file; what was there is gone. Where it need not be durable, the disk is left alone.

        Raises:
            OSError: it cannot be opened.
        """
        self.path, self.size, self._durable = path, 0, durable  # size: bytes
        self._digest, self._synced, self._done = hashlib.sha256(), 0, False
        self._syncing: Future[None] | None = None
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="sync")  # starts no thread until it is used
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> Self:
        return self

    def write(self, data: bytes | Array) -> None:
        """Add bytes, or the bytes of a contiguous array.

        Raises:
            OSError: the disk did not take them, or not those that were written before.
        """
        view = data.view(np.uint8).data if isinstance(data, np.ndarray) else memoryview(data)
        self._digest.update(view)
        while view:
            written = os.write(self._descriptor, view)
            self.size, view = self.size + written, view[written:]
        if self._durable and self.size - self._synced >= SYNC_EVERY and (self._syncing is None or self._syncing.done()):
            self._wait()
            self._synced = self.size
            self._syncing = self._disk.submit(os.fsync, self._descriptor)

    def finish(self) -> str:
        """Return the SHA-256 of the file, in hex; where it is durable, when all of it would survive a power cut.

        Raises:
            OSError: the disk did not take it.
        """
        if self._durable:
            self._wait()
            os.fsync(self._descriptor)
        self._done = True
        return self._digest.hexdigest()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._disk.shutdown()
            os.close(self._descriptor)
        finally:
            if error is not None or not self._done:
                self.path.unlink(missing_ok=True)

    def _wait(self) -> None:
        if self._syncing is not None:
            self._syncing.result()  # the system tells of a failed write once
