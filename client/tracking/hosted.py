"""`--to wandb=PROJECT` and `--to trackio=PROJECT`: two packages with one way of being called: init, log, finish.

W&B is told the id of each point as its step, which must rise: it drops what it has, and says how far it had come. A run
that is offline (WANDB_MODE=offline) and Trackio cannot be asked, so a mark in the state folder says it.
"""

import contextlib
import hashlib
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import platformdirs

from client.tracking.marks import Mark, read_mark, write_mark
from client.tracking.points import Point, Run


def tracked(kind: str, target: str, run: Run) -> "Wandb | Trackio":
    """The tracker."""
    return Wandb(run, target) if kind == "wandb" else Trackio(run, target)


def mark_file(kind: str, target: str, job: str) -> Path:
    """Where it is noted how far a job is tracked there, on this machine."""
    digest = hashlib.sha256("\n".join((kind, target, job)).encode()).hexdigest()[:16]
    return Path(platformdirs.user_state_dir("lydian")) / "tracking" / f"{kind}-{digest}.json"


def _said(point: Point) -> dict[str, float | str]:
    return {**point.values, **{f"{point.type}/{name}": text for name, text in point.words.items()}}


class Wandb:
    """A run of Weights & Biases; its id is the job's, so that a second start goes on with it."""

    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, run: Run, target: str) -> None:
        self._run, self.place = run, target
        self._entity, _, self._project = target.rpartition("/")
        self._mark = mark_file("wandb", target, run.job)
        self._after = 0
        self._open: Any

    def __enter__(self) -> Self:
        import wandb

        self.failures = (OSError, wandb.errors.Error)
        with contextlib.redirect_stdout(sys.stderr):
            self._open = wandb.init(
                entity=self._entity or None,
                project=self._project,
                id=self._run.job,
                name=self._run.name,
                config=dict(self._run.settings),
                resume="allow",
                settings=wandb.Settings(console="off"),  # what this command prints is not the run's
            )
        offline = os.environ.get("WANDB_MODE", "online") == "offline"
        self._after = read_mark(self._mark).after if offline else max(0, self._open.starting_step - 1)
        self._open.define_metric("round")
        for group in ("model", "round", "train", "evaluation", "privacy", "worker"):
            self._open.define_metric(f"{group}/*", step_metric="round")
        self.place = self._open.url or self.place
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._open.finish(exit_code=0 if error is None else 1)
        if error is None:
            self.settle()

    def take(self, point: Point) -> None:
        """Log it, unless it is there."""
        if point.id > self._after:
            self._open.log({"round": point.round, **_said(point)}, step=point.id)
            self._after = point.id

    def settle(self) -> None:
        """Note how far it is: what was logged is with W&B's own process, which outlives this one."""
        write_mark(self._mark, Mark(self._after))


class Trackio:
    """A run of Trackio, named as the job. It keeps what was logged when it is finished: so that is settling."""

    failures: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError)

    def __init__(self, run: Run, project: str) -> None:
        self._run, self._project, self.place = run, project, project
        self._mark = mark_file("trackio", project, run.job)
        self._after = 0
        self._open: Any = None

    def __enter__(self) -> Self:
        self._after = read_mark(self._mark).after
        if self._after:
            try:
                self._begin("must")
            except ValueError:  # the run was deleted: everything is told again
                self._after = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle()

    def take(self, point: Point) -> None:
        """Log it, unless it is there."""
        if point.id <= self._after:
            return
        if self._open is None:
            self._begin("allow")
        self._open.log(_said(point), step=point.round)
        self._after = point.id

    def settle(self) -> None:
        """Finish the run, which the next point goes on with."""
        if self._open is None:
            return
        with contextlib.redirect_stdout(sys.stderr):
            self._open.finish()
        self._open = None
        write_mark(self._mark, Mark(self._after))

    def _begin(self, resume: str) -> None:
        import trackio

        with contextlib.redirect_stdout(sys.stderr):
            self._open = trackio.init(
                self._project,
                name=self._run.job,
                config=dict(self._run.settings),
                resume=resume,
                auto_log_gpu=False,  # of this machine, which trains nothing
                auto_log_cpu=False,
                embed=False,
            )
