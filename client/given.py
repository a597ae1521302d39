"""The file that a job begins with (`--init FILE`), found and looked at on this machine.

    path ──located──▶ a safetensors file ──checked──▶ its SHA-256, which the job names

Nothing but safetensors is read: a pickle may run code. It is sent by client/sending.py.
"""

from pathlib import Path

from common.begins import WEIGHTS
from common.errors import BadJobError, BadUpdateError
from common.weights import file_digest, read_layout

NAME = "model.safetensors"  # in a folder as `lydian pull` writes it
INDEX = f"{NAME}.index.json"  # of a model in several files, as on the Hugging Face hub
SUFFIX = ".safetensors"
TURN = (
    "Turn it into safetensors where you trust it, in Python: `import torch; from safetensors.torch import save_file; "
    'state = torch.load("{name}", weights_only=True); save_file({{key: tensor.clone() for key, tensor in '
    'state.items()}}, "{stem}.safetensors")`.'
)
HEADS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How files of torch.save and pickles begin."""


def located(path: Path) -> Path:
    """The file of weights that is meant by a path: itself, or the one in a folder.

    Raises:
        BadJobError: there is none, or it is no safetensors file by its name.
    """
    if path.is_dir():
        if (path / NAME).is_file():
            return path / NAME
        several = (path / INDEX).exists()
        why = f"has its model in several files ({INDEX})" if several else f"has no {NAME}"
        raise _wrong(
            f"{path} {why}",
            "Load them with safetensors.torch.load_file, one after the other into one dictionary, and save_file that."
            if several
            else "Name a file, or a folder that `lydian pull` has written.",
        )
    if not path.is_file():
        job = path.name if path.suffix not in WEIGHTS else ""
        meant = f" A job is named without a slash: --init {job}" if job else ""
        raise _wrong(f"there is no file {path} to begin with", f"Check the path.{meant}")
    if path.suffix.lower() != SUFFIX and _is_pickle(path):
        raise _unsafe(path)
    return path


def checked(path: Path) -> str:
    """Look at a file's header, and take its digest.

    Returns:
        SHA-256, in hex.

    Raises:
        BadJobError: no job can begin with it.
    """
    try:
        layout = read_layout(path)
        if not layout.tensors:
            raise _wrong(f"{path} has no tensors", "Is it the right file?")
        return file_digest(path)
    except BadUpdateError as error:
        if _is_pickle(path):
            raise _unsafe(path) from error
        raise _wrong(f"{path} is no safetensors file that can be used: {error}", error.advice) from error
    except OSError as error:
        raise _wrong(
            f"{path} cannot be read: {error.strerror or error}", "Check the path, and who may read it."
        ) from error


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4).startswith(HEADS)


def _unsafe(path: Path) -> BadJobError:
    sentence = f"{path} is a pickle, which may run code when it is read: it is not read here, nor sent"
    return _wrong(sentence, TURN.format(name=path.name, stem=path.stem))


def _wrong(sentence: str, advice: str) -> BadJobError:
    return BadJobError(sentence, code="bad_init", advice=advice)
