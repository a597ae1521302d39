"""A real fleet on loopback for acceptance tests: processes that are started, killed, and always ended.

Waits are conditions with a bound, never a fixed sleep; what is awaited is in the message when the bound passes.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Self, TypeVar

import psutil  # type: ignore[import-untyped]

from common.api import CoordinatorApi
from common.errors import JobOverError, UnavailableError
from common.messages import OVER, JobRequest, JobSpec, JobView
from tests.acceptance import forks

T = TypeVar("T")

PATIENCE_S = 150.0  # a bound for a busy machine; nothing is asserted about it


def _end_once(number: int, frame: FrameType | None) -> None:
    """SIGTERM is as Ctrl-C: what a test has made is undone. Once, since timeout(1) sends it twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


signal.signal(signal.SIGTERM, _end_once)


def wait_for(what: str, look: Callable[[], T | None], patience_s: float = PATIENCE_S) -> T:
    """What `look` returns once it is true."""
    until = time.monotonic() + patience_s
    while (began := time.monotonic()) < until:
        if found := look():
            return found
        time.sleep(min(max(0.02, 5 * (time.monotonic() - began)), 0.3))  # a call is looked at less often than a file
    raise AssertionError(f"waited {patience_s:.0f} s for {what}")


def free_port() -> int:
    """Below those that systems give to whoever asks for any, who could take it while its coordinator is away."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):  # it is taken
            probe.bind(("127.0.0.1", port))
            return port


def size(small: int, full: int) -> int:
    """How often a fault is injected: a slice by default, the whole number with LYDIAN_FAULTS=full."""
    return full if os.environ.get("LYDIAN_FAULTS") == "full" else small


class Process:
    """One process of the fleet, its output in a file; forked where that shows nowhere (tests.acceptance.forks)."""

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        environment: dict[str, str],
        python: str = sys.executable,
        cwd: Path | None = None,
        *,
        anew: bool = False,
    ) -> None:
        """Start it.

        Args:
            arguments: of Python.
            log: what it says is appended here.
            environment: beside the test's own, without what is the product's in that.
            python: what runs it.
            cwd: where; None: where the test runs.
            anew: its command line, its first environment or its memory matter: nothing of it is loaded already.
        """
        self.log = log
        self.before = len(self.said()) if log.exists() else 0  # characters that an earlier process has said there
        base = {k: v for k, v in os.environ.items() if not k.startswith("LYDIAN_")}
        given = {**base, **environment}
        log.touch()
        forked = None if anew or python != sys.executable else forks.start(arguments, given, log, log, cwd)
        self.popen = forked or self._started([python, *arguments], given, cwd)

    def _started(self, command: list[str], environment: dict[str, str], cwd: Path | None) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment, cwd=cwd)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def kill_all(self) -> None:
        """SIGKILL for it and all that it started, as when its machine dies; returns when none of them runs."""
        started = psutil.Process(self.popen.pid).children(recursive=True) if self.popen.poll() is None else []
        self.kill()
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        wait_for(f"what {self.log.stem} started to end", lambda: not any(map(_runs, started)))

    def terminate(self) -> int:
        """SIGTERM, and the exit code."""
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(PATIENCE_S)


class LocalFleet:
    """A coordinator and workers in a folder. Use as a context manager: nothing outlives it."""

    _truths: ClassVar[dict[str, str]] = {}

    def __init__(
        self, folder: Path, *, ttl_s: float = 40.0, host: str = "127.0.0.1", anew: bool = False, **settings: str
    ) -> None:
        self.folder, self.host, self.port = folder, host, free_port()
        self.anew = anew or host != "127.0.0.1"  # each machine of a played network is a place of its own
        self.state = folder / "state"
        self.environment = {"LYDIAN_TTL_S": str(ttl_s), "LYDIAN_HEARTBEAT_S": str(ttl_s / 8)}
        self.environment |= {"LYDIAN_RESERVE_BYTES": str(4 << 20), **settings}
        self.coordinator: Process | None = None
        self.workers: dict[str, Process] = {}
        self.folders: dict[str, Path] = {}  # of workers whose state lies elsewhere
        self._options: dict[str, tuple[str, ...]] = {}
        self._starts = 0

    @property
    def url(self) -> str:
        return f"{'https' if self.environment.get('LYDIAN_TLS') else 'http'}://{self.host}:{self.port}"

    def __enter__(self) -> Self:
        try:
            self.start_coordinator()
        except BaseException:
            self.__exit__(None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for process in [*self.workers.values(), *([self.coordinator] if self.coordinator else [])]:
            process.kill_all()
            if kind is not None:
                sys.stderr.write(f"--- {process.log.name}\n{process.said()[-3000:]}\n")
        if hasattr(self, "_api"):
            self._api.close()

    def start_coordinator(self) -> Process:
        self._starts += 1
        arguments = ["-m", "server", "--host", self.host, "--port", str(self.port), "--state-dir", str(self.state)]
        process = Process(arguments, self.folder / f"coordinator-{self._starts}.log", self.environment, anew=self.anew)
        self.coordinator = process
        wait_for("the coordinator to listen", lambda: f"ready {self.url}" in process.said() or _raise_if_dead(process))
        return process

    def start_worker(self, name: str, *arguments: str, python: Path = Path(sys.executable)) -> Process:
        token = (self.state / "join.token").read_text().strip()
        common = ("--threads", "1", "--device", "cpu")
        folder = self.folders.get(name, self.folder / name)
        arguments = self._options[name] = arguments or self._options.get(name, ())  # as it was started before
        process = Process(
            ["-m", "worker", self.url, "--name", name, "--state-dir", str(folder), *common, *arguments],
            self.folder / f"{name}.log",
            {"LYDIAN_TOKEN": token},
            str(python),
            anew=self.anew,
        )
        self.workers[name] = process
        return process

    def start_workers(self, count: int, *arguments: str) -> None:
        """Start workers w1 … and wait until all of them poll."""
        for number in range(1, count + 1):
            self.start_worker(f"w{number}", *arguments)
        self.await_workers(count)

    @contextlib.contextmanager
    def mended(self, names: Sequence[str], *arguments: str) -> Iterator[Self]:
        """This fleet with these workers, and no others, waiting for work, whatever was done to it before.

        A job that is still open at the end is cancelled then: it would take the processor from the tests to come.
        """
        if self.coordinator is None or self.coordinator.popen.poll() is not None:
            self.start_coordinator()
        self._cancel_all()
        for name in [name for name in self.workers if name not in names]:
            self.workers.pop(name).terminate()  # so that it is known to be gone
        for name in names:
            if name not in self.workers or self.workers[name].popen.poll() is not None:
                self.start_worker(name, *arguments)
        self.await_workers(len(names))
        yield self
        if self.coordinator.popen.poll() is None:
            self._cancel_all()

    def _cancel_all(self) -> None:
        for job in self.api.jobs():
            if job.state not in OVER:
                with contextlib.suppress(JobOverError):  # by now
                    self.api.cancel(job.id)

    def await_workers(self, count: int) -> None:
        def there() -> bool:
            for process in self.workers.values():
                _raise_if_dead(process)
                if f" at {self.url}" not in process.said()[process.before :]:  # it is known there, and has kept that
                    return False
            waiting = (w.name for w in self.api.workers() if w.state == "idle" and w.last_seen_s == 0)
            return len(self.workers.keys() & set(waiting)) >= count  # one that was killed is shown waiting for a while

        wait_for(f"{count} workers to wait for work", there)

    @property
    def admin_token(self) -> str:
        return (self.state / "admin.token").read_text().strip()

    @property
    def api(self) -> CoordinatorApi:
        if not hasattr(self, "_api"):
            self._api = CoordinatorApi(self.url, self.admin_token)
        return self._api

    # ------------------------------------------------------------ jobs

    def submit(self, task_file: Path | None = None, **spec: Any) -> str:
        source = task_file.read_text() if task_file else None
        if task_file is not None:
            spec.setdefault("task", task_file.stem)
        request = JobRequest(
            spec=JobSpec.model_validate({"task": "digits", **spec}), task_source=source, key=os.urandom(8).hex()
        )
        return self.api.submit_job(request).id

    def truth(self, task_file: Path | None = None, **spec: Any) -> str:
        """The SHA-256 of the last model of a job that nothing disturbs.

        Trained once a session: that it is the same in every fleet of a machine is what the tests of faults rest on.
        """
        key = json.dumps([str(task_file), spec], sort_keys=True)
        if key not in self._truths:
            model = self.finish(self.submit(task_file, **spec)).model
            assert model is not None
            self._truths[key] = model.digest
        return self._truths[key]

    def facts(self, job: str) -> list[dict[str, Any]]:
        """Every fact of a job that has ended, or will: waits for its end."""
        return [event for event in self.api.events(job) if "id" in event]

    def finish(self, job: str, state: str = "finished") -> JobView:
        view = wait_for(f"{job} to end", lambda: self._over(job))
        assert view.state == state, view.reason
        return view

    def _over(self, job: str) -> JobView | None:
        with contextlib.suppress(UnavailableError):  # the test killed it, and starts it again
            view = self.api.job(job)
            return view if view.state in OVER else None
        return None

    def await_event(self, job: str, wanted: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """The first event (facts and `now`) that is wanted."""
        for event in self.api.events(job):
            if wanted(event):
                return event
        raise AssertionError(f"{job} ended before {what}")

    def pull(self, job: str, which: str = "newest") -> Path:
        target = self.folder / f"{job}.{which}.safetensors"
        self.api.pull(job, target, which=which)
        return target


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _raise_if_dead(process: Process) -> bool:
    if process.popen.poll() is not None:
        raise AssertionError(f"{process.log.name} ended with {process.popen.returncode}:\n{process.said()[-3000:]}")
    return False


def closed_rounds(facts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [fact for fact in facts if fact["type"] == "round"]


def of_type(facts: list[dict[str, Any]], *types: str) -> Iterator[dict[str, Any]]:
    return (fact for fact in facts if fact["type"] in types)
