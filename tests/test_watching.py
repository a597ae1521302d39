"""What `lydian watch` shows: rows that an evaluation completes later, plain lines, JSON lines, a picture."""

import io
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from client import shown
from client.watching import (
    Board,
    JsonView,
    LiveView,
    PlainView,
    expected,
    follow,
    plain_line,
    read_event,
    render,
    round_table,
)
from common.messages import JobSpec, JobView

DIGEST = "0" * 64
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
JOB = JobView(
    id="clothes-1", name="clothes", task="fashion-mnist", state="training", reason="waiting for two updates",
    submitted_at="2026-01-01T00:00:00Z", round=0, rounds=4, spec=JobSpec(task="fashion-mnist", rounds=4),
)  # fmt: skip


def closed(number: int, **more: Any) -> dict[str, Any]:
    fact = {
        "id": number * 10, "at": "2026-01-01T00:00:00Z", "type": "round", "round": number, "seconds": 2.0, "workers": 3,
        "shards": 3, "samples": 1500, "bytes_down": 6_700_000, "bytes_up": 20_100_000, "digest": DIGEST, "size": 10,
        "metrics": {"train_loss": 0.5},
    }  # fmt: skip
    return fact | more


def evaluated(number: int, accuracy: float, *, best: bool = True) -> dict[str, Any]:
    return {
        "id": number * 10 + 1, "at": "2026-01-01T00:00:00Z", "type": "evaluation", "round": number, "attempt": 1,
        "worker": "w-1", "metrics": {"accuracy": accuracy, "loss": 0.25}, "samples": 100, "seconds": 0.1, "best": best,
    }  # fmt: skip


def handed_back(sentence: str, worker_name: str = "gpu-1") -> dict[str, Any]:
    return {
        "id": 5, "at": "2026-01-01T00:00:00Z", "type": "handed_back", "kind": "train", "round": 1, "shard": 2,
        "attempt": 1, "worker": "w-1", "worker_name": worker_name, "code": "task_failed", "sentence": sentence,
        "detail": "Traceback …",
    }  # fmt: skip


def ended(state: str, reason: str = "all 4 rounds are done") -> dict[str, Any]:
    return {"id": 999, "at": "2026-01-01T00:00:00Z", "type": "job", "state": state, "reason": reason}


NOW = {
    "type": "now", "state": "training", "reason": "round 2: 1 of 3 updates", "round": 2, "rounds": 4, "received": 1,
    "shards": 4, "workers": [{
        "worker": "gpu-1", "doing": "round 2, shard 0",
        "progress": {"doing": "training", "step": 120, "steps": 480, "samples_per_s": 1234.4, "loss": 0.4123},
    }, {"worker": "gpu-2", "doing": "round 2, shard 1"}],
}  # fmt: skip


def board_after(*events: dict[str, Any]) -> Board:
    board = Board(JOB)
    for event in events:
        fact = read_event(event)
        assert fact is not None, event
        board.take(fact)
    return board


def drawn(board: Board, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(render(board))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ---------------------------------------------------------------- the board


def test_a_row_is_completed_when_its_evaluation_comes_a_round_later() -> None:
    header, rows = round_table((board := board_after(closed(1), closed(2), evaluated(1, 0.81))).last(10), board.best)
    assert header == ["round", "seconds", "workers", "samples", "↓", "↑", "train loss", "accuracy", "loss"]
    assert rows == [
        ["* 1", "2.00 s", "3", "1,500", "6.7 MB", "20.1 MB", "0.500", "0.810", "0.250"],
        ["2", "2.00 s", "3", "1,500", "6.7 MB", "20.1 MB", "0.500", "-", "-"],
    ]


def workers_measured() -> list[dict[str, Any]]:
    return [
        {"worker": "w-1", "worker_name": "gpu-1", "attempt": 1, "metrics": {"accuracy": 0.9}, "samples": 30},
        {"worker": "w-2", "worker_name": "attic", "attempt": 0, "metrics": {}, "samples": 0, "why": "it was gone"},
    ]


def test_what_workers_measured_and_the_lowest_class_have_columns_where_there_are_any() -> None:
    metrics = {"accuracy": 0.9, "accuracy/0": 1.0, "accuracy/1": 0.625, "accuracy/rest": 0.75}
    told = {**evaluated(1, 0.9), "metrics": metrics, "workers": workers_measured()}
    header, rows = round_table(board_after(closed(1), closed(2), told).last(10), None)
    assert header[7:] == ["accuracy", "lowest class", "by worker"]
    assert [row[7:] for row in rows] == [["0.900", "1: 0.625", "gpu-1 0.900, attic -"], ["-", "-", "-"]]


def test_who_is_not_in_a_round_has_a_column_where_anybody_is_not() -> None:
    absent = [{"worker": "w-3", "worker_name": "cpu", "why": "evaluates only"}]
    header, rows = round_table(board_after(closed(1), closed(2, absent=absent)).last(10), None)
    assert (header[-1], [row[-1] for row in rows]) == ("without", ["", "cpu: evaluates only"])


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, ""), (40.0, "expected in 40.0 s"), (-62.0, "falls behind by 1 min 2 s")]
)
def test_when_an_update_is_expected_is_said_beside_its_worker(seconds: float | None, words: str) -> None:
    assert expected(seconds) == words
    doing = {"worker": "gpu-2", "doing": "round 2, shard 0", "expected_in_s": seconds}
    assert words in drawn(board_after({**NOW, "workers": [doing]}))


