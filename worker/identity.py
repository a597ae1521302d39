"""Who this worker is: its state folder, what each coordinator calls it, and the task files that its owner trusts.

    FOLDER/agent.lock      held by the one agent that works in the folder, with its process id
    FOLDER/identity.json   coordinator's URL -> worker id, credential, pin; 0600, written whole or not at all
    FOLDER/trusted.txt     one SHA-256 a line, kept by the owner

A credential stands for the worker: it is never logged, and a file that cannot be read is never replaced by a new
identity, which would leave the coordinator with two of us.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import platform
import re
import secrets
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError

from common.errors import BadTaskError, DiskFullError, LydianError
from common.messages import Message
from common.pins import NOTHING, Pins, parse
from common.places import worker_folder

log = logging.getLogger("lydian.worker")

IDENTITY_FILE = "identity.json"
TRUST_FILE = "trusted.txt"

MACHINE_IDS = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))

_PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"[A-Za-z0-9._-]{1,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class _Known(Message):
    """What one coordinator gave this worker."""

    worker_id: str = Field(min_length=1)
    credential: str = Field(min_length=1)
    pin: str | None = Field(None, description="what stood behind the @ of its join token (common.pins)")


class _File(Message):
    """The content of identity.json."""

    coordinators: dict[str, _Known]


class Identity:
    """One worker's identity at one coordinator, and the lock on its folder. Made by `open`; `close` ends the lock."""

    def __init__(self, folder: Path, url: str, known: dict[str, _Known], lock: int) -> None:
        self.folder = folder
        self.url = url
        self.start_id = secrets.token_hex(16)  # new at each start, so that the coordinator can tell a restart
        self.place = place_of(folder)  # the same at each start, so that it can tell a copied folder
        self._known = known
        self._unlock = weakref.finalize(self, os.close, lock)

    @classmethod
    def open(cls, folder: Path, url: str) -> Self:
        """Take the folder, made if need be, and read who this worker is at the coordinator.

        Args:
            folder: the state folder, for one agent at a time.
            url: the coordinator's; with or without a last slash it is the same.

        Raises:
            LydianError: another agent works in the folder (code folder_locked); the file is damaged (bad_identity); the
                folder cannot be used (folder_unusable); the URL is none (bad_url).
        """
        name = _coordinator(url)
        with usable(folder), contextlib.ExitStack() as unless_done:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = _lock(folder)
            unless_done.callback(os.close, lock)
            self = cls(folder, name, _read(folder / IDENTITY_FILE), lock)
            unless_done.pop_all()
        return self

    @property
    def worker_id(self) -> str | None:
        """The id that the coordinator gave; None before the first registration."""
        return self._known[self.url].worker_id if self.url in self._known else None

    @property
    def credential(self) -> str | None:
        """The worker's own token at the coordinator; None before the first registration."""
        return self._known[self.url].credential if self.url in self._known else None

    @property
    def pins(self) -> Pins:
        """What the coordinator must turn out to be: its machine in the tailnet, its certificate.

        Raises:
            LydianError: the file was changed by hand, and not well (`bad_pin`).
        """
        kept = self._known[self.url].pin if self.url in self._known else None
        return parse(kept) if kept else NOTHING

    def remember(self, worker_id: str, credential: str, pins: Pins = NOTHING) -> None:
        """Keep what the coordinator gave, and what it must turn out to be. It is on the disk when this returns."""
        pin = str(pins) or None
        self._write({**self._known, self.url: _Known(worker_id=worker_id, credential=credential, pin=pin)})

    def repin(self, pins: Pins) -> None:
        """Keep what the coordinator must turn out to be, where there is a credential to keep it with."""
        if self.url in self._known and self.pins != pins:
            self._write({**self._known, self.url: self._known[self.url].model_copy(update={"pin": str(pins)})})

    def forget(self) -> None:
        """Be unknown at this coordinator; others stay known."""
        if self.url in self._known:
            self._write({url: known for url, known in self._known.items() if url != self.url})

    def close(self) -> None:
        """Let another agent have the folder. Also happens when the process ends."""
        self._unlock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write(self, known: dict[str, _Known]) -> None:
        with usable(self.folder):
            content = _File(coordinators=known).model_dump_json(indent=2) + "\n"
            _replace(self.folder / IDENTITY_FILE, content.encode())
        self._known = known


def default_folder(name: str) -> Path:
    """The state folder of the worker of this name, unless its owner gives another.

    Raises:
        LydianError: the name cannot be a worker's (code bad_name), nor a folder's.
    """
    if name in (".", "..") or not _NAME.fullmatch(name):
        raise LydianError(
            f"{name!r} cannot be a worker's name",
            code="bad_name",
            advice="A --name has 1 to 63 letters, digits, dots, dashes and underscores.",
        )
    return worker_folder(name)


def place_of(folder: Path) -> str:
    """Where a state folder is, as 64 hex digits: another machine or a copied folder has another place.

    Made of the machine's id (its name where it has none) and the folder's inode; neither can be read out of it. The
    same folder moved within its file system keeps its place. Not of its device: that number is another after a restart
    of the machine, and the worker that comes back would be taken for a copy of itself.
    """
    return hashlib.sha256(f"{_machine()}\n{folder.stat().st_ino}".encode()).hexdigest()


