"""`python -m bench.unequal`: unlike machines in one job. Workers that sleep, so that their speeds are known.

Speeds 1, 0.2 and 0.16 train with equal shards and with shards cut by speed; then a fourth of 0.015 joins. No round can
be shorter than its samples over the sum of the speeds (`ideal`). With `--accuracy`, the same two cuts train on
Fashion-MNIST from several seeds, to show what the cut costs of the accuracy.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.fleet import Fleet, running

SPEEDS = {"new-gpu": 1.0, "old-gpu": 0.2, "older-gpu": 0.16}
CPU = {"cpu": 0.015}
TASK = Path(__file__).with_name("paced.py")
IMAGES = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package has it


@dataclass(frozen=True)
class Found:
    """One job."""

    seconds: list[float]  # of its rounds
    shards: list[dict[str, int]]  # of each round: worker -> samples
    evaluators: list[list[str]] = field(default_factory=list)  # of each round: names
    accuracy: float = 0.0


def start(fleet: Fleet, speeds: dict[str, float], *, images: Path | None = None) -> None:
    """Start a worker for each speed."""
    for name, speed in speeds.items():
        file = fleet.folder / f"{name}.speed"
        file.write_text(str(speed))
        fleet.start_worker(name, "--data", f"speed={file}", *(["--data", f"images={images}"] if images else []))


def job(
    fleet: Fleet, workers: int, chosen: argparse.Namespace, *, shards: str | int, rounds: int, **keys: object
) -> Found:
    """Run a job to its end."""
    spec = {
        "task": "paced",
        "rounds": rounds,
        "data": {"shards": shards},
        "train": {"batch_size": 10, "lr": 0.1},
        "round": {"min_workers": workers, "evaluate_every": 0},
        "config": {"samples": chosen.samples, "rate": chosen.rate},
    } | keys
    found, sizes = Found([], []), dict[int, int]()
    for event in fleet.events(fleet.submit(spec, TASK.read_text())):
        fact: dict[str, Any] = dict(event)
        match fact["type"]:
            case "opened":
                sizes = {shard["shard"]: shard["stop"] - shard["start"] for shard in fact["shards"]}
                found.shards.append({})
                found.evaluators.append([one["worker_name"] for one in fact["evaluators"]])
            case "accepted":
                found.shards[-1][fact["worker_name"]] = sizes[fact["shard"]]
            case "round":
                found.seconds.append(fact["seconds"])
            case "evaluation":
                found = Found(found.seconds, found.shards, found.evaluators, fact["metrics"]["accuracy"])
    return found


def speeds(chosen: argparse.Namespace) -> dict[str, Any]:
    """Round times with equal shards and with shards cut by speed."""
    with running() as fleet:
        start(fleet, SPEEDS)
        equal = job(fleet, len(SPEEDS), chosen, shards=len(SPEEDS), rounds=chosen.rounds)
        by_speed = job(fleet, len(SPEEDS), chosen, shards="auto", rounds=chosen.rounds)
        start(fleet, CPU)
        with_cpu = job(fleet, len(SPEEDS) + 1, chosen, shards="auto", rounds=chosen.rounds + 1)
    ideal = chosen.samples / chosen.rate / sum(SPEEDS.values())
    return {"ideal": ideal, "equal": asdict(equal), "by speed": asdict(by_speed), "with cpu": asdict(with_cpu)}


def accuracy(chosen: argparse.Namespace) -> dict[str, list[float]]:
    """Final accuracies on Fashion-MNIST, seed by seed, of both cuts."""
    found: dict[str, list[float]] = {"equal": [], "by speed": []}
    with running() as fleet:
        start(fleet, SPEEDS, images=IMAGES)
        for seed in range(chosen.seeds):
            for name, shards in (("equal", len(SPEEDS)), ("by speed", "auto")):
                keys = {"seed": seed, "config": {"samples": 12_000, "rate": 20_000}, "train": chosen.train}
                done = job(fleet, len(SPEEDS), chosen, shards=shards, rounds=10, **keys)
                found[name].append(done.accuracy)
                sys.stderr.write(f"seed {seed}, {name}: {done.accuracy:.4f}, last cut {done.shards[-1]}\n")
    return found


def main() -> None:
    """Print a row a cut."""
    parser = argparse.ArgumentParser(prog="python -m bench.unequal", description=__doc__)
    parser.add_argument("--samples", type=int, default=2_000, help="in the training set (default 2000)")
    parser.add_argument("--rate", type=float, default=400.0, help="samples a second of speed 1 (default 400)")
    parser.add_argument("--rounds", type=int, default=3, help="of each job (default 3)")
    parser.add_argument("--accuracy", action="store_true", help="the accuracies instead of the times")
    parser.add_argument("--seeds", type=int, default=3, help="with --accuracy: seeds, from 0 (default 3)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--batch-size", type=int, default=64, help="with --accuracy (default 64)")
    parser.add_argument("--lr", type=float, default=0.05, help="with --accuracy (default 0.05)")
    chosen = parser.parse_args()
    chosen.train = {"batch_size": chosen.batch_size, "lr": chosen.lr}
    found: dict[str, Any] = accuracy(chosen) if chosen.accuracy else speeds(chosen)
    if chosen.json:
        print(json.dumps(found, indent=2))
        return
    if chosen.accuracy:
        for name, values in found.items():
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(f"{name:10s} {statistics.mean(values):.4f} ± {spread:.4f}  {values}")
        return
    ideal, equal = found["ideal"], statistics.median(found["equal"]["seconds"])
    together = f"{chosen.samples} samples at {chosen.rate:g} samples/s x {sum(SPEEDS.values()):g}"
    print(f"ideal      {ideal:6.2f} s a round: {together}")
    for name in ("equal", "by speed", "with cpu"):
        row = found[name]
        last = statistics.median(row["seconds"][1:])
        print(
            f"{name:10s} {last:6.2f} s a round, {last / ideal:.2f} x ideal, {equal / last:.2f} x faster than equal; "
            f"rounds {[round(each, 1) for each in row['seconds']]}, last cut {row['shards'][-1]}, "
            f"evaluators by round {row['evaluators']}"
        )


if __name__ == "__main__":
    main()
