"""A user's task file on its way to the workers: read and looked at, never run.

Pure but for `read_task`, which reads the file. The client has no torch: it can check no more than the syntax tree.
"""

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from common.errors import BadTaskError

NEEDED = {"model": "model(config)", "dataset": "dataset(config, split)"}
MAX_BYTES = 1 << 20


def is_task_file(task: str) -> bool:
    """Whether `task` names a file and not a built-in task."""
    return task.endswith(".py")


def task_name(path: Path) -> str:
    """The file's name without its suffix, as a name that a job may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem)[:63] or "task"


def read_task(path: Path) -> str:
    """The text of a task file, byte for byte as it is on the disk: workers trust it by its digest.

    Raises:
        BadTaskError: it cannot be read, is too long, is not Python, or lacks a function that a task must have.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadTaskError(
            f"the task file {path} cannot be read: {error.strerror}",
            advice="Check the path; one in a job file is relative to that file.",
        ) from error
    if len(content) > MAX_BYTES:
        raise BadTaskError(
            f"{path} has {len(content):,} bytes, and a task file at most {MAX_BYTES:,}",
            advice="Data belongs into files that the worker's owner offers: `lydian work --data NAME=PATH`.",
        )
    check_task(content, str(path))
    return content.decode("utf-8")


def check_task(content: bytes, shown: str) -> None:
    """Look at a task file without running it.

    Args:
        content: the file.
        shown: the path as the user wrote it, for the sentence.

    Raises:
        BadTaskError: it is not UTF-8 or not Python, or does not define `model` and `dataset` at its top level.
    """
    try:
        content.decode("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a doubtful escape is the task's affair
            tree = ast.parse(content, filename=shown)
    except SyntaxError as error:
        raise BadTaskError(f"{shown}:{error.lineno or 1}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise BadTaskError(f"{shown} is not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes; nested deeper than Python parses
        raise BadTaskError(f"{shown} cannot be parsed: {error or 'it is nested too deeply'}") from error
    names = set(_bound(tree.body))
    missing = [call for name, call in NEEDED.items() if name not in names and "*" not in names]
    if missing:
        raise BadTaskError(f"{shown} does not define {' and '.join(missing)} at its top level")


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    """The names that these statements bind in the module, as far as can be seen; `*` for an import of everything."""
    for statement in body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                yield from (alias.asname or alias.name for alias in aliases)
            case ast.Assign() | ast.AnnAssign():
                names = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
                yield from (name.id for name in names if isinstance(name.ctx, ast.Store))
            case ast.If() | ast.Try() | ast.With():
                for block in ("body", "orelse", "finalbody"):
                    yield from _bound(getattr(statement, block, []))
            case _:
                pass
