"""Many shards of one base model in one command: stacked into one computation where that is faster, else one by one.

Part of the child (worker/task_host.py), which loads it by its path: torch and numpy, none of our packages.

    shards ──same rules as one by one──▶ the batches of each ──grouped──▶ stacks ──▶ an update a shard
                                                                └─ a model or data that no stack can have: the loop

A stack holds every trained tensor once a shard, in one tensor with one axis more, and computes all losses in one
`vmap`. Shards that have more steps come first, so that those still at work are always the first few: nothing is done
for a shard that is through. Batches of unlike sizes are filled up with samples that weigh nothing. The numbers of a
stack are those of the loop but for rounding, since sums are taken in another order: mostly 1e-6 of an update's length,
and 1e-2 where a rounding chose another way through a ReLU or a max-pool. The same shards in the same command give the
same bytes. A job that must be repeated to the bit says `"stack": "off"`.

Nothing is taken on trust: in `auto`, two of a task's first shards are trained in both ways. The stack is used where its
updates of them are the loop's, and where it took less time on this very machine.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

CLOSE = 1e-3  # of the length of an update: how far the nearer of two may be from the loop's
FAR = 0.1  # the farther one: with roundings a training may part, with another computation it does
FASTER = 0.9  # of the loop's time, below which the stack is the faster one
TRIAL_SHARDS = 5  # that a trial needs
TIMED_S = 0.3  # of the loop, before its speed counts as known
MOST_PADDING = 1.5  # samples computed for each sample of a shard that counts
SPARE = 8  # samples more a step: a step has a cost of its own, which those few do not add to
MOST_STACK_BYTES = 1 << 30  # of weights, gradients and momenta on the device
COPIES = 4  # of the weights that a stack holds: weights, gradients, momenta, and what a step computes
IGNORED = -100  # the class that cross_entropy passes over

# Layers whose training depends on the other samples of a batch, or on numbers drawn for each sample.
UNSTACKABLE = (
    nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RReLU, nn.MultiheadAttention, nn.RNNBase,
)  # fmt: skip

Rows = Callable[[Tensor], Sequence[Tensor]]
"""indices int64 (n,) -> one tensor of n rows for each tensor of the dataset."""


class UnstackableError(Exception):
    """Why these shards cannot be trained as a stack."""


@dataclass(frozen=True)
class Sgd:
    """torch.optim.SGD, as the default optimiser uses it."""

    lr: float
    momentum: float
    weight_decay: float


@dataclass(frozen=True)
class Outcome:
    """One shard of a stack."""

    tensors: dict[str, Tensor]  # the trained ones, by name
    loss_sum: float  # over the samples
    samples: int  # trained, over all passes
    steps: int


# ---------------------------------------------------------------- what can be stacked


def why_not(model: nn.Module) -> str | None:
    """Why a model cannot be stacked, as far as its layers tell; None: nothing speaks against it."""
    for name, module in model.named_modules():
        quiet = isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0
        if isinstance(module, UNSTACKABLE) and not quiet:
            return f"its layer {name or 'itself'} is a {type(module).__name__}"
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return "it has nothing to train"
    return None


def groups(lengths: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Which shards make a stack together: of like length, so that little is computed for nothing.

    Args:
        lengths: for each shard, the samples of its batches in their order.
        most: shards in one stack.

    Returns:
        Positions in `lengths`, each in one group; within a group, those with more steps first.
    """
    order = sorted(range(len(lengths)), key=lambda at: (-len(lengths[at]), -sum(lengths[at]), at))
    found: list[list[int]] = []
    widths = np.zeros(0, dtype=np.int64)  # of the steps of the last group
    for at in order:
        own, steps = np.asarray(lengths[at], dtype=np.int64), len(lengths[at])
        wider = np.maximum(widths[:steps], own) if found else own
        if found and len(found[-1]) < most and wider.sum() <= MOST_PADDING * own.sum() + SPARE * steps:
            found[-1].append(at)
            widths[:steps] = wider
        else:
            found.append([at])
            widths = own.copy()
    return found


# ---------------------------------------------------------------- training a stack


