"""The worker's files: models fetched, task files, indices, updates on their way out.

Names are digests and assignment ids that we checked; nothing that was received becomes a path.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.messages import Assignment

MODELS_KEPT = 3  # the open round's base, the one being evaluated, and the one before


@dataclass(frozen=True)
class Spool:
    """Files of one worker under one folder."""

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> "Spool":
        """The spool in this folder, without the half-written files of an earlier life."""
        for name in ("models", "tasks", "work"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        spool = cls(folder)
        shutil.rmtree(folder / "work")
        (folder / "work").mkdir()
        for part in [*folder.glob("models/*.part"), *folder.glob("tasks/*.part")]:
            part.unlink()
        return spool

    def model(self, digest: str) -> Path:
        """Where the model of this digest is, or would be."""
        return self.folder / "models" / f"{digest}.safetensors"

    def task(self, digest: str, name: str) -> Path:
        """Where the task file of this digest is, or would be: in a folder of its own, under its own name."""
        folder = self.folder / "tasks" / digest
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.py"

    def update(self, assignment: Assignment) -> Path:
        """Where the result of an assignment is written."""
        return self.folder / "work" / f"{assignment.id}.{assignment.attempt}.safetensors"

    def labels(self, job: str) -> Path:
        """Where the child writes the labels of the training set."""
        return self.folder / "work" / f"{job}.labels.npy"

    def write_indices(self, assignment: Assignment, indices: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> Path:
        """Write the samples of a shard for the child."""
        path = self.folder / "work" / f"{assignment.id}.indices.npy"
        np.save(path, indices, allow_pickle=False)
        return path

    def drop(self, assignment: Assignment) -> None:
        """The result was handed in, or counts no more."""
        self.update(assignment).unlink(missing_ok=True)
        (self.folder / "work" / f"{assignment.id}.indices.npy").unlink(missing_ok=True)

    def trim_models(self, keep: str) -> None:
        """Delete the oldest models beyond the few that are kept; never the one named."""
        models = sorted((self.folder / "models").glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        for path in models[:-MODELS_KEPT]:
            if path != self.model(keep):
                path.unlink()