def _machine() -> str:
    for path in MACHINE_IDS:
        with contextlib.suppress(OSError):  # a system without it, or one that does not show it
            if known := path.read_text(encoding="ascii", errors="replace").strip():
                return known
    return platform.node()


# ---------------------------------------------------------------- trust


def trusted_digests(folder: Path) -> tuple[str, ...]:
    """SHA-256 of the task files that the owner listed in trusted.txt, each once, in the file's order.

    Raises:
        LydianError: a line is none (code bad_trust_list), or the file cannot be read.
    """
    path = folder / TRUST_FILE
    with usable(folder):
        lines = path.read_bytes().splitlines() if path.exists() else []
    digests: list[str] = []
    for number, line in enumerate(lines, start=1):
        digest = line.decode("ascii", errors="replace").partition("#")[0].strip().lower()
        if not digest:
            continue
        if not _DIGEST.fullmatch(digest):
            raise LydianError(
                f"{path}, line {number}: {digest[:80]!r} is no SHA-256",
                advice="A line is 64 hex digits, and # starts a comment; --allow FILE adds a task file to the list.",
                code="bad_trust_list",
            )
        digests.append(digest)
    return tuple(dict.fromkeys(digests))


def trust_file(folder: Path, task_path: Path) -> str:
    """Add a task file, as it is now, to trusted.txt. A file that is listed already is not listed twice.

    Returns:
        The file's SHA-256.

    Raises:
        BadTaskError: the task file cannot be read.
        LydianError: the list is damaged or cannot be written.
    """
    try:
        with task_path.open("rb") as task:
            digest = hashlib.file_digest(task, "sha256").hexdigest()
    except OSError as error:
        raise BadTaskError(
            f"the task file {task_path} cannot be read: {error.strerror}", advice="Check the path after --allow."
        ) from error
    if digest in trusted_digests(folder):
        return digest
    path = folder / TRUST_FILE
    name = re.sub(r"[^ -~]", "?", task_path.name)  # a line break in a name must not become a line
    with usable(folder):
        unended = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            file.write(b"\n" * unended + f"{digest}  # {name}\n".encode("ascii"))
            file.flush()
            os.fsync(file.fileno())
    return digest


# ---------------------------------------------------------------- files


def _coordinator(url: str) -> str:
    """The URL in one spelling, without user and password: scheme://host:port/path."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError as error:
        raise _bad_url(url, str(error)) from error
    if parts.scheme not in _PORTS or not parts.hostname:
        raise _bad_url(url, "it has to start with http:// or https:// and name a host")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{host}:{_PORTS[parts.scheme] if port is None else port}{path}"


def _bad_url(url: str, why: str) -> LydianError:
    return LydianError(
        f"{url} is no coordinator's URL: {why}",
        code="bad_url",
        advice="Paste the one that `lydian serve` printed, e.g. http://100.64.0.1:8470.",
    )


@contextlib.contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Inside, what the system refuses becomes a sentence about the state folder.

    Raises:
        DiskFullError: there is no room.
        LydianError: anything else (code folder_unusable).
    """
    try:
        yield
    except OSError as error:
        what = f"the state folder {folder} cannot be used: {error.strerror or error}"
        if error.filename is not None and str(error.filename) != str(folder):
            what += f" ({error.filename})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(what) from error
        raise LydianError(
            what, code="folder_unusable", advice="Give a folder that this user may write with --state-dir."
        ) from error


def _lock(folder: Path) -> int:
    """Take the folder for this process. Returns the open lock file; closing it lets go, and so does a kill."""
    with contextlib.ExitStack() as unless_done:
        descriptor = os.open(folder / "agent.lock", os.O_RDWR | os.O_CREAT, 0o600)
        unless_done.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 20).decode("ascii", errors="replace").strip()
            raise LydianError(
                f"another agent works in {folder}: process {holder or 'not known'}",
                code="folder_locked",
                advice="Stop it, or give this worker another --name or --state-dir: each agent needs its own folder.",
            ) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode("ascii"))
        unless_done.pop_all()
    return descriptor


def _read(path: Path) -> dict[str, _Known]:
    """What each coordinator gave; nothing yet when there is no file."""
    if not path.exists():
        return {}
    if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        log.warning("%s could be read by others (mode %03o); now it cannot", path, mode)
        path.chmod(0o600)
    try:
        return _File.model_validate_json(path.read_bytes()).coordinators
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False, include_context=False)[0]  # no credential in a log
        where = ".".join(str(part) for part in found["loc"])
        raise LydianError(
            f"{path} is damaged{f' at {where}' if where else ''}: {found['msg']}",
            code="bad_identity",
            advice="Put it back from a copy; or move it away, and the worker joins again with a token, as another one.",
        ) from None


def _replace(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 so that a kill or a power cut leaves the old content or the new."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
