"""The agent's handle on the child that trains: start it, ask it, stop it, bury it. Never imports torch.

    ask(command) ──one line of JSON──▶ stdin  ┐
    on_progress, the result ◀─lines─── stdout │ worker/task_host.py, a process in a group of its own
    the log file ◀─────────────────── stderr  ┘

Two threads a child. The keeper starts the process, waits for its end and reaps it together with all that it started; it
lives as long as the child because Linux tells a child that its parent died when the *thread* that started it ends. The
reader turns lines into events. Nothing here polls, except two seconds at the most for the stacks of a child that hangs.

On several devices the process is torchrun, and rank 0, one of those that it starts, is the one that speaks. Each rank
has a session of its own then, so they and what they start are known by a mark in their environment.
"""

import io
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

import psutil  # type: ignore[import-untyped]

from common.advice import LOG_MARK, advise
from common.errors import LydianError
from common.messages import Progress, Scene, TorchBuild
from worker.cage import environment as kept_of
from worker.caging import Cage, LeftOddError
from worker.scene import scene_now

HOST = Path(__file__).with_name("task_host.py")
HELLO_TIMEOUT_S = 180.0  # importing torch from a cold, slow disk takes a minute
STACKS_TIMEOUT_S = 2.0  # for a hanging child to write where it is
BURY_TIMEOUT_S = 10.0  # for a killed child to be gone; one that a driver holds in the kernel takes longer
DRAIN_TIMEOUT_S = 2.0  # for the last lines of a child that has ended
LOG_LINES = 200  # of the log, in the detail of a failure
LOG_BYTES = 90_000  # at most; with the longest traceback that the child sends, still within DETAIL_LIMIT
SENTENCE_LIMIT, DETAIL_LIMIT = 2_000, 200_000  # characters, as messages.Abandon takes them
MARK = "TRAINING_PROCESSES"  # in the environment of a child and of all that it starts
STACK_MARK = b"(most recent call first)"  # what faulthandler writes above each stack


class TaskFailure(LydianError):  # noqa: N818 - the word of the protocol
    """A command did not succeed. The code is one of messages.Abandon's, the detail has tracebacks and the log's end."""

    code = "task_failed"

    def __init__(self, code: str, sentence: str, detail: str = "", scene: Scene | None = None) -> None:
        self.sentence, self.scene = sentence[:SENTENCE_LIMIT], scene
        self.detail = detail[-DETAIL_LIMIT:]
        advice = advise(code, self.sentence, self.detail, scene).words
        super().__init__(self.sentence, advice=advice or "Look into the worker's log.", code=code)


class TaskStopped(Exception):  # noqa: N818 - not an error: what was asked for
    """The command ended early because stop() or kill() was called."""


@dataclass(frozen=True)
class Exited:
    """The last thing to come from a child."""

    code: int  # negative: the number of the signal that killed it
    rank: str = ""  # where torchrun lost one of several: "rank 1 of 2", whose code it is

    def words(self) -> str:
        """How it ended, for a person."""
        if self.rank:
            return f"lost {self.rank}, which {Exited(self.code).words()}"
        if self.code >= 0:
            return f"ended with exit code {self.code}"
        known = -self.code in {member.value for member in signal.Signals}
        name = signal.Signals(-self.code).name if known else f"signal {-self.code}"
        hint = " (the kernel's out-of-memory killer does that: see dmesg)" if -self.code == signal.SIGKILL else ""
        return f"was killed by {name}{hint}"


