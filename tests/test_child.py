"""The agent's handle on the child that trains, with real children: how they live, and every way in which they die."""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import LydianError
from common.messages import Abandon, Progress, TorchBuild
from worker import child as child_module
from worker.child import Child, Exited, TaskFailure, TaskStopped

STALL_S = 60.0
BOUND_S = 120.0  # for what happens at once on a machine that has nothing else to do

TASK = """
import os, signal, subprocess, sys, threading
import torch

def model(config):
    return torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(), torch.nn.Linear(8, 2))

def dataset(config, split):
    print("MARK", sorted(name for name in os.environ if name.startswith("LYDIAN")), os.environ["PYTHONHASHSEED"])
    return torch.utils.data.TensorDataset(torch.randn(8, 2), torch.zeros(8).long())

def train(model, loader, context):
    context.step(1.0, 1)
    {act}
"""


def ask(child: Child, do: str, on_progress: Callable[[Progress], None] = lambda _: None, **fields: Any) -> Any:
    return child.ask({"do": do, **fields}, on_progress=on_progress, stall_s=STALL_S)


def get_ready(child: Child, folder: Path, act: str) -> dict[str, Any]:
    """Open a task whose train() does this, and give the command that starts it."""
    (folder / "act.py").write_text(TASK.replace("{act}", act))
    ask(child, "open", task=str(folder / "act.py"), config={})
    ask(child, "init", seed=1, out=str(folder / "base"), labels=None)
    command = {"do": "train", "base": str(folder / "base"), "indices": None, "out": str(folder / "out")}
    return {**command, "seed": 1, "round": 1, "steps": 1_000_000}


def wait_until(true: Callable[[], bool], what: str, bound_s: float = BOUND_S) -> None:
    """Wait for something that another process does."""
    deadline, pause = time.monotonic() + bound_s, threading.Event()
    while not true():
        assert time.monotonic() < deadline, f"not within {bound_s:g} s: {what}"
        pause.wait(0.02)


