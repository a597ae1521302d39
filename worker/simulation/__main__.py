"""`python -m worker.simulation URL …`: many virtual workers of one coordinator. Started by `lydian simulate`."""

import logging
import os
import signal
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from common.errors import LydianError
from worker.__main__ import data_folders
from worker.logs import to_stderr
from worker.options import Options
from worker.simulation.process import Simulator

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class StackChoice(StrEnum):
    """When shards are trained as one stack."""

    auto = "auto"
    off = "off"


@app.command()
def simulate(
    url: Annotated[str, typer.Argument(help="The coordinator.", envvar="LYDIAN_URL")],
    token: Annotated[str, typer.Option(help="Join token.", envvar="LYDIAN_TOKEN")],
    state_dir: Annotated[Path, typer.Option(help="For this process alone.")],
    workers: Annotated[int, typer.Option(min=1, help="Virtual workers: shards that are claimed at once.")] = 8,
    name: Annotated[str, typer.Option(help="Shown to people, with each worker's number.")] = "simulator",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, mps, xpu or auto.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads to compute with.")] = 1,
    stack: Annotated[StackChoice, typer.Option(help="auto: where that is faster.")] = StackChoice.auto,
    data: Annotated[list[str] | None, typer.Option(help="NAME=PATH of a data folder; repeatable.")] = None,
    trusted: Annotated[list[str] | None, typer.Option(help="SHA-256 of a task file that may run.")] = None,
) -> None:
    """Work as many virtual workers, until SIGTERM or Ctrl-C."""
    to_stderr(logging.INFO)
    for chatty in ("httpx2", "httpcore2", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    os.environ.pop("LYDIAN_TOKEN", None)  # nothing that this process starts needs it
    try:
        options = Options(
            name=name,
            device=device,
            threads=threads,
            data=data_folders(data or []),
            trust="listed" if trusted else "none",
            trusted=tuple(trusted or ()),
            join_token=token,
        )
        simulator = Simulator(url, workers, options, state_dir.absolute(), stack=stack.value)
        try:
            simulator.run()
        finally:
            simulator.close()
    except LydianError as error:
        typer.echo(error.lines(), err=True)
        raise typer.Exit(1) from error


def _leave(number: int, _: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
    raise SystemExit(0)


if __name__ == "__main__":
    app(prog_name="python -m worker.simulation")
