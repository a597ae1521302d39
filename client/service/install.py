"""`lydian install-service`: decide what a machine needs for a service, show it or do it, and wait until it runs.

Wish ──design──▶ Design: unit, settings, folders ──┬─ --dry-run ──▶ shown
                                                   ├─ install ────▶ files, user, systemctl, wait
                                                   └─ --uninstall ▶ stopped and removed; the state stays
"""

import contextlib
import difflib
import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import typer

from client.calling import whole_url
from client.running import python_module
from client.service import given
from client.service.manager import Manager, wait_until
from client.service.units import GRACE_S, MARK, SERVE_STOP_S, STOP_ROOM_S, Service, Side, check_name, program_line
from client.service.units import unit_text as text_of
from common.errors import LydianError
from common.places import coordinator_folder, machine_name, worker_folder

ANSWER_S = 300.0  # for a program that reads its options and ends, on a machine that is busy
HOMES = (Path("/home"), Path("/root"), Path("/run/user"))
PASSING = (Path("/tmp"), Path("/var/tmp"))  # noqa: S108 - a hardened system service has its own


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What was asked for."""

    side: Side
    options: tuple[str, ...]  # as they were given
    of_user: bool  # a unit of this user's manager, not of the system's
    user: str | None = None  # whom a system unit runs as; None: a user of its own
    unit: str | None = None
    dry_run: bool = False
    enable: bool = True
    replace: bool = False
    wait_s: float = 60.0  # for a coordinator to load its state and listen, and for a worker to join


@dataclass(frozen=True)
class Place:
    """Where the files of services go."""

    units: Path
    settings: Path
    states: Path | None  # None: where the program keeps its state by itself

    @classmethod
    def of(cls, *, of_user: bool) -> "Place":
        """The user's folders, or the system's."""
        if of_user:
            config = platformdirs.user_config_path()
            return cls(config / "systemd" / "user", config / "lydian", None)
        return cls(Path("/etc/systemd/system"), Path("/etc/lydian"), Path("/var/lib"))


@dataclass(frozen=True, kw_only=True)
class Design:
    """What a machine needs: decided before anything is touched."""

    service: Service
    manager: Manager
    unit_file: Path
    unit_text: str
    settings_file: Path
    url: str | None  # of a worker's coordinator
    wait_s: float

    @property
    def state(self) -> Path:
        """The state folder."""
        return Path(self.service.state)

    def has_joined(self) -> bool:
        """Whether the worker has a credential of its own at its coordinator."""
        held = _read(self.state / "identity.json")
        if not held or self.url is None:
            return False
        try:
            return any(given.same_coordinator(known, self.url) for known in json.loads(held)["coordinators"])
        except (ValueError, KeyError, TypeError):
            return False  # the worker itself says what is wrong with it


def install(wish: Wish) -> None:
    """Install and start what is wished for, or with `dry_run` show what that would be.

    Raises:
        LydianError: what is wished for cannot be (options, token, another's unit, no systemd), before anything is
            touched; it cannot be written (not_writable); or it does not run (service_failed).
    """
    place = Place.of(of_user=wish.of_user)
    manager = Manager(wish.of_user)
    if not wish.dry_run:
        _require_right(wish.of_user)
        manager.require()
    design = plan(wish, place, manager)
    old = _unit_in_the_way(design, replace=wish.replace)
    if old != design.unit_text:  # else they were read before
        check_options(design)
    token = None if wish.side is Side.serve or design.has_joined() else _token(design, ask=not wish.dry_run)
    if wish.dry_run:
        _show(design, wish)
        return
    if design.service.user is not None:
        have_user(design.service, own=wish.user is None)
    changed = _write(design, old, token)
    if not wish.enable:
        typer.echo(f"not started: `{manager.command('enable', '--now', design.service.unit)}` does that", err=True)
    else:
        _start(design, changed=changed, token=token)
    typer.echo(design.unit_file)


def plan(wish: Wish, place: Place, manager: Manager) -> Design:
    """Everything that is to be on the machine, from what was asked for. Reads where things are and changes nothing.

    Raises:
        LydianError: see the modules `given` and `units`.
    """
    unit = wish.unit or wish.side.default_unit
    check_name(unit)
    given.check_no_secret(wish.options)
    options = given.absolute(wish.options, Path.cwd())
    url = None
    if wish.side is Side.work:
        if not options or options[0].startswith("-"):
            raise typer.BadParameter("a worker needs its coordinator: lydian install-service work URL [OPTIONS]")
        url = options[0] = whole_url(options[0])
    if not wish.of_user:
        _check_reach(options)
    state = _state(wish, options, place, unit)
    user = None if wish.of_user else wish.user or unit
    service = Service(
        side=wish.side,
        unit=unit,
        program=_program(),
        options=tuple(given.without(options, "--state-dir")),
        state=str(state),
        settings=str(place.settings / f"{unit.removeprefix('lydian-')}.env"),
        user=user,
        grace_s=given.grace(options, GRACE_S),
        in_home=any(_inside(part, home) for part in _parts_of_the_program() for home in HOMES),
    )
    return Design(
        service=service,
        manager=manager,
        unit_file=place.units / service.file_name,
        unit_text=text_of(service),
        settings_file=Path(service.settings),
        url=url,
        wait_s=wish.wait_s,
    )


def _state(wish: Wish, options: list[str], place: Place, unit: str) -> Path:
    named = given.values(options, "--state-dir")
    if place.states is not None:
        state = Path(named[-1]) if named else place.states / unit
        hidden = [str(folder) for folder in (*HOMES, *PASSING) if _inside(state, folder)]
        if hidden:
            raise LydianError(
                f"--state-dir {state} cannot be written by a system service, which sees nothing of {hidden[0]}",
                code="state_out_of_reach",
                advice=f"Leave it out ({place.states / unit}), or name a folder elsewhere, such as /srv/lydian.",
            )
        return state
    if named or os.environ.get("LYDIAN_STATE_DIR"):
        return Path.cwd() / Path(named[-1] if named else os.environ["LYDIAN_STATE_DIR"]).expanduser()
    if wish.side is Side.serve:
        return coordinator_folder()
    return worker_folder((given.values(options, "--name") or [machine_name()])[-1])


def _program() -> str:
    """The `lydian` of this Python environment, so that the service runs what this command belongs to.

    Raises:
        LydianError: no_program, it has none.
    """
    program = Path(sys.executable).parent / "lydian"
    if not program.is_file():
        raise LydianError(
            f"{program} does not exist, so a service could not start it",
            code="no_program",
            advice="Install the package into this Python environment: pip install . in a clone.",
        )
    return str(program)


def _parts_of_the_program() -> tuple[Path, ...]:
    """The folders without which it does not start: the environment, the Python it was made from, our packages."""
    return Path(sys.prefix), Path(sys.base_prefix), Path(__file__).resolve().parent


def _check_reach(options: list[str]) -> None:
    """Refuse data in folders for passing things, of which a system service has its own."""
    named = [value.partition("=")[2] for value in given.values(options, "--data")]
    for path in [*named, *given.values(options, "--allow")]:
        if any(_inside(Path(path), folder) for folder in PASSING):
            raise LydianError(
                f"a system service does not see {path}: it has a /tmp of its own",
                code="out_of_reach",
                advice="Put it elsewhere, such as /srv.",
            )


def _inside(path: Path, folder: Path) -> bool:
    return path.is_relative_to(folder)


# ---------------------------------------------------------------- checks


def _require_right(of_user: bool) -> None:
    if not of_user and os.geteuid() != 0:
        raise LydianError(
            "a system service is installed by root, and this is not root",
            code="needs_root",
            advice=f"sudo {_program()} install-service …, or leave --scope out for a service of this user.",
        )


def check_options(design: Design) -> None:
    """Have the program itself read the options, so that a service is not installed only to fail.

    Raises:
        LydianError: bad_options, with what it said; missing_packages, this environment cannot run it.
    """
    module = "server" if design.service.side is Side.serve else "worker"
    command = python_module(module, [*design.service.options, "--state-dir", design.service.state, "--version"])
    read = _ended(command)
    if read.returncode != 0:
        raise LydianError(
            f"`lydian {design.service.side.value}` does not take these options: {_error_line(read.stderr)}",
            code="bad_options",
            advice=f"`lydian {design.service.side.value} --help` lists them.",
        )


def _error_line(said: str) -> str:
    """What a program says is wrong: typer frames it."""
    lines = [line.strip(" │|").removeprefix("Error: ") for line in said.splitlines()]
    told = [line for line in lines if line and line[0] not in "╭╰" and not line.startswith(("Usage:", "Try "))]
    return " ".join(told) or "it said nothing"


def _unit_in_the_way(design: Design, *, replace: bool) -> str | None:
    """The text of the unit that is there, which this one may follow; None where there is none.

    Raises:
        LydianError: somebody else wrote it (foreign_unit), or another installation did (other_installation).
    """
    old = _read(design.unit_file)
    if old is None or replace:
        return old
    _require_ours(design.unit_file, old)
    program = program_line(old)[:1]
    if program != [design.service.program]:
        raise LydianError(
            f"{design.unit_file} is the service of another installation: {' '.join(program) or 'it runs nothing'}",
            code="other_installation",
            advice="--replace makes it this one's; --unit NAME installs a second one beside it.",
        )
    return old


def _require_ours(unit_file: Path, text: str) -> None:
    if not text.startswith(MARK):
        raise LydianError(
            f"{unit_file} was not written by `lydian install-service`, so it is left alone",
            code="foreign_unit",
            advice="--replace puts a new one in its place; --unit NAME takes another name.",
        )


def _token(design: Design, *, ask: bool) -> str | None:
    """The join token: from LYDIAN_TOKEN, from an earlier run, from a person, or from stdin. Never shown.

    Raises:
        LydianError: what was given is none (bad_token).
    """
    from_environment = os.environ.get("LYDIAN_TOKEN")
    if from_environment:
        return given.check_join_token(from_environment)
    kept = given.token_in(_read(design.settings_file) or "")
    if kept or not ask:
        return kept
    if sys.stdin.isatty():
        return given.check_join_token(str(typer.prompt("join token", hide_input=True, err=True)))
    typer.echo("reading the join token from stdin, since LYDIAN_TOKEN is not set", err=True)
    return given.check_join_token(sys.stdin.readline())


# ---------------------------------------------------------------- showing


def _show(design: Design, wish: Wish) -> None:
    unit, manager, service = design.service.unit, design.manager, design.service
    old = _read(design.unit_file)
    if service.user is not None and wish.user is None and not _user_exists(service.user):
        typer.echo(f"would make the system user {service.user}")
    if service.side is Side.work and not design.has_joined():
        typer.echo(f"would write {design.settings_file} (0600): the join token, until the worker has joined")
    if old == design.unit_text:
        typer.echo(f"unchanged: {design.unit_file}")
    elif old is not None:
        typer.echo(f"would change {design.unit_file} (0644):\n{_difference(old, design.unit_text)}")
    else:
        typer.echo(f"would write {design.unit_file} (0644):\n\n{design.unit_text}")
    commands: list[tuple[str, ...]] = [("daemon-reload",)] if old != design.unit_text else []
    if wish.enable:
        commands += [("enable", f"{unit}.service"), ("restart", f"{unit}.service")]
    for arguments in commands:
        typer.echo(f"would run {' '.join([*manager.words, *arguments])}")
    typer.echo(f"its state would be in {service.state}, its log in the journal: {manager.journal(unit)}")


def _difference(old: str, new: str) -> str:
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "as it is", "as it becomes", n=0, lineterm="")
    return "\n".join(f"    {line}" for line in lines)


# ---------------------------------------------------------------- doing


def have_user(service: Service, *, own: bool) -> None:
    """Have the user that the service runs as, and make sure that it reaches the program.

    Raises:
        LydianError: unknown_user, user_not_made, or program_out_of_reach.
    """
    name = service.user or ""
    if not _user_exists(name):
        if not own:
            raise LydianError(
                f"there is no user {name} on this machine",
                code="unknown_user",
                advice="Make it (useradd), or leave --user out: the service gets a user of its own.",
            )
        command = ["useradd", "--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin", name]
        try:
            made = _ended(command)
            why = f"exit code {made.returncode} {made.stderr.strip()}" if made.returncode else ""
        except FileNotFoundError as error:
            why = str(error)
        if why:
            raise LydianError(
                f"the system user {name} could not be made: {why}",
                code="user_not_made",
                advice="Make it by hand, then run the same command again.",
            )
        typer.echo(f"made the system user {name}", err=True)
    who = pwd.getpwnam(name)
    try:
        tried = _ended([service.program, "--version"], who)
        why = f"exit code {tried.returncode} {tried.stderr.strip()[-300:]}" if tried.returncode else ""
    except OSError as error:
        why = str(error)
    if why:
        raise LydianError(
            f"the user {name} cannot run {service.program}: {why}",
            code="program_out_of_reach",
            advice="Install into a folder that all may read (python3 -m venv /opt/lydian, and in a clone "
            "/opt/lydian/bin/pip install '.[server]'), or say with --user whose service it is.",
        )


def _ended(command: list[str], who: pwd.struct_passwd | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program that ends by itself, as this user or as `who`, in whose environment nothing of this one's is.

    Raises:
        LydianError: no_answer, it does not end.
        OSError: it cannot be started.
    """
    try:
        if who is None:
            return subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=ANSWER_S
            )
        return subprocess.run(
            command, user=who.pw_uid, group=who.pw_gid, extra_groups=[], cwd="/",
            env={"PATH": os.defpath, "HOME": "/"}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False, timeout=ANSWER_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise LydianError(
            f"`{command[0]}` did not end in {ANSWER_S:g} s",
            code="no_answer",
            advice="Is this machine very busy, or a disk slow? Run the same command again.",
        ) from error


def _user_exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _write(design: Design, old: str | None, token: str | None) -> bool:
    """Write both files where they differ, and have systemd read the unit. Whether something changed."""
    settings = _read(design.settings_file)
    wanted = given.settings_with(settings or "", token)
    changed = False
    if token is not None and settings != wanted:
        write_file(design.settings_file, wanted, mode=0o600)
        typer.echo(f"wrote {design.settings_file} (0600): the join token, until the worker has joined", err=True)
        changed = True
    if design.service.user is not None and not design.service.state.startswith("/var/lib/"):
        _make_state(design)
    if old == design.unit_text:
        typer.echo(f"unchanged: {design.unit_file}", err=True)
        return changed
    write_file(design.unit_file, design.unit_text, mode=0o644)
    if old is None:
        typer.echo(f"wrote {design.unit_file}", err=True)
    else:
        typer.echo(f"changed {design.unit_file}:\n{_difference(old, design.unit_text)}", err=True)
    design.manager.do("daemon-reload")
    return True


def _make_state(design: Design) -> None:
    who = pwd.getpwnam(design.service.user or "")
    with _writable(design.state):
        if not design.state.exists():
            design.state.mkdir(mode=0o700, parents=True)
            os.chown(design.state, who.pw_uid, who.pw_gid)


def write_file(path: Path, text: str, *, mode: int) -> None:
    """Write a file that is there whole or not at all, and at no moment open to more than `mode` allows.

    Raises:
        LydianError: not_writable.
    """
    part = path.with_name(f".{path.name}.part")
    with _writable(path):
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        part.unlink(missing_ok=True)  # of a run that was killed in here
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), mode)
        part.replace(path)


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LydianError(
            f"{path} cannot be written: {error.strerror or error}",
            code="not_writable",
            advice="Give this user the right to, make room, or run this as the user that may.",
        ) from error


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise LydianError(
            f"{path} cannot be read: {error.strerror or error}",
            code="not_readable",
            advice="Is it another user's? Run this as that one.",
        ) from error


