"""The benchmarks: fits, ratios, tables and pages as values; every scenario in its smallest size, with real processes.

No figure is judged here but by its shape: what a machine measures is its own affair.
"""

import asyncio
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bench import __main__ as command_line
from bench import growth, limits, plots, report
from bench.many import waits_of
from bench.played import Given, Line, facts
from bench.rounds import CASES, disk_of, job, memory_of
from bench.scenario import Row, Size, Spec, merge, rate, read_overrides, seconds, share, shortage
from bench.suite import SCENARIOS, Document, machine
from client import running
from common.errors import LydianError
from common.messages import JobSpec

ROOT = Path(__file__).resolve().parent.parent

LIMITS = {
    "loopback": 1e9, "loopback_streams": {2: 1.5e9, 8: 2e9}, "copy": 8e9, "copy_two_threads": 9e9, "axpy": 6e9,
    "sha256": 1.5e9, "fsync_s": 2e-4, "write": 4e9, "durable_write": 1e9,
}  # fmt: skip
AVERAGED: list[Row] = [
    {"megabytes": size, "updates": count, "average_s": 1e-3 * size * count, "peak_bytes": 7e7, "grown_bytes": 8e6,
     "read": 1e9, "part_of_copy": 0.125, "part_of_axpy": 0.17}
    for size in (1, 10, 100) for count in (2, 4, 8)
]  # fmt: skip
MOVED: list[Row] = [
    {"megabytes": size, "times": 3, "download_s": size / 5e2, "download": 5e8, "download_part": 0.5,
     "upload_s": size / 8e2, "upload": 8e8, "upload_part": 0.8, "submit_s": 0.01, "check": 1e8}
    for size in (1, 10)
]  # fmt: skip


def section(name: str, rows: list[Row], *, settings: str = "", skipped: tuple[str, ...] = ()) -> Document:
    return {"name": name, "set": settings, "seconds": 3.0, "rows": rows, "skipped": list(skipped)}


def document(*sections: Document, command: str = "lydian bench") -> Document:
    return {
        "command": command, "date": "2026-01-02T03:04:05Z", "size": "full", "seed": 0, "limits": LIMITS,
        "machine": {"processor": "an abacus", "memory": "1 GB", "disk": "ext4"}, "sections": list(sections),
        "growth": list(growth.fits({one["name"]: one["rows"] for one in sections})),
    }  # fmt: skip


# ---------------------------------------------------------------- how cost grows


@given(
    exponent=st.floats(-3, 3),
    factor=st.floats(1e-6, 1e6),
    xs=st.lists(st.integers(1, 10_000), min_size=3, max_size=8, unique=True),
)
def test_points_on_a_power_law_give_back_its_exponent_in_any_order(
    exponent: float, factor: float, xs: list[int]
) -> None:
    fit = growth.power_law([(x, factor * x**exponent) for x in xs])
    assert fit is not None
    assert math.isclose(fit.exponent, exponent, abs_tol=1e-6)
    assert math.isclose(fit.steepest, exponent, abs_tol=1e-4)
    assert math.isclose(fit.at(50.0), factor * 50.0**exponent, rel_tol=1e-4)


def test_a_constant_hides_the_growth_of_the_whole_curve_but_not_of_its_end() -> None:
    fit = growth.power_law([(x, 100 + x) for x in (1, 10, 1_000, 10_000)])
    assert fit is not None
    assert fit.exponent < 0.6 < 0.9 < fit.steepest
    assert fit.fitted < 1


@pytest.mark.parametrize("points", [[], [(1, 1)], [(1, 1), (2, 2)], [(1, 1), (1, 2), (2, 2)]])
def test_fewer_than_three_sizes_are_no_curve(points: list[tuple[float, float]]) -> None:
    assert growth.power_law(points) is None


def test_a_cost_is_fitted_for_each_group_of_its_rows() -> None:
    found = growth.fits({"averaging": AVERAGED, "transfers": MOVED})
    assert {(row["against"], row["cost"]) for row in found} == {
        *(("megabytes", f"averaging, {count} updates") for count in (2, 4, 8)),
        *(("updates", f"averaging, {size} MB") for size in (1, 10, 100)),
    }
    assert {round(float(row["exponent"] or 0), 6) for row in found} == {1.0}


def test_every_fitted_key_is_one_that_its_scenario_shows() -> None:
    for curve in growth.CURVES:
        shown = {column.key for column in SCENARIOS[curve.scenario].columns}
        assert {curve.cost, curve.against} <= shown