def is_gone(pid: int) -> bool:
    """Whether a process is no more; one that init has not yet reaped is no more either."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Child]]:
    """All that the tests use up, started at once: importing torch takes its time, but not one after the other."""
    folder = tmp_path_factory.mktemp("children")
    started: dict[str, Child] = {}

    def start_all() -> None:
        environment = {**os.environ, "LYDIAN_TOKEN": "secret", "LYDIAN_URL": "http://nowhere"}
        for name in (
            "living",
            "crashes",
            "is killed",
            "hangs",
            "lacks its device",
            "is left alone",
            "hears noise",
            "is held",
        ):
            started[name] = Child.start(
                device="cuda:99" if name == "lacks its device" else "cpu",
                threads=1,
                log_path=folder / name / "child.log",
                environment=environment,
            )

    # Linux tells a child that its parent died when the thread that started it ends: it must not be this one.
    starter = threading.Thread(target=start_all)
    starter.start()
    starter.join()
    yield started
    for child in started.values():
        child.kill()


# ---------------------------------------------------------------- life


def test_a_child_ends_with_its_agent_even_one_that_died_while_it_wrote(children: dict[str, Child]) -> None:
    child = children["is left alone"]
    assert child.hello
    assert child._process.stdin is not None
    child._process.stdin.write(b'{"do": "tra')
    child._process.stdin.close()
    wait_until(lambda: not child.alive, "the child's own end")
    assert child._process.returncode == -signal.SIGKILL  # by its own hand, and its group with it
    assert "is no command" not in child.log_path.read_text()


def test_a_held_child_stands_still_with_all_that_it_started_and_is_not_taken_for_one_that_hangs(
    children: dict[str, Child], tmp_path: Path
) -> None:
    child, ended, stall_s = children["is held"], list[object](), 0.3
    started = 'subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)'
    act = f"other = {started}; print('OTHER', other.pid, flush=True)\n    while not context.done: context.step(1.0, 1)"
    command = get_ready(child, tmp_path, act)

    def train() -> None:
        try:
            child.ask(command, on_progress=lambda _: None, stall_s=stall_s if ended else STALL_S)
        except TaskStopped as stopped:
            ended.append(stopped)

    thread = threading.Thread(target=train)
    thread.start()
    wait_until(lambda: "OTHER " in child.log_path.read_text(), "the process that it starts")
    processes = [
        psutil.Process(child.pid),
        psutil.Process(int(child.log_path.read_text().split("OTHER ")[1].split()[0])),
    ]
    child.hold()
    for process in processes:
        wait_until(lambda process=process: process.status() == psutil.STATUS_STOPPED, f"{process} to stand still")  # type: ignore[misc]
    child.go_on()
    for process in processes:
        wait_until(lambda process=process: process.status() != psutil.STATUS_STOPPED, f"{process} to go on")  # type: ignore[misc]
    child.hold()
    child.stop()  # which it can only do when it goes on
    thread.join(BOUND_S)
    assert len(ended) == 1
    child.hold()
    again = threading.Thread(target=train)
    again.start()
    again.join(5 * stall_s)  # the time in which one that hangs is killed
    assert again.is_alive()
    assert child.alive
    child.kill()
    again.join(BOUND_S)
    assert len(ended) == 2
    with suppress(psutil.NoSuchProcess):
        processes[1].kill()


def test_hello_tells_the_build_and_outlives_the_thread_that_started_the_child(children: dict[str, Child]) -> None:
    child = children["living"]
    hello = child.hello
    assert isinstance(hello, TorchBuild)
    assert (hello.device, hello.threads) == ("cpu", 1)
    assert hello.version.split(".")[0].isdigit()
    assert child.hello is hello
    assert child.alive


def test_a_task_never_sees_our_tokens(children: dict[str, Child], tmp_path: Path) -> None:
    get_ready(children["living"], tmp_path, "pass")
    assert "MARK [] 0" in children["living"].log_path.read_text()


def test_a_command_is_answered_with_its_result_and_progress(children: dict[str, Child], tmp_path: Path) -> None:
    child, seen = children["living"], list[Progress]()
    command = get_ready(child, tmp_path, "pass")
    done = child.ask(command, on_progress=seen.append, stall_s=STALL_S)
    assert done["samples"] == 8
    assert "event" not in done
    assert [progress.doing for progress in seen[:2]] == ["loading", "training"]


def test_two_processes_train_the_same_command_to_the_same_bytes(children: dict[str, Child], tmp_path: Path) -> None:
    written = set()
    for name in ("living", "crashes"):
        folder = tmp_path / name
        folder.mkdir()
        get_ready(children[name], folder, "pass")
        task = (folder / "act.py").read_text().partition("def train")[0]  # the default loop
        (folder / "act.py").write_text(task)
        ask(children[name], "open", task=str(folder / "act.py"), config={"batch_size": 3})
        fields = {"base": str(folder / "base"), "indices": None, "out": str(folder / "out"), "seed": 1, "round": 1}
        ask(children[name], "train", **fields, epochs=3)
        written |= {(file.name, file.read_bytes()) for file in (folder / "base", folder / "out")}
    assert len(written) == 2  # one base, one result


def test_a_failure_carries_the_traceback_and_the_end_of_the_log(children: dict[str, Child], tmp_path: Path) -> None:
    noisy = "print('\\n'.join(f'line {n} of the noise' for n in range(500))); raise ValueError('wrong')"
    command = get_ready(children["living"], tmp_path, noisy)
    with pytest.raises(TaskFailure) as caught:
        children["living"].ask(command, on_progress=lambda _: None, stall_s=STALL_S)
    failure = caught.value
    assert failure.code == "task_failed"
    assert failure.sentence.startswith("ValueError in train(): wrong")
    assert "Traceback (most recent call last)" in failure.detail
    assert "line 499 of the noise" in failure.detail
    assert "line 299 of the noise" not in failure.detail
    assert failure.advice
    assert failure.scene is not None
    assert failure.scene.torch == children["living"].hello
    assert failure.scene.python == platform.python_version()
    assert children["living"].alive


@given(st.text(max_size=5_000), st.text(max_size=300), st.sampled_from(["task_failed", "task_exited", "no_data"]))
def test_a_failure_always_fits_into_what_is_sent_to_the_coordinator(sentence: str, detail: str, code: str) -> None:
    failure = TaskFailure(code, sentence, detail * 1_000)
    assert isinstance(failure, LydianError)
    Abandon(attempt=1, code=failure.code, sentence=failure.sentence, detail=failure.detail)


def test_a_log_of_endless_lines_never_pushes_the_traceback_out(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("x" * 1_000_000)
    traceback = "T" * 100_000  # as long as the child sends one
    detail = Child(tmp_path / "log")._failure("task_failed", "wrong", traceback).detail
    assert detail.startswith(traceback)
    assert detail.endswith("x" * 80_000)


def test_stop_from_another_thread_ends_the_command_and_the_child_goes_on(
    children: dict[str, Child], tmp_path: Path
) -> None:
    child, trains = children["living"], threading.Event()
    command = get_ready(child, tmp_path, "[context.step(1.0, 1) for _ in iter(int, 1)]")

    def stop_when_it_trains() -> None:
        assert trains.wait(BOUND_S)
        child.stop()

    stopper = threading.Thread(target=stop_when_it_trains)
    stopper.start()
    with pytest.raises(TaskStopped, match="train was stopped"):
        child.ask(command, on_progress=lambda progress: trains.set() if progress.step else None, stall_s=STALL_S)
    stopper.join()
    assert child.alive
    assert ask(child, "describe", labels=None) == {"train_samples": 8}


# ---------------------------------------------------------------- death


def test_kill_from_another_thread_ends_the_wait_and_all_that_the_task_started(
    children: dict[str, Child], tmp_path: Path
) -> None:
    child, trains = children["living"], threading.Event()
    sleeper = "open(config_file, 'w').write(str(subprocess.Popen(['sleep', '1000']).pid)); threading.Event().wait()"
    command = get_ready(child, tmp_path, sleeper.replace("config_file", repr(str(tmp_path / "pid"))))

    def kill_when_it_trains() -> None:
        assert trains.wait(BOUND_S)
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "", "the sleeper's start")
        child.kill()

    killer = threading.Thread(target=kill_when_it_trains)
    killer.start()
    with pytest.raises(TaskStopped, match="killed on request"):
        child.ask(command, on_progress=lambda p: trains.set() if p.doing == "training" else None, stall_s=STALL_S)
    killer.join()
    assert not child.alive
    wait_until(lambda: is_gone(int((tmp_path / "pid").read_text())), "the end of what the task started")
    child.kill()  # again
    child.stop()
    with pytest.raises(TaskStopped, match="killed on request"):
        ask(child, "describe", labels=None)


def test_a_child_that_crashes_is_told_by_its_signal_and_takes_along_what_it_started(
    children: dict[str, Child], tmp_path: Path
) -> None:
    child = children["crashes"]
    sleeper = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(subprocess.Popen(['sleep', '1000']).pid))"
    command = get_ready(child, tmp_path, f"{sleeper}; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(TaskFailure) as caught:
        child.ask(command, on_progress=lambda _: None, stall_s=STALL_S)
    assert caught.value.code == "task_exited"
    assert caught.value.sentence == "the task's process was killed by SIGSEGV in 'train'"
    assert "act.py" in caught.value.detail  # where it was
    assert not child.alive
    wait_until(lambda: is_gone(int((tmp_path / "pid").read_text())), "the end of what the task started")
    with pytest.raises(TaskFailure, match="SIGSEGV"):  # and not: killed on request
        ask(child, "describe", labels=None)


def test_a_child_that_the_kernel_kills_points_to_its_memory(children: dict[str, Child], tmp_path: Path) -> None:
    command = get_ready(children["is killed"], tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(TaskFailure) as caught:
        children["is killed"].ask(command, on_progress=lambda _: None, stall_s=STALL_S)
    assert caught.value.code == "task_exited"
    assert "SIGKILL (the kernel's out-of-memory killer does that" in caught.value.sentence


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "ended with exit code 0"), (139, "ended with exit code 139"), (-11, "was killed by SIGSEGV"),
     (-63, "was killed by signal 63")],
)  # fmt: skip
def test_every_end_has_words(code: int, words: str) -> None:
    assert Exited(code).words() == words


def test_a_child_that_hangs_is_killed_and_says_where_it_hung(children: dict[str, Child], tmp_path: Path) -> None:
    child = children["hangs"]
    command = get_ready(child, tmp_path, "threading.Event().wait()  # for ever")
    with pytest.raises(TaskFailure) as caught:
        child.ask(command, on_progress=lambda _: None, stall_s=3.0)  # in which a busy machine comes to where it hangs
    assert caught.value.code == "task_stalled"
    assert "no sign of life for 3 s in 'train', while training" in caught.value.sentence
    assert "in train" in caught.value.detail  # the stack of the thread that hung
    assert "act.py" in caught.value.detail
    assert not child.alive
    with pytest.raises(TaskFailure, match="no sign of life"):
        ask(child, "describe", labels=None)


def test_a_child_whose_torch_does_not_import_says_so_before_hello(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with Child.start(device="cpu", threads=1, log_path=tmp_path / "log", environment=environment) as child:
        with pytest.raises(TaskFailure) as caught:
            _ = child.hello
        assert caught.value.code == "worker_error"
        assert "ended with exit code 1 before it was ready" in caught.value.sentence
        assert caught.value.sentence.endswith("ImportError: libcudart.so.13: cannot open shared object file")
        assert not child.alive


def test_a_device_that_does_not_work_is_named_with_the_build(children: dict[str, Child]) -> None:
    child = children["lacks its device"]
    with pytest.raises(TaskFailure) as caught:
        _ = child.hello
    assert caught.value.code == "worker_error"
    assert caught.value.sentence.startswith("device cuda:99 does not work with torch ")
    assert "kernels for" in caught.value.sentence
    assert "Traceback" in caught.value.detail
    assert not child.alive


def test_a_line_that_is_no_command_ends_the_child_at_once_and_is_told(
    children: dict[str, Child], tmp_path: Path
) -> None:
    child = children["hears noise"]
    command = get_ready(child, tmp_path, "while context.step(1.0, 1): sys.stderr = None")
    stdin = child._process.stdin
    assert stdin is not None
    noise = [b'{"do": "tra\n']

    def disturb(progress: Progress) -> None:
        if progress.step and noise:
            stdin.write(noise.pop())

    with pytest.raises(TaskFailure) as caught:
        child.ask({**command, "steps": None, "seconds": BOUND_S}, on_progress=disturb, stall_s=STALL_S)
    assert caught.value.code == "task_exited"
    assert caught.value.sentence == "the task's process ended with exit code 1 in 'train'"
    told = [line for line in caught.value.detail.splitlines() if "a line on its stdin is no command" in line]
    assert len(told) == 1
    assert told[0].endswith("""b'{"do": "tra\\n'""")
    assert "Traceback" not in caught.value.detail


def test_a_child_can_be_killed_before_hello(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import threading\nthreading.Event().wait()\n")  # it never comes to hello
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    child = Child.start(device="cpu", threads=1, log_path=tmp_path / "log", environment=environment)
    killer = threading.Thread(target=child.kill)
    killer.start()
    with pytest.raises(TaskStopped):
        _ = child.hello
    killer.join()
    assert not child.alive


def test_a_log_that_cannot_be_opened_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        Child.start(device="cpu", threads=1, log_path=tmp_path)


AGENT = """
import sys
from pathlib import Path
from worker.child import Child
child = Child.start(device="cpu", threads=1, log_path=Path(sys.argv[1]))
child.hello
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child together with its parent")
def test_a_killed_agent_leaves_no_orphan_even_if_the_child_cannot_read(tmp_path: Path) -> None:
    command = [sys.executable, "-c", AGENT, str(tmp_path / "log")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=Path(child_module.__file__).parent.parent) as agent:
        assert agent.stdout is not None
        pid = int(agent.stdout.readline())
        os.kill(pid, signal.SIGSTOP)  # it does not see the end of its stdin: the kernel must see to it
        agent.kill()
    wait_until(lambda: is_gone(pid), f"the end of the child {pid}")


@given(st.binary(max_size=40))
def test_a_line_that_is_no_event_is_never_taken_for_one(line: bytes) -> None:
    event = child_module.parsed(line)
    assert event is None or "event" in event
