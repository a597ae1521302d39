"""Where a job's points go: one small interface, and the trackers by name.

A tracker is opened for a run, takes its points in order, and is asked to settle whenever there is nothing more for now.
It is given all points each time that it is opened, and passes over those that it has: it alone can know.

    with tracker:            begin, or go on with what an earlier start has written
        tracker.take(point)  … of any age, in the order of their ids
        tracker.settle()     what was taken is kept, whatever happens now
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Protocol, Self

from client.tracking.points import Point, Run
from common.errors import LydianError


class Tracker(Protocol):
    """One place that a job is tracked in. A context manager: leaving it settles, and closes what it has open."""

    place: str
    """Where a person finds it: a file, a folder, an address."""
    failures: tuple[type[Exception], ...]
    """What its package raises when the place does not take something."""

    def __enter__(self) -> Self:
        """Begin, or find out what is there from an earlier start."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, with what was taken settled as far as that can be."""

    def take(self, point: Point) -> None:
        """Write a point, unless it is there."""

    def settle(self) -> None:
        """Have everything that was taken kept."""


@dataclass(frozen=True)
class Kind:
    """A tracker that `--to` knows."""

    target: str
    """What follows the equals sign, for people."""
    package: str = ""
    """That it needs, as it is imported; empty: none."""
    extra: str = ""
    """Of pyproject.toml, which brings it."""


KINDS = {
    "csv": Kind("FILE"),
    "jsonl": Kind("FILE"),
    "tensorboard": Kind("DIR", "tensorboardX", "tensorboard"),
    "wandb": Kind("[ENTITY/]PROJECT", "wandb", "wandb"),
    "trackio": Kind("PROJECT", "trackio", "trackio"),
    "mlflow": Kind("URI", "mlflow", "mlflow"),
}


@dataclass(frozen=True)
class Wish:
    """One `--to`."""

    kind: str
    target: str

    def __str__(self) -> str:
        return f"{self.kind}={self.target}"


def wish(text: str) -> Wish:
    """What `--to KIND=TARGET` asks for.

    Raises:
        LydianError: it is none, names no kind, or its package is not here (bad_tracker, missing_packages).
    """
    kind, sign, target = text.partition("=")
    if kind not in KINDS or not sign or not target:
        known = ", ".join(f"{name}={one.target}" for name, one in KINDS.items())
        raise LydianError(f"--to {text} names no tracker", code="bad_tracker", advice=f"There are {known}.")
    needs = KINDS[kind]
    if needs.package and importlib.util.find_spec(needs.package) is None:
        raise LydianError(
            f"--to {text} needs the package {needs.package}, which {sys.executable} does not have",
            code="missing_packages",
            advice=f"In a clone: pip install -e '.[{needs.extra}]'.",
        )
    return Wish(kind, target)


def tracker(one: Wish, run: Run) -> Tracker:
    """The tracker that a wish is for; nothing is opened yet."""
    return _maker(one.kind)(one.kind, one.target, run)


def _maker(kind: str) -> Callable[[str, str, Run], Tracker]:
    """What makes a tracker of a kind. Imported here, since some bring a package that takes seconds."""
    match kind:
        case "csv":
            from client.tracking import table

            return table.tracked
        case "jsonl":
            from client.tracking import lines

            return lines.tracked
        case "tensorboard":
            from client.tracking import tensorboard

            return tensorboard.tracked
        case "mlflow":
            from client.tracking import mlflow

            return mlflow.tracked
        case _:
            from client.tracking import hosted

            return hosted.tracked


@contextmanager
def named(one: Wish, tracker: Tracker) -> Iterator[None]:
    """Have what goes wrong inside told in a sentence that names the tracker.

    Raises:
        LydianError: tracker_failed.
    """
    try:
        yield
    except LydianError:
        raise
    except tracker.failures as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise LydianError(
            f"--to {one} did not take it: {said[0]}",
            code="tracker_failed",
            advice="The job goes on. Mend it, and give the same command again: it goes on where it was.",
        ) from error


def seconds(at: str) -> float:
    """A point's time in seconds since 1970."""
    return datetime.fromisoformat(at).timestamp()
