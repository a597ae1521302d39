"""Documents of runs in, text or a page out: tables, the machine, which command printed what.

    run ─▶ merged(known runs, run) ─▶ page(runs, notes)

A page is made from the runs beside it (performance.json) and the prose beside it (performance.notes.md), which is
written by hand: measuring one scenario again changes its section, and never a word of the prose.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench import growth
from bench.scenario import Column, Row, rate, seconds
from bench.suite import SCENARIOS, Document
from client.shown import columns

PREFACE = """# Performance

Made by `lydian bench --markdown docs/performance.md` (`make bench`): do not edit; prose belongs into
[performance.notes.md](performance.notes.md). Every figure stands beside what the same machine could do at best in the
same run, so that figures of different machines can be compared by their ratios. The numbers behind the tables are in
[performance.json](performance.json). `lydian bench --only NAME` measures one section again, and leaves the others.
"""


# ---------------------------------------------------------------- runs


def merged(known: Sequence[Document], new: Document) -> list[Document]:
    """The known runs without the sections that the new one has measured again, and the new one."""
    measured = {_key(section) for section in new["sections"]}
    kept = []
    for run in known:
        sections = [section for section in run["sections"] if _key(section) not in measured]
        if sections:
            kept.append({**run, "sections": sections})
    return [*kept, new]


def _key(section: Mapping[str, Any]) -> tuple[str, str]:
    return section["name"], section["set"]


# ---------------------------------------------------------------- text


def text(run: Document) -> str:
    """One run for a terminal."""
    lines = [", ".join(run["machine"][key] for key in ("processor", "memory", "disk")), ""]
    lines += [f"  {name:28s} {value}" for name, value in limit_rows(run["limits"])]
    for section in run["sections"]:
        scenario = SCENARIOS[section["name"]]
        lines += ["", _title(scenario.title, section) + f" ({section['seconds']:.0f} s)", ""]
        lines += _aligned(scenario.columns, section["rows"])
        lines += [f"  left out: {sentence}" for sentence in section["skipped"]]
    if run["growth"]:
        lines += ["", "Growth: cost = c · xᵖ", ""]
        lines += _aligned(growth.COLUMNS, run["growth"])
    return "\n".join(lines)


def _aligned(table: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """A table in plain text, all but the first column set to the right."""
    head, body = cells(table, rows)
    return ["  " + line for line in columns(head, body, right=head[1:])]


def cells(table: Sequence[Column], rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a table; what a row does not have is a dash."""
    return [column.head.strip() for column in table], [[_cell(column, row) for column in table] for row in rows]


def _cell(column: Column, row: Row) -> str:
    value = row.get(column.key)
    return "-" if value is None else column.show(value)


def _title(title: str, section: Mapping[str, Any]) -> str:
    return f"{title}, {section['set']}" if section["set"] else title


def limit_rows(limits: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(limit, value) of each limit of a machine."""
    streams = {int(number): value for number, value in limits["loopback_streams"].items()}
    return [
        ("TCP loopback, one stream", rate(limits["loopback"])),
        *((f"… {number} streams together", rate(value)) for number, value in sorted(streams.items())),
        ("memory copy, one core", rate(limits["copy"])),
        ("… two threads", rate(limits["copy_two_threads"])),
        ("weighted sum in numpy", rate(limits["axpy"])),
        ("SHA-256", rate(limits["sha256"])),
        ("file write", rate(limits["write"])),
        ("… with fsync", rate(limits["durable_write"])),
        ("fsync of 4 kB", seconds(limits["fsync_s"])),
    ]


# ---------------------------------------------------------------- the page


def page(runs: Sequence[Document], notes: str, images: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        runs: in the order of their time; each section is in one of them.
        notes: Markdown that ends the page; its headings are of the second level.
        images: scenario -> path of its plot, from the page.
    """
    parts = [PREFACE, *_machines(runs)]
    for scenario in SCENARIOS.values():
        found = [(at, run, section) for at, run, section in _sections(runs) if section["name"] == scenario.name]
        for at, run, section in found:
            parts += [
                f"## {_title(scenario.title, section)}\n",
                scenario.about + "\n",
                _made_by(runs, at, run, section),
            ]
            parts += [markdown_table(*cells(scenario.columns, section["rows"]))]
            parts += [f"Left out: {sentence}.\n" for sentence in section["skipped"]]
        if found and scenario.name in images:
            parts.append(f"![{scenario.title}]({images[scenario.name]})\n")
    parts += list(_growth(runs))
    return "\n".join([*parts, notes.strip() + "\n"])


def _machines(runs: Sequence[Document]) -> Iterator[str]:
    """The machine and its limits, a column a run."""
    yield "## The machine and its limits\n"
    yield (
        "Loopback is raw TCP between Python processes, copies and sums are numpy's, files lie in the folder for "
        "temporary files. *Copy* counts a byte once that is read and written; *weighted sum* counts the float32 that "
        "is read and added up in float64.\n"
    )
    head = ["", *(f"run {at}" for at in range(1, len(runs) + 1))] if len(runs) > 1 else ["", "value"]
    rows = [["command", *(f"`{run['command']}`" for run in runs)], ["date", *(run["date"] for run in runs)]]
    rows += [["seed", *(str(run["seed"]) for run in runs)]]
    keys = dict.fromkeys(key for run in runs for key in run["machine"])
    rows += [[key, *(run["machine"].get(key, "-") for run in runs)] for key in keys]
    tables = [limit_rows(run["limits"]) for run in runs]
    names = dict.fromkeys(name for table in tables for name, _ in table)
    rows += [[name, *(dict(table).get(name, "-") for table in tables)] for name in names]
    yield markdown_table(head, rows)


def _sections(runs: Sequence[Document]) -> Iterator[tuple[int, Document, Mapping[str, Any]]]:
    return ((at, run, section) for at, run in enumerate(runs, start=1) for section in run["sections"])


def _made_by(runs: Sequence[Document], at: int, run: Document, section: Mapping[str, Any]) -> str:
    which = f"run {at}, " if len(runs) > 1 else ""
    return f"Printed by `{run['command']}` ({which}{run['date']}, seed {run['seed']}, {section['seconds']:.0f} s).\n"


def _growth(runs: Sequence[Document]) -> Iterator[str]:
    plain = {section["name"]: section["rows"] for _, _, section in _sections(runs) if not section["set"]}
    rows = growth.fits(plain)
    if rows:
        yield "## How cost grows\n"
        yield (
            "The exponent p of cost ≈ c · xᵖ, by least squares over the logarithms of the rows above: 1 is linear. "
            "A constant hides the growth at small x, so the exponent between the two largest x stands beside it.\n"
        )
        yield markdown_table(*cells(growth.COLUMNS, rows))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; what would break it is escaped."""

    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"

    body = [line(head), "|" + "---|" * len(head), *map(line, rows)]
    return "\n".join(body) + "\n"
