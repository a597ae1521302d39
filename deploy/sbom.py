"""What is installed in this environment, as CycloneDX JSON: `make sbom`, or `python deploy/sbom.py FILE`.

    importlib.metadata ──every distribution, its licence, what it needs──▶ CycloneDX 1.6

For whoever must answer "is package X of version Y in there?" or feed a scanner that has a database of advisories. It
says what is there, and nothing about holes. The same environment gives the same bytes: no time, and a serial number
made from the contents.
"""

import sys
import uuid
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageMetadata, distributions
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.dependency import Dependency
from cyclonedx.model.license import License
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PRODUCT = "lydian-training"
UNKNOWN = ("", "UNKNOWN")
LONGEST = 100  # characters; beyond, the field holds the licence's text and not its name
_CLASSIFIER = "License :: "


def licence_of(metadata: PackageMetadata) -> str:
    """The licence by which a package goes, as it says itself; empty where it does not say."""
    for field in ("License-Expression", "License"):
        said = str(metadata.get(field) or "").strip()
        if said not in UNKNOWN and "\n" not in said and len(said) <= LONGEST:
            return said
    classified = [str(line) for line in metadata.get_all("Classifier") or () if str(line).startswith(_CLASSIFIER)]
    return " AND ".join(sorted({line.rpartition(" :: ")[2] for line in classified}))


def needs_of(distribution: Distribution) -> Iterator[str]:
    """Names of what a package asks for on this machine, extras left out: who asked for an extra is not recorded."""
    for line in distribution.requires or ():
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            yield canonicalize_name(needed.name)


def inventory(found: dict[str, Distribution]) -> Bom:
    """The document of these packages, by canonical name."""
    parts = {name: _component(name, distribution) for name, distribution in sorted(found.items())}
    bom = Bom(components=[part for name, part in parts.items() if name != PRODUCT])
    for name, part in parts.items():
        needed = sorted({need for need in needs_of(found[name]) if need in parts and need != name})
        bom.dependencies.add(Dependency(part.bom_ref, [Dependency(parts[need].bom_ref) for need in needed]))
    bom.metadata.component = parts.get(PRODUCT)
    bom.metadata.timestamp = None  # type: ignore[assignment] # the document is of what is there, not of a moment
    listed = "\n".join(f"{name}=={distribution.version}" for name, distribution in sorted(found.items()))
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, listed)
    return bom


def _component(name: str, distribution: Distribution) -> Component:
    purl = PackageURL("pypi", name=name, version=distribution.version)
    said = licence_of(distribution.metadata)
    return Component(
        name=name,
        version=distribution.version,
        type=ComponentType.APPLICATION if name == PRODUCT else ComponentType.LIBRARY,
        purl=purl,
        bom_ref=purl.to_string(),
        licenses=[_licence(said)] if said else [],
    )


def _licence(said: str) -> License:
    made = LicenseFactory().make_from_string(said)
    return made if isinstance(made, License) else License(name=said)  # one form for all: an expression stands alone


def main() -> int:
    """Write the document of this environment."""
    if len(sys.argv) != 2:
        print("usage: python deploy/sbom.py FILE", file=sys.stderr)
        return 2
    found = {canonicalize_name(each.metadata["Name"]): each for each in distributions() if each.metadata["Name"]}
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(JsonV1Dot6(inventory(found)).output_as_string(indent=2) + "\n", encoding="utf-8")
    print(f"{target}: {len(found)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