def train_stack(
    model: nn.Module, batches: Sequence[Sequence[Tensor]], rows: Rows, sgd: Sgd, told: Callable[[int, int], None]
) -> list[Outcome]:
    """Train a model on several shards at once, by cross-entropy on (x, y), each shard from the model's state.

    Args:
        model: on its device, in training mode; left as it is.
        batches: for each shard, int64 (samples,) a step; the shards with more steps first.
        rows: reads samples.
        sgd: the optimiser.
        told: called after each step with the steps and the samples done; may raise.

    Returns:
        one outcome a shard, in their order.

    Raises:
        UnstackableError: the model, run under vmap, does something that a stack cannot have.
    """
    try:
        return _train_stack(model, batches, rows, sgd, told)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:  # of the model, or of vmap
        words = (str(error).strip().splitlines() or [""])[0]
        raise UnstackableError(f"{type(error).__name__}: {words[:300]}") from error


def _train_stack(
    model: nn.Module, batches: Sequence[Sequence[Tensor]], rows: Rows, sgd: Sgd, told: Callable[[int, int], None]
) -> list[Outcome]:
    device = next(model.parameters()).device
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    fixed = {name: tensor.clone() for name, tensor in fixed.items() if name not in trained}
    before = {name: tensor.clone() for name, tensor in fixed.items()}
    stack = {name: tensor.expand(len(batches), *tensor.shape).clone() for name, tensor in trained.items()}
    momenta: dict[str, Tensor] = {}
    losses = torch.zeros(len(batches), max(map(len, batches)), device=device)

    def loss_of(weights: dict[str, Tensor], x: Tensor, y: Tensor, counted: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (weights, fixed), (x,))
        return mean_cross_entropy(logits, y, counted)

    seen = 0
    for step in range(max(map(len, batches))):
        parts = [shard[step] for shard in batches if len(shard) > step]
        active = len(parts)
        indices, counted = padded(parts)
        x, y = (tensor.to(device).reshape(*indices.shape, *tensor.shape[1:]) for tensor in batch_of(rows, indices))
        weights = {name: tensor[:active].detach().requires_grad_() for name, tensor in stack.items()}
        losses_now = torch.vmap(loss_of)(weights, x, y, counted.to(device))
        gradients = torch.autograd.grad(losses_now.sum(), list(weights.values()), allow_unused=True)
        descend(stack, momenta, dict(zip(weights, gradients, strict=True)), active, sgd)
        losses[:active, step] = losses_now.detach().float()
        seen += sum(map(len, parts))
        told(step + 1, seen)
    changed = [name for name, tensor in fixed.items() if not torch.equal(tensor, before[name])]
    if changed:
        raise UnstackableError(f"it changes {changed[0]!r} while it trains")
    return list(_outcomes(stack, losses.tolist(), batches))


def _outcomes(
    stack: dict[str, Tensor], losses: list[list[float]], batches: Sequence[Sequence[Tensor]]
) -> Iterator[Outcome]:
    for at, shard in enumerate(batches):
        counts = [len(part) for part in shard]
        loss_sum = sum(loss * count for loss, count in zip(losses[at], counts, strict=False))
        tensors = {name: tensor[at] for name, tensor in stack.items()}
        yield Outcome(tensors, loss_sum, sum(counts), len(counts))


def batch_of(rows: Rows, indices: Tensor) -> Sequence[Tensor]:
    """The samples (x, y) of all batches of a step, one after the other.

    Raises:
        UnstackableError: the samples are no pairs.
    """
    batch = rows(indices.reshape(-1))
    if len(batch) != 2:
        raise UnstackableError(f"its samples are {len(batch)} tensors, not (x, y)")
    return batch


