"""A job in TOML and flags, made into a JobSpec, or refused with every fault named.

Pure but for `read_job`, which reads the job file, the task file and its signatures. Settings come in layers, each a
flat table from a key's path to its value and to where it was said; a later layer wins:

    the task's defaults < job file < flags < --set  ──merge──▶ one layer ──build_spec──▶ JobSpec
"""

import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from client.flower_app import packed, settings
from client.given import checked, located
from client.job_keys import Key, KeyPath, job_keys, key_at, nearest, nearest_of, sections
from client.packing import remarks, unpack
from client.signing import read_signatures
from client.task_file import is_task_file, read_task, script_of, task_name
from common.begins import FILE, is_file
from common.errors import BadJobError, BadTaskError
from common.messages import JobSpec, TaskSignature
from common.tasks import BUILTIN

TASK: KeyPath = ("task",)
INIT: KeyPath = ("init",)
OPTIMIZER: KeyPath = ("train", "optimizer")
RATES: tuple[KeyPath, ...] = (("train", "lr"), ("train", "momentum"), ("train", "weight_decay"))
LENGTHS: tuple[KeyPath, ...] = (("train", "local_epochs"), ("train", "local_steps"), ("train", "local_seconds"))
"""The lengths of a round, of which a job has one: a layer that sets one of them drops what lower layers said."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A value, and where it was said: `job.toml`, `--lr`, `--set`."""

    value: object
    origin: str


Layer = Mapping[KeyPath, Setting]


@dataclass(frozen=True, slots=True)
class Job:
    """What is sent: the spec, and the text of the task file unless the task is built in."""

    spec: JobSpec
    task_source: str | None
    signatures: tuple[TaskSignature, ...] = ()  # that were found beside the task file
    remarks: tuple[str, ...] = ()  # what whoever submits it should know
    model: Path | None = None  # the file that it begins with, whose digest the spec has


def read_job(file: Path | None, flags: Layer, sets: Layer, flower: Path | None = None) -> Job:
    """The job that a job file (or none), flags and --set options make together.

    Args:
        file: a job file; a task file that it names is looked for beside it, and so is a file to begin with.
        flags: what `flag_layer` made of the flags; a task file in it is relative to the working directory.
        sets: what `set_layer` made of the --set options.
        flower: the folder of a Flower app, which is the task then.

    Raises:
        BadJobError: a key or value is wrong; one line for each. Or what it begins with cannot be used (`bad_init`).
        BadTaskError: the task is not known, or its file cannot be used.
    """
    written = file_layer(_read(file), file.name) if file else {}
    given = merge(written, flags, sets)
    init = given.get(INIT)
    if init is None or not isinstance(init.value, str) or not is_file(init.value):
        return _job(file, written, given, flower)
    model = located(_beside(file, written, INIT, init))
    named = Setting(f"{FILE}{checked(model)}", init.origin)
    return replace(_job(file, written, {**given, INIT: named}, flower), model=model)


def _job(file: Path | None, written: Layer, given: Layer, flower: Path | None) -> Job:
    """The job of settings in which what it begins with is said as it is sent."""
    if flower is not None:
        if TASK in given:
            raise BadJobError(f"task in {given[TASK].origin} and --flower {flower} both name the task: keep one")
        name, source = packed(flower)
        return _script_job(Path(f"{task_name(Path(f'{name}.py'))}.py"), source, given, "--flower")
    task = given.get(TASK)
    if task is None or not isinstance(task.value, str):
        return Job(build_spec(given), None)
    if not is_task_file(task.value):
        return Job(build_spec(merge(_suiting(builtin_layer(task.value), given), given)), None)
    path = _beside(file, written, TASK, task)
    source = read_task(path)
    return replace(_script_job(path, source, given, task.origin), signatures=read_signatures(path, source))


def _script_job(path: Path, source: str, given: Layer, origin: str) -> Job:
    """The job of a task file or a script, which may be a Flower app's."""
    said, app = script_layer(source, path.name), unpack(source, path.name)
    named = {**given, TASK: Setting(task_name(path), origin)}
    if app is None:
        return Job(build_spec(merge(said, named)), source)
    own = settings(app, {key: setting.value for key, setting in given.items()})
    below = {key: Setting(value, f"what {path.name} says") for key, value in own.items()}
    spec = build_spec(merge(said, below, named))
    notes = tuple(remarks(app, spec.aggregation.algorithm, spec.aggregation.robust))
    return Job(spec, source, remarks=notes)


