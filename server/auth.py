"""Tokens: what they look like, what each scope may do, the files that hold them, and logs without them.

    lyd_<scope>_<id>_<43 characters>            read, submit, admin (people), join (new workers), work (a worker each)
    lyd_<scope>_<id>_<43 characters>@<pins>     the same to us; tells who has it what we must be (common.pins)

The id is public: to find a token, to revoke it, to speak of it. The rest is 256 random bits that are shown once; only
their SHA-256 is kept, and no slow hash is needed, since nobody guesses 256 bits. No secret goes into an error or a log.
server.tokens makes them and knows which ones count.
"""

import logging
import os
import re
from pathlib import Path
from typing import Any

from common.errors import ForbiddenError, LydianError, UnauthenticatedError
from common.messages import Submitter
from common.pins import NOTHING, Pins
from server.store import sync
from server.tokens import Principal, Scope, Tokens

READERS: tuple[Scope, ...] = ("read", "submit", "admin")
"""Who may see jobs, workers, models and logs: each of these scopes has what the ones before it have, and more."""
SUBMITTERS: tuple[Scope, ...] = ("submit", "admin")

_ANYWHERE = re.compile(r"lyd_([a-z]+)_([0-9a-f]+)_[A-Za-z0-9_-]+")

log = logging.getLogger("lydian.auth")


def require(principal: Principal, *scopes: Scope) -> None:
    """Let only tokens of these scopes pass.

    Raises:
        ForbiddenError: the token has another scope.
    """
    if principal.scope not in scopes:
        raise ForbiddenError(
            f"this takes a token of scope {' or '.join(scopes)}; lyd_{principal.scope}_{principal.token_id}_… "
            f"has scope {principal.scope}"
        )


def require_own(principal: Principal, job: str, submitted_by: Submitter | None) -> None:
    """Let only who submitted a job, and admins, change it.

    The rule for all of these: what a caller may see and not change is answered with 403; what it may not even see is
    not there, 404. Whoever may submit may see every job, so another's job is 403.

    Args:
        principal: who calls, of scope submit or admin.
        job: its id.
        submitted_by: who submitted it; None: an admin, or before that was noted.

    Raises:
        ForbiddenError: it is another's (`not_yours`).
    """
    if principal.scope == "admin" or (submitted_by is not None and submitted_by.token == principal.token_id):
        return
    raise ForbiddenError(
        f"{job} was not submitted with lyd_{principal.scope}_{principal.token_id}_…, which may end, pause and resume "
        "its own jobs alone",
        code="not_yours",
        advice="Use the token that it was submitted with, or one of scope admin.",
    )


def token_file(folder: Path, name: str, scope: Scope, tokens: Tokens, pins: Pins = NOTHING) -> str:
    """The token that lies in a file of the state folder, for the people of this machine; made when there is none.

    A file whose token does not count here, from another journal or revoked, gets a new one.

    Args:
        folder: the state folder.
        name: of the file, such as `admin.token`.
        scope: admin or join.
        tokens: where a new token is made.
        pins: what stands behind it, for whoever takes it from the file; others than these are replaced.

    Raises:
        LydianError: the file can be neither read nor written (`token_file_unusable`).
    """
    path = folder / name
    try:
        if path.exists():
            tighten(path)
            held = path.read_text(encoding="ascii", errors="replace").strip()
            bare = held.partition("@")[0]
            if _counts(bare, scope, tokens):
                if pins.behind(bare) != held:
                    write_private(path, f"{pins.behind(bare)}\n")
                return pins.behind(bare)
            log.warning("the token in %s is not known here as one of scope %s: a new one takes its place", path, scope)
        token = pins.behind(tokens.issue(scope, name=name))
        write_private(path, f"{token}\n")
    except OSError as error:
        raise LydianError(
            f"the token file {path} can be neither read nor written: {error}",
            code="token_file_unusable",
            advice="Give this user the right to read and write it, or delete it: a new one is made.",
        ) from error
    return token


def _counts(token: str, scope: Scope, tokens: Tokens) -> bool:
    try:
        return tokens.check(f"Bearer {token}").scope == scope
    except UnauthenticatedError:
        return False


def tighten(path: Path) -> None:
    """Take a file that others could read back from them, and say so."""
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        path.chmod(0o600)
        log.warning("%s could be read by others (mode %04o): now it is its owner's alone (0600)", path, mode)


def write_private(path: Path, text: str) -> None:
    """Write a file that nobody else can read at any moment, and that is there whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)  # of a process that died in here
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
    sync(part)
    part.replace(path)
    sync(path.parent)


# ---------------------------------------------------------------- logs


def redact(text: str) -> str:
    """The text with every token's secret cut off; its scope and id stay, to say which it was."""
    return _ANYWHERE.sub(r"lyd_\1_\2_…", text)


class RedactTokens(logging.Filter):
    """Cuts the secrets of tokens out of log records: message, arguments, traceback.

    Belongs on handlers (`guard_logs`): on a logger it would see only what is logged through that very logger, not what
    its children pass up.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record where needed; every record passes."""
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)  # formatters use it where it is set
        if record.exc_text:
            record.exc_text = redact(record.exc_text)
        if record.stack_info:
            record.stack_info = redact(record.stack_info)
        record.msg = _redacted(record.msg)
        if isinstance(record.args, tuple):  # kept apart from the message: some formatters want them
            record.args = tuple(_redacted(each) for each in record.args)
        try:
            rendered = record.getMessage()
        except (TypeError, ValueError, KeyError):
            return True  # arguments that do not fit the message: the handler says so, with the redacted ones
        if redact(rendered) != rendered:  # in what an object says of itself, or put together from pieces
            record.msg, record.args = redact(rendered), None
        return True


def _redacted(value: object) -> Any:  # noqa: ANN401 - a log record takes anything
    return redact(value) if isinstance(value, str) else value


def guard_logs() -> None:
    """Put RedactTokens on every handler of this process, uvicorn's too. To be called when logging has been set up."""
    loggers = [
        logging.root,
        *(each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)),
    ]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    for handler in [*handlers, *([logging.lastResort] if logging.lastResort else [])]:
        if not any(isinstance(each, RedactTokens) for each in handler.filters):
            handler.addFilter(RedactTokens())