def padded(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Batches of unlike sizes as one table; what fills up is a batch's own first sample, and counts nothing.

    Returns:
        indices int64 (shards, samples), and float32 of the same shape: 1 for a sample that counts, 0 for another.
    """
    width = max(map(len, parts))
    indices = torch.stack([torch.cat([part, part[:1].expand(width - len(part))]) for part in parts])
    counted = torch.arange(width) < torch.tensor([[len(part)] for part in parts])
    return indices, counted.float()


def mean_cross_entropy(logits: Tensor, y: Tensor, counted: Tensor) -> Tensor:
    """What `cross_entropy(logits, y)` is over the samples that count.

    Args:
        logits: (B, C, …).
        y: classes (B, …), or class probabilities of the logits' shape.
        counted: 1 for a sample that counts, 0 for another.
    """
    classes = y if y.is_floating_point() else y.long()
    each = nn.functional.cross_entropy(logits, classes, reduction="none")
    counts = counted.reshape(-1, *[1] * (each.dim() - 1)).expand_as(each)
    if not classes.is_floating_point():
        counts = counts * (classes != IGNORED)
    return (each * counts).sum() / counts.sum()


def descend(
    stack: dict[str, Tensor], momenta: dict[str, Tensor], gradients: dict[str, Tensor | None], active: int, sgd: Sgd
) -> None:
    """One step of SGD for the first `active` shards of a stack, in place.

    Source: the documentation of torch.optim.SGD, with dampening 0 and without Nesterov.
    """
    for name, gradient in gradients.items():
        if gradient is None:  # as the loop's optimiser: what no loss depends on is left alone
            continue
        weights = stack[name][:active]
        step = gradient.add(weights, alpha=sgd.weight_decay) if sgd.weight_decay else gradient
        if sgd.momentum:
            if name not in momenta:  # zero times the momentum, plus the gradient, is the gradient
                momenta[name] = torch.zeros_like(stack[name])
            step = momenta[name][:active].mul_(sgd.momentum).add_(step)
        weights.add_(step, alpha=-sgd.lr)


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    """How far two updates of one base are apart, as a part of the second's length; infinite where one is not finite."""
    apart = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in theirs)
    length = sum(float((theirs[name].double() - base[name].double()).square().sum()) for name in theirs)
    found = (apart / length) ** 0.5 if length else (0.0 if not apart else math.inf)
    return math.inf if math.isnan(found) else found


# ---------------------------------------------------------------- the command


@dataclass(frozen=True)
class Choice:
    """Whether a task's shards are stacked, and why."""

    stack: bool
    why: str
    least: int = 2  # shards that must be there


