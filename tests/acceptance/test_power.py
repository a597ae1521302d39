"""Power cuts: what was acknowledged is true when the disk is there again, and no accepted update is trained twice."""

import random
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest

from client.chaos.disk import Disk, why_no_disk
from common.messages import JobView
from common.weights import file_digest
from tests.acceptance.kit import LocalFleet, closed_rounds, of_type, size, wait_for
from tests.acceptance.test_many_kills import JOB, ROUNDS, SHARDS, moment
from tests.privileges import why_no_mounts

WHY_NOT = why_no_mounts() or why_no_disk()

pytestmark = [pytest.mark.acceptance, pytest.mark.skipif(WHY_NOT != "", reason=WHY_NOT)]


class Watcher:
    """Follows a job's facts as they are streamed: each one is an acknowledgement.

    But for those that come between the failure of the power and the end of the coordinator, which a real one would have
    silenced with its disk: of a file system that is shut down in the middle of an fsync, ext4 may say that it is done.
    """

    def __init__(self, fleet: LocalFleet, job: str) -> None:
        self.seen: dict[int, dict[str, Any]] = {}
        self._fleet, self._job = fleet, job
        self._given_up = threading.Event()
        self._hears = self._dark = False  # of this coordinator; of one whose power has failed
        self._thread = threading.Thread(target=self._follow)

    def _follow(self) -> None:
        with suppress(GivenUpError):
            for event in self._fleet.api.events(self._job, on_wait=self._go_on):
                self._hears = True
                if "id" in event and not self._dark:
                    self.seen[event["id"]] = event
                self._go_on("")

    def _go_on(self, waits: str) -> None:
        if waits:
            self._hears = self._dark = False
        if self._given_up.is_set():
            raise GivenUpError

    def power_fails(self) -> None:
        """What is streamed from now on counts only when it comes from the next coordinator."""
        self._dark = self._hears

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # the job may never end
            self._given_up.set()
        self._thread.join()

    @property
    def in_the_open_round(self) -> int:
        """Updates that were acknowledged, and whose round still waits for others."""
        count = 0
        for fact in list(self.seen.values()):
            count = 0 if fact["type"] in ("opened", "frozen") else count + (fact["type"] == "accepted")
        return count


class GivenUpError(Exception):
    """The test has failed, and nobody waits for the rest of the facts."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with Disk(tmp_path / "disk.img", tmp_path / "disk") as made:
        yield made


def check_blobs(state: Path) -> None:
    for blob in (state / "blobs").glob("*/*"):
        assert file_digest(blob) == blob.name, "a file has a name that is not its bytes'"


def check_facts(fleet: LocalFleet, job: str, seen: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every fact that was streamed is in the journal, each shard counts once, and none is trained after it counted."""
    facts = fleet.facts(job)
    kept = {fact["id"]: fact for fact in facts}
    assert {number: kept.get(number) for number in seen} == seen, "an acknowledged fact is gone"
    accepted = {(a["round"], a["shard"]): a["id"] for a in of_type(facts, "accepted")}
    assert sorted(accepted) == [(r, s) for r in range(1, ROUNDS + 1) for s in range(SHARDS)]
    assert len(list(of_type(facts, "accepted"))) == len(accepted), "a shard was counted twice"
    assert len(closed_rounds(facts)) == ROUNDS
    trained = [h for h in of_type(facts, "handed_out") if h["kind"] == "train"]
    again = [h for h in trained if h["id"] > accepted[h["round"], h["shard"]]]
    assert again == [], "an accepted update was trained again"
    return facts


def at_a_random_moment(chance: random.Random, watcher: Watcher, over: Callable[[], bool], *, first: bool) -> None:
    """The first time, and now and then: when an update is acknowledged that only its worker's copy can bring back."""
    moment(chance, 0.6)
    if first or chance.random() < 0.5:
        wait_for("an update in an open round", lambda: watcher.in_the_open_round > 0 or over())


def test_power_cuts_of_the_coordinator_lose_nothing_that_was_acknowledged(tmp_path: Path, disk: Disk) -> None:
    chance, cuts, done, came_back = random.Random(6), size(3, 20), 0, 0
    fleet = LocalFleet(tmp_path)
    fleet.state = disk.path / "state"
    with fleet:
        fleet.start_workers(2)
        truth = fleet.truth(**JOB)
        while done < cuts:
            job = fleet.submit(**JOB)
            over = partial(is_over, fleet, job)
            with Watcher(fleet, job) as watcher:
                while done < cuts and not over():
                    at_a_random_moment(chance, watcher, over, first=done == 0)
                    assert fleet.coordinator is not None
                    watcher.power_fails()
                    disk.cut(fleet.coordinator.kill)
                    done += 1
                    with closing(sqlite3.connect(fleet.state / "journal.sqlite")) as journal:
                        assert journal.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                    fleet.start_coordinator()
                    check_blobs(fleet.state)
                assert digest_of(fleet.finish(job)) == truth
            facts = check_facts(fleet, job, watcher.seen)
            came_back += len(list(of_type(facts, "restored")))
        assert came_back > 0 or cuts < 20, "no cut took the bytes of an update that was acknowledged"
        print(f"\n{done} power cuts: 0 acknowledged facts lost, {came_back} updates came back from their workers")


def test_coordinator_and_worker_that_lose_their_power_together_lose_nothing_acknowledged(tmp_path: Path) -> None:
    chance, cuts, done = random.Random(7), size(2, 50), 0
    worker = ("w1", "--checkpoint-every", "0.1")
    with ExitStack() as stack:
        disks = [
            stack.enter_context(Disk(tmp_path / f"{name}.img", tmp_path / name)) for name in ("coordinator", "worker")
        ]
        fleet = LocalFleet(tmp_path)
        fleet.state = disks[0].path / "state"
        fleet.folders["w1"] = disks[1].path / "w1"
        stack.enter_context(fleet)
        fleet.start_worker(*worker)
        truth = fleet.truth(**JOB)
        while done < cuts:
            job = fleet.submit(**JOB)
            over = partial(is_over, fleet, job)
            with Watcher(fleet, job) as watcher:
                while done < cuts and not over():
                    at_a_random_moment(chance, watcher, over, first=done == 0)
                    assert fleet.coordinator is not None
                    watcher.power_fails()
                    disks[0].cut(fleet.coordinator.kill)
                    disks[1].cut(fleet.workers["w1"].kill_all)
                    done += 1
                    fleet.start_coordinator()
                    check_blobs(fleet.state)
                    fleet.start_worker(*worker)
                assert digest_of(fleet.finish(job)) == truth
            check_facts(fleet, job, watcher.seen)
        print(f"\n{done} power cuts of coordinator and worker at once: 0 acknowledged facts lost")


def digest_of(view: JobView) -> str:
    assert view.model is not None
    return view.model.digest


def is_over(fleet: LocalFleet, job: str) -> bool:
    return fleet.api.job(job).state == "finished"
