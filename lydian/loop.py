"""The loop of rounds in a training script: what it is given, what it reports, and how it goes where there is no fleet.

    rounds(model) ──asks──▶ Place ──▶ Alone: this process, nobody else
                              └─────▶ the worker's child, which put itself there (worker/task_script.py)

Whatever a script says is looked at here, in the line that said it, alone and in a fleet alike.
"""

import math
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

LARGEST = 1 << 53  # of a count, as the messages have it
MOST = 99  # metrics, one of which the loss may be beside

Numbers = dict[str, tuple[float, float]]
"""Name -> (sum, count), so that means over workers are exact."""
Only = str | Callable[[str], bool] | None
Evaluate = Callable[[Any], Mapping[str, Any]] | None


@dataclass(frozen=True)
class Wish:
    """What a script asked for in `rounds(model, …)`."""

    model: Any  # a torch.nn.Module
    data: Any = None  # the training set, or how many samples it has; None: the script said nothing
    only: Only = None
    evaluate: Evaluate = None

    @property
    def samples(self) -> int | None:
        """Samples in the training set; None: not known."""
        return self.data if self.data is None or isinstance(self.data, int) else len(self.data)


class Place(Protocol):
    """Where a script runs."""

    config: Mapping[str, Any]
    folders: Mapping[str, str]  # name -> folder with data

    @property
    def device(self) -> str:
        """What to train on, as torch names it."""

    def rounds(self, wish: Wish) -> "Iterator[Round]":
        """The rounds, one after the other; what a script was given is looked at when it asks for the next."""


@dataclass(frozen=True)
class Report:
    """What a script said of a round."""

    samples: int
    metrics: Numbers


@dataclass
class Round:
    """One round of training, in the script that trains it."""

    number: int  # from 1
    rounds: int  # of the whole job
    shard: int = 0  # which part of the round this is
    shards: int = 1  # parts that the data is cut into
    seed: int = 0  # of (job, round, shard): what torch's, numpy's and Python's generators were seeded with
    config: Mapping[str, Any] = field(default_factory=dict)  # the job's [config]
    data: int | None = None  # samples in the training set, where rounds() was told
    indices: Sequence[int] | None = None  # of this shard; None: all samples
    wanted: Callable[[], bool] = lambda: True  # whether the round still counts
    tell: Callable[..., None] = lambda **_: None  # progress, to whoever watches
    said: Report | None = None

    @property
    def stopping(self) -> bool:
        """Whether nobody wants this round any more: leave the loop over batches, and do not care for the rest."""
        return not self.wanted()

    def share(self) -> list[int]:
        """The samples that this worker is to train on in this round, as indices into the data that rounds() was given.

        All of them where the script runs alone, or where each worker has data of its own (`partition = "local"`).

        Raises:
            ValueError: rounds() was given no data, so nobody knows what there is to share.
        """
        if self.data is None:
            raise ValueError("round.share() has nothing to share: say what there is, lydian.rounds(model, data=…)")
        return list(range(self.data)) if self.indices is None else list(self.indices)

    def progress(
        self,
        *,
        step: int | None = None,
        steps: int | None = None,
        loss: Any = None,  # noqa: ANN401 - a number or a tensor
        samples: int | None = None,
    ) -> None:
        """Tell how far the round is, for `lydian watch`. Steps of torch's optimisers are counted without it.

        Raises:
            ValueError: a count that is none.
        """
        counts = {"step": step, "steps": steps, "samples": samples}
        for name, count in counts.items():
            if count is not None:
                whole(count, f"round.progress({name}=…)", least=0)
        self.tell(loss=loss, **counts)

    def report(self, samples: int, loss: Any = None, metrics: Mapping[str, Any] | None = None) -> None:  # noqa: ANN401 - a number or a tensor
        """Say what was trained: once, at the end of the round.

        Args:
            samples: different ones that were trained on, however often: the weight of this update in the average.
            loss: their mean loss.
            metrics: name -> the mean over those samples, or (sum, count).

        Raises:
            ValueError: no sample, or more than this shard has; a number that is none; a second report.
        """
        if self.said is not None:
            raise ValueError(
                f"round {self.number} was reported before: report once, and tell round.progress() the rest"
            )
        count, most = whole(samples, "round.report(samples=…)"), None if self.indices is None else len(self.indices)
        if most is not None and count > most:
            sentence = f"round.report(samples={count}): this shard has {most}; train on round.share()"
            raise ValueError(f"{sentence}, and count a sample once however often it was used")
        found = sums({} if metrics is None else metrics, "round.report()", weight=count)
        found |= {} if loss is None else sums({"train_loss": loss}, "round.report()", weight=count)
        for name, (total, _) in found.items():
            if not math.isfinite(total):
                sentence = f"round.report(): {name} is {total} in round {self.number}"
                raise ValueError(f"{sentence}; the training has come apart: try a smaller learning rate")
        self.said = Report(count, found)


