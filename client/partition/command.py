"""`lydian partition`: cut a job's training set as the job will, and say what came of it.

    job file ──▶ python -m worker.describe ──classes, ids──▶ common.sharding ──▶ table ──▶ numbers, picture

The task and its data are read by a process with torch, as a worker does it, on this machine; the cut itself is the code
that coordinator and workers cut by, so what is shown is what will be trained on, to the sample.
"""

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import typer

from client import shown
from client.job_file import Job
from client.partition.picture import check_target, draw
from client.partition.statistics import (
    Spread,
    Statistics,
    Table,
    distances,
    effective_labels,
    histogram,
    rounded,
    statistics_of,
    table_of,
)
from client.running import python_module
from common.errors import BadJobError, LydianError
from common.messages import Described, JobSpec
from common.sharding import Partition, order_of

SHOWN_SHARDS = 40  # rows of the table; --json has all
SHOWN_CLASSES = 10  # of a shard
Classes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Wish:
    """What the command line asks for."""

    workers: int | None
    data: tuple[str, ...]
    plot: Path | None


@dataclass(frozen=True)
class Cut:
    """A training set that was cut."""

    partition: Partition
    classes: Classes | None
    no_classes: str  # why there are none


def run_partition(job: Job, wish: Wish, *, as_json: bool) -> None:
    """Cut, print, and draw if asked to.

    Raises:
        LydianError: the job's data is not cut, cannot be read, or cannot be cut so.
    """
    spec = job.spec
    if spec.script:
        raise LydianError(
            "a training script has to be run to know its data, and is not run here",
            code="bad_job",
            advice="`lydian watch` shows how many samples each worker reports.",
        )
    if spec.data.partition == "local":
        raise LydianError(
            "partition = local is not cut: every worker trains on its own data, of which only it knows",
            code="bad_job",
            advice="Any other [data] partition has shards to show.",
        )
    if wish.plot is not None:
        check_target(wish.plot)
    cut = cut_of(job, wish)
    table, classes = table_of(cut.partition, cut.classes)
    labelled = cut.classes is not None
    found = statistics_of(table, labelled=labelled)
    if as_json:
        typer.echo(json.dumps(document(spec, table, classes, found, labelled=labelled)))
    else:
        show(table, classes, found, labelled=labelled)
    if not labelled:
        typer.echo(f"no labels: {cut.no_classes}", err=True)
    if wish.plot is not None:
        draw(table, classes, title_of(spec, found), wish.plot, labelled=labelled)
        typer.echo(f"drawn: {wish.plot}", err=True)


# ---------------------------------------------------------------- the cut


def cut_of(job: Job, wish: Wish) -> Cut:
    """Read the training set, and cut it as the job will.

    Raises:
        LydianError: the task, its data or the cut is not possible; in the words of whoever found it.
    """
    data, shards = job.spec.data, shards_of(job.spec, wish.workers)
    with tempfile.TemporaryDirectory(prefix="lydian-partition-") as name:
        folder = Path(name)
        described = _described(job, wish.data, folder)
        classes = _read(folder / "classes.npy") if not described.no_classes else None
        ids = _read(folder / "ids.npy") if data.partition == "natural" else None
    partition = order_of(
        data.partition,
        total=described.train_samples,
        shards=shards,
        seed=job.spec.seed,
        alpha=data.alpha,
        labels_per_shard=data.labels_per_shard,
        labels=ids if data.partition == "natural" else classes,
    )
    return Cut(partition, classes, described.no_classes)


def shards_of(spec: JobSpec, workers: int | None) -> int | None:
    """Shards to cut; None: one an id. Where a fleet would decide, says for how many workers this is.

    Raises:
        LydianError: a number of workers is given, and the job has a number of shards of its own.
    """
    data = spec.data
    if workers is not None and (data.shards != "auto" or data.partition == "natural"):
        own = f"data.shards = {data.shards}" if data.shards != "auto" else "natural cuts by the ids"
        raise BadJobError(f"--workers {workers} says nothing: {own}", advice="Leave --workers out.")
    if data.shards != "auto":
        return data.shards
    if data.partition == "natural":
        return None
    count = spec.round.min_workers if workers is None else workers
    speeds = ", of equal speed: its cut follows theirs" if data.partition == "iid" else ""
    typer.echo(
        f"data.shards = auto: cut for {shown.several(count, 'worker')}{speeds}; --workers N for another number",
        err=True,
    )
    return count


