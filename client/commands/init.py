"""The command `lydian init`."""

from pathlib import Path
from typing import Annotated

import typer


def init(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="The folder; made if it is not there.")] = Path(),
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite job.toml and task.py.")] = False,
) -> None:
    """Begin a job of your own: write a job.toml with every key explained, and a task.py that trains at once.

    Prints the job file's path. Both files are yours to change; nothing is sent.

    \b
    Examples:
      lydian init my-model
      lydian simulate my-model/job.toml --clients 10      try it here, on made-up data
      lydian submit my-model/job.toml --watch
    """
    from client.beginning import begin

    typer.echo(begin(folder, force=force))
    typer.echo(
        f"next: lydian simulate {folder / 'job.toml'} --clients 10, then put your own data into task.py", err=True
    )
