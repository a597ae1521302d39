"""`python -m bench.soak`: does anything grow, round after round? Real processes, and a task that costs nothing.

    warm-up job ──▶ idle: counted ──▶ the long job, sampled every few seconds ──▶ idle: counted again

At the two idle moments the same processes do nothing, so they must hold no more descriptors or threads at the second.
Memory is looked at twice: by its slope over the long job, and from one idle moment to the other for each round, as much
as a leak of one object a round would cost. Freed buffers are given back at once (MALLOC_MMAP_THRESHOLD_), so that what
shows is what is kept.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import psutil  # type: ignore[import-untyped]

from bench.limits import MEGABYTE
from bench.rounds import TASK
from client.running import Children, python_module, wait_for_line
from common.api import CoordinatorApi
from common.messages import JobRequest, JobSpec

WARM_UP = 50  # rounds: long enough for every buffer, cache and connection to be there
LOOK_S = 0.1  # between two looks whether all is quiet
SETTLED_S = 3.0  # without a change of any count
PATIENCE_S = 90.0  # for connections that nobody uses to be closed: the coordinator keeps them for 75 s


@dataclass(frozen=True)
class Vitals:
    """What one process holds at one moment."""

    resident_bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Sample:
    """All processes at one moment of the long job."""

    at_s: float  # since the first sample
    round: int
    processes: Mapping[str, Vitals]
    journal_bytes: int  # the file and its write-ahead log


@dataclass(frozen=True)
class Report:
    """What a soak found."""

    rounds: int
    seconds: float
    warm: Mapping[str, Vitals]  # idle, after the warm-up
    end: Mapping[str, Vitals]  # idle, after the long job
    samples: Sequence[Sample]
    journal_bytes_a_round: float

    def growth(self, name: str) -> float:
        """Resident bytes that a round has cost a process, from one idle moment to the other."""
        return (self.end[name].resident_bytes - self.warm[name].resident_bytes) / self.rounds

    def slope(self, name: str) -> float:
        """Resident bytes a second while it worked, by least squares; the first fifth of the job is left out."""
        settled = self.samples[len(self.samples) // 5 :]
        return slope([(sample.at_s, sample.processes[name].resident_bytes) for sample in settled])

    def between(self, name: str, of: Callable[[Vitals], int]) -> tuple[int, int]:
        """The least and the most of something that a process had while it worked."""
        values = [of(sample.processes[name]) for sample in self.samples]
        return min(values), max(values)


def slope(points: Iterable[tuple[float, float]]) -> float:
    """The slope of the straight line with the least squares of errors through points (x, y); 0 where there is none."""
    known = list(points)
    middle = sum(x for x, _ in known) / max(len(known), 1)
    spread = sum((x - middle) ** 2 for x, _ in known)
    return sum((x - middle) * y for x, y in known) / spread if spread > 0 else 0.0


# ---------------------------------------------------------------- the run


class Soak:
    """A coordinator and workers in a folder, and what they hold."""

    def __init__(self, folder: Path, children: Children, workers: int) -> None:
        """Start them all."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LYDIAN_")}
        environment["MALLOC_MMAP_THRESHOLD_"] = str(
            128 << 10
        )  # said, it is glibc's default for ever, and not just at first
        self._state, self._children, self._workers = folder / "state", children, workers
        arguments = ["--host", "127.0.0.1", "--port", "0", "--state-dir", str(self._state)]
        server = children.start("coordinator", python_module("server", arguments), environment)
        self._server = server.process
        url = wait_for_line(server, "ready ", timeout_s=60)
        environment["LYDIAN_TOKEN"] = (self._state / "join.token").read_text().strip()
        for number in range(workers):
            name = f"w{number}"
            arguments = [url, "--name", name, "--state-dir", f"{folder}/{name}", "--threads", "1", "--device", "cpu"]
            children.start(name, python_module("worker", [*arguments, "--trust", "any"]), environment)
        self._processes = {child.name: psutil.Process(child.process.pid) for child in children.started}
        self._api = CoordinatorApi(url, (self._state / "admin.token").read_text().strip())

    def close(self) -> None:
        """Close the connections; the processes are the caller's to end."""
        self._api.close()

    def run(self, rounds: int, every_s: float | None = None) -> list[Sample]:
        """Run one job to its end, and sample it every so many seconds; None: never.

        Raises:
            SystemExit: the job failed, and with it the soak.
        """
        spec = {
            "task": "constant",
            "rounds": rounds,
            "data": {"shards": self._workers},
            "round": {"min_workers": self._workers},
            "config": {"megabytes": 1},
        }
        request = JobRequest(spec=JobSpec.model_validate(spec), task_source=TASK.read_text(), key=uuid4().hex)
        began, samples = time.monotonic(), list[Sample]()
        for event in self._api.events(self._api.submit_job(request).id):
            if event["type"] == "job" and event["state"] == "failed":
                raise SystemExit(f"the job failed: {event['reason']}")
            due = every_s is not None and time.monotonic() - began >= len(samples) * every_s
            if event["type"] == "round" and due:
                at_s = time.monotonic() - began
                samples.append(Sample(at_s, event["round"], self.vitals(), self.journal_bytes()))
        return samples

    def idle(self, like: Mapping[str, Vitals] | None = None) -> dict[str, Vitals]:
        """What every process holds when nothing is to be done, and its counts have not changed for a while.

        Args:
            like: an earlier idle moment; it is waited for a while until nobody holds more than it did then.
        """
        began = changed_at = time.monotonic()
        last: dict[str, Vitals] = {}
        while True:
            time_now, vitals = time.monotonic(), self.vitals()
            quiet = sum(w.state == "idle" and w.last_seen_s == 0 for w in self._api.workers()) == self._workers
            same = {name: counts(v) for name, v in vitals.items()} == {name: counts(v) for name, v in last.items()}
            changed_at = changed_at if quiet and same else time_now
            more = like is not None and any(holds_more(vitals[name], like[name]) for name in vitals)
            waited_s = time_now - began
            if (time_now - changed_at >= SETTLED_S and not more) or waited_s > PATIENCE_S:
                return vitals
            last = vitals
            with suppress(subprocess.TimeoutExpired):  # which is what should happen: the coordinator lives on
                self._server.wait(LOOK_S)
            self._children.check()

    def vitals(self) -> dict[str, Vitals]:
        """What every process holds now; of agents without the child that trains."""
        return {name: _vitals(process) for name, process in self._processes.items()}

    def journal_bytes(self) -> int:
        """Bytes of the journal and its write-ahead log."""
        return sum(path.stat().st_size for path in self._state.glob("journal.sqlite*"))


