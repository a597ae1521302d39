"""`lydian logs`: each trouble of a job, whole: what happened, what to do, on which machine, and the traceback.

Pure: entries in, lines out. What comes from a worker passes `shown` before a terminal sees it.
"""

from collections.abc import Iterator

from client import shown
from common.messages import LogEntry
from common.then import scene_lines


def trouble_lines(entry: LogEntry) -> Iterator[str]:
    """The lines of one trouble; none of them can steer a terminal."""
    cause = f", {entry.cause}" if entry.cause and entry.cause != entry.code else ""
    head = f"{entry.at}  {entry.worker}  {entry.where}: {entry.sentence} ({entry.code}{cause})"
    yield shown.one_line(head)
    if entry.advice:
        yield shown.one_line(f"what to do: {entry.advice}")
    if entry.scene is not None:
        yield from (shown.one_line(line) for line in scene_lines(entry.scene, shown.size))
    if entry.detail:
        yield shown.printable(entry.detail.rstrip())
