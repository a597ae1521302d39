"""Who may work, and in which words the others are told: versions, copied credentials, strikes, two coordinators."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx2
import pytest

from common import PROTOCOL
from common.errors import BadUpdateError, ConflictError, SupersededError, VersionSkewError
from common.weights import Notes, save
from tests.acceptance.kit import PATIENCE_S, LocalFleet, Process, wait_for
from tests.acceptance.played import MODEL, Played, sha, update

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path_factory.mktemp("fleet"), ttl_s=600.0) as running:  # nobody beats for played workers
        yield running


# ---------------------------------------------------------------- versions


class OlderWorker:
    """A worker of protocol 1, in the very bytes that it sent, and as strict as it was about what it reads."""

    HARDWARE: ClassVar[dict[str, Any]] = {
        "hostname": "old", "system": "Linux", "python": "3.11", "cpu": "x", "cores": 1, "memory": 1, "gpus": [],
        "torch": {"version": "2.7.1", "device": "cpu", "cuda": None, "architectures": [], "threads": 1},
    }  # fmt: skip
    ASSIGNMENT: ClassVar[set[str]] = {
        "id", "attempt", "job", "kind", "round", "shard", "shards", "samples", "train_samples", "task", "spec", "base",
        "ttl_s", "max_bytes",
    }  # fmt: skip
    ROUND_SECTION: ClassVar[set[str]] = {"min_workers", "quorum", "evaluate_every"}  # its own default is no deadline

    def __init__(self, fleet: LocalFleet) -> None:
        token = (fleet.state / "join.token").read_text().strip()
        self.folder = fleet.folder
        self.http = httpx2.Client(base_url=fleet.url, headers={"Authorization": f"Bearer {token}"}, timeout=PATIENCE_S)
        welcome = self.say(
            "/v1/workers",
            {
                "name": "older", "protocol": 1, "version": "0.1.0", "start_id": "s1", "hardware": self.HARDWARE,
                "data": [], "trust": "none", "trusted": [],
            },
        )  # fmt: skip
        assert set(welcome) == {"worker_id", "credential", "protocol", "heartbeat_s", "ttl_s", "reason"}
        assert welcome["protocol"] == 1
        self.id = welcome["worker_id"]
        self.http.headers["Authorization"] = f"Bearer {welcome['credential']}"

    def say(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One call that must be answered with something."""
        said = self.answer(path, body)
        assert said is not None
        return said

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        answer = self.http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert answer.status_code in (200, 204), answer.text
        said: dict[str, Any] | None = answer.json() if answer.status_code == 200 else None
        return said

    def poll(self) -> dict[str, Any]:
        claim = {"start_id": "s1", "claim_key": os.urandom(4).hex(), "wait_s": 5.0, "loaded": []}
        answer = wait_for("work", lambda: self.answer(f"/v1/workers/{self.id}/poll", claim))
        assert set(answer) == {"assignment", "forget"}
        work: dict[str, Any] = answer["assignment"]
        assert set(work) == self.ASSIGNMENT
        assert set(work["spec"]["round"]) == self.ROUND_SECTION
        return work

    def do(self, work: dict[str, Any], arrays: Any, facts: dict[str, Any] | None = None) -> None:
        file = self.folder / f"older.{work['id']}"
        save(file, arrays, Notes())
        path = f"/v1/updates/{work['id']}"
        put = self.http.put(f"{path}?attempt={work['attempt']}", content=file.read_bytes())
        assert put.status_code == 204
        beat = {"start_id": "s1", "assignment": work["id"], "attempt": work["attempt"],
                "progress": {"doing": "uploading", "step": 0, "steps": None, "samples": 0, "samples_per_s": None,
                             "loss": None}}  # fmt: skip
        assert set(self.say(f"/v1/workers/{self.id}/heartbeat", beat)) == {"order", "reason"}
        given = {"attempt": work["attempt"], "digest": sha(file), "samples": 5, "steps": 1, "seconds": 0.1,
                 "metrics": {}, "bytes_down": 0, "facts": facts}  # fmt: skip
        assert set(self.say(f"{path}/submit", given)) == {"repeat", "reason"}


