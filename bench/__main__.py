"""`python -m bench` (`make bench`): the cost of a round, and this machine's limits beside it."""

import argparse
import json
import os
import platform
from dataclasses import asdict

from bench import limits, rounds

SIZES = ((1, 1), (1, 2), (1, 4), (10, 2), (100, 2))


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="rounds a measurement (default 20)")
    parser.add_argument("--size", action="append", metavar="MBxWORKERS", help="e.g. 1x2; may be repeated")
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args()
    sizes = [tuple(int(n) for n in size.split("x")) for size in chosen.size] if chosen.size else SIZES
    loopback, copy, fsync = limits.loopback_bandwidth(), limits.copy_bandwidth(), limits.fsync_seconds()
    machine = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "loopback_bytes_per_s": loopback,
        "copy_bytes_per_s": copy,
        "fsync_s": fsync,
    }
    results = [rounds.measure(megabytes, workers, chosen.rounds) for megabytes, workers in sizes]
    if chosen.json:
        print(json.dumps({**machine, "rounds": [asdict(result) for result in results]}, indent=2))
        return
    print(machine["machine"])
    print(f"loopback {loopback / 1e9:.2f} GB/s, copy {copy / 1e9:.2f} GB/s, fsync {fsync * 1e3:.2f} ms")
    print()
    print("model × workers   median     slowest    bytes at loopback speed   coordinator   agent")
    for result in results:
        floor = 2 * result.megabytes * limits.MEGABYTE * result.workers / loopback
        print(
            f"{result.megabytes:4d} MB × {result.workers:<3d}"
            f"    {result.median_s * 1e3:7.1f} ms {result.slowest_s * 1e3:7.1f} ms"
            f"    {floor * 1e3:8.2f} ms ({result.median_s / floor:5.1f} ×)    {result.server_bytes / 1e6:6.0f} MB"
            f"      {result.agent_bytes / 1e6:4.0f} MB"
        )


if __name__ == "__main__":
    main()