# ---------------------------------------------------------------- what a script says, in numbers


def whole(value: Any, what: str, least: int = 1) -> int:  # noqa: ANN401 - whatever a script gives
    """A whole number that a message takes.

    Raises:
        ValueError: it is not.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or not least <= number < LARGEST:
        raise ValueError(f"{what} is {value!r}, where a whole number of at least {least} is needed")
    return number


def sums(measured: Any, who: str, weight: float = 1.0) -> Numbers:  # noqa: ANN401 - whatever a script gives
    """Metrics as sums and counts.

    Args:
        measured: name -> a number, or (sum, count); tensors of one number are numbers.
        who: gave them, for the sentence.
        weight: how often a bare number counts.

    Raises:
        ValueError: they are nothing of the kind, or more than MOST.
    """
    if not isinstance(measured, Mapping):
        raise ValueError(f"{who} gives a {type(measured).__name__}, where name -> number is needed")
    if len(measured) > MOST:
        raise ValueError(f"{who} gives {len(measured)} metrics, and {MOST} are possible")
    found: Numbers = {}
    for name, value in measured.items():
        pair = value if isinstance(value, tuple | list) and len(value) == 2 else None
        try:
            found[str(name)] = (number(pair[0]), number(pair[1])) if pair else (number(value) * weight, weight)
        except (
            TypeError,
            ValueError,
            RuntimeError,
        ) as error:  # RuntimeError: torch's, of a tensor with several numbers
            kind = type(value).__name__
            raise ValueError(f"{who} gives {name!r} as a {kind}, where a number or (sum, count) is needed") from error
        if not 0 <= (count := found[str(name)][1]) < LARGEST:
            raise ValueError(f"{who} gives {name!r} with a count of {count:g}, where one of at least 0 is needed")
    return found


def number(value: Any) -> float:  # noqa: ANN401 - a number or a tensor of one
    """A number of Python's; a tensor is brought over from its device."""
    return float(value.detach() if hasattr(value, "detach") else value)


def measured(wish: Wish) -> Numbers:
    """What the script's evaluate() says of its model, in evaluation mode and without gradients; nothing without one.

    Raises:
        ValueError: it gives something that is no metrics.
    """
    if wish.evaluate is None:
        return {}
    with measuring(wish.model):
        return sums(wish.evaluate(wish.model), "evaluate(model)")


