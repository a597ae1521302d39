"""All scenarios, and one run of them: the limits first, then each scenario beside them, as one document.

{machine, limits, command, date, seed, sections: [{name, set, seconds, rows, skipped}], growth: […]}
"""

import importlib.metadata
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from bench import averaging, encrypted, growth, limits, many, rounds, training, transfers
from bench.scenario import Say, Scenario, Size, Wish

SCENARIOS: dict[str, Scenario] = {
    module.SCENARIO.name: module.SCENARIO for module in (rounds, many, averaging, transfers, encrypted, training)
}
ROOT = Path(__file__).resolve().parent.parent

Document = dict[str, Any]  # what JSON holds


def run(names: Sequence[str], wish: Wish, *, command: str, settings: str, say: Say) -> Document:
    """Measure the limits and the scenarios.

    Args:
        names: of the scenarios, in any order.
        wish: what is wanted of each.
        command: the command line, for the record.
        settings: the job's overrides as they were typed.
        say: told what is being measured.
    """
    document: Document = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "size": wish.size.value,
        "seed": wish.seed,
        "machine": machine(),
    }
    say("limits of this machine")
    found = limits.measure(40 if wish.size is Size.TINY else 400)
    sections: list[Document] = []
    for scenario in (scenario for name, scenario in SCENARIOS.items() if name in names):
        began = time.monotonic()
        outcome = scenario.measure(wish, found, _named(scenario.name, say))
        section = {
            "name": scenario.name,
            "set": settings if scenario.takes_overrides else "",
            "seconds": round(time.monotonic() - began, 1),
            "rows": list(outcome.rows),
            "skipped": list(outcome.skipped),
        }
        sections.append(section)
    fitted = growth.fits({section["name"]: section["rows"] for section in sections})
    return document | {"limits": asdict(found), "sections": sections, "growth": list(fitted)}


def _named(name: str, say: Say) -> Say:
    return lambda what: say(f"{name}: {what}")


def machine() -> dict[str, str]:
    """What the figures depend on: no name of a host, no path."""
    return {
        "processor": f"{processor()}, {platform.machine()}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "disk": f"{file_system()} under the folder for temporary files",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {version}" for name in ("numpy", "torch") if (version := _version(name))),
        "commit": commit(),
        "load": f"{os.getloadavg()[0]:.2f} before the run",
    }


def processor() -> str:
    """The processor's name, as Linux knows it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "processor not known"


def file_system() -> str:
    """The file system that temporary files lie on."""
    folder = Path(tempfile.gettempdir()).resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[at] for at in (folder, *folder.parents) if at in mounts), "an unknown file system")


def commit() -> str:
    """The commit that is measured, with a + where files differ from it."""
    with suppress(OSError, subprocess.CalledProcessError):
        said = [
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno", "--", "*.py"])
        ]
        return said[0] + ("+" if said[1] else "")
    return "unknown"


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
