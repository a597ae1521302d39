"""Carrying out what worker.cage says: the child's folders, who it is, and each file that passes between it and us.

    STATE/cage/in     files that the command under way names, as links: the child may read them
    STATE/cage/out    what the child writes: one folder, no folders in it; a result is moved out when a command is done
    STATE/cage/home   where it is at home and starts; new with each child

Nothing of STATE but this folder is the child's affair. In a sandbox a command is told paths in here instead of the real
ones (`lend`), and what it has made is moved to where it belongs (`take`). A child that lies may have made a link, a
pipe, or another name of somebody's file: what is moved is looked at where the child cannot reach it any more, and is
refused unless it is a file and nothing else. Without a sandbox the child is the worker's user all the same, and the
paths stay as they are.
"""

import contextlib
import ctypes
import getpass
import grp
import hashlib
import json
import logging
import os
import pwd
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from common.errors import LydianError
from common.tasks import BUILTIN
from worker.cage import (
    DEVICES,
    NETWORK_SETTINGS,
    SETTINGS,
    SYSTEM,
    Person,
    Sandbox,
    View,
    Wish,
    at_home,
    bubble,
    environment,
    limits,
)

log = logging.getLogger("lydian.worker")

READ = ("task", "base", "indices", "correction", "optimizer_from", "personal_from")
WRITTEN = ("out", "labels", "optimizer", "personal")
CARRIED = ("checkpoint",)  # stays in `out`: only the child reads it
PROBE_S = 60.0
END_S = 10.0  # for a killed process to be gone
PR_SET_DUMPABLE = 4  # prctl(2)


class LeftOddError(Exception):
    """Where a result belongs, the child has left something else."""


