"""What a worker without work is told to load, through the real application: to whom, how often, and what it costs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.messages import JobRequest, PollAnswer, PollRequest
from tests.api_house import House
from tests.rounds_kit import registration, spec


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    one = House(tmp_path)
    yield one
    one.demolish()


class Caller:
    """A worker that registers and polls."""

    def __init__(self, house: House, name: str, **fields: Any) -> None:
        self.house, self.polls = house, 0
        token = (house.folder / "join.token").read_text().strip()
        welcome = house.begin("POST", "/v1/workers", token, registration(name, **fields)).result().json()
        self.id, self.token = welcome["worker_id"], welcome["credential"]

    def poll(self, key: str | None = None, **fields: Any) -> dict[str, Any] | None:
        self.polls += 1
        body = PollRequest(start_id="s1", claim_key=key or f"{self.polls}", wait_s=0.0, **fields)
        answer = self.house.begin("POST", f"/v1/workers/{self.id}/poll", self.token, body).result()
        said: dict[str, Any] | None = answer.json() if answer.status_code == 200 else None
        return said

    def asked(self, key: str | None = None, **fields: Any) -> str | None:
        """The job that it is asked to load."""
        answer = self.poll(key, **fields)
        if answer is None:
            return None
        said = PollAnswer.model_validate(answer)
        assert said.prepare is None or said.assignment is None
        return said.prepare.job if said.prepare else None


def submit(house: House, source: str | None = None, **keys: Any) -> str:
    body = JobRequest(spec=spec(**keys), task_source=source, key="k")
    job: str = house.begin("POST", "/v1/jobs", house.admin, body).result().json()["id"]
    return job


def test_while_one_worker_builds_the_model_the_other_is_asked_once_to_load_the_job(house: House) -> None:
    builder, other = Caller(house, "a"), Caller(house, "b")
    job = submit(house)
    given = builder.poll()
    assert given is not None
    assert given["assignment"]["kind"] == "init"
    rows = house.rows()
    assert other.asked("one") == job
    assert other.asked("one") == job, "the answer to the same poll was lost"
    assert other.asked() is None
    assert house.rows() == rows, "a preparation is in no journal"
    assert house.coordinator.fleet.leases.keys() == {builder.id}


def test_a_job_that_waits_for_workers_is_loaded_meanwhile(house: House) -> None:
    alone = Caller(house, "a")
    body = PollRequest(start_id="s1", claim_key="held", wait_s=5.0)
    held = house.begin("POST", f"/v1/workers/{alone.id}/poll", alone.token, body)
    assert not held.done()
    job = submit(house, round={"min_workers": 2})
    assert held.result().json()["prepare"]["job"] == job


def test_a_worker_of_the_older_protocol_is_asked_nothing_and_sent_no_new_field(house: House) -> None:
    builder, older = Caller(house, "a"), Caller(house, "b", protocol=1)
    submit(house)
    assert builder.poll() is not None
    assert older.poll() is None
    told = older.poll(loaded=("ended",))
    assert told == {"assignment": None, "forget": ["ended"]}


def test_nobody_is_asked_to_load_a_task_that_he_does_not_trust(house: House) -> None:
    trusting, other = Caller(house, "a", trust="any"), Caller(house, "b", trust="none")
    job = submit(house, "def model(config): ...", round={"min_workers": 2})
    assert other.asked() is None
    assert trusting.asked() == job


def test_a_worker_that_has_the_job_loaded_is_not_asked_to_load_it(house: House) -> None:
    builder, other = Caller(house, "a"), Caller(house, "b")
    job = submit(house)
    assert builder.poll() is not None
    assert other.asked(loaded=(job,)) is None
