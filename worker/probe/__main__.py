"""`python -m worker.probe`: print what this machine has and whether its torch runs a kernel, as one MachineProbe.

The child is the one that trains. Where no kernel runs on the device asked for, another one on the CPU says which torch
this is.
"""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from common.messages import MachineProbe, TorchBuild
from worker.child import Child, TaskFailure
from worker.hardware import inventory

app = typer.Typer(add_completion=False)


@app.command()
def probe(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, xpu, or auto.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads to compute with (0: torch's choice).")] = 0,
) -> None:
    """Look at the GPUs, have a training process run a kernel, and print what came out."""
    found = inventory()  # before the child takes memory
    with tempfile.TemporaryDirectory(prefix="lydian-probe-") as folder:
        build, failure = _hello(device, threads, Path(folder))
        if build is None and device != "cpu":
            build, _ = _hello("cpu", threads, Path(folder))
    typer.echo(MachineProbe(inventory=found, build=build, failure=failure).model_dump_json())


def _hello(device: str, threads: int, folder: Path) -> tuple[TorchBuild | None, str]:
    """What a child on the device says of its torch; or None, and why it says nothing."""
    with Child.start(device=device, threads=threads, log_path=folder / f"{device}.log") as child:
        try:
            return child.hello, ""
        except TaskFailure as error:
            return None, str(error)


if __name__ == "__main__":
    app(prog_name="python -m worker.probe")
