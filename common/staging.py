"""A file of known size that is filled by pieces, in any order, by one process after another.

    NAME.part      the bytes, at their places
    NAME.ranges    which of them are here: the size, then a line for each range that was written

A line is added after the bytes it speaks of, and nothing is fsynced: a killed process loses at most what it had not
noted yet, since what was written is in the kernel's cache. A power cut may take the bytes and leave the line; that
shows when the whole is hashed, as it always is, and it is fetched or sent again. Lines of (start, stop), and not one
offset, since several streams may fill one file at once.

The record is made with its first line: of what is not to outlive its process there is none.
"""

import errno
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from common.errors import BadRequestError, ConflictError
from common.ranges import Ranges, gaps, with_range

NOTE_EVERY = 1 << 20  # bytes of one stream that a killed process forgets at most, if it notes them as they come
MAX_RANGES = 1000  # separate pieces of one file: bounds its memory, and the header that lists them
RECORD = ".ranges"
_NOTED = re.compile(rb"([0-9]{1,18}) ([0-9]{1,18})")


class Staging:
    """One upload under way: a file of known size that is filled by pieces in any order. Not for several threads."""

    def __init__(self, path: Path, size: int, ranges: Ranges, descriptor: int, record: int | None) -> None:
        self.path = path
        self.size = size  # bytes, when complete
        self.ranges = ranges  # bytes that are here
        self._descriptor: int | None = descriptor
        self._record = record  # None: nothing was noted yet

    @classmethod
    def open(cls, path: Path, size: int) -> Self:
        """Begin an upload of `size` bytes at `path`. What was there is gone."""
        path.with_suffix(RECORD).unlink(missing_ok=True)  # of another file, which is gone now
        with ExitStack() as unless_done:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            unless_done.callback(os.close, descriptor)
            os.truncate(descriptor, size)  # takes no room; tells check_room what is to come
            unless_done.pop_all()
        return cls(path, size, (), descriptor, None)

    @classmethod
    def reopen(cls, path: Path) -> Self | None:
        """Go on with an upload of an earlier process; None where nothing of it was noted, its record and its bytes do
        not fit together, or the disk is so full that nothing more of it could be noted."""
        known = _read_record(path.with_suffix(RECORD))
        if known is None or not path.is_file() or path.stat().st_size != known[0]:
            return None
        with ExitStack() as unless_done:
            record = os.open(path.with_suffix(RECORD), os.O_WRONLY | os.O_APPEND)
            unless_done.callback(os.close, record)
            descriptor = os.open(path, os.O_RDWR)
            unless_done.callback(os.close, descriptor)
            try:
                os.write(record, b"?\n")  # so that a line that was torn says nothing
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                return None  # no room for two bytes: nothing can be added to this file either
            unless_done.pop_all()
        return cls(path, *known, descriptor, record)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put bytes at their place. The same bytes again change nothing.

        Raises:
            BadRequestError: they reach beyond the upload (`out_of_range`), or lie in too many separate pieces
                (`too_many_pieces`); nothing was written.
            ConflictError: the upload was closed (`upload_closed`); nothing was written.
            OSError: the disk did not take them; `ranges` says what it took.
        """
        stop = offset + len(data)
        if self._descriptor is None:
            raise ConflictError("the upload is complete and being looked at", code="upload_closed")
        if offset < 0 or stop > self.size:
            raise BadRequestError(f"bytes {offset} to {stop} are not in an upload of {self.size}", code="out_of_range")
        if len(with_range(self.ranges, offset, stop)) > MAX_RANGES:
            raise BadRequestError(
                f"the upload has {MAX_RANGES} separate pieces, and byte {offset} would begin another",
                code="too_many_pieces",
                advice="Fill the gaps between the pieces first.",
            )
        left = memoryview(data)
        while left:
            written = os.pwrite(self._descriptor, left, offset)
            self.ranges = with_range(self.ranges, offset, offset + written)
            left, offset = left[written:], offset + written

    def note(self, start: int, stop: int) -> None:
        """Record that the bytes [start, stop) were written: a next process will know."""
        if self._descriptor is None or start >= stop:
            return
        if self._record is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            self._record = os.open(self.path.with_suffix(RECORD), flags, 0o600)
            os.write(self._record, f"{self.size}\n".encode())
        os.write(self._record, f"{start} {stop}\n".encode())

    @property
    def missing(self) -> Ranges:
        """The bytes that are not here yet."""
        return gaps(self.ranges, self.size)

    @property
    def complete(self) -> bool:
        """Whether every byte is here."""
        return not self.missing

    def close(self) -> None:
        """Take no more bytes. The file stays, and what is known of it. Twice is once."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            if self._record is not None:
                os.close(self._record)
            self._descriptor = self._record = None

    def forget(self) -> None:
        """Take no more bytes, and delete the record: the file has another name now."""
        self.close()
        self.path.with_suffix(RECORD).unlink(missing_ok=True)

    def discard(self) -> None:
        """Take no more bytes, and delete the file."""
        self.forget()
        self.path.unlink(missing_ok=True)


def _read_record(path: Path) -> tuple[int, Ranges] | None:
    """The size of an upload and the ranges noted of it; None where that cannot be read. A torn line says nothing."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    if not lines or not lines[0].isdigit():
        return None
    size = int(lines[0])
    ranges: Ranges = ()
    for line in lines[1:]:
        found = _NOTED.fullmatch(line)
        if found is not None and int(found[1]) < int(found[2]) <= size:
            ranges = with_range(ranges, int(found[1]), int(found[2]))
    return size, ranges
