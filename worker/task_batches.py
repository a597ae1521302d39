"""How much is computed at once: the pieces of a batch that fit into memory, and the batch that a device is given.

Part of the child (worker/task_host.py), which loads it by its path: torch, none of our packages.

    a step ── forward, backward ──▶ gradients ──▶ optimiser
                  │ out of memory
                  ▼
           the batch in more pieces, one after the other: the same gradients, or the same measurements, summed

A mean over a batch is the mean over its pieces, each weighed by its samples. So a loss that is a mean over samples has
the same gradient in pieces but for rounding. Two things are not the same: BatchNorm normalises by its own piece, and
its running statistics also saw the pass that ran out of memory; and a loss that is a mean over something else, such as
the words that are not padding, is weighed by samples all the same.
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

REFERENCE = 32  # samples a step that a job's learning rate is meant for where the size is found here
MOST = 256  # samples a step that are looked for: with more, no rule of learning rates holds for every model
STEPS_A_ROUND = 20  # that a shard is to give
SHARE = {"cpu": 0.5}  # of the free memory that a step may take; the rest of a computer has a use for it
DEVICE_SHARE = 0.85
WARM_UP, TIMED = 3, 10  # steps, for a speed

FIRST_SCALE = 2.0**13  # of a loss in float16: gradients up to 8 fit. torch's 2**16 costs a short round its first steps
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}

LossOf = Callable[[Any], Tensor]
Measured = dict[str, tuple[float, float]]  # name -> (sum, count)
MeasureOf = Callable[[Any, int], Measured]  # of a batch and its samples


class OneSampleError(MemoryError):
    """As little as can be computed at once does not fit into memory."""


class FullError(Exception):
    """A step of the size that is tried does not fit into memory."""


def say(sentence: str, *, about: str) -> None:
    """One line in the child's log."""
    sys.stderr.write(f"{about}: {sentence}\n")


# ---------------------------------------------------------------- pieces of a batch


