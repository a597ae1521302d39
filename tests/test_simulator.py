"""A simulating process against a scripted coordinator, with a child that has no torch."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import LydianError, UnauthenticatedError
from common.messages import Assignment, TaskRef
from tests.scripted_coordinator import MODEL, Lose, ScriptedCoordinator, assignment
from worker import child
from worker.options import Options
from worker.simulation.process import Simulator


@pytest.fixture(autouse=True)
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The fake child's folder."""
    folder = tmp_path / "control"
    folder.mkdir()
    monkeypatch.setattr(child, "HOST", Path(__file__).with_name("fake_child.py"))
    monkeypatch.setenv("FAKE_CHILD", str(folder))
    monkeypatch.setenv("LYDIAN_CHILD_ENV", "FAKE_CHILD")
    return folder


@pytest.fixture
def coordinator() -> Iterator[ScriptedCoordinator]:
    with ScriptedCoordinator() as played:
        yield played


@contextmanager
def simulating(coordinator: ScriptedCoordinator, folder: Path, workers: int = 3) -> Iterator[list[LydianError]]:
    """A simulator that runs until the block ends; what it ended with is in the list then."""
    options = Options(name="sim", join_token="lyd_join_x")
    simulator = Simulator(coordinator.url, workers, options, folder / "state", stack="auto")
    ended: list[LydianError] = []

    def run() -> None:
        try:
            simulator.run()
        except LydianError as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield ended
    finally:
        coordinator.script["poll"] += [UnauthenticatedError("the test is over")] * 100
        thread.join(120)
        simulator.close()
        assert not thread.is_alive()


def shards(*numbers: int, round_index: int = 1) -> list[Assignment]:
    return [assignment(round_index, id=f"job-1.train.{round_index}.{shard}", shard=shard) for shard in numbers]


def did(control: Path) -> list[str]:
    calls = control / "calls.txt"
    return calls.read_text().splitlines() if calls.exists() else []


def test_all_workers_claims_are_one_command_and_one_download(
    coordinator: ScriptedCoordinator, tmp_path: Path, control: Path
) -> None:
    coordinator.hand_out(*shards(2, 0, 1))
    with simulating(coordinator, tmp_path):
        coordinator.wait_for("three results", lambda: len(coordinator.accepted) == 3)
        coordinator.wait_call("poll", 5)
    assert [line for line in did(control) if line.startswith("train_many ")] == ["train_many 3 auto"]
    assert len(coordinator.of("register")) == 3
    assert sorted(done["bytes_down"] for done in coordinator.accepted.values()) == [0, 0, len(MODEL)]
    assert not list((tmp_path / "state" / "work").glob("job-1.train*"))


@pytest.mark.parametrize("call", ["register", "poll", "upload", "submit"])
def test_a_lost_answer_costs_nothing(
    coordinator: ScriptedCoordinator, tmp_path: Path, control: Path, call: str
) -> None:
    coordinator.script[call] = [Lose()]
    if call == "poll":  # what is claimed by the first is handed out again for the same key: the script does so
        coordinator.answer_poll()
    coordinator.hand_out(*shards(0, 1))
    with simulating(coordinator, tmp_path):
        coordinator.wait_for("two results", lambda: len(coordinator.accepted) == 2)
    assert not coordinator.of("abandon")


def test_a_shard_that_fails_is_given_back_and_the_others_count(
    coordinator: ScriptedCoordinator, tmp_path: Path, control: Path
) -> None:
    (control / "fail-shard").write_text("1")
    coordinator.hand_out(*shards(0, 1, 2))
    with simulating(coordinator, tmp_path):
        coordinator.wait_for("two results", lambda: len(coordinator.accepted) == 2)
        back = coordinator.wait_call("abandon")
    assert "job-1.train.1.1" in back.path
    assert (back.body["code"], back.body["sentence"], back.body["detail"]) == ("task_failed", "it fell over", "where")


def test_a_task_that_fails_gives_every_shard_back(
    coordinator: ScriptedCoordinator, tmp_path: Path, control: Path
) -> None:
    (control / "fail-open").write_text('{"code": "bad_task", "sentence": "no model()", "detail": ""}')
    coordinator.hand_out(*shards(0, 1))
    with simulating(coordinator, tmp_path):
        coordinator.wait_call("abandon", 2)
    assert {call.body["code"] for call in coordinator.of("abandon")} == {"bad_task"}
    assert not coordinator.accepted


def test_a_file_that_was_not_named_is_not_run(coordinator: ScriptedCoordinator, tmp_path: Path, control: Path) -> None:
    one = assignment(task=TaskRef(name="theirs", digest="1" * 64))
    coordinator.hand_out(one)
    with simulating(coordinator, tmp_path):
        assert coordinator.wait_call("abandon").body["code"] == "not_trusted"
    assert "open" not in did(control)


def test_the_child_is_stopped_when_no_shard_is_wanted_any_more_and_not_before(
    coordinator: ScriptedCoordinator, tmp_path: Path, control: Path
) -> None:
    hold = control / "hold-train_many"
    hold.touch()
    first, second = shards(0, 1)
    coordinator.hand_out(first, second)
    with simulating(coordinator, tmp_path):
        coordinator.wait_for("beats for both", _beats(coordinator, first.id, second.id, times=1))
        coordinator.orders[first.id] = "superseded"
        coordinator.wait_for("beats for the other", _beats(coordinator, second.id, times=5))
        assert len(coordinator.of("poll")) <= 3  # it is at work
        coordinator.orders[second.id] = "cancelled"
        coordinator.wait_call("poll", 4)  # the child was stopped, and there may be new work
        hold.unlink()
        coordinator.hand_out(*shards(0, round_index=2))
        coordinator.wait_for("new work to be done", lambda: list(coordinator.accepted) == ["job-1.train.2.0"])


def test_a_claim_whose_turn_comes_later_keeps_its_lease(
    coordinator: ScriptedCoordinator, tmp_path: Path, control: Path
) -> None:
    hold = control / "hold-train_many"
    hold.touch()
    later = assignment(1, id="job-1.evaluate.1.0", kind="evaluate", samples=None)
    coordinator.hand_out(*shards(0), later)
    with simulating(coordinator, tmp_path):
        coordinator.wait_for("beats for both", _beats(coordinator, "job-1.train.1.0", later.id, times=2))
        hold.unlink()
        coordinator.wait_for("both results", lambda: later.id in coordinator.accepted)
    assert list(coordinator.accepted) == ["job-1.train.1.0", later.id]


def test_a_coordinator_that_refuses_the_workers_ends_the_process(
    coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    coordinator.script["register"] = [UnauthenticatedError("no such token")] * 3
    with simulating(coordinator, tmp_path) as ended:
        coordinator.wait_call("register")
    assert "no such token" in str(ended[0])


def _beats(coordinator: ScriptedCoordinator, *assignments: str, times: int) -> Callable[[], bool]:
    """Whether so many further beats came for each of these."""
    before = {name: _count(coordinator, name) for name in assignments}
    return lambda: all(_count(coordinator, name) >= before[name] + times for name in assignments)


def _count(coordinator: ScriptedCoordinator, name: str) -> int:
    return sum(call.body["assignment"] == name for call in coordinator.of("heartbeat"))
