"""Federated averaging with nothing around it: one process, one loop, no coordinator, no HTTP, no files between rounds.

The yardstick for correctness. It shares with the product only what a job fixes: the task file, the cut of the training
set, the seeds and the order of samples that follow from them. Training and averaging are written out here once more, as
the paper has them; so a job that ends with other bits than this loop has a fault somewhere between the two.

    python -m bench.reference fashion-mnist --rounds 5 --shards 4 --lr 0.05 --batch-size 64 --compare MODEL.safetensors
"""

import argparse
import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from common.messages import JobSpec
from common.sharding import Partition, derived_seed, order_of
from common.tasks import BUILTIN
from common.weights import load
from worker.plan import init_seed
from worker.task_host import pass_order, seed_everything

START_S = 600.0  # that processes wait for each other: for the slowest one's round

State = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Round:
    """What a round of the plain loop came to."""

    number: int
    seconds: float
    accuracy: float
    state: State


@dataclass(frozen=True)
class _Ready:
    """A job with its data in memory."""

    spec: JobSpec
    model: torch.nn.Module
    train: tuple[torch.Tensor, ...]
    test: tuple[torch.Tensor, ...]
    cut: Partition

    def shard(self, state: State, number: int, shard: int) -> tuple[State, int]:
        """Train one shard from a state in round `number`: what it came to, and its samples."""
        samples = torch.from_numpy(self.cut.order[self.cut.bounds[shard] : self.cut.bounds[shard + 1]].copy())
        _restore(self.model, state)
        _train(self.model, self.train, samples, self.spec, derived_seed(self.spec.seed, "train", number, shard))
        return _state(self.model), len(samples)


def fedavg(spec: JobSpec) -> Iterator[Round]:
    """Train a built-in task of float32 tensors by plain FedAvg; one CPU thread.

    Source: McMahan et al. 2017, arXiv 1602.05629, algorithm 1.
    """
    ready = _prepared(spec)
    state = _state(ready.model)
    for number in range(1, spec.rounds + 1):
        began = time.perf_counter()
        state = _mean([ready.shard(state, number, shard) for shard in range(int(spec.data.shards))])
        _restore(ready.model, state)
        yield Round(number, time.perf_counter() - began, _accuracy(ready.model, ready.test), state)


def together(spec: JobSpec, processes: int) -> list[float]:
    """Seconds of each round of the same training where the shards are dealt to processes, a core each.

    What the machine can do at best: nothing is sent and nothing averaged, and a round is over with its last process.
    """
    context, shards = multiprocessing.get_context("spawn"), range(int(spec.data.shards))
    start = context.Barrier(processes)
    with ProcessPoolExecutor(processes, context, initializer=_meet_at, initargs=(start,)) as pool:
        parts = [pool.submit(_part, spec, shards[at::processes]) for at in range(processes)]
        return [max(seconds) for seconds in zip(*(part.result() for part in parts), strict=True)]


_starts = list[Barrier]()  # where the processes that train together wait for each other: one, in each of them


def _meet_at(start: Barrier) -> None:
    _starts.append(start)


def _part(spec: JobSpec, shards: range) -> list[float]:
    """Train some shards in each round, beside the other processes. Returns the seconds of each round."""
    ready, took = _prepared(spec), list[float]()
    state = _state(ready.model)
    for number in range(1, spec.rounds + 1):
        _starts[0].wait(START_S)
        began = time.perf_counter()
        for shard in shards:
            ready.shard(state, number, shard)
        took.append(time.perf_counter() - began)
    return took


def _prepared(spec: JobSpec) -> _Ready:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    task = BUILTIN[spec.task]
    module = _load(task.file)
    config = {**spec.train.model_dump(exclude_none=True), **task.config, **spec.config, "data": {}}
    seed_everything(init_seed(spec))
    model = module.model(config)
    train, test = module.dataset(config, "train").tensors, module.dataset(config, "test").tensors
    labels = train[1].numpy()
    cut = order_of(
        spec.data.partition,
        total=len(labels),
        shards=int(spec.data.shards),
        seed=spec.seed,
        alpha=spec.data.alpha,
        labels_per_shard=spec.data.labels_per_shard,
        labels=labels,
    )
    return _Ready(spec, model, train, test, cut)


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _state(model: torch.nn.Module) -> State:
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def _restore(model: torch.nn.Module, state: State) -> None:
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})


def _train(
    model: torch.nn.Module, data: tuple[torch.Tensor, ...], samples: torch.Tensor, spec: JobSpec, seed: int
) -> None:
    """Local epochs of SGD over the samples of one shard."""
    seed_everything(seed)
    model.train()
    rules = spec.train
    optimizer = torch.optim.SGD(
        model.parameters(), lr=rules.lr, momentum=rules.momentum, weight_decay=rules.weight_decay
    )
    for epoch in range(rules.local_epochs or 1):
        for chosen in pass_order(samples, seed, epoch).split(rules.batch_size):
            optimizer.zero_grad()
            cross_entropy(model(data[0][chosen]), data[1][chosen]).backward()
            optimizer.step()


def _mean(results: list[tuple[State, int]]) -> State:
    """Σ n_k w_k / N over whole arrays in float64."""
    total = sum(count for _, count in results)
    sums = {name: np.zeros(array.shape) for name, array in results[0][0].items()}
    for state, count in results:
        for name, array in state.items():
            sums[name] = sums[name] + array.astype(np.float64) * count
    return {name: (array / total).astype(results[0][0][name].dtype) for name, array in sums.items()}


def _accuracy(model: torch.nn.Module, test: tuple[torch.Tensor, ...]) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(test[0].split(500), test[1].split(500), strict=True)
        )
    return right / len(test[1])


def main() -> None:
    """Print the accuracy of every round; compare the last model with a pulled one."""
    parser = argparse.ArgumentParser(prog="python -m bench.reference", description=__doc__)
    parser.add_argument("task", choices=sorted(BUILTIN))
    for name, kind, value in (
        ("rounds", int, 5), ("shards", int, 4), ("seed", int, 0), ("local-epochs", int, 1), ("batch-size", int, 64),
        ("lr", float, 0.05), ("momentum", float, 0.0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=value)
    parser.add_argument("--compare", type=Path, metavar="FILE", help="a model that `lydian pull` wrote")
    chosen = parser.parse_args()
    train = {k: getattr(chosen, k) for k in ("local_epochs", "batch_size", "lr", "momentum")}
    job = {"task": chosen.task, "rounds": chosen.rounds, "seed": chosen.seed, "train": train}
    spec = JobSpec.model_validate({**job, "data": {"shards": chosen.shards}})
    last: State = {}
    for done in fedavg(spec):
        print(f"round {done.number}: accuracy {done.accuracy:.4f}, {done.seconds:.1f} s", flush=True)
        last = done.state
    if chosen.compare is not None:
        other = load(chosen.compare)
        differing = [name for name in last if other[name].tobytes() != last[name].tobytes()]
        print("equal bit for bit" if not differing else f"these tensors differ: {', '.join(differing)}")
        sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