def pieces(samples: int, fits: int | None, least: int) -> list[int]:
    """Into which pieces a batch is cut: as few as fit, of like sizes.

    Args:
        samples: in the batch, at least one.
        fits: samples that fit at once; None: all.
        least: samples that a piece needs; 2 for BatchNorm, which cannot train on one. It comes before what fits.
    """
    count = 1 if fits is None else min(-(-samples // fits), max(samples // least, 1))
    each, more = divmod(samples, count)
    return [each + 1] * more + [each] * (count - more)


def halved(samples: int, fits: int | None, least: int) -> int | None:
    """What may fit, where the pieces of a batch did not; None: they cannot be smaller."""
    tried = pieces(samples, fits, least)[0]
    smaller = max(tried // 2, 1)
    return smaller if pieces(samples, smaller, least)[0] < tried else None


def cut(batch: Any, sizes: Sequence[int]) -> list[Any] | None:  # noqa: ANN401 - the task's batch
    """A batch in pieces; None where it is not known how: something in it is no tensor with a row for each sample.

    Args:
        batch: any nesting of dicts, lists and tuples of tensors.
        sizes: samples of each piece.
    """
    if isinstance(batch, Tensor):
        return list(torch.split(batch, list(sizes))) if batch.dim() and len(batch) == sum(sizes) else None
    if isinstance(batch, dict):
        rows = _side_by_side(batch.values(), sizes)
        return None if rows is None else [dict(zip(batch, row, strict=True)) for row in rows]
    if isinstance(batch, list | tuple):
        named, rows = hasattr(batch, "_fields"), _side_by_side(batch, sizes)
        return None if rows is None else [type(batch)(*row) if named else type(batch)(row) for row in rows]
    return None


def _side_by_side(members: Iterable[Any], sizes: Sequence[int]) -> list[tuple[Any, ...]] | None:
    """The first piece of every member, the second of every member …; None where one of them cannot be cut."""
    parts = [cut(member, sizes) for member in members]
    whole = [part for part in parts if part is not None]
    return list(zip(*whole, strict=True)) if whole and len(whole) == len(parts) else None


def summed(parts: Sequence[Measured]) -> Measured:
    """Sums and counts of all parts together."""
    if len(parts) == 1:
        return parts[0]
    total: Measured = {}
    for part in parts:
        for name, (value, count) in part.items():
            held = total.get(name, (0.0, 0.0))
            total[name] = (held[0] + value, held[1] + count)
    return total


# ---------------------------------------------------------------- one step


class Stepper:
    """Takes optimiser steps, in a precision, and in as many pieces as the memory makes necessary."""

    def __init__(self, device: torch.device, precision: str, memory: ModuleType, *, least: int = 1) -> None:
        """Everything fits, as far as is known.

        Args:
            device: the one that trains.
            precision: fp32, bf16 or fp16.
            memory: worker/task_device.py.
            least: samples that a pass needs.
        """
        self.device, self.precision, self.least = device, precision, least
        self.fits: int | None = None  # samples at once
        self.used = "fp32"  # the precision, once a forward pass was asked for in it
        self.skipped = 0  # steps whose gradients were not finite in float16
        self._memory = memory
        # With a loss that is not scaled it does nothing, as torch has it: a task's own loop need not ask.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE, enabled=precision == "fp16")

    def autocast(self) -> AbstractContextManager[Any]:
        """Inside, a forward pass computes in the precision."""
        half, self.used = HALF.get(self.precision), self.precision
        return nullcontext() if half is None else torch.autocast(self.device.type, dtype=half)

    def gradients(self, loss_of: LossOf, batch: Any, samples: int, clear: Callable[[], None]) -> Tensor:  # noqa: ANN401
        """Compute the gradients of a batch's mean loss. Where memory runs out, once more in pieces of half the size.

        Args:
            loss_of: batch -> mean loss of its samples, 0-dim.
            batch: on the device.
            samples: in the batch.
            clear: sets all gradients to none.

        Returns:
            the loss, detached.

        Raises:
            OneSampleError: as little as can be computed at once does not fit.
        """
        while True:
            clear()
            try:
                return self._gradients(loss_of, batch, samples)
            except (RuntimeError, MemoryError) as error:
                if not self._memory.is_out_of_memory(error):
                    raise
                self._halve(batch, samples, error)
            # Here the error is gone, and with it every tensor that the pass had made.
            clear()
            self._memory.give_back_memory(self.device)

    def measured(self, measure_of: MeasureOf, batch: Any, samples: int) -> Measured:  # noqa: ANN401 - the task's batch
        """Measure a batch without gradients. Where memory runs out, once more in pieces of half the size.

        Args:
            measure_of: batch, samples -> name -> (sum, count) over those samples.
            batch: on the device.
            samples: in the batch.

        Raises:
            OneSampleError: as little as can be computed at once does not fit.
        """
        while True:
            try:
                sizes = pieces(samples, self.fits, self.least)
                parts = cut(batch, sizes) if len(sizes) > 1 else None
                if parts is None:
                    return measure_of(batch, samples)
                return summed([measure_of(part, size) for part, size in zip(parts, sizes, strict=True)])
            except (RuntimeError, MemoryError) as error:
                if not self._memory.is_out_of_memory(error):
                    raise
                self._halve(batch, samples, error, same="measurements")
            self._memory.give_back_memory(self.device)

    def _gradients(self, loss_of: LossOf, batch: Any, samples: int) -> Tensor:  # noqa: ANN401
        sizes = pieces(samples, self.fits, self.least)
        parts = cut(batch, sizes) if len(sizes) > 1 else None
        if parts is None:  # the rule; or a batch of another kind than the one that was cut
            return self._pass(loss_of, batch, 1.0)
        losses = [self._pass(loss_of, part, size / samples) for part, size in zip(parts, sizes, strict=True)]
        return torch.stack(losses).sum()

    def _pass(self, loss_of: LossOf, part: Any, weight: float) -> Tensor:  # noqa: ANN401
        """Forward and backward; the loss times its weight, detached."""
        with self.autocast():
            loss = loss_of(part)
        if weight != 1.0:
            loss = loss * weight
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def once(self, loss_of: LossOf, batch: Any) -> None:  # noqa: ANN401 - the task's batch
        """Compute the gradients of a batch's mean loss in one piece, whatever that takes."""
        self._pass(loss_of, batch, 1.0)

    def _halve(self, batch: Any, samples: int, error: BaseException, same: str = "gradients") -> None:  # noqa: ANN401
        """Remember that less fits at once.

        Raises:
            OneSampleError: it cannot be less.
            BaseException: the error, where the batch cannot be cut.
        """
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        tried, smaller = pieces(samples, self.fits, self.least)[0], halved(samples, self.fits, self.least)
        if smaller is None:
            raise OneSampleError(f"{tried} at once, and no less can be computed: {words}") from error
        if cut(batch, pieces(samples, smaller, self.least)) is None:
            say("its samples cannot be told apart: a batch must be tensors with a row a sample", about="memory")
            raise error
        self.fits = smaller
        say(f"{tried} samples at once do not fit, so {smaller} are taken, with the same {same}: {words}",
            about="memory")  # fmt: skip

    def step(self, optimizer: Any, before: Callable[[], None]) -> None:  # noqa: ANN401 - a task may bring its own kind
        """Take a step by the gradients that are there; in float16, skip one whose gradients are not finite.

        Args:
            optimizer: of the model.
            before: called when the gradients are what they are without a scale: clips them.
        """
        if not self.scaler.is_enabled():
            before()
            optimizer.step()
            return
        self.scaler.unscale_(optimizer)
        before()
        scale = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        self.skipped += self.scaler.get_scale() < scale

    def state(self) -> dict[str, Any]:
        """Plain values: what `go_on_from` takes."""
        return {"fits": self.fits, "skipped": self.skipped, "scaler": self.scaler.state_dict()}

    def go_on_from(self, state: dict[str, Any]) -> None:
        """Go on where another one was. What did not fit there is not tried again."""
        self.fits = state["fits"] if self.fits is None else min(self.fits, state["fits"] or self.fits)
        self.skipped = state["skipped"]
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


# ---------------------------------------------------------------- the batch that a device is given


@dataclass(frozen=True)
class Found:
    """A batch size, and what speaks for it."""

    batch_size: int
    why: str


def most_for(shard: int) -> int:
    """The most samples a step that a shard is to be trained with: so that it has some steps, and never all at once."""
    return min(shard, MOST, max(REFERENCE, shard // STEPS_A_ROUND))


def needed_for_twice(before: int, peak: int) -> int:
    """Bytes that twice the samples will take at most: what a step adds is doubled, also the part that stays."""
    return before + 2 * max(peak - before, 0)


def grow(trial: Callable[[int], tuple[int, int] | None], *, first: int, most: int, allowed: int) -> Found:
    """The largest of the sizes first, twice that, … most whose step fits into memory.

    Args:
        trial: takes a step with so many samples, or raises FullError; the bytes held before and at the peak, None
            where nobody can tell.
        first: samples of the first step.
        most: that are wanted.
        allowed: bytes that may be held.

    Raises:
        OneSampleError: the first does not fit.
    """
    size, fitting = min(first, most), 0
    while True:
        try:
            used = trial(size)
        except FullError as error:
            if not fitting:
                raise OneSampleError(f"{size} at once, and no less can be computed: {error}") from error
            return Found(fitting, f"{size} ran out of memory")
        fitting = size
        if size >= most:
            return Found(fitting, f"{most} are the most that this shard is trained with at once")
        if used is None:
            return Found(min(max(fitting, REFERENCE), most), "this system does not tell what memory a step takes")
        size = min(2 * size, most)
        needed = needed_for_twice(*used)
        if needed > allowed:
            return Found(fitting, f"{size} would need {needed / 2**20:,.0f} MiB of {allowed / 2**20:,.0f}")


def find(
    step: Callable[[int], None], *, shard: int, least: int, device: torch.device, memory: ModuleType
) -> tuple[Found, float]:
    """The batch for a device, and its speed there: steps with twice the samples each, as long as memory lasts.

    Args:
        step: takes a step with so many samples, whole.
        shard: samples that there are.
        least: samples that a step needs.
        device: where it trains.
        memory: worker/task_device.py.

    Returns:
        the batch; samples/s with it.

    Raises:
        OneSampleError: not even `least` samples fit.
    """
    memory.give_back_memory(device)
    meter = memory.Meter(device)
    free, _ = memory.memory(device)

    def whole(size: int) -> None:
        try:
            step(size)
            return
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
            words = str(error)
        memory.give_back_memory(device)  # out here nothing holds what the step had made
        raise FullError(words)

    def trial(size: int) -> tuple[int, int] | None:
        before = meter.begin()
        whole(size)
        memory.settle(device)
        peak = meter.peak()
        return None if before is None or peak is None else (before, peak)

    allowed = (meter.begin() or 0) + int(SHARE.get(device.type, DEVICE_SHARE) * free)
    found = grow(trial, first=least, most=most_for(shard), allowed=allowed)
    while True:
        try:
            return found, samples_per_s(whole, found.batch_size, lambda: memory.settle(device))
        except FullError as error:  # it fitted once, and other steps take more
            if found.batch_size <= least:
                raise OneSampleError(f"{found.batch_size} at once, and no less can be computed: {error}") from error
            found = Found(max(found.batch_size // 2, least), f"{found.batch_size} ran out of memory")


def samples_per_s(
    step: Callable[[int], None], size: int, settle: Callable[[], None], clock: Callable[[], float] = time.perf_counter
) -> float:
    """How fast steps of so many samples are: ten of them, after three that are not counted.

    Args:
        step: takes one.
        size: samples of each.
        settle: waits for the device.
        clock: seconds.
    """
    for _ in range(WARM_UP):
        step(size)
    settle()
    began = clock()
    for _ in range(TIMED):
        step(size)
    settle()
    return size * TIMED / max(clock() - began, 1e-9)


def lr_scale(batch_size: int, *, adaptive: bool) -> float:
    """What the learning rate is multiplied with where a batch was found and not asked for.

    Linear for SGD, so that a sample moves the model as far on every device of a fleet; the root for Adam and its like,
    whose steps do not grow with the gradient.

    Args:
        batch_size: samples a step.
        adaptive: the optimiser divides by the gradient's size.

    Source: Goyal et al. 2017, arXiv 1706.02677, section 2.1; Malladi et al. 2022, arXiv 2205.10287, for Adam.
    """
    times = batch_size / REFERENCE
    return times**0.5 if adaptive else times
