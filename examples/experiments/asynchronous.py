"""Synchronous against asynchronous rounds on unlike machines: seconds to a target, and the accuracy after a fixed time.

    python examples/experiments/asynchronous.py [--seeds 5] [--json]

The clock is simulated and every choice is seeded, so the same command prints the same numbers. Who trains what, when a
round closes and what an update weighs is decided by the coordinator's own round machine (server.rounds). The training
is real, a small network on scikit-learn's digits, in numpy; only its duration is made up: samples over the worker's
speed, and a fixed time for the way to the coordinator and back.
"""

import argparse
import heapq
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from sklearn.datasets import load_digits

from common.facts import Accepted, Initialised, Submitted
from common.messages import JobSpec, ModelFacts, ModelRef
from common.sharding import order_of
from server import rounds
from server.buffering import Batch
from server.cutting import Place
from server.rounds import Task

WAY_S = 1.0  # simulated seconds of a task that are not training: transfers and calls
RATE = 100.0  # samples a second of speed 1
AVERAGING_S, AVERAGED = 0.2, "averaged"
HORIZON_S = 300.0  # until when accuracy is measured
TARGET = 0.93
BATCH, LR, HIDDEN = 32, 0.1, 32

FLEETS = {
    "four alike": (1.0, 1.0, 1.0, 1.0),
    "one slow": (1.0, 1.0, 1.0, 0.2),
    "all unlike": (1.0, 0.5, 0.25, 0.1),
}
SYNC = {"min_workers": 4, "evaluate_every": 0}
ASYNC = {**SYNC, "mode": "async"}
WAYS = {
    "sync, equal shards": {"data": {"shards": 4}, "round": SYNC},
    "sync, by speed": {"data": {"shards": "auto"}, "round": SYNC},
    "sync, quorum 0.75": {"data": {"shards": 4}, "round": {**SYNC, "quorum": 0.75}},
    "async": {"data": {"shards": "auto"}, "round": ASYNC},
    "async, buffer 4": {"data": {"shards": "auto"}, "round": {**ASYNC, "buffer": 4}},
    "private data, sync": {"data": {"partition": "local"}, "round": SYNC},
    "private data, async": {"data": {"partition": "local"}, "round": ASYNC},
}
Model = dict[str, np.ndarray]


# ---------------------------------------------------------------- what is trained


@dataclass(frozen=True)
class Digits:
    """The data: every fifth sample is for the test. Of private data, each of four workers has its own classes."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray

    @classmethod
    def load(cls):
        """From scikit-learn's own file."""
        x, y = load_digits(return_X_y=True)
        x, test = x / 16.0, np.arange(len(y)) % 5 == 0
        return cls(x[~test], y[~test], x[test], y[test])

    def accuracy(self, model):
        """Share of the test samples that are named right."""
        hidden = np.maximum(self.test_x @ model["w1"] + model["b1"], 0)
        return float(np.mean((hidden @ model["w2"] + model["b2"]).argmax(1) == self.test_y))


def fresh(seed):
    """The first model."""
    chance = np.random.default_rng(seed)
    return {
        "w1": chance.normal(scale=0.2, size=(64, HIDDEN)),
        "b1": np.zeros(HIDDEN),
        "w2": chance.normal(scale=0.2, size=(HIDDEN, 10)),
        "b2": np.zeros(10),
    }


def train(base, x, y, seed):
    """One epoch of SGD on cross-entropy."""
    model = {name: values.copy() for name, values in base.items()}
    order = np.random.default_rng(seed).permutation(len(y))
    for first in range(0, len(y), BATCH):
        at = order[first : first + BATCH]
        hidden = np.maximum(x[at] @ model["w1"] + model["b1"], 0)
        scores = hidden @ model["w2"] + model["b2"]
        chances = np.exp(scores - scores.max(1, keepdims=True))
        slope = chances / chances.sum(1, keepdims=True)
        slope[np.arange(len(at)), y[at]] -= 1
        slope /= len(at)
        back = (slope @ model["w2"].T) * (hidden > 0)
        steps = {"w1": x[at].T @ back, "b1": back.sum(0), "w2": hidden.T @ slope, "b2": slope.sum(0)}
        for name, step in steps.items():
            model[name] -= LR * step
    return model


# ---------------------------------------------------------------- one job, by a simulated clock


