"""`lydian export`: a job's model as a program of torch.export. The client has no torch: a process that has it is asked.

coordinator ──model, task file──▶ a folder of its own ──▶ python -m worker.export ──▶ FILE.pt2
"""

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from client import shown
from client.pulling import pull_model
from client.running import python_module
from client.stories import task_digest
from common.api import CoordinatorApi
from common.errors import LydianError
from common.messages import JobView
from common.tasks import BUILTIN


@dataclass(frozen=True)
class Wish:
    """What the command line asks for."""

    target: Path
    which: str  # newest, best or a round's number
    consents: bool  # to a task file running here
    shape: str | None
    data: tuple[str, ...]
    force: bool


def run_export(api: CoordinatorApi, job: str, wish: Wish) -> None:
    """Export.

    Raises:
        LydianError: file_exists, consent_needed, not_whole, not_exported, and whatever the coordinator answers.
    """
    if wish.target.exists() and not wish.force:
        raise LydianError(f"{wish.target} exists already", code="file_exists", advice="--force overwrites it.")
    view = api.job(job)
    _check_whole(view)
    if view.spec.script:
        raise LydianError(
            f"the model of {view.id} is built by a training script, which is not run to export it",
            code="not_exported",
            advice=f"Load the file of `lydian pull {view.id} -o FILE.safetensors` in the script, and export it there.",
        )
    digest = task_digest(api, view.id)
    if digest is None and view.task not in BUILTIN:
        raise LydianError(
            f"this version has no task {view.task}", code="unknown_task", advice="Use the coordinator's version."
        )
    if digest is not None and not wish.consents:
        raise LydianError(
            f"to build the model, the job's task file {view.task}.py ({digest[:12]}…) would run on this machine as you",
            code="consent_needed",
            advice=f"Read it first: `lydian pull {view.id} -o look/` writes it there. Then add --run-task-file.",
        )
    with tempfile.TemporaryDirectory(prefix="lydian-export-") as name:
        folder = Path(name)
        pull_model(api, view.id, folder / "model.safetensors", which=wish.which, force=True)
        arguments = ["--model", str(folder / "model.safetensors"), "--to", str(folder / "model.pt2")]
        if digest is not None:
            task = folder / f"{view.task}.py"
            api.download_task(digest, task)
            arguments += ["--task", str(task)]
        (folder / "spec.json").write_text(view.spec.model_dump_json(), encoding="utf-8")
        arguments += ["--spec", str(folder / "spec.json"), *(["--shape", wish.shape] if wish.shape else [])]
        arguments += [part for item in wish.data for part in ("--data", item)]
        _run(arguments)
        _publish(folder / "model.pt2", wish.target)


def _check_whole(view: JobView) -> None:
    """A file that lacks tensors makes no program."""
    train = view.spec.train
    key = "trainable_only" if train.trainable_only else "personal" if train.personal else ""
    if key:
        raise LydianError(
            f"the model of {view.id} is not whole: train.{key} keeps tensors on its workers",
            code="not_whole",
            advice="`lydian pull` fetches what is shared; load it with strict=False and export the model by hand.",
        )


def _publish(made: Path, target: Path) -> None:
    """Put the file where it is wanted, whole or not at all."""
    part = target.with_name(f"{target.name}.part")
    try:
        shutil.copyfile(made, part)
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise LydianError(
            f"{target} cannot be written: {error.strerror or error}",
            code="file_not_written",
            advice="Does the folder exist, may you write there, and has the disk room?",
        ) from error


def _run(arguments: list[str]) -> None:
    done = subprocess.run(python_module("worker.export", arguments), capture_output=True, check=False)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        said = lines[-2:] or [f"the process that exports ended with exit code {done.returncode}"]
        raise LydianError(
            shown.one_line(said[0]),
            code="not_exported",
            advice=shown.one_line(" ".join(said[1:])) or "Look at the task's model().",
        )
