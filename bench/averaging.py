"""Averaging alone: `server.folding.average` over files in the page cache, by size of the model and number of updates.

Each case runs in a process of its own (`python -m bench.averaging FOLDER UPDATES`), so that its peak memory is its own.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.fleet import peak_bytes, resident_bytes
from bench.limits import MEGABYTE, Limits, best_of, timed
from bench.played import Weights
from bench.scenario import (
    Column,
    Outcome,
    Row,
    Say,
    Scenario,
    Wish,
    megabytes,
    number,
    rate,
    seconds,
    share,
    shortage,
)
from server.folding import Rules, Targets, average
from server.optimizers import FedAvg

ROOT = Path(__file__).resolve().parent.parent
UPDATES = (2, 4, 8, 16, 32, 64)


def measure(wish: Wish, limits: Limits, say: Say) -> Outcome:
    """One row for each size and number of updates."""
    rows, skipped = list[Row](), list[str]()
    sizes, counts = wish.pick(
        tiny=((1,), (2,)), quick=((1, 10, 100), (2, 8, 16)), full=((1, 10, 100, 400, 1600), UPDATES)
    )
    for size_mb in sizes:
        for updates in (count for count in counts if size_mb <= 100 or count <= 8):
            name = f"{size_mb:,} MB × {updates} updates"
            needed = (updates + 2) * size_mb * MEGABYTE  # beside the disk, it should fit the page cache
            lacking = shortage(memory=needed, disk=needed)
            if lacking is not None:
                skipped.append(f"{name}: {lacking}")
                continue
            say(name)
            rows.append(_case(size_mb, updates, limits))
    return Outcome(tuple(rows), tuple(skipped))


def _case(size_mb: int, updates: int, limits: Limits) -> Row:
    with tempfile.TemporaryDirectory(prefix="lydian-bench-") as name:
        folder = Path(name)
        Weights.made(folder / "base", size_mb)
        for at in range(updates):  # files of their own: one file many times would come from the processor's cache
            shutil.copyfile(folder / "base", folder / f"update-{at}")
        command = [sys.executable, "-m", "bench.averaging", name, str(updates)]
        ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(ended.stdout)
    read = size_mb * MEGABYTE * updates / found["average_s"]
    return {
        "megabytes": size_mb,
        "updates": updates,
        **found,
        "grown_bytes": found["peak_bytes"] - found["before_bytes"],
        "read": read,
        "part_of_copy": read / limits.copy,
        "part_of_axpy": read / limits.axpy,
    }


def main() -> None:
    """Average what lies in a folder, and print what it took."""
    folder, updates = Path(sys.argv[1]), int(sys.argv[2])
    os.sync()  # what was just written should not be written in the meantime
    before = resident_bytes(os.getpid())
    files = [(folder / f"update-{at}", at + 1) for at in range(updates)]
    targets, rules = Targets(folder / "next"), Rules(FedAvg())

    def once() -> float:
        targets.model.unlink(missing_ok=True)  # a coordinator never writes over a model
        return timed(average, folder / "base", files, targets, rules=rules)

    took = best_of(3, once)
    print(json.dumps({"average_s": took, "before_bytes": before, "peak_bytes": peak_bytes(os.getpid())}))


SCENARIO = Scenario(
    name="averaging",
    title="Averaging alone",
    about=(
        "`server.folding.average` in a process of its own, the files in the page cache, writing and hashing the next "
        "model and its fsync included. *Read*: bytes of updates a second, also as a share of what one core copies from "
        "memory to memory, and of what numpy weighs and adds up at best. *Grown*: the peak of resident memory above "
        "what the process held before."
    ),
    measure=measure,
    columns=(
        Column("model", "megabytes", lambda mb: f"{mb:,} MB"),
        Column("updates", "updates", number),
        Column("average", "average_s", seconds),
        Column("read", "read", rate),
        Column("of copy", "part_of_copy", share),
        Column("of weighted sum", "part_of_axpy", share),
        Column("peak memory", "peak_bytes", megabytes),
        Column("grown", "grown_bytes", megabytes),
    ),
)

if __name__ == "__main__":
    main()
