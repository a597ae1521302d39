"""What a job begins with in place of what `model(config)` builds: `--init FILE|JOB|JOB@ROUND|JOB@best`.

Pure: texts in, texts out.

    said by a person ──is_file──▶ a path, which the client turns into sha256:DIGEST
                     └──────────▶ JOB[@WHICH] ──parse──▶ Wanted ──the coordinator──▶ Beginning: one digest
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.messages import Beginning

FILE = "sha256:"  # before the digest of a file
WEIGHTS = (
    ".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npz", ".npy", ".h5", ".gguf", ".onnx", ".pt2",
)  # fmt: skip
"""Ends of the names of files that people keep weights in. Most of them are refused, and with what to do."""


@dataclass(frozen=True)
class Wanted:
    """What `init` of a job says: a file by its digest, or a model of another job."""

    digest: str = ""  # SHA-256 in hex; empty: a job's
    job: str = ""  # id or name
    which: str = "newest"  # newest, best, or a round's number


def is_file(said: str) -> bool:
    """Whether a text names a file or folder, and not a job: by its looks alone, so that it never depends on the place.

    It has a slash, begins with a dot or a tilde, or ends as files of weights do. So `run/` is a folder and `run` a job.
    """
    return "/" in said or said.startswith((".", "~")) or said.lower().endswith(WEIGHTS)


def parse(said: str) -> Wanted:
    """What a job's `init` says, which has passed JobSpec."""
    if said.startswith(FILE):
        return Wanted(digest=said.removeprefix(FILE))
    job, at, which = said.partition("@")
    return Wanted(job=job, which=str(int(which)) if which.isdecimal() else which if at else "newest")


def short(beginning: "Beginning") -> str:
    """For a table: `digits-4f2a@2`, or `file 3b1c55e0d2f4…`."""
    if beginning.job is None:
        return f"file {beginning.digest[:12]}…"
    return f"{beginning.job}@{beginning.round}"


def words(beginning: "Beginning") -> str:
    """For a sentence."""
    if beginning.job is None:
        return f"the file {beginning.digest[:12]}…"
    return f"the model of {beginning.job} after round {beginning.round}"
