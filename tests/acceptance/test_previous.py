"""Workers of the version before, as they were released, in a job of this coordinator.

make test-previous        checks that version out beside this one and runs this file
"""

import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.store import SCHEMA
from tests.acceptance.kit import LocalFleet, Process, of_type, wait_for

PREVIOUS = os.environ.get("LYDIAN_PREVIOUS", "")

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(not PREVIOUS, reason="LYDIAN_PREVIOUS names no checkout of the version before"),
]

JOB = {"rounds": 3, "seed": 4, "data": {"shards": 4}, "train": {"batch_size": 16}, "round": {"min_workers": 2}}


def test_a_worker_of_the_version_before_trains_beside_new_ones_to_the_same_model(tmp_path: Path) -> None:
    with LocalFleet(tmp_path) as fleet:
        fleet.start_workers(2)
        truth = fleet.finish(fleet.submit(**JOB)).model
        fleet.workers.pop("w2").terminate()
        start_previous(fleet, "older")
        fleet.await_workers(2)
        job = fleet.submit(**JOB)
        assert fleet.finish(job).model == truth
        trained = {fact["worker_name"] for fact in of_type(fleet.facts(job), "accepted")}
        assert trained == {"w1", "older"}


def test_a_job_begun_by_the_version_before_is_finished_by_this_one(tmp_path: Path) -> None:
    fleet = LocalFleet(tmp_path)
    arguments = ["-m", "server", "--host", "127.0.0.1", "--port", str(fleet.port), "--state-dir", str(fleet.state)]
    older = Process(
        arguments, tmp_path / "older.log", {**fleet.environment, "PYTHONPATH": PREVIOUS}, cwd=Path(PREVIOUS)
    )
    wait_for("the older coordinator to listen", lambda: f"ready {fleet.url}" in older.said())
    try:
        start_previous(fleet, "older-1")
        start_previous(fleet, "older-2")
        fleet.await_workers(2)
        job = submit_as_before(fleet, {"task": "digits", **JOB, "rounds": 6})
        fleet.await_event(job, lambda e: e["type"] == "accepted" and e["round"] == 3, "round 3 began")
    finally:
        older.kill()
    with fleet:  # starts this version on the same folder
        fleet.finish(job)
        with closing(sqlite3.connect(fleet.state / "journal.sqlite")) as journal:
            assert journal.execute("PRAGMA user_version").fetchone() == (SCHEMA,)
        assert (fleet.state / "journal.sqlite.schema-1.backup").exists()


def submit_as_before(fleet: LocalFleet, spec: dict[str, Any]) -> str:
    """What a client of that version sent: no field that it did not know."""
    headers = {"Authorization": f"Bearer {fleet.admin_token}"}
    answer = httpx2.post(f"{fleet.url}/v1/jobs", json={"spec": spec, "key": "k"}, headers=headers)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def start_previous(fleet: LocalFleet, name: str) -> Process:
    token = (fleet.state / "join.token").read_text().strip()
    arguments = ["-m", "worker", fleet.url, "--name", name, "--state-dir", str(fleet.folder / name), "--threads", "1"]
    environment = {"LYDIAN_TOKEN": token, "PYTHONPATH": PREVIOUS}
    process = Process(
        [*arguments, "--device", "cpu"], fleet.folder / f"{name}.log", environment, sys.executable, cwd=Path(PREVIOUS)
    )
    fleet.workers[name] = process
    return process
