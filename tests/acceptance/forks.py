"""Coordinators, agents and commands without the seconds that each takes to load: a program that has, forks them.

A test run starts hundreds of them, and loading is most of what they cost. A forked one differs in nothing that a fleet
shows: its arguments, environment, folder, output, signals and end are its own. Its command line and the environment
that it began with, as /proc has them, are the program's, and its memory holds what all three need; a test that looks at
those starts processes anew (kit.Process), and so does one for which Python or its libraries load something else.

Agents have a program of their own, with torch in it: they fork their children in turn (tests.acceptance.children).

A program reads a JSON object a line: {"module", "arguments", "environment", "cwd", "out", "err"} starts a process and
is answered with its id; {"wait": id} is answered with its exit code (negative: the signal).
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import forking
from tests.acceptance import children

MODULES = ("server", "worker", "client.main")
SPACES = (Path("/proc/thread-self/ns/mnt"), Path("/proc/thread-self/ns/net"))  # what a test may have changed for itself


LOADING = ("PYTHON", "LD_")  # what such variables begin with


def loading(environment: Mapping[str, str]) -> dict[str, str]:
    """What decides how Python and the libraries are loaded: too late for a process that has loaded them."""
    return {name: value for name, value in environment.items() if name.startswith(LOADING)}


OURS = loading(os.environ)  # of every program, whatever a test has put there by the time that it is started


def spaces() -> list[str]:
    """The namespaces that a process started now would be in."""
    return [str(space.readlink()) for space in SPACES]


class Forked:
    """One process: of subprocess.Popen what fleets use."""

    def __init__(self, program: "Program", pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._program, self._handle = program, os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self._end(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended."""
        code = self._end(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _end(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._handle], [], [], timeout)[0]:
            self.returncode = self._program.ask({"wait": self.pid})
            os.close(self._handle)
        return self.returncode


class Program:
    """A program, as the test sees it."""

    def __init__(self, *, agents: bool) -> None:
        self.agents, self.spaces = agents, spaces()
        others = {name: value for name, value in os.environ.items() if not name.startswith(("LYDIAN_", *LOADING))}
        environment = others | OURS
        if agents:
            environment |= children.LOADED
        self._asking = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.acceptance.forks", *(["agents"] if agents else [])],
            env=environment, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        atexit.register(self.close)

    def ask(self, asked: Mapping[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._asking:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


_programs: list[Program] = []


def _program(module: str) -> Program:
    """The program that forks this module's processes, in the namespaces of now; it is started when there is none."""
    agents = module == "worker"
    for program in _programs:
        if program.agents == agents and program.spaces == spaces():
            return program
    _programs.append(Program(agents=agents))
    return _programs[-1]


def start(
    arguments: list[str], environment: dict[str, str], out: Path, err: Path, cwd: Path | None = None
) -> Forked | None:
    """A forked process for this command line of Python; None: it has to be started by itself.

    Args:
        arguments: -m, a module, and what follows.
        environment: all of it.
        out: what it prints is appended here.
        err: what it says besides; may be the same file.
        cwd: its working directory; None: this process's.
    """
    if arguments[0] != "-m" or arguments[1] not in MODULES or loading(environment) != OURS:
        return None
    program = _program(arguments[1])
    asked = {"module": arguments[1], "arguments": arguments[2:], "environment": environment}
    return Forked(program, program.ask({**asked, "cwd": str(cwd or Path.cwd()), "out": str(out), "err": str(err)}))


def run(arguments: list[str], environment: dict[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run one to its end, as subprocess.run does."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = start(arguments, environment, out, err)
        assert process is not None, "this one has to be started by itself"
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
            process.wait()
        return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())


# ---------------------------------------------------------------- the program itself


def become(asked: dict[str, Any]) -> None:
    """Be the process that was asked for, as if it had been started by itself. Ends the process."""
    for number, name in enumerate((os.devnull, asked["out"], asked["err"])):
        file = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT if number else os.O_RDONLY, 0o666)
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["cwd"])
    sys.argv[1:] = asked["arguments"]
    match asked["module"]:
        case "server":
            server.app(prog_name="lydian serve")
        case "worker":
            children.install()
            worker.app(prog_name="lydian work")
        case _:
            client.main()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # who starts it ends it, after all that it has started
        signal.signal(number, signal.SIG_IGN)
    forking.serve(become)


if __name__ == "__main__":
    from client import main as client
    from server import __main__ as server
    from worker import __main__ as worker

    if sys.argv[1:] == ["agents"]:
        children.load()
    main()
