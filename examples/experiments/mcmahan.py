"""Federated averaging as in McMahan et al. 2017 (arXiv 1602.05629): rounds to a target, by data and local epochs.

    python examples/experiments/mcmahan.py                    prints a table in Markdown
    python examples/experiments/mcmahan.py --plot rounds.png  and draws the curves; needs matplotlib
    python examples/experiments/mcmahan.py --quick            does it run at all?

As there: 100 clients, 10 of them a round (C = 0.1), batches of 10, data spread evenly or two label-sorted pieces a
client, 1 or 5 local epochs. Unlike there: Fashion-MNIST's first 12,000 pictures and not MNIST's 60,000, so 120 a client
and not 600; one hidden layer of 64; the same learning rate everywhere and not the best for each. A job ends where it
reaches the target.
"""

from collections.abc import Mapping
from itertools import product

from runs import Run, drawn, parser_of, simulate, spread, table

CLIENTS, FRACTION, BATCH = 100, 0.1, 10
DATA = {"iid": "evenly", "labels": "two labels a client"}

Case = tuple[str, int]
"""(partition, local epochs)"""


def main() -> None:
    parser = parser_of(__doc__, rounds=100)
    parser.add_argument("--target", type=float, default=0.75, help="test accuracy (default 0.75)")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate of the clients (default 0.05)")
    parser.add_argument("--partitions", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--epochs", nargs="+", type=int, default=[1, 5], help="local ones (default 1 5)")
    given = parser.parse_args()
    seeds, rounds = (given.seeds[:1], 2) if given.quick else (given.seeds, given.rounds)
    found: dict[Case, list[Run]] = {}
    for seed in seeds:
        for case in product(given.partitions, given.epochs):
            settings = settings_of(case, given.lr, given.target)
            run = simulate(
                words(case), settings, clients=CLIENTS, fraction=FRACTION, rounds=rounds, seed=seed, given=given,
                options=("--processes", "1") if given.quick else (),
            )  # fmt: skip
            found.setdefault(case, []).append(run)
    print(f"Rounds to a test accuracy of {given.target:g}, at most {rounds}; lr {given.lr:g}; seeds {seeds}.\n")
    print(table_of(found, given.target, rounds))
    with drawn(given.plot) as axes:
        if axes is not None:
            draw(axes, found, given.target)


def settings_of(case: Case, lr: float, target: float) -> dict[str, object]:
    partition, epochs = case
    train = {"train.local_epochs": epochs, "train.batch_size": BATCH, "train.lr": lr}
    return {**train, "data.partition": partition, "data.labels_per_shard": 2, "target": target}


def words(case: Case) -> str:
    return f"{DATA[case[0]]}, E = {case[1]}"


def table_of(found: Mapping[Case, list[Run]], target: float, most: int) -> str:
    fewest = min(epochs for _, epochs in found)
    head = ("data", "E", "rounds, seed by seed", "mean", f"of those of E = {fewest}")
    rows = []
    for (partition, epochs), runs in found.items():
        own, slow = mean_rounds(runs, target), mean_rounds(found[partition, fewest], target)
        each = (run.first_at(target) for run in runs)
        rows.append((
            DATA[partition],
            str(epochs),
            ", ".join(f"never in {most}" if number is None else str(number) for number in each),
            "–" if own is None else spread([run.first_at(target) or 0 for run in runs], ".1f"),
            "–" if own is None or slow is None else "1" if epochs == fewest else f"1/{slow / own:.1f}",
        ))  # fmt: skip
    return table(head, rows)


def mean_rounds(runs: list[Run], target: float) -> float | None:
    """None where a seed never got there: a mean over the others would flatter."""
    numbers = [number for run in runs if (number := run.first_at(target)) is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(runs) else None


def draw(axes, found: Mapping[Case, list[Run]], target: float) -> None:
    """A line a seed, which ends where the job did."""
    for at, (case, runs) in enumerate(found.items()):
        for run in runs:
            x, y = [point.round for point in run.points], [point.accuracy for point in run.points]
            axes.plot(x, y, color=f"C{at}", linewidth=1, alpha=0.8, label=words(case) if run is runs[0] else None)
    axes.axhline(target, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="round", ylabel="test accuracy", xscale="log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(loc="lower right", fontsize="small")


if __name__ == "__main__":
    main()
