"""How the house is built: what may be imported, called and stored where. Reads the code; the arrows between the
packages are import-linter's (`make check`).

Nothing on the network or on a disk may become code: no pickle in any form, no eval, no shell. Nothing waits by
sleeping, nothing swallows what it does not understand, and only the client prints.
"""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("server", "worker", "client", "common", "lydian")
ALSO_READ = ("bench", "examples")  # shipped to be copied, so as safe as the product

# ---------------------------------------------------------------- the rules, as data

FORBIDDEN_IMPORTS = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "pickletools",
}  # fmt: skip
FORBIDDEN_NAMES = {
    "torch.load", "torch.save", "torch.jit.load", "torch.hub", "torch.package", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "eval", "exec",
    "pandas.read_pickle",
}  # fmt: skip
FORBIDDEN_BUILTINS = {name for name in FORBIDDEN_NAMES if "." not in name}

# (rule, file) -> why this one file may.
ALLOWED = {
    ("sleep", "common/api.py"): "waits between two connections of an event stream; no event can tell that it is time",
    ("sleep", "common/tailscale.py"): "waits between two questions to a tailscaled that starts",
    ("sleep", "bench/paced.py"): "plays a machine that is slower than this one",
    ("sleep", "client/running.py"): "waits between two looks at a file that another process writes",
    ("sleep", "client/service/manager.py"): "waits between two looks at a worker that joins, which only a file tells",
    ("broad except", "worker/task_host.py"): "a user's code can raise anything, and its traceback is the answer",
    ("broad except", "worker/sealing.py"): "what a thread met is handed to who waits for the thread",
    ("broad except", "worker/task_script.py"): "a user's script can raise anything, and its traceback is the answer",
    ("broad except", "worker/task_ranks.py"): "an error that is not told to the other ranks leaves them waiting",
}


def full_names(tree: ast.AST) -> dict[str, str]:
    """Local name -> what it stands for: `import numpy as np` gives np -> numpy, `from time import sleep` time.sleep."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                target = alias.name if alias.asname else alias.name.partition(".")[0]
                names[alias.asname or target] = target
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """The full dotted name of an expression like `np.load`, or "" if it is none."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value, names)):
        return f"{owner}.{node.attr}"
    return ""


def modules_of(node: ast.AST) -> list[str]:
    """The modules that an import statement, or an import by name, brings in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    if isinstance(node, ast.Call) and dotted(node.func, {}).endswith(("import_module", "__import__")):
        return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return []


def is_false(call: ast.Call, keyword: str) -> bool:
    """Whether `keyword=False` is written out in the call."""
    values = [given.value for given in call.keywords if given.arg == keyword]
    return any(isinstance(value, ast.Constant) and value.value is False for value in values)


def swallows_everything(handler: ast.ExceptHandler, names: dict[str, str]) -> bool:
    """Whether a clause catches what nobody has thought of and keeps it. Tidying up and a `raise` does not."""
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    broad = any(kind is not None and dotted(kind, names) in {"Exception", "BaseException"} for kind in caught)
    leaves = any(isinstance(node, ast.Return | ast.Break | ast.Continue) for node in ast.walk(handler))
    last = handler.body[-1]
    raises_again = isinstance(last, ast.Raise) and last.exc is None and not leaves
    return broad and not raises_again


def call_violations(call: ast.Call, names: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The rules that one call breaks."""
    called = dotted(call.func, names)
    if called == "numpy.load" and not is_false(call, "allow_pickle"):
        yield "unsafe", "numpy.load without allow_pickle=False"
    if any(given.arg == "shell" for given in call.keywords) and not is_false(call, "shell"):
        yield "unsafe", f"{called} through a shell"
    if called == "print":
        yield "print", "print"


