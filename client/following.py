"""`lydian logs --follow`: what a job's task writes on its workers, and each trouble, as they come.

A heartbeat carries the last lines of a log; two of them overlap, or leave a gap. `Tails` is pure and finds the lines
that are new. The stream of events says when to look; it outlives the coordinator.

    api.events ──"now"──▶ api.output ──▶ Tails.take ──▶ new lines
               └─"handed_back"──▶ api.logs ──▶ new troubles
"""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import typer

from client import shown
from client.calling import Ending
from client.troubles import trouble_lines
from client.watching import ending_of, interrupted
from common.api import CoordinatorApi
from common.errors import UnavailableError
from common.facts import HandedBack, Now
from common.messages import OVER, JobView, LogEntry, Output

LOOK_EVERY_S = 1.0  # the least between two looks at what was written: heartbeats are rarer, and workers are many
KEPT_ATTEMPTS = 1000  # whose last lines are remembered
CUT = "…"  # stands for what a heartbeat had no room for


@dataclass(frozen=True, slots=True)
class Line:
    """A line that a task wrote; CUT stands for lines that nobody saw."""

    worker: str
    where: str
    line: str


class Tails:
    """The last lines of each attempt, and which of the next ones are new.

    Attempts that nobody speaks of are kept for a while: a coordinator that was started anew knows their lines again
    only with the next heartbeats.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], list[str]] = {}  # worker, where -> lines; who was heard of last is last

    def take(self, outputs: Iterable[Output]) -> list[Line]:
        """The lines that came since the last call, by worker."""
        found = list[Line]()
        for one in outputs:
            before, now = self._last.pop((one.worker, one.where), []), one.said.split("\n")
            self._last[one.worker, one.where] = now
            found += (Line(one.worker, one.where, text) for text in new_lines(before, now))
        for old in list(self._last)[:-KEPT_ATTEMPTS]:
            del self._last[old]
        return found


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


class Follower:
    """Prints troubles and lines, each once. What the coordinator was away for is asked for again at the next event."""

    def __init__(self, api: CoordinatorApi, job: str, *, as_json: bool) -> None:
        self._api, self._job, self._as_json = api, job, as_json
        self._tails, self._looked_at = Tails(), -LOOK_EVERY_S
        self.seen = 0  # id of the last trouble that was printed
        self._owed = True  # whether there may be troubles after it

    def hear(self, event: Mapping[str, Any]) -> None:
        """Print what an event speaks of."""
        self._owed = self._owed or event["type"] == _TROUBLE
        if self._owed:
            self.tell_troubles()
        if event["type"] == _NOW and time.monotonic() - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            for line in self._tails.take(self._api.output(self._job)):
                self._print("output", line)

    def tell_troubles(self) -> None:
        """Print the troubles that were not printed."""
        for entry in self._api.logs(self._job, after=self.seen) if self._owed else ():
            self.seen = entry.id
            self._print("trouble", entry)
        self._owed = False

    def _print(self, kind: str, one: LogEntry | Line) -> None:
        if self._as_json:
            told = asdict(one) if isinstance(one, Line) else one.model_dump(mode="json")
            typer.echo(json.dumps({"type": kind, **told}))
        elif isinstance(one, Line):
            typer.echo(f"{shown.one_line(one.worker)}  {shown.printable(one.line)}")
        else:
            typer.echo("\n".join(trouble_lines(one)))


def follow(api: CoordinatorApi, job: JobView, *, as_json: bool) -> Ending:
    """Print a job's troubles so far, then what its task writes and each new trouble, until the job is over.

    Returns:
        The exit code for how the job ended.

    Raises:
        UnavailableError: the coordinator was away for an hour, or when all was over.
    """
    follower, away, state = Follower(api, job.id, as_json=as_json), _SaidOnce(), job.state
    follower.tell_troubles()
    if job.state in OVER:  # what ended it may be older than its last trouble, and no stream would come to it
        return ending_of(job.state)
    typer.echo(_awaited(job), err=True)
    try:
        for event in api.events(job.id, after=follower.seen, on_wait=away.say):
            if event["type"] == "job":
                state = event["state"]
            try:
                follower.hear(event)
            except UnavailableError as error:  # it ended since it sent this; the stream waits for it
                away.say(str(error))
        follower.tell_troubles()
    except KeyboardInterrupt:
        return interrupted(job.id)
    return ending_of(state)


_TROUBLE: str = HandedBack.model_fields["type"].default
_NOW: str = Now.model_fields["type"].default


def _awaited(job: JobView) -> str:
    if job.spec.hides_data:
        return f"{job.id}: what its task writes stays on its workers, since the job hides their data; troubles follow"
    return f"{job.id}: waiting for what its task writes; it comes with the heartbeats, the last 20 lines of each worker"


class _SaidOnce:
    """Says on stderr that the coordinator is away, each sentence once in a row."""

    def __init__(self) -> None:
        self._last = ""

    def say(self, sentence: str) -> None:
        """Say it, if it is news."""
        if sentence != self._last:
            self._last = sentence
            typer.echo(shown.one_line(sentence), err=True)
