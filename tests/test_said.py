"""What a heartbeat carries of a task's output."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages import Heartbeat, JobSpec
from worker.child import Child
from worker.heart import Heart
from worker.said import CHARACTERS, LINES, last_said, log_since, log_size


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (b"", ""),
        (b"\n\n", ""),
        (b"epoch 1\nepoch 2\n", "epoch 1\nepoch 2"),
        (b" 10 %\r 20 %\r 30 %\n", " 30 %"),
        (b" 10 %\r 20 %", " 20 %"),
        (b"one\r\ntwo\r\n", "one\ntwo"),
        (b"\x1b[31mred\x1b[0m \x1b]0;title\x07", "red ?]0;title?"),
        (b"caf\xc3", "caf\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_lines_are_shown_as_a_terminal_would_show_them_at_last(log: bytes, said: str) -> None:
    assert last_said(log) == said


def test_of_many_lines_the_last_are_shown_and_of_long_ones_the_end() -> None:
    many = "".join(f"line {number}\n" for number in range(99)).encode()
    assert last_said(many).split("\n") == [f"line {number}" for number in range(99 - LINES, 99)]
    long = last_said(b"x" * 9_000 + b"!")
    assert (len(long), long[0], long[-1]) == (CHARACTERS, "…", "!")


@given(st.binary(max_size=9_000))
def test_whatever_is_written_fits_a_heartbeat_and_steers_no_terminal(log: bytes) -> None:
    said = last_said(log)
    beat = {"start_id": "s", "assignment": "a", "attempt": 1, "progress": {"doing": "training"}, "said": said}
    assert Heartbeat.model_validate_json(Heartbeat.model_validate(beat).model_dump_json()).said == said
    assert not any(ord(character) < 32 and character not in "\n\t" for character in said)


def test_only_what_came_since_is_read_and_a_log_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    assert (log_size(log), log_since(log, 7)) == (0, b"")
    log.write_bytes(b"before;since")
    assert (log_size(log), log_since(log, 7)) == (12, b"since")
    log.write_bytes(b"anew")
    assert log_since(log, 7) == b"anew"
    log.write_bytes(b"x" * 99_999)
    assert len(log_since(log, 0)) == 4 * CHARACTERS


@pytest.mark.parametrize(
    ("keys", "hides"),
    [
        ({}, False),
        ({"data": {"partition": "dirichlet"}}, False),
        ({"data": {"partition": "local"}}, True),
        ({"secure": {"enabled": True}, "round": {"min_workers": 4}}, True),
        ({"privacy": {"level": "worker", "clip": 1.0, "noise": 1.0, "delta": 1e-5}, "data": {"shards": 4}}, True),
    ],
)
def test_a_job_that_hides_data_hides_what_its_task_prints(keys: dict[str, object], hides: bool) -> None:
    assert JobSpec.model_validate({"task": "digits", **keys}).hides_data is hides


def test_a_beat_tells_what_was_written_since_the_work_began_and_of_hidden_data_nothing(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    log.write_text("of earlier work\n")
    heart = Heart(None, "w", "start", "digits-1.train.1.0", 1, period_s=9.0)  # type: ignore[arg-type]  # never calls
    assert heart._beat().said == ""
    heart.use(Child(log), hears=True)
    with log.open("a") as file:
        file.write("epoch 1: loss 0.3\n")
    assert heart._beat().said == "epoch 1: loss 0.3"
    heart.use(Child(log), hears=False)
    with log.open("a") as file:
        file.write("patient 4711\n")
    assert heart._beat().said == ""
