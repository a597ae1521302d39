"""Several processes that train one model together on the devices of one machine: started by torchrun, spoken to as one.

Part of the child (worker/task_host.py), which loads it by its path: torch and numpy, none of our packages.

    agent ◀─JSON lines─▶ rank 0 ◀──gloo──▶ rank 1 …     commands, votes, the gradients of CPUs
      │                    └─────NCCL────────┘          the gradients of GPUs
      └─ starts ─▶ task_host.py = torchrun, the parent of all ranks; tells the agent which one died

A global batch is the one that a single process would take. Each rank takes a part of it, its gradients count as much as
its part has samples, and the sum over the ranks is the gradient of the whole batch. An explicit sum, and not
DistributedDataParallel: that wants an equal step of every rank, where a batch may be smaller than the number of ranks;
it wraps the model that the task's own functions get to see; and it means over ranks, not samples. The price: the sum
begins when the backward pass has ended, and not during it.

No rank decides alone. Before each sum the ranks vote: who failed, whether the agent wants an end, whether the time is
up, how many samples each had. What one of them knows, all know at the same place, so an error ends the command for all
of them and they stay together. A vote is a few numbers over gloo, so that no GPU is waited for. A rank that dies ends
them all.
"""

import json
import math
import os
import queue
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

BUCKET = 1 << 22  # numbers that are summed at once: 16 MiB of float32
IDLE_S = 300.0  # between two signs of life that rank 0 gives the others while there is nothing to do
PATIENCE = timedelta(days=1)  # of one exchange; the agent ends a command that shows no progress long before
MISSING_EVERY_S = 10.0  # between two lines on who is missing at the start
LOOK_EVERY_S = 0.05  # between two looks at a file that grows without waking anybody up
LAST_WAIT_S = 30.0  # for torchrun to end a rank whose group broke: it knows better who died
EXIT_BROKEN = 70  # of a rank that lost the others, or could not keep up with them
EXIT_LEFT = 71  # of a rank whose script failed in the middle of what it does with the others
OWN_END_S = 5.0  # for rank 0 to fail for the same reason, and tell the agent itself
LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # the ranks are in one box, and nobody else has business with them

JOINT = frozenset({"open", "close", "train", "evaluate"})  # commands that every rank carries out


# ---------------------------------------------------------------- who trains what: pure


def devices_of(asked: str, count: Callable[[str], int]) -> list[str]:
    """The device of each rank; one alone where `asked` names one.

    Args:
        asked: `cuda:all`, `cuda:0,1`, `cuda:0,cuda:1`; `cpu:2` for two processes on the CPU; else one device.
        count: kind of device -> how many of them there are.

    Raises:
        ValueError: a GPU is named twice, or there is none of that kind, or it is no list of devices.
    """
    kind, _, number = asked.partition(":")
    if kind == "cpu" and number.isdigit():
        if not int(number):
            raise ValueError(f"{asked} names no process: cpu:N is N processes on the CPU, at least one")
        return ["cpu"] * int(number)
    if number == "all":
        found = count(kind)
        if not found:
            raise ValueError(f"there is no {kind} device that this torch can use")
        return [f"{kind}:{index}" for index in range(found)]
    if "," not in asked:
        return [asked]
    names = [part if ":" in part else f"{kind}:{part}" for part in asked.split(",")]
    for name in names:
        own_kind, _, index = name.partition(":")
        if own_kind != kind or kind == "cpu" or not index.isdigit():
            raise ValueError(f"{asked} is no list of GPUs of one kind: write e.g. cuda:0,1")
    if len(set(names)) < len(names):
        raise ValueError(f"{asked} names a device twice: two processes on one GPU only wait for each other")
    return names


