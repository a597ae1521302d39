"""`lydian pull`: fetch a model as a file that `load_state_dict` takes."""

import tempfile
from pathlib import Path

from common.api import CoordinatorApi
from common.errors import LydianError
from common.weights import publish


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
    try:
        # Beside the target: on the same disk, where the model must have room in any case.
        with tempfile.TemporaryDirectory(prefix=".lydian-", dir=target.absolute().parent) as folder:
            fetched = Path(folder) / "model.safetensors"
            api.pull(job, fetched, which=which)
            publish(fetched, target)
    except OSError as error:
        raise LydianError(
            f"{target} cannot be written: {error.strerror or error}",
            code="file_not_written",
            advice="Does the folder exist, may you write there, and has the disk room?",
        ) from error