def test_only_the_newest_best_round_is_marked() -> None:
    events = [closed(1), evaluated(1, 0.8), closed(2), evaluated(2, 0.9), closed(3), evaluated(3, 0.7, best=False)]
    board = board_after(*events)
    assert [row[0] for row in round_table(board.last(10), board.best)[1]] == ["1", "* 2", "3"]


def test_the_rest_is_foretold_from_the_mean_of_the_last_rounds() -> None:
    board = board_after(closed(1, seconds=1.0), closed(2, seconds=3.0))
    assert (board.progress, board.seconds_left) == (2.0, 4.0)


def test_an_open_round_counts_by_the_updates_that_are_in() -> None:
    assert board_after(closed(1), NOW).progress == 1.25


def test_nothing_is_foretold_before_the_first_round_and_after_the_end() -> None:
    assert board_after(NOW).seconds_left is None
    assert board_after(closed(1), ended("cancelled")).seconds_left is None


@pytest.mark.parametrize(
    "event",
    [{"type": "brand_new", "id": 1}, {"id": 1}, {"type": "round", "id": 2, "round": "first"}],
)
def test_an_event_that_is_not_understood_is_passed_over(event: dict[str, Any]) -> None:
    assert read_event(event) is None


def test_fields_that_a_newer_coordinator_added_are_passed_over() -> None:
    assert board_after(closed(1, carbon_grams=3)).last(1)[0].closed.round == 1


def test_a_rounds_warning_is_among_the_troubles() -> None:
    assert list(board_after(closed(1), closed(2, warning="it moved\n3 times as far")).troubles) == [
        "round 2: it moved 3 times as far"
    ]


