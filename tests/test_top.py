"""`lydian top`: what is shown first, what fits the screen, and what becomes of it while the coordinator is away."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.top import Glance, Lookout, Paces, by_trouble, document, keys, picture, screen
from common.errors import ForbiddenError, UnavailableError
from common.messages import JobView, WorkerView

AT = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
URL = "http://gpu-box:8470"


def worker(name: str, state: str = "working", **other: Any) -> WorkerView:
    torch = {"version": "2.11", "device": "cuda", "threads": 4, "name": "RTX 3090", "memory": 24_000_000_000}
    hardware = {
        "hostname": name, "system": "Linux", "python": "3.12", "cpu": "x", "cores": 8, "memory": 64_000_000_000,
        "torch": torch,
    }  # fmt: skip
    fields = {
        "id": f"{name}-1", "name": name, "state": state, "reason": f"{state} it is", "last_seen_s": 1.0,
        "version": "0.1.0", "hardware": hardware, "data": [], "trust": "none",
    }  # fmt: skip
    return WorkerView.model_validate(fields | other)


def job(name: str = "digits-1", state: str = "training", **other: Any) -> JobView:
    fields = {
        "id": name, "name": "numbers", "task": "digits", "state": state, "reason": "waiting for 2 updates",
        "submitted_at": "2026-01-01T11:50:00Z", "round": 2, "rounds": 10, "metrics": {"accuracy": 0.9},
        "spec": {"task": "digits", "rounds": 10},
    }  # fmt: skip
    return JobView.model_validate(fields | other)


def texts(glance: Glance, height: int | None = None) -> list[str]:
    return [line.text for line in screen(glance, {}, url=URL, height=height)]


def test_who_needs_a_person_stands_first_and_who_left_long_ago_last() -> None:
    fleet = [
        worker("a-works"),
        worker("b-idle", "idle"),
        worker("c-gone", "gone", last_seen_s=30.0),
        worker("d-left", "gone", last_seen_s=90_000.0),
        worker("e-bad", "set aside"),
        worker("f-full", "degraded"),
        worker("g-late", speeds=[{"job": "digits-1", "expected_in_s": -5.0}]),
        worker("h-paused", "paused"),
    ]
    assert [one.name[0] for one in by_trouble(fleet)] == ["e", "f", "c", "g", "h", "b", "a", "d"]


def test_a_worker_s_row_has_its_device_memory_temperature_path_speed_and_work() -> None:
    progress = {
        "doing": "training", "step": 12, "steps": 40, "samples_per_s": 1234.0, "loss": 0.5,
        "memory_used": 11_000_000_000, "temperature": 71.0,
    }  # fmt: skip
    one = worker(
        "gpu", assignment="digits-1: train of round 3", progress=progress, path={"kind": "relay", "via": "fra"}
    )
    shown = next(text for text in texts(Glance(AT, (job(),), (one,))) if text.startswith("gpu"))
    for part in ("cuda RTX 3090", "11.0 GB of 24.0 GB", "71 °C", "relay", "1,234/s", "training 12/40", "working it is"):
        assert part in shown
    row = next(text for text in texts(Glance(AT, (job(),), (one,))) if text.startswith("digits-1"))
    assert "2/10" in row
    assert "0.500" in row  # the mean of what workers report of it now
    assert "waiting for 2 updates" in row


@given(st.integers(0, 600), st.integers(0, 60), st.integers(14, 60))
def test_the_screen_is_never_higher_than_the_terminal_and_the_rest_is_counted(
    workers: int, jobs: int, height: int
) -> None:
    fleet = tuple(FLEET[:workers])
    shown = texts(Glance(AT, tuple(JOBS[:jobs]), fleet), height)
    assert len(shown) <= height
    listed = sum(text.startswith("w-") for text in shown)
    counted = [text for text in shown if text.startswith("… and") and "working" in text]
    rest = int(counted[0].split()[2]) if counted else 0
    assert listed + rest == workers


FLEET = [worker(f"w-{number:03d}") for number in range(600)]
JOBS = [job(f"digits-{number}") for number in range(60)]


def test_five_hundred_workers_and_one_in_trouble_show_that_one() -> None:
    fleet = (*FLEET[:499], worker("zz-broken", "set aside"))
    shown = texts(Glance(AT, (job(),), fleet), 24)
    assert next(text for text in shown if text.startswith(("w-", "zz"))).startswith("zz-broken")
    assert "500 workers: 499 working, 1 set aside" in shown[0]


def test_without_workers_and_jobs_it_says_what_comes_next() -> None:
    shown = "\n".join(texts(Glance(AT)))
    assert "lydian submit --help" in shown
    assert "lydian serve" in shown


def test_what_a_worker_says_cannot_steer_the_terminal() -> None:
    shown = "\n".join(texts(Glance(AT, (job(reason="\x1b[2J"),), (worker("w", reason="a\x1b[31m\nb"),))))
    assert "\x1b" not in shown


def test_the_picture_has_a_line_each_and_says_how_to_leave() -> None:
    from rich.console import Console

    console = Console(width=60, height=20, file=None, record=True, force_terminal=False)
    with console.capture() as captured:
        console.print(picture(Glance(AT, tuple(JOBS), tuple(FLEET)), {}, url=URL, height=20))
    lines = captured.get().splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 60
    assert lines[-1] == "q leaves"


def test_json_is_one_document_on_one_line() -> None:
    line = document(Glance(AT, (job(),), (worker("gpu"),), away="gone"), {"digits-1": 12.5})
    assert "\n" not in line
    found = json.loads(line)
    assert found["jobs"][0]["left_s"] == 12.5
    assert (found["away"], found["at"], found["workers"][0]["name"]) == ("gone", "2026-01-01T12:00:00Z", "gpu")


# ---------------------------------------------------------------- how long


def test_the_time_left_follows_the_rounds_that_were_seen_to_close() -> None:
    paces = Paces()
    for now, rounds in ((0.0, 2), (5.0, 3), (15.0, 4), (25.0, 5)):  # the first was seen in the middle
        paces.take([job(round=rounds)], now, AT)
    assert paces.left_s(job(round=5), 25.0) == pytest.approx(50.0)
    assert paces.left_s(job(round=5), 27.0) == pytest.approx(48.0)
    assert paces.left_s(job(round=5), 900.0) == 0.0


def test_before_that_it_follows_the_time_since_the_job_was_sent() -> None:
    paces = Paces()
    paces.take([job()], 0.0, AT)  # two rounds in ten minutes
    assert paces.left_s(job(), 0.0) == pytest.approx(2_400.0)


@pytest.mark.parametrize("state", ["queued", "initialising", "paused", "finished", "failed"])
def test_of_a_job_that_does_not_train_nothing_is_foretold(state: str) -> None:
    paces = Paces()
    paces.take([job(state=state)], 0.0, AT)
    assert paces.left_s(job(state=state), 0.0) is None


def test_before_the_first_round_nothing_is_foretold() -> None:
    paces = Paces()
    paces.take([job(round=0)], 0.0, AT)
    assert paces.left_s(job(round=0), 1.0) is None
    assert paces.left_s(job("other"), 1.0) is None


# ---------------------------------------------------------------- a coordinator that comes and goes


class Played:
    """A coordinator that is there, or not."""

    def __init__(self) -> None:
        self.url = URL
        self.error: Exception | None = None

    def jobs(self) -> list[JobView]:
        if self.error is not None:
            raise self.error
        return [job()]

    def workers(self) -> list[WorkerView]:
        return [worker("gpu")]

    def wall_clock(self) -> datetime:
        return AT + timedelta(days=1)


def test_while_the_coordinator_is_away_the_last_picture_stays_and_says_since_when() -> None:
    api, now = Played(), 0.0
    lookout = Lookout(api, lambda: now)  # type: ignore[arg-type]
    assert lookout.look().away == ""
    api.error, now = UnavailableError("nobody answers at gpu-box", code="unreachable"), 2.0
    lookout.look()
    now = 14.0
    away = lookout.look()
    assert "no answer for 12.0 s, asking again: nobody answers at gpu-box" in away.away
    assert away.workers
    api.error, now = None, 16.0
    back = lookout.look()
    assert (back.away, back.back) == ("", "the coordinator is back, after 14.0 s")
    now = 60.0
    assert lookout.look().back == ""


def test_one_that_never_answered_and_one_that_refuses_are_errors() -> None:
    api = Played()
    api.error = UnavailableError("nobody answers", code="unreachable")
    with pytest.raises(UnavailableError):
        Lookout(api).look()  # type: ignore[arg-type]
    api.error = None
    lookout = Lookout(api)  # type: ignore[arg-type]
    lookout.look()
    api.error = ForbiddenError("not you")
    with pytest.raises(ForbiddenError):
        lookout.look()


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("typed", [b"q", b"Q", b"xyq"])
def test_q_leaves_and_the_terminal_is_as_it_was(typed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import pty
    import termios

    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    with os.fdopen(ours, "wb", buffering=0) as keyboard, os.fdopen(theirs, "r") as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        with keys() as pressed:
            keyboard.write(typed)
            assert pressed(30.0)
            assert not pressed(0.01)
        assert termios.tcgetattr(theirs) == before


def test_without_a_terminal_to_read_from_nothing_is_pressed(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("q"))
    with keys() as pressed:
        assert not pressed(0.01)
