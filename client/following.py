"""`lydian logs --follow`: what a job's task writes on its workers, and each trouble, as they come.

A heartbeat carries the last lines of a log; two of them overlap, or leave a gap. `Tails` is pure and finds the lines
that are new. The stream of events says when to look; it outlives the coordinator.

    api.events ──"now"──▶ api.output ──▶ Tails.take ──▶ new lines
               └─"handed_back"──▶ api.logs ──▶ new troubles
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import typer

from client import shown
from client.calling import Ending
from client.troubles import trouble_lines
from client.watching import ending_of, interrupted
from common.api import CoordinatorApi
from common.facts import HandedBack, Now
from common.messages import OVER, JobView, LogEntry, Output

LOOK_EVERY_S = 1.0  # the least between two looks at what was written: heartbeats are rarer, and workers are many
CUT = "…"  # stands for what a heartbeat had no room for


@dataclass(frozen=True, slots=True)
class Line:
    """A line that a task wrote; CUT stands for lines that nobody saw."""

    worker: str
    where: str
    text: str


class Tails:
    """The last lines of each worker at work, and which of the next ones are new."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], list[str]] = {}

    def take(self, outputs: Iterable[Output]) -> Iterator[Line]:
        """The lines that came since the last call, by worker; of an attempt that is over, all is forgotten."""
        last, self._last = self._last, {}
        for one in outputs:
            lines = one.said.split("\n")
            self._last[one.worker, one.where] = lines
            new = new_lines(last.get((one.worker, one.where), []), lines)
            yield from (Line(one.worker, one.where, text) for text in new)


def new_lines(before: list[str], now: list[str]) -> list[str]:
    """What a log grew by between two looks at its end.

    The last line of the first look may not have been whole, or was written over since (a progress bar): it counts as
    new when it changed. Where the looks do not meet, CUT comes first.
    """
    if not before:
        return now
    for end in (len(before), len(before) - 1):
        for count in range(min(end, len(now)), 0, -1):
            if all(map(_same, before[end - count : end], now)):
                return now[count:]
    return now if len(before) == 1 else [CUT, *now]


def _same(before: str, now: str) -> bool:
    """Whether a line is the same; of the first line of a look, only the end may be there."""
    return before == now or (now.startswith(CUT) and before.endswith(now[len(CUT) :]))


def follow(api: CoordinatorApi, job: JobView, *, as_json: bool) -> Ending:
    """Print a job's troubles so far, then what its task writes and each new trouble, until the job is over.

    Returns:
        The exit code for how the job ended.
    """
    entries, tails, looked_at = api.logs(job.id), Tails(), 0.0
    say_trouble, say_line = (_trouble_json, _line_json) if as_json else (_trouble, _line)
    for entry in entries:
        say_trouble(entry)
    if job.state not in OVER:
        typer.echo(_awaited(job), err=True)
    seen, state = (entries[-1].id if entries else 0), job.state
    try:
        for event in api.events(job.id, after=seen, on_wait=_say_once()):
            if event["type"] == "job":
                state = event["state"]
            elif event["type"] == _TROUBLE:
                for entry in (entry for entry in api.logs(job.id) if entry.id > seen):
                    say_trouble(entry)
                    seen = entry.id
            elif event["type"] == _NOW and time.monotonic() - looked_at >= LOOK_EVERY_S:
                looked_at = time.monotonic()
                for line in tails.take(api.output(job.id)):
                    say_line(line)
    except KeyboardInterrupt:
        return interrupted(job.id)
    return ending_of(state)


_TROUBLE: str = HandedBack.model_fields["type"].default
_NOW: str = Now.model_fields["type"].default


def _awaited(job: JobView) -> str:
    if job.spec.hides_data:
        return f"{job.id}: what its task writes stays on its workers, since the job hides their data; troubles follow"
    return f"{job.id}: waiting for what its task writes; it comes with the heartbeats, the last 20 lines of each worker"


def _say_once() -> Callable[[str], None]:
    """Says on stderr that the coordinator is away, each sentence once in a row."""
    last = ""

    def say(sentence: str) -> None:
        nonlocal last
        if sentence != last:
            last = sentence
            typer.echo(shown.one_line(sentence), err=True)

    return say


def _trouble(entry: LogEntry) -> None:
    typer.echo("\n".join(trouble_lines(entry)))


def _trouble_json(entry: LogEntry) -> None:
    typer.echo(json.dumps({"type": "trouble", **entry.model_dump(mode="json")}))


def _line(line: Line) -> None:
    typer.echo(f"{shown.one_line(line.worker)}  {shown.printable(line.text)}")


def _line_json(line: Line) -> None:
    typer.echo(json.dumps({"type": "output", "worker": line.worker, "where": line.where, "line": line.text}))
