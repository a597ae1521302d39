"""A Flower app on its way to the workers: its folder is read and packed, never run, and its config makes the job's.

The one with disk beside client/packing.py, which is pure.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from client.packing import CLIENTS, PROJECT, ROUNDS, App, app_of, measured_by_clients, pack
from client.task_file import MAX_BYTES, parsed
from common.errors import BadJobError, BadTaskError

SKIPPED = frozenset({"__pycache__", "node_modules", "build", "dist"})


def packed(folder: Path) -> tuple[str, str]:
    """A Flower app's name, and the script that it is as one file.

    Raises:
        BadTaskError: the folder has none, a file is not Python, or it is too long.
    """
    app = read_app(folder)
    source = pack(app)
    if (size := len(source.encode())) > MAX_BYTES:
        raise BadTaskError(
            f"{folder} has {size:,} bytes of Python, and a task has at most {MAX_BYTES:,}",
            advice="Have only the app in its folder; data belongs on the workers: `lydian work --data NAME=PATH`.",
        )
    return app.name, source


def read_app(folder: Path) -> App:
    """The app in a folder: its pyproject.toml and its Python files.

    Raises:
        BadTaskError: there is none, or a file cannot be read or is not Python.
    """
    if not folder.is_dir():
        raise BadTaskError(f"{folder} is not a folder", advice=f"--flower takes the one that has the app's {PROJECT}.")
    files: dict[str, str] = {}
    for path in sorted(_paths(folder)):
        name = path.relative_to(folder).as_posix()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadTaskError(f"{path} cannot be read: {error.strerror}") from error
        if name.endswith(".py"):
            parsed(content, str(path))
        try:
            files[name] = content.decode()
        except UnicodeDecodeError as error:
            raise BadTaskError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    return app_of(files, str(folder))


def _paths(folder: Path) -> Iterator[Path]:
    """pyproject.toml and every Python file, but none of an environment, a cache or a hidden folder."""
    for path in folder.iterdir():
        if path.is_file() and (path.suffix == ".py" or path.name == PROJECT):
            yield path
        elif path.is_dir() and _is_the_apps(path):
            yield from (inner for inner in _paths(path) if inner.suffix == ".py")


def _is_the_apps(folder: Path) -> bool:
    """Whether a folder can have files of the app's own."""
    hidden = folder.name in SKIPPED or folder.name.startswith(".")
    return not hidden and not folder.is_symlink() and not (folder / "pyvenv.cfg").exists()


def settings(app: App, given: Mapping[tuple[str, ...], object]) -> dict[tuple[str, ...], object]:
    """What an app says of its job, below what was given.

    Args:
        app: the app.
        given: a key's path -> its value, as job file, flags and --set have it.

    Raises:
        BadJobError: a key of [config] that the app has not, two numbers of rounds, or arguments, which no app takes.
    """
    overrides = {path[1]: value for path, value in given.items() if path[0] == "config" and len(path) == 2}
    faults = [_unknown(name, app) for name in overrides if name not in app.config and name != CLIENTS]
    faults += [
        f"config.{name} is a list, and Flower's config takes a text, a number, true or false"
        for name, value in overrides.items()
        if isinstance(value, list)
    ]
    rounds = given.get(("rounds",))
    if rounds is not None and overrides.get(ROUNDS, rounds) != rounds:
        faults.append(f"rounds = {rounds} and config.{ROUNDS} = {overrides[ROUNDS]} are two numbers: keep one")
    if given.get(("arguments",)):
        faults.append("arguments are for a script's command line, which a Flower app has not: use [config]")
    if faults:
        raise BadJobError("\n".join(faults))
    made: dict[tuple[str, ...], object] = {}
    if ROUNDS in app.config:
        wanted = rounds if rounds is not None else overrides.get(ROUNDS, app.config[ROUNDS])
        made = {("rounds",): wanted, ("config", ROUNDS): wanted}
    if measured_by_clients(app):
        made["evaluation", "scope"] = "workers"
    return made


def _unknown(name: str, app: App) -> str:
    there = ", ".join(sorted(app.config)) or "none"
    return f"config.{name} is no key of the app's [tool.flwr.app.config]: there are {there}; and {CLIENTS}, for us"
