"""Many workers: what a coordinator costs when hundreds wait for work, and when all of them hand in at once."""

import asyncio
import resource
import statistics
import time
from datetime import datetime
from typing import Any

import numpy as np

from bench.fleet import Fleet, cpu_seconds, peak_bytes, resident_bytes, running
from bench.limits import MEGABYTE, Limits
from bench.played import Given, Players, Stage, Weights
from bench.rounds import TASK, job
from bench.scenario import (
    Column,
    Outcome,
    Row,
    Say,
    Scenario,
    Wish,
    megabytes,
    number,
    ratio,
    seconds,
    shortage,
)

SIZE_MB = 1
SETTINGS = {"LYDIAN_TTL_S": "3600"}  # light workers send no heartbeat


def measure(wish: Wish, limits: Limits, say: Say) -> Outcome:
    """One row for each number of workers."""
    rows, skipped = list[Row](), list[str]()
    for workers in wish.pick(tiny=(3,), quick=(50, 200), full=(50, 200, 1000)):
        lacking = shortage(memory=1e9 + workers * MEGABYTE, disk=3 * workers * SIZE_MB * MEGABYTE)
        lacking = lacking or _descriptors_lacking(workers)
        if lacking is not None:
            skipped.append(f"{workers} workers: {lacking}")
            continue
        rounds = wish.rounds or wish.pick(tiny=2, quick=3, full=5)
        idle_s = wish.pick(tiny=0.5, quick=5.0, full=20.0)
        say(f"{workers} light workers: idle for {idle_s:g} s, then {rounds} rounds")
        with running(**SETTINGS) as fleet:
            rows.append(asyncio.run(_case(fleet, workers, rounds, idle_s, wish, limits)))
    return Outcome(tuple(rows), tuple(skipped))


async def _case(fleet: Fleet, workers: int, rounds: int, idle_s: float, wish: Wish, limits: Limits) -> Row:
    """One row: join, wait, and one job."""
    model, update = (Weights.made(fleet.folder / f"{at}.weights", SIZE_MB, at) for at in (0, 1))
    stage = Stage(fleet.url, workers, model, update)
    players, pid = Players(stage), fleet.server.process.pid
    began = time.perf_counter()
    await players.join(fleet.join_token)
    join_s = time.perf_counter() - began
    async with players:
        await players.during(lambda: _await_idle(fleet, workers), fleet.stop)
        idle = [(time.perf_counter(), cpu_seconds(pid))]
        await players.during(lambda: fleet.pause(idle_s), fleet.stop)
        idle.append((time.perf_counter(), cpu_seconds(pid)))
        idle_bytes = resident_bytes(pid)
        watched = _Watched(fleet)
        spec = job(SIZE_MB, workers, rounds, {}, wish.seed)
        await players.during(lambda: watched.run(spec), fleet.stop)
    opened = {event["round"]: _epoch(event["at"]) for event in watched.opened}
    waits = sorted(waits_of(stage.given, opened))
    took = [event["seconds"] for event in watched.closed[1:]]
    floor = 2 * workers * SIZE_MB * MEGABYTE / limits.loopback
    used = watched.used
    return {
        "workers": workers,
        "megabytes": SIZE_MB,
        "rounds": len(took),
        "join_s": join_s,
        "idle_cpu": (idle[1][1] - idle[0][1]) / (idle[1][0] - idle[0][0]),
        "idle_bytes": idle_bytes,
        "reach_s": max(given.at for given in stage.given if given.round == 1) - watched.submitted_at,
        "round_s": statistics.median(took),
        "floor_s": floor,
        "ratio": statistics.median(took) / floor,
        "wait_p50_s": float(np.quantile(waits, 0.5)),
        "wait_p99_s": float(np.quantile(waits, 0.99)),
        "cpu_s": (used[-1][0] - used[0][0]) / len(took),
        "player_cpu_s": (used[-1][1] - used[0][1]) / len(took),
        "peak_bytes": peak_bytes(pid),
    }


def waits_of(given: list[Given], opened: dict[int, float]) -> list[float]:
    """Seconds from the opening of a round until each of its tasks was in a worker's hands; the first round left out.

    Both are read off the same clock, the coordinator's to a millisecond.
    """
    return [max(0.0, one.at - opened[one.round]) for one in given if one.round > 1]


class _Watched:
    """One job, and the processor time at the end of each of its rounds."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.opened, self.closed = list[dict[str, Any]](), list[dict[str, Any]]()
        self.used: list[tuple[float, float]] = []  # seconds: of the coordinator, of this process
        self.submitted_at = 0.0

    def run(self, spec: dict[str, Any]) -> None:
        """Submit it and follow it to its end."""
        self.submitted_at = time.time()
        for event in self._fleet.events(self._fleet.submit(spec, TASK.read_text())):
            if event["type"] == "opened":
                self.opened.append(event)
            if event["type"] == "round":
                self.closed.append(event)
                self.used.append((cpu_seconds(self._fleet.server.process.pid), time.process_time()))


def _await_idle(fleet: Fleet, workers: int) -> None:
    """Wait until all of them ask for work, looking seldom: the answer names every one of them."""
    while sum(worker.state == "idle" and worker.last_seen_s == 0 for worker in fleet.api.workers()) < workers:
        fleet.pause(0.2)
    fleet.pause(1.0)  # what the joining has left over


def _epoch(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()


def _descriptors_lacking(workers: int) -> str | None:
    """Why so many connections cannot be open on both sides; None: they can. The limit is raised as far as it may be."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * workers + 500
    if hard != resource.RLIM_INFINITY and hard < wanted:
        return f"a process may open {hard} files here, and it takes {wanted}"
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))  # the coordinator inherits it
    return None


SCENARIO = Scenario(
    name="many",
    title="Many workers",
    about=(
        "Light workers in one asyncio process (`bench/played.py`): real registration and real HTTP to a real "
        "coordinator, a 1 MB model, no training. *Idle*: the coordinator while all of them wait, as a share of one "
        "core. *Reach*: from the submission of a job until every waiting worker has a task of its first round, "
        "and the model, which comes with it. "
        "*Wait*: from the opening of a round until each of its tasks is in a worker's hands. *Floor* as above. "
        "Processor seconds are of one round: of the coordinator, and of the process that plays the workers."
    ),
    measure=measure,
    columns=(
        Column("workers", "workers", number),
        Column("join", "join_s", seconds),
        Column("idle", "idle_cpu", lambda part: f"{part:.1%}"),
        Column("idle memory", "idle_bytes", megabytes),
        Column("reach", "reach_s", seconds),
        Column("rounds", "rounds", number),
        Column("round", "round_s", seconds),
        Column("floor", "floor_s", seconds),
        Column("round / floor", "ratio", ratio),
        Column("wait p50", "wait_p50_s", seconds),
        Column("wait p99", "wait_p99_s", seconds),
        Column("processor", "cpu_s", seconds),
        Column("players'", "player_cpu_s", seconds),
        Column("peak memory", "peak_bytes", megabytes),
    ),
)
