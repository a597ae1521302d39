"""Logs as JSON: one object a line whatever is logged, with the ids that are known, and no secret."""

import contextvars
import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.facts import Late
from common.logs import JsonFormatter, about, ids, ids_of, json_to_stderr, speaks_json
from server.auth import guard_logs
from tests.acceptance.kit import LocalFleet

LOG = logging.getLogger("lydian.test")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is logged as JSON, on a root logger that has no other handler meanwhile."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    json_to_stderr(logging.INFO)
    yield stream
    logging.captureWarnings(capture=False)


def said(lines: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.getvalue().splitlines()]


def record(message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("lydian.test", logging.INFO, "file.py", 1, message, arguments, None)


@given(st.text())
def test_a_record_is_one_line_of_ascii_whatever_its_text(text: str) -> None:
    line = JsonFormatter().format(record("%s", text))
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["message"] == text


def test_a_line_says_when_how_grave_who_and_what(lines: io.StringIO) -> None:
    LOG.warning("%d of %s", 3, "four")
    (line,) = said(lines)
    assert list(line) == ["time", "level", "logger", "message"]
    assert line["time"].endswith("Z")
    assert (line["level"], line["logger"], line["message"]) == ("warning", "lydian.test", "3 of four")


def test_ids_are_of_the_record_or_of_the_block_around_it(lines: io.StringIO) -> None:
    with about(worker="w-1", attempt=2):
        LOG.info("inside", extra=ids(job="j-1", round=None))
        with about(assignment="j-1.train.3.0", worker="w-2"):
            LOG.info("deeper")
        LOG.info("elsewhere", extra=ids(worker="w-9"))
    LOG.info("after")
    known = [{name: value for name, value in line.items() if name in ("job", "round", "attempt", "worker")}
             for line in said(lines)]  # fmt: skip
    assert known == [
        {"worker": "w-1", "attempt": 2, "job": "j-1"},
        {"worker": "w-2", "attempt": 2, "job": "j-1", "round": 3},
        {"worker": "w-9", "attempt": 2},
        {},
    ]


def test_another_thread_is_about_nothing(lines: io.StringIO) -> None:
    with about(job="j-1"):
        thread = threading.Thread(target=lambda: contextvars.Context().run(LOG.info, "beside"))
        thread.start()
        thread.join()
    assert "job" not in said(lines)[0]


def test_an_assignment_that_is_none_says_no_job(lines: io.StringIO) -> None:
    LOG.info("refused", extra=ids(assignment="../../x\nforged"))
    assert said(lines)[0]["assignment"] == "../../x\nforged"
    assert "job" not in said(lines)[0]


def test_a_field_of_the_record_itself_is_no_id() -> None:
    with pytest.raises(ValueError, match="message: ids are job, round"):
        ids(message="x")


def test_a_fact_has_ids() -> None:
    fact = Late(round=3, shard=1, attempt=2, worker="w-1")
    assert ids_of("j-1", fact) == {"job": "j-1", "round": 3, "shard": 1, "attempt": 2, "worker": "w-1"}
    assert ids_of("j-1", object()) == {"job": "j-1"}


def test_a_traceback_is_inside_its_object_and_a_secret_is_nowhere(lines: io.StringIO) -> None:
    secret = f"lyd_join_{'0' * 12}_{'s' * 43}"
    guard_logs()
    try:
        raise RuntimeError(f"with {secret}")
    except RuntimeError:
        LOG.exception("broke off at %s", secret, stack_info=True)
    (line,) = said(lines)
    assert line["traceback"].startswith("Traceback")
    assert "RuntimeError" in line["traceback"]
    assert "test_logs.py" in line["stack"]
    assert "s" * 43 not in lines.getvalue()


def test_what_ends_the_process_and_what_python_warns_of_are_lines_too(lines: io.StringIO) -> None:
    assert speaks_json()
    error = RuntimeError("the end")
    sys.excepthook(RuntimeError, error, None)
    logging.getLogger("py.warnings").warning("old")
    last, warned = said(lines)
    assert (last["level"], last["message"]) == ("critical", "ended by RuntimeError")
    assert "the end" in last["traceback"]
    assert warned["logger"] == "py.warnings"


def test_text_is_no_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler()])
    assert not speaks_json()


def test_a_fleet_that_logs_json_says_nothing_else_on_stderr(tmp_path: Path) -> None:
    with LocalFleet(tmp_path, LYDIAN_LOG_FORMAT="json") as fleet:
        fleet.start_worker("w1", "--log-format", "json")
        job = fleet.submit(rounds=1, data={"shards": 1})
        fleet.finish(job)
        assert fleet.coordinator is not None
        logs = [fleet.coordinator, fleet.workers["w1"]]
        for process in logs:
            process.terminate()
        coordinator, worker = ([json.loads(line) for line in one.said().splitlines() if line != f"ready {fleet.url}"]
                               for one in logs)  # fmt: skip
    closed = [line for line in coordinator if line.get("job") == job and line.get("round") == 1 and "worker" in line]
    assert closed
    trained = [line for line in worker if line.get("assignment") == f"{job}.train.1.0"]
    assert {(line["job"], line["round"], line["attempt"]) for line in trained} == {(job, 1, 1)}
    assert all("lyd_join" not in line["message"] for line in (*coordinator, *worker))
