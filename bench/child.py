"""What a training process costs from its start to its first update: `python -m bench.child [--times N]`.

A child of the worker is started as an agent starts it, loads the built-in task, makes a model and trains one round.
The second line is the same with torch's compiler loaded, as it is for a task that compiles. The least of N, since on a
busy machine all others also have the wait for a processor in them.
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]

from common.tasks import BUILTIN
from worker.child import Child

STALL_S = 120.0


class Cost(NamedTuple):
    """Of one child, up to its first update."""

    wall_s: float
    processor_s: float
    resident_mb: float
    own_mb: float  # that no other process shares


def cost(folder: Path, before: str) -> Cost:
    """Start a child, train one round, end it. `before` stands above the task's text."""
    builtin = BUILTIN["digits"]
    task, base = folder / "task.py", folder / "base.safetensors"
    task.write_text(before + builtin.file.read_text())
    began = time.perf_counter()
    with Child.start(device="cpu", threads=1, log_path=folder / "child.log") as child:

        def ask(**command: Any) -> None:  # noqa: ANN401 - a command's fields
            child.ask(command, on_progress=lambda _: None, stall_s=STALL_S)

        ask(do="open", task=str(task), config=dict(builtin.config))
        ask(do="init", seed=1, out=str(base), labels=None)
        ask(do="train", base=str(base), indices=None, out=str(folder / "update.safetensors"), seed=1, round=1)
        wall_s, process = time.perf_counter() - began, psutil.Process(child.pid)
        used, memory = process.cpu_times(), process.memory_full_info()
    return Cost(wall_s, used.user + used.system, memory.rss / 1e6, memory.uss / 1e6)


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5)
    times = parser.parse_args().times
    print(f"Python {platform.python_version()}, {psutil.cpu_count()} processors, the least of {times}")
    with tempfile.TemporaryDirectory(prefix="lydian-bench-") as folder:
        for name, before in (("as it is", ""), ("with the compiler", "import torch._dynamo.config\n")):
            costs = [cost(Path(folder), before) for _ in range(times)]
            least = Cost(*(min(column) for column in zip(*costs, strict=True)))
            print(
                f"{name}: {least.wall_s:.2f} s, {least.processor_s:.2f} s of processor, "
                f"{least.resident_mb:.0f} MB, {least.own_mb:.0f} MB of them its own"
            )


if __name__ == "__main__":
    main()