def _beside(file: Path | None, written: Layer, key: KeyPath, said: Setting) -> Path:
    """The path that a setting names: from the job file's folder where that says it, else from the working directory."""
    in_file = file is not None and said is written.get(key)
    return (file.parent if file and in_file else Path()) / Path(str(said.value)).expanduser()


# ---------------------------------------------------------------- layers


def file_layer(text: str, origin: str) -> Layer:
    """The settings of a job file.

    Raises:
        BadJobError: it is not TOML; the sentence has the line.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadJobError(f"{origin} is not TOML: {error}", advice="See examples/job.toml.") from error
    return {path: Setting(value, origin) for path, value in _flat(document)}


def flag_layer(given: Mapping[KeyPath, str | Sequence[str]]) -> Layer:
    """The settings of flags: a key's path and the text after its flag; for the open section, NAME=VALUE texts."""
    layer: dict[KeyPath, Setting] = {}
    for path, text in given.items():
        key = job_keys()[path]
        if isinstance(text, str):
            layer[path] = Setting(text if key.is_text else parse_value(text), key.flag)
            continue
        for item in text:
            name, value = _split(item, key.flag, "NAME=VALUE")
            layer[(*path, name)] = Setting(parse_value(value), key.flag)
    return layer


def set_layer(items: Sequence[str]) -> Layer:
    """The settings of --set options, each section.key=value with a TOML value or a bare text.

    Raises:
        BadJobError: an item without an equals sign.
    """
    layer: dict[KeyPath, Setting] = {}
    for item in items:
        dotted, text = _split(item, "--set", "section.key=value")
        section, dot, leaf = dotted.partition(".")
        path: KeyPath = (section, leaf) if dot else (section,)
        key, value = key_at(path), parse_value(text)
        bare = key is not None and key.is_text and not isinstance(value, str)
        layer[path] = Setting(text if bare else value, "--set")
    return layer


def builtin_layer(task: str) -> Layer:
    """The defaults that a built-in task brings.

    Raises:
        BadTaskError: unknown_task, there is no built-in task of that name.
    """
    if task not in BUILTIN:
        like = nearest_of(task, BUILTIN)
        raise BadTaskError(
            f"there is no built-in task {_shown(task)}" + (f": did you mean {like}?" if like else ""),
            code="unknown_task",
            advice=f"Built in: {', '.join(sorted(BUILTIN))}. Your own: --task FILE.py.",
        )
    origin = f"the defaults of {task}"
    defaults = {tuple(dotted.split(".", 1)): value for dotted, value in BUILTIN[task].defaults.items()}
    config = {("config", name): value for name, value in BUILTIN[task].config.items()}
    return {path: Setting(value, origin) for path, value in (defaults | config).items()}


def script_layer(source: str, file_name: str) -> Layer:
    """What a training script says of itself: that it is one, and that nothing is shared where it names no data."""
    script, origin = script_of(source), f"what {file_name} says"
    if script is None:
        return {}
    local: Layer = {} if script.shares else {("data", "partition"): Setting("local", origin)}
    return {("script",): Setting(value=True, origin=origin), **local}


def _suiting(defaults: Layer, given: Layer) -> Layer:
    """A task's defaults, without its learning rate where the job trains with another optimiser than SGD."""
    if OPTIMIZER not in given or given[OPTIMIZER].value == "sgd":
        return defaults
    return {path: setting for path, setting in defaults.items() if path not in RATES}


def merge(*layers: Layer) -> Layer:
    """One layer of several; a later one wins, and one that sets a round's length drops the lengths below it."""
    merged: dict[KeyPath, Setting] = {}
    for layer in layers:
        if any(length in layer for length in LENGTHS):
            merged = {path: setting for path, setting in merged.items() if path not in LENGTHS}
        merged |= layer
    return merged