@contextmanager
def measuring(model: Any) -> Iterator[None]:  # noqa: ANN401 - a torch.nn.Module
    """Inside, the model is in evaluation mode and makes no gradients; afterwards each layer is as it was."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def forgotten(round: Round) -> str:  # noqa: A002 - the word of the script
    """What to say of a round that ended without a report."""
    sentence = f"round {round.number} came to its end without round.report(samples=…)"
    return f"{sentence}: call it once, as the last thing in the loop over lydian.rounds(model)"


# ---------------------------------------------------------------- without a fleet


class Alone:
    """A script that was started by hand: $LYDIAN_ROUNDS rounds (1), on all of its data."""

    def __init__(self) -> None:
        self.config: Mapping[str, Any] = {}
        self.folders: Mapping[str, str] = {}

    @property
    def device(self) -> str:
        """The accelerator that torch finds, else the CPU."""
        import torch

        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"

    def rounds(self, wish: Wish) -> Iterator[Round]:
        """The rounds; after each of them one line on stderr."""
        total = how_many(os.environ.get("LYDIAN_ROUNDS", "1"))
        for at in range(1, total + 1):
            round = Round(number=at, rounds=total, data=wish.samples)  # noqa: A001 - the word of the script
            yield round
            if round.said is None:
                raise RuntimeError(forgotten(round))
            found = round.said.metrics | measured(wish)
            means = "".join(f", {name} {total / count:.4g}" for name, (total, count) in found.items() if count)
            sys.stderr.write(f"lydian: round {at} of {round.rounds}, {round.said.samples} samples{means}\n")


def how_many(said: str) -> int:
    """The rounds of a script alone.

    Raises:
        ValueError: it is no whole number above zero.
    """
    if not said.isdecimal() or int(said) < 1:
        raise ValueError(f"LYDIAN_ROUNDS is {said!r}, where a whole number of at least 1 is needed")
    return int(said)


# ---------------------------------------------------------------- what a script calls


class Here:
    """The place of this process, and whether its loop of rounds has begun."""

    place: Place = Alone()
    begun = False
    own: tuple[str, ...] = ()  # folders whose files are the script's as much as itself


def put(place: Place) -> None:
    """Have the script of this process run at a place: of the worker's child, before it runs one."""
    Here.place, Here.begun, Here.own = place, False, ()


def owns(folder: str) -> None:
    """Have errors that come out of a folder's files be told with those files' names and lines.

    Args:
        folder: with a slash at its end.
    """
    Here.own = (*Here.own, folder)


def rounds(
    model: Any,  # noqa: ANN401 - a torch.nn.Module
    *,
    data: int | Sized | None = None,
    only: Only = None,
    evaluate: Evaluate = None,
) -> Iterator[Round]:
    """The rounds of the job: a script has one loop over them.

    When a round begins, the model has the global weights, and torch's, numpy's and Python's generators are seeded by
    (job, round, shard). When the loop asks for the next, what the model has then is this worker's update.

    Args:
        model: a torch.nn.Module, on whatever device. Its weights are loaded and read where it is.
        data: the training set, or how many samples it has, where all workers have the same and are to share it:
            train on `round.share()`. None: each worker trains on what the script loads there.
        only: what of the model travels: None, everything; "trainable", the parameters with requires_grad and the
            running statistics of normalisation layers (adapters); or name of a tensor -> bool.
        evaluate: model -> metrics, name -> number or (sum, count): measures the global model, in evaluation mode.

    Raises:
        TypeError, ValueError: one of these is something else.
        RuntimeError: it was called before in this script.
    """
    if not callable(getattr(model, "state_dict", None)):
        raise TypeError(f"lydian.rounds() needs a torch.nn.Module, and was given a {type(model).__name__}")
    if not (only in (None, "trainable") or callable(only)):
        raise ValueError(f'lydian.rounds(only={only!r}): it is "trainable", or a function of a tensor\'s name')
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"lydian.rounds(evaluate=…) needs a function, and was given a {type(evaluate).__name__}")
    wish = Wish(model, data, only, evaluate)
    if wish.samples is not None:
        whole(wish.samples, "the number of samples in lydian.rounds(data=…)")
    if Here.begun:
        raise RuntimeError("lydian.rounds() was called a second time: a script has one loop of rounds")
    Here.begun = True
    return Here.place.rounds(wish)


def config() -> dict[str, Any]:
    """The job's [config]; nothing where the script runs alone."""
    return dict(Here.place.config)


def data(name: str, default: str | None = None) -> str:
    """The folder that this worker's owner offers under a name (`lydian work --data NAME=PATH`).

    Args:
        name: of the data.
        default: where it is otherwise, such as on the machine where the script is written.

    Raises:
        FileNotFoundError: nobody offers it, and there is no default.
    """
    found = Here.place.folders.get(name, default)
    if found is None:
        raise FileNotFoundError(f"no data named {name} is offered here: start the worker with --data {name}=PATH")
    return found


def device() -> str:
    """What to train on: the worker's device, or alone the accelerator that torch finds, else the CPU."""
    return Here.place.device
