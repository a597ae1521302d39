"""Which pages there are, in four parts and in the order in which they are read. A new page is added here.

tests/test_site.py holds it to the Markdown that the repository has: each page once, none left out.
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = "docs/index.md"


@dataclass(frozen=True)
class Part:
    """A part of the navigation."""

    title: str
    about: str  # what one comes here for
    pages: tuple[str, ...]  # Markdown files, from the repository's root


PARTS = (
    Part("Tutorial", "learn by doing", ("README.md", "docs/tutorial.md")),
    Part(
        "How-to",
        "get one thing done",
        (
            "docs/task-files.md",
            "docs/scripts.md",
            "docs/flower.md",
            "docs/beginning.md",
            "docs/migration.md",
            "docs/partitions.md",
            "docs/evaluation.md",
            "docs/simulation.md",
            "docs/tailscale.md",
            "deploy/README.md",
            "docs/legacy-gpus.md",
            "docs/many-gpus.md",
            "docs/polite-workers.md",
            "docs/dashboard.md",
            "docs/terminal.md",
            "docs/monitoring.md",
            "docs/security.md",
            "docs/audit.md",
            "docs/secure-aggregation.md",
            "docs/privacy.md",
            "examples/experiments/README.md",
            "CONTRIBUTING.md",
        ),
    ),
    Part(
        "Reference",
        "look something up",
        (
            "docs/reference/cli.md",
            "docs/reference/job.md",
            "docs/reference/errors.md",
            "docs/reference/metrics.md",
            "docs/reference/api.md",
            "docs/protocol.md",
            "docs/algorithms.md",
            "CHANGELOG.md",
        ),
    ),
    Part(
        "Explanation",
        "understand why it is so",
        (
            "docs/architecture.md",
            "docs/unequal.md",
            "docs/reliability.md",
            "SECURITY.md",
            "docs/performance.md",
            "docs/log.md",
            "docs/decisions.md",
        ),
    ),
)

NO_PAGES = frozenset({"docs/performance.notes.md", "server/pages/static/vendor/VENDORED.md", "tests/axe/VENDORED.md"})
"""Markdown that is no page: a part of another one, and notes beside files of others."""


def pages(root: Path = ROOT) -> list[str]:
    """Every page that is there, HOME first, in reading order."""
    return [HOME, *(page for part in PARTS for page in part.pages if (root / page).is_file())]
