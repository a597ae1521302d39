"""Jobs that begin with a model: what the coordinator answers, keeps and deletes. The real application, no socket."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.ranges import content_range
from common.weights import Notes, save
from server import given, views
from tests.rounds_kit import spec
from tests.trust_kit import JSON, TASK_FILE, Answer, Fleet, Served, weights


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    running = Fleet(tmp_path / "state", max_model_bytes=1 << 20)
    yield running
    running.close()


def file_of(folder: Path, number: float = 1.0) -> tuple[bytes, str]:
    save(folder / "weights.safetensors", {"w": np.full((2, 3), number, np.float32)}, Notes())
    data = (folder / "weights.safetensors").read_bytes()
    return data, hashlib.sha256(data).hexdigest()


def submit(fleet: Served, token: str, init: str, key: str = "begun", **more: Any) -> Answer:
    fields = spec(task="mine", init=init, data={"shards": 2}, **more).model_dump(mode="json")
    request = {"spec": fields, "task_source": TASK_FILE, "key": key}
    return fleet.call("POST", "/v1/jobs", token, json.dumps(request).encode(), JSON)


def send(fleet: Served, token: str, digest: str, data: bytes, start: int = 0, stop: int | None = None) -> Answer:
    stop = len(data) if stop is None else stop
    headers = {"Content-Range": content_range(start, stop, len(data))}
    return fleet.call("PUT", f"/v1/models/{digest}", token, data[start:stop], headers)


def held(fleet: Served, token: str, digest: str) -> str:
    return fleet.call("HEAD", f"/v1/models/{digest}", token).headers["lydian-ranges"]


# ---------------------------------------------------------------- another job's model


@pytest.mark.parametrize("which", ["{job}", "{job}@newest", "{job}@0", "mine", "sha256:{model}"])
def test_a_job_is_resolved_to_one_digest_when_it_is_submitted(fleet: Fleet, which: str) -> None:
    answer = submit(fleet, fleet.other_submitter, which.format(job=fleet.job, model=fleet.model))
    assert answer.status == 201, answer.json()
    begun = answer.json()["begins_with"]
    assert (begun["digest"], begun["job"], begun["round"]) == (fleet.model, fleet.job, 0)
    assert fleet.coordinator.jobs[answer.json()["id"]].begins_with is not None


def test_what_is_not_there_is_refused_with_what_there_is(fleet: Fleet) -> None:
    before = dict(fleet.coordinator.jobs)
    answers = {init: submit(fleet, fleet.submitter, init.format(job=fleet.job)) for init in
               ("no-such", "{job}@7", "{job}@best", "sha256:" + "0" * 64)}  # fmt: skip
    assert {init: (answer.status, answer.code) for init, answer in answers.items()} == {
        "no-such": (404, "unknown_job"),
        "{job}@7": (404, "unknown_model"),
        "{job}@best": (404, "unknown_model"),
        "sha256:" + "0" * 64: (404, "unknown_model"),
    }
    assert "rounds kept: 0" in answers["{job}@7"].json()["sentence"]
    assert dict(fleet.coordinator.jobs) == before


def test_a_name_that_several_jobs_have_is_refused_with_their_ids(fleet: Fleet) -> None:
    other = submit(fleet, fleet.submitter, fleet.job).json()["id"]
    answer = submit(fleet, fleet.submitter, "mine", key="third")
    assert (answer.status, answer.code) == (409, "ambiguous_name")
    assert f"{other}, {fleet.job}" in answer.json()["sentence"]


def test_the_worker_that_builds_the_model_is_given_what_the_job_begins_with(fleet: Fleet) -> None:
    job = submit(fleet, fleet.submitter, fleet.job).json()["id"]
    fleet.call("POST", f"/v1/jobs/{fleet.job}/cancel", fleet.admin)
    said = f"one builds the model and puts the model of {fleet.job} after round 0 into it"
    assert said in fleet.coordinator.jobs[job].reason
    work = fleet.assignment(fleet.one)
    assert (work["job"], work["kind"], work["base"]["digest"]) == (job, "init", fleet.model)
    assert work["max_bytes"] == 1 << 20, "what comes out may be larger: a wider dtype"
    assert fleet.call("GET", f"/v1/models/{fleet.model}", fleet.one.token).status == 200
    assert views.job_view(fleet.coordinator, fleet.coordinator.jobs[job]).begins_with is not None


def test_a_file_goes_when_the_job_has_a_model_of_its_own_and_another_jobs_model_stays(
    fleet: Fleet, tmp_path: Path
) -> None:
    data, digest = file_of(tmp_path)
    send(fleet, fleet.submitter, digest, data)
    taken = submit(fleet, fleet.submitter, f"sha256:{digest}")
    other = submit(fleet, fleet.submitter, fleet.job, key="other")
    fleet.call("POST", f"/v1/jobs/{fleet.job}/cancel", fleet.admin)
    for job, base in ((taken.json()["id"], digest), (other.json()["id"], fleet.model)):
        work, path = fleet.assignment(fleet.one), fleet.coordinator.blobs.path(base)
        assert (work["job"], work["base"]["digest"], path.exists()) == (job, base, True)
        made = weights(tmp_path / "made")
        assert fleet.upload(work, fleet.one.token, made).status == 204
        facts = {"parameters": 8, "train_samples": 60, "test_samples": 0, "bounds": [0, 30, 60]}
        result = {"attempt": work["attempt"], "digest": hashlib.sha256(made).hexdigest(), "facts": facts}
        fleet.must("POST", f"/v1/updates/{work['id']}/submit", fleet.one.token, result)
        assert fleet.coordinator.jobs[job].model is not None
        fleet.call("POST", f"/v1/jobs/{job}/cancel", fleet.admin)
        assert path.exists() == (base == fleet.model)


# ---------------------------------------------------------------- a file


def test_a_file_is_sent_in_pieces_taken_with_the_job_and_deleted_when_that_is_over(
    fleet: Fleet, tmp_path: Path
) -> None:
    data, digest = file_of(tmp_path)
    assert held(fleet, fleet.submitter, digest) == ""
    assert send(fleet, fleet.submitter, digest, data, 10, 30).status == 204
    assert held(fleet, fleet.submitter, digest) == "10-29"
    early = submit(fleet, fleet.submitter, f"sha256:{digest}")
    assert (early.status, early.code) == (409, "incomplete")
    for start, stop in ((0, 10), (30, len(data))):
        assert send(fleet, fleet.submitter, digest, data, start, stop).status == 204

    taken = submit(fleet, fleet.submitter, f"sha256:{digest}")
    assert taken.json()["begins_with"] == {"digest": digest, "size": len(data), "job": None, "round": None}
    path = fleet.coordinator.blobs.path(digest)
    assert path.read_bytes() == data
    assert fleet.coordinator._uploads.begun == ()
    again = submit(fleet, fleet.submitter, f"sha256:{digest}")
    assert again.json()["id"] == taken.json()["id"], "the same call again"
    assert held(fleet, fleet.other_submitter, digest) == f"0-{len(data) - 1}"
    second = submit(fleet, fleet.other_submitter, f"sha256:{digest}", key="second")
    assert second.status == 201, "while a job waits with it, nobody has to send it again"

    for number, job in enumerate((taken, second)):
        assert path.exists(), f"{number} of 2 jobs have ended"
        fleet.call("POST", f"/v1/jobs/{job.json()['id']}/cancel", fleet.admin)
    assert not path.exists()


def test_what_was_sent_and_what_a_job_waits_with_outlive_a_restart(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "state")
    (data, digest), token = file_of(tmp_path), fleet.submitter
    (half, half_digest) = file_of(tmp_path, 2.0)
    send(fleet, token, digest, data)
    job = submit(fleet, token, f"sha256:{digest}").json()["id"]
    send(fleet, token, half_digest, half, 0, 40)
    fleet.close()
    again = Served(tmp_path / "state")
    try:
        assert again.coordinator.blobs.path(digest).read_bytes() == data
        assert again.coordinator.jobs[job].begins_with is not None
        assert held(again, token, half_digest) == "0-39"
        again.coordinator.given._clock = lambda: 1e12
        again.coordinator.given.expire()
        assert held(again, token, half_digest) == "", "nobody came back for it"
    finally:
        again.close()


def test_a_file_that_is_damaged_on_the_disk_after_a_restart_ends_its_job_in_words(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "state")
    (data, digest), token = file_of(tmp_path), fleet.submitter
    send(fleet, token, digest, data)
    job = submit(fleet, token, f"sha256:{digest}", round={"min_workers": 9}).json()["id"]
    fleet.coordinator.blobs.path(digest).write_bytes(data[:-1])
    fleet.close()
    again = Served(tmp_path / "state")
    try:
        assert again.coordinator.jobs[job].reason == f"the model {digest[:12]}… is damaged on the disk"
    finally:
        again.close()


@pytest.mark.parametrize("fault", ["not its digest", "no header", "nan", "no tensors"])
def test_a_file_that_no_job_can_begin_with_is_refused_and_deleted(fleet: Fleet, tmp_path: Path, fault: str) -> None:
    data, digest = file_of(tmp_path, float("nan") if fault == "nan" else 1.0)
    if fault == "no tensors":
        save(tmp_path / "empty", {}, Notes())
        data = (tmp_path / "empty").read_bytes()
    data = data[20:] if fault == "no header" else data
    digest = "0" * 64 if fault == "not its digest" else hashlib.sha256(data).hexdigest()
    assert send(fleet, fleet.submitter, digest, data).status == 204
    answer = submit(fleet, fleet.submitter, f"sha256:{digest}")
    codes = {"not its digest": "digest_mismatch", "nan": "not_finite"}
    assert (answer.status, answer.code) == (422, codes.get(fault, "bad_header"))
    assert held(fleet, fleet.submitter, digest) == ""
    assert not fleet.coordinator.blobs.has(digest)


def test_nobody_begins_with_what_another_sends_nor_writes_into_it(fleet: Fleet, tmp_path: Path) -> None:
    data, digest = file_of(tmp_path)
    send(fleet, fleet.submitter, digest, data)
    assert held(fleet, fleet.other_submitter, digest) == ""
    refused = submit(fleet, fleet.other_submitter, f"sha256:{digest}")
    assert (refused.status, refused.code) == (404, "unknown_model")
    send(fleet, fleet.other_submitter, digest, b"\0" * len(data))
    assert submit(fleet, fleet.submitter, f"sha256:{digest}", key="mine").status == 201


def test_a_task_file_or_an_update_is_no_model_to_begin_with(fleet: Fleet) -> None:
    answer = submit(fleet, fleet.submitter, f"sha256:{fleet.task}")
    assert (answer.status, answer.code) == (404, "unknown_model")


def test_a_file_beyond_the_size_of_a_model_is_refused_before_it_is_sent(fleet: Fleet) -> None:
    headers = {"Content-Range": content_range(0, 1, (1 << 20) + 1)}
    answer = fleet.call("PUT", f"/v1/models/{'0' * 64}", fleet.submitter, b"x", headers)
    assert (answer.status, answer.code) == (413, "too_large")


def test_a_token_has_room_for_as_many_files_as_it_may_send_at_once(fleet: Fleet, tmp_path: Path) -> None:
    files = [file_of(tmp_path, float(number)) for number in range(3)]
    for data, digest in files:
        send(fleet, fleet.submitter, digest, data, 0, 20)
    assert [held(fleet, fleet.submitter, digest) for _, digest in files] == ["", "0-19", "0-19"]


def test_a_job_that_is_not_taken_leaves_the_file_to_be_taken_by_the_next(fleet: Fleet, tmp_path: Path) -> None:
    data, digest = file_of(tmp_path)
    send(fleet, fleet.submitter, digest, data)
    quotas = fleet.coordinator.quotas
    quotas._settings, before = replace(quotas._settings, jobs=1), quotas._settings
    assert submit(fleet, fleet.submitter, f"sha256:{digest}").code == "too_many_jobs"
    assert held(fleet, fleet.submitter, digest) == f"0-{len(data) - 1}"
    quotas._settings = before
    assert submit(fleet, fleet.submitter, f"sha256:{digest}").status == 201


def test_uploads_of_workers_are_nobodys_files() -> None:
    assert given.Given(None, None, None, 0, lambda: 0.0).owner(("digits-4f2a.train.1.0", 1)) is None  # type: ignore[arg-type]