class Child:
    """One training process. Any thread may call stop() and kill() while another waits in ask()."""

    def __init__(self, log_path: Path, cage: Cage | None = None) -> None:
        """Use Child.start."""
        self.log_path, self._cage = log_path, cage
        self._inbox: queue.Queue[dict[str, Any] | Exited] = queue.Queue()
        self._asking = threading.RLock()  # one command at a time
        self._writing = threading.Lock()  # guards stdin and _busy
        self._burying = threading.Lock()  # guards the process's number: after reaping it may belong to a stranger
        self._busy = False  # a command is under way and was not asked to stop
        self._reaped = False
        self._holding = self._was_held = False  # it is made to stand still; it was since its last sign of life
        self._end: TaskFailure | TaskStopped | None = None  # why there is nothing more to ask; the first reason stays
        self._hello: TorchBuild | None = None
        self._mark = uuid.uuid4().hex
        self._lost: Exited | None = None  # what torchrun said of the rank that it lost
        self._keeper: threading.Thread
        self._process: subprocess.Popen[bytes]

    @classmethod
    def start(
        cls,
        *,
        device: str,
        threads: int,
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        gpu_memory: float = 1.0,
        cage: Cage | None = None,
    ) -> "Child":
        """Start a training process. Returns at once; `hello` or the first ask() waits until it is ready.

        Args:
            device: cpu, cuda, cuda:N, mps, xpu or auto; cuda:all, cuda:0,1 or cpu:N for a process on each.
            threads: CPU threads that it computes with, all processes together; 0 leaves torch's choice.
            log_path: its prints, warnings and stacks are appended here; the folder is made.
            gpu_memory: the most of the device's memory that it may take: a share up to 1, or bytes.
            environment: of which it gets what worker.cage lets through; this process's if None.
            cage: its surroundings; None: this process's own.

        Raises:
            OSError: the log cannot be opened or the process not started.
        """
        log_path.parent.mkdir(parents=True, exist_ok=True)
        child = cls(log_path, cage)
        child._meeting.unlink(missing_ok=True)
        command = [sys.executable, "-P", "-u", str(HOST), "--device", device, "--threads", str(threads)]
        command += ["--store", str(child._meeting), *(["--gpu-memory", str(gpu_memory)] if gpu_memory != 1 else [])]
        given = os.environ if environment is None else environment
        if cage is None:
            variables = kept_of(given, given.get("LYDIAN_CHILD_ENV", "").split())
        else:
            cage.prepare()
            variables = cage.environment(given)
            command = cage.command([*command, "--limits", cage.limits()])
        launched: queue.Queue[subprocess.Popen[bytes] | OSError] = queue.Queue()
        child._keeper = threading.Thread(
            target=child._keep,
            args=(command, {**variables, MARK: child._mark}, launched),
            name="child-keeper",
            daemon=True,
        )
        child._keeper.start()
        process = launched.get()
        if isinstance(process, OSError):
            raise process
        child._process = process
        return child

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    @property
    def _meeting(self) -> Path:
        """The file where several ranks find each other."""
        usual = self.log_path.with_suffix(".ranks")
        return usual if self._cage is None else self._cage.meeting(usual)

    @property
    def pid(self) -> int:
        """The process's number, which is also its group's."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process has not ended yet."""
        return not self._reaped

    @property
    def hello(self) -> TorchBuild:
        """What the child says about its torch and its device; the first call waits for it, HELLO_TIMEOUT_S at most.

        Raises:
            TaskFailure: worker_error: torch or the device does not work here, or takes too long; the child is killed.
            TaskStopped: kill() was called.
        """
        with self._asking:
            if self._hello is None:
                try:
                    self._hello = self._await_hello()
                finally:
                    if self._hello is None:
                        self.kill()
            return self._hello

    @property
    def build(self) -> TorchBuild | None:
        """The same where it has come already; None: not yet. Never waits."""
        return self._hello

    def ask(
        self, command: dict[str, Any], *, on_progress: Callable[[Progress], None], stall_s: float
    ) -> dict[str, Any]:
        """Have the child carry out one command, and wait for it.

        Args:
            command: `{"do": …}` with the fields that worker/task_host.py describes.
            on_progress: called in this thread for each report; when it raises, the child is killed.
            stall_s: seconds without any report after which the child counts as hanging. A download in the task's
                dataset() gives no reports, so be generous.

        Returns:
            the fields of the done event.

        Raises:
            TaskFailure: the command failed, the child ended (task_exited) or hung and was killed (task_stalled).
            TaskStopped: stop() was called and the child stopped, or kill() was called.
        """
        with self._asking:
            build = self.hello
            answered = False
            try:
                with self._writing:
                    self._write(command if self._cage is None else self._cage.lend(command))
                    self._busy = True
                event = self._await_answer(command, on_progress, stall_s)
                answered = True
                self._take(command, event)
            finally:
                with self._writing:
                    self._busy = False
                if not answered:
                    self.kill()  # what a child without an answer sends next would belong to nothing
                if self._cage is not None:
                    self._cage.have_back()
            if event["event"] == "stopped":
                raise TaskStopped(f"{command['do']} was stopped on {build.device}")
            if event["event"] == "error":
                raise self._failure(event["code"], event["sentence"], event["detail"])
            return {name: value for name, value in event.items() if name != "event"}

    def _take(self, command: dict[str, Any], event: dict[str, Any]) -> None:
        """Have the files of a command that is done."""
        if self._cage is not None and event["event"] == "done":
            try:
                self._cage.take(command)
            except LeftOddError as error:
                raise self._failure("task_failed", str(error)) from error

    def stop(self) -> None:
        """Ask the command under way to stop at its next step. Without one, nothing happens."""
        self.go_on()
        with self._writing:
            if self._busy:
                self._write({"do": "stop"})
                self._busy = False

    def hold(self) -> None:
        """Have it stand still where it is, with all that it started, until `go_on`; it keeps its memory. May be killed.

        Not where signals cannot do that (Windows): there it goes on.
        """
        self._holding = True
        self._signal_all("SIGSTOP")

    def go_on(self) -> None:
        """Undo `hold`. Without one, nothing happens."""
        if self._holding:
            self._holding, self._was_held = False, True
            self._signal_all("SIGCONT")

    def _signal_all(self, name: str) -> None:
        """A signal to the process and all that it started, some of it in sessions of its own."""
        with self._burying:
            if self._reaped or not hasattr(signal, name):
                return
            with suppress(psutil.NoSuchProcess):
                own = psutil.Process(self._process.pid)
                own.send_signal(getattr(signal, name))  # first, so that it starts no more of them
                for process in own.children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(getattr(signal, name))

    def kill(self) -> None:
        """Kill the process and all that it started, and wait until it is reaped. Again is harmless."""
        with self._burying:
            if not self._reaped:
                self._end = self._end or TaskStopped("the training process was killed on request")
                kill_group(self._process.pid)
        self._keeper.join(BURY_TIMEOUT_S)

    # ---------------------------------------------------------------- the two threads

    def _keep(
        self,
        command: list[str],
        environment: dict[str, str],
        launched: "queue.Queue[subprocess.Popen[bytes] | OSError]",
    ) -> None:
        """Start the process, wait for its end, and bury it with its group."""
        surroundings = {} if self._cage is None else {"cwd": self._cage.home, **self._cage.identity()}
        try:
            with self.log_path.open("ab") as log:
                process = subprocess.Popen(
                    command,
                    **surroundings,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                    bufsize=0,
                )
        except OSError as error:
            launched.put(error)
            return
        launched.put(process)
        reader = threading.Thread(target=self._read, args=(process.stdout,), name="child-reader", daemon=True)
        reader.start()
        if sys.platform == "linux":
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and its number still its own
        else:
            process.wait()
        with self._burying:
            kill_group(process.pid)
            code = process.wait()
            self._reaped = True
        kill_marked(self._mark)
        with suppress(OSError):  # the next start removes it, or says why it cannot
            self._meeting.unlink()
        if self._cage is not None:
            self._cage.clear()
            code = self._cage.exit_code(code)
        with self._writing:
            cast("io.FileIO", process.stdin).close()
        reader.join(DRAIN_TIMEOUT_S)
        self._inbox.put(self._lost or Exited(code))

    def _read(self, stdout: IO[bytes]) -> None:
        """Put each event into the inbox; any other line (a library's, before its prints were turned) into the log."""
        with io.BufferedReader(cast("io.FileIO", stdout)) as lines:  # unbuffered, it would be read byte by byte
            for line in lines:
                event = parsed(line)
                if event is not None and event["event"] == "lost":
                    self._lost = Exited(event["exit"], f"rank {event['rank']} of {event['ranks']}")
                    continue
                if event is not None:
                    self._inbox.put(event)
                    continue
                with self.log_path.open("ab") as log:
                    log.write(line)

    # ---------------------------------------------------------------- waiting for words

    def _write(self, command: dict[str, Any]) -> None:
        """Write one line, under the lock. A child that is gone cannot read it; its end will be told to who waits."""
        line = memoryview(json.dumps(command, allow_nan=False).encode() + b"\n")
        stdin = cast("io.FileIO", self._process.stdin)
        with suppress(BrokenPipeError):
            while line and not stdin.closed:
                line = line[stdin.write(line) :]

    def _next(self, timeout_s: float) -> dict[str, Any] | Exited:
        """The next event, or the end of the child.

        Raises:
            queue.Empty: nothing came in time.
            TaskFailure, TaskStopped: the child has ended and it is known why; whoever asks again is told again.
        """
        item = self._inbox.get(timeout=timeout_s)
        if isinstance(item, Exited):
            self._inbox.put(item)
            if self._end is not None:
                raise self._end
        return item

    def _await_hello(self) -> TorchBuild:
        """The child's first word."""
        try:
            first = self._next(HELLO_TIMEOUT_S)
        except queue.Empty:
            sentence = f"torch was not ready {HELLO_TIMEOUT_S:g} s after the training process had started"
            raise self._fatal("worker_error", sentence) from None
        if isinstance(first, Exited):
            last = next((line for line in reversed(tail(self.log_path)) if line.strip()), "it wrote nothing")
            sentence = f"the training process {first.words()} before it was ready: {last.strip()}"
            raise self._fatal("worker_error", sentence)
        if first["event"] == "error":
            raise self._fatal(first["code"], first["sentence"], first["detail"])
        return TorchBuild.model_validate(first["torch"])

    def _await_answer(
        self, command: dict[str, Any], on_progress: Callable[[Progress], None], stall_s: float
    ) -> dict[str, Any]:
        """The event that ends the command; hands on the progress before it."""
        doing = "starting"
        while True:
            try:
                event = self._next(stall_s)
            except queue.Empty:
                if self._holding or self._was_held:  # it could not give a sign of life all that time
                    self._was_held = False
                    continue
                self._ask_for_stacks()
                sentence = f"the task gave no sign of life for {stall_s:g} s in '{command['do']}', while {doing}"
                raise self._fatal("task_stalled", f"{sentence}: killed") from None
            if isinstance(event, Exited):
                raise self._fatal("task_exited", f"the task's process {event.words()} in '{command['do']}'")
            if event["event"] != "progress":
                return event
            self._was_held = False
            progress = Progress.model_validate({name: value for name, value in event.items() if name != "event"})
            doing = progress.doing
            on_progress(progress)

    def _ask_for_stacks(self) -> None:
        """Have a hanging child write its stacks to the log, and wait until they are there and complete."""
        for pid in self._speakers():
            self._ask_for_stacks_of(pid)

    def _ask_for_stacks_of(self, pid: int) -> None:
        older = log_end(self.log_path).count(STACK_MARK)
        with self._burying:
            if self._reaped:
                return
            os.kill(pid, signal.SIGUSR1)
        deadline, written, pause = time.monotonic() + STACKS_TIMEOUT_S, b"", threading.Event()
        while time.monotonic() < deadline:
            pause.wait(0.05)  # a file that grows wakes nobody up
            now = log_end(self.log_path)
            if now.count(STACK_MARK) > older and now == written:
                return
            written = now

    def _speakers(self) -> list[int]:
        """The processes that run the task: torchrun's children, where it is torchrun."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            if self._cage is not None and self._cage.sandbox == "bwrap":
                process = inmost(process)
            if self._hello is None or self._hello.ranks == 1:
                return [process.pid]
            return [child.pid for child in process.children() if carries(child, self._mark)]
        return []

    def _fatal(self, code: str, sentence: str, detail: str = "") -> TaskFailure:
        """A failure that ends the child; every later question gets it as its answer."""
        failure = self._failure(code, sentence, detail)
        with self._burying:
            self._end = self._end or failure
        return failure

    def _failure(self, code: str, sentence: str, detail: str = "") -> TaskFailure:
        """A failure with the end of the log, and the machine as it is now."""
        lines = tail(self.log_path)
        log = "\n".join([f"{LOG_MARK}{len(lines)} lines of {self.log_path.name}", *lines]) if lines else ""
        return TaskFailure(code, sentence, "\n".join(part for part in (detail, log) if part), scene_now(self._hello))


def inmost(process: psutil.Process) -> psutil.Process:
    """The training process of a bubblewrap, which is two processes itself: one outside, and the first one inside."""
    while (inner := process.children()) and str(HOST) not in process.cmdline()[:5]:
        process = inner[0]
    return process


def kill_group(group: int) -> None:
    """SIGKILL to every process of the group, if there is any."""
    with suppress(ProcessLookupError, PermissionError):  # macOS answers EPERM when only zombies are left
        os.killpg(group, signal.SIGKILL)


def kill_marked(mark: str) -> None:
    """SIGKILL to every process whose environment has this mark, until there is none, whatever group it went into."""
    while found := [process for process in psutil.process_iter() if carries(process, mark)]:
        for process in found:
            with suppress(psutil.NoSuchProcess):  # psutil looks that the number is still the same process's
                process.kill()
        psutil.wait_procs(found, timeout=BURY_TIMEOUT_S)


def carries(process: psutil.Process, mark: str) -> bool:
    """Whether the process runs and was started with this mark in its environment."""
    try:
        return bool(process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, OSError):  # it is gone, or somebody else's
        return False


def parsed(line: bytes) -> dict[str, Any] | None:
    """The event in a line, None if there is none."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):  # the task writes here as it likes
        return None
    return event if isinstance(event, dict) and "event" in event else None


def tail(path: Path, lines: int = LOG_LINES) -> list[str]:
    """The last lines of a log."""
    return log_end(path).decode(errors="replace").splitlines()[-lines:]


def log_end(path: Path) -> bytes:
    """The last LOG_BYTES of a file; nothing where somebody removed it."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - LOG_BYTES))
            return file.read()
    except FileNotFoundError:
        return b""