def counts(vitals: Vitals) -> tuple[int, int]:
    """What does not change while the process is idle: descriptors and threads."""
    return vitals.descriptors, vitals.threads


def holds_more(now: Vitals, then: Vitals) -> bool:
    """Whether a process has more descriptors or threads than at another moment."""
    return now.descriptors > then.descriptors or now.threads > then.threads


def _vitals(process: psutil.Process) -> Vitals:
    with process.oneshot():
        return Vitals(process.memory_info().rss, process.num_fds(), process.num_threads())


def soak(rounds: int, *, workers: int = 2, warm_up: int = WARM_UP, every_s: float = 3.0) -> Report:
    """Run the warm-up and the long job.

    Args:
        rounds: of the long job.
        workers: agents, and shards of a round.
        warm_up: rounds of the job before.
        every_s: seconds between two samples.
    """
    with tempfile.TemporaryDirectory() as folder, Children(Path(folder)) as children:
        running = Soak(Path(folder), children, workers)
        try:
            running.run(warm_up)
            warm, journal, began = running.idle(), running.journal_bytes(), time.monotonic()
            samples = running.run(rounds, every_s)
            seconds = time.monotonic() - began
            end = running.idle(like=warm)
            grown = (running.journal_bytes() - journal) / rounds
        finally:
            running.close()
    return Report(rounds, seconds, warm, end, samples, grown)


# ---------------------------------------------------------------- the command


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000, help="rounds of the long job (default 2000)")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help=f"rounds of the job before (default {WARM_UP})")
    parser.add_argument("--workers", type=int, default=2, help="agents (default 2)")
    parser.add_argument("--every", type=float, default=3.0, metavar="S", help="seconds between samples (default 3)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args()
    report = soak(chosen.rounds, workers=chosen.workers, warm_up=chosen.warm_up, every_s=chosen.every)
    if chosen.json:
        found = {name: {"bytes_a_round": report.growth(name), "bytes_a_s": report.slope(name)} for name in report.end}
        print(json.dumps({**asdict(report), "growth": found}, indent=2))
        return
    print(f"{report.rounds} rounds with {chosen.workers} workers in {report.seconds:.0f} s")
    print(f"journal: {report.journal_bytes_a_round:.0f} bytes a round")
    print()
    print("process       resident, idle        a round       while working    descriptors   threads")
    for name in report.end:
        warm, end = report.warm[name], report.end[name]
        descriptors = report.between(name, lambda vitals: vitals.descriptors)
        threads = report.between(name, lambda vitals: vitals.threads)
        print(
            f"{name:12s}"
            f"  {warm.resident_bytes / MEGABYTE:6.1f} → {end.resident_bytes / MEGABYTE:6.1f} MB"
            f"  {report.growth(name):8.0f} bytes"
            f"  {report.slope(name) * 3600 / MEGABYTE:+8.1f} MB/h"
            f"   {warm.descriptors} → {end.descriptors} ({descriptors[0]}–{descriptors[1]})"
            f"   {warm.threads} → {end.threads} ({threads[0]}–{threads[1]})"
        )


if __name__ == "__main__":
    main()