def test_a_worker_of_the_protocol_before_trains_a_whole_job(fleet: LocalFleet) -> None:
    older = OlderWorker(fleet)
    job = fleet.submit(rounds=2, data={"shards": 2})
    facts = {"parameters": 8, "train_samples": 10, "test_samples": 0, "bounds": [0, 5, 10]}
    older.do(older.poll(), MODEL, facts)
    for _ in range(4):
        older.do(older.poll(), update(1))
    assert fleet.finish(job).round == 2
    older.http.post(f"/v1/workers/{older.id}/leave?start_id=s1")
    older.http.close()


@pytest.mark.parametrize(("protocol", "side"), [(PROTOCOL + 1, "the coordinator"), (PROTOCOL - 2, "this worker")])
def test_any_other_protocol_is_refused_with_the_side_to_upgrade(fleet: LocalFleet, protocol: int, side: str) -> None:
    with pytest.raises(VersionSkewError) as refused:
        Played(fleet, "strange", protocol=protocol)
    assert refused.value.advice == f"Upgrade {side}."
    assert f"coordinator {'0.1.0'} speaks {PROTOCOL - 1} and {PROTOCOL}" in str(refused.value)


# ---------------------------------------------------------------- one credential on two machines


def test_a_copied_credential_is_refused_while_the_first_is_at_work_and_nobody_is_disturbed(fleet: LocalFleet) -> None:
    with Played(fleet, "twin", place="a" * 64) as first:
        with pytest.raises(ConflictError) as refused:
            Played(fleet, "twin", first.token, place="b" * 64, start_id="s2")
        assert refused.value.code == "already_working"
        assert "twin is at work already, on host twin" in str(refused.value)
        assert "give this one its own --state-dir" in refused.value.advice.lower()
        first.ask(wait_s=0.0)
        first.api.leave(first.id, "s1")
        with Played(fleet, "twin", first.token, place="b" * 64, start_id="s2") as moved:
            moved.ask(wait_s=0.0)
            with pytest.raises(SupersededError, match="another process works as twin"):
                first.ask(wait_s=0.0)
            moved.api.leave(moved.id, "s2")


def test_a_machine_and_its_clone_switch_once_at_most(fleet: LocalFleet) -> None:
    same = {"place": "c" * 64}
    with Played(fleet, "clone", **same) as first, Played(fleet, "clone", first.token, start_id="s2", **same) as second:
        with pytest.raises(SupersededError):
            first.ask(wait_s=0.0)
        with pytest.raises(ConflictError, match="is at work already"):
            Played(fleet, "clone", first.token, start_id="s3", **same)
        second.ask(wait_s=0.0)
        second.api.leave(second.id, "s2")


# ---------------------------------------------------------------- strikes


def test_a_worker_with_three_refusals_is_set_aside_over_restarts_until_it_is_readmitted(tmp_path: Path) -> None:
    with LocalFleet(tmp_path, ttl_s=600.0) as fleet, Played(fleet, "poison") as poison:
        job = fleet.submit(rounds=1, data={"shards": 1})
        poison.init(facts={"parameters": 8, "train_samples": 10, "test_samples": 0, "bounds": (0, 10)})
        bad = {"w": MODEL["w"] * float("nan"), "b": MODEL["b"]}
        for _ in range(2):
            with pytest.raises(BadUpdateError, match="w"):
                poison.hand_in(poison.poll(), bad)
        assert fleet.coordinator is not None
        fleet.coordinator.kill()
        fleet.start_coordinator()
        with pytest.raises(BadUpdateError):
            poison.hand_in(poison.poll(), bad)
        (shown,) = fleet.api.workers()
        assert shown.state == "set aside"
        assert shown.reason.startswith("3 results were refused, the last: ")
        assert poison.ask(wait_s=0.2) is None
        assert "1 live" in fleet.api.job(job).reason or "none is live" in fleet.api.job(job).reason
        assert fleet.api.readmit(poison.id).state != "set aside"
        poison.hand_in(poison.poll(), update(1), samples=10)
        fleet.finish(job)


# ---------------------------------------------------------------- two coordinators


def test_a_second_coordinator_on_one_folder_ends_at_once_and_names_the_first(fleet: LocalFleet) -> None:
    arguments = ["-m", "server", "--host", "127.0.0.1", "--port", "0", "--state-dir", str(fleet.state)]
    second = Process(arguments, fleet.folder / "second.log", fleet.environment)
    wait_for("the second coordinator to end", lambda: second.popen.poll() is not None)
    assert fleet.coordinator is not None
    assert second.popen.returncode == 1
    assert f"is in use by process {fleet.coordinator.popen.pid}" in second.said()
    assert fleet.api.version().protocol == PROTOCOL
