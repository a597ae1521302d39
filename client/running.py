"""Starting the other parts: becoming the coordinator or a worker, and child processes that never outlive their starter.

The client imports neither `server` nor `worker`: it starts them as `python -m server` and `python -m worker`.
"""

import contextlib
import ctypes
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from common.errors import LydianError

GRACE_S = 8.0  # for a child to end by itself after SIGTERM
LOOK_S = 0.05  # between two looks at a file that another process writes
TAIL_LINES = 15

_NEEDS = {
    "server": ("fastapi", "uvicorn"),
    "worker": ("psutil",),
    "worker.simulation": ("psutil",),
    "worker.probe": ("psutil",),
    "worker.describe": ("psutil", "torch"),
    "server.proof": ("numpy",),
    "worker.export": ("psutil", "torch"),
    "bench": ("fastapi", "uvicorn", "psutil", "torch"),
}
_REQUIREMENTS = {
    "server": "requirements_server.txt",
    "server.proof": "requirements_server.txt",
    "worker": "requirements_new_gpu.txt or requirements_legacy_gpu.txt",
    "bench": "requirements_server.txt -r requirements_new_gpu.txt",
    "worker.probe": "requirements_server.txt",
    "worker.describe": "requirements_new_gpu.txt or requirements_legacy_gpu.txt",
    "worker.export": "requirements_new_gpu.txt or requirements_legacy_gpu.txt",
    "worker.simulation": "requirements_new_gpu.txt or requirements_legacy_gpu.txt",
}
_ROOT = Path(__file__).resolve().parent.parent
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def become(module: str, arguments: Sequence[str]) -> NoReturn:
    """Become `python -m MODULE …`: the same process, so that signals and service managers reach the real thing.

    Raises:
        LydianError: missing_packages, this installation lacks what the module needs.
    """
    command = python_module(module, arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)  # noqa: S606 - our own interpreter, no shell


def python_module(module: str, arguments: Sequence[str]) -> list[str]:
    """The command line that runs one of our modules with this interpreter.

    An installed module is looked for with -P, so that a worker.py in the working directory is not taken for it.

    Raises:
        LydianError: missing_packages, this installation lacks what the module needs; needs_clone, or the module itself.
    """
    missing = [name for name in _NEEDS[module] if importlib.util.find_spec(name) is None]
    if missing:
        raise LydianError(
            f"`python -m {module}` needs {' and '.join(missing)}, which {sys.executable} does not have",
            code="missing_packages",
            advice=f"In a clone: pip install -r {_REQUIREMENTS[module]}.",
        )
    if not _ROOT.joinpath(*module.split("."), "__main__.py").is_file():
        raise LydianError(
            f"`python -m {module}` is not part of what was installed: it needs a clone of the repository",
            code="needs_clone",
            advice="In a clone: make bench.",
        )
    root = str(_ROOT)
    installed = root in {str(Path(entry).resolve()) for entry in sys.path[0 if sys.flags.safe_path else 1 :]}
    return [sys.executable, *(["-P"] if installed else []), "-m", module, *arguments]


@dataclass(frozen=True, slots=True)
class Child:
    """One process that was started here."""

    name: str
    process: subprocess.Popen[bytes]
    out: Path
    log: Path

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self.process.poll() is not None

    def tail(self) -> str:
        """The last lines of what it said on stderr."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])


class Children:
    """Processes that end when the block ends, in whatever way; on Linux even when this process is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Child:
        """Start a process; what it says goes to NAME.out and NAME.log in the folder."""
        out, log = self.folder / f"{name}.out", self.folder / f"{name}.log"
        with out.open("wb") as out_file, log.open("wb") as log_file, _no_end_between():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=log_file,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C is for us; we end them in order
                preexec_fn=_dies_with(os.getpid()),  # noqa: PLW1509 - no thread of ours runs at this point
            )
            self.started.append(Child(name, process, out, log))
        return self.started[-1]

    def check(self) -> None:
        """Make sure that all still run.

        Raises:
            LydianError: child_ended, with the code of the one that does not.
        """
        for child in self.started:
            if child.ended:
                raise LydianError(
                    f"{child.name} ended by itself with exit code {child.process.returncode}",
                    code="child_ended",
                    advice="The last lines of its log say why.",
                )

    def stop(self) -> None:
        """End them, the newest first, the one that all need last: SIGTERM, and SIGKILL after a grace."""
        try:
            _end(self.started[:0:-1])
        finally:
            _end(self.started[:1])


def wait_for_line(child: Child, start: str, *, timeout_s: float) -> str:
    """What follows `start` on the first line of a child's stdout that begins with it.

    Raises:
        LydianError: not_ready, it ended or the time was up before the line came.
    """
    until = time.monotonic() + timeout_s
    while True:
        ended = child.ended  # asked before reading: what was written before the end is not missed
        lines = child.out.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # whole lines
        found = [line.removeprefix(start).strip() for line in lines if line.startswith(start)]
        if found:
            return found[0]
        if ended or time.monotonic() > until:
            how = f"ended with exit code {child.process.returncode}" if ended else f"was not ready in {timeout_s:.0f} s"
            raise LydianError(f"{child.name} {how}", code="not_ready", advice="The last lines of its log say why.")
        time.sleep(LOOK_S)


def _end(children: Sequence[Child]) -> None:
    for child in children:
        if not child.ended:
            child.process.terminate()
    until = time.monotonic() + GRACE_S
    try:
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, until - time.monotonic()))
    finally:  # a second Ctrl-C comes here at once
        for child in children:
            if not child.ended:  # else its number may be another's by now
                os.killpg(child.process.pid, signal.SIGKILL)  # with whatever it has started itself
            child.process.wait()


@contextlib.contextmanager
def _no_end_between() -> Iterator[None]:
    """Signals that end this process wait: between its birth and its being counted, a child would be lost to us.

    By handlers and not by a mask: any other thread would take the signal, and Python then runs the handler in the main
    thread all the same, in the middle of whatever that does. In another thread nothing has to wait.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for caught in heard:
            signal.raise_signal(caught)


def _dies_with(parent: int) -> Callable[[], None] | None:
    """What a child does before it starts: has the kernel end it with its parent, if it can."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up here: a child that has forked should do little

    def ask_kernel() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # SIGTERM would let a worker finish first, with nobody to report to
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return ask_kernel
