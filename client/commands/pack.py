"""The command `lydian pack`."""

from pathlib import Path
from typing import Annotated

import typer


def pack(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The app's folder, with its pyproject.toml.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.py", help="Where to write it (default: to stdout).")
    ] = None,
) -> None:
    """Write a Flower app as the one training script that `lydian submit --flower DIR` sends.

    To be read, listed (`lydian work --allow`) or signed (`lydian sign`): equal files give equal bytes. Nothing is sent.

    \b
    Examples:
      lydian pack examples/flower/digits -o digits_app.py
      lydian submit digits_app.py --min-workers 2 --watch
    """
    from client.flower_app import packed
    from common.errors import LydianError

    _, source = packed(folder)
    if output is None:
        typer.echo(source, nl=False)
        return
    if output.suffix != ".py":
        raise typer.BadParameter(f"{output} is to be a training script: its name must end in .py")
    try:
        output.write_bytes(source.encode())
    except OSError as error:
        raise LydianError(f"{output} cannot be written: {error.strerror}", code="file_not_written") from error
    typer.echo(output)
