"""`python -m bench.accuracy`: what fewer bytes cost in accuracy. Real jobs on Fashion-MNIST, codec by codec.

The same job for each codec and seed: McMahan's CNN, four iid shards, some local steps a round. Bytes up and down are
those that the workers counted, a shard and round; bytes on the wire are all that the loopback device carried
meanwhile, both ways, with every head, poll and beat. The first round is left out of both: in it all fetch the whole
model. One row has the error feedback switched off, to show what it is for.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil  # type: ignore[import-untyped]

from bench.fleet import Fleet
from client.running import Children

CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"update": "bf16"},
    "int8": {"update": "int8"},
    "int4": {"update": "int4"},
    "topk": {"update": "topk"},
    "topk, no feedback": {"update": "topk", "feedback": False},
}
SHARDS = 4
LOOPBACK = "lo"


@dataclass(frozen=True)
class Run:
    """One job."""

    case: str
    seed: int
    accuracy: float  # of the last model on the test set
    bytes_up: float  # a shard and round
    bytes_down: float
    bytes_on_wire: float


@contextmanager
def fleet(workers: int) -> Iterator[Fleet]:
    """A coordinator and workers of one thread each."""
    with TemporaryDirectory() as folder, Children(Path(folder)) as children:
        running = Fleet(Path(folder), children, {})
        running.start_workers(workers)
        yield running


def run(running: Fleet, case: str, seed: int, chosen: argparse.Namespace) -> Run:
    """Run one job to its end."""
    spec = {
        "task": chosen.task,
        "rounds": chosen.rounds,
        "seed": seed,
        "data": {"shards": SHARDS},
        "train": {"local_steps": chosen.local_steps, "batch_size": 64, "lr": chosen.lr, "momentum": chosen.momentum},
        "round": {"evaluate_every": 0},
        "aggregation": CASES[case],
    }
    rounds, accuracy, carried = list[dict[str, Any]](), 0.0, list[int]()
    for event in running.events(running.submit(spec)):
        if event["type"] == "round":
            rounds.append(event)
            carried.append(psutil.net_io_counters(pernic=True)[LOOPBACK].bytes_sent)
        if event["type"] == "evaluation":
            accuracy = float(dict(event["metrics"])["accuracy"])  # type: ignore[call-overload]
    up, down = (
        sum(r[name] / r["shards"] for r in rounds[1:]) / (len(rounds) - 1) for name in ("bytes_up", "bytes_down")
    )
    wire = (carried[-1] - carried[0]) / sum(r["shards"] for r in rounds[1:])
    return Run(case, seed, accuracy, up, down, wire)


def main() -> None:
    """Print a row a codec."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument("--task", default="fashion-mnist", help="a built-in task (default fashion-mnist)")
    parser.add_argument("--rounds", type=int, default=20, help="rounds (default 20)")
    parser.add_argument("--local-steps", type=int, default=25, help="optimiser steps a round and shard (default 25)")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate (default 0.05)")
    parser.add_argument("--momentum", type=float, default=0.9, help="momentum (default 0.9)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds, from 0 (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="workers (default 2)")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this codec; may be repeated")
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args()
    runs: list[Run] = []
    with fleet(chosen.workers) as running:
        for case in chosen.case or CASES:
            for seed in range(chosen.seeds):
                runs.append(run(running, case, seed, chosen))
                sys.stderr.write(f"{runs[-1]}\n")
    if chosen.json:
        print(json.dumps([asdict(one) for one in runs], indent=2))
        return
    whole = next((one for one in runs if one.case == "fp32"), runs[0])
    print(f"{chosen.task}, {chosen.rounds} rounds of {chosen.local_steps} steps, {SHARDS} shards, {chosen.seeds} seeds")
    print()
    print("update              accuracy          bytes up           bytes down           on the wire")
    for case in dict.fromkeys(one.case for one in runs):
        mine = [one for one in runs if one.case == case]
        accuracy = [one.accuracy for one in mine]
        spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
        parts = []
        for name in ("bytes_up", "bytes_down", "bytes_on_wire"):
            mean = statistics.mean(getattr(one, name) for one in mine)
            parts.append(f"{mean:11,.0f} (1/{getattr(whole, name) / mean:5.1f})")
        print(f"{case:18s}  {statistics.mean(accuracy):.4f} ± {spread:.4f}  {'  '.join(parts)}")


if __name__ == "__main__":
    main()
