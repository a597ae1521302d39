"""Updates of a round in, the next model out: the shell around averaging, optimizers and codecs.

    base + K updates ──average──▶ the next model, with the header of base, verbatim
                                  a step for workers that have the base, where the job sends steps
                                  what the outer step and the codec remember until the next round

Threads compute the blocks; the thread that called hashes and writes them, in order, while the disk takes what came
before. Small updates are not worth threads: it computes their blocks too. Everything is read block by block into
buffers that are used again: memory is a few blocks, whatever the size of the model and the number of updates. Nothing
is mapped, since mapped pages count as ours. The bytes that come out depend on the base, the updates and their order
alone: not on the size of a block, the number of threads, nor on how a file lays its tensors out.
"""

import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from io import FileIO
from itertools import islice
from pathlib import Path

import numpy as np

from common.codecs import Codec
from common.deltas import Encoded, StepWriter, check_encoded, check_kept, is_trained, read_delta
from common.errors import BadUpdateError
from common.output import Output
from common.weights import Array, Layout, TensorInfo, read_block, read_exactly, read_layout, shown, typed
from server.amplification import amplification
from server.averaging import Float64Block, Rule, cast, majority, maximum, pooled_variance, rule_of, weighted_mean
from server.inspection import model_layout
from server.optimizers import OuterStep
from server.privacy import Noisy
from server.robust import check_layout, norm_of, not_finite_at, squared_distance
from server.robust_rules import Plan, Weighted, combination, decide, middle, spans, trimmed_mean
from server.robust_rules import Rule as RobustRule
from server.surveying import SPAN, Survey

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = max(1, min(4, CORES))
BLOCK_ELEMENTS = 1 << 17  # whole blocks of every codec; with half of it, threads wait for each other a third longer
SMALL = 16 << 20  # bytes of updates that are averaged before threads are there to help
SMALL_BLOCK_ELEMENTS = 1 << 15  # of those; larger buffers cost more to get from the system than calls to fill them
OPEN_FILES = 256  # kept open during an average; a quarter of what Linux allows a process unless told otherwise
_WIDEST = 8  # bytes of the widest dtype

_Place = tuple[int, int, int]  # of a block: the tensor's number, the first element, elements


class Stopped(Exception):  # noqa: N818 - not an error: what was asked for
    """The average was broken off because its coordinator stops. The next one does it again, from the same files."""


@dataclass(frozen=True)
class Memory:
    """What one round leaves to the next: bare float32 files, the trained tensors in the order of the model.

    A file that is None, or is not there, is zeros: that of the first round.
    """

    states: tuple[Path | None, ...] = ()  # of the outer step, then of the robust rule
    residual: Path | None = None  # what the steps that were sent left out
    reads: tuple[Path, ...] = ()  # only read: the outer step gets them after its states


@dataclass(frozen=True)
class Rules:
    """How a job's updates become its next model."""

    step: OuterStep
    update: Codec | None = None  # what updates are encoded with; None: they are whole models
    down: Codec | None = None  # what the step to the next model is encoded with; None: workers fetch whole models
    robust: RobustRule | None = None  # instead of the mean
    noisy: Noisy | None = None  # how updates become a private mean; None: the mean that their samples weigh

    @property
    def states(self) -> int:
        """Numbers that are remembered for each element."""
        return self.step.states + (0 if self.robust is None else self.robust.states)


@dataclass(frozen=True)
class Targets:
    """The files to write. Each is fsynced, and removed if anything fails; renaming them is the caller's part."""

    model: Path
    states: tuple[Path, ...] = ()
    step: Path | None = None  # both or none: with Rules.down
    residual: Path | None = None


@dataclass(frozen=True)
class Since:
    """What an update of asynchronous rounds began with."""

    base: Path
    factor: float  # of its change


@dataclass(frozen=True)
class Averaged:
    """What was written: SHA-256 in hex, of each target."""

    model: str
    states: tuple[str, ...] = ()
    step: Encoded | None = None  # with the residual's digest
    amplification: float | None = (
        1.0  # how far the outer step went, in lengths of the mean change; None: there was none
    )