# ---------------------------------------------------------------- starting


def _start(design: Design, *, changed: bool, token: str | None) -> None:
    unit, manager = design.service.unit, design.manager
    if not manager.is_enabled(unit):
        manager.do("enable", f"{unit}.service")
        typer.echo(f"enabled {unit}: it starts by itself from now on", err=True)
    if not changed and manager.state(unit).active == "active":
        typer.echo(f"unchanged: {unit} runs", err=True)
    else:
        _restart(design)
    if design.service.side is Side.serve:
        _say_how_to_join(design)
    elif token is not None:
        _wait_for_the_worker(design)
    typer.echo(f"its log: {manager.journal(unit)}\nits state: {design.service.state}", err=True)
    if design.manager.of_user and not manager.lingers():
        typer.echo("It runs while this user is logged in; `loginctl enable-linger` lets it run from boot on.", err=True)


def _restart(design: Design) -> None:
    """Start it anew and wait until it is up, as long as stopping the old one and loading may take."""
    unit, serves = design.service.unit, design.service.side is Side.serve
    limit_s = design.wait_s + (SERVE_STOP_S if serves else design.service.grace_s + STOP_ROOM_S)
    goal = "listens" if serves else "is started"
    typer.echo(f"waiting until {unit} {goal}, at most {limit_s:g} s", err=True)
    if design.manager.restart(unit, limit_s):
        typer.echo(f"{unit} runs", err=True)
    else:
        state = design.manager.state(unit)
        typer.echo(f"{unit} is {state} after {limit_s:g} s and goes on by itself", err=True)


