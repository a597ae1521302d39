"""How a command reaches the coordinator, and how a program ends: options, tokens, errors, exit codes.

Heavy packages are imported where a call is made, so that `lydian --help` stays fast.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn
from urllib.parse import urlsplit

import typer

from common.errors import LydianError, UnauthenticatedError

if TYPE_CHECKING:
    from common.api import CoordinatorApi
    from common.messages import Message

DEFAULT_URL = "http://127.0.0.1:8470"

Url = Annotated[
    str, typer.Option("--url", metavar="URL", envvar="LYDIAN_URL", help="The coordinator. Better in LYDIAN_URL.")
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="TEXT",
        envvar="LYDIAN_TOKEN",
        help="Admin token. Better in LYDIAN_TOKEN; on the coordinator's own machine its file is found.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Ending(IntEnum):
    """The exit codes, for scripts."""

    FINE = 0
    FAILED = 1
    """The request was refused, or the job that was watched failed."""
    USAGE = 2
    """An unknown option, a missing argument: given by typer."""
    UNREACHABLE = 3
    """No coordinator answers at the address."""
    CANCELLED = 4
    """The job that was watched was cancelled."""
    INTERRUPTED = 130
    """Ctrl-C."""


def new_app(help_text: str | None = None, *, completes: bool = False) -> typer.Typer:
    """A typer application in the manner of all of ours: plain help, no tracebacks of ours in boxes.

    Args:
        help_text: of a group of commands.
        completes: with --install-completion and --show-completion.
    """
    return typer.Typer(
        help=help_text,
        add_completion=completes,
        no_args_is_help=help_text is not None,
        rich_markup_mode=None,  # rich costs more start-up than all the rest
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def run_program(app: typer.Typer, program: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line (default: that of this process) to its end; errors are sentences, not tracebacks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode is no reason to fail
    try:
        app(arguments, prog_name=program)
    except LydianError as error:
        typer.echo(error.lines(), err=True)
        sys.exit(Ending.UNREACHABLE if error.code == "unreachable" else Ending.FAILED)
    sys.exit(Ending.FINE)


@contextmanager
def coordinator(url: str, token: str | None) -> Iterator["CoordinatorApi"]:
    """The coordinator at `url`, called with `token` or, on its own machine, with the admin token found there.

    Raises:
        typer.BadParameter: `url` is not an address.
        LydianError: unreadable, something else answers there; and whatever the coordinator answers.
    """
    from common.api import CoordinatorApi

    address = whole_url(url)
    token = token or local_admin_token(address)
    try:
        with CoordinatorApi(address, token) as api:
            yield api
    except UnauthenticatedError as error:
        if token is not None:
            raise
        where = "Set LYDIAN_TOKEN to what the file admin.token in the coordinator's state folder holds"
        raise UnauthenticatedError(
            f"{address} wants a token, and none was given or found here",
            advice=f"{where}; on its own machine LYDIAN_STATE_DIR names that folder.",
        ) from error


def whole_url(url: str) -> str:
    """The address with its scheme: gpu-box:8470 is http://gpu-box:8470.

    Raises:
        typer.BadParameter: it is not an address.
    """
    whole = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(whole)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        usable = False
    if not usable or any(c.isspace() for c in whole):
        raise typer.BadParameter(f"{url!r} is not an address like http://gpu-box:8470", param_hint="--url")
    return whole


def local_admin_token(url: str) -> str | None:
    """The admin token that the coordinator left in its state folder on this machine; None without one.

    Only for a loopback address: the token is not shown to another machine.
    """
    if not _is_loopback(urlsplit(url).hostname or ""):
        return None
    for folder in _state_folders():
        try:
            return (folder / "admin.token").read_text(encoding="utf-8").strip() or None
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
    return None


def print_message(message: "Message") -> None:
    """A message as a JSON object on one line of stdout."""
    typer.echo(message.model_dump_json())


def print_messages(messages: "Sequence[Message]") -> None:
    """Messages as a JSON array on stdout, one a line."""
    typer.echo("[" + ",\n ".join(message.model_dump_json() for message in messages) + "]")


def _state_folders() -> Iterator[Path]:
    """Where a coordinator on this machine may keep its state."""
    named = os.environ.get("LYDIAN_STATE_DIR")
    if named:
        yield Path(named).expanduser()
    from common.places import coordinator_folder

    yield coordinator_folder()


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
