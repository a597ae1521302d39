"""The form of a job, read off JobSpec's schema: a key added there is a field here. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from common.messages import JobSpec
from common.tasks import BUILTIN

FIRST = ("rounds", "name", "seed", "target", "target_metric", "script", "arguments", "init")
"""Of the top level; the task has a place of its own."""
TITLES = {
    "train": "Training", "data": "Data", "round": "Rounds", "aggregation": "Aggregation", "evaluation": "Evaluation",
    "secure": "Secure aggregation", "privacy": "Privacy",
}  # fmt: skip
OPEN = frozenset({"train"})  # sections that are shown unfolded


@dataclass(frozen=True)
class Field:
    """One key of a job."""

    path: str  # train.lr
    kind: str  # choice, number, text, list
    help: str
    default: str  # shown where nothing is entered; empty: there is none
    options: tuple[str, ...] = ()  # of a choice, or words that are allowed beside a number

    @property
    def label(self) -> str:
        """The key as a job file has it in its section."""
        return self.path.rpartition(".")[2]

    @property
    def id(self) -> str:
        """For the page's markup."""
        return "key-" + self.path.replace(".", "-")


@dataclass(frozen=True)
class Section:
    """A section of a job file; the first has no name."""

    name: str
    title: str
    fields: tuple[Field, ...]
    open: bool = False


@dataclass(frozen=True)
class Task:
    """A built-in task as a choice, with what a job of it begins with."""

    name: str
    summary: str
    defaults: dict[str, object]  # dotted job key -> value
    config: dict[str, object]


@cache
def sections() -> tuple[Section, ...]:
    """The sections of a job, each with its fields, in the order of JobSpec."""
    schema = JobSpec.model_json_schema()
    top = [_field(name, schema["properties"][name]) for name in FIRST]
    found = [Section("", "Job", tuple(top), open=True)]
    for name, value in schema["properties"].items():
        if "$ref" in value:
            inner = schema["$defs"][value["$ref"].rsplit("/", 1)[-1]]["properties"]
            fields = tuple(_field(f"{name}.{key}", one) for key, one in inner.items())
            found.append(Section(name, TITLES.get(name, name.capitalize()), fields, open=name in OPEN))
    return tuple(found)


def tasks() -> list[Task]:
    """The built-in tasks."""
    return [Task(task.name, task.summary, dict(task.defaults), dict(task.config)) for task in BUILTIN.values()]


def _field(path: str, schema: Mapping[str, Any]) -> Field:
    kinds = list(_alternatives(schema))
    words = tuple(str(word) for one in kinds for word in one.get("enum", [one["const"]] if "const" in one else []))
    others = {str(one.get("type")) for one in kinds if "enum" not in one and "const" not in one}
    if others == {"boolean"}:
        kind, words = "choice", ("true", "false")
    elif not others:
        kind = "choice"
    elif "array" in others:
        kind = "list"
    else:
        kind = "number" if others <= {"integer", "number"} else "text"
    return Field(path, kind, str(schema.get("description", "")), _shown(schema.get("default")), words)


def _alternatives(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a value may be, each as a schema; not null, since a key that is not set is left out."""
    yield from (one for one in schema.get("anyOf", [schema]) if one.get("type") != "null")


def _shown(default: object) -> str:
    """A default as it would be entered."""
    if default is None or default in ([], (), ""):
        return ""
    return str(default).lower() if isinstance(default, bool) else str(default)
