"""How far a tracker had come that cannot be asked: a small file, replaced whole."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Mark:
    """Id of the last point that was settled, and what the tracker's files had in bytes then."""

    after: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)


def read_mark(path: Path) -> Mark:
    """The mark in a file; without the file, or with another in its place, the one of a fresh start."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return Mark(int(said["after"]), {str(name): int(size) for name, size in said["sizes"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Mark()


def write_mark(path: Path, mark: Mark) -> None:
    """Put a mark in the place of the one before.

    Raises:
        OSError: the disk did not take it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        json.dump({"after": mark.after, "sizes": dict(mark.sizes)}, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
