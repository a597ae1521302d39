"""What coordinator and workers log as JSON: one object a line, with the ids of what it is about where they are known.

    {"time": "2026-01-31T12:00:00.000Z", "level": "info", "logger": "lydian.agent", "message": "…",
     "job": "digits-4f2a", "round": 3, "worker": "attic-9c1d", "assignment": "digits-4f2a.train.3.0"}

Ids come from the record's `extra=ids(…)`, or from `about(…)` around what is done; an assignment says its job and round.
Everything but ASCII is escaped, so that no text of another machine can be taken for a line, or steer a terminal.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum
from types import TracebackType

Id = str | int
IDS = ("job", "round", "shard", "attempt", "worker", "assignment")

_ABOUT: ContextVar[dict[str, Id] | None] = ContextVar("lydian_about", default=None)


class LogFormat(StrEnum):
    """How a process logs to stderr."""

    text = "text"
    json = "json"


def ids(**known: Id | None) -> dict[str, Id]:
    """For `extra=`: those that are known. Names: IDS.

    Raises:
        ValueError: a name is none of them, and could be a field of the record itself.
    """
    if strange := known.keys() - set(IDS):
        raise ValueError(f"{', '.join(sorted(strange))}: ids are {', '.join(IDS)}")
    return {name: value for name, value in known.items() if value is not None}


def ids_of(job: str, fact: object) -> dict[str, Id]:
    """Those of a job's fact (common.facts)."""
    return ids(job=job, **{name: getattr(fact, name, None) for name in ("round", "shard", "attempt", "worker")})


@contextmanager
def about(**known: Id | None) -> Iterator[None]:
    """Whatever this thread or task logs inside is about these ids, beside those of the block around it."""
    before = _ABOUT.set({**(_ABOUT.get() or {}), **ids(**known)})
    try:
        yield
    finally:
        _ABOUT.reset(before)


class JsonFormatter(logging.Formatter):
    """One record, one JSON object on one line; a traceback is a text inside it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its line break."""
        given = {name: value for name in IDS if isinstance(value := getattr(record, name, None), Id)}
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        line = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_whole({**(_ABOUT.get() or {}), **given}),
            **({"traceback": record.exc_text} if record.exc_text else {}),
            **({"stack": self.formatStack(record.stack_info)} if record.stack_info else {}),
        }
        return json.dumps(line)


def _whole(known: dict[str, Id]) -> dict[str, Id]:
    """With the job and round that an assignment's name says: JOB.KIND.ROUND.SHARD."""
    parts = str(known.get("assignment", "")).split(".")
    if len(parts) != 4 or not parts[2].isdecimal():
        return known
    return {"job": parts[0], "round": int(parts[2]), **known}


def json_to_stderr(level: int) -> None:
    """Have everything logged to stderr as JSON from now on: warnings of Python and what ends the process as well."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    logging.captureWarnings(capture=True)
    sys.excepthook = _last_words


def speaks_json() -> bool:
    """Whether this process logs JSON: what it would else print on stderr is to be logged."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.root.handlers)


def _last_words(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("lydian").critical("ended by %s", kind.__name__, exc_info=(kind, error, trace))
