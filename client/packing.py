"""A Flower app as one training script: packed, told from others, and what it says of its job. Nothing of it is run.

Pure: texts in, texts out. A packed app is the app's own files, readable, and one call of lydian.flower.run; equal files
give equal bytes, so that workers trust it by its digest as any other script (docs/flower.md).
"""

import ast
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import BadTaskError

PROJECT = "pyproject.toml"
ROUNDS = "num-server-rounds"
CLIENTS = "num-supernodes"
"""The keys of [config] that a job, too, knows of: its rounds, and its clients where they are not one a worker."""
RUN = "lydian.flower.run"
COMPONENTS = '[tool.flwr.app.components] serverapp = "PACKAGE.server_app:app", clientapp = "PACKAGE.client_app:app"'
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", re.ASCII)

Value = str | int | float | bool

SECURE = "submit with --secure-enabled true, which masks every update"
NOISE = "privacy is the job's here: see [privacy] and docs/privacy.md"
TREES = "trees are joined there, and arrays are averaged here"
REFUSED = {
    "secagg_mod": SECURE,
    "secaggplus_mod": SECURE,
    "SecAggWorkflow": SECURE,
    "SecAggPlusWorkflow": SECURE,
    "fixedclipping_mod": NOISE,
    "adaptiveclipping_mod": NOISE,
    "DPFedAvgFixed": NOISE,
    "DPFedAvgAdaptive": NOISE,
    "DPFedAvgNumPyClient": NOISE,
    "DifferentialPrivacyServerSideFixedClipping": NOISE,
    "DifferentialPrivacyServerSideAdaptiveClipping": NOISE,
    "DifferentialPrivacyClientSideFixedClipping": NOISE,
    "DifferentialPrivacyClientSideAdaptiveClipping": NOISE,
    "FedXgbBagging": TREES,
    "FedXgbCyclic": TREES,
    "FedXgbNnAvg": TREES,
}
"""What of Flower has a half on its server that does not run here: the other half would promise what is not so."""

LIKE = {
    "FedAvgM": "--algorithm fedavgm",
    "FedOpt": "--algorithm fedadam",
    "FedAdam": "--algorithm fedadam",
    "FedYogi": "--algorithm fedyogi",
    "FedAdagrad": "--algorithm fedadagrad",
    "FedMedian": "--robust median",
    "FedTrimmedAvg": "--robust trimmed",
    "Krum": "--robust krum",
    "MultiKrum": "--robust multikrum",
    "Bulyan": "--robust bulyan",
    "FaultTolerantFedAvg": "--quorum 0.5",
    "QFedAvg": "",
}
"""A strategy of Flower -> what is most like it here. FedProx is not among them: its mu comes to the clients."""


@dataclass(frozen=True, slots=True)
class App:
    """A Flower app.

    Attributes:
        name: of the project.
        files: path in the app's folder -> text.
        server: the ServerApp, as `package.module:name`.
        client: the ClientApp.
        config: [tool.flwr.app.config], sections flattened with dots.
    """

    name: str
    files: Mapping[str, str]
    server: str
    client: str
    config: Mapping[str, Value]


def app_of(files: Mapping[str, str], shown: str) -> App:
    """The app that these files are.

    Args:
        files: path in the app's folder -> text.
        shown: the folder, for the sentence.

    Raises:
        BadTaskError: they are none, or one that cannot be carried; the sentence says what there should be.
    """
    if PROJECT not in files:
        raise BadTaskError(f"{shown} has no {PROJECT}", advice=f"A Flower app is known by it: {COMPONENTS}.")
    try:
        project = tomllib.loads(files[PROJECT])
    except tomllib.TOMLDecodeError as error:
        raise BadTaskError(f"{shown}/{PROJECT} is not TOML: {error}") from error
    section = _table(project, "tool", "flwr", "app")
    parts = _table(section, "components")
    server, client = (_component(parts, key, files, shown) for key in ("serverapp", "clientapp"))
    name = _table(project, "project").get("name") or re.split(r"[.:]", client)[0]
    app = App(str(name), files, server, client, _config(section.get("config", {}), shown))
    used = names_of_flower(app)
    for found in sorted(used & REFUSED.keys()):
        raise BadTaskError(f"{shown} uses Flower's {found}, which cannot be carried", advice=f"{REFUSED[found]}.")
    return app


