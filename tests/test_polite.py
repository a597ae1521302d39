"""A polite worker as a process: out of the way when it is to be, and back where it was when it may.

The coordinator is played by script, the child trains without torch, and a file says what the agent sees of its machine.
"""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fake_senses import see
from tests.scripted_coordinator import ScriptedCoordinator, assignment
from tests.test_agent import WORK, Starter, Worker, wait_until

GAMER = "game (pid 7, 3.0 GB)"


@pytest.fixture(scope="module")
def starter() -> Iterator[Starter]:
    one = Starter()
    yield one
    one.close()


@pytest.fixture
def plays() -> Iterator[ScriptedCoordinator]:
    with ScriptedCoordinator() as coordinator:
        yield coordinator


class Polite(Worker):
    """A worker that sees what the test says."""

    @property
    def senses(self) -> Path:
        return self.control / "senses.json"

    def start(self, *options: str, **environment: str) -> None:
        super().start("--quiet-for", "0", *options, FAKE_SENSES=str(self.senses), **environment)

    def sees(self, **seen: Any) -> None:
        see(self.senses, **seen)

    def children(self) -> list[psutil.Process]:
        assert self.pid is not None
        return [child for child in psutil.Process(self.pid).children(recursive=True) if _lives(child)]

    def hold_in_training(self, plays: ScriptedCoordinator) -> None:
        """Give it work, and have that wait at its third step, with a checkpoint of the second."""
        self.hold("train-2")
        plays.hand_out(assignment())
        checkpoint = self.state / "work" / f"{WORK}.1" / "checkpoint"
        wait_until("a checkpoint of step 2", lambda: checkpoint.exists() and checkpoint.read_text() == "2")

    def let_train(self) -> None:
        (self.control / "hold-train-2").unlink()


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def worker(starter: Starter, tmp_path: Path, plays: ScriptedCoordinator) -> Iterator[Polite]:
    with Polite(starter, tmp_path, plays.url) as one:
        yield one


def last_poll(plays: ScriptedCoordinator) -> dict[str, Any]:
    return plays.of("poll")[-1].body if plays.of("poll") else {}


# ---------------------------------------------------------------- others


def test_a_worker_makes_way_in_the_middle_of_its_work_and_goes_on_from_the_checkpoint_when_it_may(
    plays: ScriptedCoordinator, worker: Polite
) -> None:
    worker.start("--only-idle")
    worker.hold_in_training(plays)
    worker.sees(device="GPU 0", others_on_gpu=[GAMER])
    back = plays.wait_call("abandon").body
    assert worker.children() == [], "its memory is free before it is told"
    assert back["code"] == "released"
    assert back["sentence"] == "w is out of the way: GPU 0 is used by another process"
    plays.wait_for("a poll that says so", lambda: "another process" in last_poll(plays)["resting"])
    assert f"out of the way: GPU 0 is used by another process: {GAMER}" in worker.said
    assert not any("game" in str(call.body) for call in plays.calls), "whose processes run here is nobody's business"
    assert last_poll(plays)["degraded"] == ""
    assert worker.attempts() == {f"{WORK}.1"}
    beats = len(plays.of("heartbeat"))
    worker.let_train()
    worker.sees()
    plays.wait_for("the update", lambda: WORK in plays.accepted)
    assert plays.of("heartbeat")[beats].body["attempt"] == 1, "it asks whether the work is still its own"
    assert worker.trained() == ["train begin 0", "train begin 2", "train end"]
    assert plays.accepted[WORK]["resumed_at"] == 2
    plays.wait_for("a poll that says nothing of it", lambda: last_poll(plays)["resting"] == "")


def test_work_that_another_worker_took_meanwhile_is_dropped(plays: ScriptedCoordinator, worker: Polite) -> None:
    worker.start("--only-idle")
    worker.hold_in_training(plays)
    worker.sees(others_on_gpu=[GAMER])
    plays.wait_call("abandon")
    plays.orders[WORK] = "superseded"
    worker.let_train()
    worker.sees()
    wait_until("the attempt to be dropped", lambda: worker.attempts() == set())
    assert worker.trained() == ["train begin 0"]


def test_rests_do_not_count_as_deaths_of_the_agent(plays: ScriptedCoordinator, worker: Polite) -> None:
    worker.start("--only-idle")
    worker.hold_in_training(plays)
    for rest in range(1, 5):
        worker.sees(others_on_gpu=[GAMER])
        plays.wait_call("abandon", rest)
        worker.sees()
        worker.wait_trained("train begin 2", rest)
    worker.let_train()
    plays.wait_for("the update", lambda: WORK in plays.accepted)
    assert {call.body["code"] for call in plays.of("abandon")} == {"released"}


def test_what_is_trained_is_handed_in_whoever_needs_the_gpu(plays: ScriptedCoordinator, worker: Polite) -> None:
    disk = worker.slow_disk
    disk.touch()
    worker.start("--only-idle")
    plays.hand_out(assignment())
    worker.wait_trained("train end")
    plays.wait_for("the upload", lambda: "upload" in plays.names)
    worker.sees(others_on_gpu=[GAMER])
    wait_until("the child to be gone", lambda: worker.children() == [])
    disk.unlink()
    plays.wait_for("the update", lambda: WORK in plays.accepted)
    assert plays.of("abandon") == []


