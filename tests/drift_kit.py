"""A job with `train.drift` on a stage: the round machine and the files of the coordinator are real, training is played.

A shard's loss is a sum of squares, a/2·(w − b)² for each number w, so that a round can be worked out with a pencil.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.codecs import Codec, codec
from common.deltas import encode_update
from common.drift import alpha_of
from common.facts import Accepted
from common.messages import ModelRef, Slots
from common.slots import Carried, write_correction
from common.weights import Array, Notes, file_digest, load, save
from server import drift, rounds, versions
from server.blobs import Blobs
from server.rounds import Task
from tests.rounds_kit import Play, at, spec

MODEL: dict[str, Array] = {
    "w": np.array([0.5, -1.0, 2.0], np.float32),
    "v": np.array([[1.0], [0.0]], np.float32),
    "running": np.array([3.0], np.float32),  # a buffer: nothing is corrected, nothing carried
    "steps": np.array(7, np.int64),
}
NOTES = Notes(buffers=("running",))
TRAINED = ("v", "w")  # in the order of the file
NUMBERS = 5  # that are trained


@dataclass(frozen=True)
class Loss:
    """a/2·(w − b)² for each trained number: its gradient is a·(w − b)."""

    a: float
    b: float


class Stage:
    """One job. A round is played by naming the shards whose updates count."""

    def __init__(
        self, folder: Path, losses: Mapping[int, Loss], *, lr: float = 0.1, steps: int = 2, **keys: Any
    ) -> None:
        self.blobs = Blobs(folder, reserve_bytes=0)
        train = {"lr": lr, "local_steps": steps, **keys.pop("train")}
        given = {"data": {"shards": len(losses)}, "rounds": 50, "train": train, **keys}
        self.play, self.losses = Play(spec(**given)), losses
        self.lr, self.steps, self.folder = lr, steps, folder
        self.play.begin("a", "b")
        self.play.init(total=10 * len(losses), bounds=[10 * k for k in range(len(losses) + 1)])
        self._put_first_model()
        self.codec: Codec | None = None
        if (update := self.play.job.spec.aggregation.update) != "fp32":
            self.codec = codec(update)

    def _put_first_model(self) -> None:
        path = self.folder / "first"
        save(path, MODEL, NOTES)
        ref = ModelRef(digest=file_digest(path), size=path.stat().st_size)
        self.blobs.adopt(path, ref.digest, durable=False)
        job = self.play.job
        assert isinstance(job.phase, rounds.Training)
        self.play.job = rounds.replace(job, model=ref, phase=rounds.replace(job.phase, base=ref))

    @property
    def job(self) -> rounds.Job:
        return self.play.job

    @property
    def open(self) -> rounds.Training:
        assert isinstance(self.job.inner, rounds.Training)
        return self.job.inner

    # ------------------------------------------------------------ a worker

    def slots(self, shard: int) -> Slots:
        given = drift.slots_for(self.job, self.open.shards[shard], 4 * NUMBERS)
        assert given is not None
        return given

    def correction(self, shard: int) -> Array:
        """What the shard adds to its gradients, as the child reads it, in the order of the file."""
        if self.job.spec.train.drift == "none":
            return np.zeros(NUMBERS, np.float32)
        given = self.slots(shard)
        own, total = (None if digest is None else self.blobs.path(digest) for digest in (given.own, given.total))
        method: Any = self.job.spec.train.drift
        target = self.folder / "correction"
        write_correction(self.blobs.path(self.open.base.digest), Carried(method, given.shards, own, total), target)
        made = load(target)
        return np.concatenate([made[name].ravel() for name in TRAINED])

    def trained(self, shard: int, gradient: Callable[[Array], Array] | None = None) -> dict[str, Array]:
        """The model after the shard's steps, float64 on the way."""
        base = load(self.blobs.path(self.open.base.digest))
        start = np.concatenate([base[name].ravel() for name in TRAINED]).astype(np.float64)
        loss, added = self.losses[shard], self.correction(shard).astype(np.float64)
        train = self.job.spec.train
        pull = alpha_of(train) if train.drift == "feddyn" else 0.0
        here = start.copy()
        for _ in range(self.steps):
            slope = loss.a * (here - loss.b) if gradient is None else gradient(here)
            here = here - self.lr * (slope + added + pull * (here - start))
        size = base["v"].size
        changed = {"v": here[:size].reshape(base["v"].shape), "w": here[size:]}
        return {**base, **{name: values.astype(np.float32) for name, values in changed.items()}}

    def hand_in(self, shard: int, arrays: Mapping[str, Array], rate_sum: float | None = None) -> Accepted:
        """An update that counts."""
        job, path = self.job, self.folder / f"update{shard}"
        save(path, arrays, NOTES)
        if self.codec is not None:
            encoded = self.folder / f"encoded{shard}"
            encode_update(self.blobs.path(self.open.base.digest), path, encoded, self.codec)
            path = encoded
        digest = file_digest(path)
        self.blobs.adopt(path, digest, durable=False)
        task = Task("train", self.open.round, shard)
        self.play.give(task, self.open.shards[shard].worker or "a")
        update = self.play.update(shard, "a", attempt=rounds.tries_of(self.job, task).attempt)
        rates = self.steps * self.lr if rate_sum is None else rate_sum
        update = update.model_copy(
            update={"digest": digest, "rate_sum": rates if job.spec.train.drift != "none" else None}
        )
        self.play.do(rounds.take_update(self.job, update))
        return update

    # ------------------------------------------------------------ the coordinator

    def freeze(self) -> rounds.Aggregating:
        """Freeze the round with what has come."""
        phase = self.open
        fact = rounds.Frozen(round=phase.round, shards=tuple(sorted(phase.accepted)), reason="")
        self.play.do(rounds.Step((fact,), ""))
        assert isinstance(self.job.inner, rounds.Aggregating)
        return self.job.inner

    def average(self, phase: rounds.Aggregating) -> versions.Version:
        return versions.make(self.job, phase, self.blobs, lambda: False)

    def close(self, made: versions.Version, *, places: Sequence[str] = ("a", "b")) -> None:
        step = rounds.close(
            self.job, made.model, memory=made.memory, slots=made.slots, slot_total=made.slot_total, fresh=made.fresh,
            seconds=1.0, places=at(*places), now=0.0,
        )  # fmt: skip
        self.play.do(step)

    def round(self, shards: Collection[int], *, order: Sequence[int] | None = None) -> versions.Version:
        """Train these shards and close the round without the others."""
        for shard in order or sorted(shards):
            self.hand_in(shard, self.trained(shard))
        made = self.average(self.freeze())
        self.close(made)
        return made

    # ------------------------------------------------------------ what there is

    def model(self) -> Array:
        assert self.job.model is not None
        arrays = load(self.blobs.path(self.job.model.digest))
        return np.concatenate([arrays[name].ravel() for name in TRAINED])

    def slot(self, key: str) -> Array:
        digest = self.job.slots.get(key)
        return np.zeros(NUMBERS, np.float32) if digest is None else self.numbers(digest)

    def total(self) -> Array:
        """The sum of all slots, float64."""
        return sum((self.numbers(digest).astype(np.float64) for digest in self.job.slot_total), np.zeros(NUMBERS))

    def numbers(self, digest: str) -> Array:
        return np.fromfile(self.blobs.path(digest), np.float32)
