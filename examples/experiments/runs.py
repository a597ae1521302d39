"""What the experiments share: `lydian simulate` for several seeds, what came of it, tables and plots.

    simulate(…) ──lydian simulate --json──▶ facts, one a line ──▶ Run: accuracy and bytes, round by round

Nothing is trained or averaged here. Everything that is measured comes from the coordinator's own facts.
"""

import argparse
import hashlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
FASHION = HERE / "fashion_mlp.py"
LAST_WORDS = 2_000  # characters of a simulation that failed


@dataclass(frozen=True)
class Point:
    """The model of one round, measured on the test set."""

    round: int
    accuracy: float
    bytes_up: int  # of all updates up to this round


@dataclass(frozen=True)
class Run:
    """One simulation."""

    seed: int
    points: tuple[Point, ...]  # one an evaluation, by round

    @property
    def last(self) -> Point:
        return self.points[-1]

    def first_at(self, accuracy: float) -> int | None:
        """The first evaluated round with this accuracy or more; None if there was none."""
        return next((point.round for point in self.points if point.accuracy >= accuracy), None)


def parser_of(text: str, *, rounds: int) -> argparse.ArgumentParser:
    """What every experiment takes."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"at most (default {rounds})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="where Fashion-MNIST is, if not where Debian has it"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep what was measured; what is there is not run again"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves too; needs matplotlib")
    parser.add_argument("--quick", action="store_true", help="one seed and few rounds: does it run at all?")
    return parser


def simulate(
    name: str,
    settings: Mapping[str, object],
    *,
    clients: int,
    fraction: float,
    rounds: int,
    seed: int,
    given: argparse.Namespace,
    options: Sequence[str] = (),
) -> Run:
    """Run `lydian simulate` on Fashion-MNIST to its end.

    Args:
        name: of the run, for whoever waits.
        settings: keys of the job with their values, e.g. {"train.lr": 0.1}.
        clients: shards of the training set.
        fraction: of them that trains in a round.
        rounds: of the job, unless it reaches its target before.
        seed: of the whole job.
        given: the arguments of the experiment, as `parser_of` has them.
        options: more of the command's.

    Raises:
        SystemExit: the simulation failed; with what it said.
    """
    numbers = {"--clients": clients, "--fraction": fraction, "--rounds": rounds, "--seed": seed}
    command = [sys.executable, "-m", "client.main", "simulate", str(FASHION), "--json", "--device", "cpu", *options]
    command += [part for option, number in numbers.items() for part in (option, str(number))]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={written(value)}")]
    command += ["--data", f"fashion-mnist={given.data.resolve()}"] if given.data is not None else []
    kept = place_of(command, given.keep)
    if kept is not None and kept.exists():
        return read_run(kept)
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        facts = list(facts_of(command, said))
        if not facts or facts[-1]["type"] != "summary":
            said.seek(0)
            raise SystemExit(f"{name}, seed {seed} failed:\n{said.read()[-LAST_WORDS:]}")
    run = run_of(facts, seed)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(asdict(run)))
    took = f"{run.last.round} rounds, accuracy {run.last.accuracy:.4f}, {time.monotonic() - began:.0f} s"
    print(f"{name}, seed {seed}: {took}", file=sys.stderr, flush=True)
    return run


def place_of(command: Sequence[str], folder: Path | None) -> Path | None:
    """Where the outcome of this very command, with the task as it is now, is kept."""
    if folder is None:
        return None
    return folder / f"{hashlib.sha256(repr([*command, FASHION.read_text()]).encode()).hexdigest()}.json"


def read_run(file: Path) -> Run:
    """What was kept."""
    run = json.loads(file.read_text())
    return Run(run["seed"], tuple(Point(**point) for point in run["points"]))


def written(value: object) -> str:
    """As --set takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def facts_of(command, said) -> Iterator[dict]:
    """What the command prints; it is asked to end, and waited for, whatever happens here."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of `finally`
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, cwd=HERE.parents[1])
    try:
        for line in process.stdout:
            yield json.loads(line)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait()


def run_of(facts: Iterable[dict], seed: int) -> Run:
    """The evaluations, each with the bytes that the updates of all rounds up to it had."""
    moved, accuracy = dict[int, int](), dict[int, float]()
    for fact in facts:
        if fact["type"] == "round":
            moved[fact["round"]] = fact["bytes_up"]
        if fact["type"] == "evaluation":
            accuracy[fact["round"]] = fact["metrics"]["accuracy"]
    points = (
        Point(number, value, sum(some for at, some in moved.items() if at <= number))
        for number, value in sorted(accuracy.items())
    )
    return Run(seed, tuple(points))


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Mean ± standard deviation of a sample; of one value, the value."""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column to the left, the others to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@contextmanager
def drawn(file: Path | None) -> Iterator:
    """Axes to draw on, written to the file at the end; None without a file, or before matplotlib was installed."""
    if file is None:
        yield None
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=90)
    axes.grid(alpha=0.3)
    yield axes
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)