def test_a_worker_that_may_not_work_when_it_starts_joins_and_frees_its_memory(
    plays: ScriptedCoordinator, worker: Polite
) -> None:
    worker.sees(others_on_gpu=[GAMER])
    worker.start("--only-idle")
    plays.wait_for("a poll that says so", lambda: "another process" in last_poll(plays).get("resting", ""))
    wait_until("the child to be gone", lambda: worker.children() == [])
    assert worker.said.count("out of the way") == 1


def test_what_lies_unfinished_after_a_restart_waits_for_the_end_of_the_rest_too(
    plays: ScriptedCoordinator, worker: Polite
) -> None:
    worker.start("--only-idle")
    worker.hold_in_training(plays)
    worker.kill()
    worker.sees(others_on_gpu=[GAMER])
    polls = len(plays.of("poll"))
    worker.start("--only-idle")
    plays.wait_for("polls of the second life", lambda: len(plays.of("poll")) > polls + 1)
    assert worker.trained() == ["train begin 0"]
    worker.let_train()
    worker.sees()
    plays.wait_for("the update", lambda: plays.accepted.get(WORK, {}).get("resumed_at") == 2)


def test_work_that_comes_as_the_rest_begins_is_given_back_undone(plays: ScriptedCoordinator, worker: Polite) -> None:
    plays.script["poll"].append(lambda: (worker.sees(others_on_gpu=[GAMER]), _wait_said(worker, "out of the way"))[0])
    plays.hand_out(assignment())
    worker.start("--only-idle")
    assert plays.wait_call("abandon").body["code"] == "released"
    assert worker.asked() == []


def _wait_said(worker: Polite, words: str) -> None:
    wait_until(words, lambda: words in worker.said)


def test_memory_that_others_took_before_the_lookout_saw_them_is_not_the_tasks_fault(
    plays: ScriptedCoordinator, worker: Polite
) -> None:
    failing = worker.control / "fail-train"
    failing.write_text(json.dumps({"code": "out_of_memory", "sentence": "CUDA out of memory", "detail": ""}))
    hold = worker.hold("open")
    plays.hand_out(assignment())
    worker.start("--only-idle", FAKE_LOOK_S="3600")
    wait_until("the child to be asked", lambda: "open" in worker.asked())
    worker.sees(device="GPU 0", others_on_gpu=[GAMER])
    hold.unlink()
    assert plays.wait_call("abandon").body["code"] == "released"
    plays.wait_for("a poll that says so", lambda: "another process" in last_poll(plays)["resting"])


def test_memory_that_nobody_else_took_is_the_tasks_fault(plays: ScriptedCoordinator, worker: Polite) -> None:
    failing = worker.control / "fail-train"
    failing.write_text(json.dumps({"code": "out_of_memory", "sentence": "CUDA out of memory", "detail": ""}))
    plays.hand_out(assignment())
    worker.start("--only-idle")
    assert plays.wait_call("abandon").body["code"] == "out_of_memory"


# ---------------------------------------------------------------- heat


def last_held(plays: ScriptedCoordinator) -> str | None:
    """What the last beat says of a stand-still; None: there was no beat."""
    beats = plays.of("heartbeat")
    return str(beats[-1].body["held"]) if beats else None


def test_a_hot_worker_stands_still_keeps_its_lease_and_goes_on(plays: ScriptedCoordinator, worker: Polite) -> None:
    worker.start("--max-temperature", "80")
    worker.hold_in_training(plays)
    (child,) = worker.children()
    worker.sees(device="GPU 0", temperature=90.0)
    wait_until("the child to stand still", lambda: child.status() == psutil.STATUS_STOPPED)
    held = "GPU 0 is at 90 °C, and 80 °C are allowed"
    plays.wait_for("a beat that says so", lambda: last_held(plays) == held)
    worker.sees(temperature=60.0)
    wait_until("the child to go on", lambda: child.status() != psutil.STATUS_STOPPED)
    plays.wait_for("a beat that says nothing of it", lambda: last_held(plays) == "")
    worker.let_train()
    plays.wait_for("the update", lambda: WORK in plays.accepted)
    assert worker.trained() == ["train begin 0", "train end"]
    assert plays.of("abandon") == []


def test_a_worker_that_stands_still_leaves_when_it_is_told_to(plays: ScriptedCoordinator, worker: Polite) -> None:
    worker.start("--max-temperature", "80", "--grace", "0.2")
    worker.hold_in_training(plays)
    worker.sees(temperature=90.0)
    _wait_said(worker, "standing still")
    (child,) = worker.children()
    assert worker.terminate() == 0
    assert not _lives(child)
    assert plays.of("abandon")[-1].body["sentence"] == "w was stopped"


# ---------------------------------------------------------------- an operator


