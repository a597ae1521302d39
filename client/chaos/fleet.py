"""The fleet that is broken on purpose: one coordinator, its workers behind a proxy, and what can be done to them.

    worker-1 ─┐
    worker-2 ─┤──▶ proxy ──▶ coordinator, always on the same port and in the same folder
    …         ─┘                  ▲
                      the ledgers ┘  (not through the proxy: a watcher is not what is tested)

Whoever ends without having been killed here is started again, and that is remembered: it breaks a promise. Processes
are started in the main thread alone: the kernel ends them with the thread that started them.
"""

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from client import shown
from client.chaos.clocks import Clock
from client.chaos.proxy import Fault, Proxy, Way
from client.running import Child, Children, python_module, wait_for_line
from common.api import CoordinatorApi
from common.errors import LydianError, UnavailableError

COORDINATOR = "coordinator"
READY_S = 90.0  # for a coordinator to listen and for workers to come, on a machine that is busy
TICK_S = 0.02  # between two looks at a condition
ASK_S = 0.2  # between two questions to the coordinator
BULK = 8 << 10  # bytes that come at once in the middle of a model or an update, and never in a message
PORTS = range(15_000, 30_000)  # below those that systems give to outgoing connections, which could take it meanwhile
CHECKPOINT_EVERY_S = 0.05
RESERVE = 4 << 20  # bytes; the journal's room on a small disk

Say = Callable[[str], None]