# ---------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("settings", "overrides"),
    [
        ([], {}),
        (["aggregation.update=int4"], {"aggregation": {"update": "int4"}}),
        (["round.fsync=true", "round.quorum=0.5"], {"round": {"fsync": True, "quorum": 0.5}}),
        (["config.x=a=b", "seed=7", "seed=8"], {"config": {"x": "a=b"}, "seed": 8}),
    ],
)
def test_settings_are_nested_as_in_a_job_file(settings: list[str], overrides: Spec) -> None:
    assert read_overrides(settings) == overrides


@pytest.mark.parametrize("setting", ["seed", "=1", "round.=1", ".x=1"])
def test_a_setting_without_key_or_value_is_refused_with_what_was_typed(setting: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(setting))):
        read_overrides([setting])


def test_an_override_changes_its_key_and_leaves_its_section() -> None:
    spec = JobSpec.model_validate(job(100, 4, 10, {"round": {"fsync": True}, "config": {"x": 1}}))
    assert (spec.round.fsync, spec.round.min_workers, spec.data.shards, spec.rounds) == (True, 4, 4, 11)
    assert spec.config == {"megabytes": 100, "x": 1}
    with pytest.raises(ValidationError):
        JobSpec.model_validate(job(1, 1, 1, {"round": {"no_such_key": 1}}))


def test_merging_changes_neither_side() -> None:
    base, other = {"a": {"b": 1}}, {"a": {"c": 2}, "d": 3}
    assert merge(base, other) == {"a": {"b": 1, "c": 2}, "d": 3}
    assert (base, other) == ({"a": {"b": 1}}, {"a": {"c": 2}, "d": 3})


def test_a_case_without_room_is_named_with_what_it_takes_and_what_there_is() -> None:
    assert shortage(memory=0, disk=0) is None
    assert re.fullmatch(r"it takes about 1000\.0 PB of memory, and .* are free", shortage(memory=1e18, disk=0) or "")
    assert re.fullmatch(r"it takes about 1000\.0 PB of disk, and .* are free", shortage(memory=0, disk=1e18) or "")
    assert max(memory_of(*case) for case in CASES) == memory_of(1600, 8) > 38e9
    assert disk_of(1600, 8) > 8 * 1600e6


# ---------------------------------------------------------------- what is shown


def test_cells_carry_their_units() -> None:
    assert [seconds(0.0512), seconds(1.5), rate(2.5e9), rate(3.2e8), share(0.42), share(0.012)] == [
        "51.2 ms", "1.5 s", "2.50 GB/s", "320 MB/s", "42%", "1.2%"
    ]  # fmt: skip


def test_a_table_in_markdown_keeps_its_columns_whatever_a_cell_holds() -> None:
    table = report.markdown_table(["a", "b"], [["x|y", "two\nlines"]])
    assert table == "| a | b |\n|---|---|\n| x\\|y | two lines |\n"


def test_what_a_row_does_not_have_is_a_dash() -> None:
    head, body = report.cells(SCENARIOS["averaging"].columns, [{"megabytes": 1, "updates": None}])
    assert body[0][:3] == ["1 MB", "-", "-"]
    assert len(head) == len(body[0])


def test_a_run_as_text_names_its_limits_its_rows_and_what_was_left_out() -> None:
    run = document(section("averaging", AVERAGED, skipped=("9,999 MB × 2 updates: no room",)))
    shown = report.text(run)
    assert "TCP loopback, one stream     1.00 GB/s" in shown
    assert "left out: 9,999 MB × 2 updates: no room" in shown
    assert re.search(r"100 MB +8 +800 ms +1\.00 GB/s +12%", shown)
    assert re.search(r"averaging, 8 updates +megabytes +1 +100 +3 +1\.00 +1\.00 +1\.000", shown)


def test_a_page_says_which_command_printed_what_and_ends_with_the_prose() -> None:
    runs = [document(section("transfers", MOVED)), document(section("averaging", AVERAGED), command="lydian bench -x")]
    page = report.page(runs, "## Tried\n\nAnd kept.\n", {"averaging": "images/a.svg"})
    assert "Printed by `lydian bench` (run 1, 2026-01-02T03:04:05Z, seed 0, 3 s)." in page
    assert "Printed by `lydian bench -x` (run 2, 2026-01-02T03:04:05Z, seed 0, 3 s)." in page
    assert "![Averaging alone](images/a.svg)" in page
    assert page.index("## Averaging alone") < page.index("## Upload and download alone")  # in the order of the suite
    assert page.endswith("## Tried\n\nAnd kept.\n")
    assert report.page(json.loads(json.dumps(runs)), "## Tried\n\nAnd kept.\n", {"averaging": "images/a.svg"}) == page