def test_a_worker_that_is_paused_in_the_middle_of_its_work_gives_it_back_and_goes_on_when_it_is_resumed(
    plays: ScriptedCoordinator, worker: Polite
) -> None:
    worker.start()
    worker.hold_in_training(plays)
    plays.orders[WORK] = "pause"
    assert plays.wait_call("abandon").body["sentence"] == "w is out of the way: an operator ordered it (pause)"
    assert worker.children() == []
    plays.wait_for("a poll that obeys", lambda: last_poll(plays)["obeys"] == "pause")
    assert last_poll(plays)["resting"] == "", "the coordinator knows why"
    plays.orders.clear()
    worker.let_train()
    plays.answer_poll(order="work")
    plays.wait_for("the update", lambda: WORK in plays.accepted)
    assert worker.trained() == ["train begin 0", "train begin 2", "train end"]


def test_an_idle_worker_that_is_paused_frees_its_memory_and_loads_torch_again_when_it_is_resumed(
    plays: ScriptedCoordinator, worker: Polite
) -> None:
    worker.start()
    plays.wait_call("poll")
    plays.answer_poll(order="pause")
    plays.wait_for("a poll that obeys", lambda: last_poll(plays)["obeys"] == "pause")
    assert worker.children() == []
    plays.answer_poll(order="work")
    wait_until("a child", lambda: len(worker.children()) == 1)
    plays.wait_for("a poll that obeys", lambda: last_poll(plays)["obeys"] == "work")


def test_a_worker_that_is_drained_finishes_stays_joined_and_frees_its_memory(
    plays: ScriptedCoordinator, worker: Polite
) -> None:
    worker.start()
    worker.hold_in_training(plays)
    plays.orders[WORK] = "drain"
    beats = len(plays.of("heartbeat"))
    plays.wait_for("a beat that was answered so", lambda: len(plays.of("heartbeat")) > beats + 1)
    worker.let_train()
    plays.wait_for("the update", lambda: WORK in plays.accepted)
    plays.answer_poll(order="drain")
    plays.wait_for("a poll that obeys", lambda: last_poll(plays)["obeys"] == "drain")
    wait_until("the child to be gone", lambda: worker.children() == [])
    plays.answer_poll(order="work")
    plays.hand_out(assignment(2))
    plays.wait_for("more work to be done", lambda: len(plays.accepted) == 2)


def test_a_paused_worker_that_is_started_anew_leaves_its_unfinished_work_alone(
    plays: ScriptedCoordinator, worker: Polite
) -> None:
    worker.start()
    worker.hold_in_training(plays)
    worker.kill()
    plays.orders[WORK] = "pause"
    worker.start()
    assert plays.wait_call("abandon").body["code"] == "released"
    plays.wait_for("a poll that obeys", lambda: last_poll(plays)["obeys"] == "pause")
    assert worker.attempts() == {f"{WORK}.1"}
    assert worker.trained() == ["train begin 0"]


# ---------------------------------------------------------------- what the owner says


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--hours", "22-07"), "--hours 22-07 is no part of a day"),
        (("--max-memory", "lots"), "--max-memory lots is neither a share nor a size"),
        (("--idle-load", "2GB"), "--idle-load 2GB is no share"),
    ],
)
def test_a_rule_that_says_nothing_is_refused_before_anything_is_asked(
    options: tuple[str, ...], words: str, plays: ScriptedCoordinator, worker: Polite
) -> None:
    worker.start(*options)
    assert worker.ended() == 1
    assert words in worker.said
    assert plays.calls == []


def test_a_rule_that_cannot_be_kept_here_ends_the_worker_with_a_sentence(
    plays: ScriptedCoordinator, worker: Polite
) -> None:
    Worker.start(worker, "--max-power", "200", "--device", "cpu")  # its own senses
    assert worker.ended() == 1
    assert "--max-power cannot be kept: the power of the processor is not known" in worker.said
    assert "register" not in plays.names


def test_the_environment_says_the_same_as_the_flags(plays: ScriptedCoordinator, worker: Polite) -> None:
    never = {"LYDIAN_HOURS": "mon@00:00-00:01 tue@00:00-00:01", "LYDIAN_ONLY_IDLE": "1"}
    worker.start(**never)
    plays.wait_for("a poll", lambda: bool(plays.of("poll")))
    said = last_poll(plays)["resting"]
    assert said == "" or said.startswith("outside its hours (mon@00:00-00:01, tue@00:00-00:01): back ")
    worker.sees(others_on_gpu=[GAMER])
    plays.wait_for("a poll that says so", lambda: last_poll(plays)["resting"] != "")


def test_a_signal_while_it_rests_ends_the_worker_at_once(plays: ScriptedCoordinator, worker: Polite) -> None:
    worker.sees(others_on_gpu=[GAMER])
    worker.start("--only-idle")
    plays.wait_for("a poll that says so", lambda: last_poll(plays).get("resting", "") != "")
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGTERM)
    assert worker.ended() == 0
    assert plays.names[-1] == "leave"
