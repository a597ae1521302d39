"""`lydian token`: make, list, rotate and revoke tokens.

A secret is shown once: bare on stdout and nowhere else, so that `> FILE` keeps it, or in a file that nobody else can
read (--out). What is said about it is on stderr.
"""

import os
import re
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client import shown
from client.calling import (
    DEFAULT_URL,
    AsJson,
    Token,
    Url,
    coordinator,
    local_admin_file,
    new_app,
    print_message,
    print_messages,
    whole_url,
)
from common.errors import LydianError

if TYPE_CHECKING:
    from common.messages import Message, TokenAnswer, TokenView

app = new_app("Tokens: for people, for scripts, and for workers that are to join.")

COLUMNS = ("ID", "SCOPE", "NAME", "STATE", "CREATED", "EXPIRES", "JOINED", "LABELS", "LAST USED", "FROM")

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"([0-9]{1,9})([smhd])")


class Scope(Enum):
    """What a token may do. Each of the first three has what the ones before it have, and more."""

    read = "read"
    submit = "submit"
    admin = "admin"
    join = "join"


Out = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the token here (mode 0600), not on stdout.")
]
Ttl = Annotated[
    str | None, typer.Option("--ttl", metavar="30d|12h|90m|45s", help="How long it counts (default: until revoked).")
]
Uses = Annotated[int | None, typer.Option("--uses", min=1, help="How many workers it lets in (default: any number).")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", metavar="LABEL", help="What its workers are called; repeatable.")
]
Name = Annotated[str, typer.Option("--name", metavar="NAME", help="To know it by: letters, digits, dots and dashes.")]
Which = Annotated[str, typer.Argument(metavar="TOKEN", help="A token's id or name, or a worker's id or name.")]


