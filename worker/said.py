"""What a task wrote last, for a person who looks on: the few lines that a heartbeat carries.

A progress bar that writes over its line counts as the newest state of it; what would steer a terminal is left out.
"""

import re
from pathlib import Path

from worker.logs import plain

LINES = 20
CHARACTERS = 2_000
READ_BYTES = 4 * CHARACTERS  # the most that so many characters need in UTF-8
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")  # colours, and where to go on writing


def last_said(log: bytes) -> str:
    """The last LINES lines of a log, at most CHARACTERS of them; what was cut off is marked with …."""
    text = _ESCAPES.sub("", log.decode(errors="replace")).rstrip()
    lines = [plain(line.rstrip("\r").rpartition("\r")[2]).rstrip() for line in text.split("\n")]
    shown = "\n".join(lines[-LINES:])
    return shown if len(shown) <= CHARACTERS else "…" + shown[1 - CHARACTERS :]


def log_size(path: Path) -> int:
    """Bytes in a log so far; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def log_since(path: Path, start: int) -> bytes:
    """The last READ_BYTES of what came into a log after its first `start` bytes.

    Nothing where it cannot be read: that is for a person to look at, and no work stops for it. A log that is shorter
    than it was has begun anew.
    """
    size = log_size(path)
    begin = max(start if size >= start else 0, size - READ_BYTES)
    try:
        with path.open("rb") as file:
            file.seek(begin)
            return file.read(READ_BYTES)
    except OSError:
        return b""
