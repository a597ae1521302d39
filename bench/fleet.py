"""A coordinator and real workers on loopback, and what each process has cost so far.

Everything is a process of its own in a folder that is deleted, and ends with the block.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import psutil  # type: ignore[import-untyped]

from bench.scenario import Spec
from client.running import Child, Children, python_module, wait_for_line
from common.api import CoordinatorApi
from common.errors import LydianError
from common.messages import JobRequest, JobSpec

READY_S = 60.0
LOOK_S = 0.02


class Fleet:
    """One coordinator with its workers."""

    def __init__(self, folder: Path, children: Children, settings: dict[str, str]) -> None:
        """Start the coordinator; its LYDIAN_* settings are those that are given, and none of this environment."""
        self.folder, self._children = folder, children
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("LYDIAN_")}
        self._state = folder / "state"
        arguments = ["--host", "127.0.0.1", "--port", "0", "--state-dir", str(self._state)]
        self.server = children.start("coordinator", python_module("server", arguments), self._environment | settings)
        self.url = wait_for_line(self.server, "ready ", timeout_s=READY_S)
        self.api = CoordinatorApi(self.url, (self._state / "admin.token").read_text().strip())
        self.agents: list[Child] = []

    @property
    def join_token(self) -> str:
        """What lets a worker join."""
        return (self._state / "join.token").read_text().strip()

    def start_workers(self, number: int) -> None:
        """Start real workers, a thread each, and wait until all of them ask for work."""
        for at in range(number):
            self.start_worker(f"w{at}")
        while sum(worker.state == "idle" and worker.last_seen_s == 0 for worker in self.api.workers()) < number:
            self.pause(LOOK_S)

    def start_worker(self, name: str, *more: str) -> None:
        """Start a real worker of one thread."""
        folder = str(self.folder / name)
        arguments = [self.url, "--name", name, "--state-dir", folder, "--threads", "1", "--device", "cpu", *more]
        command = python_module("worker", [*arguments, "--trust", "any"])
        environment = self._environment | {"LYDIAN_TOKEN": self.join_token}
        self.agents.append(self._children.start(name, command, environment))

    def submit(self, spec: Spec, source: str | None = None) -> str:
        """Send a job; its id."""
        request = JobRequest(spec=JobSpec.model_validate(spec), task_source=source, key=uuid4().hex)
        return self.api.submit_job(request).id

    def events(self, job: str) -> Iterator[dict[str, object]]:
        """What happens to a job until it is over.

        Raises:
            SystemExit: it failed, and so did the measurement.
        """
        for event in self.api.events(job, on_wait=lambda _: self._children.check()):
            self._children.check()
            yield event
            if event["type"] == "job" and event["state"] in ("failed", "cancelled"):
                raise SystemExit(f"the job {event['state']}: {event['reason']}")

    def stop(self) -> None:
        """End the coordinator before its time: whoever waits for it is told."""
        self.server.process.terminate()

    def pause(self, seconds: float) -> None:
        """Let time pass, as long as all parts run."""
        with suppress(psutil.TimeoutExpired):  # which is what should happen: the coordinator lives on
            psutil.Process(self.server.process.pid).wait(seconds)
        self._children.check()


@contextmanager
def running(**settings: str) -> Iterator[Fleet]:
    """A coordinator without workers, in a folder of its own. If a part ends by itself, its last words are shown."""
    with tempfile.TemporaryDirectory(prefix="lydian-bench-") as folder, Children(Path(folder)) as children:
        try:
            fleet = Fleet(Path(folder), children, settings)
            try:
                yield fleet
            finally:
                fleet.api.close()
        except LydianError:
            for child in children.started:
                if child.ended:
                    print(f"--- {child.name}\n{child.tail()}", file=sys.stderr)
            raise


# ---------------------------------------------------------------- what a process has cost


def cpu_seconds(pid: int) -> float:
    """Seconds of processor that a process has used so far, its children left out."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def cpu_below(pid: int) -> float:
    """Seconds of processor that what this process has started, and what that has started, have used so far."""
    try:
        return sum(cpu_seconds(child.pid) for child in psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:  # one ended while it was looked at
        return 0.0


def resident_bytes(pid: int) -> int:
    """Resident memory of a process now."""
    return int(psutil.Process(pid).memory_info().rss)


def peak_bytes(pid: int) -> int:
    """Peak resident memory of a process (Linux), or what it has now elsewhere; 0 if it has ended."""
    status = Path(f"/proc/{pid}/status")
    try:
        if not status.exists():
            return resident_bytes(pid)
        lines = status.read_text().splitlines()
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return 0
    line = next((line for line in lines if line.startswith("VmHWM")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024


def peak_below(pid: int) -> int:
    """Peak resident memory of the largest process that this one has started; 0: it has none."""
    try:
        return max((peak_bytes(child.pid) for child in psutil.Process(pid).children(recursive=True)), default=0)
    except psutil.NoSuchProcess:
        return 0
