"""Measure what training costs on this machine, beside what the machine can do at best, in one run.

Tables on stdout, progress on stderr. The longest takes some twenty minutes; --quick takes three.
"""

import argparse
import json
import shlex
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import ValidationError

from bench import plots, report, rounds
from bench.scenario import Size, Spec, Wish, read_overrides
from bench.suite import SCENARIOS, Document, run
from common.errors import LydianError
from common.messages import JobSpec

OVERRIDABLE = [name for name, scenario in SCENARIOS.items() if scenario.takes_overrides]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="lydian bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    size = made.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const=Size.QUICK, default=Size.FULL,
                      help="leave out the large models and fleets")
    size.add_argument("--tiny", dest="size", action="store_const", const=Size.TINY,
                      help="that everything works; the figures say nothing")
    made.add_argument("--only", nargs="+", action="extend", choices=list(SCENARIOS), metavar="NAME",
                      help=f"only these: {', '.join(SCENARIOS)}")
    made.add_argument("--json", action="store_true", help="print JSON")
    made.add_argument("--markdown", type=Path, metavar="FILE",
                      help="also write a page, with plots under images/; sections not measured now are kept")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
                      help="a key of the job, e.g. round.fsync=true; without --only, measures the scenarios that have "
                           f"such a job ({', '.join(OVERRIDABLE)}); may be repeated")
    made.add_argument("--rounds", type=_positive, metavar="N", help="rounds measured in each case")
    made.add_argument("--size", type=_case, action="append", dest="cases", metavar="MBxWORKERS",
                      help="a case of `rounds`, instead of its own; may be repeated")
    made.add_argument("--seed", type=int, default=0, help="of the jobs (default 0)")
    # fmt: on
    return made


def main() -> None:
    """Measure and print."""
    line = parser()
    chosen = line.parse_args()
    overrides = _overrides(line, chosen.settings)
    if chosen.markdown is not None and not chosen.markdown.parent.is_dir():
        line.error(f"{chosen.markdown}: there is no such folder")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _end)
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {what}", file=sys.stderr, flush=True)

    known = _known(chosen.markdown)  # read first: a page that cannot be kept is no reason to measure
    cases = tuple(chosen.cases) if chosen.cases else None
    measured = run(
        chosen.only or (OVERRIDABLE if overrides else list(SCENARIOS)),
        Wish(chosen.size, overrides, chosen.rounds, cases, chosen.seed),
        command=shlex.join(["lydian", "bench", *sys.argv[1:]]),
        settings=", ".join(chosen.settings),
        say=say,
    )
    print(json.dumps(measured, indent=2) if chosen.json else report.text(measured))
    if chosen.markdown is not None:
        write_page(chosen.markdown, report.merged(known, measured))
        say(f"{chosen.markdown} is written")


def _overrides(line: argparse.ArgumentParser, settings: list[str]) -> Spec:
    """What --set says, if a job can have it; else the usage, and the end."""
    try:
        overrides = read_overrides(settings)
        JobSpec.model_validate(rounds.job(1, 1, 1, overrides))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        line.error(f"--set {'.'.join(map(str, fault['loc']))}: {fault['msg']}")
    except ValueError as error:
        line.error(f"--set {error}")
    return overrides


def write_page(page: Path, runs: list[Document]) -> None:
    """Write a page, the numbers behind it, and its plots where they can be drawn."""
    images = {}
    if plots.available():
        drawn = plots.draw(runs, page.parent / "images")
        images = {name: file.relative_to(page.parent).as_posix() for name, file in drawn.items()}
    else:
        print("no plots: matplotlib is not installed (pip install -e '.[dev]')", file=sys.stderr)
    notes = page.with_suffix(".notes.md")
    prose = notes.read_text(encoding="utf-8") if notes.exists() else ""
    page.with_suffix(".json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    page.write_text(report.page(runs, prose, images), encoding="utf-8")


def _known(page: Path | None) -> list[Document]:
    """The runs behind a page that is there already."""
    if page is None or not page.with_suffix(".json").exists():
        return []
    found: list[Document] = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    return found


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _case(text: str) -> tuple[int, int]:
    megabytes, x, workers = text.partition("x")
    if not (x and megabytes.isdecimal() and workers.isdecimal() and int(megabytes) and int(workers)):
        raise argparse.ArgumentTypeError(f"{text!r} is no MBxWORKERS, as in 100x2")
    return int(megabytes), int(workers)


def _end(number: int, frame: FrameType | None) -> Any:  # noqa: ANN401, ARG001 - a handler's shape
    """SIGTERM and SIGHUP end it as Ctrl-C does, so that processes and folders are tidied up."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    try:
        main()
    except LydianError as error:
        print(error.lines(), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
