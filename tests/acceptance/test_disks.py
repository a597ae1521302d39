"""Full and read-only disks: work is refused in words before it is done, and goes on by itself when there is room."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.chaos.disk import Disk, why_no_disk
from tests.acceptance.kit import LocalFleet, of_type, wait_for
from tests.acceptance.test_many_kills import JOB, TRAIN, check
from tests.privileges import why_no_mounts

WHY_NOT = why_no_mounts() or why_no_disk()

pytestmark = [pytest.mark.acceptance, pytest.mark.skipif(WHY_NOT != "", reason=WHY_NOT)]


TASK = Path(__file__).with_name("secure_task.py")  # hands in when the test says so
ROUNDS, SHARDS = 3, 2
HELD_JOB = {**JOB, "rounds": ROUNDS, "data": {"shards": SHARDS}, "train": {**TRAIN, "local_steps": 20}}


def state_of(fleet: LocalFleet, name: str) -> tuple[str, str]:
    (worker,) = [worker for worker in fleet.api.workers() if worker.name == name]
    return worker.state, worker.reason


def test_a_job_pauses_on_a_full_disk_and_goes_on_by_itself_to_the_same_model(tmp_path: Path) -> None:
    with Disk(tmp_path / "disk.img", tmp_path / "disk") as disk:
        fleet = LocalFleet(tmp_path)
        fleet.state = disk.path / "state"
        with fleet:
            fleet.start_workers(2, "--trust", "any")
            spec = {**HELD_JOB, "config": {"dump": str(tmp_path)}}
            go = [tmp_path / f"{worker.popen.pid}.go" for worker in fleet.workers.values()]
            for file in go:
                file.touch()
            truth = fleet.truth(TASK, **spec)
            for file in go:
                file.unlink()
            job = fleet.submit(TASK, **spec)
            fleet.await_event(job, lambda e: e["type"] == "handed_out" and e["kind"] == "train", "work of a round")
            with disk.filled():
                for file in go:
                    file.touch()
                paused = wait_for(
                    "the job to pause", lambda: v if (v := fleet.api.job(job)).state == "paused" else None
                )
                assert "until there is room" in paused.reason
                assert "bytes do not fit" in paused.reason
                assert fleet.coordinator is not None
                assert fleet.coordinator.popen.poll() is None
            assert check(fleet, job, truth, ROUNDS, SHARDS)[0] == 0
            states = [fact["state"] for fact in of_type(fleet.facts(job), "job")]
            first, *between, last = [state for state in states if state != "evaluating"]  # once, after the last round
            assert (first, last) == ("initialising", "finished")
            assert set(between[::2]) == {"paused"}  # by an upload
            assert set(between[1::2]) <= {"training", "aggregating"}


@pytest.fixture(scope="module")
def _kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalFleet, Disk]]:
    folder = tmp_path_factory.mktemp("alone")
    with Disk(folder / "disk.img", folder / "disk") as disk:
        fleet = LocalFleet(folder, LYDIAN_POLL_S="0.5")
        fleet.folders["w1"] = disk.path / "w1"
        with fleet:
            yield fleet, disk


@pytest.fixture
def alone(_kept: tuple[LocalFleet, Disk]) -> Iterator[tuple[LocalFleet, Disk]]:
    """A fleet of one worker, w1, that waits for work, and the disk that w1's folder is on."""
    with _kept[0].mended(("w1",)):
        yield _kept


def test_a_worker_without_room_gives_its_work_back_is_shown_as_degraded_and_works_again_when_there_is_room(
    alone: tuple[LocalFleet, Disk],
) -> None:
    fleet, disk = alone
    truth = fleet.truth(**JOB)
    with disk.filled():
        job = fleet.submit(**JOB)
        wait_for("w1 to be degraded", lambda: state_of(fleet, "w1")[0] == "degraded")
        fleet.start_worker("w2")
        check(fleet, job, truth)
        assert "needed" in state_of(fleet, "w1")[1] or "No space left" in state_of(fleet, "w1")[1]
    backs = list(of_type(fleet.facts(job), "handed_back"))
    assert {back["code"] for back in backs} == {"disk_full"}
    assert {back["worker_name"] for back in backs} == {"w1"}
    wait_for("w1 to be well again", lambda: state_of(fleet, "w1")[0] == "idle")


def test_a_worker_whose_folder_became_read_only_gives_its_work_back_and_says_why(
    alone: tuple[LocalFleet, Disk],
) -> None:
    fleet, disk = alone
    truth = fleet.truth(**JOB)
    fleet.await_workers(1)  # what it keeps of that job it may be settling still
    folder = str(disk.path / "w1" / "work")  # nothing in it is open while the worker waits
    mount("--bind", folder, folder)
    try:
        mount("-o", "remount,bind,ro", folder)
        job = fleet.submit(**JOB)
        wait_for("w1 to be degraded", lambda: state_of(fleet, "w1")[0] == "degraded")
        fleet.start_worker("w2")
        check(fleet, job, truth)
        assert "Read-only file system" in state_of(fleet, "w1")[1]
    finally:
        subprocess.run(["umount", folder], check=True)
    wait_for("w1 to be well again", lambda: state_of(fleet, "w1")[0] == "idle")


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)
