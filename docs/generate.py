"""Writes docs/reference/ from the code: `python -m docs.generate`, or `make docs`. `--check` says what is out of date.

    cli.md      every command, as --help says it         errors.md    every error: status, code, sentence, advice
    job.md      every key of a job                       metrics.md   what /metrics has
    api.md      every HTTP call and message

Nothing here is written by hand but the headings: a new command, key, error, metric or call needs this run again.
"""

import asyncio
import inspect
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import typer.main

from client.job_keys import job_keys
from common import advice, errors
from common.messages import JobSpec

FOLDER = Path(__file__).resolve().parent / "reference"
NOTE = "<!-- Written by `make docs` from the code: change the code, not this file. -->"
WIDTH = 100  # columns of a command's help


def main(arguments: list[str]) -> int:
    """Write the pages, or with --check say which would change."""
    pages = {"cli.md": cli, "job.md": job, "errors.md": error_page, "metrics.md": metrics, "api.md": api}
    FOLDER.mkdir(exist_ok=True)
    stale = []
    for name, make in pages.items():
        text = "\n".join([NOTE, "", *make()]).rstrip() + "\n"
        path = FOLDER / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
    if stale:
        said = "is out of date: run `make docs`" if "--check" in arguments else "was written"
        sys.stderr.write("".join(f"docs/reference/{name} {said}\n" for name in stale))
    return 1 if stale and "--check" in arguments else 0


# ---------------------------------------------------------------- commands


def cli() -> Iterator[str]:
    yield from ("# Commands", "", "What `lydian COMMAND --help` says. Answers go to stdout, everything else to stderr.")
    for name, command in commands():
        yield from ("", f"## {name}", "", "```text", *help_of(name, command).splitlines(), "```")


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with its full name; those that are programs of their own by their own help."""
    from client.main import app
    from client.submit_job import make_app
    from server.__main__ import app as serve
    from worker.__main__ import app as work

    own = {"lydian serve": serve, "lydian work": work, "lydian submit": make_app("lydian submit")}
    for name, command in _walk("lydian", typer.main.get_command(app)):
        yield name, typer.main.get_command(own[name]) if name in own else command


def _walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    for part, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from _walk(f"{name} {part}", inner)


def help_of(name: str, command: Any) -> str:
    """A command's help as plain text."""
    for one in (command, *getattr(command, "commands", {}).values()):
        one.rich_markup_mode = None
    context = command.context_class(
        command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH, help_option_names=["-h", "--help"]
    )
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


# ---------------------------------------------------------------- a job's keys


def job() -> Iterator[str]:
    yield from ("# A job's keys", "", "In a job file (TOML), as flags of `lydian submit`, or as `--set section.key=value`.")
    yield "`lydian init` writes a job file with all of them. What goes together: [algorithms](../algorithms.md)."
    ordered = ["", *JobSpec.model_fields]
    keys = sorted(job_keys().values(), key=lambda key: ordered.index(_section(key)))
    for section, found in groupby(keys, key=_section):
        about = inspect.getdoc(JobSpec.model_fields[section].annotation) if section not in ("", "config") else ""
        yield from ("", f"## {f'[{section}]' if section else 'Top level'}", "")
        if about:
            yield from (about.partition("`: ")[2].splitlines()[0].capitalize(), "")
        yield from ("| key | flag | what it may be | default | what it is |", "| --- | --- | --- | --- | --- |")
        for key in found:
            default = key.schema.get("default")
            shown = "" if default is None or key.open else f"`{_toml(default)}`"
            cells = (f"`{key.dotted}`", f"`{key.flag}`", key.allowed, shown, key.schema.get("description", ""))
            yield _row(*cells)


def _section(key: Any) -> str:
    return key.path[0] if len(key.path) > 1 or key.open else ""


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------- errors


def error_page() -> Iterator[str]:
    yield from ("# Errors", "", 'Over HTTP each is `{"code", "sentence", "advice"}`; a command prints the last two and ends')
    yield from ("with the exit code that `lydian --help` tells. A code that is not here is a narrower one of its class.", "")
    yield from ("| status | class | code | what it is | advice |", "| --- | --- | --- | --- | --- |")
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.LydianError)]
    for kind in sorted(kinds, key=lambda kind: kind.status):
        about = " ".join((inspect.getdoc(kind) or "").split())
        yield _row(str(kind.status), f"`{kind.__name__}`", f"`{kind.code}`", about, kind.advice)
    yield from ("", "## Why an update is refused", "", "Codes of `BadUpdateError`:")
    yield ", ".join(f"`{code}`" for code in sorted(errors.BAD_UPDATE_CODES)) + "."
    yield from ("", "## When an attempt fails on a worker", "")
    yield "`lydian logs` and `lydian watch` name the cause and say what to do; `--json` has them as `cause` and `advice`."
    yield from ("", "| code of the worker | advice where nothing more is known |", "| --- | --- |")
    for code, words in advice.BY_CODE.items():
        yield _row(f"`{code}`", words)
    yield from ("", "Causes that are told from the traceback:")
    yield ", ".join(f"`{cause}`" for cause in dict.fromkeys(rule.cause for rule in advice.RULES)) + "."


