"""`--to mlflow=URI`: a run in the experiment `lydian` (or MLFLOW_EXPERIMENT_NAME), found again by its tag.

How far it has come is a tag that goes with the values, in one call. Were a call cut off in the middle, the next start
sends that point again: times and steps are the job's, so MLflow is asked which of its values are there.
"""

import json
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from client.tracking.points import Point, Run
from client.tracking.table import Rows
from client.tracking.trackers import seconds

if TYPE_CHECKING:
    from mlflow.entities import Metric

JOB, AFTER = "lydian.job", "lydian.after"
METRICS, PARAMS = 900, 100  # of one call: MLflow takes 1,000 things, 100 of them parameters
LONGEST = 500  # characters of a parameter: what every server takes


def tracked(_kind: str, target: str, run: Run) -> "Mlflow":
    """The tracker."""
    return Mlflow(run, target)


class Mlflow:
    """A run of an MLflow tracking server, or of a folder."""

    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, run: Run, uri: str) -> None:
        self._run, self._uri, self.place = run, uri, uri
        self._rows = Rows(run.job)
        self._after = 0
        self._resumed = False  # whether the next point may be there in part
        self._changed = False
        self._id = ""
        self._client: Any

    def __enter__(self) -> Self:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self.failures = (OSError, MlflowException)
        self._client = MlflowClient(tracking_uri=self._uri)
        found = self._found() or self._made()
        self._id = found.info.run_id
        self._after = int(found.data.tags.get(AFTER, 0))
        self._resumed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.settle()

    def take(self, point: Point) -> None:
        """Send it, unless it is there; the run ends with the job."""
        from mlflow.entities import Metric, RunTag

        self._rows.take(point)
        if point.id <= self._after:
            return
        at = int(seconds(point.at) * 1000)
        metrics = [Metric(name, float(value), at, point.round) for name, value in point.values.items()]
        if self._resumed:
            metrics, self._resumed = [one for one in metrics if not self._has(one)], False
        words = {f"{point.type}.{name}": text for name, text in point.words.items()}
        tags = [RunTag(name, text[:LONGEST]) for name, text in {**words, AFTER: str(point.id)}.items()]
        rest = iter(metrics)
        while len(batch := list(islice(rest, METRICS))) == METRICS:
            self._client.log_batch(self._id, metrics=batch)
        self._client.log_batch(self._id, metrics=batch, tags=tags)
        self._after, self._changed = point.id, True
        if state := _ending(point):
            self._client.set_terminated(self._id, state)

    def settle(self) -> None:
        """Keep the rounds with all their words as an artifact: MLflow's values are numbers, and its tags the last."""
        if self._changed:
            self._client.log_text(self._id, self._rows.text(), "rounds.csv")
            self._changed = False

    def _found(self) -> Any:  # noqa: ANN401 - mlflow's run, which is not here to be named
        runs = self._client.search_runs([self._experiment()], filter_string=f"tags.`{JOB}` = '{self._run.job}'")
        return next(iter(runs), None)

    def _made(self) -> Any:  # noqa: ANN401
        from mlflow.entities import Param

        made = self._client.create_run(self._experiment(), tags={JOB: self._run.job}, run_name=self._run.name)
        params = (Param(name, text) for name, text in _texts(self._run.settings))
        while batch := list(islice(params, PARAMS)):
            self._client.log_batch(made.info.run_id, params=batch)
        return made

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "lydian")
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else self._client.create_experiment(name))

    def _has(self, metric: "Metric") -> bool:
        history = self._client.get_metric_history(self._id, metric.key)
        return any((one.step, one.timestamp) == (metric.step, metric.timestamp) for one in history)


def _texts(settings: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        yield name, (value if isinstance(value, str) else json.dumps(value))[:LONGEST]


def _ending(point: Point) -> str:
    """What MLflow calls the end that a job has come to; empty: it goes on."""
    state = point.words.get("state", "") if point.type == "job" else ""
    return {"finished": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}.get(state, "")
