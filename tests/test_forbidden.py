"""Nothing that came over a network or lies on a disk becomes code: what makes code of bytes is named nowhere.

tests/test_architecture.py and ruff's S rules see such a name where it is written out. This one follows it where it is
not: through variables, getattr, __dict__ and imports by name, and into texts that are programs themselves.

    source ──names──▶ what every expression stands for ──FORBIDDEN, calls──▶ findings ──ALLOWED──▶ none
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READ = ("server", "worker", "client", "common", "lydian", "bench", "examples", "deploy")

# ---------------------------------------------------------------- the rules, as data

FORBIDDEN = {
    # What unpickles: reading a file runs what is in it.
    "pickle", "_pickle", "cPickle", "pickletools", "cloudpickle", "dill", "joblib", "shelve", "marshal",
    "torch.load", "torch.save", "torch.serialization", "torch.jit.load", "torch.hub", "torch.package",
    "numpy.core.records.load", "numpy.lib.npyio.load", "pandas.read_pickle",
    # Collectives of Python objects: they pickle on one side and unpickle on the other.
    "torch.distributed.broadcast_object_list", "torch.distributed.all_gather_object", "torch.distributed.gather_object",
    "torch.distributed.scatter_object_list", "torch.distributed.send_object_list",
    "torch.distributed.recv_object_list", "torch.distributed.rpc", "multiprocessing.connection",
    "multiprocessing.managers",
    # What makes objects of any class from a text, or a program of it.
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all",
    "yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader",
    "eval", "exec", "compile", "code.InteractiveInterpreter", "code.interact", "codeop", "runpy", "timeit.timeit",
    "types.FunctionType", "types.CodeType", "imp.load_source",
    # Shells.
    "os.system", "os.popen", "posix.system", "subprocess.getoutput", "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell", "pty.spawn",
    # Names that somebody else can take first, and archives that write where they want.
    "tempfile.mktemp", "shutil.unpack_archive",
    # TLS without a look at who is there, and hashes that two files can share.
    "ssl._create_unverified_context", "ssl.CERT_NONE", "hashlib.md5", "hashlib.sha1",
    # Parsers of XML follow entities: to files, and to a gigabyte of text.
    "xml.etree", "xml.sax", "xml.dom", "xmlrpc",
}  # fmt: skip
METHODS = {
    "exec_module": "runs a file",
    "extract": "writes where the archive says",
    "extractall": "writes where the archive says",
    "load_module": "runs a file",
    "subprocess_shell": "a shell",
}
STRONG = {"sha256", "sha512", "blake2b"}
BUILTINS = {name for name in FORBIDDEN if "." not in name and name in {"eval", "exec", "compile"}}

# (finding, file) -> why this one file may.
_SHELL = "a shell, or options that may ask for one"
ALLOWED = {
    ("exec_module", "worker/task_host.py"): "runs a task file, in the child: built in, or one that the owner trusts",
    (
        "exec_module",
        "worker/task_script.py",
    ): "runs a training script likewise, and the package that it imports, of ours",
    (
        "an import of what is only known at run time",
        "lydian/flower.py",
    ): "the two parts that an app names, in the child: of files that came in the script whose text was hashed",
    ("types.CodeType", "worker/task_host.py"): "what a loader of importlib returns: of the text that was hashed",
    (_SHELL, "worker/child.py"): "the options are the sandbox's user, groups and folder",
    (_SHELL, "worker/caging.py"): "the same",
    (_SHELL, "bench/cage.py"): "the same",
    ("ssl.CERT_NONE", "common/guarding.py"): "the certificate is compared with its pin instead, in the handshake",
    (
        "ssl.CERT_NONE",
        "server/health.py",
    ): "asks its own machine whether anybody answers, brings no token and takes only a status",
    (
        "exec_module",
        "worker/export/task_export.py",
    ): "runs a task file, after its person agreed, in a process of its own",
    ("exec_module", "bench/reference.py"): "runs a task file that the person at the keyboard named",
}


# ---------------------------------------------------------------- what an expression stands for


def text_of(node: ast.AST) -> str | None:
    """The text that an expression of literals is: 'a', 'a' + 'b', f'a', ''.join(['a', 'b'])."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return _joined([left, right])
        case ast.JoinedStr(values=values):
            return _joined(values)
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=""), attr="join"), args=[ast.List() | ast.Tuple() as a]
        ):
            return _joined(a.elts)
        case _:
            return None


def _joined(nodes: list[ast.expr]) -> str | None:
    parts = [text_of(node) for node in nodes]
    return None if None in parts else "".join(part for part in parts if part is not None)


