"""`lydian init`: a job file with every key explained, and a task file that trains at once.

Pure but for `begin`, which writes. The keys are read off JobSpec (client.job_keys), so none can be missing or stale.
"""

import json
import textwrap
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from client.job_keys import Key, job_keys
from common.errors import LydianError
from common.messages import JobSpec

WIDTH = 110  # of a comment
GIVEN: Mapping[str, object] = {
    "task": "task.py",
    "rounds": 5,
    "train.local_epochs": 1,
    "train.batch_size": 32,
    "train.lr": 0.1,
}
"""What the file says without a comment sign; every other key stands there commented out, at its default."""

TASK = '''\
"""A task: the one file that says what is trained. Plain PyTorch, and no import of ours.

It trains at once, on made-up data: points in the plane, in rings of three colours. Put your own model and data in.
Whatever [config] in job.toml says comes as `config`; folders that a worker offers come as config["data"]["NAME"].
"""

import torch
from torch import nn
from torch.utils.data import TensorDataset


def model(config):
    """The network. Every machine builds it from `config` alone, so that all build the same."""
    width = config.get("width", 32)
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def dataset(config, split):
    """A map-style dataset for split "train" or "test": dataset[i] is (x, class). Each worker takes its shard by index.

    Every machine must come to the same samples in the same order (unless data.partition is local: its own data).
    """
    samples = config.get("samples", 1500) if split == "train" else 300
    generator = torch.Generator().manual_seed(1 if split == "train" else 2)
    ring = torch.randint(3, (samples,), generator=generator)
    angle = 6.2832 * torch.rand(samples, generator=generator)
    radius = 1.0 + ring + 0.2 * torch.randn(samples, generator=generator)
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return TensorDataset(points, ring)


# The rest may be left out. These are the defaults in other words:
#
# def loss(model, batch, config):
#     x, y = batch
#     return nn.functional.cross_entropy(model(x), y)
#
# def metrics(model, batch, config):  # name -> (sum, count), so that means over workers are exact
#     x, y = batch
#     return {"accuracy": ((model(x).argmax(1) == y).sum(), len(y))}
#
# def optimizer(model, config):
#     return torch.optim.SGD(model.parameters(), lr=0.1)
'''


def job_toml() -> str:
    """The job file: sections in the order of the schema; a key that is not set stands there as a comment."""
    parts = [
        "# A job: `lydian submit job.toml --watch`. Delete what you do not need. A key with # right before it is not",
        "# set: take the # away to set it. What stands behind it is its default, or an example where there is none.",
    ]
    for section, keys in groupby(_ordered(), key=_section):
        parts += ["", *_heading(section), *(line for key in keys for line in key_lines(key))]
    return "\n".join(parts) + "\n"


def _ordered() -> list[Key]:
    """All keys, those of a section together, as JobSpec has the sections."""
    order = {name: at for at, name in enumerate(["", *JobSpec.model_fields])}
    return sorted(job_keys().values(), key=lambda key: order[_section(key)])


def _section(key: Key) -> str:
    return key.path[0] if len(key.path) > 1 or key.open else ""


def _heading(section: str) -> list[str]:
    if not section:
        return []
    doc = JobSpec.model_fields[section].annotation.__doc__ if section != "config" else ""
    about = (doc or "`[config]`: whatever your task reads from its `config`.").partition("`: ")[2].splitlines()[0]
    return [f"# {'-' * 8} {about}", f"[{section}]"]


def key_lines(key: Key) -> Iterator[str]:
    """A key with what it is: comment lines (`# words`), then `key = value`, or `#key = value` unless it is given."""
    if key.open:
        yield "#width = 64"
        return
    about = str(key.schema.get("description", ""))
    words = about if _tells(key) else f"{about}; {key.allowed}" if about else key.allowed
    yield from (f"# {line}" for line in textwrap.wrap(words, WIDTH))
    if key.dotted in GIVEN:
        yield f"{key.path[-1]} = {_toml(GIVEN[key.dotted])}"
    else:
        yield f"#{key.path[-1]} = {_toml(example_of(key))}"
    yield ""


def _tells(key: Key) -> bool:
    """Whether its description already names what it may be."""
    choices = [value for one in key.alternatives for value in one.get("enum", [])]
    return bool(choices) and all(str(value) in str(key.schema.get("description")) for value in choices)


def example_of(key: Key) -> object:
    """The default, or some value that the schema allows where there is none."""
    default = key.schema.get("default")
    return default if default is not None else _some(key.alternatives[0])


def _some(schema: Mapping[str, Any]) -> object:
    """A value that a schema allows."""
    if "enum" in schema or "const" in schema:
        return schema.get("const", next(iter(schema.get("enum", [])), ""))
    match schema.get("type"):
        case "integer":
            return max(1, schema.get("minimum", 1))
        case "number":
            low = schema.get("minimum", schema.get("exclusiveMinimum", 0.0))
            high = schema.get("maximum", schema.get("exclusiveMaximum"))
            return low + 1.0 if high is None else (low + high) / 2
        case "boolean":
            return True
        case "array":
            return [_some(schema.get("items", {"type": "string"}))]
        case _:
            return "name"


def _toml(value: object) -> str:
    """A value as TOML writes it; JSON is TOML for texts, numbers, booleans and lists."""
    return json.dumps(value, ensure_ascii=False)


def begin(folder: Path, *, force: bool) -> Path:
    """Write job.toml and task.py into a folder, and return the job file's path.

    Raises:
        LydianError: file_exists, one of them is there and `force` is not given; file_not_written.
    """
    files = {folder / "job.toml": job_toml(), folder / "task.py": TASK}
    for path in files:
        if path.exists() and not force:
            advice = "Name another folder, or overwrite it with --force."
            raise LydianError(f"{path} exists already", code="file_exists", advice=advice)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LydianError(
            f"{folder} cannot be written: {error.strerror or error}",
            code="file_not_written",
            advice="May you write there, and has the disk room?",
        ) from error
    return folder / "job.toml"
