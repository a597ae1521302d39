"""Who reaches what of others, in the real application: jobs, attempts, tokens; and what ends when one is revoked."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.routes.jobs import get_events
from tests.rounds_kit import registration
from tests.trust_kit import HOST, JSON, Answer, Fleet, Member, Served


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    running = Fleet(tmp_path / "state")
    yield running
    running.close()


def post(fleet: Served, path: str, token: str, fields: Any = None) -> Answer:
    body = b"" if fields is None else json.dumps(fields).encode()
    return fleet.call("POST", path, token, body, JSON if body else {})


def abandon(
    fleet: Fleet, work: dict[str, Any], by: Member, code: str = "task_failed", **fields: Any
) -> tuple[int, str]:
    given = {"attempt": work["attempt"], "code": code, "sentence": "x", "detail": "y" * 10_000, **fields}
    answer = post(fleet, f"/v1/updates/{work['id']}/abandon", by.token, given)
    return answer.status, answer.code


def backs(fleet: Fleet, kind: str = "handed_back") -> int:
    return len(list(fleet.coordinator.journal.facts(types=(kind,))))


def id_of(token: str) -> str:
    return token.split("_")[2]


def cancel(fleet: Fleet) -> None:
    assert post(fleet, f"/v1/jobs/{fleet.job}/cancel", fleet.admin).status == 200


# ---------------------------------------------------------------- attempts


@pytest.mark.parametrize("closed", [False, True])
def test_nobody_gives_back_what_was_never_given_to_it_whether_the_task_is_open_or_closed(
    fleet: Fleet, closed: bool
) -> None:
    if closed:
        cancel(fleet)
    facts = sum(1 for _ in fleet.coordinator.journal.facts())
    assert abandon(fleet, fleet.work, fleet.two) == (404, "unknown_attempt")
    assert abandon(fleet, fleet.work | {"attempt": 7}, fleet.one) == (404, "unknown_attempt")
    assert abandon(fleet, fleet.work | {"id": f"{fleet.job}.train.1.999"}, fleet.one) == (404, "unknown_attempt")
    assert abandon(fleet, fleet.work | {"id": f"{fleet.job}.evaluate.1.0"}, fleet.one) == (404, "unknown_attempt")
    assert sum(1 for _ in fleet.coordinator.journal.facts()) == facts


@pytest.mark.parametrize("closed", [False, True])
def test_who_gives_back_twice_is_answered_twice_and_kept_once(fleet: Fleet, closed: bool) -> None:
    if closed:
        cancel(fleet)
    for _ in range(3):
        assert abandon(fleet, fleet.work, fleet.one) == (204, "")
        assert backs(fleet) == 1


def test_what_a_worker_says_of_an_attempt_after_its_lease_ran_out_is_kept_once(fleet: Fleet) -> None:
    (lease,) = [one for one in fleet.coordinator.fleet.leases.values() if one.worker == fleet.one.id]
    fleet.coordinator._give_back(lease, "expired", "it was not heard of")
    for _ in range(2):
        assert abandon(fleet, fleet.work, fleet.one, "no_data") == (204, "")
        assert backs(fleet) == 2
    assert fleet.coordinator.jobs[fleet.job].excluded.keys() == {fleet.one.id}


def test_work_that_was_taken_up_again_can_be_given_back_again(fleet: Fleet) -> None:
    beat = {"attempt": fleet.work["attempt"], "start_id": "s1", "assignment": fleet.work["id"],
            "progress": {"doing": "training"}}  # fmt: skip
    assert abandon(fleet, fleet.work, fleet.one, "released") == (204, "")
    assert post(fleet, f"/v1/workers/{fleet.one.id}/heartbeat", fleet.one.token, beat).json()["order"] == "continue"
    assert abandon(fleet, fleet.work, fleet.one, "out_of_memory") == (204, "")
    assert backs(fleet) == 2


def test_a_closed_task_is_not_there_for_another_worker_on_any_call(fleet: Fleet) -> None:
    cancel(fleet)
    path, attempt = f"/v1/updates/{fleet.work['id']}", fleet.work["attempt"]
    digest = {"attempt": attempt, "digest": "0" * 64, "samples": 1}
    beat = {"attempt": attempt, "start_id": "s1", "assignment": fleet.work["id"], "progress": {"doing": "training"}}
    for caller, wanted in ((fleet.one, (200, 410, 409)), (fleet.two, (404, 404, 404))):
        head = fleet.call("HEAD", f"{path}?attempt={attempt}", caller.token)
        put = fleet.call("PUT", f"{path}?attempt={attempt}", caller.token, b"12345678")
        submitted = post(fleet, f"{path}/submit", caller.token, digest)
        assert (head.status, put.status, submitted.status) == wanted
        heard = post(fleet, f"/v1/workers/{caller.id}/heartbeat", caller.token, beat)
        assert heard.status == (200 if caller is fleet.one else 404)
        assert backs(fleet, "late") == 0


# ---------------------------------------------------------------- jobs


def test_a_job_knows_who_submitted_it_after_a_restart_and_a_rotation_too(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "state")
    job, token, other = fleet.job, fleet.submitter, fleet.other_submitter
    fleet.close()
    again = Served(tmp_path / "state")
    try:
        view = again.call("GET", f"/v1/jobs/{job}", other).json()
        assert view["submitted_by"] == {"token": id_of(token), "name": "ada"}
        token = post(again, "/v1/tokens/own/rotate", token, {"overlap_s": 0}).json()["token"]
        refused = post(again, f"/v1/jobs/{job}/pause", other)
        assert (refused.status, refused.code) == (403, "not_yours")
        paused = post(again, f"/v1/jobs/{job}/pause", token)
        assert (paused.status, paused.json()["reason"]) == (200, "paused by ada")
        assert post(again, f"/v1/jobs/{job}/cancel", again.admin).status == 200, "an admin may end everybody's"
    finally:
        again.close()


def test_another_submitters_key_gives_nobody_their_job(fleet: Fleet) -> None:
    request = {"key": "mine", "spec": {"task": "digits"}}
    first = post(fleet, "/v1/jobs", fleet.submitter, request)
    assert post(fleet, "/v1/jobs", fleet.submitter, request).json()["id"] == first.json()["id"]
    for other in (fleet.other_submitter, fleet.admin):
        refused = post(fleet, "/v1/jobs", other, request)
        assert (refused.status, refused.code) == (409, "key_reused")


# ---------------------------------------------------------------- revoked


def test_a_revoked_worker_is_refused_at_its_next_call_and_its_shard_is_anothers_at_once(fleet: Fleet) -> None:
    shard = fleet.work["id"]
    view = post(fleet, f"/v1/tokens/{fleet.one.id}/revoke", fleet.admin)
    assert (view.status, view.json()["state"]) == (200, "revoked")
    assert fleet.one.id not in fleet.coordinator.fleet.leases
    state = {one["id"]: one["state"] for one in fleet.call("GET", "/v1/workers", fleet.admin).json()}
    assert state[fleet.one.id] == "gone"
    poll = {"start_id": "s1", "claim_key": "again", "wait_s": 0}
    refused = post(fleet, f"/v1/workers/{fleet.one.id}/poll", fleet.one.token, poll)
    assert (refused.status, refused.code) == (401, "bad_token")
    given = [fleet.assignment(fleet.two)["id"] for _ in range(12)]
    assert shard in given


def test_a_poll_that_waits_ends_when_its_token_is_revoked(fleet: Fleet) -> None:
    three = fleet.member("three")
    post(fleet, f"/v1/jobs/{fleet.job}/pause", fleet.admin)
    fleet.coordinator.settings = replace(fleet.coordinator.settings, poll_s=25.0)
    body = json.dumps({"start_id": "s1", "claim_key": "k", "wait_s": 25}).encode()
    said = {"Authorization": f"Bearer {three.token}", "Content-Length": str(len(body)), **JSON}
    here, admin = ("Host", HOST), ("Authorization", f"Bearer {fleet.admin}")

    async def poll_and_revoke() -> Answer:
        waiting = asyncio.create_task(fleet._call("POST", f"/v1/workers/{three.id}/poll", body, [here, *said.items()]))
        while not fleet.coordinator.fleet.workers[three.id].polling:  # noqa: ASYNC110 - the loop's turn, no time
            await asyncio.sleep(0)
        path = f"/v1/tokens/{three.id}/revoke"
        revoked = await fleet._call("POST", path, b"", [here, admin])
        assert revoked.status == 200
        return await waiting

    answer = fleet.run(poll_and_revoke())
    assert (answer.status, answer.code) == (401, "bad_token")


def test_a_stream_that_runs_ends_when_its_token_is_revoked(fleet: Fleet) -> None:
    tokens = fleet.coordinator.tokens

    async def follow_and_revoke() -> list[str | bytes]:
        caller = tokens.check(f"Bearer {fleet.reader}")
        stream = (await get_events(fleet.job, fleet.coordinator, caller, 10**9)).body_iterator
        seen = [await anext(stream)]
        tokens.revoke(caller.token_id)
        fleet.coordinator.tokens_changed()
        return seen + [item async for item in stream]

    assert len(fleet.run(follow_and_revoke())) == 1


def test_a_result_whose_worker_was_revoked_while_it_was_looked_at_does_not_count(fleet: Fleet) -> None:
    tokens = fleet.coordinator.tokens
    tokens.revoke(tokens.find(fleet.one.id).id)
    facts = sum(1 for _ in fleet.coordinator.journal.facts())
    with pytest.raises(Exception, match="was revoked at"):
        fleet.coordinator._count(fleet.job, None, None, fleet.one.id, "0" * 64, None)  # type: ignore[arg-type]
    assert sum(1 for _ in fleet.coordinator.journal.facts()) == facts


# ---------------------------------------------------------------- joining


def test_a_join_token_that_is_spent_lets_nobody_in_and_its_labels_are_its_workers(fleet: Fleet) -> None:
    made = post(fleet, "/v1/tokens", fleet.admin, {"scope": "join", "uses": 1, "ttl_s": 3600, "labels": ["legacy"]})
    token = made.json()["token"]

    def join(name: str, **fields: Any) -> Answer:
        return post(fleet, "/v1/workers", token, registration(name, **fields).model_dump(mode="json"))

    first, again = join("attic", place="a" * 64), join("attic", place="a" * 64, start_id="s2")
    assert first.json()["worker_id"] == again.json()["worker_id"], "its answer was lost, and its machine started anew"
    assert first.json()["credential"] != again.json()["credential"]
    refused = join("cellar", place="b" * 64)
    assert (refused.status, refused.code) == (403, "token_spent")
    worker = again.json()["worker_id"]
    (view,) = [one for one in fleet.call("GET", "/v1/workers", fleet.reader).json() if one["id"] == worker]
    assert view["labels"] == ["legacy"]


def test_a_workers_credential_is_rotated_by_the_worker_itself(fleet: Fleet) -> None:
    answer = post(fleet, f"/v1/tokens/{fleet.one.id}/rotate", fleet.admin, {}).json()
    assert answer["token"] is None
    assert answer["reason"].startswith("one is to fetch a new credential by ")
    poll = {"start_id": "s1", "claim_key": "k", "wait_s": 0}
    heard = post(fleet, f"/v1/workers/{fleet.one.id}/poll", fleet.one.token, poll).json()
    assert (heard["renew"], heard["assignment"]) == (True, None)
    given = registration("one", trust="any").model_dump(mode="json")
    new = post(fleet, "/v1/workers", fleet.one.token, given).json()["credential"]
    assert fleet.coordinator.fleet.leases[fleet.one.id].attempt == fleet.work["attempt"], "its work goes on"
    assert fleet.call("GET", "/v1/probe?bytes=1", fleet.one.token).status == 200
    assert fleet.call("GET", "/v1/probe?bytes=1", new).status == 200
    assert fleet.call("GET", "/v1/probe?bytes=1", fleet.one.token).status == 401
    assert post(fleet, "/v1/workers", new, given).json()["credential"] is None
