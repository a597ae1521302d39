"""No release with a known hole: what pyproject.toml allows, and what is installed here, is at least what was mended.

Without a network: a scanner that cannot ask its database says that all is well. Each floor is the first release
without the holes that its line names; a new advisory is a new line.
"""

import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@dataclass(frozen=True)
class Floor:
    """The oldest release of a package that is good enough, and why."""

    package: str
    least: str
    why: str
    asked: bool = True  # whether pyproject.toml must say so itself; else what is installed must be at least that


FLOORS = (
    Floor("starlette", "1.6", "CVE-2025-62727 (Range), CVE-2026-48710 (Host), CVE-2026-54283; bodies with a limit"),
    Floor("torch", "2.6", "CVE-2025-32434: code from a file with weights_only=True; nothing here calls torch.load"),
    Floor("h11", "0.16", "CVE-2025-43859: smuggled requests", asked=False),
    Floor("cryptography", "42", "CVE-2023-50782: what RSA padding gives away"),
    Floor("pydantic", "2.9", "CVE-2024-3772 (a slow pattern) was mended in 2.4"),
)
# What the coordinator does without: parsers of what a network sends, each with the holes that it had.
UNWANTED = {
    "python-multipart": "CVE-2024-53981, CVE-2026-40347: we read no forms",
    "cloudpickle": "unpickles",
    "dill": "unpickles",
}
LEGACY = "legacy-gpu"  # the last torch for old GPUs, by a pin that cannot be mended; it is safe as no .pt file is read


def asked_for() -> list[tuple[str, Requirement]]:
    """(extra, requirement) of everything that pyproject.toml asks for; the base has the extra ""."""
    extras = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    return [(extra, Requirement(line)) for extra, lines in extras.items() for line in lines]


def least_of(requirement: Requirement) -> Version:
    """The oldest release that a requirement lets in."""
    found = [Version(each.version) for each in requirement.specifier if each.operator in (">=", "==", "~=")]
    return max(found, default=Version("0"))


def brought_by(*extras: str) -> set[str]:
    """Everything that these extras bring, as what is installed declares it."""
    known: set[str] = set()
    ends = [(requirement.name, requirement.extras) for extra, requirement in asked_for() if extra in extras]
    while ends:
        name, wanted = ends.pop()
        if (name := canonicalize_name(name)) in known:
            continue
        known.add(name)
        try:
            needs = [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:  # needed elsewhere only
            continue
        ends += [
            (need.name, need.extras)
            for need in needs
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *wanted))
        ]
    return known


@pytest.mark.parametrize("floor", FLOORS, ids=lambda floor: floor.package)
def test_what_is_installed_is_no_older_than_its_floor(floor: Floor) -> None:
    try:
        found = Version(version(floor.package))
    except PackageNotFoundError:
        pytest.skip(f"{floor.package} is not installed here")
    assert found >= Version(floor.least), f"{floor.package} {found}: {floor.why}"


@pytest.mark.parametrize("floor", [floor for floor in FLOORS if floor.asked], ids=lambda floor: floor.package)
def test_pyproject_lets_in_nothing_older_than_a_floor(floor: Floor) -> None:
    found = {extra: least_of(r) for extra, r in asked_for() if canonicalize_name(r.name) == floor.package}
    assert found, f"{floor.package} is asked for nowhere: is its floor still needed?"
    assert {extra: least for extra, least in found.items() if least < Version(floor.least)} == {}, floor.why


def test_the_pin_of_old_gpus_is_the_only_torch_that_cannot_be_mended() -> None:
    found = {extra: r for extra, r in asked_for() if r.name == "torch"}
    assert str(found.pop(LEGACY).specifier) == "==2.7.1"
    # CVE-2026-24747, in 2.9.1 and before, is code from a .pt file too: where a torch can be mended, it is.
    assert all(least_of(requirement) >= Version("2.10") for requirement in found.values())
    assert found


@pytest.mark.parametrize("name", UNWANTED)
def test_what_we_do_without_is_brought_by_nothing(name: str) -> None:
    assert name not in brought_by("", "server", "secure"), UNWANTED[name]
    assert name not in {canonicalize_name(requirement.name) for _, requirement in asked_for()}


def test_a_floor_that_is_too_low_is_seen() -> None:
    assert least_of(Requirement("starlette>=0.48,<2")) < Version("1.6")
    assert least_of(Requirement("torch==2.7.1")) == Version("2.7.1")
    assert least_of(Requirement("numpy<3")) == Version("0")
