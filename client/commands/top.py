"""The command `lydian top`."""

from typing import Annotated

import typer

from client.calling import DEFAULT_URL, AsJson, Token, Url, coordinator


def top(
    once: Annotated[bool, typer.Option("--once", help="Print it once and end.")] = False,
    every: Annotated[float, typer.Option(min=0.2, metavar="SECONDS", help="Between two looks.")] = 2.0,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """See the fleet and its jobs live: who does what, what is awaited, who needs a person. q or Ctrl-C leaves.

    Workers are sorted by trouble, and what the screen has no room for is counted. While the coordinator is away the
    last picture stays, says since when, and goes on by itself. In a pipe it is plain text; with --json one document
    a refresh, {at, away, jobs, workers}.

    \b
    Examples:
      lydian top
      lydian top --once | head -20
      lydian top --json --once | jq -r '.workers[] | select(.state == "gone") | .name'
    """
    from client.top import run_top

    with coordinator(url, token) as api:
        raise typer.Exit(run_top(api, every_s=every, once=once, as_json=as_json))
