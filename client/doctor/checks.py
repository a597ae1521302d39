"""The doctor's round: a table of checks, each of which asks and judges; and what is printed of it.

A check that may wait says on stderr for what, and how long at most. One that rests on another that failed is left out.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import platformdirs
import psutil  # type: ignore[import-untyped]
import typer

from client import shown
from client.calling import DEFAULT_URL, insecure_allowed, local_admin_token, pin_for, whole_url
from client.doctor import asking, judging
from client.doctor.findings import COLOURS, Finding, Side, exit_code, lines, summary
from common import PROTOCOL, __version__, fitness
from common.api import CoordinatorApi
from common.errors import LydianError
from common.guarding import REFUSALS
from common.link import BUDGET_S
from common.messages import Link, MachineProbe, VersionView
from common.networks import is_tailnet
from common.tailscale import SOCKET, tailscale_status


@dataclass(frozen=True)
class Wish:
    """What was typed."""

    url: str | None = None  # None: no coordinator was named
    token: str | None = None
    state_dir: Path | None = None
    device: str = "auto"
    sides: frozenset[str] = frozenset()  # empty: all
    tailscaled: Path = SOCKET


class Examined:
    """What several checks need, asked once. A context manager: inside, the coordinator may be called."""

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        url = wish.url or DEFAULT_URL
        encrypted = pin_for(wish.token or local_admin_token(whole_url(url))) is not None
        self.place = asking.Place(whole_url(url, encrypted=encrypted))
        self.addresses: list[str] = []
        self.held: set[str] = set()  # names of the steps on the way to the coordinator that held
        self.link: Link | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.close()

    @property
    def folder(self) -> Path:
        """The state folder, or the one that holds those of all parts."""
        return self.wish.state_dir or Path(platformdirs.user_state_dir("lydian"))

    @cached_property
    def token(self) -> tuple[str, str] | None:
        """The token for the calls, and where it was found; None: there is none."""
        if self.wish.token:
            return self.wish.token.strip(), "that was given"
        if admin := local_admin_token(self.place.url):
            return admin, "of the coordinator's state folder"
        workers = sorted((self.folder / "workers").glob("*"))
        found = asking.worker_credential([self.folder, *workers], self.place)
        return (found[0], f"in {found[1]}") if found else None

    @cached_property
    def api(self) -> CoordinatorApi:
        """The coordinator, called with that token."""
        token = self.token[0] if self.token else None
        insecure = insecure_allowed()
        return self._open.enter_context(
            CoordinatorApi(self.place.url, token, pin=pin_for(token), insecure=insecure, timeout_s=asking.CALL_S)
        )

    @cached_property
    def requirements(self) -> list[judging.Requirement]:
        """What the project asks for."""
        return asking.requirements()

    @cached_property
    def installed(self) -> dict[str, str | None]:
        """What there is of it."""
        return asking.installed({one.name for one in self.requirements})

    @cached_property
    def probe(self) -> MachineProbe:
        """The GPUs, and what a training process says."""
        return asking.probe(self.wish.device)


@dataclass(frozen=True)
class Check:
    """One question. `after` names the step on the way to the coordinator that it rests on."""

    side: Side
    name: str
    look: Callable[[Examined], Iterable[Finding]]
    waits: str = ""
    after: str = ""


# ---------------------------------------------------------------- this machine


def _python(_: Examined) -> Iterator[Finding]:
    version = sys.version_info
    yield judging.python(version[:2], ".".join(map(str, version[:3])), sys.executable, __version__)


def _packages(examined: Examined) -> Iterator[Finding]:
    yield judging.packages(examined.requirements, examined.installed, "", "requirements_server.txt")
    if examined.installed.get("fastapi") is not None:
        yield judging.packages(examined.requirements, examined.installed, "server", "requirements_server.txt")


def _memory(_: Examined) -> Iterator[Finding]:
    found = psutil.virtual_memory()
    yield judging.memory(int(found.total), int(found.available))


def _disk(examined: Examined) -> Iterator[Finding]:
    try:
        tried = asking.try_disk(examined.folder)
    except OSError as error:
        yield judging.no_disk(str(examined.folder), error.strerror or str(error))
        return
    yield judging.disk(tried.folder, tried.free, tried.fsync_s)


# ---------------------------------------------------------------- training here


def _training(examined: Examined) -> Iterator[Finding]:
    """The packages, the cards, and a kernel: on the device asked for, and on the one chosen where that is another."""
    probe, device = examined.probe, examined.wish.device
    if examined.installed.get("torch") is not None:
        file = fitness.file_for(probe.inventory.gpus)
        extra = judging.training_set(examined.requirements, examined.installed, file)
        named = judging.FILES_OF_TRAINING[extra]
        yield judging.packages(examined.requirements, examined.installed, extra, named)
    choice = judging.chosen(probe, device, os.environ)
    if choice is None:
        python = (sys.version_info[0], sys.version_info[1])
        yield from judging.no_build(probe, has_torch=asking.has_module("torch"), python=python)
        return
    moved = bool(probe.failure) and choice.device not in (None, device)
    tried = asking.probe(choice.device or device) if moved else probe
    yield from judging.training(probe, device, choice, tried)


# ---------------------------------------------------------------- the coordinator


def _connection(examined: Examined) -> Iterator[Finding]:
    """Its name and its port; through a proxy, which asks for both by itself, neither is tried."""
    place = examined.place
    if place.proxy is not None:
        examined.held.add("connection")
        yield _ok("connection", f"calls to {place.url} go through the proxy {place.proxy}")
        return
    try:
        examined.addresses = asking.resolve(place)
    except OSError as error:
        yield judging.no_address(place.host, error.strerror or str(error))
        return
    try:
        asking.connect(place)
    except OSError as error:
        refused = isinstance(error, ConnectionRefusedError)
        if examined.wish.url is None and refused:
            yield judging.nobody_named(place.url)
        else:
            yield judging.no_connection(place.url, error.strerror or str(error), refused=refused)
        return
    examined.held.add("connection")
    yield _ok("connection", f"{place.host} is {', '.join(examined.addresses)}, and port {place.port} takes connections")


def _version(examined: Examined) -> Iterator[Finding]:
    try:
        theirs = examined.api.version()
    except LydianError as error:
        told = str(error) if error.code in REFUSALS else f"what is at {examined.place.url} is no coordinator: {error}"
        yield _failure("version", told, error.advice)
        return
    examined.held.add("version")
    yield judging.version(theirs, VersionView(version=__version__, protocol=PROTOCOL))


def _clock(examined: Examined) -> Iterator[Finding]:
    theirs = examined.api.wall_clock()
    if theirs is not None:
        yield judging.clock((datetime.now(UTC) - theirs).total_seconds())


def _token(examined: Examined) -> Iterator[Finding]:
    found = examined.token
    if found is None:
        yield judging.token(None, "", None)
        return
    answer: LydianError | None = None
    try:
        examined.api.jobs()
    except LydianError as error:
        answer = error
    finding = judging.token(*found, answer)
    if finding.verdict == "ok":
        examined.held.add("token")
    yield finding


def _line(examined: Examined) -> Iterator[Finding]:
    mtu = asking.path_mtu(examined.place) if examined.place.proxy is None else None
    try:
        examined.link = examined.api.measure_link()
    except LydianError as error:
        if error.code == "unreachable":
            yield judging.stalled(examined.place.url, error, mtu)
        else:
            yield _warning("line", f"the line was not measured: {error}", error.advice)
        return
    yield judging.line(examined.link)
    if mtu is not None:
        yield judging.mtu(mtu)
    control = asking.congestion_control()
    if control is not None and (hint := judging.congestion(examined.link, control)):
        yield hint


# ---------------------------------------------------------------- the tailnet


def _tailnet(examined: Examined) -> Iterator[Finding]:
    status, why_none = tailscale_status(examined.wish.tailscaled, patience_s=0.0, peers=True)
    yield from judging.tailnet(status, why_none, now=datetime.now(UTC), needed=_is_tailnet(examined))
    for peer in status.peers if status is not None else ():
        shared = [address for address in (*examined.addresses, examined.place.host) if address in peer.addresses]
        if shared:
            yield judging.path(shared[0], peer)


def _is_tailnet(examined: Examined) -> bool:
    """Whether the coordinator that was named has an address of a tailnet."""
    if examined.wish.url is None:
        return False
    host = examined.place.host
    if host.endswith(".ts.net"):
        return True
    return any(is_tailnet(each) for each in (*examined.addresses, host))


# ---------------------------------------------------------------- the table


CHECKS = (
    Check("machine", "python", _python),
    Check("machine", "packages", _packages),
    Check("machine", "memory", _memory),
    Check("machine", "disk", _disk),
    Check(
        "training",
        "training",
        _training,
        f"a training process to load torch and run a kernel: {asking.PROBE_S:g} s at most",
    ),
    Check(
        "coordinator",
        "connection",
        _connection,
        f"a connection to the coordinator: {asking.NAME_S + asking.CONNECT_S:g} s at most",
    ),
    Check("coordinator", "version", _version, after="connection"),
    Check("coordinator", "clock", _clock, after="version"),
    Check("coordinator", "token", _token, after="version"),
    Check(
        "coordinator",
        "line",
        _line,
        f"the line to be measured: {2 * BUDGET_S:g} s, longer if it is slow",
        after="token",
    ),
    Check("tailnet", "tailscale", _tailnet),
)


def examine(wish: Wish, say: Callable[[str], None]) -> list[Finding]:
    """Make the round.

    Args:
        wish: what was typed.
        say: is told what is waited for.
    """
    found = list[Finding]()
    with Examined(wish) as examined:
        for check in CHECKS:
            if (wish.sides and check.side not in wish.sides) or (check.after and check.after not in examined.held):
                continue
            if check.waits:
                say(f"waiting for {check.waits}")
            try:
                found += check.look(examined)
            except LydianError as error:
                found.append(
                    Finding(side=check.side, check=check.name, verdict="failure", sentence=str(error), fix=error.advice)
                )
    return found


def run_doctor(wish: Wish, *, as_json: bool) -> int:
    """Make the round, and print what came out.

    Returns:
        The exit code: 1 where anything failed.
    """
    found = examine(wish, lambda sentence: typer.echo(sentence, err=True))
    if as_json:
        typer.echo(json.dumps([finding.model_dump() for finding in found], indent=1))
    else:
        _print(found)
    typer.echo(summary(found), err=True)
    return exit_code(found)


def _print(found: list[Finding]) -> None:
    """The lines, with verdicts in colour on a terminal."""
    coloured = shown.fancy()
    for line in lines(found, lambda text, verdict: typer.style(text, fg=COLOURS[verdict]) if coloured else text):
        typer.echo(line, color=coloured)


def _ok(check: str, sentence: str) -> Finding:
    return Finding(side="coordinator", check=check, verdict="ok", sentence=sentence)


def _warning(check: str, sentence: str, fix: str) -> Finding:
    return Finding(side="coordinator", check=check, verdict="warning", sentence=sentence, fix=fix)


def _failure(check: str, sentence: str, fix: str) -> Finding:
    return Finding(side="coordinator", check=check, verdict="failure", sentence=sentence, fix=fix)
