"""What becomes of an answer 429 on the caller's side: waited for, as long as was said, and never given up for it."""

from collections.abc import Iterator

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.api import CoordinatorApi
from common.errors import LydianError, TooManyError, UnavailableError, from_answer
from common.transfers import LONGEST_WAIT_S, raise_for
from server.gate import retry_after
from worker import plan

BODY = {"code": "too_many_calls", "sentence": "w makes too many calls", "advice": "Wait."}


def answered(method: str = "GET", status: int = 429, code: str = "too_many_calls", **headers: str) -> LydianError:
    said = {name.replace("_", "-"): value.encode("latin-1") for name, value in headers.items()}
    request = httpx2.Request(method, "http://coordinator/v1/jobs")
    answer = httpx2.Response(
        status, headers=said, json=None if method == "HEAD" else BODY | {"code": code}, request=request
    )
    with pytest.raises(LydianError) as raised:
        raise_for(answer)
    return raised.value


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_error_knows_when_it_may_help_to_call_again(method: str) -> None:
    error = answered(method, Retry_After="7")
    assert isinstance(error, TooManyError)
    assert error.retry_after_s == 7


@pytest.mark.parametrize(
    ("told", "waits_s"),
    [("", 0), ("-1", 0), ("1.5", 0), ("Fri, 31 Dec 1999 23:59:59 GMT", 0), ("9" * 400, LONGEST_WAIT_S), ("\xb2", 0)],
)
def test_what_is_no_number_of_seconds_is_not_believed_and_no_wait_is_without_end(told: str, waits_s: float) -> None:
    error = answered(Retry_After=told)
    assert isinstance(error, TooManyError)
    assert error.retry_after_s == waits_s


def test_a_coordinator_that_stops_is_called_again_as_soon_as_before() -> None:
    error = answered(status=503, code="stopping", Retry_After="1")
    assert isinstance(error, UnavailableError)
    assert plan.wait_s(1, 0.0, error=error) == 0


@pytest.mark.parametrize("code", ["too_many_calls", "too_many_uploads", "too_many_jobs", "one that is not known yet"])
def test_every_429_is_waited_for_and_no_503_is_taken_for_one(code: str) -> None:
    error = from_answer(429, BODY | {"code": code})
    assert isinstance(error, TooManyError)
    assert plan.after(error, resends=99).action == "wait"
    assert type(from_answer(503, BODY | {"code": "stopping"})) is UnavailableError


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True), st.floats(0, 60))
def test_a_worker_is_quiet_at_least_as_long_as_it_was_told(failures: int, jitter: float, told_s: float) -> None:
    waits_s = plan.wait_s(failures, jitter, error=TooManyError("x", retry_after_s=told_s))
    assert told_s <= waits_s <= told_s + plan.LONGEST_WAIT_S
    assert plan.wait_s(failures, jitter, error=UnavailableError("x")) == plan.wait_s(failures, jitter)


@pytest.mark.parametrize(
    ("error", "header"),
    [
        (TooManyError("x", retry_after_s=0.001), "1"),
        (TooManyError("x", retry_after_s=59.2), "60"),
        (TooManyError("x"), None),
        (UnavailableError("x"), "1"),
        (LydianError("x"), None),
    ],
)
def test_the_header_is_whole_seconds_and_is_left_out_where_time_does_not_help(
    error: LydianError, header: str | None
) -> None:
    assert retry_after(error).get("Retry-After") == header


def test_a_stream_of_events_waits_as_long_as_it_was_told_before_it_connects_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries, waits = [TooManyError("x", retry_after_s=9), TooManyError("x")], list[float]()
    monkeypatch.setattr("common.api.time.sleep", waits.append)
    with CoordinatorApi("http://coordinator") as api:

        def stream(job: str, after: int) -> Iterator[dict[str, object]]:
            if tries:
                raise tries.pop(0)
            yield {"type": "job", "state": "finished", "id": 1}

        monkeypatch.setattr(api, "_stream", stream)
        assert [event["id"] for event in api.events("j")] == [1]
    assert waits == [9, 0.5]
