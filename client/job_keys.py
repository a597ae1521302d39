"""Every key that a job has, read off JobSpec: its name, its flag, what it may be, and the nearest one to a wrong name.

Pure. JobSpec is the one place where a key is decided: a key added there is a flag, a line of the help and a suggestion
without an edit here.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from common.messages import INIT, JobSpec

KeyPath = tuple[str, ...]
"""("rounds",) or ("train", "lr") or, in the open section, ("config", whatever the user calls it)."""

RESERVED = frozenset({"url", "token", "json", "set", "watch", "key", "help", "flower"})
"""Flags that `lydian submit` has for itself; a key of that name gets its section before it."""

IN_SECTION = frozenset({"enabled", "threshold", "bits"})
"""Keys that say nothing without their section: their flags name it, e.g. --secure-enabled."""

_WORDS = {
    r"^[A-Za-z0-9._-]{1,63}$": "a name (letters, digits, dots, dashes, underscores; at most 63)",
    r"^[A-Za-z][A-Za-z0-9_]{0,62}$": "a name as Python has it (letters, digits, underscores; a letter first)",
    INIT: "a file or folder of weights (by a slash or its ending), or JOB, JOB@ROUND, JOB@best",
}
_SYNONYMS = {
    "batch": "batch_size",
    "bs": "batch_size",
    "clients": "shards",
    "epochs": "local_epochs",
    "learning_rate": "lr",
    "metric": "target_metric",
    "num_rounds": "rounds",
    "seconds": "local_seconds",
    "steps": "local_steps",
    "timeout": "deadline",
    "workers": "min_workers",
}


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a job.

    Attributes:
        path: where it stands in a job file.
        flag: its flag, e.g. --lr; that of an open section is --config and takes NAME=VALUE.
        schema: its JSON schema.
        open: a section whose keys are the user's own.
    """

    path: KeyPath
    flag: str
    schema: Mapping[str, Any]
    open: bool = False

    @property
    def dotted(self) -> str:
        """The key as people write it: train.lr."""
        return ".".join(self.path)

    @property
    def alternatives(self) -> list[Mapping[str, Any]]:
        """What the value may be, each as a JSON schema. Not null: a key that is not set is left out."""
        return [one for one in self.schema.get("anyOf", [self.schema]) if one.get("type") != "null"]

    @property
    def is_text(self) -> bool:
        """Whether nothing but a text is allowed: then no value needs quotes on the command line."""
        return not self.open and all(one.get("type") == "string" for one in self.alternatives)

    @property
    def allowed(self) -> str:
        """What the value may be, in words."""
        if self.open:
            return "a text, a number, true or false, or a list of these"
        return " or ".join(_in_words(one) for one in self.alternatives)

    @property
    def shape(self) -> str:
        """What the value may be, as the help shows it beside the flag: `auto|N`."""
        return "NAME=VALUE" if self.open else "|".join(_in_short(one) for one in self.alternatives)

    @property
    def help(self) -> str:
        """One line about the key, with its default."""
        text, default = str(self.schema.get("description", "")), self.schema.get("default")
        shown = "" if default is None or self.open else f"(default {default})"
        return f"{text} {shown}".strip() if shown not in text else text


@cache
def job_keys() -> dict[KeyPath, Key]:
    """Every key of JobSpec in the order of the model, top level first, the open section last. Flags are distinct."""
    taken = set(RESERVED | IN_SECTION)
    keys: dict[KeyPath, Key] = {}
    leaves = _walk(JobSpec.model_json_schema())
    for path, schema in sorted(leaves, key=lambda leaf: (leaf[1].get("type") == "object", len(leaf[0]))):
        name = path[-1] if path[-1] not in taken else "_".join(path)
        taken.add(name)
        is_open = schema.get("type") == "object"
        keys[path] = Key(path, "--" + name.replace("_", "-"), schema, open=is_open)
    return keys


@cache
def sections() -> frozenset[str]:
    """The sections of a job file, the open one included."""
    return frozenset(path[0] for path, key in job_keys().items() if len(path) > 1 or key.open)


def key_at(path: KeyPath) -> Key | None:
    """The key that a value at this path belongs to; None when there is no such key."""
    keys = job_keys()
    if len(path) == 2 and (path[0],) in keys and keys[(path[0],)].open:
        return keys[(path[0],)]
    found = keys.get(path)
    return None if found is None or found.open else found


def nearest(path: KeyPath) -> str | None:
    """The key that was probably meant by one that does not exist: train.lr for train.learning_rate, or for lr alone."""
    keys = [key for key in job_keys().values() if not key.open]
    leaf = _SYNONYMS.get(path[-1], path[-1])
    like = leaf if any(key.path[-1] == leaf for key in keys) else nearest_of(leaf, [key.path[-1] for key in keys])
    return next((key.dotted for key in keys if key.path[-1] == like), None)


def nearest_of(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that looks most like `name`, if any does."""
    return next(iter(get_close_matches(name, list(names), n=1)), None)


def _walk(schema: Mapping[str, Any]) -> Iterator[tuple[KeyPath, Mapping[str, Any]]]:
    """Every leaf of the model's JSON schema; a section is a reference to another schema."""
    for name, value in schema["properties"].items():
        if "$ref" not in value:
            yield (name,), value
            continue
        section = schema["$defs"][value["$ref"].rsplit("/", 1)[-1]]
        for leaf, inner in section["properties"].items():
            yield (name, leaf), inner


def _in_words(schema: Mapping[str, Any]) -> str:
    if "const" in schema or "enum" in schema:
        return " or ".join(f'"{value}"' for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "string":
        pattern = schema.get("pattern")
        return "a text" if pattern is None else _WORDS.get(pattern, f"a text that matches {pattern}")
    if kind == "boolean":
        return "true or false"
    if kind == "array":
        return f"a list, each {_in_words(schema['items'])}"
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = " and ".join(f"{word} {schema[name]:,}" for name, word in words.items() if name in schema)
    noun = "a whole number" if kind == "integer" else "a number"
    return f"{noun} ({bounds})" if bounds else noun


def _in_short(schema: Mapping[str, Any]) -> str:
    if "const" in schema or "enum" in schema:
        return "|".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"[{_in_short(schema['items'])}, …]"
    return {"integer": "N", "number": "X", "boolean": "true|false"}.get(
        str(schema.get("type")), "NAME" if re.search(r"1,63|0,62", str(schema.get("pattern"))) else "TEXT"
    )
