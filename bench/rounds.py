"""What a round costs when training costs nothing: real coordinator, real workers, a model of so many megabytes."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bench.fleet import Fleet, cpu_below, cpu_seconds, peak_below, peak_bytes, running
from bench.limits import MEGABYTE, Limits
from bench.scenario import (
    Column,
    Outcome,
    Row,
    Say,
    Scenario,
    Spec,
    Wish,
    megabytes,
    merge,
    number,
    ratio,
    seconds,
    shortage,
)

TASK = Path(__file__).with_name("constant.py")

CASES = tuple((size, workers) for size in (1, 100, 400, 1600) for workers in (1, 2, 8))
QUICK_CASES = tuple((size, workers) for size in (1, 100) for workers in (1, 2, 4))
TINY_CASES = ((1, 1),)


@dataclass(frozen=True)
class Peaks:
    """Peak resident bytes: of the coordinator, of the largest agent, of the largest child that trains."""

    coordinator: int
    agent: int
    child: int

    @classmethod
    def of(cls, fleet: Fleet) -> Self:
        """As of now."""
        pids = [agent.process.pid for agent in fleet.agents]
        return cls(
            peak_bytes(fleet.server.process.pid),
            max(map(peak_bytes, pids), default=0),
            max(map(peak_below, pids), default=0),
        )


@dataclass(frozen=True)
class Processor:
    """Seconds of processor used so far: by the coordinator, by all agents, by all children that train."""

    coordinator: float
    agents: float
    children: float

    @classmethod
    def of(cls, fleet: Fleet) -> Self:
        """As of now."""
        pids = [agent.process.pid for agent in fleet.agents]
        return cls(
            cpu_seconds(fleet.server.process.pid),
            sum(cpu_seconds(pid) for pid in pids),
            sum(cpu_below(pid) for pid in pids),
        )


def job(size_mb: int, workers: int, rounds: int, overrides: Spec, seed: int = 0) -> Spec:
    """The job of a case. One round more than is measured: in the first, models are built and loaded."""
    spec = {
        "task": TASK.stem,
        "rounds": rounds + 1,
        "seed": seed,
        "data": {"shards": workers},
        "round": {"min_workers": workers},
        "config": {"megabytes": size_mb},
    }
    return merge(spec, overrides)


def measure(wish: Wish, limits: Limits, say: Say) -> Outcome:
    """Every case that this machine has the room for."""
    rows, skipped = list[Row](), list[str]()
    for size_mb, workers in wish.cases or wish.pick(tiny=TINY_CASES, quick=QUICK_CASES, full=CASES):
        name = f"{size_mb:,} MB × {workers}"
        lacking = shortage(memory=memory_of(size_mb, workers), disk=disk_of(size_mb, workers))
        if lacking is not None:
            skipped.append(f"{name}: {lacking}")
            say(f"{name} left out: {lacking}")
            continue
        rounds = wish.rounds or wish.pick(tiny=2, quick=5, full=rounds_of(size_mb))
        say(f"{name} workers, {rounds} rounds")
        row = case(size_mb, workers, rounds, wish, limits)
        say(f"{name} workers: a round in {row['round_s']:.3g} s, {row['ratio']:.3g} × the floor")
        rows.append(row)
    return Outcome(tuple(rows), tuple(skipped))


def case(size_mb: int, workers: int, rounds: int, wish: Wish, limits: Limits) -> Row:
    """One row: a fleet of its own, one job, the time from one closed round to the next."""
    with running() as fleet:
        fleet.start_workers(workers)
        closed, used, peaks = list[dict[str, Any]](), list[Processor](), list[Peaks]()
        spec = job(size_mb, workers, rounds, wish.overrides, wish.seed)
        # After so many rounds, and not after each: to look at all processes costs more than a small round.
        looks = 1, max(int(spec["rounds"]) - 1, 2)
        for event in fleet.events(fleet.submit(spec, TASK.read_text())):
            if event["type"] == "round":
                closed.append(event)
                if len(closed) in looks:
                    used.append(Processor.of(fleet))
                    peaks.append(Peaks.of(fleet))
    took = [event["seconds"] for event in closed[1:]]
    median = statistics.median(took)
    first, last, count = *used, looks[1] - looks[0]
    floor = 2 * size_mb * MEGABYTE * workers / limits.loopback
    return {
        "megabytes": size_mb,
        "workers": workers,
        "rounds": len(took),
        "round_s": median,
        "slowest_s": max(took),
        "floor_s": floor,
        "ratio": median / floor,
        "down_bytes": statistics.median(event["bytes_down"] for event in closed[1:]),
        "up_bytes": statistics.median(event["bytes_up"] for event in closed[1:]),
        "coordinator_cpu_s": (last.coordinator - first.coordinator) / count,
        "agents_cpu_s": (last.agents - first.agents) / count,
        "children_cpu_s": (last.children - first.children) / count,
        "coordinator_bytes": max(peak.coordinator for peak in peaks),
        "agent_bytes": max(peak.agent for peak in peaks),
        "child_bytes": max(peak.child for peak in peaks),
    }


def rounds_of(size_mb: int) -> int:
    """Rounds that a case takes: fewer of those that cost more."""
    return 30 if size_mb <= 10 else 10 if size_mb <= 100 else 5 if size_mb <= 400 else 3


def memory_of(size_mb: int, workers: int) -> float:
    """Bytes that the processes of a case hold at most, about: a child keeps the model, its base and what it writes."""
    return (workers * (300 + 3 * size_mb) + 300) * MEGABYTE


def disk_of(size_mb: int, workers: int) -> float:
    """Bytes of files of a case, about: five models and an update of each worker here, four files of each worker's."""
    return (7 + 5 * workers) * size_mb * MEGABYTE


SCENARIO = Scenario(
    name="rounds",
    title="A round without training",
    about=(
        "Real coordinator and workers, one job whose training adds a constant (`bench/constant.py`): median seconds "
        "from one closed round to the next, the first left out. *Floor*: all models down and all updates up, "
        "2 · workers · size, at the loopback speed of one stream. *Sent*: payload of a round as the workers count it, "
        "headers left out. *Processor*: seconds a round of the coordinator, of all agents and of all children; "
        "where there are fewer cores than processes, their sum over the cores is what a round cannot go below. "
        "Memory is the peak of the coordinator, of the largest agent and of the largest child, "
        "with the pages of libraries that children share."
    ),
    measure=measure,
    takes_overrides=True,
    columns=(
        Column("model", "megabytes", lambda mb: f"{mb:,} MB"),
        Column("workers", "workers", number),
        Column("rounds", "rounds", number),
        Column("median", "round_s", seconds),
        Column("slowest", "slowest_s", seconds),
        Column("floor", "floor_s", seconds),
        Column("median / floor", "ratio", ratio),
        Column("sent down", "down_bytes", megabytes),
        Column("sent up", "up_bytes", megabytes),
        Column("processor: coordinator", "coordinator_cpu_s", seconds),
        Column("agents", "agents_cpu_s", seconds),
        Column("children", "children_cpu_s", seconds),
        Column("memory: coordinator", "coordinator_bytes", megabytes),
        Column("agent", "agent_bytes", megabytes),
        Column("child", "child_bytes", megabytes),
    ),
)