@dataclass
class Fleet:
    """Workers of given speeds, and a coordinator that is the round machine alone."""

    digits: Digits
    speeds: tuple[float, ...]
    keys: dict
    seed: int
    now: float = 0.0
    models: dict[str, Model] = field(default_factory=dict)
    updates: dict[str, Model] = field(default_factory=dict)
    held: dict[str, Task] = field(default_factory=dict)
    events: list = field(default_factory=list)
    begun: int = 0

    def run(self) -> Iterator[tuple[float, float]]:
        """(seconds, accuracy) of each version, until the time is up."""
        self._start()
        while self.events:
            self.now, _, worker, task = heapq.heappop(self.events)
            if self.now > HORIZON_S:
                return
            if worker == AVERAGED:
                yield self.now, self._average()
            elif task is not None and self.held.get(worker) == task:
                self._hand_in(worker, task)
            self._look()

    @property
    def names(self):
        """Of the workers."""
        return [f"w{at}" for at in range(len(self.speeds))]

    def _do(self, step):
        for fact in step.facts:
            self.job = rounds.evolve(self.job, fact, self.now)
        return step.facts

    def _places(self):
        return [Place(name, name, rate=speed * RATE) for name, speed in zip(self.names, self.speeds, strict=True)]

    def _start(self):
        spec = JobSpec.model_validate({"task": "digits", "rounds": 100_000, "seed": self.seed, **self.keys})
        self.job, data = rounds.new_job("job", Submitted(spec=spec, key="k")), spec.data
        self._do(rounds.begin(self.job, self.names, len(self.names)))
        self._do(rounds.hand_out(self.job, Task("init", 0), self.names[0]))
        private, total = data.partition == "local", len(self.digits.y)
        shards = len(self.speeds) if data.shards == "auto" else data.shards
        kind = "labels" if private else "iid"
        cut = order_of(
            kind, total=total, shards=shards, seed=self.seed, labels=self.digits.y, labels_per_shard=3, alpha=1.0
        )
        self.order, self.own = cut.order, list(pairwise(cut.bounds))
        self.models[_digest(0)] = fresh(self.seed)
        facts = ModelFacts(parameters=1, train_samples=total, test_samples=0, bounds=() if private else cut.bounds)
        made = Initialised(attempt=1, worker=self.names[0], digest=_digest(0), size=1, facts=facts)
        self._do(rounds.take_init(self.job, made, self._places(), self.now))
        self._look()

    def _look(self):
        """Close what is due, and give work to whoever has none."""
        step = rounds.close_if_due(self.job, self.names, self.now)
        if self._do(step):
            self._later(AVERAGING_S, AVERAGED)
        elif step.look_again_at is not None:
            self._later(step.look_again_at - self.now)
        for worker in self.names:
            if worker in self.held and not rounds.is_open(self.job, self.held[worker]):
                del self.held[worker]  # it is told to drop that
            if worker not in self.held:
                self._ask(worker)

    def _ask(self, worker):
        coming = {name: name not in self.held for name in self.names} if self.job.spec.data.shards == "auto" else {}
        task = rounds.next_task(self.job, worker, rounds.Held(self.held.values()), coming)
        if task is None:
            return
        self._do(rounds.hand_out(self.job, task, worker))
        self.held[worker] = task
        speed = self.speeds[self.names.index(worker)]
        self._later(WAY_S + len(self._samples(task)) / (speed * RATE), worker, task)

    def _later(self, seconds, worker="", task=None):
        """What ends then: a worker's task, or averaging; else there is something to look at. Ties go by who began."""
        self.begun += 1
        heapq.heappush(self.events, (self.now + seconds, self.begun, worker, task))

    def _samples(self, task):
        shard = rounds.subject_of(self.job, task)[1]
        start, stop = (shard.start, shard.stop) if shard.worker is None else self.own[self.names.index(shard.worker)]
        return self.order[start:stop]

    def _hand_in(self, worker, task):
        at, base = self._samples(task), rounds.subject_of(self.job, task)[0]
        seed = [self.seed, task.round, task.shard]
        digest = _digest(10**9 + len(self.updates))
        self.updates[digest] = train(self.models[base.digest], self.digits.x[at], self.digits.y[at], seed)
        update = Accepted(
            round=task.round, shard=task.shard, attempt=rounds.tries_of(self.job, task).attempt, worker=worker,
            worker_name=worker, digest=digest, samples=len(at), steps=1, seconds=1.0, metrics={}, bytes_down=0,
            bytes_up=0,
        )  # fmt: skip
        del self.held[worker]
        self._do(rounds.take_update(self.job, update))

    def _average(self):
        """The next version: x + Σ n s Δ / Σ n, which with every s = 1 and one base is FedAvg."""
        batch = rounds.frozen_of(self.job)
        stale = isinstance(batch, Batch)
        factors = [one.factor for one in batch.members] if stale else [1.0] * len(batch.accepted)
        bases = batch.bases if stale else [batch.base] * len(batch.accepted)
        total = sum(update.samples for update in batch.accepted)
        model = {name: values.copy() for name, values in self.models[batch.base.digest].items()}
        for update, factor, base in zip(batch.accepted, factors, bases, strict=True):
            for name, values in self.updates[update.digest].items():
                model[name] += update.samples * factor * (values - self.models[base.digest][name]) / total
        made = ModelRef(digest=_digest(batch.round), size=1)
        self.models[made.digest] = model
        self._do(rounds.close(self.job, made, seconds=1.0, places=self._places(), now=self.now))
        return self.digits.accuracy(model)


def _digest(number):
    return f"{number:064x}"


# ---------------------------------------------------------------- what comes out


def measure(digits, speeds, keys, seeds):
    """Medians over seeds: seconds to the target (None: not reached in time), last accuracy, versions made."""
    reached, last, made = [], [], []
    for seed in range(seeds):
        found = list(Fleet(digits, speeds, keys, seed).run())
        reached.append(next((at for at, accuracy in found if accuracy >= TARGET), float("inf")))
        last.append(found[-1][1])
        made.append(len(found))
    median = statistics.median(reached)
    return {
        "to_target_s": None if median == float("inf") else round(median, 1),
        "accuracy": round(statistics.median(last), 4),
        "versions": round(statistics.median(made)),
    }


def main():
    """Run every way on every fleet, and print a table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--json", action="store_true")
    given, digits = options.parse_args(), Digits.load()
    rows = [
        {"fleet": fleet, "way": way, **measure(digits, speeds, keys, given.seeds)}
        for fleet, speeds in FLEETS.items()
        for way, keys in WAYS.items()
    ]
    if given.json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    sys.stdout.write(f"{'fleet':12}{'way':22}{f's to {TARGET:.0%}':>12}{f'at {HORIZON_S:.0f} s':>10}{'versions':>10}\n")
    for row in rows:
        seconds = "never" if row["to_target_s"] is None else f"{row['to_target_s']:.1f}"
        line = f"{row['fleet']:12}{row['way']:22}{seconds:>12}{row['accuracy']:>10.1%}{row['versions']:>10}\n"
        sys.stdout.write(line)


if __name__ == "__main__":
    main()