# ---------------------------------------------------------------- plain lines


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            closed(3, left_out=1, workers=1, metrics={}),
            "round 3 of 4: 2.00 s, 1 worker, 1,500 samples, down 6.7 MB, up 20.1 MB, 1 shard left out",
        ),
        (
            closed(3, left_out=1, workers=1, samples=9, bytes_down=1, bytes_up=1, metrics={}, absent=[
                {"worker": "w-2", "worker_name": "b", "shard": 1, "why": "late"},
                {"worker": "w-3", "worker_name": "c", "why": "slow"},
            ]),
            "round 3 of 4: 2.00 s, 1 worker, 9 samples, down 1 B, up 1 B, 1 shard left out; shard 1, b: late; c: slow",
        ),
        (
            closed(3, workers=1, samples=9, bytes_down=1, bytes_up=1, metrics={}, warning="it moved 3 times as far"),
            "round 3 of 4: 2.00 s, 1 worker, 9 samples, down 1 B, up 1 B; caution: it moved 3 times as far",
        ),
        (evaluated(3, 0.912), "evaluation of round 3: accuracy 0.912, loss 0.250 (best)"),
        (ended("failed", "no quorum"), "failed: no quorum"),
        (
            handed_back("CUDA out of\nmemory"),
            "gpu-1 gave back train of round 1, shard 2, attempt 1: CUDA out of memory (task_failed)",
        ),
        ({"type": "extended", "round": 2, "reason": "1 of 3"}, "round 2 gets more time: 1 of 3"),
        (
            {**evaluated(3, 0.9), "metrics": {"accuracy": 0.9, "accuracy/0": 1.0, "accuracy/1": 0.5},
             "workers": workers_measured()},
            ("evaluation of round 3: accuracy 0.900, lowest accuracy/1 0.500 (best); gpu-1: accuracy 0.900, 30 "
            "samples; attic: it was gone"),
        ),
        (
            {"type": "measured", "round": 2, "shard": 1, "attempt": 0, "worker": "w-2", "worker_name": "attic",
             "why": "it was gone"},
            "attic has no numbers of round 2: it was gone",
        ),
        (
            {"type": "measured", "round": 2, "shard": 1, "attempt": 1, "worker": "w-2", "worker_name": "attic"},
            None,
        ),
        (
            {"type": "opened_anew", "round": 2, "seal": 1, "shards": [], "reason": "2 of 3 workers handed in"},
            "round 2 begins once more: 2 of 3 workers handed in",
        ),
        ({"type": "evaluation_given_up", "round": 2, "reason": "no data"}, "round 2 is not evaluated: no data"),
        (
            {"type": "late", "round": 2, "shard": 1, "attempt": 1, "worker": "w-1"},
            "an update of round 2, shard 1 came too late and is not used",
        ),
        (
            {"type": "initialised", "attempt": 1, "worker": "w-1", "digest": DIGEST, "size": 6_700_000,
             "facts": {"parameters": 1_663_370, "train_samples": 6, "test_samples": 1}},
            "model built: 1,663,370 parameters, 6.7 MB",
        ),
        (
            {"type": "submitted", "spec": {"task": "digits", "rounds": 4}, "key": "k"},
            "submitted: digits, 4 rounds",
        ),
        (
            {"type": "submitted", "spec": {"task": "digits", "init": "a-1"}, "key": "k",
             "begins_with": {"digest": "ab" * 32, "size": 9, "job": "a-1", "round": 3}},
            "submitted: digits, 5 rounds; begins with the model of a-1 after round 3",
        ),
        ({"type": "handed_out", "kind": "train", "round": 1, "shard": 0, "attempt": 1, "worker": "w-1"}, None),
        (NOW, None),
    ],
)  # fmt: skip
def test_a_fact_is_one_plain_line_or_none(event: dict[str, Any], line: str | None) -> None:
    fact = read_event(event)
    assert fact is not None
    assert plain_line(fact, Board(JOB)) == line


@given(st.text(), st.sampled_from(["finished", "failed", "cancelled"]))
def test_no_text_of_a_worker_ever_steers_a_terminal(text: str, state: str) -> None:
    for event in (handed_back(text, text), ended(state, text), closed(1, metrics={text: 1.0})):
        fact = read_event(event)
        line = plain_line(fact, Board(JOB)) if fact else None
        assert line is None or not CONTROL.search(line + shown.one_line(text))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_no_text_of_a_worker_ever_steers_the_picture(text: str) -> None:
    event = NOW | {"reason": text, "workers": [{"worker": text, "doing": text}]}
    assert not CONTROL.search(drawn(board_after(closed(1), handed_back(text, text), event)))


def test_plain_output_is_a_line_an_event_without_escape_codes(capsys: pytest.CaptureFixture[str]) -> None:
    events = [NOW, closed(1), NOW, closed(2), evaluated(1, 0.5), handed_back("\x1b[31mred"), ended("finished")]
    assert follow(events, PlainView(Board(JOB))) == "finished"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["round", "round", "evaluation", "gpu-1", "finished:"]
    assert "\x1b" not in "".join(lines)


