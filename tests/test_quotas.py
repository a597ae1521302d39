"""What one caller may have: each limit holds, frees what was let go, and leaves the others alone."""

import hashlib
import json
import logging
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import TooLargeError, TooManyError
from common.facts import Initialised, StateChanged
from common.messages import ModelFacts, Submitter
from server.coordinator import Coordinator
from server.quotas import CUT_TO, HAND_BACKS, REASONS, REGISTRATION, STREAMS_A_WORKER, Quotas
from server.rounds import Step
from server.settings import Settings
from server.tokens import Principal
from tests.rounds_kit import registration
from tests.trust_kit import JSON, Fleet, Served

ONE, TWO = (Principal("admin", number * 12, None) for number in "12")
WORKER = Principal("work", "3" * 12, "gpu-1")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def quotas(clock: Clock | None = None, **limits: Any) -> Quotas:
    return Quotas(Settings(**limits), clock or Clock())


def code_of(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except TooManyError as error:
        return error.code
    return ""


# ---------------------------------------------------------------- at once


def test_a_worker_uploads_so_many_updates_at_once_each_by_many_streams() -> None:
    limits = quotas()
    with ExitStack() as both:
        for key in (("a", 1), ("b", 1)):
            for _ in range(STREAMS_A_WORKER):
                both.enter_context(limits.uploading("w", key))
        for key in (("a", 1), ("c", 1), ("a", 2)):
            with pytest.raises(TooManyError, match=r"w has .* under way, and 2 uploads at once") as refused:
                limits.uploading("w", key).__enter__()
            assert (refused.value.code, refused.value.retry_after_s) == ("too_many_uploads", 1)
        with limits.uploading("another", ("c", 1)):
            pass
    for key in (("c", 1), ("d", 1)):
        with limits.uploading("w", key):
            pass
    assert limits._uploading == {}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.booleans()), max_size=60))
def test_no_order_of_beginnings_and_ends_lets_a_worker_have_more_or_leaves_anything(
    steps: list[tuple[str, str, bool]],
) -> None:
    limits, open_ones = quotas(), dict[tuple[str, str], list[Any]]()
    for worker, name, begins in steps:
        held = open_ones.setdefault((worker, name), [])
        if begins:
            turn = limits.uploading(worker, (name, 1))
            others = sum(bool(held) for (who, what), held in open_ones.items() if who == worker and what != name)
            if not held and others >= 2:
                assert code_of(turn.__enter__) == "too_many_uploads"
            else:
                turn.__enter__()
                held.append(turn)
        elif held:
            held.pop().__exit__(None, None, None)
    for held in open_ones.values():
        for turn in held:
            turn.__exit__(None, None, None)
    assert limits._uploading == {}


def test_what_a_worker_has_half_sent_makes_way_for_what_it_begins_the_oldest_first() -> None:
    limits, here = quotas(), set[tuple[str, int]]()
    for attempt, dropped in ((1, set()), (2, set()), (3, {("a", 1)}), (4, {("a", 2)})):
        stale = limits.make_way("w", ("a", attempt), here.__contains__)
        assert stale == dropped
        here = here - stale | {("a", attempt)}
    assert limits.make_way("another", ("b", 1), here.__contains__) == set()
    here -= {("a", 3)}  # it was handed in
    assert limits.make_way("w", ("a", 5), here.__contains__) == set()


@given(st.lists(st.sampled_from(["begin", "finish", "restart"]), max_size=40))
def test_no_restart_lets_a_worker_hold_room_for_more_than_it_may_upload_at_once(steps: list[str]) -> None:
    limits, here = quotas(), list[tuple[str, int]]()  # as they lie on the disk, the oldest first
    for number, step in enumerate(steps):
        if step == "begin":
            stale = limits.make_way("w", ("a", number), here.__contains__)
            here = [*(key for key in here if key not in stale), ("a", number)]
        elif step == "finish":
            here = here[1:]
        else:
            limits = quotas()
            for key in here:
                limits.found_staged("w", key)
        assert len(here) <= 2, "the default"


def test_a_token_follows_so_many_event_streams_and_one_that_ends_frees_its_place() -> None:
    limits = quotas(streams=2)
    with limits.streaming(ONE):
        with limits.streaming(ONE):
            assert code_of(limits.streaming(ONE).__enter__) == "too_many_streams"
            with limits.streaming(TWO):
                pass
        with limits.streaming(ONE):
            pass
    assert limits._streams == {}


