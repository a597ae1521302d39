"""A user's task file on its way to the workers: read and looked at, never run.

Pure but for `read_task`, which reads the file. The client has no torch: it can check no more than the syntax tree. A
file that imports `lydian` is a training script (docs/scripts.md), any other one a task file.
"""

import ast
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import BadTaskError

NEEDED = {"model": "model(config)", "dataset": "dataset(config, split)"}
PACKAGE = "lydian"
MAX_BYTES = 1 << 20
LOOPS = frozenset(
    {"lydian.rounds", "lydian.loop.rounds", "lydian.lightning.fit", "lydian.transformers.train", "lydian.flower.run"}
)
"""What goes through the rounds of a job."""


@dataclass(frozen=True, slots=True)
class Script:
    """What a training script says of itself."""

    shares: bool  # it says which data is to be shared: lydian.rounds(model, data=…)


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
        BadTaskError: it is not UTF-8 or not Python, or does not define `model` and `dataset` at its top level; or, as a
            script, has no loop over `lydian.rounds`.
    """
    tree = parsed(content, shown)
    if any(name.partition(".")[0] == PACKAGE for name in _imported(tree).values()):
        if not _loops(tree):
            advice = "`for round in lydian.rounds(model):` around the training, as docs/scripts.md has it."
            raise BadTaskError(f"{shown} imports lydian and never calls lydian.rounds", advice=advice)
        return
    names = set(_bound(tree.body))
    missing = [call for name, call in NEEDED.items() if name not in names and "*" not in names]
    if missing:
        raise BadTaskError(f"{shown} does not define {' and '.join(missing)} at its top level")


def script_of(source: str) -> Script | None:
    """What a file says of itself that `check_task` has let through; None: it is a task file."""
    loops = _loops(parsed(source.encode(), "the script"))
    return Script(any(word.arg == "data" for call in loops for word in call.keywords)) if loops else None


def parsed(content: bytes, shown: str) -> ast.Module:
    """The syntax tree of a file that is shown under this name, or BadTaskError in the words of `check_task`."""
    try:
        content.decode("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a doubtful escape is the task's affair
            return ast.parse(content, filename=shown)
    except SyntaxError as error:
        raise BadTaskError(f"{shown}:{error.lineno or 1}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise BadTaskError(f"{shown} is not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes; nested deeper than Python parses
        raise BadTaskError(f"{shown} cannot be parsed: {error or 'it is nested too deeply'}") from error


def _imported(tree: ast.Module) -> dict[str, str]:
    """Name in the file -> what it stands for, of all that is imported anywhere in it."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                first = one.name.partition(".")[0]
                found[one.asname or first] = one.name if one.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return found


def _loops(tree: ast.Module) -> list[ast.Call]:
    """The calls of one of LOOPS."""
    names = _imported(tree)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if _dotted(call.func, names) in LOOPS]


def _dotted(node: ast.expr, names: Mapping[str, str]) -> str:
    """The full name of an expression like `lydian.rounds`; empty: it is none."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    owner = _dotted(node.value, names) if isinstance(node, ast.Attribute) else ""
    return f"{owner}.{node.attr}" if isinstance(node, ast.Attribute) and owner else ""


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