def test_a_closed_round_says_how_long_the_others_will_take(capsys: pytest.CaptureFixture[str]) -> None:
    follow([closed(1), closed(2)], PlainView(Board(JOB)))  # of four, two seconds each
    assert [line.rpartition("; ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "about 6.00 s left", "about 4.00 s left",
    ]  # fmt: skip
    follow([closed(4)], PlainView(Board(JOB)))
    assert "left" not in capsys.readouterr().out


def test_advice_stands_beside_what_a_worker_gave_back(capsys: pytest.CaptureFixture[str]) -> None:
    follow([handed_back("no memory") | {"advice": "Lower train.batch_size."}], PlainView(Board(JOB)))
    assert capsys.readouterr().out.endswith("no memory (task_failed); what to do: Lower train.batch_size.\n")


def test_the_picture_says_how_many_updates_of_the_open_round_are_in() -> None:
    assert "round 1/4, 1 of 4 updates in" in drawn(board_after(closed(1), NOW))
    assert "updates in" not in drawn(board_after(closed(1), NOW, ended("failed")))


def test_a_coordinator_that_is_away_is_told_once_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView(Board(JOB))
    for event in (None, None, closed(1), None):
        view.show(event) if event else view.waiting("the coordinator does not answer")
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["the coordinator does not answer"] * 2
    assert len(captured.out.splitlines()) == 1


def test_what_a_queued_job_awaits_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    none, one = (NOW | {"state": "queued", "reason": f"{live} of 2 workers"} for live in (0, 1))
    follow([none, none, handed_back("no memory"), none, one, one], PlainView(Board(JOB)))
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[2]] == ["queued: 0 of 2 workers", "queued: 1 of 2 workers"]
    assert len(lines) == 3


def test_what_a_round_awaits_is_told_when_it_has_been_quiet_for_long(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0.0, 1.0, 32.0, 32.0, 33.0, 63.0])  # made, asked, asked, said, asked, asked
    view = PlainView(Board(JOB), clock=lambda: next(seconds))
    for _ in range(4):
        view.show(NOW)
    assert capsys.readouterr().out == "training: round 2: 1 of 3 updates\n"


# ---------------------------------------------------------------- JSON lines


def test_json_output_is_every_fact_as_it_came_and_ends_with_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    facts = [closed(1), {"type": "brand_new", "id": 11, "text": "é\x1b"}, evaluated(1, 0.5), ended("cancelled")]
    assert follow([NOW, *facts[:2], NOW, *facts[2:]], JsonView()) == "cancelled"
    out = capsys.readouterr().out
    assert [json.loads(line) for line in out.splitlines()] == facts
    assert out.isascii()


# ---------------------------------------------------------------- the picture


def test_the_picture_shows_what_is_awaited_who_works_and_the_last_rounds() -> None:
    board = board_after(
        *(closed(number) for number in range(1, 13)), evaluated(12, 0.987), handed_back("no memory"), NOW
    )
    picture = drawn(board)
    for part in (
        "clothes-1", "training", "round 2: 1 of 3 updates", "120/480", "1,234 samples/s", "loss 0.412", "gpu-2",
        "0.987", "* 12", "no memory", "↓", "↑",
    ):  # fmt: skip
        assert part in picture, picture
    assert not re.search(r"^\s+2 +2\.00 s", picture, re.MULTILINE)  # only the last ten rounds


def test_markup_in_a_reason_is_shown_as_it_is() -> None:
    assert "[red]alarm[/red]" in drawn(board_after(ended("failed", "[red]alarm[/red]")))


def test_the_live_view_ends_with_the_final_picture(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    view = LiveView(Board(JOB))
    assert follow([closed(1), NOW, evaluated(1, 0.75), ended("finished")], view) == "finished"
    out = capsys.readouterr().out
    assert "0.750" in out
    assert "all 4 rounds are done" in out


def test_the_live_view_shows_that_the_coordinator_is_away_until_it_is_back() -> None:
    view = LiveView(Board(JOB))
    view.waiting("the coordinator does not answer")
    assert "does not answer" in drawn(view.board)
    view.show(closed(1))
    assert "does not answer" not in drawn(view.board)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (6_700_000, "6.7 MB"),
     (2_500_000_000, "2.5 GB")],
)  # fmt: skip
def test_bytes_have_a_unit(count: int, text: str) -> None:
    assert shown.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.00 s"), (0.42, "0.42 s"), (9.994, "9.99 s"), (9.996, "10.0 s"), (59.94, "59.9 s"), (59.96, "1 min 0 s"),
     (72, "1 min 12 s"), (3599.7, "1 h 0 min"), (7500, "2 h 5 min"), (273_600, "3 d 4 h"), (-1, "-"),
     (float("inf"), "-")],
)  # fmt: skip
def test_seconds_have_a_unit(seconds: float, text: str) -> None:
    assert shown.duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(12_500, "0.10 Mbit/s"), (124_000, "0.99 Mbit/s"), (125_000, "1.0 Mbit/s"), (12.49e6, "99.9 Mbit/s"),
     (12.5e6, "100 Mbit/s"), (1.25e9, "10,000 Mbit/s")],
)  # fmt: skip
def test_a_line_is_shown_in_megabits(rate: float, text: str) -> None:
    assert shown.line_rate(rate) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0004, "0.4 ms"), (0.00994, "9.9 ms"), (0.083, "83 ms"), (2, "2000 ms")]
)
def test_a_latency_is_shown_in_milliseconds(seconds: float, text: str) -> None:
    assert shown.latency(seconds) == text


