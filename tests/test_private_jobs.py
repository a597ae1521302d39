"""Private jobs through the real application: what is made of a seed that is gone and of a cost that is not known."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.messages import JobRequest, JobSpec, ModelFacts, Submission
from common.weights import Notes, save
from server.accounting import AccountantError, Planned, Spent
from tests.acceptance.played import MODEL, Arrays, sha, update
from tests.api_house import House
from tests.test_preparation import Caller

PRIVATE = {"level": "worker", "clip": 1.0, "noise": 1.0, "delta": 1e-3}


PLAIN = Notes()


class Book:
    """Accounting without a process: epsilon is the number of rounds, or is not known."""

    known = True

    async def plan(self, spec: JobSpec) -> Planned | None:
        return Planned(float(spec.rounds), None)

    async def spent(self, spec: JobSpec, rounds: int) -> Spent:
        if not self.known:
            raise AccountantError("the accountant ended with 1: no memory")
        return Spent(float(rounds), 2.0 * rounds)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    one = House(tmp_path)
    one.coordinator.accounting = Book()  # type: ignore[assignment]
    yield one
    one.demolish()


def send(house: House, method: str, path: str, token: str, body: bytes | None, **headers: str) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {token}", **headers}
    answer = house.run(house.client.request(method, path, content=body, headers=headers))
    assert answer.status_code < 300, answer.text
    return dict(answer.json()) if answer.content else {}


def submit(house: House, **keys: Any) -> str:
    spec = JobSpec.model_validate({"task": "digits", "rounds": 2, "data": {"shards": 2}, "privacy": PRIVATE, **keys})
    body = JobRequest(spec=spec, key=json.dumps(keys)).model_dump_json().encode()
    view = send(house, "POST", "/v1/jobs", house.admin, body, **{"Content-Type": "application/json"})
    assert any("So few cannot hide one of them" in warning for warning in view["warnings"])
    assert "2 rounds cost ε 2.00 at δ 0.001" in view["warnings"]
    return str(view["id"])


def hand_in(house: House, caller: Caller, arrays: Arrays, notes: Notes = PLAIN, **fields: Any) -> None:
    work = caller.poll()["assignment"]
    file = house.folder / "handed-in"
    save(file, arrays, notes)
    data, path = file.read_bytes(), f"/v1/updates/{work['id']}"
    span = {"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}"}
    send(house, "PUT", f"{path}?attempt={work['attempt']}", caller.token, data, **span)
    given = {"attempt": work["attempt"], "digest": sha(file), "samples": 5, "seconds": 0.1, **fields}
    body = Submission.model_validate(given).model_dump_json().encode()
    send(house, "POST", f"{path}/submit", caller.token, body, **{"Content-Type": "application/json"})


FACTS = ModelFacts(parameters=8, train_samples=10, test_samples=0, bounds=(0, 5, 10))


def begun(house: House, **keys: Any) -> tuple[str, Caller]:
    """A private job whose model is built."""
    caller = Caller(house, "a")
    job = submit(house, **keys)
    hand_in(house, caller, MODEL, facts=FACTS)
    return job, caller


def settle(house: House) -> None:
    """Let averaging come to its end."""
    house.loop.quiet()
    while house.threads.waiting:
        house.threads.let_go(0)
        house.loop.quiet()


def test_a_round_whose_cost_is_not_known_waits_and_is_the_same_when_it_is(house: House) -> None:
    job, caller = begun(house)
    Book.known = False
    try:
        for number in (1, 2):
            hand_in(house, caller, update(number))
        settle(house)
        held = house.coordinator.jobs[job]
        assert (held.phase.state, held.closed) == ("paused", 0)
        assert "round 1 is not averaged while its privacy is not known: the accountant ended with 1" in held.reason
    finally:
        Book.known = True
    house.begin("POST", f"/v1/jobs/{job}/resume", house.admin).result()
    settle(house)
    after = house.coordinator.jobs[job]
    assert (after.phase.state, after.closed) == ("training", 1)
    assert after.spent is not None
    assert (after.spent.epsilon, after.spent.epsilon_rdp, after.spent.clip) == (1.0, 2.0, 1.0)


def test_a_job_whose_seed_is_gone_fails_when_it_would_draw_again(house: House) -> None:
    job, caller = begun(house)
    (house.folder / "privacy" / f"{job}.seed").unlink()
    for number in (1, 2):
        hand_in(house, caller, update(number))
    settle(house)
    failed = house.coordinator.jobs[job]
    assert failed.phase.state == "failed"
    assert f"the secret seed of {job} is gone" in failed.reason


def test_a_restarted_coordinator_says_at_once_that_a_seed_is_gone(house: House) -> None:
    job, _ = begun(house)
    kept, _ = begun(house, seed=1)
    (house.folder / "privacy" / f"{job}.seed").unlink()
    house.close()
    house.open()
    assert house.coordinator.jobs[job].phase.state == "failed"
    assert f"the secret seed of {job} is gone" in house.coordinator.jobs[job].reason
    assert not house.coordinator.jobs[kept].over
    assert [path.stem for path in (house.folder / "privacy").iterdir()] == [kept]


def test_an_update_that_does_not_tell_its_cost_does_not_count(house: House) -> None:
    caller = Caller(house, "a")
    worker = house.coordinator.fleet.workers[caller.id]
    build = worker.registration.hardware.torch.model_copy(update={"opacus": "1.6.0"})
    hardware = worker.registration.hardware.model_copy(update={"torch": build})
    worker.registration = worker.registration.model_copy(update={"hardware": hardware})
    spec = {"task": "digits", "privacy": {**PRIVATE, "level": "example"}, "data": {"shards": 2}}
    body = JobRequest(spec=JobSpec.model_validate(spec), key="k").model_dump_json().encode()
    send(house, "POST", "/v1/jobs", house.admin, body, **{"Content-Type": "application/json"})
    hand_in(house, caller, MODEL, facts=FACTS)
    with pytest.raises(AssertionError, match="came without what its privacy cost"):
        hand_in(house, caller, update(1))


def test_a_model_with_running_statistics_ends_a_private_job(house: House) -> None:
    caller = Caller(house, "a")
    job = submit(house)
    notes = Notes(buffers=("b", "m"), variances={"b": "m"})
    hand_in(house, caller, {**MODEL, "m": MODEL["b"]}, notes, facts=FACTS)
    ended = house.coordinator.jobs[job]
    assert ended.phase.state == "failed"
    assert "the model has running statistics (b, 1 in all)" in ended.reason
    assert not list((house.folder / "privacy").iterdir())
