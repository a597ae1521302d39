"""`lydian audit`: who did what, and whether the record of it is as it was written.

The rows are checked here, by hashes computed on this machine: the coordinator's word is not asked for.
"""

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client import shown
from client.calling import DEFAULT_URL, AsJson, Token, Url, coordinator, new_app

if TYPE_CHECKING:
    from common.api import CoordinatorApi
    from common.audit import AuditEntry

LOOK_S = 1.0  # between two looks for new rows
COLUMNS = ("ROW", "AT", "BY", "FROM", "ACTION", "OBJECT", "RESULT", "DETAIL")

audit_app = new_app(
    """The record of who did what, oldest first, and the check of it; with --json one object a line.

    \b
    Examples:
      lydian audit --job digits-4f2a --action update
      lydian audit --action call.refused --since 2026-01-31
      lydian audit --follow --json | jq .action
      lydian audit head                      note this somewhere else
      lydian audit verify --since 841:9f3c…  nothing up to row 841 was changed or cut off
    """
)

StateDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Read this state folder instead, on the coordinator's machine.")
]


@audit_app.callback(invoke_without_command=True, no_args_is_help=False)
def audit(
    context: typer.Context,
    job: Annotated[str | None, typer.Option(metavar="JOB", help="Rows about this job.")] = None,
    worker: Annotated[
        str | None, typer.Option(metavar="WORKER", help="Rows about, or by, the worker of this id.")
    ] = None,
    action: Annotated[
        str | None, typer.Option(metavar="ACTION", help="Rows of this kind: update.accepted, or all of update.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="ROW|TIME", help="Rows after this one, or from 2026-01-31T12 on (UTC).")
    ] = None,
    last: Annotated[int, typer.Option(min=0, metavar="N", help="At most so many, the newest (0: all).")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Then print rows as they come, until Ctrl-C.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Print the record."""
    if context.invoked_subcommand is not None:
        return
    wanted = {
        name: value for name, value in (("job", job), ("worker", worker), ("action", action)) if value is not None
    }
    number = int(since) if since is not None and since.isdecimal() else None
    with coordinator(url, token) as api:
        after = number or 0
        if not wanted and since is None and last:
            after = max(api.audit(limit=1).head.seq - last, 0)
        reading = Reading(api, after, wanted)
        rows = reading.rest()
        if since is not None and number is None:
            rows = (row for row in rows if _at(row) >= since)
        kept = deque(rows, maxlen=last or None)
        if as_json:
            for row in kept:
                typer.echo(json.dumps(_fields(row)))
        else:
            shown.print_table(COLUMNS, [_cells(row) for row in kept], right={"ROW"})
        if follow:
            never = threading.Event()
            for row in reading.follow(lambda: never.wait(LOOK_S), lambda sentence: typer.echo(sentence, err=True)):
                typer.echo(json.dumps(_fields(row)) if as_json else "  ".join(_cells(row)))


@audit_app.command()
def head(state_dir: StateDir = None, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Print the newest row as SEQ:HASH, to be noted somewhere else: an anchor for `lydian audit verify --since`.

    \b
    Examples:
      lydian audit head >> heads.txt
      lydian audit head --state-dir /var/lib/lydian  # beside the coordinator, or without one that runs
    """
    if state_dir is not None:
        from client.running import become

        become("server.proof", ["head", "--state-dir", str(state_dir)])
    with coordinator(url, token) as api:
        found = api.audit(limit=1).head
    typer.echo(f"{found.seq}:{found.hash}")


@audit_app.command()
def verify(
    since: Annotated[
        list[str] | None, typer.Option(metavar="SEQ:HASH", help="A head that was noted before; repeatable.")
    ] = None,
    state_dir: StateDir = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Compute the whole chain again and name the first row that is not as it was written.

    Without --since a tail that was cut off, or a record written anew as a whole, cannot be told from a true one.

    \b
    Examples:
      lydian audit verify --since "$(tail -1 heads.txt)"
      lydian audit verify --state-dir /var/lib/lydian
    """
    from common.audit import Checker, parse_anchor

    try:
        checker = Checker(parse_anchor(text) for text in since or [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--since") from error
    if state_dir is not None:
        from client.running import become

        become("server.proof", ["audit", *(f"--since={text}" for text in since or []), "--state-dir", str(state_dir)])
    with coordinator(url, token) as api:
        for entry in Reading(api, 0, {}).rest():
            checker.take(entry)
        checker.end()
    anchored = f"; {shown.several(len(since), 'anchor')} found in it" if since else ""
    typer.echo(
        f"{checker.seq} rows and {checker.facts} facts are as written{anchored}; head {checker.seq}:{checker.hash}"
    )
    typer.echo(checker.proof(), err=True)


class Reading:
    """Reads the record on, page by page; `at` is the row that was looked at last."""

    def __init__(self, api: "CoordinatorApi", at: int, wanted: dict[str, str]) -> None:
        self._api, self.at, self._wanted = api, at, wanted

    def rest(self) -> "Iterator[AuditEntry]":
        """The rows that are there by now, those of them that are wanted.

        Raises:
            BrokenRecordError: the record ends before a row that was there.
        """
        from common.audit import BrokenRecordError

        while True:
            page = self._api.audit(self.at, **self._wanted)
            if page.head.seq < self.at:
                raise BrokenRecordError(
                    f"the audit record ends with row {page.head.seq}, and row {self.at} was there: its end was cut off"
                )
            yield from page.entries
            self.at = page.head.seq if page.next is None else page.next
            if page.next is None:
                return

    def follow(self, pause: Callable[[], object], say: Callable[[str], object]) -> "Iterator[AuditEntry]":
        """The rows as they come, for ever. Outlives a coordinator that is away, and says so once.

        Args:
            pause: waits for a moment.
            say: is told what is waited for.
        """
        from common.errors import UnavailableError
        from common.guarding import REFUSALS

        away = False
        while True:
            try:
                yield from self.rest()
                away = False
            except UnavailableError as error:
                if error.code in REFUSALS:
                    raise
                if not away:
                    say(f"{error}; waiting for it to come back")
                away = True
            pause()


def _at(row: "AuditEntry") -> str:
    return row.fact.at if row.fact is not None else row.at


def _fields(row: "AuditEntry") -> dict[str, object]:
    """The row with its words filled in, and of its fact only which it is."""
    from common.audit import shown as words_of

    words = words_of(row)._asdict()
    about = {"job": words.pop("job"), "about_worker": words.pop("worker")}
    return row.model_dump(mode="json") | words | about | {"fact": row.fact.id if row.fact is not None else None}


def _cells(row: "AuditEntry") -> list[str]:
    from common.audit import shown as words_of

    words, where = words_of(row), f"{row.peer} ({row.node})" if row.node else row.peer
    by = f"{row.actor} ({row.worker})" if row.worker else row.actor
    cells = [str(row.seq), words.at, by, where, words.action, words.object, words.result, words.detail]
    return [shown.one_line(cell) or shown.NOTHING for cell in cells]