class AimedWay(Way):
    """A direction of the proxy whose next fault can be aimed at the middle of a large body."""

    least = 0  # bytes that must come at once

    def take(self, carried: int, coming: int) -> Fault | None:
        """The fault that strikes now: in the middle of what comes, or none."""
        if coming < self.least:
            return None
        fault = super().take(carried, coming)
        return None if fault is None else Fault(fault.kind, carried + coming // 2)


@dataclass(frozen=True)
class Ended:
    """A part that ended without having been killed here."""

    name: str
    code: int  # negative: the number of the signal that ended it
    tail: str  # the end of its log


@dataclass
class Fleet:
    """A coordinator and its workers, as a context manager. `start` starts them."""

    children: Children
    state: Path  # the coordinator's folder
    workers: int
    lease_s: float
    idle_s: float  # that a body may stand still
    trust_any: bool  # the task is a file
    faketime: Path | None  # the library under all clocks; None: they are the machine's
    environment: Mapping[str, str]  # of every process, without our settings
    say: Say
    ended: list[Ended] = field(default_factory=list)  # what must not be in here

    def __post_init__(self) -> None:
        self.port = _free_port()
        self.proxy = Proxy("127.0.0.1", self.port)
        self.up, self.down = AimedWay(), AimedWay()
        self.proxy.up, self.proxy.down = self.up, self.down
        self._members: dict[str, Child] = {}  # those that should run
        self._starts: dict[str, int] = {}
        self._back_at: dict[str, float] = {}  # workers that were started again -> when
        self._never = threading.Event()
        self._api: CoordinatorApi | None = None

    def __enter__(self) -> Self:
        self.proxy.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.children.stop()
        self.children.started.clear()  # reaped: their numbers may be strangers' soon
        self.proxy.__exit__(kind, error, at)
        if self._api is not None:
            self._api.close()

    # ------------------------------------------------------------ what there is

    @property
    def names(self) -> list[str]:
        """The workers."""
        return [worker_name(number) for number in range(1, self.workers + 1)]

    @property
    def url(self) -> str:
        """The coordinator's address, without the proxy."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def api(self) -> CoordinatorApi:
        """The coordinator, as its admin calls it."""
        if self._api is None:
            self._api = self.new_api()
        return self._api

    def new_api(self) -> CoordinatorApi:
        """One more, to be closed by the caller."""
        return CoordinatorApi(self.url, (self.state / "admin.token").read_text(encoding="utf-8").strip())

    def clock(self, name: str) -> Clock | None:
        """The clock of one machine, where clocks can jump."""
        return Clock(self.faketime, self.children.folder / f"clock-{name}") if self.faketime else None

    def logs(self) -> Iterator[tuple[str, str]]:
        """(file, its last lines) of every part that runs."""
        for child in self._members.values():
            yield child.log.name, child.tail()

    # ------------------------------------------------------------ starting

    def start(self) -> None:
        """Start all, and wait until every worker waits for work."""
        self.start_coordinator()
        for name in self.names:
            self._start_worker(name)
        if not self.wait(lambda: self._at_work() == self.workers, READY_S, every_s=ASK_S):
            raise LydianError(
                f"{self._at_work()} of {shown.several(self.workers, 'worker')} came within {READY_S:.0f} s",
                code="not_ready",
                advice="Their logs say why; fewer --workers start faster.",
            )

    def _at_work(self) -> int:
        with contextlib.suppress(UnavailableError):
            return sum(worker.state == "idle" and worker.last_seen_s == 0 for worker in self.api.workers())
        return 0

    def start_coordinator(self) -> None:
        """Start the coordinator on its port and its folder, and wait until it listens."""
        wait_for_line(self._start_coordinator(""), "ready ", timeout_s=READY_S)

    def _start_coordinator(self, failpoint: str) -> Child:
        arguments = ["--host", "127.0.0.1", "--port", str(self.port), "--state-dir", str(self.state)]
        settings = {
            "LYDIAN_TTL_S": str(self.lease_s),
            "LYDIAN_HEARTBEAT_S": str(self.lease_s / 8),
            "LYDIAN_BODY_IDLE_S": str(self.idle_s),
            "LYDIAN_RESERVE_BYTES": str(RESERVE),
        }
        if failpoint:
            settings["LYDIAN_FAILPOINT"] = failpoint
        child = self._start(COORDINATOR, python_module("server", arguments), settings)
        self.children.started.insert(0, self.children.started.pop())  # ended last, since all need it
        return child

    def start_worker(self, name: str) -> None:
        """Start a worker again, in its folder."""
        self._start_worker(name)
        self._back_at[name] = time.monotonic()

    def _start_worker(self, name: str) -> None:
        address = f"http://127.0.0.1:{self.proxy.port}"
        folder = str(self.children.folder / name)
        arguments = [address, "--name", name, "--state-dir", folder, "--threads", "1", "--device", "cpu"]
        arguments += ["--checkpoint-every", str(CHECKPOINT_EVERY_S), "--grace", "1"]
        if self.trust_any:  # the file is the user's own or ours, and so is the machine
            arguments += ["--trust", "any"]
        token = (self.state / "join.token").read_text(encoding="utf-8").strip()
        self._start(name, python_module("worker", arguments), {"LYDIAN_TOKEN": token})

    def _start(self, name: str, command: list[str], settings: Mapping[str, str]) -> Child:
        self._starts[name] = self._starts.get(name, 0) + 1
        clock = self.clock(name)
        if clock is not None and not clock.file.exists():
            clock.set(0)
        environment = {**self.environment, **(clock.environment() if clock else {}), **settings}
        child = self.children.start(f"{name}.{self._starts[name]}", command, environment)
        self._members[name] = child
        return child

    # ------------------------------------------------------------ breaking

    def kill(self, *names: str) -> None:
        """SIGKILL, all at once, and wait for their ends. What a worker trained with dies with it."""
        doomed = [self._members.pop(name) for name in names if name in self._members]
        for child in doomed:
            child.process.kill()
        for child in doomed:
            self._bury(child)

    def _bury(self, child: Child) -> None:
        """Reap a process and its group. Its number may be a stranger's later: it is forgotten here."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)
        child.process.wait()
        self.children.started.remove(child)

    @contextlib.contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """Inside, a machine stands still: the process and all that it has started."""
        import psutil  # type: ignore[import-untyped] # of the coordinator's and the workers' packages, not of the client's

        agent = psutil.Process(self._members[name].process.pid)
        stopped: list[psutil.Process] = []
        try:
            for process in (agent, *agent.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()
                    stopped.append(process)
            yield
        finally:
            for process in reversed(stopped):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    def kill_at(self, failpoint: str, give_up: Callable[[], bool], timeout_s: float) -> bool:
        """Put a coordinator into the place of the present one that kills itself at a point. None runs afterwards.

        Args:
            failpoint: NAME:TIMES, as the coordinator's environment says it.
            give_up: whether it will never come there.
            timeout_s: the longest that is waited for it.

        Returns:
            whether it has died there.
        """
        self.kill(COORDINATOR)
        child = self._start_coordinator(failpoint)
        del self._members[COORDINATOR]  # its end is no surprise, unless it is another one
        self.wait(lambda: child.ended or give_up(), timeout_s)
        there = child.ended
        if there and child.process.returncode != -signal.SIGKILL:
            self._remember(COORDINATOR, child)
            there = False
        child.process.kill()
        self._bury(child)
        return there

    # ------------------------------------------------------------ waiting

    def wait(self, look: Callable[[], bool], timeout_s: float, *, every_s: float = TICK_S) -> bool:
        """Wait for a condition, and see meanwhile to those that end by themselves. Whether it came true in time."""
        until = time.monotonic() + timeout_s
        while not look():
            if time.monotonic() > until:
                return False
            self.check()
            self._never.wait(every_s)
        return True

    def pause(self, seconds: float) -> None:
        """Let a time pass, as `wait` does."""
        self.wait(lambda: False, seconds)

    def check(self) -> None:
        """Start again who ended by itself, and remember it."""
        for name, child in list(self._members.items()):
            if not child.ended:
                continue
            self._remember(name, child)
            del self._members[name]
            self._bury(child)
            if name == COORDINATOR:
                self.start_coordinator()
            else:
                self.start_worker(name)

    def _remember(self, name: str, child: Child) -> None:
        self.ended.append(Ended(name, child.process.returncode, child.tail()))
        self.say(f"{name} ended by itself with {child.process.returncode}:\n{shown.printable(child.tail())}")

    def everybody_is_back(self) -> bool:
        """Whether the coordinator has heard of every worker since that was started."""
        if not self._back_at:
            return True
        with contextlib.suppress(UnavailableError):
            now = time.monotonic()
            heard = {worker.name: now - worker.last_seen_s for worker in self.api.workers()}
            self._back_at = {name: at for name, at in self._back_at.items() if heard.get(name, -1.0) < at}
        return not self._back_at


def worker_name(number: int) -> str:
    """The name of a worker, by its number from 1."""
    return f"worker-{number}"


def _free_port() -> int:
    """A port that nobody listens on."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise LydianError(
        f"none of 100 ports between {PORTS[0]} and {PORTS[-1]} is free", code="no_port", advice="Try again."
    )
