"""Room on the disk that belongs to the journal: a file of real blocks, given up when a commit finds the disk full.

A coordinator whose disk is full must still be able to write down that its jobs pause. Free space that is only counted
can be taken by any other program; blocks that a file holds cannot.
"""

import errno
import logging
import os
from pathlib import Path

log = logging.getLogger("lydian.ballast")

BLOCK = 512  # bytes; the unit of st_blocks, whatever the file system
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})


class Ballast:
    """One file of `size` bytes that stands for room. Holding and releasing twice is once."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size  # bytes wanted

    @property
    def held(self) -> int:
        """Bytes of disk that the file occupies now."""
        try:
            return self.path.stat().st_blocks * BLOCK
        except FileNotFoundError:
            return 0

    def hold(self) -> bool:
        """Occupy the whole size. Returns whether that succeeded; if not, nothing is occupied."""
        if self.size == 0 or self.held >= self.size:
            return True
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _allocate(descriptor, self.size)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            self.release()
            return False
        finally:
            os.close(descriptor)
        return True

    def release(self) -> bool:
        """Give the room to whoever writes next. Returns whether there was any."""
        held = self.held
        self.path.unlink(missing_ok=True)
        if held:
            log.warning("the disk is full: %d bytes of %s are given to the journal", held, self.path)
        return held > 0


def _allocate(descriptor: int, size: int) -> None:
    """Reserve blocks without writing them, where the system can; else by writing zeros."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    zeros = bytes(1 << 20)
    for at in range(0, size, len(zeros)):
        os.pwrite(descriptor, zeros[: size - at], at)