@app.command()
def create(
    scope: Annotated[Scope, typer.Option("--scope", help="What it may do.")],
    name: Name = "",
    ttl: Ttl = None,
    uses: Uses = None,
    labels: Labels = None,
    out: Out = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Make a token, and print it this once.

    \b
    Scopes:
      read     see jobs, workers, metrics, logs and models
      submit   read, and submit jobs; end, pause and resume its own
      admin    everything
      join     let workers join

    \b
    Examples:
      lydian token create --scope submit --name ada --ttl 30d > ada.token
      lydian token create --scope read --name prometheus --out /etc/prometheus/lydian.token
      lydian token create --scope join --uses 4 --ttl 1h --label legacy
    """
    if scope is not Scope.join and (uses is not None or labels):
        raise typer.BadParameter("--uses and --label are for --scope join")
    answer = _make(scope, name, ttl, uses, labels, url, token)
    _give(answer, answer.token, out, as_json=as_json)


@app.command()
def join(
    name: Name = "",
    ttl: Ttl = None,
    uses: Uses = None,
    labels: Labels = None,
    out: Out = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Make a token that lets workers join. On a terminal the whole `lydian work` line is printed, in a pipe the token.

    \b
    Examples:
      lydian token join
      lydian token join --uses 1 --ttl 1h --label attic
      LYDIAN_TOKEN=$(lydian token join --uses 1) lydian work http://gpu-box:8470
    """
    answer = _make(Scope.join, name, ttl, uses, labels, url, token)
    where = answer.url or "URL"
    if out is None and not as_json and is_terminal():
        typer.echo(f"lydian work {where} --token {answer.token}")
        return
    _give(answer, answer.token, out, as_json=as_json)
    given = f"$(cat {out.name})" if out is not None else "TOKEN"
    typer.echo(f"on every machine that trains: LYDIAN_TOKEN={given} lydian work {where}", err=True)


@app.command("list")
def list_tokens(
    every: Annotated[bool, typer.Option("--all", help="Those that count no more as well.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """List the tokens: whose they are, what they may do, until when, and when they were used last. No secret.

    \b
    Examples:
      lydian token list
      lydian token list --all --json
    """
    with coordinator(url, token) as api:
        found = [view for view in api.tokens() if every or view.state == "counts"]
    if as_json:
        print_messages(found)
        return
    header, rows = shown.without_empty(list(COLUMNS), [_cells(view) for view in found], {"LABELS", "JOINED"})
    shown.print_table(header, rows)


@app.command()
def revoke(
    which: Which,
    cancel_jobs: Annotated[
        bool, typer.Option("--cancel-jobs", help="End the jobs that it submitted, too (default: they go on).")
    ] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Let a token count no more, from the next call on. What its worker was training goes to others at once.

    \b
    Examples:
      lydian token revoke ada
      lydian token revoke ada --cancel-jobs
      lydian token revoke 8b2364b3c98c
      lydian token revoke gpu-box          # the worker of this name: it has to join anew
    """
    with coordinator(url, token) as api:
        view = api.revoke_token(which, cancel_jobs=cancel_jobs)
    if as_json:
        print_message(view)
        return
    typer.echo(shown.one_line(f"{view.id} ({view.name or view.scope}) is {view.state}"))
    if view.ended_jobs:
        typer.echo(shown.one_line(f"cancelled: {', '.join(view.ended_jobs)}"), err=True)
    if view.open_jobs:
        typer.echo(shown.one_line(f"go on (--cancel-jobs ends them): {', '.join(view.open_jobs)}"), err=True)


@app.command()
def rotate(
    which: Annotated[
        str | None,
        typer.Argument(metavar="[TOKEN]", help="A token's id or name, or a worker's (default: the token in use)."),
    ] = None,
    overlap: Annotated[
        str, typer.Option(metavar="24h", help="How long the first secret counts on, unless the second is used before.")
    ] = "24h",
    out: Out = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Give a token a second secret: the first counts until that is used, or the overlap is over.

    It stays the same token: its name, its jobs, the day on which it ends. A worker fetches its new one by itself.
    Without TOKEN on the coordinator's machine the file admin.token is written anew. For a secret that others have got
    hold of, `lydian token revoke` is the way.

    \b
    Examples:
      lydian token rotate                      # on the coordinator's machine: its admin.token
      lydian token rotate ada --overlap 1h --out ada.token
      lydian token rotate gpu-box              # a worker's
    """
    from common.messages import RotateRequest

    target = out
    if which is None and token is None and out is None:
        target = local_admin_file(whole_url(url))
    with coordinator(url, token) as api:
        answer = api.rotate_token(which or "own", RotateRequest(overlap_s=seconds_of(overlap, zero=True)))
    if answer.token is not None:
        _give(answer, answer.token, target, as_json=as_json)
    elif as_json:
        print_message(answer)
    typer.echo(answer.reason, err=True)


@app.callback()
def about() -> None:
    """Tokens: for people, for scripts, and for workers that are to join."""


# ---------------------------------------------------------------- parts


def seconds_of(text: str, *, zero: bool = False) -> float:
    """Seconds of a duration such as 30d, 12h, 90m or 45s.

    Raises:
        typer.BadParameter: it is none, or nothing where that is not allowed.
    """
    found = _DURATION.fullmatch(text.strip())
    seconds = int(found[1]) * _SECONDS[found[2]] if found else 0
    if not found or (seconds == 0 and not zero):
        raise typer.BadParameter(f"{text!r} is no duration such as 30d, 12h, 90m or 45s")
    return float(seconds)


def is_terminal() -> bool:
    """Whether a person reads stdout."""
    return sys.stdout.isatty()


def _make(
    scope: Scope,
    name: str,
    ttl: str | None,
    uses: int | None,
    labels: list[str] | None,
    url: str,
    token: str | None,
) -> "TokenAnswer":
    from pydantic import ValidationError

    from common.messages import TokenRequest

    seconds = seconds_of(ttl) if ttl is not None else None
    try:
        request = TokenRequest(scope=scope.value, name=name, ttl_s=seconds, uses=uses, labels=tuple(labels or ()))
    except ValidationError as error:
        raise typer.BadParameter("; ".join(f"{fault['loc'][0]}: {fault['msg']}" for fault in error.errors())) from error
    with coordinator(url, token) as api:
        return api.new_token(request)


def _give(answer: "Message", secret: str, out: Path | None, *, as_json: bool) -> None:
    """Hand a secret over, in one place alone."""
    if out is not None:
        write_private(out, f"{secret}\n")
        typer.echo(f"the token is in {out}, which only its owner can read", err=True)
    elif as_json:
        print_message(answer)
    else:
        typer.echo(secret)


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600, whole or not at all, in place of what was there.

    Raises:
        LydianError: it cannot be written (`file_unusable`).
    """
    part = path.with_name(f"{path.name}.part")
    try:
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise LydianError(
            f"{path} cannot be written: {error.strerror or error}",
            code="file_unusable",
            advice="The token that was made is lost: `lydian token list` shows its id, `lydian token revoke` ends it.",
        ) from error


def _cells(view: "TokenView") -> list[str]:
    joined = shown.NOTHING
    if view.scope == "join":
        joined = f"{view.joined} of {view.uses}" if view.uses is not None else str(view.joined)
    state = f"{view.state}, rotating" if view.rotating else view.state
    cells = [
        view.id,
        view.scope,
        view.name or shown.NOTHING,
        state,
        view.created_at[:10],
        view.expires_at or "never",
        joined,
        ", ".join(view.labels) or shown.NOTHING,
        view.last_used_at or shown.NOTHING,
        view.last_address or shown.NOTHING,
    ]
    return [shown.one_line(cell) for cell in cells]
