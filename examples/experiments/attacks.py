"""Robust rules under attack: how well a model learns when 2 of 10 workers send what they like.

    python examples/experiments/attacks.py                  prints a table in Markdown; a few minutes on two cores
    python examples/experiments/attacks.py --plot bars.png  and draws it; needs matplotlib
    python examples/experiments/attacks.py --sorted         each worker has the data of two labels
    python examples/experiments/attacks.py --bad 1 --rounds 30 --seeds 7

Training is done here, in one process, one worker after the other; what becomes of the updates is the coordinator's own
code, over real files: server.inspection, server.outliers, server.folding. The data are scikit-learn's digits, cut into
equal random shards, or sorted by label first; the model is one hidden layer of 32. As in a job, a shard whose update is
refused on arrival (NaN) is trained by an honest worker. A worker is not set aside here, however often it is refused:
the attack never ends.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from runs import spread
from torch import nn

from common.errors import BadUpdateError
from common.facts import Accepted
from common.robustness import least_updates
from common.tasks import digits
from common.weights import Notes, file_digest, load, save
from server import folding, outliers
from server.inspection import inspect
from server.optimizers import FedAvg
from server.robust_rules import Rule

Arrays = dict[str, np.ndarray]
Change = Callable[[Arrays, Arrays, np.random.Generator], Arrays]

KAPPA = 5.0  # of the guard
STEPS, BATCH, LR = 8, 32, 0.5  # of a worker in a round


def sign_flip(base: Arrays, trained: Arrays, _: np.random.Generator) -> Arrays:
    return {name: base[name] - np.float32(10) * (trained[name] - base[name]) for name in base}


def noise(base: Arrays, trained: Arrays, chance: np.random.Generator) -> Arrays:
    """Ten times as long as the honest change, in any direction."""
    drawn = {name: chance.normal(size=array.shape) for name, array in base.items()}
    scale = 10 * length({name: trained[name] - base[name] for name in base}) / length(drawn)
    return {name: (base[name] + scale * drawn[name]).astype(np.float32) for name in base}


def not_a_number(base: Arrays, _: Arrays, __: np.random.Generator) -> Arrays:
    return {name: np.full_like(array, np.nan) for name, array in base.items()}


def length(arrays: Arrays) -> float:
    return float(np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in arrays.values())))


ATTACKS: dict[str, Change | None] = {  # None: by its data alone
    "no attack": None,
    "sign flip ×10": sign_flip,
    "noise ×10": noise,
    "NaN": not_a_number,
    "label flip": None,
}
RULES = ("none", "none + guard", "clip", "trimmed", "median", "krum", "multikrum", "bulyan", "rfa", "centered_clip")


class Workers:
    """The data of all workers, and training."""

    def __init__(self, count: int, seed: int, *, by_label: bool = False) -> None:
        train, self.test = (digits.dataset({}, split).tensors for split in ("train", "test"))
        chance = np.random.default_rng(seed)
        pieces = np.array_split(chance.permutation(len(train[0])), count)
        if by_label:  # two runs of the sorted samples each. Source: McMahan et al. 2017, section 3
            runs = np.array_split(np.argsort(train[1].numpy(), kind="stable"), 2 * count)
            pairs = chance.permutation(2 * count).reshape(-1, 2)
            pieces = [np.concatenate([runs[at] for at in pair]) for pair in pairs]
        self.shards, self.by_label = [tuple(part[piece] for part in train) for piece in pieces], by_label
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def arrays(self) -> Arrays:
        return {name: tensor.detach().numpy().copy() for name, tensor in self.model.state_dict().items()}

    def take(self, arrays: Arrays) -> None:
        self.model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})

    def train(self, worker: int, base: Arrays, chance: np.random.Generator, *, flipped: bool) -> Arrays:
        """A few steps of SGD from the base; `flipped`: as if every 0 were a 9, every 1 an 8, and so on."""
        self.take(base)
        x, y = self.shards[worker]
        optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
        for _ in range(STEPS):
            drawn = chance.integers(0, len(x), BATCH)
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x[drawn]), 9 - y[drawn] if flipped else y[drawn]).backward()
            optimizer.step()
        return self.arrays()

    @torch.no_grad()
    def accuracy(self, arrays: Arrays) -> float:
        self.take(arrays)
        return float((self.model(self.test[0]).argmax(dim=1) == self.test[1]).float().mean())


def run(rule: str, attack: str, workers: Workers, bad: int, rounds: int, seed: int, folder: Path) -> float:
    """The accuracy on the test split after the last round."""
    guarded, name = rule.endswith("guard"), rule.split(maxsplit=1)[0]
    robust = None if name == "none" else Rule(name, bad)
    chance = np.random.default_rng(seed)
    workers = Workers(len(workers.shards), seed, by_label=workers.by_label)
    base, memory = folder / "model", folding.Memory()
    save(base, workers.arrays(), Notes())
    for number in range(rounds):
        updates = []
        for worker in range(len(workers.shards)):
            update = folder / f"update{worker}"
            updates.append((update, send(update, base, worker, attack if worker < bad else "", workers, chance)))
        if guarded:
            accepted = [stand_in(number, at, norm) for at, (_, norm) in enumerate(updates)]
            refused = outliers.guard(accepted, (), KAPPA, 1).refused
            updates = [update for at, update in enumerate(updates) if (number, at) not in refused]
        states = tuple(folder / f"state{number}" for _ in range(robust.states if robust else 0))
        targets, rules = folding.Targets(folder / "next", states), folding.Rules(FedAvg(), robust=robust)
        folding.average(base, [(path, 1) for path, _ in updates], targets, rules=rules, memory=memory, threads=1)
        (folder / "next").rename(base)
        memory = folding.Memory(states)
    return workers.accuracy(load(base))


def send(
    update: Path, base: Path, worker: int, attack: str, workers: Workers, chance: np.random.Generator
) -> float | None:
    """Train, spoil, write, and have it looked at; what is refused is trained by an honest worker. Returns its norm."""
    start = load(base)
    trained = workers.train(worker, start, chance, flipped=attack == "label flip")
    change = ATTACKS.get(attack)
    save(update, change(start, trained, chance) if change else trained, Notes())
    try:
        return inspect(update, base, digest=file_digest(update), norm_bound=None, measured=True).norm
    except BadUpdateError:
        return send(update, base, worker, "", workers, chance)


def stand_in(number: int, shard: int, norm: float | None) -> Accepted:
    """What the guard is told of an update."""
    return Accepted(
        round=number, shard=shard, attempt=1, worker=f"w{shard}", worker_name=f"w{shard}", digest="0" * 64, samples=1,
        steps=STEPS, seconds=0, metrics={}, bytes_down=0, bytes_up=0, norm=norm,
    )  # fmt: skip


def table(found: dict[str, dict[str, list[float]]], notes: Iterable[str]) -> str:
    """Means over the seeds, and the standard deviation where there are several."""
    lines = [f"| rule | {' | '.join(ATTACKS)} |", f"|---|{'--:|' * len(ATTACKS)}"]
    for rule, cells in found.items():
        percent = ([100 * accuracy for accuracy in cells[attack]] for attack in ATTACKS)
        lines.append(f"| {rule} | {' | '.join(spread(each, '.1f') for each in percent)} |")
    return "\n".join([*lines, "", *notes])


def draw(found: dict[str, dict[str, list[float]]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 4))
    width = 0.8 / len(ATTACKS)
    for at, attack in enumerate(ATTACKS):
        places = [row + (at - len(ATTACKS) / 2 + 0.5) * width for row in range(len(found))]
        axes.bar(places, [100 * statistics.fmean(cells[attack]) for cells in found.values()], width, label=attack)
    axes.set_xticks(range(len(found)), list(found))
    axes.set_ylabel("accuracy, %")
    axes.legend(ncols=len(ATTACKS), loc="lower center", fontsize="small")
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description="Robust rules under attack.")
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--bad", type=int, default=2, help="how many of them attack")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sorted", action="store_true", help="two labels a worker, in place of equal random shards")
    parser.add_argument("--rules", nargs="+", default=RULES, choices=RULES)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the table too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found, notes, began = dict[str, dict[str, list[float]]](), list[str](), time.monotonic()
    with TemporaryDirectory() as folder:
        for rule in given.rules:
            needs = least_updates(rule.split()[0], given.bad, None)
            count = max(given.workers, needs)
            if count > given.workers:
                notes.append(f"{rule} needs {needs} updates against {given.bad}, and has {count} workers here.")
            workers = Workers(count, 0, by_label=given.sorted)
            one = partial(run, rule, workers=workers, bad=given.bad, rounds=given.rounds, folder=Path(folder))
            found[rule] = {attack: [one(attack, seed=seed) for seed in given.seeds] for attack in ATTACKS}
            print(f"{rule}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    said = f"Accuracy in % after {given.rounds} rounds; {given.bad} of {given.workers} workers attack"
    said += f"; {'two labels a worker' if given.sorted else 'equal random shards'}; seeds {given.seeds}"
    print(f"{said}; guard: norm_outlier = {KAPPA:g}.\n\n{table(found, notes)}")
    if given.plot is not None:
        draw(found, given.plot)


if __name__ == "__main__":
    main()