class Names:
    """What the names of a file stand for, in any of its scopes: one that stands for two things is looked at as both."""

    def __init__(self, tree: ast.AST) -> None:
        self._known: dict[str, set[str]] = {}
        for node in ast.walk(tree):
            self._imported(node)
        for _ in range(4):  # a name of a name of a name
            for node in ast.walk(tree):
                self._assigned(node)

    def _imported(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                target = alias.name if alias.asname else alias.name.partition(".")[0]
                self._known.setdefault(alias.asname or target, set()).add(target)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                self._known.setdefault(alias.asname or alias.name, set()).add(f"{node.module}.{alias.name}")

    def _assigned(self, node: ast.AST) -> None:
        match node:
            case ast.Assign(targets=[*targets], value=value):
                pairs = [(target, value) for target in targets]
            case ast.AnnAssign(target=target, value=ast.expr() as value) | ast.NamedExpr(target=target, value=value):
                pairs = [(target, value)]
            case ast.arguments(args=args, defaults=defaults):
                pairs = [(ast.Name(a.arg), d) for a, d in zip(args[::-1], defaults[::-1], strict=False)]
            case _:
                return
        for target, value in pairs:
            if isinstance(target, ast.Name) and (meant := self.of(value) - {target.id}):
                self._known.setdefault(target.id, set()).update(meant)

    def of(self, node: ast.AST) -> set[str]:
        """The dotted names that an expression may stand for."""
        match node:
            case ast.Name(id=name):
                return self._known.get(name, {name})
            case ast.Attribute(value=owner, attr=name):
                return self._within(owner, name)
            case ast.Call(func=ast.Name(id="getattr"), args=[owner, name, *_]) if text := text_of(name):
                return self._within(owner, text)
            case ast.Subscript(
                value=ast.Attribute(value=owner, attr="__dict__") | ast.Call(func=ast.Name(id="vars"), args=[owner]),
                slice=name,
            ) if text := text_of(name):
                return self._within(owner, text)
            case ast.Subscript(value=owner, slice=name) if text := text_of(name):
                return {text} if self.of(owner) & {"sys.modules", "__builtins__"} else set()
            case ast.Call(func=called, args=[name, *_]) if text := text_of(name):
                by_name = {"importlib.import_module", "import_module", "__import__", "builtins.__import__"}
                return {text} if self.of(called) & by_name else set()
            case _:
                return set()

    def _within(self, owner: ast.expr, name: str) -> set[str]:
        return {name if module in ("builtins", "__builtins__") else f"{module}.{name}" for module in self.of(owner)}


# ---------------------------------------------------------------- findings


def _forbidden(name: str) -> bool:
    name = name.removeprefix("builtins.")
    return name in FORBIDDEN or any(name.startswith(f"{each}.") for each in FORBIDDEN if each not in BUILTINS)


def _of_call(call: ast.Call, names: Names) -> Iterator[str]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    false = {name for name, value in given.items() if isinstance(value, ast.Constant) and value.value is False}
    called = names.of(call.func)
    if "numpy.load" in called and "allow_pickle" not in false:
        yield "numpy.load without allow_pickle=False"
    if ("shell" in given and "shell" not in false) or (
        None in given and any(n.startswith("subprocess.") for n in called)
    ):
        yield "a shell, or options that may ask for one"
    if "verify" in false:
        yield "verify=False: TLS without a look at who is there"
    if "hashlib.new" in called and text_of(call.args[0] if call.args else given.get("name", call)) not in STRONG:
        yield "hashlib.new of a hash that is weak, or not known here"
    by_name = {"importlib.import_module", "__import__", "importlib.__import__", "builtins.__import__"}
    if called & by_name and (not call.args or text_of(call.args[0]) is None):
        yield "an import of what is only known at run time"


def _program(text: str) -> ast.AST | None:
    """The program that a text is: one that imports something."""
    if "import" not in text:
        return None
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    return tree if any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree)) else None


def findings(source: str | ast.AST) -> Iterator[str]:
    """What in a Python file is forbidden."""
    tree = ast.parse(source) if isinstance(source, str) else source
    names = Names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _forbidden(alias.name))
        if isinstance(node, ast.ImportFrom) and node.module:
            brought = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in (node.module, *brought) if _forbidden(name))
            yield from (f"* of {node.module}" for alias in node.names if alias.name == "*")
        if isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.Subscript) and not _is_stored(node):
            yield from (name for name in names.of(node) if _forbidden(name))
        if isinstance(node, ast.Attribute) and node.attr in METHODS:
            yield node.attr
        if isinstance(node, ast.Call):
            yield from _of_call(node, names)
        if (text := text_of(node)) is not None and (program := _program(text)) is not None:
            yield from (f"in a text: {found}" for found in findings(program))


def _is_stored(node: ast.AST) -> bool:
    return isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)


# ---------------------------------------------------------------- the rules see what they should see


