"""What a check found: ok, warning or failure, one sentence, the one thing to do. Pure."""

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from typing import Literal

from client import shown
from common.fitness import Fit, Verdict
from common.messages import Message

Side = Literal["machine", "training", "coordinator", "tailnet"]

TITLES: dict[Side, str] = {
    "machine": "this machine",
    "training": "training here",
    "coordinator": "the coordinator",
    "tailnet": "the tailnet",
}
COLOURS = {"ok": "green", "warning": "yellow", "failure": "red"}


class Finding(Message):
    """One line of the doctor's."""

    side: Side
    check: str
    verdict: Verdict
    sentence: str
    fix: str = ""

    @property
    def words(self) -> str:
        """Sentence and fix."""
        return f"{self.sentence}: {self.fix}" if self.fix else self.sentence


def of_fit(side: Side, check: str, fit: Fit) -> Finding:
    """What common.fitness says, as a finding."""
    return Finding(side=side, check=check, verdict=fit.verdict, sentence=fit.sentence, fix=fit.fix)


def exit_code(findings: Collection[Finding]) -> int:
    """1 where anything failed; warnings are allowed."""
    return int(any(finding.verdict == "failure" for finding in findings))


def blocks(findings: Sequence[Finding]) -> list[tuple[str, list[Finding]]]:
    """The findings by side, in the order of the sides and, within one, of the checks; each with its title."""
    order = list(TITLES)
    ordered = sorted(findings, key=lambda finding: order.index(finding.side))
    return [(TITLES[side], list(group)) for side, group in groupby(ordered, key=lambda finding: finding.side)]


def lines(findings: Sequence[Finding], paint: Callable[[str, Verdict], str] = lambda text, _: text) -> Iterator[str]:
    """What is printed: one line a finding, below the title of its side.

    Args:
        findings: in any order.
        paint: gives a verdict its colour.
    """
    width = max((len(finding.check) for finding in findings), default=0)
    for title, group in blocks(findings):
        yield title
        for finding in group:
            verdict = paint(f"{finding.verdict:7}", finding.verdict)
            yield f"  {verdict}  {finding.check:{width}}  {shown.one_line(finding.words)}"


def summary(findings: Collection[Finding]) -> str:
    """How many failures and warnings there are."""
    failures = sum(finding.verdict == "failure" for finding in findings)
    warnings = sum(finding.verdict == "warning" for finding in findings)
    if not failures + warnings:
        return "all is well"
    many = [f"{n} {what}{'' if n == 1 else 's'}" for n, what in ((failures, "failure"), (warnings, "warning")) if n]
    return ", ".join(many)
