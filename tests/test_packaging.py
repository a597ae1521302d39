"""What is installed where: the requirement sets, the entry points, and the scripts that install them."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import common

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRA_OF = {
    "requirements_server.txt": "server",
    "requirements_new_gpu.txt": "new-gpu",
    "requirements_legacy_gpu.txt": "legacy-gpu",
}
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")  # extras of `lydian track`
NOT_HERE = {"mlflow": "mlflow-skinny", "trackio": "trackio", "wandb": "wandb"}  # too large to be installed for tests
LEGACY_PINS = {"torch": "==2.7.1", "torchvision": "==0.22.1"}
PART_OF = {"pydantic_core": "pydantic"}  # documented as part of it, and released in step with it
TORCH_FAMILY = {"torch", "torchvision", "scikit-learn", "triton", "nvidia-ml-py"}


def parsed(lines: list[str]) -> list[Requirement]:
    return [Requirement(line) for line in lines]


def listed(file_name: str) -> list[Requirement]:
    """The requirements of a file, without comments."""
    lines = (ROOT / file_name).read_text(encoding="utf-8").splitlines()
    return parsed([bare for line in lines if (bare := line.partition("#")[0].strip())])


def extra(name: str) -> list[Requirement]:
    return parsed(PROJECT["optional-dependencies"][name])


EVERY = parsed(PROJECT["dependencies"]) + [r for name in PROJECT["optional-dependencies"] for r in extra(name)]


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def installed_closure(requirements: list[Requirement]) -> set[str]:
    """The names of everything that comes with these requirements, as the installed packages declare it."""
    found: set[tuple[str, str]] = set()  # (name, extra); a plain dependency has the extra ""
    open_ends = [(canonicalize_name(r.name), wanted) for r in requirements for wanted in ("", *r.extras)]
    while open_ends:
        name, wanted = open_ends.pop()
        if (name, wanted) in found:
            continue
        found.add((name, wanted))
        try:
            needs = parsed(requires(name) or [])
        except PackageNotFoundError:  # needed on another platform or Python only
            continue
        for need in needs:
            if need.marker is None or need.marker.evaluate({"extra": wanted}):
                open_ends += [(canonicalize_name(need.name), further) for further in ("", *need.extras)]
    return {name for name, _ in found}


# ---------------------------------------------------------------- the requirement files


@pytest.mark.parametrize("file_name", EXTRA_OF)
def test_a_requirements_file_lists_the_base_and_its_extra_and_nothing_else(file_name: str) -> None:
    wanted = parsed(PROJECT["dependencies"]) + extra(EXTRA_OF[file_name])
    assert {str(r) for r in listed(file_name)} == {str(r) for r in wanted}


@pytest.mark.parametrize("file_name", EXTRA_OF)
def test_a_requirements_file_names_no_package_twice(file_name: str) -> None:
    assert len(names(listed(file_name))) == len(listed(file_name))


def test_nothing_that_the_coordinator_needs_brings_torch() -> None:
    closure = installed_closure(listed("requirements_server.txt"))
    assert {"fastapi", "starlette", "uvloop", "pydantic-core"} <= closure  # the walk really went down
    assert not closure & TORCH_FAMILY


def test_every_version_is_a_floor_but_the_legacy_torch() -> None:
    exact = {r.name: str(r.specifier) for r in EVERY if {s.operator for s in r.specifier} - {">=", "<"}}
    floorless = [str(r) for r in EVERY if r.name not in exact and ">=" not in {s.operator for s in r.specifier}]
    assert exact == LEGACY_PINS
    assert floorless == []


def test_only_the_next_major_torch_is_shut_out() -> None:
    assert {(r.name, s.version) for r in EVERY for s in r.specifier if s.operator == "<"} == {("torch", "3")}


def test_the_two_worker_sets_differ_in_torch_alone() -> None:
    new, legacy = ({str(r) for r in extra(name)} for name in ("new-gpu", "legacy-gpu"))
    assert names(parsed(sorted(new ^ legacy))) == set(LEGACY_PINS)


# ---------------------------------------------------------------- what the code imports


def imported(folder: Path) -> set[tuple[str, str]]:
    """(top-level package, the file that imports it) for every import in the folder, late ones included."""
    found: set[tuple[str, str]] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            found |= {(module.partition(".")[0], path.relative_to(ROOT).as_posix()) for module in modules}
    return found


@pytest.mark.parametrize(
    ("package", "extras"),
    [
        ("client", ("plot", "secure", *TRACKERS)),
        ("server", ("server", "privacy")),
        ("worker", ("new-gpu", "privacy-worker")),
        ("common", ("secure",)),
    ],
)
def test_a_package_imports_only_what_its_requirements_bring(package: str, extras: tuple[str, ...]) -> None:
    base = names(parsed(PROJECT["dependencies"]) + [r for name in extras for r in extra(name)])
    for_tasks = base | names(extra("new-gpu"))  # task files are run by the child that trains, never imported by us
    known = sys.stdlib_module_names | set(PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    brings = packages_distributions()
    for module, where in sorted(imported(ROOT / package)):
        allowed = for_tasks if where.startswith("common/tasks/") else base
        found = brings.get(PART_OF.get(module, module), [NOT_HERE.get(module, "")])
        providers = {canonicalize_name(name) for name in found}
        assert module in known or providers & allowed, f"{where} imports {module}: no requirement of {package} has it"


# ---------------------------------------------------------------- the package


@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_an_entry_point_leads_to_a_function(command: str) -> None:
    module, _, function = PROJECT["scripts"][command].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_version_and_changelog_agree() -> None:
    assert PROJECT["version"] == common.__version__
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] in {"Unreleased", common.__version__}
    assert common.__version__ in headings


def test_the_package_cannot_be_uploaded_by_mistake() -> None:
    assert "Private :: Do Not Upload" in PROJECT["classifiers"]


# ---------------------------------------------------------------- the scripts that install


def environment_script(tmp_path: Path, *, torch: str = "new", python: str) -> subprocess.CompletedProcess[str]:
    """Run deploy/environment.sh with this interpreter, on a folder that does not exist yet."""
    command = ["sh", str(ROOT / "deploy/environment.sh"), str(tmp_path / "venv"), torch]
    environment = os.environ | {"PYTHON": python}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)


def interpreter_that_says(answer: str, folder: Path) -> str:
    """A program that answers the question about its fitness as some other Python would."""
    program = folder / "other python"
    program.write_text(f"#!/bin/sh\necho '{answer}'\n", encoding="utf-8")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("answer", "torch", "said"),
    [
        ("old 3.9", "new", ("Python 3.9", "3.11 or newer", "apt install python3 python3-venv")),
        ("bare 3.12", "new", ("Python 3.12", "without its venv module", "apt install python3.12-venv")),
        ("late 3.14", "legacy", ("Python 3.14", "up to 3.13", "PYTHON=python3.13")),
    ],
)
def test_an_unfit_python_is_one_sentence_and_no_folder(
    answer: str, torch: str, said: tuple[str, ...], tmp_path: Path
) -> None:
    ended = environment_script(tmp_path, torch=torch, python=interpreter_that_says(answer, tmp_path))
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert all(words in ended.stderr for words in said)
    assert not (tmp_path / "venv").exists()


def test_a_python_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    ended = environment_script(tmp_path, python="/nowhere/python3")
    assert ended.returncode == 1
    assert ended.stderr.startswith("There is no working /nowhere/python3, and Python 3.11 or newer is needed")
    assert len(ended.stderr.splitlines()) == 1


def test_the_interpreter_of_these_tests_would_be_taken(tmp_path: Path) -> None:
    """The question itself, asked of a real Python: a verdict that is never `fit` would lock everybody out."""
    script = (ROOT / "deploy/environment.sh").read_text(encoding="utf-8")
    question = re.search(r"\"\$1\" -c '\n(.*?)' \"\$torch\"", script, re.DOTALL)
    assert question is not None
    answer = subprocess.run(
        [sys.executable, "-c", question[1], "new"], capture_output=True, text=True, check=True, timeout=60
    )
    assert answer.stdout == f"fit {sys.version_info.major}.{sys.version_info.minor}\n"


def test_an_unknown_torch_is_one_sentence(tmp_path: Path) -> None:
    ended = environment_script(tmp_path, torch="newest", python=sys.executable)
    assert ended.returncode == 1
    assert ended.stderr.startswith("TORCH=newest is not known: new ")


@pytest.mark.parametrize(("shell", "script"), [("sh", "deploy/environment.sh"), ("bash", ".ci/run")])
def test_a_shell_script_parses(shell: str, script: str) -> None:
    ended = subprocess.run([shell, "-n", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_make_alone_lists_every_target() -> None:
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    promised = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert promised is not None
    assert re.findall(r"make (\S+)", shown) == promised[1].split()


def test_the_modules_that_must_be_covered_exist() -> None:
    """`coverage report --include` passes over a file that is not there, so a renamed module would go unwatched."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    modules = " ".join(re.findall(r"^PURE \+?:?= ?(.*)$", makefile, re.MULTILINE)).split()
    assert len(modules) >= 7
    assert [module for module in modules if not (ROOT / module).is_file()] == []


# ---------------------------------------------------------------- data from Debian packages


@pytest.mark.parametrize(
    ("in_ci", "outcome", "said"),
    [
        ("", pytest.skip.Exception, "apt install dataset-of-nothing"),
        ("true", pytest.fail.Exception, r"\.ci/run must install dataset-of-nothing"),
    ],
)
def test_missing_data_is_a_skip_here_and_a_failure_in_ci(
    in_ci: str,
    outcome: type[BaseException],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    needs_debian_package: Callable[[str | Path, str], Path],
) -> None:
    monkeypatch.setenv("CI", in_ci)
    with pytest.raises(outcome, match=said):
        needs_debian_package(tmp_path / "none", "dataset-of-nothing")


def test_data_that_is_there_is_given(tmp_path: Path, needs_debian_package: Callable[[str | Path, str], Path]) -> None:
    assert needs_debian_package(str(tmp_path), "dataset-of-nothing") == tmp_path