def _say_how_to_join(design: Design) -> None:
    token_file = design.state / "join.token"
    as_root = "" if design.manager.of_user else "sudo "
    typer.echo(
        f"its address and the line for the machines that train: {design.manager.journal(design.service.unit)} -n 20\n"
        f"the join token alone: {as_root}cat {token_file}; the admin token is beside it, in admin.token",
        err=True,
    )


def _wait_for_the_worker(design: Design) -> None:
    """Wait until the worker has joined, then let the token go, which has done its work.

    Raises:
        LydianError: service_failed, it ended instead.
    """
    unit, manager = design.service.unit, design.manager
    typer.echo(f"waiting until it has joined {design.url}, at most {design.wait_s:g} s", err=True)
    state = wait_until(design.has_joined, lambda: manager.state(unit), limit_s=design.wait_s)
    if state is None:
        rest = given.settings_with(_read(design.settings_file) or "", None)
        if rest:
            write_file(design.settings_file, rest, mode=0o600)
        else:
            design.settings_file.unlink(missing_ok=True)
        typer.echo(f"it has joined; its token is used and gone from {design.settings_file}", err=True)
    elif state.down:
        raise manager.failure(unit, f"{unit} ended with exit code {state.exit_code}; it is {state}")
    else:
        typer.echo(
            f"it runs and has not joined yet: does the coordinator at {design.url} run, and is it reachable from here? "
            "It keeps trying. Its log ends with:\n" + manager.last_words(unit),
            err=True,
        )


