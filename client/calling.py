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
from common.networks import is_loopback
from common.pins import certificate_pin, split

if TYPE_CHECKING:
    from common.api import CoordinatorApi
    from common.messages import Message

DEFAULT_URL = "127.0.0.1:8470"  # http://, or https:// where a certificate is pinned

Url = Annotated[
    str, typer.Option("--url", metavar="URL", envvar="LYDIAN_URL", help="The coordinator. Better in LYDIAN_URL.")
]


def _warn_of_argv(context: typer.Context, token: str | None) -> str | None:
    source = context.get_parameter_source("token")
    if token is not None and source is not None and source.name == "COMMANDLINE":
        typer.echo(IN_ARGV, err=True)
    return token


IN_ARGV = (
    "warning: a token on a command line is shown to every user of this machine by `ps`, and kept in the shell's "
    "history: set LYDIAN_TOKEN, or LYDIAN_TOKEN_FILE to a file that holds it"
)

Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="TEXT",
        envvar="LYDIAN_TOKEN",
        callback=_warn_of_argv,
        help="Token. Better in LYDIAN_TOKEN, or in a file that LYDIAN_TOKEN_FILE names; on the coordinator's own "
        "machine its admin token is found.",
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

    The certificate that it must show is behind the token's @, or in LYDIAN_PIN.

    Raises:
        typer.BadParameter: `url` is not an address.
        LydianError: unreadable, something else answers there; and whatever the coordinator answers.
    """
    from common.api import CoordinatorApi

    token = token or token_from_file() or local_admin_token(whole_url(url))
    pin = pin_for(token)
    address = whole_url(url, encrypted=pin is not None)
    try:
        with CoordinatorApi(address, token, pin=pin, insecure=insecure_allowed()) as api:
            yield api
    except UnauthenticatedError as error:
        if token is not None:
            raise
        where = "Set LYDIAN_TOKEN to what the file admin.token in the coordinator's state folder holds"
        raise UnauthenticatedError(
            f"{address} wants a token, and none was given or found here",
            advice=f"{where}; on its own machine LYDIAN_STATE_DIR names that folder.",
        ) from error


def pin_for(token: str | None) -> str | None:
    """The certificate that the coordinator must show: LYDIAN_PIN, or what is behind the token's @.

    Raises:
        LydianError: one of them is damaged (`bad_pin`).
    """
    given = os.environ.get("LYDIAN_PIN")
    return certificate_pin(given) if given else split(token)[1].certificate


def insecure_allowed() -> bool:
    """Whether LYDIAN_INSECURE lets a token travel in plain words over any network."""
    return os.environ.get("LYDIAN_INSECURE", "").lower() in ("1", "true", "yes", "on", "y", "t")


def whole_url(url: str, *, encrypted: bool = False) -> str:
    """The address with its scheme: gpu-box:8470 is http://gpu-box:8470, or https://… where that is `encrypted`.

    Raises:
        typer.BadParameter: it is not an address.
    """
    whole = url if "://" in url else f"{'https' if encrypted else 'http'}://{url}"
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
    path = local_admin_file(url)
    return path.read_text(encoding="utf-8").strip() or None if path is not None else None


def local_admin_file(url: str) -> Path | None:
    """The file of that token; None: there is none that can be read, or the address is another machine's."""
    host = urlsplit(url).hostname or ""
    if host != "localhost" and not is_loopback(host):
        return None
    files = (folder / "admin.token" for folder in _state_folders())
    return next((path for path in files if os.access(path, os.R_OK)), None)


def token_from_file() -> str | None:
    """The token in the file that LYDIAN_TOKEN_FILE names; None where it names none.

    Raises:
        LydianError: the file cannot be read (`token_file_unusable`).
    """
    named = os.environ.get("LYDIAN_TOKEN_FILE")
    if not named:
        return None
    try:
        return Path(named).expanduser().read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise LydianError(
            f"LYDIAN_TOKEN_FILE names {named}, which cannot be read: {error}",
            code="token_file_unusable",
            advice="Name a file with nothing but a token in it, or unset LYDIAN_TOKEN_FILE.",
        ) from error


def without_secret(arguments: Sequence[str]) -> list[str]:
    """The arguments without their --token, which is put into LYDIAN_TOKEN, where `ps` does not show it to others."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        option, sign, value = word.partition("=")
        if option != "--token":
            kept.append(word)
        elif sign or (value := next(words, "")):
            os.environ["LYDIAN_TOKEN"] = value
        else:
            kept.append(word)  # without a value: whoever parses it says so
    return kept


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
