"""`--to tensorboard=DIR`: event files in DIR/JOB, written with tensorboardX, which needs neither torch nor tensorflow.

Its SummaryWriter has a thread that writes, and its flush does not wait for what that thread has still to write. So
events are written by its EventsWriter, which is what that thread calls.

An event file only grows, and cannot be asked what is in it. So what was settled is noted beside it, with its length:
whatever a killed start wrote after that is cut off by the next one, which writes those points again.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from client.tracking.marks import Mark, read_mark, write_mark
from client.tracking.points import Point, Run
from client.tracking.trackers import seconds

MARK = "lydian.json"


def tracked(_kind: str, target: str, run: Run) -> "TensorBoard":
    """The tracker."""
    return TensorBoard(run, Path(target))


class TensorBoard:
    """One run of a TensorBoard log folder."""

    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, run: Run, folder: Path) -> None:
        self._run, self._folder = run, folder / run.job
        self.place = str(self._folder)
        self._after = 0
        self._changed = False
        self._writer: Any

    def __enter__(self) -> Self:
        from tensorboardX.event_file_writer import EventsWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        mark = read_mark(self._folder / MARK)
        for path in self._folder.glob("events.out.tfevents.*"):
            size = mark.sizes.get(path.name, 0)
            if size:
                os.truncate(path, min(size, path.stat().st_size))
            else:
                path.unlink()
        self._after = mark.after
        # Without a suffix its name could be that of a file of the same second, which it would empty; ids rise.
        self._writer = EventsWriter(str(self._folder / "events"), f".{self._after}")
        if self._after == 0:
            self._write_settings()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.settle()
        finally:
            self._writer.close()

    def take(self, point: Point) -> None:
        """Write its scalars and texts, unless they are there."""
        if point.id <= self._after:
            return
        from tensorboardX.summary import scalar, text

        at = seconds(point.at)
        for name, value in point.values.items():
            self._write(scalar(name, value), at, point.round)
        for name, words in point.words.items():
            self._write(text(f"{point.type}/{name}", _quoted(words)), at, point.round)
        self._after, self._changed = point.id, True

    def settle(self) -> None:
        """Flush, and note how long the files are now."""
        if not self._changed:
            return
        self._writer.flush()
        sizes = {path.name: _synced(path) for path in sorted(self._folder.glob("events.out.tfevents.*"))}
        write_mark(self._folder / MARK, Mark(self._after, sizes))
        self._changed = False

    def _write_settings(self) -> None:
        """As text, and for the HParams page, on which runs are compared."""
        from tensorboardX.summary import hparams, text

        rows = [f"| {name} | {_quoted(str(value))} |" for name, value in self._run.settings.items()]
        table = text("settings", "\n".join(["| key | value |", "| --- | --- |", *rows]))
        for summary in (table, *hparams(dict(self._run.settings), {self._run.target: 0.0})):
            self._write(summary, seconds(self._run.at), 0)

    def _write(self, summary: Any, at: float, step: int) -> None:  # noqa: ANN401 - a message of tensorboardX's
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=at, step=step, summary=summary))


def _synced(path: Path) -> int:
    """The size of a file that is on the disk now, in bytes."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _quoted(text: str) -> str:
    """TensorBoard shows texts as Markdown: this one as it is."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#!&" else c for c in text)
