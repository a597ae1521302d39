"""What TLS costs: the same transfers in plain words and encrypted, one after the other, through real coordinators."""

from bench import transfers
from bench.limits import Limits
from bench.scenario import Column, Outcome, Row, Say, Scenario, Wish, rate, share

HOW = {"plain HTTP": {}, "TLS 1.3, pinned": {"LYDIAN_TLS": "self-made"}}


def measure(wish: Wish, limits: Limits, say: Say) -> Outcome:
    """Two rows for each size."""
    rounds = wish.rounds or wish.pick(tiny=1, quick=5, full=10)
    rows = list[Row]()
    for size_mb in wish.pick(tiny=(1,), quick=(10, 100), full=(10, 100, 400)):
        for line, settings in HOW.items():
            say(f"{size_mb:,} MB by {line}, {rounds} times")
            rows.append({"line": line, **transfers.case(size_mb, rounds, wish, limits, **settings)})
    return Outcome(tuple(rows), ())


SCENARIO = Scenario(
    name="encrypted",
    title="What TLS costs",
    about=(
        "As *Upload and download alone*, on loopback, where nothing but processors and memory limits the bytes: both "
        "ends, and the encryption of both, share this machine. On a line that is slower than these figures, TLS costs "
        "processor time alone."
    ),
    measure=measure,
    columns=(
        Column("model", "megabytes", lambda mb: f"{mb:,} MB"),
        Column("line", "line", str),
        Column("download", "download", rate),
        Column("of loopback", "download_part", share),
        Column("upload", "upload", rate),
        Column("of loopback ", "upload_part", share),
    ),
)