def test_a_new_run_replaces_its_sections_and_leaves_the_others() -> None:
    old = document(section("rounds", []), section("averaging", AVERAGED), command="old")
    plain = document(section("averaging", AVERAGED[:1]), command="new")
    changed = document(section("averaging", AVERAGED[:1], settings="round.fsync=true"), command="set")
    runs = report.merged(report.merged([old], changed), plain)
    kept = [(run["command"], [(one["name"], one["set"]) for one in run["sections"]]) for run in runs]
    assert kept == [
        ("old", [("rounds", "")]), ("set", [("averaging", "round.fsync=true")]), ("new", [("averaging", "")]),
    ]  # fmt: skip
    assert report.merged([plain], plain) == [plain]  # a run with nothing left is gone
    assert len(old["sections"]) == 2


def test_the_committed_page_is_made_from_the_numbers_beside_it() -> None:
    page = ROOT / "docs/performance.md"
    if not page.exists():
        pytest.skip("no page was made yet: make bench")
    runs = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    names = {one["name"] for run in runs for one in run["sections"]} & set(plots.PLOTS)
    files = {name: f"images/performance-{name}.svg" for name in names}
    images = {name: file for name, file in files.items() if (page.parent / file).exists()}
    notes = page.with_suffix(".notes.md").read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8") == report.page(runs, notes, images)


def test_plots_of_the_same_rows_are_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e '.[dev]'")
    runs = [document(section("averaging", AVERAGED), section("transfers", MOVED))]
    drawn = [plots.draw(runs, tmp_path / folder) for folder in ("one", "two")]
    assert set(drawn[0]) == {"averaging", "transfers"}
    for name, file in drawn[0].items():
        text = file.read_text(encoding="utf-8")
        assert text == drawn[1][name].read_text(encoding="utf-8")
        assert "MB" in text  # words stay words: the file is small, and can be searched
        assert str(tmp_path) not in text


def test_the_machine_is_told_without_a_host_or_a_path() -> None:
    told = " ".join(machine().values())
    assert os.uname().nodename not in told
    assert str(ROOT) not in told
    assert str(Path.home()) not in told


# ---------------------------------------------------------------- the players


def test_waits_count_from_the_opening_of_the_round_and_leave_out_the_first() -> None:
    given = [Given(1, 0, 5.0), Given(2, 0, 10.5), Given(2, 1, 10.2), Given(3, 0, 19.9996)]
    assert waits_of(given, {1: 1.0, 2: 10.0, 3: 20.0}) == pytest.approx([0.5, 0.2, 0.0])