class Cage:
    """The surroundings of one worker's children, one child at a time. Made by `open_cage`."""

    def __init__(self, sandbox: Sandbox, state: Path, wish: Wish, person: Person | None, shown: Sequence[str]) -> None:
        """Makes nothing yet; see `prepare`.

        Args:
            sandbox: what the child is in.
            state: the worker's folder.
            wish: the owner's.
            person: whom the child is; None: the worker's user.
            shown: paths that a child in bwrap may read besides: the data that is offered.
        """
        self.sandbox, self.person = sandbox, person
        self._wish, self._shown, self._state = wish, tuple(shown), state.resolve()
        self.folder = self._state / "cage"
        self._lent: list[Path] = []

    @property
    def home(self) -> Path:
        """Where the child starts."""
        return self.folder / "home"

    @property
    def _in(self) -> Path:
        return self.folder / "in"

    @property
    def _out(self) -> Path:
        return self.folder / "out"

    # ------------------------------------------------------------ starting a child

    def prepare(self) -> None:
        """Make the folders as a new child is to find them: nothing in them but checkpoints of work that is still held.

        Raises:
            OSError: they cannot be made.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for old in (self._in, self.home):
            shutil.rmtree(old, ignore_errors=True)
        self._lent = []
        self.home.mkdir(mode=0o700, exist_ok=True)
        if self.sandbox == "none":
            return
        for folder in (self._in, self._out):
            folder.mkdir(mode=0o700, exist_ok=True)
        self._sweep()
        if self.person is not None:
            self._let_in(self.person)

    def clear(self) -> None:
        """Remove what a child that is gone leaves behind."""
        if self.sandbox == "user" and self.person is not None:
            end_all_of(self.person.uid)  # in bwrap there is nothing left: its first process takes all others along
        for folder in (self._in, self.home):
            shutil.rmtree(folder, ignore_errors=True)

    def command(self, program: Sequence[str]) -> list[str]:
        """What is started to have a program run in here."""
        return bubble(program, self.view(), self.person) if self.sandbox == "bwrap" else list(program)

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """The child's, of the worker's."""
        kept = environment(given, self._wish.environment)
        if "PYTHONPATH" in kept:  # the child starts in another folder
            kept["PYTHONPATH"] = os.pathsep.join(
                str(Path(entry).absolute()) for entry in kept["PYTHONPATH"].split(os.pathsep)
            )
        return kept if self.sandbox == "none" else at_home(kept, str(self.home))

    def identity(self) -> dict[str, Any]:
        """Who it is, as subprocess takes it; bubblewrap makes it that itself."""
        if self.person is None or self.sandbox != "user":
            return {}
        return {"user": self.person.uid, "group": self.person.gid, "extra_groups": self.person.groups}

    def exit_code(self, code: int) -> int:
        """The child's, of what was started; negative: the number of the signal that killed it."""
        return 128 - code if self.sandbox == "bwrap" and code > 128 else code

    def limits(self) -> str:
        """What the child is told to keep to (worker/task_cage.py)."""
        return json.dumps(limits(self.sandbox, memory=self._wish.memory))

    def meeting(self, usual: Path) -> Path:
        """The file where several ranks find each other."""
        return usual if self.sandbox == "none" else self.home / "ranks"

    def view(self) -> View:
        """What a child in bwrap sees of this machine, as it is now."""
        links = {path: str(Path(path).readlink()) for path in SYSTEM if Path(path).is_symlink()}
        system = [path for path in SYSTEM if path not in links and Path(path).exists()]
        names = (*SETTINGS, *(NETWORK_SETTINGS if self._wish.network else ()))
        settings = [path for name in names if Path(path := f"/etc/{name}").exists()]
        devices = sorted(str(path) for pattern in DEVICES for path in Path("/dev").glob(pattern))
        data = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lydian" / "data"
        return View(
            links=links,
            readable=[*system, *settings, *outermost([*python_folders(), *self._shown], covered=system)],
            within=[path for path in self._shown if Path(path).is_relative_to(self._state)],
            devices=devices,
            hidden=str(self._state),
            lent=str(self._in),
            own=[str(self._out), str(self.home)],
            home=str(self.home),
            caches={str(data): f"{self.home}/.cache/lydian/data"} if self.person is None and data.is_dir() else {},
            network=self._wish.network,
        )

    def check(self) -> None:
        """Make sure that a Python runs in here.

        Raises:
            LydianError: it does not (code no_sandbox); the sentence has what the system said.
        """
        try:
            self.prepare()
            ended = subprocess.run(
                self.command([sys.executable, "-I", "-c", ""]),
                env=self.environment(os.environ),
                cwd="/",
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PROBE_S,
                check=False,
                **self.identity(),
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise self._unusable(str(error)) from error
        if ended.returncode != 0:
            said = [line for line in ended.stderr.splitlines() if line.strip()] or [f"exit code {ended.returncode}"]
            raise self._unusable(said[-1].strip())

    def _unusable(self, why: str) -> LydianError:
        who = self.person.name if self.person else "it"
        advice = {
            "bwrap": "bubblewrap needs user namespaces (docs/security.md); or use another sandbox.",
            "user": f"{who} must be able to read Python and to reach the state folder: put them where others may pass.",
            "none": "Give a --state-dir that can be written.",
        }
        return LydianError(
            f"--sandbox {self.sandbox} does not work here: {why}", code="no_sandbox", advice=advice[self.sandbox]
        )

    def _let_in(self, person: Person) -> None:
        """Let another user come as far as its own folders, and nobody else."""
        if self.sandbox == "user":  # in bwrap there is no way from here to there
            for path in self._state.iterdir():
                if path.is_dir() and not path.is_symlink() and path != self.folder:
                    path.chmod(0o700)
            for path in (self._state, self.folder):
                os.chown(path, -1, person.gid)
                path.chmod(0o710)
        os.chown(self._in, -1, person.gid)
        self._in.chmod(0o750)
        for path in (self._out, self.home):
            os.chown(path, person.uid, person.gid)
        self.home.chmod(0o711)  # bubblewrap goes there with root's name and none of its rights

    def _sweep(self) -> None:
        """Remove what nobody will go on with."""
        work = self._state / "work"
        held = {self._flat(place / name) for place in work.glob("*/") for name in CARRIED} if work.is_dir() else set()
        for path in self._out.iterdir():
            if path not in held:
                _remove(path)

    # ------------------------------------------------------------ what passes

    def lend(self, command: dict[str, Any]) -> dict[str, Any]:
        """A command with the paths that the child is to use.

        Raises:
            OSError: a file cannot be lent.
        """
        if self.sandbox == "none":
            return command
        told = dict(command)
        for name in READ:
            if self._is_ours(command.get(name)):
                told[name] = str(self._lend_file(Path(command[name]), for_long=name == "task"))
        for name in (*WRITTEN, *CARRIED):
            if self._is_ours(command.get(name)):
                inside = self._flat(Path(command[name]))
                if name in WRITTEN:
                    _remove(inside)
                told[name] = str(inside)
        return told

    def take(self, command: dict[str, Any]) -> None:
        """Move what the child has made for a command to where it belongs.

        Args:
            command: as it was before `lend`.

        Raises:
            LeftOddError: something is there that is no plain file of the child's; it is removed.
            OSError: it cannot be moved.
        """
        if self.sandbox == "none":
            return
        for name in WRITTEN:
            if self._is_ours(command.get(name)):
                self._take_file(Path(command[name]))
        for name in CARRIED:
            if self._is_ours(command.get(name)):
                _remove(self._flat(Path(command[name])))

    def have_back(self) -> None:
        """End what was lent for a command, however that ended; a task file stays, since it may import others late."""
        if self.sandbox == "none":
            return
        for path in self._lent:
            path.unlink(missing_ok=True)
        self._lent = []
        self._sweep()

    def _is_ours(self, path: Any) -> bool:  # noqa: ANN401 - a field of a command
        return isinstance(path, str) and bool(path) and Path(path).is_relative_to(self._state)

    def _flat(self, path: Path) -> Path:
        """The name in `out` for what belongs at a path."""
        return self._out / f"{hashlib.sha256(str(path.parent).encode()).hexdigest()[:16]}-{path.name}"

    def _lend_file(self, path: Path, *, for_long: bool) -> Path:
        """Another name of a file in `in`, which the child may read; a path without a file is passed on as one."""
        lent = self._in / hashlib.sha256(str(path.parent).encode()).hexdigest()[:16] / path.name
        lent.parent.mkdir(exist_ok=True)
        lent.parent.chmod(0o755)
        lent.unlink(missing_ok=True)
        if not path.exists():
            return lent
        try:
            os.link(path, lent)
        except OSError:  # a file system without such names
            shutil.copyfile(path, lent)
        if self.person is not None:
            os.chown(lent, -1, self.person.gid)
            lent.chmod(0o640)
        if not for_long:
            self._lent.append(lent)
        return lent

    def _take_file(self, target: Path) -> None:
        left = self._flat(target)
        try:
            left.replace(target)  # of a link or a pipe, it itself
        except FileNotFoundError:
            return  # not every command leaves every file
        found = target.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or self._is_strange(found.st_uid):
            _remove(target)
            raise LeftOddError(
                f"where {target.name} belongs, the task has left something that is not a file of its own"
            )
        if self.person is not None:
            os.chown(target, os.geteuid(), os.getegid(), follow_symlinks=False)
        target.chmod(0o600)

    def _is_strange(self, owner: int) -> bool:
        return owner != (self.person.uid if self.person else os.geteuid())


def end_all_of(user: int) -> None:
    """SIGKILL to every process of a user that does nothing else here, until there is none."""
    while found := [process for process in psutil.process_iter() if _is_of(process, user)]:
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=END_S)