# ---------------------------------------------------------------- removing


def uninstall(wish: Wish) -> None:
    """Stop and remove a service. The state folder and a user that was made stay, and it is said how they go.

    Raises:
        LydianError: the unit is somebody else's (foreign_unit), or systemd or the disk refuse.
    """
    place, manager = Place.of(of_user=wish.of_user), Manager(wish.of_user)
    unit = wish.unit or wish.side.default_unit
    check_name(unit)
    unit_file = place.units / f"{unit}.service"
    settings = place.settings / f"{unit.removeprefix('lydian-')}.env"
    if not wish.dry_run:
        _require_right(wish.of_user)
    text = _read(unit_file)
    if text is None:
        typer.echo(f"nothing to remove: there is no {unit_file}", err=True)
        return
    if not wish.replace:
        _require_ours(unit_file, text)
    files = f"{unit_file} and {settings}" if settings.exists() else str(unit_file)
    if wish.dry_run:
        typer.echo(f"would run {' '.join(manager.words)} disable --now {unit}.service\nwould remove {files}")
    else:
        manager.require()
        typer.echo(f"stopping {unit}; a worker finishes what it does or hands it back first", err=True)
        manager.do("disable", "--now", f"{unit}.service", limit_s=_longest_stop(text))
        with _writable(unit_file):
            unit_file.unlink(missing_ok=True)
            settings.unlink(missing_ok=True)
        manager.do("daemon-reload")
        typer.echo(f"removed {files}", err=True)
    _say_what_stays(text, unit)


def _longest_stop(text: str) -> float:
    stops = [line.partition("=")[2] for line in text.splitlines() if line.startswith("TimeoutStopSec=")]
    return ANSWER_S + (float(stops[-1]) if stops and stops[-1].isdecimal() else 0)


def _say_what_stays(text: str, unit: str) -> None:
    for state in given.values(program_line(text)[1:], "--state-dir"):
        typer.echo(f"what it knows stays in {state}; remove that folder if you never want it back", err=True)
    if f"User={unit}" in text.splitlines() and _user_exists(unit):
        typer.echo(f"the user {unit} stays; `userdel {unit}` removes it", err=True)
