"""An operator's orders to a worker, through the real application: to whom, what follows, and for how long."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from common.messages import Abandon, Heartbeat, PollRequest, Progress
from tests.api_house import House
from tests.test_preparation import Caller, submit


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    one = House(tmp_path)
    yield one
    one.demolish()


def order(house: House, what: str, worker: str, token: str | None = None) -> tuple[int, dict[str, Any]]:
    answer = house.begin("POST", f"/v1/workers/{worker}/{what}", token or house.admin).result()
    return answer.status_code, answer.json()


def beat(house: House, caller: Caller, assignment: dict[str, Any], **fields: Any) -> dict[str, Any]:
    body = Heartbeat(
        start_id="s1",
        assignment=assignment["id"],
        attempt=assignment["attempt"],
        progress=Progress(doing="training"),
        **fields,
    )
    said: dict[str, Any] = house.begin("POST", f"/v1/workers/{caller.id}/heartbeat", caller.token, body).result().json()
    return said


def give_back(house: House, caller: Caller, assignment: dict[str, Any]) -> None:
    body = Abandon(attempt=assignment["attempt"], code="released", sentence="out of the way")
    path = f"/v1/updates/{assignment['id']}/abandon"
    assert house.begin("POST", path, caller.token, body).result().status_code == 204


@pytest.mark.parametrize("what", ["drain", "pause"])
def test_a_worker_under_an_order_hears_of_it_at_once_and_gets_no_work_until_it_is_resumed(
    house: House, what: str
) -> None:
    caller = Caller(house, "a")
    submit(house)
    for _ in range(2):  # twice is once
        status, view = order(house, what, caller.id)
        assert (status, view["state"]) == (200, {"drain": "draining", "pause": "paused"}[what])
    assert caller.poll() == EMPTY | {"order": what}
    assert caller.poll(obeys=what) is None
    assert order(house, "resume", caller.id)[1]["state"] == "idle"
    heard = caller.poll(obeys=what)
    assert heard == EMPTY, "it hears of that before it is given work"
    given = caller.poll()
    assert given is not None
    assert given["assignment"]["kind"] == "init"


EMPTY: dict[str, Any] = {
    "assignment": None, "forget": [], "settled": [], "wanted": [], "unmask": [], "prepare": None, "order": "work",
    "renew": False,
}  # fmt: skip


def test_a_waiting_poll_is_answered_the_moment_that_an_order_comes(house: House) -> None:
    caller = Caller(house, "a")
    body = PollRequest(start_id="s1", claim_key="k", wait_s=20.0)
    waiting = house.begin("POST", f"/v1/workers/{caller.id}/poll", caller.token, body)
    order(house, "pause", "a")
    assert waiting.result().json()["order"] == "pause"


def wait(house: House, caller: Caller, key: str) -> asyncio.Task[httpx2.Response]:
    """A poll that waits."""
    body = PollRequest(start_id="s1", claim_key=key, wait_s=20.0)
    waiting = house.begin("POST", f"/v1/workers/{caller.id}/poll", caller.token, body)
    assert not waiting.done()
    return waiting


def test_a_poll_that_its_worker_no_longer_listens_to_takes_no_work_from_the_newer_one(house: House) -> None:
    caller = Caller(house, "a")
    older = wait(house, caller, "older")
    newer = wait(house, caller, "newer")
    assert older.result().status_code == 204
    submit(house)
    assert newer.result().json()["assignment"]["attempt"] == 1
    assert caller.poll("newer") == newer.result().json()


def test_a_worker_that_said_goodbye_is_given_no_work_by_the_poll_that_it_left_behind(house: House) -> None:
    caller = Caller(house, "a")
    left_behind = wait(house, caller, "one")
    path = f"/v1/workers/{caller.id}/leave?start_id=s1"
    assert house.begin("POST", path, caller.token).result().status_code == 204
    assert left_behind.result().status_code == 204
    submit(house)
    assert house.coordinator.fleet.leases == {}


def test_a_worker_at_work_finishes_when_it_is_drained_and_gives_back_when_it_is_paused(house: House) -> None:
    caller = Caller(house, "a")
    submit(house)
    given = caller.poll()
    assert given is not None
    work = given["assignment"]
    assert beat(house, caller, work)["order"] == "continue"
    order(house, "drain", caller.id)
    assert beat(house, caller, work)["order"] == "drain"
    order(house, "pause", caller.id)
    assert beat(house, caller, work)["order"] == "pause"
    assert house.coordinator.fleet.leases.keys() == {caller.id}, "the worker itself gives it back"
    give_back(house, caller, work)
    assert house.coordinator.fleet.leases == {}
    order(house, "resume", caller.id)
    assert beat(house, caller, work)["order"] == "continue", "nobody has it, so it is gone on with"
    assert house.coordinator.fleet.leases.keys() == {caller.id}


def test_work_that_another_worker_took_meanwhile_is_not_had_back(house: House) -> None:
    caller, other = Caller(house, "a"), Caller(house, "b")
    submit(house)
    given = caller.poll()
    assert given is not None
    give_back(house, caller, given["assignment"])
    taken = other.poll()
    assert taken is not None
    assert (taken["assignment"]["id"], taken["assignment"]["attempt"]) == (given["assignment"]["id"], 2)
    assert beat(house, caller, given["assignment"])["order"] == "superseded"


def test_giving_work_back_ends_no_job_however_often_a_worker_makes_way(house: House) -> None:
    caller = Caller(house, "a")
    job = submit(house)
    for _ in range(30):
        given = caller.poll()
        assert given is not None
        give_back(house, caller, given["assignment"])
    assert not house.coordinator.jobs[job].over


def test_an_older_worker_that_is_paused_is_told_that_its_work_counts_no_more(house: House) -> None:
    older = Caller(house, "a", protocol=1)
    submit(house)
    given = older.poll()
    assert given is not None
    assert "order" not in given
    order(house, "pause", older.id)
    assert beat(house, older, given["assignment"]) == {"order": "superseded", "reason": "an operator paused a"}
    assert house.coordinator.fleet.leases == {}
    assert older.poll() is None, "it is not told what it does not know"


def test_a_worker_says_that_it_rests_and_why_it_stands_still(house: House) -> None:
    caller = Caller(house, "a")
    job = submit(house)
    assert caller.poll(resting="outside its hours") is None
    assert shown(house) == ("resting", "outside its hours")
    given = caller.poll()
    assert given is not None
    beat(house, caller, given["assignment"], held="GPU 0 is at 90 °C")
    assert shown(house) == ("working", f"{job}: initialisation, stands still: GPU 0 is at 90 °C")
    beat(house, caller, given["assignment"])
    assert shown(house) == ("working", f"{job}: initialisation")


def shown(house: House) -> tuple[str, str]:
    (view,) = house.begin("GET", "/v1/workers", house.admin).result().json()
    return view["state"], view["reason"]


# ---------------------------------------------------------------- whom


def test_an_order_may_name_a_worker_by_its_name(house: House) -> None:
    caller = Caller(house, "gpu-box")
    assert order(house, "pause", "gpu-box")[1]["id"] == caller.id


def test_a_name_that_two_workers_have_is_refused_with_their_ids(house: House) -> None:
    ids = sorted(Caller(house, "gpu-box", start_id=f"s{number}").id for number in range(2))
    status, said = order(house, "drain", "gpu-box")
    assert (status, said["code"]) == (409, "ambiguous_name")
    assert said["sentence"] == f"2 workers are called gpu-box: {ids[0]}, {ids[1]}"
    assert order(house, "drain", ids[0])[0] == 200


@pytest.mark.parametrize("what", ["drain", "pause", "resume", "readmit"])
def test_an_order_to_nobody_is_refused_in_a_sentence(house: House, what: str) -> None:
    status, said = order(house, what, "nobody")
    assert (status, said["code"], said["sentence"]) == (404, "unknown_worker", "there is no worker 'nobody'")


@pytest.mark.parametrize("what", ["drain", "pause", "resume", "readmit"])
def test_a_worker_can_order_nobody(house: House, what: str) -> None:
    caller = Caller(house, "a")
    assert order(house, what, caller.id, caller.token)[0] == 403


# ---------------------------------------------------------------- for how long


@pytest.mark.parametrize("what", ["drain", "pause"])
def test_an_order_outlives_the_coordinator(house: House, what: str) -> None:
    caller = Caller(house, "a")
    order(house, what, "a")
    house.close()
    house.open()
    assert house.coordinator.fleet.workers[caller.id].order == what
    assert caller.poll() == EMPTY | {"order": what}


def test_readmitting_a_worker_lifts_an_order_too(house: House) -> None:
    caller = Caller(house, "a")
    order(house, "pause", "a")
    assert order(house, "readmit", "a")[1]["state"] == "idle"
    assert caller.poll() is None
