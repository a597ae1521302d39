"""The command `lydian export`."""

from pathlib import Path
from typing import Annotated

import typer

from client.calling import DEFAULT_URL, Token, Url, coordinator
from client.completing import complete_jobs


def export(
    job: Annotated[str, typer.Argument(metavar="JOB", help="The job's id.", autocompletion=complete_jobs)],
    target: Annotated[Path, typer.Option("--to", metavar="FILE.pt2", help="Where the program goes.")],
    number: Annotated[
        int | None, typer.Option("--round", min=0, metavar="N", help="The model after this round.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The model that was evaluated best.")] = False,
    run_task_file: Annotated[
        bool, typer.Option("--run-task-file", help="Yes: run the job's task file here, as me. Read it first.")
    ] = False,
    shape: Annotated[
        str | None, typer.Option(metavar="N,N,…", help="Of one sample (float32); else the data set is asked for one.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="NAME=PATH", help="A data folder; repeatable.")] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite the file.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Make a job's model a program that runs without its Python code (torch.export). Needs torch.

    The model is built by the task file's model(config), which runs on this machine as you. For a built-in task that
    is our code; a task file of somebody else's runs only with --run-task-file.

    \b
    Examples:
      lydian export digits-4f2a --to digits.pt2 --best
      lydian pull my-task-3f2a -o look/                       read look/task.py first
      lydian export my-task-3f2a --to my.pt2 --run-task-file --shape 3,32,32
    """
    from client.exporting import Wish, run_export

    if best and number is not None:
        raise typer.BadParameter("--best and --round name two models: keep one")
    which = "best" if best else "newest" if number is None else str(number)
    wish = Wish(target, which, consents=run_task_file, shape=shape, data=tuple(data or ()), force=force)
    with coordinator(url, token) as api:
        run_export(api, job, wish)
    typer.echo(target)