def part_of_batch(samples: int, ranks: int, rank: int, least: int = 1) -> tuple[int, int]:
    """Which samples of a global batch a rank takes: [start, stop), empty where there are too few for all.

    Contiguous, in the order of the ranks, sizes that differ by one at most among those that take part.

    Args:
        samples: in the global batch, at least one.
        ranks: how many there are.
        rank: which one.
        least: samples that a part must have, where there are as many at all; BatchNorm cannot train on one.
    """
    taking = max(1, min(ranks, samples // least))
    size, more = divmod(samples, taking)
    start, stop = (min(taking, at) * size + min(at, more) for at in (rank, rank + 1))
    return start, stop


def in_buckets(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Cut a list of tensors into runs that are summed at once: whole tensors, in order, each run as long as may be.

    Args:
        sizes: elements of each tensor.
        limit: elements in a run; a larger tensor is a run of its own.

    Returns:
        the positions in each run.
    """
    runs: list[list[int]] = []
    room = 0
    for position, size in enumerate(sizes):
        if not runs or size > room:
            runs.append([])
            room = limit
        runs[-1].append(position)
        room -= size
    return runs


def step_seed(seed: int, number: int, batch: int, rank: int) -> int:
    """What a rank seeds its generators with before a batch, 63 bits: nothing else has to be in a checkpoint.

    Args:
        seed: of the command.
        number: of the pass.
        batch: in the pass.
        rank: of its own, or dropout would hide the same places in every part of a batch.
    """
    drawn = np.random.SeedSequence([seed, number, batch, rank]).generate_state(1, np.uint64)
    return int(drawn[0]) >> 1


def backends_for(device: str, *, nccl: bool) -> tuple[str, str]:
    """How ranks on this kind of device talk.

    Args:
        device: its kind.
        nccl: whether torch has NCCL (or RCCL, under the same name).

    Returns:
        what init_process_group takes, and the kind of device whose memory the sums are made in.
    """
    return ("cpu:gloo,cuda:nccl", "cuda") if device == "cuda" and nccl else ("gloo", "cpu")


# ---------------------------------------------------------------- one process


class Alone:
    """The usual child: one process, which is all of them. Each method is what `Ranks` makes of it with one rank."""

    rank = 0
    world = 1
    joint = False

    def __init__(self, stopping: threading.Event) -> None:
        self.stopping = stopping

    def commands(self, given: "queue.Queue[dict[str, Any]]") -> "queue.Queue[dict[str, Any]]":
        """Where commands come from."""
        return given

    def carry_out(
        self,
        name: str,  # noqa: ARG002
        work: Callable[..., dict[str, Any]],
        command: dict[str, Any],
        own_loop: str,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Carry out a command."""
        return work(**command)

    def begin(self, model: nn.Module) -> None:
        """Training begins."""

    def all_or_none(self, name: str) -> AbstractContextManager[None]:  # noqa: ARG002
        """Inside, what one of them raises is raised by all, at the end."""
        return nullcontext()

    def same(self, model: nn.Module) -> bool:  # noqa: ARG002
        """Whether all have the same model."""
        return True

    def of_script(self) -> AbstractContextManager[None]:
        """Inside, a script finds itself among those that train together, as torchrun has it."""
        return nullcontext()

    def leave(self, error: Any, tell: Callable[[Any], None]) -> None:  # noqa: ANN401
        """A script has failed where the others may wait for it."""

    def agree(self, what: str, *values: Any) -> None:  # noqa: ANN401
        """Make sure that all ranks are of one mind."""

    def first_rank_0(self, work: Callable[[], T]) -> T:
        """Have rank 0 do something before the others do."""
        return work()

    def part(self, batch: Tensor) -> Tensor:
        """What this rank takes of a global batch."""
        return batch

    def own_seed(self, seed: int) -> int:
        """A seed that no other rank has."""
        return seed

    def seed_step(self, seed: int, number: int, batch: int) -> None:
        """Seed the generators for a batch."""

    def mean(self, loss: Tensor | None, samples: int, elapsed: float, seconds: float | None) -> Any:  # noqa: ANN401, ARG002
        """Make the gradients those of the global batch, and return its loss."""
        return loss

    def time_is_up(self, elapsed: float, seconds: float) -> bool:
        """Whether training has lasted long enough."""
        return elapsed >= seconds

    def own_batches(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Which of the batches to evaluate are this rank's."""
        return parts

    def keep_pace(self) -> None:
        """Have the others know that another batch is measured."""

    def gathered(self, measured: list[T], parts: int) -> list[T]:  # noqa: ARG002
        """What all ranks measured, in the order of the batches."""
        return measured


# ---------------------------------------------------------------- several


@dataclass
class Vote:
    """What every rank said at one place."""

    stop: bool
    time_is_up: bool
    samples: list[int]
    failed: list[int]  # ranks
    marks: list[int]


@dataclass
class Shared:
    """What the ranks keep equal while they train one model."""

    parameters: list[nn.Parameter]
    floats: list[tuple[nn.Module, str, bool]]  # buffers: owner, name, whether every forward pass changes it
    whole: list[tuple[nn.Module, str, bool]]  # likewise, of whole numbers
    least: int  # samples in a part
    seen: dict[tuple[int, str], tuple[Tensor, int]] = field(default_factory=dict)  # buffer as it was last summed
    room: dict[torch.dtype, Tensor] = field(default_factory=dict)


class Commands:
    """Where a rank's commands come from: the agent by rank 0, all others from it."""

    def __init__(self, ranks: "Ranks", given: "queue.Queue[dict[str, Any]]") -> None:
        self._ranks, self._given = ranks, given

    def get(self) -> dict[str, Any]:
        """The next command, the same for all; while there is none, a sign of life from time to time."""
        while True:
            command = self._ranks.from_rank(0, json.dumps(self._next()).encode() if self._ranks.rank == 0 else b"")
            found: dict[str, Any] | None = json.loads(command)
            if found is not None:
                self._ranks.begin_command()
                return found

    def _next(self) -> dict[str, Any] | None:
        try:
            return self._given.get(timeout=IDLE_S)
        except queue.Empty:
            return None


class Stop:
    """Whether the agent wants an end: as voted where all work together, at once where rank 0 works alone."""

    def __init__(self, ranks: "Ranks", wanted: threading.Event) -> None:
        self._ranks, self._wanted = ranks, wanted

    def is_set(self) -> bool:
        """Whether to stop now."""
        return self._ranks.voted_stop if self._ranks.joint else self._wanted.is_set()


class Ranks(Alone):
    """One of several processes. In a command, all of them call the same methods in the same order."""

    def __init__(
        self,
        host: ModuleType,
        rank: int,
        world: int,
        wire: torch.device,
        wanted: threading.Event,
        store: Any = None,  # noqa: ANN401
    ) -> None:
        """Use `joined`.

        Args:
            host: task_host, whose errors these are.
            rank: this one.
            world: how many there are.
            wire: where sums are made: the device, or the CPU.
            wanted: set when the agent wants an end; rank 0 alone hears that.
            store: where a rank that leaves says why; torch's.
        """
        self._host, self._store = host, store
        self.rank, self.world = rank, world
        self._wire = wire
        self._wanted = wanted
        self._shared: Shared | None = None
        self._told = False  # a vote ended this command, and all know
        self.joint = False
        self.voted_stop = False
        self._time_is_up = False
        self.stopping: Any = Stop(self, wanted)

    # ------------------------------------------------------------ commands

    def commands(self, given: "queue.Queue[dict[str, Any]]") -> Any:  # noqa: ANN401
        """Where commands come from."""
        return Commands(self, given)

    def begin_command(self) -> None:
        """Forget what was voted on the one before."""
        self.voted_stop = self._time_is_up = self._told = False

    def carry_out(
        self, name: str, work: Callable[..., dict[str, Any]], command: dict[str, Any], own_loop: str
    ) -> dict[str, Any]:
        """Carry out a command on all ranks, or on rank 0 alone. An error of one of them is an error of all.

        Args:
            name: of the command.
            work: what carries it out.
            command: its fields.
            own_loop: the name of the task's file where that has a train() of its own; empty: it has none.

        Raises:
            TaskError: a rank failed; the sentence names it.
            Stopped: the agent wants an end.
        """
        alone = name not in JOINT or (name == "train" and bool(own_loop))
        if alone and self.rank:
            return {}
        if alone:
            if name == "train":
                sys.stderr.write(f"{own_loop} has a train() of its own: rank 0 runs it, the other ranks have no part\n")
            return work(**command)
        self.joint = True
        try:
            with self._told_to_all(name):
                done = work(**command)
            self.vote(may_stop=False)  # nobody is done before all are
        finally:
            self.joint, self._shared = False, None
        return done

    @contextmanager
    def _told_to_all(self, name: str) -> Iterator[None]:
        """Have all ranks raise what one of them raises."""
        try:
            yield
        except Exception as error:
            if self._told:
                raise
            failure = error if isinstance(error, self._host.TaskError) else self._host.unexpected(error, name)
            self.vote(failure=failure)
            raise AssertionError("a vote with a failure always raises") from error

    # ------------------------------------------------------------ a script's

    @contextmanager
    def all_or_none(self, name: str) -> Iterator[None]:
        """Inside, what one of them raises is raised by all, at the end."""
        with self._told_to_all(name):
            yield
            self.vote(may_stop=False)

    def same(self, model: nn.Module) -> bool:
        """Whether all have the same model, in what of it is trained. Raises what a vote raises."""
        mark = 0
        for parameter in model.parameters():
            if parameter.requires_grad:
                numbers = parameter.detach().cpu().contiguous().reshape(-1)
                mark = zlib.crc32(numbers.view(torch.uint8).numpy().data, mark)
        return len(set(self.vote(mark=mark).marks)) == 1

    @contextmanager
    def of_script(self) -> Iterator[None]:
        """Inside, a script that makes the group of its ranks, as one does under torchrun, finds it made."""

        def is_there(*_: object, **__: object) -> None:
            sys.stderr.write(f"the group of the {self.world} ranks is there already, and stays\n")

        own = dist.init_process_group, dist.destroy_process_group
        dist.init_process_group = dist.destroy_process_group = is_there
        try:
            yield
        finally:
            dist.init_process_group, dist.destroy_process_group = own

    def leave(self, error: Any, tell: Callable[[Any], None]) -> None:  # noqa: ANN401
        """A script has failed where the others may wait for it: end this rank, which ends all. Never returns.

        Args:
            error: a TaskError.
            tell: tells the agent of one; of rank 0.
        """
        if self.rank:
            sys.stderr.write(f"{error}\n{error.detail}\n")
            sys.stderr.flush()
            self._store.set("left", json.dumps([self.rank, error.code, str(error), error.detail]))
            threading.Event().wait(OWN_END_S)  # torchrun ends this one meanwhile, where rank 0 has left too
        else:
            tell(self._cause_of(error))
        os._exit(EXIT_LEFT)

    def _cause_of(self, error: Any) -> Any:  # noqa: ANN401 - TaskErrors
        """What another rank left for, where rank 0 has only lost it."""
        if not isinstance(error.__cause__, RuntimeError) or not self._store.check(["left"]):
            return error
        rank, code, sentence, detail = json.loads(self._store.get("left"))
        return self._host.TaskError(code, f"rank {rank} of {self.world}: {sentence}", detail)

    # ------------------------------------------------------------ votes

    def vote(
        self,
        samples: int = 0,
        *,
        time_is_up: bool = False,
        mark: int = 0,
        failure: Any = None,  # noqa: ANN401
        may_stop: bool = True,
    ) -> Vote:
        """Tell all ranks how this one stands, and hear how they do.

        Args:
            samples: of this rank's part.
            time_is_up: by this rank's clock; rank 0's counts.
            mark: what the caller wants to compare.
            failure: the TaskError that this rank has.
            may_stop: whether there is something left to stop.

        Raises:
            TaskError: some rank failed: that of the first, whose number is in the sentence.
            Stopped: rank 0 has heard that the agent wants an end.
        """
        row = [self._wanted.is_set(), time_is_up, samples, failure is not None, mark]
        own = torch.tensor(row, dtype=torch.float64)
        rows = [torch.empty_like(own) for _ in range(self.world)]
        with self._exchanging():
            dist.all_gather(rows, own)
        told = [[int(value) for value in row.tolist()] for row in rows]
        vote = Vote(
            stop=bool(told[0][0]),
            time_is_up=bool(told[0][1]),
            samples=[row[2] for row in told],
            failed=[rank for rank, row in enumerate(told) if row[3]],
            marks=[row[4] for row in told],
        )
        if vote.failed:
            self._told = True
            raise self._failure_of(vote.failed[0], failure)
        if vote.stop and may_stop:
            self.voted_stop = self._told = True
            raise self._host.Stopped
        return vote

    def _failure_of(self, rank: int, own: Any) -> Any:  # noqa: ANN401 - TaskErrors
        """The error of a rank, as all ranks raise it."""
        words = b""
        if rank == self.rank:
            words = json.dumps([own.code, str(own), own.detail]).encode()
        code, sentence, detail = json.loads(self.from_rank(rank, words))
        return self._host.TaskError(code, f"rank {rank} of {self.world}: {sentence}", detail)

    def from_rank(self, rank: int, words: bytes) -> bytes:
        """What one rank has to say; the others bring nothing."""
        length = torch.tensor([len(words)], dtype=torch.int64)
        with self._exchanging():
            dist.broadcast(length, rank)
            text = torch.empty(int(length), dtype=torch.uint8)
            if rank == self.rank:
                text.copy_(torch.frombuffer(bytearray(words), dtype=torch.uint8))
            dist.broadcast(text, rank)
        return text.numpy().tobytes()

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        """An exchange that fails has lost a rank, or the memory for it: this process can do nothing more."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            sys.stderr.write(f"an exchange between the ranks failed: {self._host.trace(error)}\n")
            sys.stderr.flush()
            # Whoever died first is the cause, and torchrun ends the others, this one too, once it has seen that.
            # Only where no rank died is this one the first.
            threading.Event().wait(0 if self._host.is_out_of_memory(error) else LAST_WAIT_S)
            os._exit(EXIT_BROKEN)

    def agree(self, what: str, *values: Any) -> None:  # noqa: ANN401
        """Make sure that all ranks begin from the same.

        Args:
            what: they must agree on.
            values: plain ones.

        Raises:
            TaskError: they do not; code worker_error.
        """
        if self.joint:
            marks = self.vote(mark=zlib.crc32(json.dumps(values).encode())).marks
            if len(set(marks)) > 1:
                self._told = True
                raise self._host.TaskError("worker_error", f"the {self.world} ranks do not agree on {what}")

    def first_rank_0(self, work: Callable[[], T]) -> T:
        """Have rank 0 do something before the others do: a download of all at once would be one of too many."""
        if not self.joint:
            return work()
        if self.rank:
            self.vote()
            return work()
        done = work()
        self.vote()
        return done

    # ------------------------------------------------------------ training

    def begin(self, model: nn.Module) -> None:
        """Training begins, on a model that is the same on all ranks."""
        if not self.joint:
            return
        normal = nn.modules.batchnorm._NormBase
        if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
            sentence = "SyncBatchNorm waits for every rank, and a batch may be smaller than the number of ranks"
            raise self._host.TaskError("bad_task", f"{sentence}: use BatchNorm, or one device")
        buffers = [
            (module, name, isinstance(module, normal), buffer)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._shared = Shared(
            parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            floats=[(module, name, always) for module, name, always, b in buffers if b.is_floating_point()],
            whole=[(module, name, always) for module, name, always, b in buffers if not is_inexact(b)],
            least=2 if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()) else 1,
        )
        for module, name, _, buffer in buffers:
            self._shared.seen[id(module), name] = buffer, buffer._version

    def part(self, batch: Tensor) -> Tensor:
        """What this rank takes of a global batch."""
        if self._shared is None:
            return batch
        start, stop = part_of_batch(len(batch), self.world, self.rank, self._shared.least)
        return batch[start:stop]

    def own_seed(self, seed: int) -> int:
        """A seed that no other rank has."""
        return step_seed(seed, 0, 0, self.rank) if self.joint else seed

    def seed_step(self, seed: int, number: int, batch: int) -> None:
        """Seed the generators for a batch, so that a training that goes on in the middle draws the same numbers."""
        if self.joint:
            self._host.seed_everything(step_seed(seed, number, batch, self.rank))

    def mean(self, loss: Tensor | None, samples: int, elapsed: float, seconds: float | None) -> Any:  # noqa: ANN401
        """Make the gradients those of the global batch, and return its loss.

        A parameter that no rank has a gradient of has none afterwards, as in one process. Buffers that the forward
        pass changed become the mean over the samples, whole numbers the largest.

        Args:
            loss: the mean loss of this rank's part; None: it had none.
            samples: in that part.
            elapsed: seconds of training; rank 0's count.
            seconds: when the time is up; None: it is not seconds that are counted.

        Raises:
            TaskError, Stopped: as of a vote.
        """
        shared = self._shared
        if shared is None:
            return loss
        has = [parameter.grad is not None for parameter in shared.parameters]
        has += [self._changed(shared, *buffer) for buffer in [*shared.floats, *shared.whole]]
        for parameter in shared.parameters:
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                sentence = "a gradient is sparse, and ranks sum dense ones alone"
                raise self._host.TaskError("bad_task", f"{sentence}: make the layer without sparse=True")
            if loss is None and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # before the vote: what fails now is still told to all
        device = shared.parameters[0].device
        told = torch.zeros((), device=device) if loss is None else loss.detach().float().reshape(()).clone()
        self._make_room(shared, told)

        time_is_up = seconds is not None and elapsed >= seconds
        vote = self.vote(samples, time_is_up=time_is_up, mark=zlib.crc32(bytes(has)))
        self._time_is_up = vote.time_is_up
        with self._exchanging():  # all of it: a rank that fails now leaves the others waiting for its numbers
            self._combine(shared, told, has, samples / sum(vote.samples), same=len(set(vote.marks)) == 1)
        return told

    def _combine(self, shared: Shared, loss: Tensor, has: list[bool], weight: float, *, same: bool) -> None:
        """Make loss, gradients and buffers those of the global batch.

        Args:
            shared: what is to be made so.
            loss: of this rank's part.
            has: for each parameter whether it has a gradient, then for each buffer whether it changed, on this rank.
            weight: share of the batch that this rank's part is.
            same: whether `has` is the same on all ranks.
        """
        floats, whole = shared.floats, shared.whole
        if not same:
            has = self._any_rank_has(has)
        gradients = []
        for parameter, present in zip(shared.parameters, has, strict=False):
            if not present:
                parameter.grad = None
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        after = has[len(shared.parameters) :]
        changed = [m._buffers[n] for (m, n, _), new in zip([*floats, *whole], after, strict=True) if new]
        inexact = [buffer for buffer in changed if buffer is not None and buffer.is_floating_point()]
        exact = [buffer for buffer in changed if buffer is not None and not buffer.is_floating_point()]
        with torch.no_grad():
            self._sum(shared, [loss, *gradients, *inexact], weight)
            self._largest(exact)
        for module, name, _ in [*floats, *whole]:
            buffer = module._buffers[name]
            if buffer is not None:
                shared.seen[id(module), name] = buffer, buffer._version

    def _changed(self, shared: Shared, module: nn.Module, name: str, always: bool) -> bool:
        """Whether the forward pass may have changed a buffer. Some kernels of BatchNorm count no version up."""
        buffer = module._buffers[name]
        then, version = shared.seen[id(module), name]
        return buffer is not None and ((always and module.training) or buffer is not then or buffer._version != version)

    def _any_rank_has(self, has: list[bool]) -> list[bool]:
        """What at least one rank has."""
        held = torch.tensor(has, dtype=torch.uint8)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return [bool(value) for value in held.tolist()]

    def _make_room(self, shared: Shared, loss: Tensor) -> None:
        """Have the memory for the sums before anybody waits for them."""
        if shared.room:
            return
        largest: dict[torch.dtype, int] = {}
        buffers = [module._buffers[name] for module, name, _ in shared.floats]
        for tensor in [loss, *shared.parameters, *(buffer for buffer in buffers if buffer is not None)]:
            kind = summed_as(tensor)
            largest[kind] = max(largest.get(kind, BUCKET), tensor.numel())
        for kind, size in largest.items():
            shared.room[kind] = torch.empty(size, dtype=kind, device=self._wire)

    def _sum(self, shared: Shared, tensors: list[Tensor], weight: float) -> None:
        """Replace each tensor by the sum over the ranks of its values times the weight of the rank."""
        for kind, room in shared.room.items():
            alike = [tensor for tensor in tensors if summed_as(tensor) == kind]
            for run in in_buckets([tensor.numel() for tensor in alike], BUCKET):
                held = [alike[position] for position in run]
                sizes = [tensor.numel() for tensor in held]
                places = torch.split(room[: sum(sizes)], sizes)
                for tensor, place in zip(held, places, strict=True):
                    if weight:
                        place.view(tensor.shape).copy_(tensor).mul_(weight)
                    else:
                        place.zero_()  # no sample, no say: not even a NaN
                dist.all_reduce(room[: sum(sizes)])
                for tensor, place in zip(held, places, strict=True):
                    tensor.copy_(place.view(tensor.shape))

    def _largest(self, buffers: list[Tensor]) -> None:
        """Replace each buffer of whole numbers by the largest over the ranks, number by number."""
        if not buffers:
            return
        together = torch.cat([buffer.reshape(-1).to("cpu", torch.int64) for buffer in buffers])
        dist.all_reduce(together, dist.ReduceOp.MAX)
        places = torch.split(together, [buffer.numel() for buffer in buffers])
        for buffer, place in zip(buffers, places, strict=True):
            buffer.copy_(place.view(buffer.shape))

    def time_is_up(self, elapsed: float, seconds: float) -> bool:
        """Whether training has lasted long enough, by rank 0's clock."""
        return self._time_is_up if self.joint else elapsed >= seconds

    # ------------------------------------------------------------ evaluation

    def own_batches(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Which of the batches to evaluate are this rank's: whole ones, so that each measures what it would alone."""
        return parts[self.rank :: self.world]

    def keep_pace(self) -> None:
        """Have the others know that another batch is measured."""
        self.vote()

    def gathered(self, measured: list[T], parts: int) -> list[T]:
        """What all ranks measured, in the order of the batches: added up, it is what one process has, bit by bit."""
        for _ in range(len(measured), math.ceil(parts / self.world)):
            self.vote()
        own = json.dumps(measured).encode()  # floats come back to the bit, and NaN and infinities too
        of_rank = [json.loads(self.from_rank(rank, own if rank == self.rank else b"")) for rank in range(self.world)]
        return [of_rank[number % self.world][number // self.world] for number in range(parts)]


def is_inexact(tensor: Tensor) -> bool:
    """Whether its numbers are no whole ones."""
    return tensor.is_floating_point() or tensor.is_complex()


def summed_as(tensor: Tensor) -> torch.dtype:
    """The dtype that a sum over ranks is made in: half precision would lose what a mean of many keeps."""
    return torch.float32 if tensor.dtype in {torch.float16, torch.bfloat16} else tensor.dtype


# ---------------------------------------------------------------- starting


class Prefixed:
    """A stream for a rank's prints: whole lines, each with its number before it, so that two never mix."""

    def __init__(self, stream: Any, prefix: str) -> None:  # noqa: ANN401
        self._stream, self._prefix, self._line = stream, prefix, ""

    def write(self, text: str) -> int:
        """Write the lines that are complete now."""
        *lines, self._line = (self._line + text).split("\n")
        if lines:
            self._stream.write("".join(f"{self._prefix}{line}\n" for line in lines))
            self._stream.flush()
        return len(text)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._stream, name)


def count_devices(kind: str) -> int:
    """How many devices of a kind this torch can use; starts none of them."""
    module = getattr(torch, kind, None)
    return int(module.device_count()) if module is not None and hasattr(module, "device_count") else 0


def is_rank() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "LOCAL_RANK" in os.environ


def launch(script: Path, devices: Sequence[str], threads: int, store: Path, more: Sequence[str] = ()) -> int:
    """Be torchrun: start a rank for each device and stay until all have ended. Returns the exit code.

    Tells the agent which rank was lost, and how, in an event of its own: nobody else outlives it and knows.

    Args:
        script: task_host.py.
        devices: one a rank.
        threads: CPU threads of all ranks together; 0 leaves torch's choice.
        store: a file where the ranks find each other. torchrun's own store listens on every interface.
        more: what each rank's command line has besides.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    each = max(1, (threads or torch.get_num_threads()) // len(devices))
    os.environ["OMP_NUM_THREADS"] = str(each)
    if (interface := LOOPBACK.get(sys.platform)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    sys.stderr.write(f"torchrun starts {len(devices)} ranks on {', '.join(devices)}, {each} CPU threads each\n")
    sys.stderr.flush()
    of_rank = ["--device", ",".join(devices), "--threads", str(each), "--store", str(store)]
    of_rank += ["--parent", str(os.getpid()), *more]
    program = [sys.executable, "-P", "-u", str(script), *of_rank]
    try:
        run.main(["--standalone", "--nproc-per-node", str(len(devices)), "--no-python", *program])
    except ChildFailedError as error:
        rank, code = cause({rank: failed.exitcode for rank, failed in error.failures.items()})
        lost = {"event": "lost", "rank": rank, "ranks": len(devices), "exit": code}
        os.write(1, json.dumps(lost).encode() + b"\n")
        return 1
    return 0


def cause(exits: dict[int, int]) -> tuple[int, int]:
    """The rank whose end is the cause of all others'.

    Args:
        exits: rank -> exit code, negative for a signal; at least one.
    """
    blame = {-signal.SIGTERM: 2, EXIT_BROKEN: 1}  # torchrun's own way to end the others; a rank that lost another
    return min(exits.items(), key=lambda item: (blame.get(item[1], 0), item[0]))


def own_rank() -> int:
    """The number of this rank."""
    return int(os.environ["RANK"])


def own_device(devices: str) -> str:
    """Which of the devices is this rank's; the one there is for a process alone."""
    return devices.split(",")[own_rank()] if is_rank() else devices


def prefixed(stream: Any) -> tuple[Any, Any]:  # noqa: ANN401 - text streams
    """stdout and stderr of a rank that does not talk with the agent: both go to the log."""
    prefix = f"[rank {own_rank()}] "
    return Prefixed(stream, prefix), Prefixed(stream, prefix)


def joined(
    host: ModuleType,
    store_path: Path | None,
    ready: Callable[[], tuple[torch.device, dict[str, Any]]],
    wanted: threading.Event,
) -> tuple[torch.device, dict[str, Any], Alone]:
    """Come together with the other ranks, if there are any.

    Args:
        host: task_host.
        store_path: a file of this group alone, in a folder of this worker; None for a process alone.
        ready: makes this rank's device ready, as task_host.ready_device does.
        wanted: as Ranks has it.

    Returns:
        what `ready` gave, and the way to the others.

    Raises:
        TaskError: the device of some rank does not work; code worker_error. All ranks raise it.
    """
    if not is_rank():
        return *ready(), Alone(wanted)
    rank, world = own_rank(), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(store_path), world)  # type: ignore[attr-defined] # documented, and not in its __all__
    try:
        device, build = ready()
    except host.TaskError as error:
        store.set(f"ready/{rank}", json.dumps([error.code, str(error), error.detail]))
    else:
        store.set(f"ready/{rank}", json.dumps(None))
    await_ranks(store, rank, world)
    for other in range(world):
        if (said := json.loads(store.get(f"ready/{other}"))) is not None:
            raise host.TaskError(said[0], f"rank {other} of {world}: {said[1]}", said[2])
    backend, wire = backends_for(device.type, nccl=dist.is_nccl_available())
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL takes the current one
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    ranks = Ranks(host, rank, world, device if wire == device.type else torch.device("cpu"), wanted, store)
    ranks.vote()
    return device, {**build, "ranks": world}, ranks


def await_ranks(store: Any, rank: int, world: int) -> None:  # noqa: ANN401
    """Wait until every rank has its device. Rank 0 says for whom; the agent ends a start that takes too long."""
    said_at = time.monotonic()
    pause = threading.Event()
    while missing := [other for other in range(world) if not store.check([f"ready/{other}"])]:
        if rank == 0 and time.monotonic() - said_at >= MISSING_EVERY_S:
            said_at = time.monotonic()
            listed = ", ".join(map(str, missing))
            sys.stderr.write(f"rank 0 waits for rank {listed} of {world} to have torch and its device ready\n")
        pause.wait(LOOK_EVERY_S)
