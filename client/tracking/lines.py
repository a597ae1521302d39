"""`--to jsonl=FILE`: one JSON object a point, flat, and the job's settings in the first.

A line is whole when its line break is there. What a killed start left of a line is cut off by the next.
"""

import json
import math
import os
from io import BufferedRandom
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from client.tracking.points import Point, Run
from common.errors import LydianError

TAIL = 1 << 20  # bytes in which the end of the last whole line is looked for at a time


def tracked(_kind: str, target: str, run: Run) -> "Lines":
    """The tracker."""
    return Lines(run, Path(target))


class Lines:
    """A file of JSON lines of one job, which grows at its end alone."""

    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, run: Run, path: Path) -> None:
        self.place, self._path, self._run = str(path), path, run
        self._after = -1  # id of the last point that is in the file; -1: not even the run
        self._file: BufferedRandom

    def __enter__(self) -> Self:
        self._file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
        try:
            self._after = self._resume()
        except BaseException:
            self._file.close()
            raise
        self._file.seek(0, os.SEEK_END)
        if self._after < 0:
            self._after = 0
            settings = {f"settings.{name}": value for name, value in self._run.settings.items()}
            self._write({"job": self._run.job, "id": 0, "type": "run", "name": self._run.name, **settings})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                self.settle()

    def take(self, point: Point) -> None:
        """Add it, unless it is there."""
        if point.id > self._after:
            head = {"job": self._run.job, "id": point.id, "type": point.type, "at": point.at, "round": point.round}
            self._write({**head, **point.values, **point.words})
            self._after = point.id

    def settle(self) -> None:
        """Have the disk take it."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write(self, line: dict[str, Any]) -> None:
        plain = {name: _number(value) if isinstance(value, float) else value for name, value in line.items()}
        self._file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def _resume(self) -> int:
        """Cut off a line that is not whole; the id of the last that is.

        Raises:
            LydianError: the file is something else (`file_exists`).
        """
        self._check(self._file.readline())
        self._file.truncate(_end_of_lines(self._file))
        last = _last_line(self._file)
        return int(json.loads(last)["id"]) if last else -1

    def _check(self, first: bytes) -> None:
        """Make sure that a file that begins like this is the job's; one with half a line or none is anybody's."""
        whole = first.endswith(b"\n")
        try:
            ours = not whole or json.loads(first).get("job") == self._run.job
        except (ValueError, AttributeError):
            ours = False
        if not ours or (first and not whole and not first.startswith(b'{"job": "')):
            raise LydianError(
                f"{self._path} is there already, and is not of {self._run.job}",
                code="file_exists",
                advice="Name another file: each job has one of its own.",
            )


def _end_of_lines(file: BufferedRandom) -> int:
    """Bytes up to the last line break, itself included."""
    stop = file.seek(0, os.SEEK_END)
    while stop:
        start = max(0, stop - TAIL)
        file.seek(start)
        found = file.read(stop - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        stop = start
    return 0


def _last_line(file: BufferedRandom) -> bytes:
    """Of a file of whole lines; empty: it has none."""
    end = file.seek(0, os.SEEK_END)
    start, found = end, -1
    while start and found < 0:
        start = max(0, start - TAIL)
        file.seek(start)
        found = file.read(end - 1 - start).rfind(b"\n")
    file.seek(start + found + 1)
    return file.read(end)


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinity: they are texts, as everywhere in the protocol."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
