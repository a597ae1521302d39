"""A polite worker in a real fleet: out of the way of another user of its GPU, its work done by others, and back again.

The GPU's user is a file that stands for what the driver would tell (tests/fake_senses.py); all else is real.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.messages import WorkerView
from tests.acceptance.kit import LocalFleet, Process, of_type, wait_for
from tests.fake_senses import see

pytestmark = pytest.mark.acceptance

GAMER = "game (pid 7, 3.0 GB)"
ROUNDS, SHARDS = 6, 2
TRAIN = {"local_steps": 40, "batch_size": 8, "lr": 0.05}
ROUND = {"evaluate_every": 0}
JOB: dict[str, Any] = {"rounds": ROUNDS, "seed": 9, "data": {"shards": SHARDS}, "train": TRAIN, "round": ROUND}
ENDLESS = {**JOB, "data": {"shards": 1}, "train": {**TRAIN, "local_steps": 10_000_000}}


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path, LYDIAN_HEARTBEAT_S="1") as running:
        yield running


def start_polite(fleet: LocalFleet, name: str, *options: str) -> Path:
    """Start a worker that sees what the file says which is returned."""
    senses = fleet.folder / f"{name}.senses"
    token = (fleet.state / "join.token").read_text().strip()
    common = ("--threads", "1", "--device", "cpu", "--quiet-for", "0.5", "--checkpoint-every", "0.1")
    fleet.workers[name] = Process(
        ["-m", "tests.fake_senses", str(senses), fleet.url, "--name", name,
         "--state-dir", str(fleet.folder / name), *common, *options],
        fleet.folder / f"{name}.log",
        {"LYDIAN_TOKEN": token},
    )  # fmt: skip
    return senses


def await_worker(fleet: LocalFleet, name: str, what: str, wanted: Callable[[WorkerView], bool]) -> WorkerView:
    def look() -> WorkerView | None:
        return next((worker for worker in fleet.api.workers() if worker.name == name and wanted(worker)), None)

    return wait_for(f"{name} to be {what}", look)


def await_state(fleet: LocalFleet, name: str, *states: str) -> WorkerView:
    return await_worker(fleet, name, " or ".join(states), lambda view: view.state in states)


def await_training(fleet: LocalFleet, name: str) -> None:
    await_worker(fleet, name, "training", lambda view: view.progress is not None and view.progress.doing == "training")


def children(fleet: LocalFleet, name: str) -> list[psutil.Process]:
    return psutil.Process(fleet.workers[name].popen.pid).children(recursive=True)


def test_a_worker_makes_way_for_another_user_of_its_gpu_and_no_shard_is_lost_or_counted_twice(
    fleet: LocalFleet,
) -> None:
    senses = start_polite(fleet, "w1", "--only-idle")
    fleet.await_workers(1)
    truth = fleet.truth(**JOB)
    job = fleet.submit(**JOB)
    fleet.await_event(job, lambda e: e["type"] == "round" and e["round"] == 2, "round 2")
    see(senses, device="GPU 0", others_on_gpu=[GAMER])
    view = await_state(fleet, "w1", "resting")
    assert view.reason == "GPU 0 is used by another process"
    wait_for("its child to be gone", lambda: not children(fleet, "w1"))
    fleet.start_worker("w2")
    fleet.await_event(job, lambda e: e["type"] == "round" and e["round"] == 4, "round 4 by the other worker")
    see(senses)
    await_state(fleet, "w1", "idle", "working")
    model = fleet.finish(job).model
    assert model is not None
    assert model.digest == truth
    facts = fleet.facts(job)
    accepted = [(update["round"], update["shard"]) for update in of_type(facts, "accepted")]
    assert sorted(accepted) == [(r, s) for r in range(1, ROUNDS + 1) for s in range(SHARDS)]
    backs = [back for back in of_type(facts, "handed_back") if back["worker_name"] == "w1"]
    assert {back["code"] for back in backs} <= {"released"}


def test_a_paused_worker_gives_its_shard_to_another_and_takes_it_up_from_its_checkpoint_when_nobody_has_it(
    fleet: LocalFleet,
) -> None:
    start_polite(fleet, "w1")
    fleet.await_workers(1)
    job = fleet.submit(**ENDLESS)
    await_training(fleet, "w1")
    wait_for("a checkpoint", lambda: list((fleet.folder / "w1" / "work").glob("*/checkpoint")))
    fleet.api.pause_worker("w1")
    await_state(fleet, "w1", "paused")
    wait_for("its child to be gone", lambda: not children(fleet, "w1"))
    assert fleet.coordinator is not None
    fleet.coordinator.kill()
    fleet.start_coordinator()
    await_state(fleet, "w1", "paused")
    fleet.api.resume_worker("w1")
    await_training(fleet, "w1")
    assert "going on at step" in (fleet.folder / "w1" / "child.log").read_text()
    fleet.api.pause_worker("w1")
    fleet.start_worker("w2")
    await_training(fleet, "w2")
    fleet.api.cancel(job)
    fleet.api.resume_worker("w1")
    fleet.await_workers(2)
    codes = {(back["worker_name"], back["code"]) for back in of_type(fleet.facts(job), "handed_back")}
    assert codes == {("w1", "released")}  # one more than pauses, where the coordinator was killed before it answered
