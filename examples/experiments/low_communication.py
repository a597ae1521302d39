"""Accuracy against the bytes that workers send, with the same number of gradient steps each way.

    python examples/experiments/low_communication.py                   prints a table in Markdown
    python examples/experiments/low_communication.py --plot bytes.png  and draws the curves; needs matplotlib
    python examples/experiments/low_communication.py --quick           does it run at all?

Two virtual workers with halves of Fashion-MNIST's first 12,000 pictures; one hidden layer of 64; SGD, batches of 32.
Bytes are those of the updates that both sent, as every closed round reports them. What is fetched is encoded the same
way, as much for each, and is not counted: the two share a process, which fetches once. They do so that what an encoded
update left out is at hand whichever of the two has the shard, and they train one after the other: so the same command
prints the same numbers. All but the first way train 50 steps a round; that one, which has 50 times the rounds, runs
with the first seed alone.
"""

import statistics
from collections.abc import Mapping

from runs import Run, drawn, parser_of, simulate, spread, table

WORKERS, BATCH, LOCAL_STEPS = 2, 32, 50
EVERY_STEP = "data-parallel, every step"
DILOCO = {"aggregation.algorithm": "diloco"}
TOPK = {"aggregation.update": "topk"}
BARE = {"aggregation.feedback": False}
WAYS: dict[str, dict[str, object]] = {
    EVERY_STEP: {"train.local_steps": 1},
    "local SGD": {},
    "local SGD, topk": TOPK,
    "local SGD, topk, no feedback": {**TOPK, **BARE},
    "diloco": DILOCO,
    "diloco, int4": {**DILOCO, "aggregation.update": "int4"},
    "diloco, topk": {**DILOCO, **TOPK},
    "diloco, topk, no feedback": {**DILOCO, **TOPK, **BARE},
}
EVALUATIONS = 10  # a run


def main() -> None:
    parser = parser_of(__doc__, rounds=40)
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate of the workers (default 0.05)")
    parser.add_argument(
        "--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY", help="; ".join(WAYS)
    )
    given = parser.parse_args()
    seeds, rounds = (given.seeds[:1], 1) if given.quick else (given.seeds, given.rounds)
    found: dict[str, list[Run]] = {}
    for seed in seeds:
        for way in (way for way in given.ways if way != EVERY_STEP or seed == seeds[0]):
            settings = settings_of(way, given.lr, rounds)
            run = simulate(
                way, settings, clients=WORKERS, fraction=1.0, rounds=rounds_of(way, rounds), seed=seed, given=given,
                options=("--processes", "1", "--stack", "off"),
            )  # fmt: skip
            found.setdefault(way, []).append(run)
    steps = rounds * LOCAL_STEPS
    print(f"{steps:,} steps of each of {WORKERS} workers, {LOCAL_STEPS} a round; lr {given.lr:g}; seeds {seeds}.\n")
    print(table_of(found))
    with drawn(given.plot) as axes:
        if axes is not None:
            draw(axes, found)


def settings_of(way: str, lr: float, rounds: int) -> dict[str, object]:
    settings = {"train.local_steps": LOCAL_STEPS, "train.batch_size": BATCH, "train.lr": lr}
    every = max(rounds_of(way, rounds) // EVALUATIONS, 1)
    return {**settings, "round.evaluate_every": every, **WAYS[way]}


def rounds_of(way: str, rounds: int) -> int:
    """As many as make the same number of steps."""
    return rounds * LOCAL_STEPS // int(WAYS[way].get("train.local_steps", LOCAL_STEPS))


def table_of(found: Mapping[str, list[Run]]) -> str:
    most = mean_bytes(next(iter(found.values())))
    rows = []
    for way, runs in found.items():
        moved = mean_bytes(runs)
        rows.append((
            way,
            f"{runs[0].last.round:,}",
            str(len(runs)),
            spread([run.last.accuracy for run in runs]),
            f"{moved / 1e6:,.3f}",
            "1" if moved == most else f"1/{most / moved:,.0f}",
        ))  # fmt: skip
    return table(("way", "rounds", "seeds", "accuracy", "MB up", "of the first"), rows)


def mean_bytes(runs: list[Run]) -> float:
    return statistics.mean(run.last.bytes_up for run in runs)


def draw(axes, found: Mapping[str, list[Run]]) -> None:
    """The mean over the seeds, and from the worst to the best of them."""
    for at, (way, runs) in enumerate(found.items()):
        columns = list(zip(*(run.points for run in runs), strict=True))
        bytes_ = [statistics.mean(point.bytes_up for point in column) for column in columns]
        each = [[point.accuracy for point in column] for column in columns]
        axes.plot(bytes_, [statistics.mean(some) for some in each], color=f"C{at}", marker=".", label=way)
        axes.fill_between(bytes_, [min(some) for some in each], [max(some) for some in each], color=f"C{at}", alpha=0.2)
    axes.set(xlabel="bytes up", ylabel="test accuracy", xscale="log")
    axes.legend(loc="lower right", fontsize="small")


if __name__ == "__main__":
    main()