def test_facts_of_a_model_that_nobody_built_give_every_shard_a_sample() -> None:
    assert facts(3).bounds == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", None),
        (b"HTTP/1.1 409 Conflict\r\ncontent-length: 4\r\n\r\nlate", "409 Conflict"),
    ],
)
def test_a_line_reads_an_answer_to_its_end_and_stays_open(answer: bytes, read: bytes | str | None) -> None:
    async def play() -> None:
        gone = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while await reader.readline():
                while await reader.readline() != b"\r\n":
                    pass
                await reader.readexactly(3)
                writer.write(answer)
            writer.close()
            await writer.wait_closed()
            gone.set()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            line = Line(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            for _ in range(2):
                if isinstance(read, str):
                    with pytest.raises(LydianError, match=read):
                        await line.call("POST", "/x", b"abc")
                else:
                    assert await line.call("POST", "/x", b"abc") == read
            await line.close()
            await gone.wait()

    asyncio.run(play())


def test_a_line_that_ends_in_the_middle_of_an_answer_is_a_sentence() -> None:
    async def play() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\nhalf")
            writer.close()
            await writer.wait_closed()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            line = Line(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            with pytest.raises(LydianError, match=r"GET /x: no answer") as caught:
                await line.call("GET", "/x")
            assert caught.value.code == "no_answer"
            await line.close()

    asyncio.run(play())


# ---------------------------------------------------------------- the command


def lydian_bench(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "client.main", "bench", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_lydian_bench_is_the_benchmarks_own_command_line(tmp_path: Path) -> None:
    done = lydian_bench("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: lydian bench")
    assert "--quick" in done.stdout
    assert lydian_bench("--rounds", "0", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--only", "no-such-scenario"), "invalid choice"),
        (("--size", "100"), "no MBxWORKERS"),
        (("--rounds", "0"), "less than 1"),
        (("--set", "seed"), "no KEY=VALUE"),
        (("--set", "round.no_such_key=1"), "--set round.no_such_key: "),
        (("--markdown", "nowhere/page.md"), "no such folder"),
        (("--quick", "--tiny"), "not allowed with"),
    ],
)
def test_wrong_usage_of_the_benchmarks_exits_2_before_anything_is_measured(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lydian bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    shown = capsys.readouterr()
    assert (ended.value.code, shown.out) == (2, "")
    assert said in shown.err
    assert "limits of this machine" not in shown.err


def test_without_a_clone_the_command_is_one_sentence_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_ROOT", tmp_path)
    with pytest.raises(LydianError, match="needs a clone of the repository") as caught:
        running.python_module("bench", [])
    assert caught.value.code == "needs_clone"


def test_an_installed_client_has_no_benchmarks_and_says_so(tmp_path: Path) -> None:
    for package in ("client", "common"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "client.main", "bench", "--help"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[0].endswith("it needs a clone of the repository")


# ---------------------------------------------------------------- the real thing, as small as it gets


def test_every_limit_is_measured() -> None:
    found = limits.measure(8)
    assert set(found.loopback_streams) == set(limits.STREAMS)
    rates = [value for value in vars(found).values() if isinstance(value, float)]
    assert all(value > 0 for value in [*rates, *found.loopback_streams.values()])


def no_sign(row: dict[str, Any], *keys: str) -> list[str]:
    """The keys whose value is not above zero."""
    return [key for key in keys if not row[key] > 0]


Checks = dict[str, Callable[[dict[str, Any]], list[str]]]
POSITIVE: Checks = {
    "rounds": lambda row: no_sign(
        row, "round_s", "ratio", "down_bytes", "up_bytes", "coordinator_bytes", "child_bytes"
    ),
    "many": lambda row: no_sign(row, "join_s", "reach_s", "round_s", "ratio", "cpu_s", "peak_bytes", "idle_bytes"),
    "averaging": lambda row: no_sign(row, "average_s", "read", "part_of_copy", "peak_bytes"),
    "transfers": lambda row: no_sign(row, "download", "upload", "submit_s", "upload_part"),
    "encrypted": lambda row: no_sign(row, "download", "upload", "upload_part"),
    "training": lambda row: no_sign(row, "round_s", "plain_s", "ratio", "first_step_s", "same_bytes"),
}


def measured(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Document:
    """What a run of one scenario in its smallest size has found, with all that its rows must have."""
    (folder / "left").mkdir()
    monkeypatch.setenv("TMPDIR", str(folder / "left"))
    done = lydian_bench("--tiny", "--only", name, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    found: Document = json.loads(done.stdout)
    assert set(found) == set(document())
    assert found["size"] == Size.TINY.value
    assert [(one["name"], one["skipped"]) for one in found["sections"]] == [(name, [])]
    rows = found["sections"][0]["rows"]
    assert rows
    for row in rows:
        assert {column.key for column in SCENARIOS[name].columns} <= set(row)
        assert POSITIVE[name](row) == []
    assert f"  {name}: " in done.stderr  # one who waits sees what for
    assert list((folder / "left").glob("lydian-*")) == []
    return found


@pytest.mark.acceptance
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "rounds"])
def test_a_scenario_runs_in_its_smallest_size_and_leaves_nothing_behind(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(name, tmp_path, monkeypatch)


@pytest.mark.acceptance
def test_a_setting_reaches_the_job_of_rounds_and_names_its_section_on_a_page_that_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    notes = "## Tried, and did not pay\n\nBy hand.\n"
    page.with_suffix(".notes.md").write_text(notes)
    page.with_suffix(".json").write_text(json.dumps([document(section("averaging", AVERAGED))]))
    found = measured("rounds", tmp_path, monkeypatch, "--set", "round.fsync=true", "--markdown", str(page))
    assert found["sections"][0]["set"] == "round.fsync=true"
    text = page.read_text(encoding="utf-8")
    assert "## A round without training, round.fsync=true" in text
    assert "## Averaging alone" in text
    assert text.endswith(notes)
    assert len(json.loads(page.with_suffix(".json").read_text())) == 2