class Many:
    """Carries out `train_many` for one task. Made anew when a task is opened."""

    def __init__(self, host: Any, house: ModuleType) -> None:  # noqa: ANN401 - a Host
        """The host that trains one shard, and the module that it is of: a file loaded by its path cannot import it."""
        self._host, self._house = host, house
        self._choice: Choice | None = None  # of `auto`, once there was a trial

    def train(
        self,
        base: str,
        shards: list[dict[str, Any]],
        round: int,  # noqa: A002 - the command's word
        epochs: int | None = None,
        steps: int | None = None,
        seconds: float | None = None,
        base_digest: str = "",
        stack: str = "auto",
    ) -> dict[str, Any]:
        """Train one base model on many shards. One that fails does not keep the others from their end.

        Args:
            base: path of the model.
            shards: for each one `indices`, `out` and `seed`, as `train` takes them.
            round: as `train` takes it; so are the lengths.
            epochs: length in passes.
            steps: length in steps.
            seconds: length in seconds.
            base_digest: as `train` takes it.
            stack: `off` one by one; `on` stacked wherever that is possible; `auto` where it is also faster.

        Returns:
            `results`, one a shard: what `train` answers, or an `error` of code, sentence and detail; `stacked`, how
            many came out of a stack, and `why`.
        """
        common = {"base": base, "round": round, "epochs": epochs, "steps": steps, "seconds": seconds}
        work = Work(self._host, self._house, {**common, "base_digest": base_digest}, shards)
        choice = self._choose(work, stack)
        if choice.stack and len(work.left) >= choice.least:
            try:
                work.stack(work.left)
            except UnstackableError as error:
                self._choice = choice = self._decide(False, str(error))
        work.loop(work.left)
        results = [work.results[at] for at in range(len(shards))]
        return {"results": results, "stacked": work.stacked, "why": choice.why}

    def _choose(self, work: "Work", stack: str) -> Choice:
        """Whether the shards that are left are to be stacked; a trial leaves fewer of them."""
        if stack == "off":
            return Choice(False, "it was not asked for")
        reason = work.why_not()
        if reason is not None:
            if self._choice is None:
                self._choice = self._decide(False, reason)
            return Choice(False, reason)
        if stack == "on":
            return Choice(True, "it was asked for")
        if self._choice is None and len(work.left) < TRIAL_SHARDS:
            return Choice(False, f"a trial needs {TRIAL_SHARDS} shards at once")
        if self._choice is None:
            self._choice = self._try(work)
        return self._choice

    def _try(self, work: "Work") -> Choice:
        """Train some shards one by one and the others stacked, compare, and measure."""
        first = work.left[0]
        work.loop([first])  # not timed: torch gets ready
        if "error" in work.results[first]:
            return Choice(False, "the first shard failed")
        timed = [at for at in work.left if at != first]
        began, samples, count = time.monotonic(), 0, 0
        while time.monotonic() - began < TIMED_S and count < max(1, len(timed) // 3):
            work.loop([timed[count]])
            samples += work.trained(timed[count])
            count += 1
        loop_s = (time.monotonic() - began) / max(samples, 1)
        try:
            work.stack(work.left, warm_up=True)
            began = time.monotonic()
            some = work.left
            apart = work.stack(some, witnesses=[first, timed[0]])
        except UnstackableError as error:
            return self._decide(False, str(error))
        stack_s = (time.monotonic() - began) / max(sum(map(work.trained, [first, timed[0], *some])), 1)
        if not (apart[0] <= CLOSE and apart[-1] <= FAR):
            work.forget(some)
            distances = " and ".join(f"{far:.1e}" for far in apart)
            return self._decide(False, f"its updates are {distances} of their length away from the loop's")
        words = f"{1 / stack_s:,.0f} samples/s, one by one {1 / loop_s:,.0f}, with {len(some) + 2} shards"
        return self._decide(stack_s < FASTER * loop_s, words, max(2, len(some) // 2))

    @staticmethod
    def _decide(stack: bool, why: str, least: int = 2) -> Choice:
        """A choice that holds until the next task is opened; said once, in the child's log."""
        sys.stderr.write(f"stack: shards are trained {'stacked' if stack else 'one by one'}: {why}\n")
        return Choice(stack, why, least)


class Work:
    """The shards of one command, and what came of them so far."""

    def __init__(self, host: Any, house: ModuleType, common: dict[str, Any], shards: list[dict[str, Any]]) -> None:  # noqa: ANN401
        self._host, self._house, self._common, self._shards = host, house, common, shards
        self.results: dict[int, dict[str, Any]] = {}
        self.stacked = 0

    @property
    def left(self) -> list[int]:
        """The shards that have no result yet."""
        return [at for at in range(len(self._shards)) if at not in self.results]

    def trained(self, at: int) -> int:
        """Samples that a shard was trained on, over all passes."""
        return int(self.results[at].get("trained", 0))

    def forget(self, shards: Sequence[int]) -> None:
        """These are to be trained again."""
        for at in shards:
            del self.results[at]
        self.stacked -= len(shards)

    # ------------------------------------------------------------ one by one

    def loop(self, shards: Sequence[int]) -> None:
        """Train these one after the other, as `train` does."""
        for at in shards:
            try:
                done = self._host.train(**self._common, **self._shards[at])
            except self._house.TaskError as error:
                answer = self._house.failure(error)
                del answer["event"]
                self.results[at] = {"error": answer}
            else:
                count = done["metrics"].get("train_loss", [0.0, 0])[1]
                self.results[at] = {**done, "trained": count}

    # ------------------------------------------------------------ stacked

    def why_not(self) -> str | None:
        """Why these shards cannot be stacked; None: as far as can be seen, they can."""
        task = self._host._opened()
        own = [hook for hook in ("train", "loss", "optimizer") if task.has(hook)]
        if own:
            return f"{task.file.name} has its own {own[0]}()"
        if task.config.get("precision", "fp32") != "fp32":
            return "a stack is trained in fp32"
        if task.terms:
            return f"a stack has no {', '.join(sorted(task.terms))}"
        if self._common["seconds"] is not None:
            return "a round of seconds has no fixed number of steps"
        if self._house.row_reader(self._host._split("train")) is None:
            return "its training set is no TensorDataset"
        return why_not(self._host._built(0))

    def stack(self, shards: Sequence[int], *, warm_up: bool = False, witnesses: Sequence[int] = ()) -> list[float]:
        """Train these as stacks.

        Args:
            shards: positions.
            warm_up: one step, of which nothing is kept.
            witnesses: shards that the loop has trained, trained once more beside the others.

        Returns:
            How far the witnesses' updates are from what the loop wrote, rising.

        Raises:
            UnstackableError: they cannot be.
        """
        host, house = self._host, self._house
        task, dataset = host._opened(), host._split("train")
        model = host._loaded(self._common["base"], 0)
        house.seed_everything(0)
        model.train()
        base = {name: tensor.clone() for name, tensor in house.state_of(model)[0].items()}
        missing = {name for name, weights in model.named_parameters() if weights.requires_grad} - base.keys()
        if missing:
            raise UnstackableError(f"{min(missing)!r} is known by another name in its state")
        rows = house.row_reader(dataset)
        config = task.config
        sgd = Sgd(config.get("lr", 0.1), config.get("momentum", 0.0), config.get("weight_decay", 0.0))
        wanted = [*witnesses, *shards]
        sizes = {at: self._shard(at, len(dataset)) for at in wanted}
        plans = {at: list(self._batches(at, shard)) for at, shard in sizes.items()}
        bytes_each = sum(tensor.nbytes for tensor in base.values()) * COPIES
        apart: list[float] = []
        for group in groups([[len(p) for p in plans[at]] for at in wanted], max(MOST_STACK_BYTES // bytes_each, 1)):
            members = [wanted[at] for at in group]
            batches = [plans[at][:1] if warm_up else plans[at] for at in members]
            began = time.monotonic()
            outcomes = train_stack(model, batches, rows, sgd, self._teller(batches))
            if warm_up:
                return []
            seconds = time.monotonic() - began
            samples = sum(outcome.samples for outcome in outcomes)
            for at, outcome in zip(members, outcomes, strict=True):
                state = {**base, **outcome.tensors}
                if at in witnesses:
                    apart.append(self._apart(at, state, base))
                    continue
                self._write(model, state, Path(self._shards[at]["out"]))
                self._note(at, outcome, len(sizes[at]), seconds * outcome.samples / samples)
            house.put_state(model, base)
        return sorted(apart)

    def _shard(self, at: int, total: int) -> Tensor:
        try:
            shard: Tensor = self._house.read_shard(self._shards[at]["indices"], total)
        except self._house.TaskError as error:  # the loop says it in its own words
            raise UnstackableError(str(error)) from error
        return shard

    def _batches(self, at: int, shard: Tensor) -> Iterator[Tensor]:
        """The samples of each step of a shard, as the loop takes them."""
        house, common = self._house, self._common
        size = int(self._host._opened().config.get("batch_size", 32))
        ends = house.batch_ends(len(shard), size, join_last_one=False)
        left = common["steps"] if common["steps"] is not None else (common["epochs"] or 1) * len(ends)
        number = 0
        while left > 0:
            order = house.pass_order(shard, self._shards[at]["seed"], number)
            yield from torch.tensor_split(order, ends[:-1])[:left]
            left -= len(ends)
            number += 1

    def _teller(self, batches: Sequence[Sequence[Tensor]]) -> Callable[[int, int], None]:
        steps, began = max(map(len, batches)), time.monotonic()

        def told(step: int, samples: int) -> None:
            if self._host._stopping.is_set():
                raise self._house.Stopped
            rate = samples / max(time.monotonic() - began, 1e-9)
            self._host._events.progress(
                "training", step=step, steps=steps, samples=samples, samples_per_s=rate, loss=None
            )

        return told

    def _apart(self, at: int, state: dict[str, Tensor], base: dict[str, Tensor]) -> float:
        looped = load_file(self._shards[at]["out"])
        here = {name: tensor.cpu() for name, tensor in state.items()}
        return distance(here, looped, {name: tensor.cpu() for name, tensor in base.items()})

    def _write(self, model: nn.Module, state: dict[str, Tensor], out: Path) -> None:
        self._house.put_state(model, state)
        self._house.save_state(model, out)

    def _note(self, at: int, outcome: Outcome, samples: int, seconds: float) -> None:
        """Remember a result, as `train` answers it. A shard's seconds are its part of the stack's, by samples."""
        finite = math.isfinite(outcome.loss_sum)
        metrics = {"train_loss": [outcome.loss_sum, outcome.samples]} if finite else {}
        self.results[at] = {
            "samples": samples, "steps": outcome.steps, "seconds": seconds, "metrics": metrics, "resumed_at": 0,
            "trained": outcome.samples,
        }  # fmt: skip
        self.stacked += 1
