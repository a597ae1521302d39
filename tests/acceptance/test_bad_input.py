"""What is wrong is refused with a code and a sentence of its own, and nothing is lost by it.

One real coordinator; the worker is played by the test, call by call.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from common import PROTOCOL, errors
from common.api import CoordinatorApi
from common.errors import LydianError
from common.messages import (
    TOGETHER,
    Abandon,
    Assignment,
    Heartbeat,
    ModelFacts,
    PollRequest,
    Progress,
    Submission,
)
from common.ranges import parse_ranges
from common.together import submission_header
from common.weights import Notes, load, save
from server.app import create_app
from tests.acceptance.kit import LocalFleet, of_type
from tests.acceptance.played import MODEL, Played, sha, update
from tests.rounds_kit import registration

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path_factory.mktemp("fleet")) as running:
        yield running


@pytest.fixture
def worker(fleet: LocalFleet, request: pytest.FixtureRequest) -> Iterator[Played]:
    played = Played(fleet, f"p-{abs(hash(request.node.name)) % 10**9}")
    yield played
    for job in fleet.api.jobs():
        if job.state not in ("finished", "failed", "cancelled"):
            fleet.api.cancel(job.id)
    played.api.leave(played.id, "s1")
    played.api.close()


@pytest.fixture
def job(fleet: LocalFleet, worker: Played) -> str:
    job = fleet.submit(rounds=2, data={"shards": 2})
    worker.init()
    return job


def refused(kind: type[LydianError], code: str, call: Callable[[], object]) -> LydianError:
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.code == code
    assert str(caught.value)
    return caught.value


# ---------------------------------------------------------------- tokens


def test_every_route_needs_a_token_but_two_and_the_empty_pages(fleet: LocalFleet) -> None:
    calls = list(_calls(create_app().routes))
    assert len(calls) > 20
    with httpx2.Client(base_url=fleet.url, timeout=60) as stranger:
        statuses = {(method, path): stranger.request(method, path).status_code for method, path in calls}
    public = {path for (_, path), status in statuses.items() if status != 401}
    assert public == {"/healthz", "/version", "/", "/submit", "/jobs/job", "/static/file"}


def _calls(routes: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """(method, path) of every route, inside included routers too."""
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from _calls(inner.routes)
        for method in getattr(route, "methods", None) or ():
            yield method, route.path.replace("{", "").replace("}", "")


def test_a_wrong_token_is_refused_without_being_echoed(fleet: LocalFleet) -> None:
    with CoordinatorApi(fleet.url, "lyd_admin_deadbeef_" + "x" * 43) as stranger:
        error = refused(errors.UnauthenticatedError, "bad_token", stranger.jobs)
    assert "xxxx" not in error.lines()


def test_a_missing_token_has_a_code_of_its_own(fleet: LocalFleet) -> None:
    with CoordinatorApi(fleet.url) as stranger:
        refused(errors.UnauthenticatedError, "no_token", stranger.jobs)


def test_a_worker_may_not_submit_jobs_and_a_join_token_may_only_join(fleet: LocalFleet, worker: Played) -> None:
    refused(errors.ForbiddenError, "forbidden", worker.api.jobs)
    with CoordinatorApi(fleet.url, (fleet.state / "join.token").read_text().strip()) as joining:
        refused(errors.ForbiddenError, "forbidden", joining.workers)


def test_a_worker_may_not_call_as_another(fleet: LocalFleet, worker: Played) -> None:
    request = PollRequest(start_id="s1", claim_key="k", wait_s=0)
    refused(errors.ForbiddenError, "not_yours", lambda: worker.api.poll("somebody-else", request))


def test_a_worker_cannot_touch_another_workers_assignment(fleet: LocalFleet, worker: Played, job: str) -> None:
    work = worker.poll()
    thief = Played(fleet, "thief")
    file = fleet.folder / "stolen"
    save(file, MODEL, Notes())
    refused(errors.NotFoundError, "unknown_attempt", lambda: thief.api.upload(work.id, work.attempt, file))
    refused(errors.NotFoundError, "unknown_attempt", lambda: thief.hand_in(work, MODEL))
    given = Abandon(attempt=work.attempt, code="released", sentence="mine now")
    refused(errors.NotFoundError, "unknown_attempt", lambda: thief.api.abandon(work.id, given))
    thief.api.leave(thief.id, "s1")
    thief.api.close()
    worker.hand_in(work, MODEL)


# ---------------------------------------------------------------- things that are not there


def test_unknown_things_are_named(fleet: LocalFleet, worker: Played, tmp_path: Path) -> None:
    refused(errors.NotFoundError, "unknown_job", lambda: fleet.api.job("no-such"))
    refused(errors.NotFoundError, "unknown_job", lambda: fleet.api.cancel("no-such"))
    refused(errors.NotFoundError, "unknown_job", lambda: fleet.api.pull("no-such", tmp_path / "x"))
    refused(errors.NotFoundError, "unknown_worker", lambda: fleet.api.drain("no-such"))
    refused(errors.NotFoundError, "unknown_model", lambda: worker.api.download_model("0" * 64, tmp_path / "x"))
    refused(errors.NotFoundError, "unknown_task", lambda: worker.api.download_task("0" * 64, tmp_path / "x"))
    wrong = Submission(attempt=1)
    refused(errors.NotFoundError, "unknown_assignment", lambda: worker.api.submit("not-one", wrong))
    refused(errors.NotFoundError, "unknown_job", lambda: worker.api.submit("no-such.train.1.0", wrong))


def test_a_round_whose_model_does_not_exist_is_unknown_and_says_what_is_kept(
    fleet: LocalFleet, worker: Played, job: str, tmp_path: Path
) -> None:
    error = refused(errors.NotFoundError, "unknown_model", lambda: fleet.api.pull(job, tmp_path / "x", which="7"))
    assert "rounds kept: 0" in str(error)
    refused(errors.NotFoundError, "unknown_model", lambda: fleet.api.pull(job, tmp_path / "x", which="best"))


def test_an_unknown_task_names_the_built_in_ones(fleet: LocalFleet) -> None:
    error = refused(errors.BadTaskError, "bad_task", lambda: fleet.submit(task="no-such"))
    assert "digits" in str(error)


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"not json",
        b'{"key": "k", "spec": {"task": "digits", "rounds": "many"}}',
        b'{"key": "k", "spec": {"task": "digits", "round": {"quorum": 0}}}',
        b'{"key": "k", "spec": {"task": "digits", "url": "file:///etc/passwd"}}',
        b'{"key": "k", "spec": {"task": "../../etc"}}',
    ],
)
def test_a_malformed_job_is_refused_naming_the_field(fleet: LocalFleet, body: bytes) -> None:
    headers = {"Authorization": f"Bearer {fleet.admin_token}", "Content-Type": "application/json"}
    answer = httpx2.post(f"{fleet.url}/v1/jobs", content=body, headers=headers, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["code"] == "bad_request"
    assert answer.json()["sentence"]


def test_the_same_key_gives_the_same_job_and_another_spec_is_a_conflict(fleet: LocalFleet) -> None:
    from common.messages import JobRequest, JobSpec

    one = JobRequest(spec=JobSpec(task="digits"), key="the-key")
    first, again = fleet.api.submit_job(one), fleet.api.submit_job(one)
    assert first.id == again.id
    other = JobRequest(spec=JobSpec(task="digits", rounds=9), key="the-key")
    refused(errors.ConflictError, "key_reused", lambda: fleet.api.submit_job(other))
    fleet.api.cancel(first.id)


# ---------------------------------------------------------------- updates that must not count


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"w": np.array([[0, np.nan, 0], [0, 0, 0]], dtype=np.float32)}, "not_finite", "w"),
        ({"b": np.array([0, np.inf], dtype=np.float32)}, "not_finite", "b"),
        ({"w": np.zeros((3, 2), dtype=np.float32)}, "wrong_shape", "w"),
        ({"w": np.zeros((2, 3), dtype=np.float64)}, "wrong_dtype", "w"),
        ({"w": None}, "missing_tensor", "w"),
        ({"extra": np.zeros(1, dtype=np.float32)}, "extra_tensor", "extra"),
    ],
)
def test_a_bad_update_is_refused_naming_the_tensor_and_its_shard_is_trained_again(
    fleet: LocalFleet, worker: Played, job: str, change: dict[str, np.ndarray | None], code: str, named: str
) -> None:
    work = worker.poll()
    arrays = {name: array for name, array in {**MODEL, **change}.items() if array is not None}
    error = refused(errors.BadUpdateError, code, lambda: worker.hand_in(work, arrays))
    assert named in str(error)
    again = worker.poll()
    assert (again.id, again.attempt) == (work.id, work.attempt + 1)
    worker.hand_in(again, MODEL)
    assert [e.code for e in fleet.api.logs(job)] == [code]


@pytest.mark.parametrize("samples", [0, 6, 2**52])
def test_a_wrong_number_of_samples_is_refused(fleet: LocalFleet, worker: Played, job: str, samples: int) -> None:
    work = worker.poll()
    refused(errors.BadUpdateError, "bad_samples", lambda: worker.hand_in(work, MODEL, samples=samples))
    assert worker.poll().id == work.id


def test_damaged_bytes_are_asked_for_again_and_cost_no_strike(fleet: LocalFleet, worker: Played, job: str) -> None:
    work = worker.poll()
    for _ in range(4):
        refused(errors.BadUpdateError, "digest_mismatch", lambda: worker.hand_in(work, MODEL, digest="f" * 64))
    worker.hand_in(work, MODEL)
    assert fleet.api.logs(job) == []


def test_three_refusals_set_a_worker_aside_visibly(fleet: LocalFleet, worker: Played, job: str) -> None:
    for _ in range(3):
        work = worker.poll()
        refused(errors.BadUpdateError, "missing_tensor", lambda work=work: worker.hand_in(work, {"b": MODEL["b"]}))
    shown = next(w for w in fleet.api.workers() if w.id == worker.id)
    assert shown.state == "set aside"
    assert "3 results were refused" in shown.reason
    assert worker.api.poll(worker.id, PollRequest(start_id="s1", claim_key="x", wait_s=0.1)) is None


def test_an_update_too_large_for_its_model_is_refused_before_its_bytes(worker: Played, job: str) -> None:
    work = worker.poll()
    headers = {"Content-Range": f"bytes 0-9/{work.max_bytes + 1}"}
    error = refused(errors.BadUpdateError, "wrong_length", lambda: _put(worker, work, b"0123456789", headers))
    assert str(work.max_bytes) in str(error)


@pytest.mark.parametrize("header", ["bytes 0-9/*", "bytes 9-0/10", "items 0-9/10", "bytes 0-99/10", "bytes 0-3/10"])
def test_a_malformed_content_range_is_refused(worker: Played, job: str, header: str) -> None:
    work = worker.poll()
    headers = {"Content-Range": header}
    with pytest.raises(LydianError) as caught:
        _put(worker, work, b"0123456789", headers)
    assert caught.value.status in (400, 422)


def _put(worker: Played, work: Assignment, body: bytes, headers: dict[str, str]) -> None:
    answer = httpx2.put(
        f"{worker.fleet.url}/v1/updates/{work.id}?attempt={work.attempt}",
        content=body,
        headers={"Authorization": f"Bearer {worker.token}", **headers},
        timeout=60,
    )
    if answer.status_code >= 400:
        raise errors.from_answer(answer.status_code, answer.json())


def test_an_upload_in_any_order_with_repeats_arrives_whole(fleet: LocalFleet, worker: Played, job: str) -> None:
    work = worker.poll()
    file = fleet.folder / "pieces"
    save(file, MODEL, Notes())
    data = file.read_bytes()
    for start in (40, 0, 40, 20, 60):
        piece = data[start : start + 20] if start < 60 else data[60:]
        _put(worker, work, piece, {"Content-Range": f"bytes {start}-{start + len(piece) - 1}/{len(data)}"})
    worker.api.submit(work.id, Submission(attempt=work.attempt, digest=sha(file), samples=5))


def test_a_submission_before_its_bytes_says_how_many_are_here(worker: Played, job: str) -> None:
    work = worker.poll()
    _put(worker, work, b"01234", {"Content-Range": "bytes 0-4/200"})
    early = Submission(attempt=work.attempt, digest="0" * 64, samples=5)
    error = refused(errors.ConflictError, "incomplete", lambda: worker.api.submit(work.id, early))
    assert "5 of 200 bytes" in str(error)


def test_a_repeated_submission_gets_the_same_answer_even_after_the_round(
    fleet: LocalFleet, worker: Played, job: str
) -> None:
    works = [worker.poll()]
    worker.hand_in(works[0], MODEL)
    works.append(worker.poll())
    worker.hand_in(works[1], MODEL)
    fleet.await_event(job, lambda e: e["type"] == "round", "round 1")
    file = fleet.folder / "same"
    save(file, MODEL, Notes())
    again = Submission(attempt=1, digest=sha(file), samples=5)
    assert worker.api.submit(works[0].id, again).repeat
    other = Submission(attempt=1, digest="0" * 64, samples=5)
    refused(errors.LateError, "late", lambda: worker.api.submit(works[0].id, other))


def test_a_submission_for_a_cancelled_job_is_told_so(fleet: LocalFleet, worker: Played, job: str) -> None:
    work = worker.poll()
    fleet.api.cancel(job)
    refused(errors.JobOverError, "job_over", lambda: worker.api.submit(work.id, Submission(attempt=1, digest="0" * 64)))
    beat = Heartbeat(start_id="s1", assignment=work.id, attempt=1, progress=Progress(doing="training"))
    assert worker.api.heartbeat(worker.id, beat).order == "cancelled"


def test_the_same_claim_gets_the_same_assignment_and_another_gets_another(worker: Played, job: str) -> None:
    request = PollRequest(start_id="s1", claim_key="one", wait_s=1)
    first, again = worker.api.poll(worker.id, request), worker.api.poll(worker.id, request)
    assert first == again
    other = worker.api.poll(worker.id, PollRequest(start_id="s1", claim_key="two", wait_s=1))
    assert first is not None
    assert other is not None
    assert other.assignment is not None
    assert first.assignment is not None
    assert (other.assignment.id, other.assignment.attempt) == (first.assignment.id, 2)


def test_an_older_process_of_a_worker_is_told_that_it_was_superseded(worker: Played, job: str) -> None:
    request = PollRequest(start_id="an-older-start", claim_key="x", wait_s=0)
    refused(errors.SupersededError, "superseded", lambda: worker.api.poll(worker.id, request))


def test_a_worker_of_another_protocol_is_told_which_side_to_upgrade(fleet: LocalFleet) -> None:
    with CoordinatorApi(fleet.url, (fleet.state / "join.token").read_text().strip()) as api:
        newer = registration("newer", protocol=PROTOCOL + 1)
        error = refused(errors.VersionSkewError, "version_skew", lambda: api.register(newer))
        assert error.advice == "Upgrade the coordinator."
        older = registration("older", protocol=0)
        assert (
            refused(errors.VersionSkewError, "version_skew", lambda: api.register(older)).advice
            == "Upgrade this worker."
        )


def test_a_model_with_a_cut_that_loses_samples_is_refused_and_built_again(fleet: LocalFleet, worker: Played) -> None:
    job = fleet.submit(rounds=1, data={"shards": 2})
    facts = ModelFacts(parameters=8, train_samples=10, test_samples=0, bounds=(0, 5, 9))
    refused(errors.BadUpdateError, "bad_samples", lambda: worker.init(facts=facts))
    assert [entry.code for entry in fleet.api.logs(job)] == ["bad_samples"]
    assert worker.init().attempt == 2
    assert fleet.api.job(job).state == "training"


def test_a_small_model_comes_with_its_work_to_whoever_asks_and_lacks_it(worker: Played, job: str) -> None:
    came: dict[str, bytes] = {}

    def poll(**fields: object) -> Assignment:
        asked = {"start_id": "s1", "claim_key": os.urandom(4).hex(), **fields}
        answer = worker.api.poll(worker.id, PollRequest.model_validate(asked), keep=came.__setitem__)
        assert answer is not None
        assert answer.assignment is not None
        return answer.assignment

    base = poll().base
    assert base is not None
    assert not came
    assert poll(together=base.size - 1).base == base
    assert poll(together=TOGETHER, models=[base.digest]).base == base
    assert not came
    assert poll(together=base.size).base == base
    assert len(came[base.digest]) == base.size


def test_an_update_and_its_submission_in_one_call_count_once(fleet: LocalFleet, worker: Played, job: str) -> None:
    work = worker.poll()
    file = worker.file(work, update(1))
    submission = Submission(attempt=work.attempt, digest=sha(file), samples=5)
    first, again = (worker.api.hand_in(work.id, file, submission) for _ in range(2))
    assert first is not None
    assert again is not None
    assert (first.repeat, again.repeat) == (False, True)
    fleet.api.cancel(job)
    assert len(list(of_type(fleet.facts(job), "accepted"))) == 1


def test_a_submission_that_does_not_belong_to_its_bytes_is_refused_before_them(
    fleet: LocalFleet, worker: Played, job: str
) -> None:
    work = worker.poll()
    file = worker.file(work, update(1))
    size, headers = file.stat().st_size, {"Authorization": f"Bearer {worker.token}"}
    url = f"{fleet.url}/v1/updates/{work.id}?attempt={work.attempt}"

    def put(header: str, span: str, data: bytes) -> httpx2.Response:
        given = {**headers, "Lydian-Submission": header, "Content-Range": span}
        return httpx2.put(url, content=data, headers=given, timeout=60)

    whole, data = f"bytes 0-{size - 1}/{size}", file.read_bytes()
    mine = submission_header(Submission(attempt=work.attempt, digest=sha(file), samples=5))
    other = submission_header(Submission(attempt=work.attempt + 1, digest=sha(file), samples=5))
    assert mine is not None
    assert other is not None
    for answer in (put("nonsense", whole, data), put(other, whole, data), put(mine, f"bytes 0-0/{size}", data[:1])):
        assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert put("x" * 9_000, whole, data).status_code in (400, 422)
    held = httpx2.head(url, headers=headers, timeout=60)
    assert parse_ranges(held.headers["Lydian-Ranges"]) == ()
    assert put(mine, whole, data).json()["repeat"] is False


def test_the_metrics_count_workers_jobs_and_rounds(fleet: LocalFleet, worker: Played, job: str) -> None:
    worker.poll()
    headers = {"Authorization": f"Bearer {fleet.admin_token}"}
    text = httpx2.get(f"{fleet.url}/metrics", headers=headers, timeout=60).text
    assert f'lydian_rounds_total{{job_id="{job}"}} 0.0' in text
    assert 'lydian_jobs{state="training"} 1.0' in text
    assert 'lydian_workers{state="working"} 1.0' in text
    assert "lydian_leases 1.0" in text


def test_nothing_is_lost_by_all_this(fleet: LocalFleet, worker: Played, job: str) -> None:
    """The worker that behaves: its job ends, and the mean is right."""
    for round_index in (1, 2):
        for shard in (0, 1):
            work = worker.poll()
            assert (work.round, work.shard) == (round_index, shard)
            worker.hand_in(work, {"w": MODEL["w"] + shard, "b": MODEL["b"]})
    view = fleet.finish(job)
    assert view.round == 2
    pulled = load(fleet.pull(job))
    assert np.array_equal(pulled["w"], MODEL["w"] + 0.5)
    assert len(list(of_type(fleet.facts(job), "accepted"))) == 4
