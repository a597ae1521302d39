"""What the child's surroundings cost at its start: `python -m bench.cage [--starts N]`.

A Python that does nothing is started as a child would be: without anything, and in each sandbox that works here. The
shortest of many starts is printed, since on a busy machine all others also have the wait for a processor in them. A
child then loads torch, which takes far longer.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.errors import LydianError
from worker.cage import Wish
from worker.caging import Cage, open_cage


def start_s(cage: Cage | None) -> float:
    """Seconds of one start and end."""
    began = time.perf_counter()
    program = [sys.executable, "-I", "-S", "-c", ""]
    if cage is None:
        subprocess.run(program, check=True)
    else:
        cage.prepare()
        variables = cage.environment(os.environ)
        subprocess.run(cage.command(program), env=variables, cwd=cage.home, check=True, **cage.identity())
        cage.clear()
    return time.perf_counter() - began


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=30)
    starts = parser.parse_args().starts
    user = "nobody" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="lydian-bench-") as folder:
        cages: dict[str, Cage | None] = {"nothing": None}
        for wish in (Wish(), Wish("bwrap", user)):
            try:
                cages[f"--sandbox {wish.sandbox}"] = open_cage(wish, Path(folder), {})
            except LydianError as error:
                print(error.lines())
        for name, cage in cages.items():
            shortest = min(start_s(cage) for _ in range(starts))
            print(f"{name}: {shortest * 1000:.1f} ms a start (shortest of {starts})")


if __name__ == "__main__":
    main()