def violations(source: str) -> Iterator[tuple[str, str]]:
    """(rule, what and where) for everything in a Python file that breaks one."""
    tree = ast.parse(source)
    names = full_names(tree)
    for node in ast.walk(tree):
        found = [("unsafe", f"import {m}") for m in modules_of(node) if m.partition(".")[0] in FORBIDDEN_IMPORTS]
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            name = dotted(node, names)
            found += [("unsafe", name)] if name in FORBIDDEN_NAMES else []
            found += [("sleep", name)] if name == "time.sleep" else []
        if isinstance(node, ast.ImportFrom):
            brought = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [("unsafe", name) for name in brought if name in FORBIDDEN_NAMES]
        if isinstance(node, ast.ExceptHandler):
            found += [("bare except", "except:")] if node.type is None else []
            found += [("broad except", "except Exception")] if swallows_everything(node, names) else []
        if isinstance(node, ast.Call):
            found += call_violations(node, names)
        yield from ((rule, f"line {getattr(node, 'lineno', 0)}: {what}") for rule, what in found)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def broken_rules(path: Path) -> list[tuple[str, str]]:
    """Violations in one file, without those that its place makes right: the client and the benchmarks print."""
    found = violations(path.read_text(encoding="utf-8"))
    prints = path.relative_to(ROOT).parts[0] in {"client", *ALSO_READ}
    return [(rule, what) for rule, what in found if not (rule == "print" and prints)]


# ---------------------------------------------------------------- the rules see what they should see


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        ("unsafe", "import pickle"),
        ("unsafe", "import joblib.numpy_pickle as quick"),
        ("unsafe", "from cloudpickle import dumps"),
        ("unsafe", "import importlib\nimportlib.import_module('pickle')"),
        ("unsafe", "module = __import__('marshal')"),
        ("unsafe", "import torch\ntorch.load('x')"),
        ("unsafe", "import torch as t\nload = t.load"),
        ("unsafe", "from torch import load"),
        ("unsafe", "from torch import jit\njit.load('x')"),
        ("unsafe", "import torch\ntorch.hub.load('a', 'b')"),
        ("unsafe", "import numpy as np\nnp.load('x')"),
        ("unsafe", "import numpy\nnumpy.load('x', allow_pickle=True)"),
        ("unsafe", "from numpy import load\nload('x')"),
        ("unsafe", "eval('1')"),
        ("unsafe", "run = exec"),
        ("unsafe", "import yaml\nyaml.load('x')"),
        ("unsafe", "import subprocess\nsubprocess.run('ls', shell=True)"),
        ("unsafe", "import subprocess\nsubprocess.Popen('ls', shell=flag)"),
        ("unsafe", "import os\nos.system('ls')"),
        ("sleep", "import time\ntime.sleep(1)"),
        ("sleep", "from time import sleep as rest\nrest(1)"),
        ("sleep", "import time\ndef wait(sleep=time.sleep): ..."),
        ("broad except", "try: ...\nexcept Exception: ..."),
        ("broad except", "try: ...\nexcept (OSError, BaseException): ..."),
        ("broad except", "try: ...\nexcept Exception as error: raise OSError from error"),
        ("broad except", "def f():\n  try: ...\n  except Exception:\n    if f: return\n    raise"),
        ("bare except", "try: ...\nexcept: ..."),
        ("print", "print('x')"),
    ],
)
def test_a_forbidden_line_is_seen(rule: str, source: str) -> None:
    assert rule in [broken for broken, _ in violations(source)]


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "import json\njson.load(open('x'))",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "import asyncio\nasync def rest(): await asyncio.sleep(1)",
        "model.eval()",
        "import os\nos.execv('x', [])",
        "def run(load):\n    load('x')",
        "try: ...\nexcept (OSError, ValueError): ...",
        "try: ...\nexcept BaseException:\n  tidy()\n  raise",
        "'torch.load and print() in a text'",
    ],
)
def test_an_innocent_line_is_left_alone(source: str) -> None:
    assert list(violations(source)) == []


# ---------------------------------------------------------------- the code keeps the rules