def _is_of(process: psutil.Process, user: int) -> bool:
    try:
        return bool(process.uids().real == user and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:  # it has just ended
        return False


def keep_to_itself() -> None:
    """Let no process of the same user look into this one: its memory and first environment may hold a token.

    Against root, and on systems without it, it does nothing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


# ---------------------------------------------------------------- choosing


def open_cage(wish: Wish, state: Path, data: Mapping[str, str]) -> Cage:
    """The cage that the owner wants, tried out.

    Args:
        wish: the owner's.
        state: the worker's folder.
        data: name -> folder that is offered.

    Raises:
        LydianError: it does not work here (code no_sandbox), or what is wished for does not go together (bad_sandbox).
    """
    person = _person(wish)
    for name in wish.environment:
        if name.startswith("LYDIAN_"):
            raise LydianError(f"--child-env {name}: no child gets that", code="bad_sandbox", advice="Leave it out.")
    if wish.sandbox != "auto":
        return _tried(wish.sandbox, wish, state, person, data)
    why, candidates = [], list[Sandbox](("bwrap", "user") if person else ("bwrap",))
    for sandbox in candidates:
        try:
            found = _tried(sandbox, wish, state, person, data)
        except LydianError as error:
            why.append(str(error))
        else:
            log.info("task files run in --sandbox %s", sandbox)
            return found
    log.warning("task files run without a sandbox: %s", "; ".join(why))
    return _tried("none", replace(wish, user=None), state, None, data)


def _tried(sandbox: Sandbox, wish: Wish, state: Path, person: Person | None, data: Mapping[str, str]) -> Cage:
    if sandbox == "bwrap" and shutil.which("bwrap") is None:
        raise LydianError(
            "--sandbox bwrap does not work here: there is no program bwrap",
            code="no_sandbox",
            advice="Install it: apt install bubblewrap, dnf install bubblewrap.",
        )
    if sandbox == "bwrap" and person is None and os.geteuid() == 0:
        raise LydianError(
            "--sandbox bwrap as root needs --child-user NAME: the machine's root is root in a sandbox too",
            code="bad_sandbox",
            advice="Name a user that does nothing else, or run the worker as one.",
        )
    if sandbox == "user" and person is None:
        raise LydianError(
            "--sandbox user needs --child-user NAME", code="bad_sandbox", advice="A user that does nothing else."
        )
    if sandbox == "none" and person is not None:
        raise LydianError(
            f"--child-user {person.name} counts with --sandbox user or bwrap, and it is none",
            code="bad_sandbox",
            advice="Add --sandbox user.",
        )
    cage = Cage(sandbox, state, wish, person, tuple(data.values()))
    if sandbox != "none":
        cage.check()
    return cage


def _person(wish: Wish) -> Person | None:
    """The user that is wished for."""
    if wish.user is None:
        return None
    if os.geteuid() != 0:
        raise LydianError(
            f"--child-user {wish.user}: only root can start a process as another user, and this is {getpass.getuser()}",
            code="bad_sandbox",
            advice="Start the worker as root, or leave it out; --sandbox bwrap needs no root.",
        )
    try:
        entry = pwd.getpwnam(wish.user)
    except KeyError as error:
        raise LydianError(
            f"--child-user {wish.user}: there is no such user here",
            code="bad_sandbox",
            advice=f"Make one: useradd --system --no-create-home {wish.user}",
        ) from error
    if entry.pw_uid == 0:
        raise LydianError(f"--child-user {wish.user} is root", code="bad_sandbox", advice="Name another user.")
    groups = sorted({entry.pw_gid, *(group.gr_gid for group in grp.getgrall() if wish.user in group.gr_mem)})
    return Person(wish.user, entry.pw_uid, entry.pw_gid, tuple(groups))


def python_folders() -> list[str]:
    """Where Python, its packages, and the child's own files are."""
    binary = Path(sys.executable)
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    found = [sys.prefix, sys.base_prefix, str(binary.resolve().parent.parent), str(Path(__file__).parent)]
    found += [str(Path(__file__).parent.parent / "lydian")]  # which scripts import
    found += [str(task.file.parent) for task in BUILTIN.values()]
    return [str(Path(folder).absolute()) for folder in [*found, *path] if Path(folder).exists()]


def outermost(paths: Sequence[str], covered: Sequence[str] = ()) -> list[str]:
    """Paths without those that lie within another one of them, or within what is covered; shorter ones first."""
    kept: list[str] = []
    for path in sorted(set(paths), key=lambda path: (len(Path(path).parts), path)):
        if not any(Path(path).is_relative_to(other) for other in (*covered, *kept)):
            kept.append(path)
    return kept


def _remove(path: Path) -> None:
    """Whatever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
