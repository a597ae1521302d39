"""bandit over what we ship, as `make check` runs it: `python -m tests.scan`. Every finding has a reason, or fails.

    bandit ──findings──▶ `# noqa: S101 - why` on its line (ruff's name of B101) ──▶ excused
                    └──▶ EXCUSED, by rule and file                              ──▶ excused; needed no more: fails

ruff has most of bandit's rules under other names; a line that says why once need not say it twice. What ruff leaves out
for good (pyproject.toml: S603 and the like) is here file by file, so that a new process or a new random number is
looked at. Rules of our own are in tests/test_forbidden.py.
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("server", "worker", "client", "common", "lydian")

_COMMAND = "a list that we wrote, and no shell"
_STARTS = {
    "client/chaos/clocks.py": "faketime, found on this machine",
    "client/chaos/disk.py": "mount and mkfs, for a disk that is to break",
    "client/doctor/asking.py": "what a machine is asked: nvidia-smi and the like",
    "client/exporting.py": "python -m worker.export",
    "client/partition/command.py": "python -m worker.describe",
    "client/running.py": "our own interpreter",
    "client/service/install.py": "systemctl, useradd",
    "client/service/manager.py": "systemctl, journalctl",
    "worker/caging.py": "our own interpreter in the sandbox, to see whether that works here",
    "worker/export/__main__.py": "a process of its own for the task file that the person at the keyboard agreed to",
    "worker/child.py": "the child that trains: our own interpreter and worker/task_host.py",
}
EXCUSED: dict[tuple[str, str], str] = {
    **{("B404", file): f"starts {what}" for file, what in _STARTS.items()},
    **{("B603", file): f"{_COMMAND}: {what}" for file, what in _STARTS.items()},
    ("B607", "client/service/manager.py"): "systemctl is where PATH says, as for the person who runs the command",
    ("B106", "server/certificates.py"): "an encrypted key is refused instead of asked for on the terminal",
    ("B311", "client/chaos/schedule.py"): "which fault comes when: a seed, no secret",
    ("B311", "worker/agent.py"): "jitter of a wait, no secret",
    ("B311", "worker/simulation/process.py"): "jitter of a wait, no secret",
}  # fmt: skip
_NOQA = re.compile(r"# noqa: ([A-Z0-9, ]+?)(?: - (.+))?$")


@dataclass(frozen=True)
class Finding:
    """One of bandit's."""

    rule: str  # B101
    file: str  # from the root on
    line: int
    said: str
    code: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule} {self.said} | {self.code.strip()[:100]}"

    @property
    def explained(self) -> bool:
        """Whether its line says why, under ruff's name of the rule."""
        found = _NOQA.search(self.code)
        return found is not None and f"S{self.rule[1:]}" in found[1] and found[2] is not None


def scan(paths: Iterable[Path], root: Path = ROOT) -> list[Finding]:
    """What bandit finds in these files and folders. No `# nosec` counts: a reason has one form here."""
    from bandit.core.config import BanditConfig
    from bandit.core.manager import BanditManager

    manager = BanditManager(BanditConfig(), "file", ignore_nosec=True, quiet=True)
    manager.discover_files([str(path) for path in paths], recursive=True)
    manager.run_tests()
    if manager.skipped:
        raise SystemExit(f"bandit could not read {manager.skipped}")
    found = set()
    for issue in manager.results:
        path = Path(issue.fname).resolve()
        lines = path.read_text(encoding="utf-8").splitlines()
        spoken = next((lines[n - 1] for n in issue.linerange if "# noqa" in lines[n - 1]), lines[issue.lineno - 1])
        found.add(Finding(issue.test_id, path.relative_to(root).as_posix(), issue.lineno, issue.text, spoken))
    return sorted(found, key=str)


def judged(findings: Iterable[Finding]) -> list[str]:
    """What is wrong: findings without a reason, and reasons without a finding."""
    wrong, used = list[str](), set[tuple[str, str]]()
    for finding in findings:
        if finding.explained:
            continue
        if (finding.rule, finding.file) in EXCUSED:
            used.add((finding.rule, finding.file))
        else:
            wrong.append(str(finding))
    return wrong + [f"{rule} in {file} is excused, and is not there" for rule, file in sorted(EXCUSED.keys() - used)]


def main() -> int:
    wrong = judged(scan(ROOT / package for package in PACKAGES))
    for line in wrong:
        print(line)
    if wrong:
        print("Mend it, or say why not: `# noqa: S… - why` on the line where ruff knows the rule, else tests/scan.py.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
