"""`python -m bench.parts`: what the parts of a round cost, each alone: journal, child, look, average, partition."""

import argparse
import sqlite3
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

from bench.limits import MEGABYTE, best_of
from bench.rounds import TASK
from common.facts import Late
from common.sharding import order_of
from common.weights import Notes, file_digest, save
from server import audit, folding
from server.folding import Rules, Targets
from server.inspection import inspect
from server.optimizers import FedAvg
from server.store import Journal
from worker.child import Child


def seconds(call: Callable[[], object]) -> float:
    """Median seconds of a call over several runs."""

    def once() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return best_of(7, once)


def main() -> None:
    """Print one line a part."""
    parser = argparse.ArgumentParser(prog="python -m bench.parts", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1, help="size of the model (default 1)")
    parser.add_argument("--updates", type=int, default=4, help="updates averaged (default 4)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _journal(folder)
        _weights(folder, chosen.megabytes, chosen.updates)
        _child(folder, chosen.megabytes)
    labels = np.arange(60_000) % 10
    cut = seconds(
        lambda: order_of("dirichlet", total=60_000, shards=10, seed=0, alpha=0.5, labels_per_shard=2, labels=labels)
    )
    print(f"partition: dirichlet, 60,000 samples, 10 shards: {cut * 1e3:.1f} ms")


def _journal(folder: Path) -> None:
    journal = Journal.open(folder / "journal.sqlite")
    fact = Late(round=1, shard=0, attempt=1, worker="w")
    one = seconds(lambda: journal.append("j", [fact]))
    journal.append("j", [fact] * 20_000)
    replay = seconds(lambda: sum(1 for _ in journal.facts()))
    journal.close()
    _audit(folder / "journal.sqlite")
    print(f"journal: one fact made durable {one * 1e3:.2f} ms; 20,000 facts read {replay * 1e3:.0f} ms")


def _audit(path: Path) -> None:
    """What a row of the audit record costs: the time to add one, and how much smaller the file is without them."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        count = audit.head(database).seq
        caller = audit.Caller("admin:0123456789ab", "", "100.64.0.7", "gpu-box")
        event = audit.Event(caller, "token.issued", "0123456789ab")
        database.execute("BEGIN")
        added = seconds(lambda: [audit.add_event(database, "2026-01-31T12:00:00.000Z", event) for _ in range(1000)])
        database.execute("ROLLBACK")
        database.execute("VACUUM")
        whole = path.stat().st_size
        database.execute("DROP TABLE audit")
        database.execute("VACUUM")
    size = (whole - path.stat().st_size) / count
    print(f"audit record: {added * 1e3:.0f} µs to add a row, {size:.0f} bytes a row of a fact")


def _weights(folder: Path, megabytes: int, updates: int) -> None:
    arrays = {f"w{at}": np.full(250_000, at, np.float32) for at in range(megabytes)}
    base = folder / "base"
    save(base, arrays, Notes())
    digest = file_digest(base)
    look = seconds(lambda: inspect(base, base, digest=digest, norm_bound=None))
    files = [(base, 1)] * updates
    fold = seconds(lambda: folding.average(base, files, Targets(folder / "out"), rules=Rules(FedAvg())))
    sha = seconds(lambda: file_digest(base))
    print(
        f"weights, {megabytes} MB: digest {sha * 1e3:.1f} ms, look at an update {look * 1e3:.1f} ms, "
        f"average of {updates} with fsync {fold * 1e3:.1f} ms "
        f"({megabytes * MEGABYTE * updates / fold / 1e9:.2f} GB/s read)"
    )


def _child(folder: Path, megabytes: int) -> None:
    with Child.start(device="cpu", threads=1, log_path=folder / "child.log") as child:

        def ask(command: dict[str, object]) -> None:
            child.ask(command, on_progress=lambda _: None, stall_s=60.0)

        base, out = str(folder / "first"), str(folder / "trained")
        ask({"do": "open", "task": str(TASK), "config": {"megabytes": megabytes}})
        ask({"do": "init", "seed": 0, "out": base, "labels": None})
        took = seconds(lambda: ask({"do": "train", "base": base, "indices": None, "out": out, "seed": 0, "round": 1}))
        print(f"child, {megabytes} MB: load, one step that adds a constant, write {took * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
