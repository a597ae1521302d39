"""`python -m bench.stacked`: many shards one by one and stacked, in one child, on this machine.

Times the command `train_many` from the question to the answer, files and all, and says how far the two ways are apart.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from common.tasks import BUILTIN
from worker.child import Child

# task, shards, samples a shard, batch size
CASES = [
    ("digits", 8, 16, 16), ("digits", 8, 64, 16), ("digits", 32, 16, 16), ("digits", 32, 64, 16),
    ("mlp", 8, 16, 16), ("mlp", 8, 64, 16), ("mlp", 32, 16, 16), ("mlp", 32, 64, 16),
    ("fashion-mnist", 5, 60, 10), ("fashion-mnist", 10, 60, 10), ("fashion-mnist", 10, 128, 64),
]  # fmt: skip

MLP = """
from torch import nn
{digits}
def model(config):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
"""


def main() -> None:
    """Measure every case, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--task", help="only this one")
    asked = parser.parse_args()
    print("task            shards  samples  batch  one by one   stacked  times  apart")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Child.start(device=asked.device, threads=asked.threads, log_path=folder / "child.log") as child:
            for task, shards, samples, batch in CASES:
                if asked.task in (None, task):
                    measure(child, folder, task, shards, samples, batch)


def measure(child: Child, folder: Path, task: str, shards: int, samples: int, batch: int) -> None:
    """One case, the better of three each way."""
    built = BUILTIN["digits" if task == "mlp" else task]
    file = built.file
    if task == "mlp":
        file = folder / "mlp.py"
        file.write_text(MLP.format(digits=built.file.read_text()))
    config = {**built.config, "lr": 0.05, "momentum": 0.9, "batch_size": batch}
    ask(child, {"do": "open", "task": str(file), "config": config})
    base = folder / "base.safetensors"
    facts = ask(child, {"do": "init", "seed": 1, "out": str(base), "labels": None})
    order = np.random.default_rng(0).permutation(facts["train_samples"])
    told = []
    for at in range(shards):
        np.save(folder / f"{at}.npy", np.resize(order[at * samples :], samples))
        told.append({"indices": str(folder / f"{at}.npy"), "seed": at})
    best: dict[str, float] = {}
    for way in ("off", "on") * 3:
        given = [{**shard, "out": str(folder / f"{way}-{at}.safetensors")} for at, shard in enumerate(told)]
        began = time.monotonic()
        done = ask(child, {"do": "train_many", "base": str(base), "shards": given, "round": 1, "stack": way})
        best[way] = min(best.get(way, 1e9), time.monotonic() - began)
        if way == "on" and done["stacked"] < shards:
            sys.exit(f"{task} was not stacked: {done['why']}")
    apart = max(distance(folder, base, at) for at in range(shards))
    rates = [shards * samples / best[way] for way in ("off", "on")]
    print(
        f"{task:<15} {shards:>6} {samples:>8} {batch:>6} {rates[0]:>9,.0f}/s {rates[1]:>7,.0f}/s "
        f"{rates[1] / rates[0]:>6.2f} {apart:.0e}",
        flush=True,
    )


def ask(child: Child, command: dict[str, Any]) -> dict[str, Any]:
    """Have the child do something."""
    return child.ask(command, on_progress=lambda _: None, stall_s=300)


def distance(folder: Path, base: Path, at: int) -> float:
    """How far the two updates of a shard are apart, as a part of their length."""
    one, other, start = (
        load_file(p) for p in (folder / f"off-{at}.safetensors", folder / f"on-{at}.safetensors", base)
    )
    apart = sum(float(np.square(one[name].astype(float) - other[name]).sum()) for name in start)
    length = sum(float(np.square(one[name].astype(float) - start[name]).sum()) for name in start)
    return float((apart / length) ** 0.5)


if __name__ == "__main__":
    main()