def test_a_column_goes_only_where_it_may_and_says_nothing() -> None:
    rows = [["a", "-", "-"], ["b", "-", "x"]]
    assert shown.without_empty(["N", "M", "O"], rows, {"M", "O"}) == (["N", "O"], [["a", "-"], ["b", "x"]])
    assert shown.without_empty(["N", "M", "O"], rows, {"N"}) == (["N", "M", "O"], rows)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0.000"), (0.91234, "0.912"), (1e-7, "1e-07"), (12.5, "12.500"), (float("nan"), "nan")],
)  # fmt: skip
def test_a_measure_has_three_places(value: float | None, text: str) -> None:
    assert shown.measure(value) == text


@given(st.lists(st.tuples(st.text("ab ", max_size=8), st.text("12", max_size=8)), max_size=5))
def test_plain_tables_are_aligned(rows: list[tuple[str, str]]) -> None:
    lines = shown.columns(["NAME", "N"], rows, right={"N"})
    assert len(lines) == len(rows) + 1
    ends = {len(line) for line, row in zip(lines[1:], rows, strict=True) if row[1]}
    assert ends <= {len(lines[0])}


# ---------------------------------------------------------------- private jobs


PRIVATE = {"level": "worker", "clip": 1.0, "noise": 4.0, "delta": 1e-5, "budget": 2.0}
SPENT = {"level": "worker", "epsilon": 1.2345, "epsilon_rdp": 1.5, "delta": 1e-5, "clip": 1.0}


def private_board() -> Board:
    spec = JobSpec.model_validate({"task": "digits", "rounds": 9, "data": {"shards": 4}, "privacy": PRIVATE})
    board = Board(JOB.model_copy(update={"spec": spec, "warnings": ("what the coordinator said",)}))
    submitted = {"type": "submitted", "spec": spec.model_dump(), "key": "k", "affordable": 4, "planned_epsilon": 3.0}
    facts = {"parameters": 10_000, "train_samples": 8, "test_samples": 0}
    built = {"type": "initialised", "attempt": 1, "worker": "w", "digest": DIGEST, "size": 9, "facts": facts}
    assert "what the coordinator said" in picture_of(board)
    for event in (submitted, built, closed(1, privacy=SPENT)):
        fact = read_event(event)
        assert fact is not None
        board.take(fact)
    return board


def picture_of(board: Board) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(board))
    return " ".join(str(console.file.getvalue()).split())  # type: ignore[attr-defined]


def test_epsilon_has_a_column_and_the_price_stands_above_the_table() -> None:
    board = private_board()
    header, cells = round_table(board.last(3), None)
    assert header[-1] == "ε"
    assert cells[0][-1] == "1.24"
    picture = picture_of(board)
    assert "over 10,000 parameters a norm of 100, beside a change of at most 1." in picture
    assert "the budget of ε 2 is spent after 4 of 9 rounds" in picture


def test_plain_lines_tell_epsilon_and_what_it_costs() -> None:
    board = private_board()
    fact = read_event(closed(2, privacy=SPENT))
    assert fact is not None
    assert "ε 1.24 at δ 1e-05" in (plain_line(fact, board) or "")


def test_a_job_without_privacy_has_no_such_column() -> None:
    board = Board(JOB)
    fact = read_event(closed(1))
    assert fact is not None
    board.take(fact)
    assert "ε" not in round_table(board.last(1), None)[0]