# ---------------------------------------------------------------- jobs, workers


def test_open_jobs_are_limited_for_each_token_and_in_all() -> None:
    limits, one, two = quotas(jobs=4, jobs_each=2), ONE.token_id, TWO.token_id
    first, second = Submitter(token=one), Submitter(token=two)
    limits.admit_job(first, [one, two, two])
    with pytest.raises(TooManyError, match=r"the token 1{12} has 2 open jobs, and 2 are all") as refused:
        limits.admit_job(first, [one, one, None])
    assert (refused.value.code, refused.value.retry_after_s) == ("too_many_jobs", 0)
    limits.admit_job(second, [one, one, None])
    for caller in (first, second, None):
        assert code_of(limits.admit_job, caller, [None] * 4) == "too_many_jobs"
    limits.admit_job(None, [None] * 3)


def test_no_worker_joins_beyond_those_that_may_and_none_that_says_too_much_of_itself() -> None:
    limits, one = quotas(workers=2), registration("w")
    limits.admit_worker(one, 1)
    limits.admit_worker(one, 0)  # it comes back
    assert code_of(limits.admit_worker, one, 2) == "too_many_workers"
    long = one.model_copy(update={"hardware": one.hardware.model_copy(update={"hostname": "h" * REGISTRATION})})
    with pytest.raises(TooLargeError, match=r"w describes itself in \d+ bytes, where at most 262144 are kept"):
        limits.admit_worker(long, 0)


# ---------------------------------------------------------------- the journal


def test_reports_are_whole_until_there_are_too_many_and_then_their_ends() -> None:
    clock = Clock()
    limits = quotas(clock, report_bytes=5_000)
    report = "é" * 1_000 + "x" * 500
    assert [limits.cut("w", report) for _ in range(2)] == [report] * 2
    cut = limits.cut("w", report)
    assert cut.endswith(report[-CUT_TO:])
    assert cut.startswith("… (cut: the reports of this worker reached 5000 bytes) …\n")
    assert limits.cut("w", "é" * 600) == "é" * 600  # short ones are worth nothing cut
    assert limits.cut("another", report) == report
    clock.now += 3_600
    assert limits.cut("w", report) == report


def test_a_worker_that_ends_attempts_without_a_result_all_the_time_is_given_no_more_than_one_a_second() -> None:
    clock = Clock()
    limits = quotas(clock)
    for _ in range(int(HAND_BACKS.burst)):
        assert limits.may_have_work("w")
        limits.note_hand_back("w")
    assert not limits.may_have_work("w")
    limits.note_hand_back("w")
    assert limits.may_have_work("another")
    clock.now += 1
    assert limits.may_have_work("w")


def test_every_refusal_has_its_reason_among_those_that_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "lydian.limits")
    limits = quotas(jobs=1, workers=1, streams=1, calls_burst=1, stranger_calls_burst=1, report_bytes=1_000)
    limits.connection_refused("192.0.2.1", 5)
    assert limits.call(WORKER, "") is None
    for caller in (WORKER, None, None):
        limits.call(caller, "192.0.2.1")
    limits.cut("w", "x" * 1_001)
    for _ in range(int(HAND_BACKS.burst) + 1):
        limits.note_hand_back("w")
    code_of(limits.admit_job, None, [None])
    code_of(limits.admit_worker, registration("w"), 1)
    with limits.streaming(ONE):
        code_of(limits.streaming(ONE).__enter__)
    with limits.uploading("w", ("a", 1)), limits.uploading("w", ("b", 1)):
        code_of(limits.uploading("w", ("c", 1)).__enter__)
    counted = {reason for reason, times in limits.refusals.counts.items() if times == 1}
    assert counted == set(REASONS) - {"host", "origin"}
    assert len(caplog.messages) == len(counted)
    assert any(message.startswith("gpu-1: gpu-1 makes too many calls") for message in caplog.messages)


# ---------------------------------------------------------------- by the application