CAUGHT = [
    *(f"import {name}" for name in sorted(FORBIDDEN) if "." not in name and name not in BUILTINS),
    *(f"import {name.partition('.')[0]}\n{name}('x')" for name in sorted(FORBIDDEN) if "." in name),
    *(f"{name}('1')" for name in sorted(BUILTINS)),
    "from pickle import loads",
    "import numpy.lib, pickle as quick",
    "def late():\n    from joblib import load",
    "import torch\nread = torch\nread.load('x')",
    "import torch\na = torch\nb = a\nc = b.load\nc('x')",
    "import torch\ngetattr(torch, 'load')('x')",
    "import torch\ngetattr(torch, 'lo' + 'ad')('x')",
    "import torch\ngetattr(torch, ''.join(['lo', 'ad']))('x')",
    "import torch\ntorch.__dict__['load']('x')",
    "import torch\nvars(torch)['load']('x')",
    "import torch\ndef read(path, load=torch.load): ...",
    "import torch\nif (t := torch): t.load('x')",
    "import torch.serialization as s\ns.load('x')",
    "from torch import *",
    "import torch.distributed as dist\ndist.all_gather_object(out, 1)",
    "import importlib\nimportlib.import_module('pickle').loads(b'')",
    "import importlib\nimportlib.import_module('pic' + 'kle')",
    "__import__('mar' 'shal')",
    "import importlib\nimportlib.import_module(name)",
    "import sys\nsys.modules['pickle'].loads(b'')",
    "import builtins\nbuiltins.eval('1')",
    "getattr(__builtins__, 'exec')('1')",
    "__builtins__['eval']('1')",
    "run = eval\nrun('1')",
    "compile(text, 'x', 'exec')",
    "import numpy as np\nnp.load('x')",
    "import numpy as np\nread = np.load\nread('x', allow_pickle=True)",
    "from numpy import load\nload('x')",
    "import subprocess as s\ns.run('ls', shell=True)",
    "import subprocess\nsubprocess.Popen('ls', shell=maybe)",
    "import subprocess\nsubprocess.run('ls', **options)",
    "import asyncio\nasyncio.create_subprocess_shell('ls')",
    "loop.subprocess_shell(p, 'ls')",
    "from os import system as run\nrun('ls')",
    "from tempfile import mktemp",
    "import tarfile\ntarfile.open('x').extractall()",
    "import zipfile\nzipfile.ZipFile('x').extract('y')",
    "import httpx2\nhttpx2.Client(verify=False)",
    "import ssl\ncontext.verify_mode = ssl.CERT_NONE",
    "import hashlib\nhashlib.new('md5')",
    "import hashlib\nhashlib.new(name)",
    "import hashlib as h\nweak = h.sha1\nweak(b'')",
    "from xml.etree import ElementTree",
    "spec.loader.exec_module(module)",
    "command = [python, '-c', 'import pickle; pickle.load(open(0))']",
    "program = 'import torch\\n' + 'torch.load(1)'",
]
INNOCENT = [
    "import re\nre.compile('x')",
    "import torch\ntorch.compile(model)",
    "model.eval()",
    "import numpy as np\nnp.load('x', allow_pickle=False)",
    "import numpy as np\nread = np.load\nread('x', allow_pickle=False)",
    "import json\nload = json.load\nload(open('x'))",
    "import subprocess\nsubprocess.run(['ls'], shell=False)",
    "import subprocess\nsubprocess.run(['ls'], check=True)",
    "import importlib\nimportlib.import_module('pynvml')",
    "import os\nos.execv('x', [])",
    "import tempfile\ntempfile.mkdtemp()",
    "import torch\ngetattr(torch, kind)",
    "'a text that says import pickle, or torch.load(), and is no program'",
    "code = 2\ncode + 1",
    "def load(path): ...\nload('x')",
    "from yaml import safe_load",
    "import hashlib\nhashlib.new('sha256')\nhashlib.sha256(b'')",
    "import httpx2\nhttpx2.Client(verify=context)",
]


@pytest.mark.parametrize("source", CAUGHT)
def test_what_makes_code_of_bytes_is_seen_however_it_is_spelt(source: str) -> None:
    assert list(findings(source)) != []


@pytest.mark.parametrize("source", INNOCENT)
def test_what_only_looks_like_it_is_left_alone(source: str) -> None:
    assert list(findings(source)) == []


# ---------------------------------------------------------------- the code keeps the rules


FILES = sorted(path for folder in READ for path in (ROOT / folder).rglob("*.py"))


def test_no_file_names_what_makes_code_of_bytes() -> None:
    assert len(FILES) > 200
    broken = {
        (found, path.relative_to(ROOT).as_posix())
        for path in FILES
        for found in findings(path.read_text(encoding="utf-8"))
    }
    assert broken - ALLOWED.keys() == set()
    assert ALLOWED.keys() - broken == set(), "an exception that is needed no more"
