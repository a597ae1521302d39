"""`make sbom` lists what is installed: every package that we ask for, with its version and its licence."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name

from tests.test_floors import asked_for

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_LICENCE = {"atheris"}  # whose metadata do not say it


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    target = tmp_path_factory.mktemp("sbom") / "sbom.json"
    subprocess.run([sys.executable, "deploy/sbom.py", str(target)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return dict(json.loads(target.read_text()))


def test_it_lists_each_direct_dependency_with_version_and_licence(document: dict[str, Any]) -> None:
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    listed = {part["name"]: part for part in document["components"]}
    for name in {canonicalize_name(requirement.name) for _, requirement in asked_for()}:
        try:
            installed = version(name)
        except PackageNotFoundError:  # another extra's, or another machine's
            continue
        assert listed[name]["version"] == installed
        assert listed[name]["purl"] == f"pkg:pypi/{name}@{installed}"
        assert listed[name].get("licenses") or name in WITHOUT_LICENCE, name
    assert {"fastapi", "pydantic", "torch", "numpy"} <= listed.keys()


def test_it_says_which_package_needs_which(document: dict[str, Any]) -> None:
    needs = {each["ref"].partition("@")[0]: each.get("dependsOn", []) for each in document["dependencies"]}
    assert document["metadata"]["component"]["name"] == "lydian-training"
    assert any(ref.startswith("pkg:pypi/pydantic@") for ref in needs["pkg:pypi/lydian-training"])
    assert any(ref.startswith("pkg:pypi/starlette@") for ref in needs["pkg:pypi/fastapi"])


def test_it_has_no_moment_in_it_so_that_two_can_be_compared(document: dict[str, Any]) -> None:
    assert "timestamp" not in document["metadata"]
    assert document["serialNumber"].startswith("urn:uuid:")
