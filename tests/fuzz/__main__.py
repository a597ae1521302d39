"""Try every parser for a stated time, led by coverage: `make fuzz SECONDS=60`; `python -m tests.fuzz --only layout`.

    for each target: a process ──atheris──▶ executions, coverage, a file in CRASHES for what failed
                     RLIMIT_AS above what it has when it begins: a parser that takes memory fails

What was reached is kept in build/fuzz/NAME and is where the next run begins. A crash is an input: mend the parser, then
put the file into tests/fuzz/corpus/NAME under a name that says what it was, and tests/test_fuzz.py tries it for ever.
"""

import argparse
import importlib.util
import os
import re
import resource
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "fuzz"
CRASHES = WORK / "crashes"
MEMORY = 512 << 20  # bytes beyond what a process has when it begins
LONGEST = 1 << 14  # bytes of an input
SLOW_S = 60  # for one input, after which it counts as a crash
PARSERS = [
    *(f"client.{name}" for name in ("job_file", "job_keys")),
    *(f"common.{name}" for name in (
        "api", "codecs", "compatibility", "deltas", "errors", "facts", "fixed", "masked", "messages", "ranges",
        "secure", "shamir", "staging", "streams", "tailscale", "together", "transfers", "weights",
    )),
    *(f"server.{name}" for name in ("auth", "blobs", "inspection", "robust", "unmasking")),
    *(f"worker.{name}" for name in ("child", "pin")),
]  # fmt: skip
"""Modules whose branches lead atheris; to instrument all of ours takes longer than most runs."""


@dataclass(frozen=True)
class Outcome:
    """What became of one target."""

    name: str
    executions: int
    first: int  # edges covered by what was known
    last: int  # and at the end
    crashes: int

    def row(self) -> str:
        """Its line of the table."""
        new = self.last - self.first
        return f"{self.name:<18}{self.executions:>12,}{self.first:>16,}{new:>8,}{self.crashes:>9}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Try every parser, led by coverage.")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together (default 60)")
    parser.add_argument("--only", action="append", metavar="NAME", help="this target; may be given again")
    given = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print("Nothing was tried: atheris is not installed. It has builds for Python 3.11: pip install -e '.[fuzz]'")
        print("tests/test_fuzz.py tries the same targets without it.")
        return 2
    import atheris

    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a process with threads cannot be forked safely
    with atheris.instrument_imports(include=PARSERS):
        from tests.fuzz.targets import TARGETS
    names = given.only or list(TARGETS)
    if unknown := set(names) - TARGETS.keys():
        parser.error(f"there is no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    each = max(1, round(given.seconds / len(names)))
    print(f"{'target':<18}{'executions':>12}{'covered before':>16}{'new':>8}{'crashes':>9}", flush=True)
    crashed = []
    for name in names:
        found = run(name, each)
        print(found.row(), flush=True)
        crashed += [name] * bool(found.crashes)
    if crashed:
        print(f"Failed: {', '.join(crashed)}. The inputs are in {CRASHES}, the tracebacks in {WORK}/NAME.log.")
    return 1 if crashed else 0


def run(name: str, seconds: int) -> Outcome:
    """Try one target in a process of its own, forked from this one: what it needs has been imported once."""
    CRASHES.mkdir(parents=True, exist_ok=True)
    log, before = WORK / f"{name}.log", set(CRASHES.glob(f"{name}-*"))
    with tempfile.TemporaryDirectory(prefix="lydian-fuzz-") as scratch:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            fuzz(name, seconds, log, scratch)
        _, status = os.waitpid(child, 0)
    said = log.read_text(errors="replace")
    covered = [int(number) for number in re.findall(r"cov: (\d+)", said)] or [0]
    counted = re.findall(r"(?:stat::number_of_executed_units:\s+|#)(\d+)", said) or [0]
    new = set(CRASHES.glob(f"{name}-*")) - before
    return Outcome(name, int(counted[-1]), covered[0], covered[-1], len(new) or int(status != 0))


def fuzz(name: str, seconds: int, log: Path, scratch: str) -> NoReturn:
    """In the child: ends with what atheris ends with."""
    import atheris

    from tests.fuzz.targets import CORPUS, TARGETS

    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    tempfile.tempdir = scratch
    target, kept, known = TARGETS[name], WORK / name, CORPUS / name
    kept.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (kept / f"seed-{number}").write_bytes(seed)
        target.try_one(seed)  # what is built once, and kept
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.RLIM_INFINITY))
    options = [
        f"-max_total_time={seconds}", f"-max_len={LONGEST}", f"-timeout={SLOW_S}", "-print_final_stats=1",
        f"-artifact_prefix={CRASHES}/{name}-", "-rss_limit_mb=0", "-len_control=0", str(kept),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, *([str(known)] if known.is_dir() else [])], target.try_one)
    atheris.Fuzz()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
