"""The options of `lydian serve` and `lydian work` as a service needs them. Pure.

A service starts in another folder, so paths become absolute; its command line can be read by everybody on the machine,
so no token may be on it.
"""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from common.errors import LydianError
from common.pins import split

TOKEN = re.compile(r"lyd_([a-z]+)_[0-9a-f]+_[A-Za-z0-9_-]+")

_PATHS = ("--allow", "--signers", "--state-dir", "--tls", "--tls-key")
_NO_PATHS = {"--tls": ("self-made", "tailscale")}
_NAMED_PATHS = ("--data",)
_NOT_HERE = ("--help", "--version", "--install-completion", "--show-completion")
_PORTS = {"http": 80, "https": 443}


def values(options: Iterable[str], name: str) -> list[str]:
    """What stands after every `name`, as `--name VALUE` or `--name=VALUE`."""
    return [value for option, value in _pairs(options) if option == name]


def without(options: Iterable[str], name: str) -> list[str]:
    """The options but those called `name`, and their values."""
    kept: list[str] = []
    waiting = False
    for word in options:
        if not waiting and word.partition("=")[0] != name:
            kept.append(word)
        waiting = not waiting and word == name
    return kept


def absolute(options: Iterable[str], folder: Path) -> list[str]:
    """The options with every path that they name made absolute, seen from `folder`."""
    done: list[str] = []
    before = ""
    for word in options:
        option, sign, value = word.partition("=")
        if sign and word.startswith("--"):
            done.append(f"{option}={_absolute(option, value, folder)}")
            before = ""
        else:
            done.append(_absolute(before, word, folder))
            before = "" if before in (*_PATHS, *_NAMED_PATHS) else word
    return done


def _absolute(option: str, value: str, folder: Path) -> str:
    if option in _PATHS and value not in _NO_PATHS.get(option, ()):
        return str(folder / Path(value).expanduser())
    name, sign, path = value.partition("=")
    if option in _NAMED_PATHS and sign:
        return f"{name}={folder / Path(path).expanduser()}"
    return value


def check_no_secret(options: Iterable[str]) -> None:
    """Refuse what must not be in a unit.

    Raises:
        LydianError: a token (code token_in_options), or an option that runs nothing (not_for_a_service).
    """
    for word in options:
        if word.partition("=")[0] == "--token" or TOKEN.search(word):
            raise LydianError(
                "a token on a command line would stand in the unit file and in the list of processes",
                code="token_in_options",
                advice="Leave it out and set LYDIAN_TOKEN, or be asked for it; it goes into a file that only the "
                "service's manager reads.",
            )
        if word in _NOT_HERE:
            raise LydianError(
                f"a service with {word} would end at once",
                code="not_for_a_service",
                advice=f"`lydian serve {word}` and `lydian work {word}` say it here; "
                "`lydian install-service --help` is about services.",
            )


def check_join_token(token: str) -> str:
    """The token, with its pins, without the white space around it, if it looks like one that lets a worker join.

    Raises:
        LydianError: it does not (bad_token), or its pins are damaged (bad_pin). The sentence does not show it.
    """
    bare, pins = split(token.strip())
    found = TOKEN.fullmatch(bare or "")
    if found is None or found[1] != "join":
        what = f"a token of scope {found[1]}" if found else "nothing like lyd_join_…" if bare else "empty"
        raise LydianError(
            f"a worker joins with a join token, and what was given is {what}",
            code="bad_token",
            advice="`lydian token join` on the coordinator's machine prints one; its state folder has one, join.token.",
        )
    return pins.behind(found[0])


def grace(options: Iterable[str], default_s: float) -> float:
    """Seconds that a worker has to finish what is under way; the default where its options do not say, or say nonsense,
    which `lydian work` refuses itself."""
    said = default_s
    for value in values(options, "--grace"):
        try:
            said = float(value)
        except ValueError:
            return default_s
    return said if math.isfinite(said) and said >= 0 else default_s


def same_coordinator(one: str, other: str) -> bool:
    """Whether two URLs name one coordinator: a last slash, the host's case and a default port do not matter."""

    def key(parts: SplitResult) -> tuple[str, str | None, int | None, str]:
        return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme), parts.path.rstrip("/")

    return key(urlsplit(one)) == key(urlsplit(other))


def _pairs(options: Iterable[str]) -> Iterator[tuple[str, str]]:
    before = None
    for word in options:
        option, sign, value = word.partition("=")
        if before is not None:
            yield before, word
            before = None
        elif sign and word.startswith("--"):
            yield option, value
        else:
            before = word if word.startswith("--") else None


def settings_with(text: str, token: str | None) -> str:
    """The content of an EnvironmentFile with this join token in place of any it had; None: with none.

    What else is in the file stays as it is.
    """
    lines = text.removesuffix("\n").split("\n") if text else []
    kept = [line for line in lines if not line.lstrip().startswith("LYDIAN_TOKEN=")]
    return "".join(f"{line}\n" for line in [*kept, *([f"LYDIAN_TOKEN={token}"] if token else [])])


def token_in(text: str) -> str | None:
    """The join token in an EnvironmentFile; None where there is none."""
    for line in text.split("\n"):
        name, _, value = line.strip().partition("=")
        if name == "LYDIAN_TOKEN" and value:
            return value.strip("\"'")
    return None
