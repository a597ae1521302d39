"""Power cuts: what was acknowledged is true when the disk is there again, and no accepted update is trained twice."""

import random
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from client.chaos.disk import Disk, why_no_disk
from common.weights import file_digest
from tests.acceptance.kit import LocalFleet, closed_rounds, of_type, size
from tests.acceptance.test_many_kills import JOB, ROUNDS, SHARDS, TASK, moment
from tests.privileges import why_no_mounts

WHY_NOT = why_no_mounts() or why_no_disk()

pytestmark = [pytest.mark.acceptance, pytest.mark.skipif(WHY_NOT != "", reason=WHY_NOT)]


class Watcher:
    """Follows a job's facts as they are streamed: each one is an acknowledgement."""

    def __init__(self, fleet: LocalFleet, job: str) -> None:
        self.seen: dict[int, dict[str, Any]] = {}
        self._fleet, self._job = fleet, job
        self._thread = threading.Thread(target=self._follow)

    def _follow(self) -> None:
        for event in self._fleet.api.events(self._job):
            if "id" in event:
                self.seen[event["id"]] = event

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with Disk(tmp_path / "disk.img", tmp_path / "disk") as made:
        yield made


def check_blobs(state: Path) -> None:
    for blob in (state / "blobs").glob("*/*"):
        assert file_digest(blob) == blob.name, "a file has a name that is not its bytes'"


def check_facts(fleet: LocalFleet, job: str, seen: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every fact that was streamed is in the journal, and each shard counts once."""
    facts = fleet.facts(job)
    kept = {fact["id"]: fact for fact in facts}
    assert {number: kept.get(number) for number in seen} == seen, "an acknowledged fact is gone"
    accepted = [(a["round"], a["shard"]) for a in of_type(facts, "accepted")]
    assert sorted(accepted) == [(r, s) for r in range(1, ROUNDS + 1) for s in range(SHARDS)]
    assert len(closed_rounds(facts)) == ROUNDS
    trained = [h for h in of_type(facts, "handed_out") if h["kind"] == "train"]
    assert len(trained) == len(accepted), "an accepted update was trained again"
    return facts


def test_power_cuts_of_the_coordinator_lose_nothing_that_was_acknowledged(tmp_path: Path, disk: Disk) -> None:
    chance, cuts, done, came_back = random.Random(6), size(5, 20), 0, 0
    fleet = LocalFleet(tmp_path)
    fleet.state = disk.path / "state"
    with fleet:
        fleet.start_workers(2, "--trust", "any")
        truth = fleet.finish(fleet.submit(TASK, **JOB)).model
        while done < cuts:
            job = fleet.submit(TASK, **JOB)
            with Watcher(fleet, job) as watcher:
                while done < cuts and fleet.api.job(job).state != "finished":
                    moment(chance, 0.6)
                    assert fleet.coordinator is not None
                    disk.cut(fleet.coordinator.kill)
                    done += 1
                    with closing(sqlite3.connect(fleet.state / "journal.sqlite")) as journal:
                        assert journal.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                    fleet.start_coordinator()
                    check_blobs(fleet.state)
                assert fleet.finish(job).model == truth
            facts = check_facts(fleet, job, watcher.seen)
            came_back += len(list(of_type(facts, "restored")))
        print(f"\n{done} power cuts: 0 acknowledged facts lost, {came_back} updates came back from their workers")


def test_coordinator_and_worker_that_lose_their_power_together_lose_nothing_acknowledged(tmp_path: Path) -> None:
    chance, cuts = random.Random(7), size(2, 5)
    with ExitStack() as stack:
        disks = [
            stack.enter_context(Disk(tmp_path / f"{name}.img", tmp_path / name)) for name in ("coordinator", "worker")
        ]
        fleet = LocalFleet(tmp_path)
        fleet.state = disks[0].path / "state"
        fleet.folders["w1"] = disks[1].path / "w1"
        stack.enter_context(fleet)
        fleet.start_workers(1, "--trust", "any", "--checkpoint-every", "0.1")
        truth = fleet.finish(fleet.submit(TASK, **JOB)).model
        job = fleet.submit(TASK, **JOB)
        with Watcher(fleet, job) as watcher:
            for _ in range(cuts):
                moment(chance, 1.0)
                assert fleet.coordinator is not None
                fleet.coordinator.kill()
                fleet.workers["w1"].kill()
                for each in disks:
                    each.cut(lambda: None)
                fleet.start_coordinator()
                fleet.start_worker("w1", "--trust", "any", "--checkpoint-every", "0.1")
            assert fleet.finish(job).model == truth
        facts = fleet.facts(job)
        kept = {fact["id"]: fact for fact in facts}
        assert {number: kept.get(number) for number in watcher.seen} == watcher.seen
        assert not [back for back in of_type(facts, "handed_back") if back["code"] == "lost"]