def test_the_application_asks_for_each_limit_where_it_matters(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "state", jobs=2, workers=2, uploads=1, report_bytes=1_000)
    try:
        body = b'{"key": "%s", "spec": {"task": "digits"}}'
        fleet.must("POST", "/v1/jobs", fleet.admin, {"key": "two", "spec": {"task": "digits"}})
        refused = fleet.call("POST", "/v1/jobs", fleet.admin, body % b"three", JSON)
        assert (refused.status, refused.code) == (429, "too_many_jobs")
        assert fleet.call("POST", "/v1/jobs", fleet.admin, body % b"two", JSON).status == 201  # it is there already
        with pytest.raises(AssertionError, match="too_many_workers"):
            fleet.member("three")
        first = fleet.work
        assert fleet.upload(first, fleet.one.token, b"x" * 100).status == 204
        second = fleet.assignment(fleet.one)
        first_name = f"{first['id']}.{first['attempt']}"
        assert [name for name in fleet.files() if first_name in name] != []
        assert fleet.upload(second, fleet.one.token, b"y" * 100).status == 204
        assert [name for name in fleet.files() if first_name in name] == []
        detail = {"attempt": second["attempt"], "code": "released", "sentence": "", "detail": "x" * 100_000}
        fleet.must("POST", f"/v1/updates/{second['id']}/abandon", fleet.one.token, detail)
        (log,) = [e for e in fleet.call("GET", f"/v1/jobs/{fleet.job}/logs", fleet.admin).json() if e["detail"]]
        assert len(log["detail"]) < 1_200
    finally:
        fleet.close()


def test_what_a_worker_had_half_sent_before_a_restart_makes_way_for_what_it_begins_after_it(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "state", uploads=1)
    try:
        name = f"{fleet.work['id']}.{fleet.work['attempt']}"
        assert fleet.upload(fleet.work, fleet.one.token, b"x" * 100).status == 204
        fleet.close()
        Served.__init__(fleet, tmp_path / "state", uploads=1)
        second = fleet.assignment(fleet.one)
        assert [file for file in fleet.files() if name in file] != []
        assert fleet.upload(second, fleet.one.token, b"y" * 100).status == 204
        assert [file for file in fleet.files() if name in file] == []
    finally:
        fleet.close()


# ---------------------------------------------------------------- what stays on the disk


@settings(max_examples=6, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["submit", "build", "cancel", "restart"]), st.integers(0, 2)), min_size=1, max_size=10
    )
)
def test_a_task_file_is_there_as_long_as_a_job_that_names_it_goes_on_or_has_a_model_and_no_longer(
    steps: list[tuple[str, int]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        served = Served(Path(folder) / "state")
        try:
            _play_task_files(served, steps)
        finally:
            served.close()


def _play_task_files(served: Served, steps: list[tuple[str, int]]) -> None:
    files, jobs, built = [f"# {number}\n" for number in range(3)], list[tuple[str, int]](), set[str]()
    for number, (step, which) in enumerate(steps):
        job = jobs[which % len(jobs)][0] if jobs else ""
        if step == "submit":
            sent = {"key": f"k{number}", "spec": {"task": "mine"}, "task_source": files[which]}
            answer = served.call("POST", "/v1/jobs", served.admin, json.dumps(sent).encode(), JSON)
            jobs.append((answer.json()["id"], which))
        elif step == "build" and job and served.coordinator.jobs[job].phase.state == "queued":
            served.run(_build(served.coordinator, job))
            built.add(job)
        elif step == "cancel" and job:
            served.call("POST", f"/v1/jobs/{job}/cancel", served.admin)
        elif step == "restart":
            served.close()
            Served.__init__(served, served.folder)
        wanted = {which for job, which in jobs if job in built or not served.coordinator.jobs[job].over}
        digests = [hashlib.sha256(text.encode()).hexdigest() for text in files]
        assert {which for which in range(3) if served.coordinator.blobs.has(digests[which])} == wanted
        statuses = {served.call("GET", f"/v1/tasks/{digests[which]}", served.admin).status for which in wanted}
        assert statuses <= {200}


async def _build(coordinator: Coordinator, job: str) -> None:
    """A job gets its first model."""
    digest = coordinator.blobs.put_bytes(job.encode())
    facts = ModelFacts(parameters=1, train_samples=2, test_samples=0, bounds=(0, 2))
    made = Initialised(attempt=1, worker="w", digest=digest, size=len(job), facts=facts)
    coordinator._apply(job, Step((StateChanged(state="initialising", reason="for a test"), made), "built"))