# ---------------------------------------------------------------- metrics


def metrics() -> Iterator[str]:
    yield from ("# Metrics", "", "`GET /metrics`, for Prometheus.", "")
    yield from ("| name | kind | labels | what it is |", "| --- | --- | --- | --- |")
    for name, kind, labels, about in asyncio.run(_families()):
        yield _row(f"`{name}`", kind, labels, about)


async def _families() -> list[tuple[str, str, str, str]]:
    """What a coordinator without jobs and workers has; families without a sample tell no labels."""
    from server.certificates import open_certificate
    from server.coordinator import Coordinator
    from server.metrics import StateCollector
    from server.settings import Settings
    from server.store import Journal
    from server.tokens import Tokens

    with tempfile.TemporaryDirectory() as name:
        settings = Settings(state_dir=Path(name))
        journal = Journal.open(settings.state_dir / "journal.sqlite")
        try:
            coordinator = Coordinator.open(settings, journal, Tokens(journal))
            certificate = open_certificate("self-made", None, settings.state_dir, None, settings.tailscaled)
            return [
                (f"{family.name}{'_total' if family.type == 'counter' else ''}", family.type,
                 ", ".join(getattr(family, "_labelnames", ())), family.documentation)
                for family in StateCollector(coordinator, certificate).collect()
            ]
        finally:
            journal.close()


# ---------------------------------------------------------------- calls

CALLERS = {
    "get_admin": "admin",
    "get_reader": "read, submit or admin",
    "get_job_owner": "who submitted it, or admin",
    "get_submitter": "submit or admin",
    "get_token_owner": "whose it is, or admin",
    "get_worker": "a worker",
    "get_this_worker": "that worker",
    "get_newcomer": "a join token, or a worker",
    "get_anyone": "read, submit or admin, or a worker",
    "get_principal": "any token",
}


def api() -> Iterator[str]:
    from server.app import create_app

    app = create_app()
    document = app.openapi()
    rules = _rules(app)
    yield from ("# HTTP calls", "", "How they hang together: [the protocol](../protocol.md).", "")
    yield from ("| call | whose token | takes | answers | what it is |", "| --- | --- | --- | --- | --- |")
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            about = call.get("description", call.get("summary", "")).splitlines()[0]
            good = {code: answer for code, answer in call["responses"].items() if code.startswith("2")}
            answers = "; ".join(f"{code} {_content(answer)}".strip() for code, answer in good.items())
            verb = method.upper()
            cells = (rules.get((verb, path), "none"), _content(call.get("requestBody", {})), answers, about)
            yield _row(f"`{verb} {path}`", *cells)
    yield from ("", "## Messages", "", "Unknown fields are refused.")
    for name, schema in sorted(document["components"]["schemas"].items()):
        if schema.get("type") == "object" and not name.startswith(("HTTPValidation", "Validation")):
            yield from ("", f"### {name}", "", " ".join(schema.get("description", "").split()), "")
            yield from ("| field | type | what it is |", "| --- | --- | --- |")
            needed = schema.get("required", [])
            for field, inner in schema.get("properties", {}).items():
                star = "" if field in needed else " (optional)"
                yield _row(f"`{field}`{star}", _kind(inner), inner.get("description", ""))


def _rules(app: Any) -> dict[tuple[str, str], str]:
    """(verb, path) -> whose token a call wants."""
    found = {}
    for route in _routes(app.routes):
        names = list(_dependencies(route.dependant))
        rule = next((name for name in names if name in CALLERS and name != "get_principal"), None)
        rule = rule or next((name for name in names if name == "get_principal"), "")
        for verb in route.methods:
            found[verb, route.path] = CALLERS.get(rule, "none")
    return found


def _routes(routes: Any) -> Iterator[Any]:
    """The routes that answer, those of a router inside a router too."""
    for route in routes:
        if hasattr(route, "dependant"):
            yield route
        else:
            router = getattr(route, "original_router", None) or getattr(route, "router", None)
            yield from _routes(getattr(route, "routes", None) or getattr(router, "routes", ()) or ())


def _dependencies(dependant: Any) -> Iterator[str]:
    for one in dependant.dependencies:
        yield getattr(one.call, "__name__", "")
        yield from _dependencies(one)


def _content(part: dict[str, Any]) -> str:
    """What a body is: the message's name, or its media type."""
    for media, inner in part.get("content", {}).items():
        schema = inner.get("schema", {})
        return _kind(schema) if schema else "" if media == "application/json" else f"`{media}`"
    return ""


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(one) for one in schema["anyOf"]))
    if schema.get("type") == "array":
        inner = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
        return f"list of {_kind(inner)}" if inner else "list"
    if "const" in schema or "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    return str(schema.get("format") or schema.get("type", "anything"))


def _row(*cells: str) -> str:
    return f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