@pytest.mark.parametrize("path", python_files(*PRODUCT, *ALSO_READ), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_keeps_the_rules(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    assert [found for found in broken_rules(path) if (found[0], name) not in ALLOWED] == []


@pytest.mark.parametrize(("rule", "name"), ALLOWED)
def test_an_exception_from_the_rules_is_still_needed(rule: str, name: str) -> None:
    assert rule in [broken for broken, _ in broken_rules(ROOT / name)]


# ---------------------------------------------------------------- what a process loads

HEAVY = ("torch", "torchvision", "sklearn", "safetensors.torch", "pandas", "scipy")


@pytest.mark.parametrize("module", ["server.app", "client.main", "client.submit_job", "worker.agent"])
def test_a_process_that_does_not_train_loads_no_torch(module: str, tmp_path: Path) -> None:
    program = (
        "import importlib, json, sys\n"
        f"importlib.import_module({module!r})\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))\n"
    )
    environment = os.environ | {"LYDIAN_STATE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []  # an import makes no folder and opens no journal


def test_the_child_that_trains_imports_none_of_our_packages() -> None:
    without_torch = {"task_precision", "task_schedule", "task_cage"}
    files = [file for file in (ROOT / "worker").glob("task_*.py") if file.stem not in without_torch]
    assert len(files) >= 8
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported = {module.partition(".")[0] for node in run_nodes(tree) for module in modules_of(node)}
        assert "torch" in imported
        assert not imported & set(PRODUCT)


def run_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`, which no interpreter runs."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(tree, ast.If) and dotted(tree.test, {}) == "TYPE_CHECKING" and child in tree.body:
            continue
        yield from run_nodes(child)


# ---------------------------------------------------------------- the layout

FILES = (
    "server/app.py", "server/settings.py", "server/coordinator.py", "server/rounds.py", "server/fleet.py",
    "server/averaging.py", "server/optimizers.py", "server/robust.py", "server/store.py", "server/blobs.py",
    "server/auth.py", "server/events.py", "worker/agent.py", "worker/plan.py", "worker/spool.py", "worker/hardware.py",
    "worker/identity.py", "worker/task_host.py", "client/submit_job.py", "common/messages.py", "common/errors.py",
    "common/api.py", "common/weights.py", "common/sharding.py", "common/tasks/__init__.py", "docs/architecture.md",
    "docs/protocol.md", "docs/decisions.md", "docs/tailscale.md", ".ci/run", "Makefile", "CHANGELOG.md",
    "CONTRIBUTING.md", "LICENSE", "README.md", "pyproject.toml", "requirements_server.txt", "requirements_new_gpu.txt",
    "requirements_legacy_gpu.txt",
)  # fmt: skip
FOLDERS = {".ci", "bench", "client", "common", "deploy", "docs", "examples", "lydian", "server", "tests", "worker"}
LARGEST_FILE = 1 << 20  # bytes
SHELVES = ("utils", "util", "helpers", "misc", "common_utils")  # names that say nothing about what is inside


def kept_files() -> list[Path]:
    """Every file that git keeps or would keep."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("this copy is no git checkout, so what is kept cannot be asked")
    command = [git, "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_files_of_the_layout_are_where_the_layout_says() -> None:
    assert [name for name in FILES if not (ROOT / name).is_file()] == []


def test_every_folder_has_a_place_in_the_layout() -> None:
    folders = {path.relative_to(ROOT).parts[0] for path in kept_files() if path.parent != ROOT}
    assert folders - FOLDERS == set()


def test_a_folder_with_python_in_it_is_a_package() -> None:
    missing = {path.parent for path in python_files(*PRODUCT) if not (path.parent / "__init__.py").is_file()}
    assert missing == set()


def test_a_module_has_a_header_that_says_what_it_is() -> None:
    silent = [str(path.relative_to(ROOT)) for path in python_files(*PRODUCT, *ALSO_READ)
              if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]  # fmt: skip
    assert silent == []


def test_no_module_is_named_after_nothing() -> None:
    assert [path for path in python_files(*PRODUCT, *ALSO_READ, "tests") if path.stem in SHELVES] == []


def test_no_kept_file_is_larger_than_a_mebibyte() -> None:
    assert {str(path.relative_to(ROOT)): path.stat().st_size for path in kept_files()
            if path.stat().st_size > LARGEST_FILE} == {}  # fmt: skip


def test_no_kept_file_is_a_model_or_a_data_set() -> None:
    binaries = {".pt", ".pth", ".pkl", ".pickle", ".npy", ".npz", ".safetensors", ".ckpt", ".bin", ".db", ".sqlite3"}
    assert [path for path in kept_files() if path.suffix in binaries] == []