def _table(owner: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """A table of a document; an empty one where there is none."""
    found: Any = owner
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _component(parts: Mapping[str, Any], key: str, files: Mapping[str, str], shown: str) -> str:
    """One of the app's two parts, whose module is among the files."""
    said = parts.get(key)
    if said is None:
        sentence = f"{shown}/{PROJECT} has no {key} under [tool.flwr.app.components]"
        raise BadTaskError(sentence, advice=f"A Flower app has {COMPONENTS}.")
    if not isinstance(said, str) or not _REFERENCE.fullmatch(said):
        raise BadTaskError(f"{shown}/{PROJECT}: {key} = {said!r} is not PACKAGE.MODULE:NAME")
    path = said.partition(":")[0].replace(".", "/")
    if f"{path}.py" not in files and f"{path}/__init__.py" not in files:
        raise BadTaskError(f"{shown}/{PROJECT}: {key} = {said!r}, and there is no {path}.py in {shown}")
    return said


def _config(tables: Any, shown: str, above: str = "") -> dict[str, Value]:  # noqa: ANN401 - of a TOML document
    """Keys and values, those of sections with the section's name and a dot before them, as Flower has it."""
    found: dict[str, Value] = {}
    for name, value in _table({"config": tables}, "config").items():
        if isinstance(value, dict):
            found |= _config(value, shown, f"{above}{name}.")
        elif isinstance(value, Value):
            found[f"{above}{name}"] = value
        else:
            sentence = f"{shown}/{PROJECT}: {above}{name} under [tool.flwr.app.config] is a {type(value).__name__}"
            raise BadTaskError(f"{sentence}; Flower takes a text, a number, true or false")
    return found


# ---------------------------------------------------------------- one script


def pack(app: App) -> str:
    """The app as a training script: its files as texts, and the call that runs them."""
    title = re.sub(r"[^A-Za-z0-9._-]+", "-", app.name)
    files = "".join(f"    {name!r}: {literal(app.files[name])},\n" for name in sorted(app.files))
    config = "".join(f"        {name!r}: {_written(app.config[name])},\n" for name in sorted(app.config))
    return (
        f'"""The Flower app {title} as one training script: change the app and pack it again, not this."""\n\n'
        f"import lydian.flower\n\nFILES = {{\n{files}}}\n\n"
        f"{RUN}(\n    FILES,\n    server={app.server!r},\n    client={app.client!r},\n"
        f"    config={{\n{config}    }},\n)\n"
    )


def _written(value: Value) -> str:
    """A value as Python writes it: inf and nan, which TOML has, are no words of Python's."""
    return f"float({str(value)!r})" if isinstance(value, float) and not math.isfinite(value) else repr(value)


def literal(text: str) -> str:
    """A text as Python writes it, over as many lines as it has, so that it can be read."""
    head, last = (text[:-1], "\\'") if text.endswith("'") else (text, "")
    body = head.replace("\\", "\\\\").replace("''", "\\'\\'").replace("\r", "\\r").replace("\0", "\\x00")
    return f"'''\\\n{body}{last}'''"


def unpack(source: str, shown: str) -> App | None:
    """The app that a script was packed from; None: it is another script.

    Raises:
        BadTaskError: as `app_of`, should somebody have written in it.
    """
    if RUN not in source:
        return None
    try:
        files = next((files for node in ast.parse(source).body if (files := _files(node)) is not None), None)
    except (SyntaxError, ValueError):
        return None  # it is said elsewhere
    return None if files is None else app_of(files, shown)


def _files(node: ast.stmt) -> dict[str, str] | None:
    """The files, where this statement is the one that has them."""
    match node:
        case ast.Assign(targets=[ast.Name(id="FILES")], value=ast.Dict() as value):
            found: dict[str, str] = ast.literal_eval(value)
            return found
        case _:
            return None


# ---------------------------------------------------------------- what an app says of itself


def names_of_flower(app: App) -> set[str]:
    """What an app takes from Flower, by name: `from flwr.… import NAME`, or an attribute where it imports a module."""
    found: set[str] = set()
    for tree in _trees(app):
        modules = False
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "flwr" and not node.level:
                found |= {one.name for one in node.names}
                modules = modules or any(one.name.islower() for one in node.names)
            elif isinstance(node, ast.Import):
                modules = modules or any(one.name.partition(".")[0] == "flwr" for one in node.names)
        if modules:
            found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return found


def measured_by_clients(app: App) -> bool:
    """Whether it is the clients that measure: they can, and no `evaluate_fn` is given to what runs on the server."""
    nodes = [node for tree in _trees(app) for node in ast.walk(tree)]
    if any(isinstance(node, ast.keyword) and node.arg == "evaluate_fn" for node in nodes):
        return False
    return any(_evaluates(node) for node in nodes)


def _evaluates(node: ast.AST) -> bool:
    """`@app.evaluate()` above a function, or a method `evaluate` of a class."""
    match node:
        case ast.FunctionDef(decorator_list=[*above]):
            calls = [one.func for one in above if isinstance(one, ast.Call)]
            return any(isinstance(call, ast.Attribute) and call.attr == "evaluate" for call in calls)
        case ast.ClassDef(body=[*body]):
            return any(isinstance(one, ast.FunctionDef) and one.name == "evaluate" for one in body)
        case _:
            return False


def remarks(app: App, algorithm: str, robust: str) -> Iterator[str]:
    """What whoever submits an app is told: that its strategy does not average here."""
    for name in sorted(names_of_flower(app) & LIKE.keys()):
        how = f"; most like it is {LIKE[name]}" if LIKE[name] else "; nothing here is like it"
        rule = algorithm if robust == "none" else f"{algorithm}, robust = {robust}"
        yield f"the app has Flower's {name}, and this job is averaged by {rule}, as it says{how}"
    if ROUNDS not in app.config:
        yield f"the app's config has no {ROUNDS}: the number of rounds is the job's (--rounds)"


def _trees(app: App) -> Iterator[ast.Module]:
    """The syntax trees of the app's Python files; one that is none is refused when it is read."""
    for name, text in app.files.items():
        if name.endswith(".py"):
            yield ast.parse(text)