def _described(job: Job, data: Sequence[str], folder: Path) -> Described:
    """Have a process with torch read the training set."""
    spec_file = folder / "spec.json"
    spec_file.write_text(job.spec.model_dump_json(), encoding="utf-8")
    arguments = ["--spec", str(spec_file), "--out", str(folder)]
    if job.task_source is not None:  # that very file and no other: it is the user's own, and so is the machine
        task = folder / f"{job.spec.task}.py"
        task.write_text(job.task_source, encoding="utf-8")
        arguments += ["--task", str(task)]
    arguments += [part for item in data for part in ("--data", item)]
    done = subprocess.run(python_module("worker.describe", arguments), capture_output=True, check=False)
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode:
        lines = said.splitlines() or [f"the process that reads the data ended with exit code {done.returncode}"]
        raise LydianError(
            shown.one_line(lines[0]),
            code="not_described",
            advice=shown.one_line(" ".join(lines[1:])) or "Look at the task.",
        )
    return Described.model_validate_json(done.stdout.splitlines()[-1])


def _read(path: Path) -> Classes:
    found: Classes = np.load(path, allow_pickle=False)
    return found


# ---------------------------------------------------------------- what is printed


def title_of(spec: JobSpec, found: Statistics) -> str:
    """What the picture is of."""
    data = spec.data
    detail = {
        "dirichlet": f", alpha = {data.alpha:g}",
        "quantity": f", alpha = {data.alpha:g}",
        "labels": f", {data.labels_per_shard} label pieces a shard",
        "natural": f", by {data.by}",
    }.get(data.partition, "")
    return f"{spec.name or spec.task}: {data.partition}{detail}, {found.shards:,} shards, seed {spec.seed}"


def document(
    spec: JobSpec, table: Table, classes: Sequence[int], found: Statistics, *, labelled: bool
) -> dict[str, Any]:
    """What --json prints: the job's cut, its summary, and every shard."""
    summary = {
        "shards": found.shards,
        "samples": found.samples,
        "sizes": _spread(found.sizes),
        "gini": rounded(found.gini),
        "effective_labels": None if found.labels is None else _spread(found.labels),
        "distance": None if found.distance is None else _spread(found.distance),
    }
    return {
        "task": spec.task,
        "partition": spec.data.partition,
        "seed": spec.seed,
        "summary": summary,
        "shards": list(_rows(table, classes, labelled=labelled)),
    }


def _spread(spread: Spread) -> dict[str, float]:
    return {name: rounded(value) for name, value in asdict(spread).items()}


def _rows(table: Table, classes: Sequence[int], *, labelled: bool) -> Iterator[dict[str, Any]]:
    mixed, far = effective_labels(table), distances(table)
    for shard, counts in enumerate(table.tolist()):
        row: dict[str, Any] = {"shard": shard, "samples": sum(counts)}
        if labelled:
            labels = {str(label): count for label, count in zip(classes, counts, strict=True) if count}
            row |= {"classes": len(labels), "effective_labels": rounded(float(mixed[shard]))}
            row |= {"distance": rounded(float(far[shard])), "labels": labels}
        yield row


def show(table: Table, classes: Sequence[int], found: Statistics, *, labelled: bool) -> None:
    """Print the shards as a table, and the summary below it."""
    header = ["SHARD", "SAMPLES", *(["CLASSES", "EFFECTIVE", "DISTANCE", "LABELS"] if labelled else [])]
    some = table[:SHOWN_SHARDS]
    mixed, far = effective_labels(some), distances(table)
    rows = [
        [
            str(shard),
            shown.count(sum(counts)),
            *(
                [
                    str(np.count_nonzero(counts)),
                    f"{mixed[shard]:.1f}",
                    f"{far[shard]:.2f}",
                    histogram(counts, classes, SHOWN_CLASSES),
                ]
                if labelled
                else []
            ),
        ]
        for shard, counts in enumerate(some.tolist())
    ]
    shown.print_table(header, rows, right=set(header) - {"LABELS"})
    if found.shards > SHOWN_SHARDS:
        typer.echo(f"… and {found.shards - SHOWN_SHARDS:,} more shards: --json has all of them")
    typer.echo(f"{shown.several(found.samples, 'sample')} in {shown.several(found.shards, 'shard')}")
    for what, spread, form in (
        ("samples", found.sizes, ",.0f"),
        ("effective labels", found.labels, ".1f"),
        ("distance to the whole", found.distance, ".2f"),
    ):
        if spread is not None:
            numbers = (format(value, form) for value in (spread.least, spread.median, spread.most))
            typer.echo("{:<22} least {}, median {}, most {}".format(what, *numbers))
    typer.echo(f"{'gini of the sizes':<22} {found.gini:.2f}")