def average(
    base: Path,
    updates: Sequence[tuple[Path, int]],
    targets: Targets,
    *,
    rules: Rules,
    late: Sequence[tuple[Path, int, float]] = (),
    weights: Sequence[float] | None = None,
    since: Sequence[Since] | None = None,
    memory: Memory = Memory(),
    stopped: Callable[[], bool] = lambda: False,
    block_elements: int | None = None,
    threads: int | None = None,
) -> Averaged:
    """Fold the updates of a round into the next model.

    Args:
        base: the model that the round began with. Its header, notes included, becomes that of the next model.
        updates: (file, samples) of each update that counts, in the order of the shards. Each has been inspected.
        targets: where to write.
        rules: how.
        late: (file, samples, factor) of each encoded update of an earlier round: its change times the factor is one
            more member of the mean. In what is not trained (buffers, integers) it has no part.
        weights: what each update weighs in what is trained, those of `late` after the others; None: its samples.
        since: of asynchronous rounds, one for each update: the mean of all changes, each times its factor, is added to
            the base. What is not trained (buffers, integers) is joined as it is, of all updates.
        memory: what the round before has left.
        stopped: asked before each block whether to give up.
        block_elements: elements of each file in memory at once, in each thread, whole blocks of every codec; it changes
            no byte of the result. None: as suits the updates.
        threads: that compute; nor does their number. None: as many as the updates are worth.

    Raises:
        ValueError: no update (of a private round that is one more: only noise), one with less than one sample, too few
            for the robust rule, late ones that are no changes, not a base for each, or late ones with a robust rule.
        Stopped: `stopped` said so.
        BadUpdateError: an update no longer fits the base, a new value is beyond its dtype (server.averaging.cast), or
            what the outer step remembers beyond float32.
        OSError: reading or writing failed, or the base or the memory is damaged.
    """
    if not (updates or rules.noisy) or min((samples for _, samples in updates), default=1) < 1:
        raise ValueError(f"{len(updates)} updates, each of at least one sample, were to be averaged")
    if late and rules.update is None:
        raise ValueError("late updates that are whole models cannot be averaged")
    if rules.robust is not None:
        rules.robust.check(len(updates))
        if late or since is not None or weights is not None:
            raise ValueError(f"late updates and other weights have no part in {rules.robust.name}")
    if since is not None and (late or len(since) != len(updates)):
        raise ValueError(f"{len(updates)} updates began with {len(since)} bases, and {len(late)} are late")
    layout = model_layout(base)
    factors = [1.0] * len(updates) + [factor for _, _, factor in late]
    if since is not None:
        factors = [one.factor for one in since]
    updates = [*updates, *((path, samples) for path, samples, _ in late)]
    starts = [_starts(at, path, layout, rules.update) for at, (path, _) in enumerate(updates)]
    weighed = [float(samples) for _, samples in updates] if weights is None else list(weights)
    moved, changed = array("d"), array("d")  # squares, of each block
    with ExitStack() as stack:
        outputs = _Outputs(layout, rules, targets, memory.residual, stack)
        bases = [base] * len(updates)
        if since is not None and rules.update is None:  # of an encoded change nobody reads the base: it may be gone
            bases = [one.base for one in since]
        changes = since is not None or any((rules.update, rules.robust, rules.noisy))
        before = _trained_before(layout)
        unknown = [None] * (rules.states - len(memory.states))
        states = (*memory.states, *unknown, *memory.reads)
        inputs = _Inputs(
            layout, base, updates, factors, weighed, starts, rules, before, states, len(late), bases, changes
        )
        small = layout.size * len(updates) <= SMALL
        block_elements = block_elements or (SMALL_BLOCK_ELEMENTS if small else BLOCK_ELEMENTS)
        threads = threads or (1 if small else THREADS)
        number = threads + 1 if threads > 1 else 1
        folds = [_Fold(inputs, block_elements, OPEN_FILES // number, stack) for _ in range(number)]
        if rules.robust is not None:
            plan = _plan(rules.robust, folds, inputs, threads, stopped)
            for fold in folds:
                fold.plan = plan
        for block in _in_order(folds, _places(layout, block_elements, stopped)):
            outputs.write(block)
            if block.squares is not None:
                moved.append(block.squares[0])
                changed.append(block.squares[1])
        # A step that does not look at the base gives the mean: it goes as far as that, whatever that is.
        gone = amplification(norm_of(moved), norm_of(changed)) if rules.step.wants_base else 1.0
        return outputs.finish(gone)


def _plan(
    rule: RobustRule, folds: Sequence["_Fold"], inputs: "_Inputs", threads: int, stopped: Callable[[], bool]
) -> Plan:
    """Measure the updates as far as the rule needs that, and decide how they are joined."""

    def check() -> None:
        if stopped():
            raise Stopped("averaging was broken off while the updates were measured")

    samples = [samples for _, samples in inputs.updates]
    return decide(rule, samples, Survey(folds, len(samples), inputs.layout, threads, check))


def _starts(at: int, path: Path, layout: Layout, codec: Codec | None) -> "array[int]":
    """Where each tensor of the base lies in update number `at`, in the order of the base."""
    try:
        found = read_layout(path)
        if codec is None:
            check_layout(found, layout)
        else:
            check_encoded(found, layout, codec)
    except BadUpdateError as error:
        raise BadUpdateError(f"update {at} ({path.name}): {error}", code=error.code, advice=error.advice) from error
    # Eight bytes a tensor: a thousand layouts kept whole would be larger than the blocks.
    return array("Q", (found[tensor.name].start for tensor in layout.tensors))


def _trained_before(layout: Layout) -> Sequence[int]:
    """For each tensor, how many trained elements come before it."""
    before, count = list[int](), 0
    for tensor in layout.tensors:
        before.append(count)
        count += tensor.elements if is_trained(tensor, layout.notes) else 0
    return before


# ---------------------------------------------------------------- blocks, in threads


@dataclass
class _Block:
    """New values of one piece of one tensor; good until its fold computes the next."""

    index: int  # of the tensor
    first: int  # element
    values: Array  # in the tensor's dtype; float64 where a step is still to be made of them
    base: Array | None  # where a step is to be made: the old values
    states: list[Array] = field(default_factory=list)  # float32, where the tensor is trained
    squares: tuple[float, float] | None = None  # of what the step moved and of the mean change, where that is looked at


@dataclass(frozen=True)
class _Inputs:
    """What an average reads."""

    layout: Layout
    base: Path
    updates: Sequence[tuple[Path, int]]  # those in time first
    factors: Sequence[float]  # of each update's change
    weights: Sequence[float]  # of each update, in what is trained
    starts: Sequence["array[int]"]  # of each update's tensors
    rules: Rules
    before: Sequence[int]  # trained elements before each tensor
    states: Sequence[Path | None]  # of the outer step, of the robust rule, then what the step only reads
    late: int = 0  # how many of the updates, the last ones, are late: only their change counts
    bases: Sequence[Path] = ()  # that each update began with
    changes: bool = False  # whether what is joined are changes, and not the models that the updates came to


class _Fold:
    """What one block at a time is computed with: files of its own, since each has a place in it, and buffers."""

    def __init__(self, inputs: _Inputs, block_elements: int, open_files: int, stack: ExitStack) -> None:
        """`stack` closes what is opened; of more updates than `open_files`, each is opened again for every block."""
        self._in, self._layout, self._rules = inputs, inputs.layout, inputs.rules
        self._samples = [samples for _, samples in inputs.updates]
        self._in_time = len(inputs.updates) - inputs.late
        self._model = stack.enter_context(inputs.base.open("rb", buffering=0))
        self._files = [stack.enter_context(path.open("rb", buffering=0)) for path, _ in inputs.updates[:open_files]]
        others = [path for path in dict.fromkeys(inputs.bases) if path != inputs.base][:open_files]
        opened = {path: stack.enter_context(path.open("rb", buffering=0)) for path in others}
        self._bases = {inputs.base: self._model, **opened}
        self._states = [
            stack.enter_context(path.open("rb", buffering=0)) if path is not None and path.exists() else None
            for path in inputs.states
        ]
        for file in self._states:
            if file is not None:
                check_kept(file, self._layout)
        self._index_of = {tensor.name: index for index, tensor in enumerate(self._layout.tensors)}
        at_once = block_elements if self._rules.robust is None else max(block_elements, SPAN)
        longest = min(at_once, max((tensor.elements for tensor in self._layout.tensors), default=0))
        self._total, self._scratch, self._origin = (np.empty(longest) for _ in range(3))
        self._change = np.empty(longest if inputs.changes and self._rules.update is None else 0)
        self._wide_states = [np.empty(longest) for _ in inputs.states]
        self.plan: Plan | None = None  # of a robust rule, once it is decided
        self._raw, self._raw_mean, self._raw_result, self._raw_base = (
            np.empty(longest * _WIDEST, np.uint8) for _ in range(4)
        )

    def block(self, index: int, first: int, count: int) -> _Block:
        """The new values [first, first + count) of tensor number `index`."""
        tensor, notes = self._layout.tensors[index], self._layout.notes
        if is_trained(tensor, notes):
            return self._trained(index, first, count)
        if self.plan is not None:
            return _Block(index, first, self._middle(self.plan, index, first, count), None)
        if self._rules.noisy is not None:  # whatever is not trained would leave the workers without noise: it stays
            return _Block(index, first, read_block(self._model, tensor, tensor.start, first, count, self._raw), None)
        blocks, in_time = self._blocks(index, first, count, self._raw), self._samples[: self._in_time]
        rule = rule_of(tensor, notes)
        if rule is Rule.MAJORITY:
            return _Block(index, first, majority(blocks, in_time), None)
        if rule is Rule.MAXIMUM:
            return _Block(index, first, maximum(blocks), None)
        if rule is Rule.VARIANCE:
            means = self._blocks(self._index_of[notes.variances[tensor.name]], first, count, self._raw_mean)
            values = pooled_variance(blocks, means, in_time)
        else:
            values = weighted_mean(blocks, in_time, out=self._total[:count], scratch=self._scratch[:count])
        return _Block(index, first, self._cast(values, tensor, first, count), None)

    def _trained(self, index: int, first: int, count: int) -> _Block:
        tensor, rules = self._layout.tensors[index], self._rules
        wants_base = self._in.changes or rules.down is not None or rules.step.wants_base
        base, origin = None, self._origin[:count]
        if wants_base:
            base = read_block(self._model, tensor, tensor.start, first, count, self._raw_base)
            np.copyto(origin, base)
        centre = [self._state(at, index, first, count) for at in range(rules.step.states, rules.states)]
        if self.plan is not None:
            mean = self._joined(self.plan, index, first, count, centre)
        else:
            mean = self._mean(index, first, count)
        if self._in.changes:
            np.add(mean, origin, out=mean)
        values, kept, squares = self._stepped(index, first, base, origin, mean)
        kept += _narrowed(centre, tensor, first)
        if rules.down is not None:
            return _Block(index, first, values, base, kept, squares)
        return _Block(index, first, self._cast(values, tensor, first, count), None, kept, squares)

    def _stepped(
        self, index: int, first: int, base: Array | None, origin: Float64Block, mean: Float64Block
    ) -> tuple[Float64Block, list[Array], tuple[float, float] | None]:
        """The outer step on a block: its new values, what it remembers, the squares of its way and of the mean's."""
        step, count, tensor = self._rules.step, mean.size, self._layout.tensors[index]
        seen = (*range(step.states), *range(self._rules.states, len(self._wide_states)))
        states, squares = [self._state(at, index, first, count) for at in seen], None
        measured = base if step.wants_base else None
        scratch = self._scratch[:count]
        changed = squared_distance(mean, measured, scratch=scratch) if measured is not None else 0.0
        with np.errstate(over="ignore", invalid="ignore"):  # what is no number is refused, by name
            values = step.apply(origin, mean, states)
            if measured is not None:
                squares = squared_distance(values, measured, scratch=scratch), changed
        return values, _narrowed(states[: step.states], tensor, first), squares

    def _mean(self, index: int, first: int, count: int) -> Float64Block:
        """The mean of these elements of all updates, or of what they changed: by their samples, or private."""
        of = self._changes(index, first, count) if self._in.changes else self._blocks(index, first, count, self._raw)
        out, scratch = self._total[:count], self._scratch[:count]
        if self._rules.noisy is not None:
            name = self._layout.tensors[index].name
            return self._rules.noisy.mean_change(of, name, first, out=out, scratch=scratch)
        return weighted_mean(of, self._in.weights, out=out, scratch=scratch)

    # ------------------------------------------------------------ a robust rule

    def _joined(self, plan: Plan, index: int, first: int, count: int, centre: Sequence[Float64Block]) -> Float64Block:
        """The change that a plan makes of these elements; where a centre is kept, it becomes that."""
        change = self._total[:count]
        if isinstance(plan, Weighted):
            changes = self._changes(index, first, count)
            combination(changes, plan.weights, change, self._scratch[:count])
        else:
            for at, elements in spans(count, SPAN):
                rows = self.changes(index, first + at, elements)
                change[at : at + elements] = plan.join(rows[list(plan.members)])
        for kept in centre:
            assert isinstance(plan, Weighted)  # noqa: S101 - only centred clipping has one
            change += plan.of_centre * kept
            np.copyto(kept, change)
        return change

    def _middle(self, plan: Plan, index: int, first: int, count: int) -> Array:
        """The median of what is not trained, over the updates that the plan kept; of masks the majority."""
        tensor, members = self._layout.tensors[index], plan.members
        result = typed(self._raw_result, tensor, count)
        for at, elements in spans(count, SPAN):
            blocks = enumerate(self._blocks(index, first + at, elements, self._raw))
            rows = np.stack([block.copy() for number, block in blocks if number in members])
            piece = result[at : at + elements]
            if tensor.is_float:
                values = trimmed_mean(rows.astype(np.float64), (len(rows) - 1) // 2)
                cast(values, tensor, first=first + at, out=piece)
            elif tensor.dtype == "BOOL":
                np.copyto(piece, majority(rows, [1] * len(rows)))
            else:
                np.copyto(piece, middle(rows))
        return result

    def changes(self, index: int, first: int, count: int) -> Float64Block:
        """Shape (updates, count): what every update changed in these elements (surveying.Reader)."""
        rows = np.empty((len(self._samples), count))
        for row, change in zip(rows, self._changes(index, first, count), strict=True):
            np.copyto(row, change)
        return rows

    def centre(self, index: int, first: int, count: int) -> Float64Block:
        """Shape (count,): what the robust rule remembers of these elements (surveying.Reader)."""
        return self._state(self._rules.step.states, index, first, count)

    def _changes(self, index: int, first: int, count: int) -> Iterator[Array]:
        """What each update changed in these elements in turn, times its factor, each over the one before."""
        if self._rules.update is not None:
            yield from self._deltas(self._rules.update, index, first, count)
            return
        tensor, change = self._layout.tensors[index], self._change[:count]
        begun, base = None, change
        for (file, start), path, factor in zip(self._of_each(index), self._in.bases, self._in.factors, strict=True):
            np.copyto(change, read_block(file, tensor, start, first, count, self._raw))
            if path != begun:
                begun, base = path, self._base_block(path, tensor, first, count)
            np.subtract(change, base, out=change)
            yield change if factor == 1.0 else np.multiply(change, factor, out=change)

    def _base_block(self, path: Path, tensor: TensorInfo, first: int, count: int) -> Array:
        """The block of a version of the model. All have the header of the first: a tensor lies at one place in them."""
        known = self._bases.get(path)
        with path.open("rb", buffering=0) if known is None else nullcontext(known) as file:
            return read_block(file, tensor, tensor.start, first, count, self._raw_mean)

    def _cast(self, values: Float64Block, tensor: TensorInfo, first: int, count: int) -> Array:
        return cast(values, tensor, first=first, out=typed(self._raw_result, tensor, count))

    def _blocks(self, index: int, first: int, count: int, buffer: Array) -> Iterator[Array]:
        """The same block of every update in turn, each over the one before in `buffer`."""
        tensor = self._layout.tensors[index]
        for file, start in islice(self._of_each(index), self._in_time):
            yield read_block(file, tensor, start, first, count, buffer)

    def _deltas(self, codec: Codec, index: int, first: int, count: int) -> Iterator[Array]:
        """The same block of every encoded update in turn, each over the one before."""
        tensor, delta = self._layout.tensors[index], self._raw[: 4 * count].view(np.float32)
        for (file, start), factor in zip(self._of_each(index), self._in.factors, strict=True):
            change = read_delta(file, codec, tensor, start, first, count, out=delta)
            yield change if factor == 1.0 else np.multiply(change, np.float32(factor), out=delta)

    def _of_each(self, index: int) -> Iterator[tuple[FileIO, int]]:
        """Every update, open, and the byte at which it has this tensor."""
        for at, starts in enumerate(self._in.starts):
            if at < len(self._files):
                yield self._files[at], starts[index]
            else:
                with self._in.updates[at][0].open("rb", buffering=0) as file:
                    yield file, starts[index]

    def _state(self, number: int, index: int, first: int, count: int) -> Float64Block:
        """What the outer step remembers of these elements; zeros in the first round."""
        wide, file = self._wide_states[number][:count], self._states[number] if number < len(self._states) else None
        if file is None:
            wide.fill(0.0)
            return wide
        narrow = np.empty(count, np.float32)
        read_exactly(file, narrow, 4 * (self._in.before[index] + first))
        np.copyto(wide, narrow)
        return wide


def _narrowed(states: Sequence[Float64Block], tensor: TensorInfo, first: int) -> list[Array]:
    """What is remembered of a block, as it is kept."""
    with np.errstate(over="ignore", invalid="ignore"):
        kept: list[Array] = [state.astype(np.float32) for state in states]
    for state in kept:
        index = not_finite_at(state)
        if index is not None:
            where = f"{shown(tensor.name)} at element {first + index}"
            sentence = f"what the outer step remembers of {where} is beyond what float32 can hold"
            advice = "Lower train.lr: the workers' changes are too large."
            raise BadUpdateError(sentence, code="not_finite", advice=advice)
    return kept


def _in_order(folds: Sequence[_Fold], places: Iterable[_Place]) -> Iterator[_Block]:
    """The blocks of the next model; each is good until the next is asked for. One fold less computes than there are."""
    if len(folds) == 1:
        yield from (folds[0].block(*place) for place in places)
        return
    free, busy = deque(folds), deque[tuple[_Fold, Future[_Block]]]()
    with ThreadPoolExecutor(len(folds) - 1, thread_name_prefix="fold") as pool:
        try:
            for place in places:
                if not free:
                    fold, oldest = busy.popleft()
                    yield oldest.result()
                    free.append(fold)
                fold = free.popleft()
                busy.append((fold, pool.submit(fold.block, *place)))
            for _, left in busy:
                yield left.result()
        finally:
            for _, left in busy:
                left.cancel()


def _places(layout: Layout, block_elements: int, stopped: Callable[[], bool]) -> Iterator[_Place]:
    """Of each block in the order of the model: the tensor's number, the first element, and how many they are."""
    for index, tensor in enumerate(layout.tensors):
        for first in range(0, tensor.elements, block_elements):
            if stopped():
                raise Stopped(f"averaging was broken off at {tensor.name}, element {first}")
            yield index, first, min(block_elements, tensor.elements - first)


# ---------------------------------------------------------------- files, in order


class _Outputs:
    """All files of an average under way."""

    def __init__(self, layout: Layout, rules: Rules, targets: Targets, residual: Path | None, stack: ExitStack) -> None:
        """`stack` removes them unless `finish` was reached."""
        self._model = stack.enter_context(Output(targets.model))
        self._states = [stack.enter_context(Output(path)) for path in targets.states]
        self._step: StepWriter | None = None
        if rules.down is not None:
            assert targets.step is not None  # noqa: S101 - Targets says so
            assert targets.residual is not None  # noqa: S101 - as before
            writer = StepWriter(layout, rules.down, targets.step, targets.residual, previous=residual)
            self._step = stack.enter_context(writer)
        self._model.write(layout.header)

    def write(self, block: _Block) -> None:
        values = block.values
        if self._step is not None:
            base = block.base if block.base is not None else values
            values = self._step.block(block.index, block.first, values, base)
        self._model.write(values)
        for output, state in zip(self._states, block.states, strict=False):  # of a buffer there is none
            output.write(state)

    def finish(self, amplification: float | None) -> Averaged:
        step = self._step.finish() if self._step is not None else None
        states = tuple(output.finish() for output in self._states)
        return Averaged(self._model.finish(), states, step, amplification)
