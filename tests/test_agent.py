"""The agent as a process: killed at every step, told to go, refused, and without room. Nothing trained is lost.

The coordinator is played by script, over a real socket; the child is a real process that trains without torch.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import (
    ConflictError,
    JobOverError,
    LateError,
    LydianError,
    NotFoundError,
    SupersededError,
    TooManyError,
    UnauthenticatedError,
    UnavailableError,
    VersionSkewError,
)
from common.messages import Assignment, JobSpec
from common.signing import Signer, sign
from tests.acceptance.kit import LocalFleet, of_type
from tests.privileges import needs_mounts
from tests.scripted_coordinator import MODEL, Garble, Hold, Lose, ScriptedCoordinator, assignment

ROOT = Path(__file__).resolve().parent.parent

BOUND_S = 120.0  # for what happens at once on a machine that has nothing else to do
WORK = assignment().id


def wait_until(what: str, true: Callable[[], Any]) -> None:
    """Wait for something that another process does."""
    deadline, pause = time.monotonic() + BOUND_S, threading.Event()
    while not true():
        assert time.monotonic() < deadline, f"not within {BOUND_S:g} s: {what}"
        pause.wait(0.01)


class Starter:
    """The program that forks agents (tests/agent_process.py)."""

    def __init__(self) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LYDIAN_")}
        self._program = subprocess.Popen(
            [sys.executable, "-m", "tests.agent_process"],
            cwd=ROOT,
            env={**kept, "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **asked: Any) -> int:
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.write(json.dumps(asked) + "\n")
        self._program.stdin.flush()
        return int(self._program.stdout.readline())

    def close(self) -> None:
        self._program.communicate()


@pytest.fixture(scope="module")
def starter() -> Iterator[Starter]:
    one = Starter()
    yield one
    one.close()


class Worker:
    """One agent at a time in one state folder, with a child and a disk that the test holds."""

    def __init__(
        self, starter: Starter, folder: Path, url: str, token: str = "lyd_join_x", state: Path | None = None
    ) -> None:
        self.starter, self.url, self.token = starter, url, token
        self.state, self.control, self.log = state or folder / "state", folder / "control", folder / "worker.log"
        self.slow_disk = folder / "slow-disk"
        self.control.mkdir()
        self.log.touch()
        self.pid: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self, *options: str, **environment: str) -> None:
        given = {"LYDIAN_TOKEN": self.token, "FAKE_CHILD": str(self.control), "SLOW_DISK": str(self.slow_disk)}
        given |= environment
        arguments = [self.url, "--name", "w", "--state-dir", str(self.state), "--threads", "1", *options]
        self.pid = self.starter.ask(arguments=arguments, environment=given, log=str(self.log))

    def hold(self, do: str) -> Path:
        file = self.control / f"hold-{do}"
        file.touch()
        return file

    def kill(self) -> None:
        if self.pid is not None:
            self.signal(signal.SIGKILL)
            self.ended()

    def terminate(self) -> int:
        self.signal(signal.SIGTERM)
        return self.ended()

    def signal(self, number: int) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)

    def ended(self) -> int:
        """The exit code of the agent, which ends by itself."""
        code, self.pid = self.starter.ask(wait=self.pid), None
        return code

    @property
    def said(self) -> str:
        return self.log.read_text()

    def asked(self) -> list[str]:
        """What the children were asked, and did."""
        calls = self.control / "calls.txt"
        return calls.read_text().splitlines() if calls.exists() else []

    def trained(self) -> list[str]:
        """What the children did, as far as it is training."""
        return [line for line in self.asked() if line.startswith("train ")]

    def attempts(self) -> set[str]:
        return {path.name for path in (self.state / "work").iterdir()}

    def wait_trained(self, line: str, times: int = 1) -> None:
        wait_until(f"{line!r}, {times} times", lambda: self.trained().count(line) == times)


@pytest.fixture
def plays() -> Iterator[ScriptedCoordinator]:
    with ScriptedCoordinator() as coordinator:
        yield coordinator


@pytest.fixture
def worker(starter: Starter, tmp_path: Path, plays: ScriptedCoordinator) -> Iterator[Worker]:
    with Worker(starter, tmp_path, plays.url) as one:
        yield one


def holding(call_body: dict[str, Any]) -> list[tuple[str, int, bool]]:
    """(assignment, attempt, whether it is trained) of what a message names."""
    return [(held["assignment"], held["attempt"], held["digest"] is not None) for held in call_body["holding"]]


def update_of(digest: str, worker: Worker) -> bool:
    file = worker.state / "work" / f"{WORK}.1" / "update.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() == digest


# ---------------------------------------------------------------- killed at every step


def kill_downloaded(plays: ScriptedCoordinator, worker: Worker) -> None:
    hold = worker.hold("open")
    wait_until("the child to be asked", lambda: "open" in worker.asked())
    worker.kill()
    hold.unlink()


def kill_training(plays: ScriptedCoordinator, worker: Worker) -> None:
    worker.wait_trained("train begin 0")
    wait_until("a checkpoint", lambda: (worker.state / "work" / f"{WORK}.1" / "checkpoint").exists())
    wait_until("step 2", lambda: (worker.state / "work" / f"{WORK}.1" / "checkpoint").read_text() == "2")
    worker.kill()
    (worker.control / "hold-train-2").unlink()


def kill_unsynced(plays: ScriptedCoordinator, worker: Worker) -> None:
    wait_until("the submission", lambda: (worker.state / "work" / f"{WORK}.1" / "submission.json").exists())
    worker.kill()
    worker.slow_disk.unlink()


def kill_at_hold(plays: ScriptedCoordinator, worker: Worker) -> None:
    wait_until("the held call", lambda: plays.holds)
    assert plays.holds[0].came.wait(BOUND_S)
    worker.kill()


def kill_after_submit(plays: ScriptedCoordinator, worker: Worker) -> None:
    plays.wait_for("it to be accepted", lambda: WORK in plays.accepted)
    worker.kill()


def prepare(stage: str, plays: ScriptedCoordinator, worker: Worker) -> Callable[[ScriptedCoordinator, Worker], None]:
    """Set the scene for a kill at a stage; what is returned waits for it and kills."""
    match stage:
        case "downloaded":
            worker.hold("open")
            return kill_downloaded
        case "training":
            worker.hold("train-2")
            return kill_training
        case "trained, not synced":
            worker.slow_disk.touch()
            return kill_unsynced
        case "half uploaded":
            plays.script["upload"].append(Hold(after=len(MODEL) // 2))
            return kill_at_hold
        case "uploaded, not submitted":
            plays.script["submit"].append(Hold())
            return kill_at_hold
        case _:
            plays.script["submit"] += [Lose(), *[UnavailableError("away")] * 20]
            return kill_after_submit


def test_a_worker_that_is_told_to_call_less_loses_nothing_and_trains_nothing_again(
    plays: ScriptedCoordinator, worker: Worker
) -> None:
    for call in ("poll", "model", "upload", "submit"):
        plays.script[call].append(TooManyError("too many calls"))
    plays.hand_out(assignment())
    worker.start()
    plays.wait_for("the update to be kept", lambda: bool(plays.of("poll")) and _kept_is_told(plays))
    assert [line for line in worker.trained() if line.startswith("train begin")] == ["train begin 0"]
    assert all(not plays.script[call] for call in ("poll", "model", "upload", "submit"))


STAGES = ["downloaded", "training", "trained, not synced", "half uploaded", "uploaded, not submitted", "answer lost"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_agent_killed_at_any_step_comes_back_and_trains_nothing_again(
    stage: str, plays: ScriptedCoordinator, worker: Worker
) -> None:
    kill = prepare(stage, plays, worker)
    plays.hand_out(assignment())
    worker.start()
    kill(plays, worker)
    plays.script["submit"].clear()
    worker.start()
    plays.wait_for("the update to be kept", lambda: bool(plays.of("poll")) and _kept_is_told(plays))
    begun = [line for line in worker.trained() if line.startswith("train begin")]
    submission = plays.accepted[WORK]
    resumed = submission["resumed_at"]
    assert begun == (["train begin 0", f"train begin {resumed}"] if stage == "training" else ["train begin 0"])
    assert worker.trained().count("train end") == 1
    reborn = plays.of("register")[1].body
    assert holding(reborn) == [(WORK, 1, stage not in ("downloaded", "training"))]
    assert reborn["place"] == plays.of("register")[0].body["place"] != ""
    assert (resumed >= 2) if stage == "training" else (resumed == 0)
    assert update_of(submission["digest"], worker)
    assert plays.received == len(MODEL)  # no byte of it went over the line twice
    assert plays.names.index("poll") < plays.names.index("submit")  # the first life polled for it; the second:
    second = plays.names[plays.names.index("register", plays.names.index("register") + 1) :]
    assert "submit" in second[: second.index("poll")], "the second life polled before it handed in"


def _kept_is_told(plays: ScriptedCoordinator) -> bool:
    return any(holding(call.body) == [(WORK, 1, True)] for call in plays.of("poll"))


def test_what_is_submitted_is_on_this_disk_before(plays: ScriptedCoordinator, worker: Worker) -> None:
    worker.slow_disk.touch()
    synced: list[str] = []
    log = worker.slow_disk.with_suffix(".log")
    plays.script["submit"].append(lambda: synced.extend(log.read_text().split()))
    plays.hand_out(assignment())
    worker.start()
    plays.wait_call("upload")  # it does not wait for the disk
    assert "submit" not in plays.names
    worker.slow_disk.unlink()
    plays.wait_call("submit")
    wait_until("the look at the log", lambda: synced)
    assert {"update.safetensors", "submission.json", f"{WORK}.1", "work"} <= set(synced)


def test_a_third_start_of_the_same_attempt_gives_it_back(plays: ScriptedCoordinator, worker: Worker) -> None:
    hold = worker.hold("train-0")
    plays.hand_out(assignment())
    for starts in (1, 2):
        worker.start()
        worker.wait_trained("train begin 0", starts)
        worker.kill()
    hold.unlink()
    worker.start()
    reason = plays.wait_call("abandon").body
    assert (reason["attempt"], reason["code"]) == (1, "task_exited")
    assert "ended 2 times" in reason["sentence"]
    wait_until("the attempt to be gone", lambda: not worker.attempts())
    assert len(worker.trained()) == 2


def test_unfinished_work_that_is_not_wanted_any_more_is_dropped(plays: ScriptedCoordinator, worker: Worker) -> None:
    hold = worker.hold("train-1")
    plays.hand_out(assignment())
    worker.start()
    worker.wait_trained("train begin 0")
    worker.kill()
    hold.unlink()
    plays.orders[WORK] = "superseded"
    worker.start()
    plays.wait_for(
        "a poll of the second life", lambda: plays.names[-1] == "poll" and plays.names.count("register") == 2
    )
    assert worker.attempts() == set()
    assert worker.trained() == ["train begin 0"]


@pytest.mark.parametrize("refusal", [SupersededError("another counts"), LateError("closed"), JobOverError("over")])
def test_a_trained_update_that_nobody_wants_any_more_is_dropped(
    refusal: LydianError, plays: ScriptedCoordinator, worker: Worker
) -> None:
    plays.script["submit"].append(Hold())
    plays.hand_out(assignment())
    worker.start()
    kill_at_hold(plays, worker)
    plays.script["submit"].append(refusal)
    worker.start()
    plays.wait_for("a poll of the second life", lambda: plays.names[-1] == "poll" and plays.names.count("submit") == 2)
    assert worker.attempts() == set()
    assert plays.of("poll")[-1].body["holding"] == []


def test_unfinished_work_of_a_job_that_the_coordinator_forgot_is_dropped(
    plays: ScriptedCoordinator, worker: Worker
) -> None:
    hold = worker.hold("train-1")
    plays.hand_out(assignment())
    worker.start()
    worker.wait_trained("train begin 0")
    worker.kill()
    hold.unlink()
    plays.script["heartbeat"].append(NotFoundError("no such job"))
    worker.start()
    plays.wait_for(
        "a poll of the second life", lambda: plays.names[-1] == "poll" and plays.names.count("register") == 2
    )
    assert worker.attempts() == set()
    assert worker.trained() == ["train begin 0"]


# ---------------------------------------------------------------- kept until settled


def test_a_kept_update_is_named_in_each_poll_until_it_is_settled(plays: ScriptedCoordinator, worker: Worker) -> None:
    plays.hand_out(assignment())
    worker.start()
    plays.wait_for("three polls with it", lambda: sum(bool(call.body["holding"]) for call in plays.of("poll")) >= 3)
    held = plays.of("poll")[-1].body["holding"]
    assert worker.attempts() == {f"{WORK}.1"}
    plays.answer_poll(settled=[{**held[0], "digest": "0" * 64}])  # of another update: none of this worker's business
    plays.answer_poll(settled=held)
    plays.wait_for("a poll without it", lambda: bool(plays.of("poll")) and plays.of("poll")[-1].body["holding"] == [])
    assert worker.attempts() == set()


def test_a_worker_that_is_asked_to_fetches_a_new_credential_and_keeps_it_before_it_uses_it(
    plays: ScriptedCoordinator, worker: Worker
) -> None:
    plays.renewed = "lyd_work_y"
    plays.script["register"] += [lambda: None, UnavailableError("away")]  # the first try to fetch it is lost
    plays.answer_poll(renew=True)
    worker.start()
    plays.wait_for("a poll with it", lambda: any(call.token == "Bearer lyd_work_y" for call in plays.of("poll")))
    registered = plays.of("register")
    assert [call.token for call in registered] == ["Bearer lyd_join_x", *["Bearer lyd_work_x"] * 2]
    assert len({call.body["start_id"] for call in registered}) == 1, "the same process: its work goes on"
    assert "lyd_work_y" in (worker.state / "identity.json").read_text()
    assert "lyd_work_y" not in worker.said


def test_a_wanted_update_is_sent_again_before_the_new_work(plays: ScriptedCoordinator, worker: Worker) -> None:
    plays.hand_out(assignment())
    worker.start()
    plays.wait_for("it to be kept", lambda: _kept_is_told(plays))
    first, held = plays.accepted[WORK]["digest"], plays.of("poll")[-1].body["holding"]
    plays.lost.add(WORK)
    plays.hand_out(assignment(2), wanted=held)
    plays.wait_for("the second update", lambda: assignment(2).id in plays.accepted)
    assert plays.accepted[WORK]["digest"] == first
    assert worker.trained().count("train end") == 2
    order = [call.path.split("/")[3].partition("?")[0] for call in plays.calls if call.name == "upload"]
    assert order == [WORK, WORK, assignment(2).id]
    plays.wait_for("both to be kept", lambda: bool(plays.of("poll")) and len(plays.of("poll")[-1].body["holding"]) == 2)


def test_a_wanted_update_that_is_damaged_here_is_held_no_longer(plays: ScriptedCoordinator, worker: Worker) -> None:
    plays.hand_out(assignment())
    worker.start()
    plays.wait_for("it to be kept", lambda: _kept_is_told(plays))
    held = plays.of("poll")[-1].body["holding"]
    file = worker.state / "work" / f"{WORK}.1" / "update.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    plays.answer_poll(wanted=held)
    plays.wait_for("a poll without it", lambda: bool(plays.of("poll")) and plays.of("poll")[-1].body["holding"] == [])
    assert "damaged on this disk" in worker.said
    assert len(plays.of("submit")) == 1


def test_an_update_that_cannot_be_unmasked_is_held_no_longer(plays: ScriptedCoordinator, worker: Worker) -> None:
    plays.hand_out(assignment())
    worker.start()
    plays.wait_for("it to be kept", lambda: _kept_is_told(plays))
    asked = {"assignment": WORK, "attempt": 1, "roster": "0" * 64, "survivors": [0, 1, 2], "sealed": {}}
    plays.answer_poll(unmask=[{**asked, "attempt": 7}, asked])
    plays.wait_for("a poll without it", lambda: bool(plays.of("poll")) and plays.of("poll")[-1].body["holding"] == [])
    assert "attempt 7, is to be unmasked, and is not kept here" in worker.said
    assert "no share is opened, and it is dropped" in worker.said


def test_a_wanted_update_that_is_refused_is_held_no_longer(plays: ScriptedCoordinator, worker: Worker) -> None:
    plays.hand_out(assignment())
    worker.start()
    plays.wait_for("it to be kept", lambda: _kept_is_told(plays))
    held = plays.of("poll")[-1].body["holding"]
    plays.script["submit"].append(LateError("closed meanwhile"))
    plays.answer_poll(wanted=[{**held[0], "attempt": 7}, *held])  # the first is not kept here, which ends nothing
    plays.wait_for("a poll without it", lambda: bool(plays.of("poll")) and plays.of("poll")[-1].body["holding"] == [])
    assert "attempt 7, is wanted again, and is not kept here" in worker.said
    assert worker.attempts() == set()


def test_work_whose_base_is_gone_is_dropped(plays: ScriptedCoordinator, worker: Worker) -> None:
    plays.script["model"].append(NotFoundError("no such model"))
    plays.hand_out(assignment())
    worker.start()
    plays.wait_for("the next poll", lambda: plays.names.count("poll") >= 2)
    assert worker.attempts() == set()
    assert worker.trained() == []


def test_updates_of_a_job_that_is_over_are_dropped(plays: ScriptedCoordinator, worker: Worker) -> None:
    plays.hand_out(assignment())
    worker.start()
    plays.wait_for("it to be kept", lambda: _kept_is_told(plays))
    plays.answer_poll(forget=["job-1"])
    plays.wait_for("a poll without it", lambda: bool(plays.of("poll")) and plays.of("poll")[-1].body["holding"] == [])
    assert worker.attempts() == set()


# ---------------------------------------------------------------- the optimiser's state


def keeping(number: int = 1, **fields: Any) -> Assignment:
    return assignment(
        number, spec=JobSpec.model_validate({"task": "digits", "train": {"keep_optimizer": True}}), **fields
    )


def states(worker: Worker) -> dict[str, str]:
    """Name -> content of what is kept."""
    found = dict[str, str]()
    for path in (worker.state / "optimizers").glob("*/*"):
        with suppress(FileNotFoundError):  # the agent deletes while the test looks
            found[path.name] = path.read_text()
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_the_state_of_an_accepted_update_is_gone_on_from_whenever_the_agent_was_killed(
    stage: str, plays: ScriptedCoordinator, worker: Worker
) -> None:
    kill = prepare(stage, plays, worker)
    plays.hand_out(keeping())
    worker.start()
    kill(plays, worker)
    assert states(worker) == {}  # not before the receipt
    plays.script["submit"].clear()
    worker.start()
    plays.wait_for("the update to be kept", lambda: bool(plays.of("poll")) and _kept_is_told(plays))
    assert states(worker) == {"job-1.0.1": "after round 1"}
    assert "optimizer" not in {path.name for path in (worker.state / "work" / f"{WORK}.1").iterdir()}
    plays.hand_out(keeping(2, optimizer_of=1))
    plays.wait_for("the second update", lambda: keeping(2).id in plays.accepted)
    assert "optimizer of 1: after round 1" in worker.asked()
    wait_until("its state alone", lambda: states(worker) == {"job-1.0.2": "after round 2"})


@pytest.mark.parametrize("error", [SupersededError("other"), JobOverError("over")])
def test_the_state_of_an_update_that_does_not_count_is_dropped_and_the_one_before_stays(
    error: LydianError, plays: ScriptedCoordinator, worker: Worker
) -> None:
    plays.hand_out(keeping())
    worker.start()
    plays.wait_for("it to be kept", lambda: _kept_is_told(plays))
    plays.script["submit"].append(error)
    plays.hand_out(keeping(2, optimizer_of=1))
    plays.wait_for("the poll after it", lambda: plays.names.count("submit") >= 2 and plays.names[-1] == "poll")
    assert states(worker) == {"job-1.0.1": "after round 1"}


def test_a_late_update_may_have_counted_so_the_coordinator_says_which_state_does(
    plays: ScriptedCoordinator, worker: Worker
) -> None:
    plays.hand_out(keeping())
    worker.start()
    plays.wait_for("it to be kept", lambda: _kept_is_told(plays))
    plays.script["submit"].append(LateError("round 2 is closed"))
    plays.hand_out(keeping(2, optimizer_of=1), keeping(3, optimizer_of=2))
    plays.wait_for("the third update", lambda: keeping(3).id in plays.accepted)
    assert "optimizer of 2: after round 2" in worker.asked()
    wait_until("one state", lambda: states(worker) == {"job-1.0.3": "after round 3"})


def test_states_are_named_until_their_job_is_over_and_then_deleted(plays: ScriptedCoordinator, worker: Worker) -> None:
    plays.hand_out(keeping())
    worker.start()
    plays.wait_for("it to be kept", lambda: _kept_is_told(plays))
    worker.kill()
    worker.start()  # which has nothing loaded
    plays.wait_for("the second life's poll", lambda: plays.names.count("register") == 2 and plays.names[-1] == "poll")
    assert plays.of("poll")[-1].body["loaded"] == ["job-1"]
    for _ in range(2):  # the poll of the killed life may take one
        plays.answer_poll(forget=["job-1"])
    plays.wait_for("a poll without it", lambda: bool(plays.of("poll")) and plays.of("poll")[-1].body["loaded"] == [])
    assert states(worker) == {}


def test_an_evaluation_is_not_kept(plays: ScriptedCoordinator, worker: Worker) -> None:
    work = assignment(kind="evaluate", id="job-1.evaluate.1.0")
    plays.hand_out(work)
    worker.start()
    plays.wait_call("submit")
    plays.wait_for("the next poll", lambda: plays.names[-1] == "poll")
    wait_until("the attempt to be gone", lambda: not worker.attempts())
    assert plays.accepted[work.id]["digest"] is None


def test_a_lost_answer_does_not_lose_the_update(plays: ScriptedCoordinator, worker: Worker) -> None:
    """Once it counts, its bytes are refused: the agent must submit again before it thinks of sending them."""
    plays.script["submit"].append(Lose())
    plays.hand_out(assignment())
    worker.start()
    plays.wait_for("it to be kept", lambda: _kept_is_told(plays))
    assert plays.received == len(MODEL)
    assert len(plays.of("upload")) == 1


def test_answers_that_were_damaged_on_the_way_cost_a_try_and_nothing_else(
    plays: ScriptedCoordinator, worker: Worker
) -> None:
    for call in ("version", "register", "poll", "heartbeat", "submit"):
        plays.script[call].append(Garble())
    plays.answer_poll()
    plays.hand_out(assignment())
    hold = worker.hold("train-0")
    worker.start()
    plays.wait_call("heartbeat", 2)
    hold.unlink()
    plays.wait_for("it to be kept", lambda: _kept_is_told(plays))
    assert worker.said.count("does not understand") == 5
    assert len(plays.of("upload")) == 1


# ---------------------------------------------------------------- small models, small updates

ALL = len(MODEL)


def test_a_small_update_is_handed_in_by_one_call_that_waits_for_this_disk(
    plays: ScriptedCoordinator, worker: Worker
) -> None:
    worker.slow_disk.touch()
    synced: list[str] = []
    log = worker.slow_disk.with_suffix(".log")
    plays.script["upload"].append(lambda: synced.extend(log.read_text().split()))
    plays.hand_out(assignment(together=ALL))
    worker.start()
    worker.wait_trained("train end")
    worker.slow_disk.unlink()
    plays.wait_for("it to be kept", lambda: _kept_is_told(plays))
    assert {"update.safetensors", "submission.json"} <= set(synced)
    assert (len(plays.of("upload")), plays.of("submit"), plays.received) == (1, [], ALL)
    assert plays.accepted[WORK] == plays.of("upload")[0].body


def test_an_update_that_is_a_byte_too_large_is_uploaded_and_then_submitted(
    plays: ScriptedCoordinator, worker: Worker
) -> None:
    plays.hand_out(assignment(together=ALL - 1))
    worker.start()
    plays.wait_for("it to be kept", lambda: _kept_is_told(plays))
    assert (len(plays.of("upload")), len(plays.of("submit"))) == (1, 1)
    assert plays.of("upload")[0].body == {}


def test_after_a_lost_answer_to_the_one_call_it_is_submitted_and_not_sent_again(
    plays: ScriptedCoordinator, worker: Worker
) -> None:
    plays.script["upload"].append(Lose())
    plays.hand_out(assignment(together=ALL))
    worker.start()
    plays.wait_for("it to be kept", lambda: _kept_is_told(plays))
    assert (len(plays.of("upload")), len(plays.of("submit")), plays.received) == (1, 1, ALL)


def test_a_broken_call_of_both_is_gone_on_with_where_it_broke(plays: ScriptedCoordinator, worker: Worker) -> None:
    hold = Hold(after=ALL // 2)
    plays.script["upload"].append(hold)
    plays.hand_out(assignment(together=ALL))
    worker.start()
    assert hold.came.wait(BOUND_S)
    hold.go.set()
    plays.wait_for("it to be kept", lambda: _kept_is_told(plays))
    assert plays.received == ALL
    assert len(plays.of("upload")) == 2


def test_a_late_answer_to_the_one_call_drops_the_update(plays: ScriptedCoordinator, worker: Worker) -> None:
    plays.script["upload"].append(LateError("closed by quorum"))
    plays.hand_out(assignment(together=ALL))
    worker.start()
    plays.wait_call("poll", 3)
    wait_until("the attempt to be gone", lambda: not worker.attempts())
    assert not plays.accepted


def test_a_model_that_came_with_its_work_is_not_fetched_and_counts_as_received(
    plays: ScriptedCoordinator, worker: Worker
) -> None:
    plays.along = MODEL
    plays.hand_out(assignment(), assignment(2))
    worker.start()
    plays.wait_call("submit", 2)
    assert "model" not in plays.names
    assert [call.body["bytes_down"] for call in plays.of("submit")] == [ALL, ALL]
    assert plays.of("poll")[0].body["models"] == []
    assert plays.of("poll")[1].body["models"] == [hashlib.sha256(MODEL).hexdigest()]


def test_a_model_that_was_damaged_with_its_work_is_fetched_by_itself(
    plays: ScriptedCoordinator, worker: Worker
) -> None:
    plays.along = b"x" + MODEL[1:]
    plays.hand_out(assignment(), assignment())  # the same work for the same claim
    worker.start()
    submission = plays.wait_call("submit").body
    assert submission["bytes_down"] == ALL
    assert "model" in plays.names
    first, again = plays.of("poll")[:2]
    assert (first.body["claim_key"], first.body["together"] > 0) == (again.body["claim_key"], True)
    assert again.body["together"] == 0


# ---------------------------------------------------------------- orders that come late


def test_a_beat_that_says_superseded_does_not_keep_a_trained_update_from_being_offered(
    plays: ScriptedCoordinator, worker: Worker
) -> None:
    plays.script["submit"] += [UnavailableError("away")] * 1000
    plays.hand_out(assignment())
    worker.start()
    plays.wait_call("submit", 2)
    plays.script["heartbeat"].append(lambda: plays.orders.update({WORK: "superseded"}))
    plays.wait_for("a beat that is answered so", lambda: WORK in plays.orders)
    submits = len(plays.of("submit"))
    plays.wait_call("submit", submits + 2)
    plays.script["submit"].clear()
    plays.wait_for("it to be kept", lambda: _kept_is_told(plays))


def test_an_answer_to_a_beat_that_comes_late_does_not_stop_the_next_work(
    plays: ScriptedCoordinator, worker: Worker
) -> None:
    hold, late, answered = worker.hold("train-0"), threading.Event(), threading.Event()
    plays.script["heartbeat"].append(lambda: answered.set() if late.wait(BOUND_S) else None)
    plays.orders[WORK] = "superseded"
    plays.hand_out(assignment())
    worker.start()
    plays.wait_call("heartbeat")
    hold.unlink()
    plays.wait_for("the first update", lambda: WORK in plays.accepted)
    hold.touch()
    plays.hand_out(assignment(2))
    worker.wait_trained("train begin 0", 2)
    late.set()
    assert answered.wait(BOUND_S)
    plays.wait_call("heartbeat", len(plays.of("heartbeat")) + 3)  # the answer has had its time
    hold.unlink()
    plays.wait_for("the second update", lambda: assignment(2).id in plays.accepted)


# ---------------------------------------------------------------- told to go


def test_work_under_way_is_finished_within_the_grace(plays: ScriptedCoordinator, worker: Worker) -> None:
    release = worker.hold("train-2")
    plays.hand_out(assignment())
    worker.start("--grace", "300")
    worker.wait_trained("train begin 0")
    worker.signal(signal.SIGTERM)
    wait_until(
        "the agent to say what it waits for", lambda: f"finishing {WORK} (training), at most 300 s" in worker.said
    )
    release.unlink()
    assert worker.ended() == 0
    assert WORK in plays.accepted
    assert plays.names[-1] == "leave"
    assert worker.attempts() == {f"{WORK}.1"}  # kept: it is not settled


def test_work_that_is_not_done_within_the_grace_is_handed_back(plays: ScriptedCoordinator, worker: Worker) -> None:
    worker.hold("train-2")
    plays.hand_out(assignment())
    worker.start("--grace", "0.2")
    worker.wait_trained("train begin 0")
    assert worker.terminate() == 0
    assert plays.names[-1] == "leave"
    assert plays.of("abandon")[0].body["code"] == "released"
    assert worker.attempts() == set()


def test_work_that_cannot_be_handed_back_is_gone_on_with_at_the_next_start(
    plays: ScriptedCoordinator, worker: Worker
) -> None:
    hold = worker.hold("train-2")
    plays.script["abandon"].append(UnavailableError("away"))
    plays.hand_out(assignment())
    worker.start("--grace", "0")
    wait_until("step 2", lambda: _checkpoints(worker) == ["2"])
    assert worker.terminate() == 0
    hold.unlink()
    worker.start()
    plays.wait_for("the update", lambda: WORK in plays.accepted)
    assert plays.accepted[WORK]["resumed_at"] == 2


def test_a_second_signal_stops_at_once(plays: ScriptedCoordinator, worker: Worker) -> None:
    worker.hold("train-2")
    plays.hand_out(assignment())
    worker.start("--grace", "600")
    worker.wait_trained("train begin 0")
    worker.signal(signal.SIGTERM)
    wait_until("the first to be heard", lambda: "told to go" in worker.said)
    assert worker.terminate() == 0
    assert plays.names[-1] == "leave"


def test_an_idle_agent_leaves_at_once(plays: ScriptedCoordinator, worker: Worker) -> None:
    worker.start("--grace", "600")
    plays.wait_call("poll")
    assert worker.terminate() == 0
    assert plays.names[-1] == "leave"


def test_an_update_that_cannot_be_handed_in_within_the_grace_waits_for_the_next_start(
    plays: ScriptedCoordinator, worker: Worker
) -> None:
    plays.script["submit"] += [UnavailableError("not now")] * 1000
    plays.hand_out(assignment())
    worker.start("--grace", "0.1")
    plays.wait_call("submit", 2)
    assert worker.terminate() == 0
    assert "abandon" not in plays.names
    assert "stays in the spool for the next start" in worker.said
    plays.script["submit"].clear()
    worker.start()
    plays.wait_for("it to be kept", lambda: _kept_is_told(plays))
    assert worker.trained().count("train end") == 1
    assert plays.received == len(MODEL)


# ---------------------------------------------------------------- refused


def test_an_older_coordinator_is_told_from_a_newer_one_before_anything_is_sent(
    plays: ScriptedCoordinator, worker: Worker
) -> None:
    plays.protocol -= 1
    worker.start()
    assert worker.ended() == 1
    assert plays.names == ["version"]
    assert re.search(r"Upgrade the coordinator, or install version 0\.0\.9 here", worker.said)


def test_a_coordinator_that_is_newer_says_so_itself(plays: ScriptedCoordinator, worker: Worker) -> None:
    plays.protocol += 5
    plays.script["register"].append(VersionSkewError("too old", advice="Upgrade this worker."))
    worker.start()
    assert worker.ended() == 1
    assert "Upgrade this worker." in worker.said
    assert plays.names == ["version", "register"]


def test_what_is_no_coordinator_is_said_to_be_none(plays: ScriptedCoordinator, worker: Worker) -> None:
    plays.protocol = -1.5  # type: ignore[assignment]
    worker.start()
    assert worker.ended() == 1
    assert "not as a coordinator does" in worker.said
    assert "Traceback" not in worker.said


def test_a_worker_that_was_forgotten_joins_anew_with_its_token(plays: ScriptedCoordinator, worker: Worker) -> None:
    worker.start()
    plays.wait_call("poll")
    worker.kill()
    plays.script["register"].append(UnauthenticatedError("no such token"))
    worker.start()
    plays.wait_call("register", 3)
    plays.wait_for("a poll of the second life", lambda: plays.names[-1] == "poll")
    assert "joining anew" in worker.said


def test_a_copied_credential_stops_the_agent_and_is_not_tried_again(plays: ScriptedCoordinator, worker: Worker) -> None:
    plays.script["register"].append(ConflictError("w is at work already, on host attic", code="already_working"))
    worker.start()
    assert worker.ended() == 4
    assert "on host attic" in worker.said
    assert plays.names == ["version", "register"]


@pytest.mark.parametrize("call", ["poll", "heartbeat"])
def test_an_agent_whose_place_was_taken_stops_without_a_word(
    call: str, plays: ScriptedCoordinator, worker: Worker
) -> None:
    worker.hold("train-1")
    plays.hand_out(assignment())
    worker.start()
    worker.wait_trained("train begin 0")
    plays.script[call].append(SupersededError("another process works as w, on host attic"))
    (worker.control / "hold-train-1").unlink() if call == "poll" else None
    assert worker.ended() == 4
    assert "on host attic" in worker.said
    assert "leave" not in plays.names
    assert "abandon" not in plays.names


def test_a_state_folder_that_cannot_be_written_ends_the_agent_with_a_sentence(
    starter: Starter, tmp_path: Path, plays: ScriptedCoordinator
) -> None:
    (tmp_path / "file").touch()
    worker = Worker(starter, tmp_path, plays.url, state=tmp_path / "file" / "state")
    worker.start()
    assert worker.ended() == 1
    assert "cannot be used" in worker.said
    assert "Traceback" not in worker.said
    assert plays.names == []


def test_an_agent_waits_for_a_coordinator_that_is_away_and_says_so(starter: Starter, tmp_path: Path) -> None:
    with ScriptedCoordinator() as gone:
        url = gone.url
    with Worker(starter, tmp_path, url) as worker:
        worker.start()
        wait_until("a word", lambda: "does not answer" in worker.said)
        assert worker.terminate() == 0
        assert worker.said.count("does not answer") == 1


# ---------------------------------------------------------------- no room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=True)
    yield folder
    for mount in reversed([line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]):
        if Path(mount).is_relative_to(folder):
            subprocess.run(["umount", "-l", mount], check=True)


@needs_mounts
def test_a_worker_without_room_gives_the_work_back_and_takes_some_when_it_has(
    starter: Starter, small_disk: Path, tmp_path: Path, plays: ScriptedCoordinator
) -> None:
    with Worker(starter, tmp_path, plays.url, state=small_disk / "state") as worker:
        worker.start()
        plays.wait_call("poll")
        filler = small_disk / "filler"
        with filler.open("wb") as file, suppress(OSError):
            file.write(bytes(1_400_000))
        plays.hand_out(assignment())
        reason = plays.wait_call("abandon").body
        assert reason["code"] == "disk_full"
        assert re.search(
            rf"\d+ bytes free in {re.escape(str(worker.state))}, and this needs {2 * len(MODEL)}", reason["sentence"]
        )
        plays.wait_for("two degraded polls", lambda: sum(bool(call.body["degraded"]) for call in plays.of("poll")) >= 2)
        assert "model" not in plays.names  # there was no room, and nothing was fetched
        filler.unlink()
        plays.wait_for(
            "a poll that is well", lambda: bool(plays.of("poll")) and plays.of("poll")[-1].body["degraded"] == ""
        )
        assert worker.said.count("degraded, so no work is taken") == 1
        assert worker.said.count("well again") == 1
        plays.hand_out(assignment(attempt=2))
        plays.wait_for("the update", lambda: WORK in plays.accepted)


@needs_mounts
def test_a_disk_that_fills_up_during_a_download_is_not_kept_full_by_it(
    starter: Starter, small_disk: Path, tmp_path: Path, plays: ScriptedCoordinator
) -> None:
    filler = small_disk / "filler"

    def fill() -> None:
        with filler.open("wb") as file, suppress(OSError):
            for _ in range(1000):
                file.write(bytes(4096))
                file.flush()

    with Worker(starter, tmp_path, plays.url, state=small_disk / "state") as worker:
        plays.script["model"].append(fill)
        plays.hand_out(assignment())
        worker.start()
        reason = plays.wait_call("abandon").body
        assert reason["code"] == "disk_full"
        assert re.search(r"\(\d+ bytes are free there\).*No space left on device", reason["sentence"])
        plays.wait_for(
            "a degraded poll", lambda: bool(plays.of("poll")) and plays.of("poll")[-1].body["degraded"] != ""
        )
        assert not list(worker.state.glob("models/*.part"))
        filler.unlink()
        plays.wait_for(
            "a poll that is well", lambda: bool(plays.of("poll")) and plays.of("poll")[-1].body["degraded"] == ""
        )
        plays.hand_out(assignment(attempt=2))
        plays.wait_for("the update", lambda: WORK in plays.accepted)


@needs_mounts
def test_a_worker_on_a_disk_that_became_read_only_gives_the_work_back_and_lives(
    starter: Starter, small_disk: Path, tmp_path: Path, plays: ScriptedCoordinator
) -> None:
    with Worker(starter, tmp_path, plays.url, state=small_disk / "state") as worker:
        worker.start()
        plays.wait_call("poll")
        remount(small_disk / "state" / "work", "ro")
        plays.hand_out(assignment())
        reason = plays.wait_call("abandon").body
        assert reason["code"] == "disk_full"
        assert "Read-only file system" in reason["sentence"]
        plays.wait_for("two degraded polls", lambda: sum(bool(call.body["degraded"]) for call in plays.of("poll")) >= 2)
        remount(small_disk / "state" / "work", "rw")
        plays.wait_for(
            "a poll that is well", lambda: bool(plays.of("poll")) and plays.of("poll")[-1].body["degraded"] == ""
        )
        plays.hand_out(assignment(attempt=2))
        plays.wait_for("the update", lambda: WORK in plays.accepted)


@needs_mounts
def test_a_settled_update_that_cannot_be_deleted_is_held_no_longer_and_takes_no_worker_with_it(
    starter: Starter, small_disk: Path, tmp_path: Path, plays: ScriptedCoordinator
) -> None:
    with Worker(starter, tmp_path, plays.url, state=small_disk / "state") as worker:
        plays.hand_out(assignment())
        worker.start()
        plays.wait_for("it to be kept", lambda: _kept_is_told(plays))
        remount(worker.state / "work", "ro")
        plays.answer_poll(settled=plays.of("poll")[-1].body["holding"])
        plays.wait_for(
            "a degraded poll", lambda: bool(plays.of("poll")) and "Read-only" in plays.of("poll")[-1].body["degraded"]
        )
        assert plays.of("poll")[-1].body["holding"] == []
        remount(worker.state / "work", "rw")
        plays.wait_for(
            "a poll that is well", lambda: bool(plays.of("poll")) and plays.of("poll")[-1].body["degraded"] == ""
        )


def remount(folder: Path, how: str) -> None:
    """Make a folder read-only or writable, by a mount of itself: files open elsewhere on the disk do not stand against
    it."""
    if how == "ro":
        subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", f"remount,bind,{how}", str(folder)], check=True)


@pytest.mark.parametrize(
    ("words", "code"),
    [("[Errno 30] Read-only file system", "disk_full"), ("a bug of ours", "worker_error")],
)
def test_what_the_disk_did_to_the_child_is_told_from_what_the_task_did(
    words: str, code: str, plays: ScriptedCoordinator, worker: Worker
) -> None:
    event = {"code": "worker_error", "sentence": f"OSError in the training process: {words}", "detail": "a traceback"}
    (worker.control / "fail-train").write_text(json.dumps(event))
    plays.hand_out(assignment())
    worker.start()
    assert plays.wait_call("abandon").body["code"] == code
    assert (plays.wait_call("poll", 2).body["degraded"] != "") == (code == "disk_full")  # it may soon be well again


def test_a_broken_disk_stops_the_agent_with_a_sentence(plays: ScriptedCoordinator, worker: Worker) -> None:
    event = {"code": "worker_error", "sentence": "OSError: [Errno 5] Input/output error", "detail": ""}
    (worker.control / "fail-train").write_text(json.dumps(event))
    plays.hand_out(assignment())
    worker.start()
    assert worker.ended() == 74
    assert "is broken" in worker.said
    assert "Traceback" not in worker.said
    assert plays.names[-1] == "leave"


# ---------------------------------------------------------------- loaded before there is work


def preparation(**fields: Any) -> dict[str, Any]:
    """What a poll is answered with to have the job of assignment() loaded."""
    given = assignment().model_dump(mode="json")
    return {"job": given["job"], "task": given["task"], "spec": given["spec"], **fields}


def test_a_job_that_was_loaded_before_there_was_work_is_not_opened_again(
    plays: ScriptedCoordinator, worker: Worker
) -> None:
    plays.answer_poll(prepare=preparation())
    worker.start()
    assert plays.wait_call("poll", 2).body["loaded"] == ["job-1"]
    assert worker.asked() == ["open", "describe"]
    assert "heartbeat" not in plays.names
    plays.hand_out(assignment())
    plays.wait_for("the update", lambda: WORK in plays.accepted)
    assert worker.asked() == ["open", "describe", "train", "train begin 0", "train end"]
    plays.answer_poll(forget=["job-1"])
    plays.wait_for("it to be forgotten", lambda: bool(plays.of("poll")) and plays.of("poll")[-1].body["loaded"] == [])


@pytest.mark.parametrize("do", ["open", "describe"])
def test_a_job_that_could_not_be_loaded_costs_nothing_and_may_still_be_trained(
    do: str, plays: ScriptedCoordinator, worker: Worker
) -> None:
    fails = worker.control / f"fail-{do}"
    fails.write_text(json.dumps({"code": "no_data", "sentence": "the data is elsewhere", "detail": ""}))
    plays.answer_poll(prepare=preparation())
    worker.start()
    plays.wait_call("poll", 2)
    assert "job-1 is not loaded: the data is elsewhere" in worker.said
    fails.unlink()
    plays.hand_out(assignment())
    plays.wait_for("the update", lambda: WORK in plays.accepted)
    assert "abandon" not in plays.names


def test_a_task_that_is_not_trusted_is_not_loaded(plays: ScriptedCoordinator, worker: Worker) -> None:
    plays.answer_poll(prepare=preparation(task={"name": "theirs", "digest": "a" * 64}))
    worker.start()
    assert plays.wait_call("poll", 2).body["loaded"] == []
    assert worker.asked() == []
    assert "--trust" in worker.said


def test_other_bytes_under_a_listed_digest_are_never_run(plays: ScriptedCoordinator, worker: Worker) -> None:
    file = worker.control.parent / "mine.py"
    file.write_text("def model(config): ...\n")
    listed = {"name": "mine", "digest": hashlib.sha256(file.read_bytes()).hexdigest()}
    plays.hand_out(assignment(task=listed))  # its bytes are the model's, under any address
    worker.start("--trust", "listed", "--allow", str(file))
    wait_until("it to be dropped", lambda: "given up after 5 times" in worker.said or "dropped:" in worker.said)
    assert "their SHA-256 is" in worker.said
    assert worker.asked() == []
    assert not list((worker.state / "tasks").rglob("*.py"))


def test_a_signer_that_is_taken_out_of_the_list_counts_no_more_at_the_next_work(
    plays: ScriptedCoordinator, worker: Worker
) -> None:
    private, source = Ed25519PrivateKey.generate(), b"def model(config): ..."
    digest = hashlib.sha256(source).hexdigest()
    signature = sign(digest, "ada", private)
    file = worker.state / "tasks" / digest / "mine.py"
    file.parent.mkdir(parents=True)
    file.write_bytes(source)
    signers = worker.control.parent / "signers.txt"
    ada = Signer("ada", private.public_key().public_bytes_raw())
    signers.write_text(f"{ada.line}\n")
    task = {"name": "mine", "digest": digest, "signatures": [signature.model_dump()]}
    plays.hand_out(assignment(task=task))
    worker.start("--trust", "signed", "--signers", str(signers))
    plays.wait_for("the update", lambda: WORK in plays.accepted)
    assert plays.wait_call("register").body["signers"] == [ada.id]
    signers.write_text("# nobody\n")
    plays.hand_out(assignment(2, task=task))
    assert plays.wait_call("abandon").body["code"] == "not_trusted"
    assert f"signed by ada (key {ada.id}), whose key is not listed here" in plays.of("abandon")[0].body["sentence"]
    assert len(worker.trained()) == 2  # begin and end, of the first


def test_a_signal_ends_the_loading_of_a_job_at_once(plays: ScriptedCoordinator, worker: Worker) -> None:
    worker.hold("describe")
    plays.answer_poll(prepare=preparation())
    worker.start()
    wait_until("the child to be asked", lambda: "describe" in worker.asked())
    assert worker.terminate() == 0
    assert plays.names[-1] == "leave"
    assert "Traceback" not in worker.said


def test_a_child_that_ran_a_built_in_task_serves_the_next_job_and_no_other_child_does(
    plays: ScriptedCoordinator, worker: Worker
) -> None:
    source = b"def model(config): ..."
    theirs = {"name": "theirs", "digest": hashlib.sha256(source).hexdigest()}
    file = worker.state / "tasks" / theirs["digest"] / "theirs.py"
    file.parent.mkdir(parents=True)
    file.write_bytes(source)
    for number, task in enumerate([{"name": "digits"}, theirs, {"name": "digits"}], start=1):
        plays.answer_poll(prepare=preparation(job=f"job-{number}", task=task))
    worker.start("--trust", "any")
    assert [plays.wait_call("poll", n).body["loaded"] for n in (2, 3, 4)] == [["job-1"], ["job-2"], ["job-3"]]
    assert worker.asked() == ["open", "describe", "close", "open", "describe", "open", "describe"]


# ---------------------------------------------------------------- a real coordinator


@pytest.mark.acceptance
def test_a_job_whose_worker_is_killed_in_each_round_trains_each_step_once(starter: Starter, tmp_path: Path) -> None:
    with LocalFleet(tmp_path) as fleet:
        token = (fleet.state / "join.token").read_text().strip()
        with Worker(starter, tmp_path, fleet.url, token) as worker:
            worker.start()
            hold, later = worker.hold("train-2"), worker.control / "hold-train-3"
            job = fleet.submit(rounds=2, data={"shards": 1}, round={"evaluate_every": 0})
            for number in (1, 2):
                worker.wait_trained("train begin 0", number)
                wait_until("the held step", lambda: _checkpoints(worker) == ["2"])
                worker.kill()
                worker.start()
                worker.wait_trained("train begin 2", number)
                later.touch()
                hold.unlink()
                wait_until("the next step", lambda: _checkpoints(worker) == ["3"])
                hold.touch()  # for the next round, which may begin at once
                later.unlink()
                worker.wait_trained("train end", number)
            fleet.finish(job)
            facts = fleet.facts(job)
            handed_out = [fact for fact in of_type(facts, "handed_out") if fact["kind"] == "train"]
            assert [(fact["round"], fact["attempt"]) for fact in handed_out] == [(1, 1), (2, 1)]
            assert [fact["resumed_at"] for fact in of_type(facts, "accepted")] == [2, 2]
            assert list(of_type(facts, "handed_back")) == []
            wait_until("the spool to be empty", lambda: not worker.attempts())


def _checkpoints(worker: Worker) -> list[str]:
    found = list[str]()
    for path in (worker.state / "work").glob("*/checkpoint"):
        with suppress(FileNotFoundError):  # it is trained, and the agent deletes what it needs no more
            found.append(path.read_text())
    return found
