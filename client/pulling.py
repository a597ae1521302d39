"""`lydian pull`: fetch a model as a file that `load_state_dict` takes, alone or in a folder that says what it is.

What breaks is resumed, by the next run too.
"""

from glob import escape
from pathlib import Path

from client.resuming import until_whole
from client.stories import config_json, model_card, story_of
from common.api import CoordinatorApi
from common.errors import LydianError
from common.weights import file_digest, publish


def pull_model(api: CoordinatorApi, job: str, target: Path, *, which: str, force: bool) -> None:
    """Fetch a job's model to `target`, which appears only whole, each tied weight under every name that it has.

    Args:
        api: the coordinator.
        job: the job's id.
        target: the file to make.
        which: `newest`, `best` or a round's number.
        force: overwrite `target`.

    Raises:
        LydianError: file_exists, file_not_written, and whatever the coordinator answers.
    """
    if target.exists() and not force:
        raise LydianError(f"{target} exists already", code="file_exists", advice="--force overwrites it.")
    # Beside the target: on the same disk, where the model must have room in any case.
    fetched = target.absolute().with_name(f".{target.name}.fetched")
    try:
        _fetch(api, job, fetched, which)
        publish(fetched, target)
        for path in (fetched, *fetched.parent.glob(f"{escape(fetched.name)}.*")):  # and parts of older models
            path.unlink(missing_ok=True)
    except OSError as error:
        raise LydianError(
            f"{target} cannot be written: {error.strerror or error}",
            code="file_not_written",
            advice="Does the folder exist, may you write there, and has the disk room?",
        ) from error


def pull_folder(api: CoordinatorApi, job: str, folder: Path, *, which: str, force: bool) -> None:
    """Fetch a job's model into a folder in the layout of the Hugging Face hub; the card is written last.

        model.safetensors    config.json    README.md (model card)    task.py, unless the task is built in

    Args:
        api: the coordinator.
        job: the job's id.
        folder: made if it is not there.
        which: `newest`, `best` or a round's number.
        force: overwrite those files.

    Raises:
        LydianError: file_exists, file_not_written, no_best, and whatever the coordinator answers.
    """
    view = api.job(job)
    number = view.round if which == "newest" else view.best_round if which == "best" else int(which)
    if number is None:
        raise LydianError(
            f"no model of {job} has been evaluated yet", code="no_best", advice="Leave --best out, or wait."
        )
    story = story_of(api, view, number)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / "model.safetensors"
        pull_model(api, view.id, weights, which=str(number), force=force)
        if story.task_digest is not None:
            (folder / "task.py").unlink(missing_ok=True)
            api.download_task(story.task_digest, folder / "task.py")
        (folder / "config.json").write_text(config_json(story), encoding="utf-8")
        (folder / "README.md").write_text(model_card(story, file_digest(weights)), encoding="utf-8")
    except OSError as error:
        raise LydianError(
            f"{folder} cannot be written: {error.strerror or error}",
            code="file_not_written",
            advice="May you write there, and has the disk room?",
        ) from error


def _fetch(api: CoordinatorApi, job: str, fetched: Path, which: str) -> None:
    """Fetch until all is here, for as long as each try brings something."""
    kept = "{there} are kept; the same command goes on from there."
    until_whole(lambda seen: api.pull(job, fetched, which=which, on_bytes=seen), kept)
