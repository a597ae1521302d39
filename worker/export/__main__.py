"""`python -m worker.export`: have a process of its own build a job's model and export it. Started by `lydian export`.

What fails is a sentence and an advice, on two lines of stderr, and exit code 1. The process gets no token of ours, as
every one that runs a task file.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from common.advice import advise
from common.messages import JobSpec
from common.tasks import BUILTIN
from worker import plan
from worker.__main__ import data_folders
from worker.cage import environment

HOST = Path(__file__).with_name("task_export.py")
SHOWN = 40  # lines of its output, from the end, before the sentence

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def export(
    spec: Annotated[Path, typer.Option(help="The job's spec as JSON.")],
    model: Annotated[Path, typer.Option(help="The weights, safetensors.")],
    to: Annotated[Path, typer.Option(help="The program that is written.")],
    task: Annotated[Path | None, typer.Option(help="The task file, unless it is built in.")] = None,
    shape: Annotated[str | None, typer.Option(help="Of one sample: 3,32,32.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="NAME=PATH of a data folder; repeatable.")] = None,
) -> None:
    """Export a model."""
    job = JobSpec.model_validate_json(spec.read_bytes())
    builtin = BUILTIN[job.task] if task is None else None
    file, defaults = (builtin.file, dict(builtin.config)) if builtin is not None else (task, {})
    asked = {
        "task": str(file),
        "model": str(model),
        "to": str(to),
        "config": plan.child_config(job, defaults, data_folders(data or [])),
        "shape": [int(part) for part in shape.split(",")] if shape else None,
    }
    command = [sys.executable, "-P", "-u", str(HOST)]
    done = subprocess.run(
        command, input=json.dumps(asked).encode(), env=environment(os.environ), capture_output=True, check=False
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with {done.returncode}"]
        advice = advise("task_failed", lines[-1], "\n".join(lines)).words
        typer.echo("\n".join([*lines[-SHOWN:-1], lines[-1], advice]), err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    sys.exit(app(prog_name="python -m worker.export"))
