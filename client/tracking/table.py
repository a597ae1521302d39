"""`--to csv=FILE`: one line a round, its evaluation in the same line.

An evaluation comes later than its round, and a metric may first come with the tenth: no line is final. So the file is
a function of the points alone, and written anew, whole, whenever it has changed: a reader never sees half of one.
"""

import csv
import io
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from client.tracking.points import Point, Run
from common.errors import LydianError

FIRST = ("job", "round", "at")
WORDS = ("digest", "absent", "late", "warning", "not_measured")
GROUPS = ("round", "train", "evaluation", "privacy", "worker")
ROW_TYPES = ("round", "evaluation")
_FORMULA = ("=", "+", "-", "@")  # what a spreadsheet would take a text for


def tracked(_kind: str, target: str, run: Run) -> "Table":
    """The tracker."""
    return Table(run, Path(target))


class Rows:
    """The rounds of a job as a table, which grows in both directions."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._rows: dict[int, dict[str, str | float]] = {}
        self._columns: set[str] = set()

    def take(self, point: Point) -> bool:
        """Add what a point says to its round's row; whether there was something."""
        if point.type not in ROW_TYPES:
            return False
        row = self._rows.setdefault(point.round, {"job": self._job, "round": point.round})
        row |= {"at": point.at, **point.values, **{name: _text(text) for name, text in point.words.items()}}
        self._columns |= point.values.keys()
        return True

    def text(self) -> str:
        """As CSV: of a value that a round does not have, nothing."""
        columns = sorted(self._columns, key=lambda name: (_group(name), name))
        written = io.StringIO()
        table = csv.DictWriter(written, [*FIRST, *columns, *WORDS], restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(row for _, row in sorted(self._rows.items()))
        return written.getvalue()


class Table:
    """A CSV file of one job."""

    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, run: Run, path: Path) -> None:
        self.place = str(path)
        self._path, self._job, self._rows, self._changed = path, run.job, Rows(run.job), True

    def __enter__(self) -> Self:
        if self._path.exists() and not _is_ours(self._path, self._job):
            raise LydianError(
                f"{self._path} is there already, and is not the table of {self._job}",
                code="file_exists",
                advice="Name another file: each job has one of its own.",
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.settle()

    def take(self, point: Point) -> None:
        """Add it to the table."""
        self._changed |= self._rows.take(point)

    def settle(self) -> None:
        """Write the file, if it would be another one."""
        if self._changed:
            beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            try:
                beside.write_text(self._rows.text(), encoding="utf-8")
                beside.replace(self._path)
            finally:
                beside.unlink(missing_ok=True)
            self._changed = False


def _is_ours(path: Path, job: str) -> bool:
    """Whether a file is this job's table, with any columns; an empty one is nobody's."""
    with path.open(encoding="utf-8", errors="replace") as file:
        head, row = file.readline(), file.readline()
    return not head or (head.startswith(",".join(FIRST) + ",") and (not row or row.startswith(f"{job},")))


def _group(name: str) -> int:
    group = name.partition("/")[0]
    return GROUPS.index(group) if group in GROUPS else len(GROUPS)


def _text(text: str) -> str:
    """A text that no spreadsheet computes."""
    return f"'{text}" if text.startswith(_FORMULA) else text