def parse_value(text: str) -> object:
    """A value as TOML writes it; what is not one is a bare text: `8`, `0.1`, `true`, `[1, 2]`, `auto`."""
    text = text.strip()
    try:
        document = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = document.get("value")
    plain = len(document) == 1 and isinstance(value, str | int | float | list)  # not a date, not a table
    return value if plain else text


# ---------------------------------------------------------------- the spec


def build_spec(layer: Layer) -> JobSpec:
    """The spec that these settings say.

    Raises:
        BadJobError: unknown keys and wrong values, all of them, one line each.
    """
    faults = [_unknown(path, setting) for path, setting in layer.items() if _is_unknown(path)]
    document = _nested({path: setting.value for path, setting in layer.items() if not _is_unknown(path)})
    try:
        spec = JobSpec.model_validate(document, strict=True)  # strict: TOML has types, so "5" is not 5
    except ValidationError as error:
        faults += _translated(error.errors(include_url=False), layer)
    if faults:
        raise BadJobError("\n".join(faults))
    return spec


def _is_unknown(path: KeyPath) -> bool:
    names_a_section = len(path) == 1 and path[0] in sections()  # [train] itself; its value may still be wrong
    return key_at(path) is None and not names_a_section


def _unknown(path: KeyPath, setting: Setting) -> str:
    dotted, is_table = ".".join(path), isinstance(setting.value, dict)
    like = None if is_table else nearest(path)
    if path[0] not in sections() and (is_table or (len(path) > 1 and like is None)):
        section = nearest_of(path[0], sections())
        hint = f"did you mean [{section}]?" if section else f"there are [{'], ['.join(sorted(sections()))}]"
        return f"unknown section [{path[0]}] in {setting.origin}: {hint}"
    there = ", ".join(key.path[-1] for key in job_keys().values() if key.path[:-1] == path[:-1])
    return f"unknown key {dotted} in {setting.origin}: " + (f"did you mean {like}?" if like else f"there are {there}")


def _translated(errors: Iterable[ErrorDetails], layer: Layer) -> list[str]:
    """Pydantic's faults in our words: one line a key, however many alternatives of a union were tried."""
    lines: dict[str, None] = {}  # an ordered set
    for error in errors:
        path = tuple(str(part) for part in error["loc"][:2])
        key = key_at(path) or key_at(path[:1])
        if error["type"] == "missing":
            lines["the job names no task: give a built-in one or --task FILE.py"] = None
        elif error["type"] == "value_error":  # a rule over several keys of a section says it in its own words
            lines[f"[{path[0]}]: {error['ctx']['error']}" if path else str(error["ctx"]["error"])] = None
        else:
            lines[_wrong(path, key, layer)] = None
    return list(lines)


def _wrong(path: KeyPath, key: Key | None, layer: Layer) -> str:
    setting = layer.get(path) or layer[path[:1]]
    dotted = ".".join(path if path in layer else path[:1])
    allowed = f"{key.allowed} is allowed" if key else f"[{path[0]}] is a section of keys"
    return f"{dotted} = {_shown(setting.value)} in {setting.origin}: {allowed}"


def _shown(value: object) -> str:
    """A value as TOML would write it, cut where it is long."""
    if isinstance(value, dict):
        return "a table"
    text = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _flat(document: Mapping[str, Any]) -> Iterator[tuple[KeyPath, object]]:
    for name, value in document.items():
        if isinstance(value, dict) and name in sections():
            yield from (((name, leaf), inner) for leaf, inner in value.items())
        else:
            yield (name,), value


def _nested(values: Mapping[KeyPath, object]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for path, value in sorted(values.items(), key=lambda item: len(item[0])):
        if len(path) == 1:
            document[path[0]] = value
        elif isinstance(document.setdefault(path[0], {}), dict):
            document[path[0]][path[1]] = value
    return document


def _split(item: str, flag: str, shape: str) -> tuple[str, str]:
    name, sign, value = item.partition("=")
    if not sign or not name.strip():
        raise BadJobError(f"{flag} {item} is not {shape}", advice="e.g. --set train.lr=0.05 --set config.width=64")
    return name.strip(), value.strip()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadJobError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise BadJobError(f"the job file {path} cannot be read: {error.strerror}", advice="Check the path.") from error
