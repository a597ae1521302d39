"""`python -m worker.describe`: have a training process read a job's training set, and write what its cut rests on.

    OUT/classes.npy   the class of each sample, where it has one        OUT/ids.npy   its id, where the job cuts by one

Both int64 (samples,). On stdout one line, a Described message; what fails is a sentence on stderr and exit code 1.
Started by `lydian partition`, which has no torch and no way to run a task.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from common.errors import LydianError
from common.messages import Described, JobSpec, Progress
from common.tasks import BUILTIN
from worker import plan
from worker.__main__ import data_folders
from worker.child import Child, TaskFailure

STALL_S = 600.0  # a data set may be downloaded
ADVICE = {  # here nobody has a log, nor a worker
    "no_data": "Put the data on this machine, or name its folder: --data NAME=PATH.",
    "task_failed": "Mend the task file: the sentence names the line.",
    "out_of_memory": "Read the data on a larger machine.",
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def describe(
    spec: Annotated[Path, typer.Option(help="The job's spec as JSON.")],
    out: Annotated[Path, typer.Option(help="Folder that is written to.")],
    task: Annotated[Path | None, typer.Option(help="The task file, unless it is built in.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="NAME=PATH of a data folder; repeatable.")] = None,
) -> None:
    """Read a training set, and write what its samples are."""
    job = JobSpec.model_validate_json(spec.read_bytes())
    try:
        found = _describe(job, task, data_folders(data or []), out)
    except LydianError as error:
        typer.echo(f"{error}\n{ADVICE.get(error.code, error.advice)}", err=True)
        raise typer.Exit(1) from error
    typer.echo(found.model_dump_json())


def _describe(job: JobSpec, task: Path | None, data: dict[str, str], out: Path) -> Described:
    """Ask the child.

    Raises:
        LydianError: the task or its data cannot be used.
    """
    builtin = BUILTIN.get(job.task) if task is None else None
    file, defaults = (builtin.file, dict(builtin.config)) if builtin is not None else (task, {})
    config = plan.child_config(job, defaults, data)
    with Child.start(device="cpu", threads=1, log_path=out / "child.log") as child:

        def ask(**command: object) -> dict[str, int]:
            return child.ask(command, on_progress=_ignore, stall_s=STALL_S)

        ask(do="open", task=str(file), config=config)
        samples = ask(do="describe", labels=None)["train_samples"]
        if job.data.by is not None:
            ask(do="describe", labels=str(out / "ids.npy"), by=job.data.by)
        try:
            ask(do="describe", labels=str(out / "classes.npy"))
        except TaskFailure as failure:
            if failure.code != "bad_task":
                raise
            return Described(train_samples=samples, no_classes=failure.sentence)
    return Described(train_samples=samples)


def _ignore(progress: Progress) -> None:
    pass


if __name__ == "__main__":
    sys.exit(app(prog_name="python -m worker.describe"))
